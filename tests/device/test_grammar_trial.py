"""A schema that would end the process, or keep it, ends a child of it; the next question is answered."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests.device import standin
from tests.device.test_schema_bounds import chain
from vz_edge import Lark
from vz_edge.device import grammar_trial
from vz_edge.device.grammar_trial import GrammarTrial
from vz_edge.device.guide import KEPT_GRAMMARS, GrammarCompiler
from vz_edge.device.model import EdgeModel
from vz_edge.errors import RequestError

EXPENSIVE = {"type": "integer", "multipleOf": 99999989}
BOOLEAN = '{"json_schema": {"type": "boolean"}}'


@pytest.fixture(scope="module")
def compiler() -> Iterator[GrammarCompiler]:
    made = GrammarCompiler(standin.byte_tokenizer(), standin.VOCAB, (standin.EOS,))
    yield made
    made.close()


@pytest.fixture
def trial() -> Iterator[GrammarTrial]:
    made = GrammarTrial(standin.byte_tokenizer().to_str(), standin.VOCAB, [standin.EOS])
    yield made
    made.close()


@pytest.mark.parametrize(
    "schema",
    [
        EXPENSIVE,
        {"type": "array", "items": {"anyOf": [{"type": "null"}, EXPENSIVE]}},
        {"type": "string", "allOf": [{"pattern": f"(a|b)*{'ab'[i % 2]}(a|b){{{24 + i}}}"} for i in range(30)]},
        chain(1000),
        Lark("start: " + "(" * 5000 + '"a"' + ")" * 5000),
        re.compile("a" * 200_000),
        {"enum": ["a" * 200_000]},
    ],
)
def test_a_schema_that_needs_too_much_is_a_request_error(compiler: GrammarCompiler, schema: Any) -> None:
    with pytest.raises(RequestError) as caught:
        compiler.compile(schema)
    assert len(str(caught.value)) < 2100
    assert compiler.compile({"type": "boolean"}).start().mask is not None


def test_the_library_is_protected_too(model: EdgeModel) -> None:
    with pytest.raises(RequestError, match="cannot be compiled"):
        model.ask(None, "?", schema=EXPENSIVE)
    assert model.ask(None, "?", schema={"type": "boolean"}, max_new_tokens=20).value in (True, False)


def test_a_deep_chain_overflows_the_childs_stack_alone(trial: GrammarTrial) -> None:
    with pytest.raises(RequestError, match="nested too deeply"):
        trial.check(json.dumps({"json_schema": chain(1000)}))
    trial.check(BOOLEAN)


def test_the_deadline_ends_a_trial(trial: GrammarTrial, monkeypatch: pytest.MonkeyPatch) -> None:
    trial.check(BOOLEAN)
    monkeypatch.setattr(grammar_trial, "SHORTEST_WAIT_SEC", 0.05)
    with pytest.raises(RequestError, match="the deadline leaves"):
        trial.check('{"json_schema": {"type": "integer", "multipleOf": 99999989}}', within_sec=0.05)
    monkeypatch.undo()
    trial.check(BOOLEAN)


def test_a_child_that_died_is_started_anew_and_ends_with_its_owner(trial: GrammarTrial) -> None:
    trial.check(BOOLEAN)
    first = trial._child
    assert first is not None
    trial.check(BOOLEAN)
    assert trial._child is first
    first.kill()
    first.wait()
    trial.check(BOOLEAN)
    second = trial._child
    assert second is not None and second.pid != first.pid
    trial.close()
    assert second.returncode is not None


def test_a_child_ends_when_its_owner_is_gone() -> None:
    script = (
        "import os, sys; from tests.device import standin; from vz_edge.device.grammar_trial import GrammarTrial\n"
        f"t = GrammarTrial(standin.byte_tokenizer().to_str(), standin.VOCAB, [standin.EOS]); t.check({BOOLEAN!r})\n"
        "print(t._child.pid, flush=True); os._exit(0)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    with pytest.raises(ProcessLookupError):
        for _ in range(600):
            os.kill(int(done.stdout), 0)
            subprocess.run(["sleep", "0.1"], check=True)


def test_grammars_are_kept_by_their_text_and_no_more_than_a_few(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler.compile({"const": "kept"})
    with monkeypatch.context() as patch:
        patch.setattr(GrammarTrial, "check", lambda *_: pytest.fail("it was compiled again"))
        compiler.compile({"const": "kept"})
    for number in range(KEPT_GRAMMARS + 3):
        compiler.compile({"const": number})
    assert len(compiler._kept) == KEPT_GRAMMARS


def test_a_grammar_that_takes_much_memory_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = GrammarCompiler(standin.byte_tokenizer(), standin.VOCAB, (standin.EOS,))
    heavy = {
        "type": "object",
        "properties": {f"p{number}": {"type": "integer", "maximum": 7919 * number} for number in range(1500)},
    }
    compiler.compile({"type": "boolean"})
    compiler.compile(heavy)
    assert len(compiler._kept) == 1
    compiler.compile({"type": "null"})
    assert len(compiler._kept) == 2
    compiler.close()
