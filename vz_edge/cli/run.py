"""``vz-edge run``: ask a bundle about pictures, once or in a chat."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from vz_edge.arguments import read_text
from vz_edge.errors import RequestError

if TYPE_CHECKING:
    from vz_edge.device.model import EdgeModel
    from vz_edge.device.reply import Reply


def command(
    bundle: Annotated[Path, typer.Argument(help="A folder written by 'vz-edge export'.")],
    question: Annotated[str | None, typer.Argument(help="The question; without one, a chat begins.")] = None,
    image: Annotated[list[Path] | None, typer.Option(help="A picture; may be given several times.")] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print the answer while it is written.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the answer and its measurements as JSON.")] = False,
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
    choices: Annotated[str | None, typer.Option(help="The answer is one of these: yes,no,unclear.")] = None,
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
) -> None:
    """Ask a bundle a question about a picture; without a question, chat about it."""
    from vz_edge.device.model import EdgeModel

    options: dict[str, Any] = {
        "tokens": tokens,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
        "schema": _schema(schema, choices),
    }
    model = EdgeModel.load(bundle, provider, threads, max_context, vision, device=device_id)
    pictures: list[Any] = list(image or [])
    if question is None:
        _chat(model, pictures, options)
    elif as_json:
        reply = model.ask(pictures, question, **options)
        print(json.dumps({**reply.as_dict(), "load_sec": model.load_sec}, indent=2))
    else:
        _answer(model, pictures, question, options, stream)


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


def _answer(model: EdgeModel, pictures: list[Any], prompt: Any, options: dict[str, Any], stream: bool) -> Reply:
    """Print an answer on stdout and its measurements on stderr, so that the answer can be piped on."""
    pieces = model.stream(pictures, prompt, **options)
    for piece in pieces:
        if stream:
            print(piece, end="", flush=True)
    reply = pieces.reply
    print("" if stream else reply.text)
    print(_timings(reply), file=sys.stderr)
    return reply


def _chat(model: EdgeModel, pictures: list[Any], options: dict[str, Any]) -> None:
    """Read questions until an empty line or the end of input. The pictures are looked at once."""
    seen = [model.encode(picture, options["tokens"]) for picture in pictures]
    messages: list[dict[str, Any]] = []
    print("Ask; an empty line ends the chat.", file=sys.stderr)
    while question := _read_line():
        messages.append({"role": "user", "content": question})
        reply = _answer(model, list(seen), messages, options, stream=True)
        messages.append({"role": "assistant", "content": reply.text})


def _read_line() -> str:
    try:
        return input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        return ""


def _timings(reply: Reply) -> str:
    return (
        f"[{reply.image_tokens} image + {reply.prompt_tokens} prompt tokens; "
        f"preprocess {reply.preprocess_sec:.3f} s, vision {reply.vision_sec:.3f} s, "
        f"prefill {reply.prefill_sec:.3f} s: first token after {reply.ttft_sec:.3f} s; "
        f"{reply.answer_tokens} tokens in {reply.decode_sec:.3f} s ({reply.decode_tokens_per_sec:.1f} a second)]"
    )
