"""``-v`` and ``-q``: how much the command line says on stderr.

========  =====================================================================================================
``-q``    errors alone
default   a command's own notes, as the timings of an answer; and on a terminal what is being done now, in a line
          that the next one takes the place of
``-v``    all that the package logs (logger ``vz_edge``) at INFO, a line each; ``-vv`` at DEBUG
========  =====================================================================================================
"""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager

LOGGER = logging.getLogger("vz_edge")
LINES_FROM = {-1: logging.ERROR, 0: logging.WARNING, 1: logging.INFO, 2: logging.DEBUG}
ERASE_LINE = "\r\x1b[K"


class _Console(logging.Handler):
    """Records on stderr: important ones as lines, others as what is being done now, where ``shows_now``."""

    def __init__(self) -> None:
        super().__init__()
        self.lines_from = logging.WARNING
        self.shows_now = False
        self._written = False  # whether a line stands there that says what is being done

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= self.lines_from:
            self.erase()
            print(f"vz-edge: {self.format(record)}", file=sys.stderr, flush=True)
        elif self.shows_now and record.levelno >= logging.INFO:
            columns = shutil.get_terminal_size().columns
            text = record.getMessage()[: columns - 1]
            print(f"{ERASE_LINE}{text}", end="", file=sys.stderr, flush=True)
            self._written = True

    def erase(self) -> None:
        if self._written:
            print(ERASE_LINE, end="", file=sys.stderr, flush=True)
            self._written = False


_CONSOLE = _Console()


def set_verbosity(level: int) -> None:
    """-1: quiet, 0: as by default, 1 and 2: -v and -vv."""
    _CONSOLE.lines_from = LINES_FROM[min(2, max(-1, level))]
    LOGGER.setLevel(min(_CONSOLE.lines_from, logging.INFO))
    if _CONSOLE not in LOGGER.handlers:
        LOGGER.addHandler(_CONSOLE)


def reset_verbosity() -> None:
    """The logger as the package has it, for a process that goes on after a command."""
    LOGGER.removeHandler(_CONSOLE)
    LOGGER.setLevel(logging.NOTSET)


def is_quiet() -> bool:
    """Whether errors alone are wanted."""
    return _CONSOLE.lines_from >= logging.ERROR


def note(text: str) -> None:
    """Print a line on stderr, unless quiet."""
    erase()
    if not is_quiet():
        print(text, file=sys.stderr, flush=True)


def erase() -> None:
    """Take away the line of what is being done: something else is printed."""
    _CONSOLE.erase()


@contextmanager
def showing_what_is_done() -> Iterator[None]:
    """On a terminal, say meanwhile what is being done: loading, looking, reading."""
    _CONSOLE.shows_now = sys.stderr.isatty() and not is_quiet()
    try:
        yield
    finally:
        erase()
        _CONSOLE.shows_now = False
