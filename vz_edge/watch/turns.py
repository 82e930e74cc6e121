"""Whose turn it is: a lock that is given to the urgent first.

Python's own locks are not fair: a thread that gives one back and takes it again at once may have it for ever.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """One thread at a time has the turn; of those that wait an urgent one gets it first."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._taken = False
        self._urgent = 0  # threads that wait

    @contextmanager
    def take(self, urgent: bool = False) -> Iterator[None]:
        """Wait for the turn, and have it meanwhile."""
        with self._changed:
            self._urgent += urgent
            try:
                self._changed.wait_for(lambda: not self._taken and (urgent or not self._urgent))
            finally:
                self._urgent -= urgent
            self._taken = True
        try:
            yield
        finally:
            with self._changed:
                self._taken = False
                self._changed.notify_all()
