"""The chat of ``vz-edge run``: questions line by line, in one session that keeps pictures and turns in its KV cache.

At a terminal lines are edited and remembered (readline). In a pipe each line is a question, each answer is printed,
and an error goes to stderr and leaves the questions after it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vz_edge.cli.answer import as_json, print_answer
from vz_edge.cli.verbosity import erase, is_quiet, note
from vz_edge.errors import ContextLengthError, RequestError, VzEdgeError

if TYPE_CHECKING:
    from vz_edge.device.model import EdgeModel
    from vz_edge.device.vision import VisionResult

HELP = """\
/image PATH...  look at other pictures; the conversation begins anew
/clear          forget the conversation; the pictures stay
/system TEXT    tell the model this first; without TEXT, nothing. The conversation begins anew
/help           this list
/quit           end, as Ctrl-D does; Ctrl-C ends an answer
Anything else is a question."""
# "/etc/passwd?" is a question.
COMMAND = re.compile(r"/(\w*)(?:\s+(.*))?", re.DOTALL)


class Chat:
    """One conversation about ``pictures``, which may be none. ``options`` are those of ``Session.ask``."""

    def __init__(
        self,
        model: EdgeModel,
        pictures: Sequence[Path],
        system: str | None,
        tokens: int | None,
        options: dict[str, Any],
        json_lines: bool = False,
    ) -> None:
        """Looks at the pictures. Raises VzEdgeError."""
        self._model = model
        self._session = model.session()
        self._seen: list[VisionResult] = []
        self._system: str | None = None
        self._tokens = tokens
        self._options = options
        self._json_lines = json_lines
        self._turns = 0
        self._begin(pictures, system)

    def run(self) -> bool:
        """Answer until the end of input or ``/quit``; False where a line of a pipe ended in an error."""
        at_a_terminal = sys.stdin.isatty()
        if at_a_terminal:
            note(f"{self._model.manifest.name}: ask; /help lists commands, /quit or Ctrl-D ends the chat")
        went_well = True
        for line in _lines():
            if not line.strip():
                continue
            try:
                if not self._answer(line.strip()):
                    break
            except VzEdgeError as error:
                went_well = at_a_terminal
                erase()
                print(f"vz-edge: {error}{self._way_on(error)}", file=sys.stderr, flush=True)
            except KeyboardInterrupt:
                if not at_a_terminal:
                    raise
                erase()
                print(flush=True)
                note("stopped; nothing of it is kept")
        return went_well

    def _answer(self, line: str) -> bool:
        """Answer a question, or obey a command; False where that was the last."""
        command = COMMAND.fullmatch(line)
        if command:
            return self._obey(command[1], (command[2] or "").strip())
        stream = self._session.stream(line, keep=True, **self._options)
        with contextlib.closing(stream):
            if self._json_lines:
                print(as_json(stream.reply, self._model.load_sec, indent=None), flush=True)
            else:
                print_answer(stream, as_it_comes=True)
        self._turns += 1
        return True

    def _obey(self, name: str, rest: str) -> bool:
        if name == "image":
            self._begin(_paths(rest), self._system)
        elif name == "clear":
            self._begin(self._seen, self._system)
            note("[the conversation is forgotten]")
        elif name == "system":
            self._begin(self._seen, rest or None)
            note(f"[the conversation begins anew, {'with' if rest else 'without'} a system prompt]")
        elif name == "help":
            print(HELP, file=sys.stderr)
        elif name != "quit":
            raise RequestError(f"there is no command /{name}; /help lists them")
        return name != "quit"

    def _begin(self, pictures: Sequence[Path | VisionResult], system: str | None) -> None:
        new = pictures is not self._seen
        started = time.perf_counter()
        self._seen = self._session.restart(pictures, system=system, tokens=self._tokens if new else None)
        self._system, self._turns = system, 0
        if new and self._seen:
            count = sum(len(picture.features) for picture in self._seen)
            sec = time.perf_counter() - started
            note(f"[looked at {len(self._seen)} picture(s), {count} image tokens, in {sec:.3f} s]")

    def _way_on(self, error: VzEdgeError) -> str:
        if isinstance(error, ContextLengthError) and self._turns:
            return "; the conversation is full: /clear forgets it and keeps the pictures"
        return ""


def _lines() -> Iterator[str]:
    """What is typed or piped in, line by line. At a terminal Ctrl-C begins the line anew."""
    if not sys.stdin.isatty():
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="replace")  # bytes that are no text are no reason to end
        yield from sys.stdin
        return
    with contextlib.suppress(ImportError):
        import readline

        readline.set_completer_delims(" \t\n")  # the tab key completes paths
        readline.parse_and_bind("tab: complete")
    while True:
        try:
            line = _typed()
        except EOFError:
            if not is_quiet():
                print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            print("\n(/quit or Ctrl-D ends the chat)", file=sys.stderr, flush=True)
            continue
        yield line


def _typed() -> str:
    if sys.stdout.isatty():
        return input("> ")
    print("> ", end="", file=sys.stderr, flush=True)  # stdout is for the answers
    if not (line := sys.stdin.readline()):
        raise EOFError
    return line


def _paths(text: str) -> list[Path]:
    """The paths that are named, as a shell would read them; or the one whose name has blanks. Raises RequestError."""
    if os.path.isfile(text):
        return [Path(text)]
    try:
        words = shlex.split(text)
    except ValueError:
        words = text.split()
    if not words:
        raise RequestError("/image names no picture; expected one or more paths")
    return [Path(word).expanduser() for word in words]
