"""Requests that schemathesis makes of the server's own description: never a 500, never an answer it does not describe.

``benchmarks.serve_load`` sends many more, most of which no description would make.
"""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import BaseSchema, Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from vz_edge.serve.app import create_app
from vz_edge.serve.engine import Engine
from vz_edge.serve.settings import Settings

TOKEN = "0123456789abcdef"
HEADERS = {"Authorization": f"Bearer {TOKEN}"}
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
EXAMPLES = 20


@pytest.fixture(scope="module")
def description(engine: Engine) -> BaseSchema:
    app = create_app(engine, Settings(token=TOKEN))
    return schemathesis.openapi.from_asgi("/openapi.json", app, headers=HEADERS)


@pytest.mark.parametrize("mode", GenerationMode)
def test_no_request_breaks_the_server(description: BaseSchema, mode: GenerationMode) -> None:
    """What the description allows, and what it does not."""
    for found in description.get_all_operations():
        operation = found.ok()
        if mode.is_negative and not operation.body:
            continue  # there is nothing in it to be wrong

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
            database=None,
        )
        def send(case: Case) -> None:
            case.call_and_validate(checks=CHECKS, headers=HEADERS)

        send()
