"""Malformed requests: the same for the same seed, of every layer, and harmless to a server."""

from __future__ import annotations

from typing import Any

import openai

from benchmarks.malformed import malformed_requests
from benchmarks.serve_load import send_raw
from tests.serve.asking import WAIT_SEC, data_url, file_of, picture, request, serving
from tests.serve.conftest import bundle, engine, model  # noqa: F401 (fixtures)
from vz_edge.serve.engine import Engine
from vz_edge.serve.settings import Settings

COUNT = 150


def body() -> dict[str, Any]:
    return request("What?", data_url(file_of(picture(1))))


def test_a_seed_always_makes_the_same_requests() -> None:
    made = list(malformed_requests(60, 1, body()))
    assert made == list(malformed_requests(60, 1, body()))
    assert made != list(malformed_requests(60, 2, body()))
    assert {request.layer for request in made} == {"values", "text", "HTTP"}


def test_none_is_a_server_error(engine: Engine) -> None:  # noqa: F811
    with serving(engine, Settings()) as port:
        made = malformed_requests(COUNT, 3, body())
        statuses = [send_raw(port, request.raw, request.is_cut_off) for request in made]
        assert max(status or 0 for status in statuses) < 500
        assert {400, 415, None} <= set(statuses)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=WAIT_SEC)
        assert [model.id for model in client.models.list()] == ["stand-in"]
