"""A process in which a bundle's tokenizer and chat template are tried before the model's own process loads them.

Both are programs of a checkpoint's, and run when a bundle is loaded and at each question: a template may multiply a
text to gigabytes or loop without an end, a tokenizer's patterns may take hours, and its reader may end the process.
The child loads them, writes a few conversations down and cuts them into tokens, within bounds of processor time and
memory. What went well once is not tried again by the same process.

A template that behaves in the trial and not later, by what a message says, is bounded in what it writes alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from functools import lru_cache
from pathlib import Path

from vz_edge.device.limited import limit_memory, limit_processor_time
from vz_edge.device.process import run_isolated
from vz_edge.errors import CorruptBundleError, RequestError, VzEdgeError

FILES = ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json")
TRIAL_SEC = 20.0  # of processor time: a vocabulary of 150,000 tokens takes one on a slow board
WAIT_SEC = 300.0
TRIAL_BYTES = 2**30
# System prompt or none, a picture or several, a question or a second one.
_ASKED = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}
_ANSWERED = {"role": "assistant", "content": [{"type": "text", "text": "A door."}]}
_TOLD = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
PROBES = ([_ASKED], [_TOLD, _ASKED], [_ASKED, _ANSWERED, _ASKED])


def check_prompt_files(folder: Path, image_token_id: int) -> None:
    """Raise CorruptBundleError where tokenizer or template of ``folder`` end the trial.

    What is merely wrong with them is left to who loads them, which says it better.
    """
    try:
        digests = tuple(hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in FILES)
    except OSError:  # so does who loads them
        return
    failure = _failure_of(os.path.abspath(folder), image_token_id, digests)
    if failure:
        raise CorruptBundleError(
            f"{folder}: tokenizer or chat template take more than {TRIAL_SEC:g} s or {TRIAL_BYTES >> 20} MiB, or end "
            f"the process ({failure}); export the bundle again, from a checkpoint whose origin you know"
        )


@lru_cache(maxsize=8)
def _failure_of(folder: str, image_token_id: int, digests: tuple[str, ...]) -> str:
    """Why the trial ended without a result, or an empty text."""
    outcome = run_isolated(__name__, folder, str(image_token_id), timeout_sec=WAIT_SEC)
    return outcome.failure if outcome.result is None else str(outcome.result["failure"])


def _tried(folder: Path, image_token_id: int) -> str:
    from vz_edge.device.prompt import ChatPrompt, render_template

    try:
        chat = ChatPrompt.read(folder, image_token_id)
    except (ImportError, VzEdgeError):
        return ""
    for probe in PROBES:
        try:
            chat.tokenizer.encode(render_template(chat.template, probe, chat.special))
        except RequestError as error:  # a template may refuse a conversation, and know no system prompt
            if isinstance(error.__cause__, MemoryError):
                return "out of memory"
    return ""


def main() -> None:
    """Try the files of the folder and with the image token that the command line names."""
    limit_memory(TRIAL_BYTES)
    limit_processor_time(TRIAL_SEC)
    failure = _tried(Path(sys.argv[1]), int(sys.argv[2]))
    print(json.dumps({"failure": failure}))


if __name__ == "__main__":
    main()
