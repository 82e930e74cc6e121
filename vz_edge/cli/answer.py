"""How an answer is printed: its text on stdout, so that it can be piped on, and what it took on stderr."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from vz_edge.cli.verbosity import erase, note

if TYPE_CHECKING:
    from vz_edge.device.reply import Reply, Stream


def print_answer(stream: Stream, as_it_comes: bool) -> Reply:
    """Print an answer in pieces ``as_it_comes``, or whole at its end."""
    for piece in stream:
        erase()
        if as_it_comes:
            print(piece, end="", flush=True)
    erase()
    reply = stream.reply
    print("" if as_it_comes else reply.text, flush=True)
    if reply.probabilities is not None:
        note("; ".join(f"{choice}: {share:.1%}" for choice, share in reply.probabilities.items()))
    note(timings(reply))
    return reply


def timings(reply: Reply) -> str:
    """What an answer took, in one line."""
    cached = f", {reply.cached_tokens} cached" if reply.cached_tokens else ""
    looked = f"preprocess {reply.preprocess_sec:.3f} s, vision {reply.vision_sec:.3f} s, " if reply.vision_sec else ""
    stages = f"{looked}prefill {reply.prefill_sec:.3f} s: " if looked else ""
    cut = "; ended by --max-new-tokens" if reply.finish_reason == "length" else ""
    return (
        f"[{reply.image_tokens} image + {reply.prompt_tokens} prompt tokens{cached}; "
        f"{stages}first token after {reply.ttft_sec:.3f} s; "
        f"{reply.answer_tokens} tokens in {reply.decode_sec:.3f} s ({reply.decode_tokens_per_sec:.1f} a second){cut}]"
    )


def as_json(reply: Reply, load_sec: float, indent: int | None) -> str:
    """An answer and its measurements; in one line without ``indent``."""
    return json.dumps({**reply.as_dict(), "load_sec": load_sec}, indent=indent)
