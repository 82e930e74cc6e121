"""A watch in a thread of its own, for programs whose own loop must not wait for answers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from vz_edge.watch.engine import Question
from vz_edge.watch.reader import Reading
from vz_edge.watch.result import Result
from vz_edge.watch.watch import Watch


class Background:
    """Calls ``on_result`` with each result of a watch. Made by ``Watch.background``."""

    def __init__(self, watch: Watch, on_result: Callable[[Result], object]) -> None:
        self._watch = watch
        self._on_result = on_result
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="vz-edge-watch-results", daemon=True)
        self._thread.start()

    def ask(self, reading: Reading, questions: Sequence[Question]) -> Result:
        """As ``Watch.ask``."""
        return self._watch.ask(reading, questions)

    def join(self, timeout_sec: float | None = None) -> bool:
        """Wait for the end; False where it does not come in time. Raises what the watch or ``on_result`` ended with."""
        self._thread.join(timeout_sec)
        if self._thread.is_alive():
            return False
        error, self._error = self._error, None
        if error is not None:
            raise error
        return True

    def close(self) -> None:
        """End the watch and wait for it; ``on_result`` is not called any more. Raises as ``join``."""
        self._watch.close()
        if threading.current_thread() is not self._thread:
            self.join()

    def __enter__(self) -> Background:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        try:
            with self._watch:
                for result in self._watch:
                    self._on_result(result)
        except BaseException as error:  # whatever it is: ``join`` raises it
            self._error = error
