from __future__ import annotations

import os
import re
import tempfile
import time
from pathlib import Path

import pytest

pytest_plugins = ["tests.missing_packages"]

# What the shell of whoever runs the tests may say: widths, colours and languages of what is printed, proxies, GPUs,
# where the hub is, and what vz-edge itself reads.
SAID_ELSEWHERE = re.compile(
    r"(VZ_EDGE|CUDA|HF|TRANSFORMERS|CLICOLOR)_.*|.*_proxy|LINES|NO_COLOR|FORCE_COLOR|TTY_.*|TERM|COLORTERM|OUT|LANGUAGE",
    re.IGNORECASE,
)
SAID_HERE = {"COLUMNS": "80", "TERM": "dumb", "LC_ALL": "C.UTF-8", "TZ": "UTC", "HF_HUB_OFFLINE": "1"}


def pytest_configure(config: pytest.Config) -> None:
    """Tests and the processes that they start read the same environment wherever they run."""
    for name in filter(SAID_ELSEWHERE.fullmatch, list(os.environ)):
        del os.environ[name]
    os.environ.update(SAID_HERE)
    cache = tempfile.TemporaryDirectory(prefix="vz-edge-cache-")  # where profiles of this machine are kept
    os.environ["XDG_CACHE_HOME"] = cache.name
    config.add_cleanup(cache.cleanup)
    if hasattr(time, "tzset"):
        time.tzset()
    os.umask(0o022)


@pytest.fixture(scope="session")
def demo_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model, exported as `make demo` does it."""
    from vz_edge.host.export import ExportRequest, SilentProgress, plan_export, write_bundle

    out = tmp_path_factory.mktemp("demo") / "bundle"
    write_bundle(plan_export(ExportRequest("vz-demo", out, bits=4, tokens="320")), SilentProgress())
    return out
