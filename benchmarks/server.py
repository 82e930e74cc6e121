"""``vz-edge serve`` in a process of its own, for the benchmarks that ask over HTTP."""

from __future__ import annotations

import contextlib
import http.client
import signal
import subprocess
import sys
from pathlib import Path

TIMEOUT_SEC = 320.0  # the server's own deadline comes first
CHAT = "/v1/chat/completions"


class Server:
    """Serves ``bundle`` on a free ``port`` of loopback; what it says on stderr goes to the file ``log``."""

    def __init__(self, bundle: Path, log: Path, *options: str) -> None:
        command = [sys.executable, "-m", "vz_edge", "serve", str(bundle), "--port", "0", *options]
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log.open("w+")
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self._log, text=True)
        assert self.process.stdout is not None
        greeting = self.process.stdout.readline()
        if "127.0.0.1:" not in greeting:
            self.process.wait()
            raise SystemExit(f"the server did not start: {log.read_text()}")
        self.port = int(greeting.partition("127.0.0.1:")[2].partition("/")[0])

    def stop(self) -> int:
        """Exit status after SIGTERM."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(TIMEOUT_SEC)

    def tracebacks(self) -> int:
        """Unexpected errors in its log."""
        self._log.seek(0)
        return self._log.read().count("Traceback")

    def metrics(self) -> dict[str, float]:
        """Samples of /metrics by name."""
        lines = get(self.port, "/metrics").splitlines()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}


def get(port: int, path: str) -> str:
    """The text at ``path``."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_SEC)) as connection:
        connection.request("GET", path)
        return connection.getresponse().read().decode()
