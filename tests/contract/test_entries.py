"""Whatever is given to a public function ends in an answer, or in one line that says what was wrong."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.contract.junk import FIXED, JUNK, settle
from tests.device import standin
from vz_edge import EdgeModel, Lark, RequestError, VisionResult, VzEdgeError
from vz_edge.device.fake_decoder import FakeDecoder
from vz_edge.device.options import DEFAULTS
from vz_edge.errors import SourceError
from vz_edge.watch import Frame, video

PICTURE = np.zeros((30, 40, 3), np.uint8)
quietly = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
OPTIONS = st.dictionaries(st.sampled_from(list(DEFAULTS)) | st.text(max_size=4), JUNK, max_size=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("entries") / "bundle"
    standin.write_bundle(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> EdgeModel:
    """The stand-in with a decoder of numpy alone."""
    loaded = EdgeModel.load(folder, threads=1)
    decoder = FakeDecoder(standin.HIDDEN, standin.VOCAB)
    return EdgeModel(loaded.manifest, loaded.vision, loaded.chat, loaded.embedding, decoder, 2000, load_sec=0.0)


@pytest.fixture(autouse=True)
def nothing_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No camera is opened, and no file lies in the current folder."""

    def no_camera() -> None:
        raise SourceError("there is no camera; expected none")

    monkeypatch.setattr(video, "import_cv2", no_camera)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", ["folder", "providers", "threads", "max_context", "vision", "cuda_graph", "device"])
def test_load(folder: Path, name: str) -> None:
    for make in FIXED:
        if name != "device":  # which no machine without a GPU takes
            settle(lambda make=make: EdgeModel.load(**{"folder": folder, "threads": 1, name: make()}))
        else:
            settle(lambda make=make: EdgeModel.load(folder, threads=1, device=make()))


@pytest.mark.parametrize("name", sorted(DEFAULTS))
def test_each_option_of_a_question(model: EdgeModel, name: str) -> None:
    for make in FIXED:
        settle(lambda make=make: model.ask(None, "Why?", **{"max_new_tokens": 2, name: make()}))


@pytest.mark.parametrize("entry", ["image", "prompt", "tokens"])
def test_each_argument_of_a_question(model: EdgeModel, entry: str) -> None:
    for make in FIXED:
        arguments: Any = {"image": PICTURE, "prompt": "Why?", entry: make()}
        settle(lambda arguments=arguments: model.ask(**arguments, max_new_tokens=2))


@quietly
@given(image=JUNK, prompt=JUNK, tokens=st.none() | JUNK, options=OPTIONS)
def test_ask(model: EdgeModel, image: Any, prompt: Any, tokens: Any, options: Any) -> None:
    settle(lambda: model.ask(image, prompt, tokens=tokens, **{"max_new_tokens": 2, **options}))
    settle(lambda: model.ask(PICTURE, prompt, **{"max_new_tokens": 2}))
    settle(lambda: model.ask([PICTURE, image], "Why?", **{"max_new_tokens": 2}))
    settle(lambda: list(model.stream(None, "Why?", **{"max_new_tokens": 2, **options})))


@quietly
@given(image=JUNK, prompts=JUNK, tokens=JUNK)
def test_encode_and_ask_many(model: EdgeModel, image: Any, prompts: Any, tokens: Any) -> None:
    settle(lambda: model.encode(image))
    settle(lambda: model.encode(PICTURE, tokens))
    settle(lambda: model.ask_many(PICTURE, prompts, max_new_tokens=2))
    settle(lambda: model.ask_many(PICTURE, ["Why?", prompts], max_new_tokens=2))


@quietly
@given(junk=JUNK, other=JUNK, options=OPTIONS)
def test_session(model: EdgeModel, junk: Any, other: Any, options: Any) -> None:
    settle(lambda: model.session(system=junk))
    settle(lambda: model.session(max_context=other))
    session = model.session(max_context=500)
    settle(lambda: session.look(junk, tokens=other))
    settle(lambda: session.look(PICTURE, add=junk))
    settle(lambda: session.ask(other))
    settle(lambda: session.ask("Why?", keep=junk, max_new_tokens=2))
    settle(lambda: session.ask("Why?", **{"max_new_tokens": 2, **options}))
    assert session.ask("Why?", max_new_tokens=2).answer_tokens == 2


@quietly
@given(junk=JUNK, other=JUNK, options=OPTIONS)
def test_cached(model: EdgeModel, junk: Any, other: Any, options: Any) -> None:
    settle(lambda: model.cached(junk))
    cached = model.cached(10**6)
    settle(lambda: cached.look(junk, other))
    settle(lambda: cached.ask(junk, other, max_new_tokens=2))
    settle(lambda: cached.ask(PICTURE, "Why?", **{"max_new_tokens": 2, **options}))
    assert cached.ask(PICTURE, "Why?", max_new_tokens=2).answer_tokens == 2


def results_of(model: EdgeModel, *arguments: Any, **settings: Any) -> list[Any]:
    with model.watch(*arguments, **settings) as results:
        return list(itertools.islice(results, 3))


@pytest.mark.parametrize(
    "name",
    ["source", "questions", "every", "deadline", "unchanged_below", "stalled_after", "tokens", "system", "max_context"],
)
def test_each_argument_of_a_watch(model: EdgeModel, name: str) -> None:
    given = {"source": [PICTURE], "questions": [("Why?", {"max_new_tokens": 1})], "max_context": 200}
    for make in FIXED:
        settle(lambda make=make: results_of(model, **{**given, name: make()}))
    for name in ("color", "metrics"):
        for make in FIXED:
            settle(lambda make=make, name=name: results_of(model, **{**given, name: make()}))


@quietly
@given(frame=JUNK, question=JUNK, options=OPTIONS)
def test_watch(model: EdgeModel, frame: Any, question: Any, options: Any) -> None:
    """A frame that is none does not end a watch: the next one is answered."""
    frames = [frame, Frame(frame, "gray"), Frame(lambda: frame), PICTURE]
    with model.watch(frames, [("Why?", {"max_new_tokens": 1})], max_context=200) as watch:
        results = list(watch)
    assert len(results) == 4 and results[-1].error is None
    settle(lambda: results_of(model, [PICTURE], [question]))
    settle(lambda: results_of(model, [PICTURE], [("Why?", {"max_new_tokens": 1, **options})]))


@pytest.mark.parametrize("make", FIXED, ids=range(len(FIXED)))
def test_what_a_result_or_a_grammar_is_made_of(model: EdgeModel, make: Callable[[], Any]) -> None:
    picture = VisionResult(make(), None, None, (1, 1))
    assert len(repr(picture)) < 300
    settle(lambda: model.ask(picture, "Why?", max_new_tokens=2))
    pytest.importorskip("llguidance", reason="schemas need llguidance")
    settle(lambda: model.ask(None, "Why?", schema=Lark(make()), max_new_tokens=2))


def test_an_unknown_option_is_named_with_the_nearest(model: EdgeModel) -> None:
    with pytest.raises(RequestError, match=r"no option 'max_tokens'; did you mean 'max_new_tokens'\? There are: max"):
        model.ask(None, "Why?", max_tokens=5)  # type: ignore[call-arg]
    for call in (model.ask_many, model.stream):
        with pytest.raises(RequestError, match="no option 'temprature'; did you mean 'temperature'"):
            call(None, ["Why?"], temprature=1)  # type: ignore[call-arg]
    with pytest.raises(RequestError, match="no option 'nothing_like_it'; There are: max_new_tokens, temperature"):
        model.session().ask("Why?", nothing_like_it=1)  # type: ignore[call-arg]


def test_one_text_is_one_question(model: EdgeModel) -> None:
    (reply,) = model.ask_many(PICTURE, "Why?", max_new_tokens=3)
    assert reply.token_ids == model.ask(PICTURE, "Why?", max_new_tokens=3).token_ids


def test_errors_are_one_line_whatever_is_in_them() -> None:
    assert str(VzEdgeError("two\nlines\tand \x1b[31m\ud800")) == r"two lines and \x1b[31m\ud800"
    assert len(str(VzEdgeError("x" * 10**6))) < 2100
