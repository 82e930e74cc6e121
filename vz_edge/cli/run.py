"""``vz-edge run``: ask a bundle about pictures, once or in a chat."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from vz_edge.arguments import read_text
from vz_edge.errors import RequestError

STATUS_ERROR = 2


def command(
    bundle: Annotated[Path, typer.Argument(help="A folder written by 'vz-edge export'.")],
    question: Annotated[
        list[str] | None, typer.Argument(help="The question, in quotes; without one, a chat begins.")
    ] = None,
    image: Annotated[
        list[Path] | None, typer.Option(help="A picture; several as --image a.jpg b.jpg, or each with its --image.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Print the answer while it is written; a terminal gets it so anyway.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the answer and its measurements as JSON; in a chat, a line each.")
    ] = False,
    tokens: Annotated[
        int | None,
        typer.Option(help="Which of the bundle's token budgets; default: the first that it was exported with."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="The longest answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw from the k likeliest tokens; 0: from all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens that make up this probability.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes a temperature above 0 repeatable.")] = None,
    schema: Annotated[
        Path | None, typer.Option(help="A file with a JSON schema; the answer is JSON that fits it.")
    ] = None,
    choices: Annotated[
        str | None, typer.Option(help="The answer is one of these, and how likely each is: yes,no,unclear.")
    ] = None,
    provider: Annotated[
        list[str] | None, typer.Option(help="cpu, cuda or a provider of ONNX Runtime's; default: what fits the bundle.")
    ] = None,
    device_id: Annotated[int | None, typer.Option(help="The number of the GPU, as CUDA counts; default: 0.")] = None,
    vision: Annotated[
        Literal["onnx", "torch"],
        typer.Option(help="torch: as the language model, in a bundle with bitsandbytes weights."),
    ] = "onnx",
    threads: Annotated[int | None, typer.Option(help="Threads; default: the physical cores.")] = None,
    max_context: Annotated[int | None, typer.Option(help="Refuse more tokens of context than this.")] = None,
    release_memory: Annotated[
        bool | None,
        typer.Option(
            "--release-memory/--keep-memory",
            help="Whether vision on the CPU gives memory back after each picture; default: where it is short.",
        ),
    ] = None,
) -> None:
    """Ask a bundle a question about pictures; without a question, chat about them."""
    from vz_edge.cli.answer import as_json as json_of
    from vz_edge.cli.answer import print_answer
    from vz_edge.cli.verbosity import showing_what_is_done
    from vz_edge.device.model import EdgeModel

    pictures, asked = _pictures_and_question(image or [], question or [])
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
        "schema": _schema(schema, choices),
    }
    with showing_what_is_done():
        model = EdgeModel.load(
            bundle,
            providers=provider,
            threads=threads,
            max_context=max_context,
            vision=vision,
            device=device_id,
            release_memory=release_memory,
        )
        if asked is None:
            from vz_edge.cli.chat import Chat

            if not Chat(model, pictures, system, tokens, options, json_lines=as_json).run():
                raise typer.Exit(STATUS_ERROR)
            return
        messages = [{"role": "system", "content": system}] if system else []
        answer = model.stream(list(pictures), [*messages, {"role": "user", "content": asked}], tokens=tokens, **options)
        if as_json:
            print(json_of(answer.reply, model.load_sec, indent=2))
        else:
            print_answer(answer, as_it_comes=stream or sys.stdout.isatty())


def _pictures_and_question(image: list[Path], words: list[str]) -> tuple[list[Path], str | None]:
    """Of words behind the bundle, those that name files are pictures too: a shell writes ``--image *.jpg`` so."""
    more = [Path(word) for word in words if image and os.path.isfile(word)]
    questions = [word for word in words if not (image and os.path.isfile(word))]
    if len(questions) > 1:
        raise RequestError(
            f"{len(questions)} questions came, or pictures that do not exist: {', '.join(questions)}; expected one "
            "question, in quotes"
        )
    return [*image, *more], questions[0] if questions else None


def _schema(file: Path | None, choices: str | None) -> dict[str, Any] | list[str] | None:
    if file and choices is not None:
        raise RequestError("--schema and --choices were both given; an answer follows one of them")
    if choices is not None:
        return [choice.strip() for choice in choices.split(",")]
    if file is None:
        return None
    try:
        schema = json.loads(read_text(file))
    except (OSError, ValueError, RecursionError) as error:
        raise RequestError(f"{file} cannot be read as JSON ({error}); expected a file with a JSON schema") from error
    if not isinstance(schema, dict):
        raise RequestError(f'{file} is no JSON schema; expected an object, as {{"type": "object", ...}}')
    return schema
