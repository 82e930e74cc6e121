"""``vz-edge serve`` before it serves: what it refuses, in one line and before anything is loaded.

That it serves, and ends when it is told to, is in ``tests/serve/test_server.py``.
"""

from __future__ import annotations

import logging
import socket
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.device import standin
from vz_edge.cli import app
from vz_edge.serve.server import bind


def refused(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["serve", *arguments])
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith("vz-edge: ") and done.stderr.count("\n") == 1
    return done.stderr


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VZ_EDGE_TOKEN", raising=False)


def test_the_open_without_a_token_is_refused_before_loading() -> None:
    assert "a token is needed" in refused("no-bundle", "--host", "0.0.0.0")


def test_a_bad_token_is_refused_and_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VZ_EDGE_TOKEN", "tooshort")
    message = refused("no-bundle")
    assert "VZ_EDGE_TOKEN holds no token" in message and "tooshort" not in message
    assert "cannot be read" in refused("no-bundle", "--token-file", str(tmp_path / "missing"))


def test_a_taken_port_is_refused_before_loading() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "cannot listen" in refused("no-bundle", "--port", str(taken.getsockname()[1]))


def test_a_port_is_taken_before_the_model_is_loaded() -> None:
    with bind("127.0.0.1", 0) as loading:
        assert "cannot listen" in refused("no-bundle", "--port", str(loading.getsockname()[1]))


def test_what_is_no_bundle_is_refused(tmp_path: Path) -> None:
    assert "is not a bundle" in refused(str(tmp_path), "--port", "0")
    assert "queue" in refused(str(tmp_path), "--port", "0", "--queue-length", "-1")


def test_a_system_prompt_that_would_be_left_out_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every, _, rest = standin.TEMPLATE.partition("%}")
    skipping = every + "%}{% if message['role'] == 'system' %}{% continue %}{% endif %}" + rest
    monkeypatch.setattr(standin, "TEMPLATE", skipping)
    standin.write_bundle(tmp_path / "bundle")
    assert "leaves a system prompt out" in refused(str(tmp_path / "bundle"), "--port", "0", "--system", "Be brief.")


def test_the_log_is_as_it_was_afterwards(tmp_path: Path) -> None:
    logger = logging.getLogger("vz_edge.serve")
    before = (logger.level, logger.propagate, list(logger.handlers))
    refused(str(tmp_path), "--port", "0")
    assert (logger.level, logger.propagate, logger.handlers) == before
