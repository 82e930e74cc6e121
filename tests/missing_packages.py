"""Tests that need a package of an extra, in an environment without it: skipped, with the package's name as the reason.

A pytest plugin, of tests/conftest.py. What the base package and ``cpu`` bring is never missing: a test that lacks it
fails.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Generator
from typing import Any

import pytest

# Modules of the extras in pyproject.toml, those of ``dev`` included.
OPTIONAL = {
    *("accelerate", "anyio", "bitsandbytes", "cv2", "dora", "easy_vqa", "fastapi"),
    *("h11", "hatchling", "httpx", "httpx2", "huggingface_hub", "hypothesis", "jsonschema"),
    *("llguidance", "onnx", "onnx_ir", "onnxruntime_genai", "onnxscript", "openai", "optimum"),
    *("playwright", "prometheus_client", "pyarrow", "pydantic", "pynvml", "rosbags", "safetensors"),
    *("schemathesis", "sentencepiece", "starlette", "torch", "transformers", "uvicorn"),
}


def missing_package(error: BaseException | None) -> str | None:
    """The optional package that is not installed and for want of which ``error`` was raised."""
    while error is not None:
        name = (getattr(error, "name", None) or "").partition(".")[0] if isinstance(error, ImportError) else ""
        # A module that is None there was taken away by a test, which says itself what must happen.
        if name in OPTIONAL and name not in sys.modules and importlib.util.find_spec(name) is None:
            return name
        error = error.__cause__ or error.__context__
    return None


def _skip(report: Any, error: BaseException | None, path: str) -> None:
    if report.failed and (name := missing_package(error)):
        report.outcome = "skipped"
        report.longrepr = (path, 0, f"Skipped: {name} is not installed")


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, Any]:
    """Skip a file, or a folder by its conftest.py, that imports such a package."""
    report = yield
    _skip(report, report.call.excinfo and report.call.excinfo.value, str(collector.path))
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """Skip a test that imports such a package."""
    report = yield
    _skip(report, call.excinfo and call.excinfo.value, str(item.path))
    return report
