"""A bundle's template and tokenizer, which are programs, have bounds of time and of what they write."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.device import standin
from vz_edge.device import prompt, prompt_trial
from vz_edge.device.prompt import ChatPrompt, messages_of, render_template
from vz_edge.errors import CorruptBundleError, RequestError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    standin.write_bundle(tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 10 ** 10 }}",
        "{{ 10 ** 10 * 'a' }}",
        "{{ [0] * 10 ** 10 }}",
        "{{ 9 ** 99999999 }}",
        "{{ '%9999999999d' % 1 }}",
        "{{ '%*d' % (9999999999, 1) }}",
    ],
)
def test_operators_make_nothing_huge(template: str) -> None:
    with pytest.raises(RequestError, match=r"cannot write these messages down: the result of .* is too large"):
        render_template(template, messages_of("hello", 0), {})


def test_what_a_template_writes_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt, "MOST_CHARACTERS", 1000)
    assert render_template("{{ '-' * 40 }}", messages_of("hello", 0), {}) == "-" * 40
    with pytest.raises(RequestError, match="more than 1000 characters"):
        render_template("{% for i in range(1001) %}{{ i }}{% endfor %}", messages_of("hello", 0), {})


@pytest.mark.parametrize("template", ["{{ 'a'.ljust(10 ** 10) }}", "{{ 'a' | center(10 ** 10) }}"])
def test_memory_is_bounded_at_load(folder: Path, template: str) -> None:
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(CorruptBundleError, match="a checkpoint whose origin you know"):
        ChatPrompt.load(folder, standin.IMAGE_TOKEN_ID)


def test_a_trial_without_an_end_is_ended(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_trial, "WAIT_SEC", 1.0)
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    (folder / "chat_template.jinja").write_text(loop)
    with pytest.raises(CorruptBundleError, match="no answer within 1 s"):
        ChatPrompt.load(folder, standin.IMAGE_TOKEN_ID)


def test_a_good_bundle_is_tried_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ChatPrompt.load(folder, standin.IMAGE_TOKEN_ID)
    monkeypatch.setattr(prompt_trial, "run_isolated", lambda *_, **__: pytest.fail("it was tried again"))
    assert ChatPrompt.load(folder, standin.IMAGE_TOKEN_ID).ids(messages_of("hello", 0))
