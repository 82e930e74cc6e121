"""``vz-edge serve``: answer OpenAI's chat completions over HTTP."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer

from vz_edge.serve.settings import RemoteLimits, Settings, check_exposure, read_token

STOP_SEC = 5.0
FAILED_STATUS = 70  # EX_SOFTWARE of sysexits.h: a supervisor that restarts on failure does


def command(
    bundle: Annotated[Path, typer.Argument(help="A folder written by 'vz-edge export'.")],
    host: Annotated[str, typer.Option(help="The address to listen on; any but this machine's own needs a token.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8000,
    token_file: Annotated[
        Path | None, typer.Option(help="A file with the token that clients must send; else VZ_EDGE_TOKEN, else none.")
    ] = None,
    queue_length: Annotated[int, typer.Option(help="Requests that wait while one is answered; more get a 429.")] = (
        Settings.queue_length
    ),
    deadline_sec: Annotated[float, typer.Option(help="From a request to its answer's end, the wait included.")] = (
        Settings.deadline_sec
    ),
    max_body_bytes: Annotated[int, typer.Option(help="The largest request, its pictures in base64.")] = (
        Settings.max_body_bytes
    ),
    max_pixels: Annotated[int, typer.Option(help="Of all pictures of a request, together.")] = Settings.max_pixels,
    allow_remote_images: Annotated[
        bool, typer.Option("--allow-remote-images", help="Fetch pictures from public web addresses, too.")
    ] = False,
    ui: Annotated[bool, typer.Option("--ui", help="A page for a browser, too, at the server's address.")] = False,
    system: Annotated[
        str | None, typer.Option(help="What the model is told first, where a conversation has no system prompt.")
    ] = None,
    cache_bytes: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Memory for KV caches and pictures of the last conversations; default: a quarter of what is "
            "available, up to 4 GiB.",
        ),
    ] = None,
    grace_sec: Annotated[float, typer.Option(help="How long answers may go on after SIGTERM.")] = 30.0,
    provider: Annotated[list[str] | None, typer.Option(help="As for 'vz-edge run'.")] = None,
    device_id: Annotated[int | None, typer.Option(help="As for 'vz-edge run'.")] = None,
    vision: Annotated[Literal["onnx", "torch"], typer.Option(help="As for 'vz-edge run'.")] = "onnx",
    threads: Annotated[int | None, typer.Option(help="Threads; default: the physical cores.")] = None,
    max_context: Annotated[int | None, typer.Option(help="Refuse more tokens of context than this.")] = None,
    release_memory: Annotated[
        bool | None, typer.Option("--release-memory/--keep-memory", help="As for 'vz-edge run'.")
    ] = None,
) -> None:
    """Serve a bundle as an OpenAI-compatible API until SIGTERM or Ctrl-C, which let the answers in work finish."""
    from vz_edge.cli.verbosity import is_quiet
    from vz_edge.device.requirements import install_command
    from vz_edge.errors import DependencyError

    try:
        from vz_edge.serve.app import create_app
        from vz_edge.serve.engine import Engine
        from vz_edge.serve.server import bind, run, url_of
    except ImportError as error:
        raise DependencyError(f"serving needs more packages ({error}); {install_command('serve')}") from error
    from vz_edge.device.model import EdgeModel

    settings = Settings(
        token=read_token(token_file),
        queue_length=queue_length,
        deadline_sec=deadline_sec,
        max_body_bytes=max_body_bytes,
        max_pixels=max_pixels,
        remote=RemoteLimits() if allow_remote_images else None,
        ui=ui,
        system=system,
    )
    check_exposure(host, settings.token)
    with bind(host, port) as bound, _log_on_stderr(logging.WARNING if is_quiet() else logging.INFO):
        model = EdgeModel.load(
            bundle,
            providers=provider,
            threads=threads,
            max_context=max_context,
            vision=vision,
            device=device_id,
            release_memory=release_memory,
        )
        engine = Engine(model, settings.queue_length, cache_bytes)
        application = create_app(engine, settings)
        engine.start()
        greeting = _greeting(url_of(bound, host), engine.name, settings)
        run(application, engine, bound, grace_sec, lambda: print(greeting, flush=True))
    if engine.failed:  # its native parts are in no state that anything can be asked of
        sys.stdout.flush()
        os._exit(FAILED_STATUS)
    if not engine.stop(STOP_SEC):
        # Reading a prompt cannot be interrupted, and the interpreter cannot end around a thread that does it.
        sys.stdout.flush()
        os._exit(0)


@contextmanager
def _log_on_stderr(level: int) -> Iterator[None]:
    """What the server logs at ``level`` and above, a line each."""
    logger, handler = logging.getLogger("vz_edge.serve"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    level_before, propagated_before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level_before)
        logger.propagate = propagated_before


def _greeting(url: str, name: str, settings: Settings) -> str:
    token = ' -H "Authorization: Bearer $TOKEN"' if settings.token else ""
    page = f", and a page for a browser at {url}/" if settings.ui else ""
    body = f'{{"model": "{name}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
    return (
        f"{name} at {url}/v1 (OpenAI's chat completions){page}; try\n"
        f"curl {url}/v1/chat/completions{token} -H 'Content-Type: application/json' -d '{body}'"
    )
