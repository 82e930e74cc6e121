from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def demo_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model, exported as `make demo` does it."""
    from vz_edge.host.export import ExportRequest, SilentProgress, plan_export, write_bundle

    out = tmp_path_factory.mktemp("demo") / "bundle"
    write_bundle(plan_export(ExportRequest("vz-demo", out, bits=4, tokens="320")), SilentProgress())
    return out
