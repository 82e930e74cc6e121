"""A whole bundle, asked in every way: each way gives the same answer."""

from __future__ import annotations

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.device import standin
from vz_edge.bundle import StopSpec
from vz_edge.device.fake_decoder import FakeContext, FakeDecoder
from vz_edge.device.model import EdgeModel
from vz_edge.device.onnx_decoder import OnnxDecoder
from vz_edge.device.prompt import messages_of
from vz_edge.errors import (
    ContextLengthError,
    CorruptBundleError,
    ImageError,
    InsufficientMemoryError,
    RequestError,
    VzEdgeError,
)

PICTURE = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
OTHER = np.random.default_rng(1).integers(0, 256, (90, 30, 3), dtype=np.uint8)
QUESTIONS = ["What is this?", "What colour is the house?", "Who is there?"]
COUNT = 12


def reference(model: EdgeModel, pictures: list[np.ndarray], prompt: str, count: int) -> list[int]:
    """Greedy answer with nothing shared: the whole sequence is read anew for every token."""
    ids = model.chat.ids(messages_of(prompt, len(pictures)))
    features = [model.encode(picture).features for picture in pictures]
    embeds = model.embedding.place(ids, standin.IMAGE_TOKEN_ID, features)
    answer: list[int] = []
    while len(answer) < count and (not answer or answer[-1] != standin.EOS):
        logits = model.decoder.start(len(embeds)).append(embeds)
        answer.append(int(logits.argmax()))
        embeds = np.concatenate([embeds, model.embedding.rows(answer[-1:])])
    return answer


@pytest.mark.parametrize("family", ["llava", "llava_next"])
@pytest.mark.parametrize("budget", [standin.BUDGET, None], ids=["budget", "all"])
def test_an_answer_is_the_greedy_continuation(tmp_path: Path, family: str, budget) -> None:
    standin.write_bundle(tmp_path / "bundle", family, budget)
    model = EdgeModel.load(tmp_path / "bundle", threads=1)
    reply = model.ask(PICTURE, QUESTIONS[0], max_new_tokens=COUNT)
    assert list(reply.token_ids) == reference(model, [PICTURE], QUESTIONS[0], COUNT)
    encoded = model.encode(PICTURE)
    assert reply.image_tokens == len(encoded.features)
    assert (encoded.kept is None) == (budget is None)
    assert encoded.original_size == (90, 60)


def test_counts_and_times_are_in_the_reply(model: EdgeModel) -> None:
    reply = model.ask(PICTURE, QUESTIONS[0], max_new_tokens=COUNT)
    assert reply.prompt_tokens == len("<s>USER: \nWhat is this? ASSISTANT:") - len("<s>") + 1
    assert reply.image_tokens == 5 * standin.BUDGET.per_tile  # the base tile and a grid of 2 x 2
    assert reply.answer_tokens == len(reply.token_ids) == COUNT
    assert reply.finish_reason == "length"
    assert min(reply.preprocess_sec, reply.vision_sec, reply.prefill_sec, reply.decode_sec) > 0
    assert reply.ttft_sec == reply.preprocess_sec + reply.vision_sec + reply.prefill_sec
    assert reply.total_sec == reply.ttft_sec + reply.decode_sec
    assert reply.decode_tokens_per_sec == (COUNT - 1) / reply.decode_sec
    assert model.load_sec > 0


def test_stream_gives_the_text_of_ask_in_pieces(model: EdgeModel) -> None:
    whole = model.ask(PICTURE, QUESTIONS[0], max_new_tokens=COUNT)
    stream = model.stream(PICTURE, QUESTIONS[0], max_new_tokens=COUNT)
    pieces = list(stream)
    assert len(pieces) > 1
    assert all(pieces)
    assert "".join(pieces) == stream.reply.text == whole.text
    assert stream.reply.token_ids == whole.token_ids
    unread = model.stream(PICTURE, QUESTIONS[0], max_new_tokens=COUNT)
    next(unread)
    assert unread.reply.text == whole.text


def test_a_picture_can_be_encoded_before(model: EdgeModel, tmp_path: Path) -> None:
    Image.fromarray(PICTURE).save(tmp_path / "picture.png")
    expected = model.ask(PICTURE, QUESTIONS[0], max_new_tokens=COUNT)
    for picture in (Image.fromarray(PICTURE), tmp_path / "picture.png", str(tmp_path / "picture.png"), [PICTURE]):
        assert model.ask(picture, QUESTIONS[0], max_new_tokens=COUNT).token_ids == expected.token_ids
    assert model.ask(model.encode(PICTURE), QUESTIONS[0], max_new_tokens=COUNT).token_ids == expected.token_ids


def test_many_questions_share_the_picture_and_change_no_answer(model: EdgeModel) -> None:
    replies = model.ask_many(PICTURE, QUESTIONS, max_new_tokens=COUNT)
    separate = [model.ask(PICTURE, question, max_new_tokens=COUNT) for question in QUESTIONS]
    assert [reply.token_ids for reply in replies] == [reply.token_ids for reply in separate]
    assert replies[0].vision_sec > 0 == replies[1].vision_sec == replies[1].preprocess_sec
    assert model.ask_many(PICTURE, []) == []
    once, again = model.ask_many(PICTURE, [QUESTIONS[0]] * 2, max_new_tokens=COUNT)
    assert once.token_ids == again.token_ids == separate[0].token_ids
    without_picture = model.ask_many(None, ["a", "b"], max_new_tokens=COUNT)
    assert without_picture[1].token_ids == model.ask(None, "b", max_new_tokens=COUNT).token_ids


def test_several_pictures_no_picture_and_a_conversation(model: EdgeModel) -> None:
    several = model.ask([PICTURE, OTHER], "Compare.", max_new_tokens=COUNT)
    assert list(several.token_ids) == reference(model, [PICTURE, OTHER], "Compare.", COUNT)
    assert several.image_tokens == sum(len(model.encode(picture).features) for picture in (PICTURE, OTHER))
    assert model.ask(None, "Hello.", max_new_tokens=3).image_tokens == 0
    chat = [
        {"role": "user", "content": "What is this?"},
        {"role": "assistant", "content": "A house."},
        {"role": "user", "content": "And behind it?"},
    ]
    reply = model.ask(PICTURE, chat, max_new_tokens=COUNT)
    marked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}, *chat[1:]]
    assert model.ask(PICTURE, marked, max_new_tokens=COUNT).token_ids == reply.token_ids


def test_threads_share_a_model(model: EdgeModel) -> None:
    jobs = [(picture, question) for picture in (PICTURE, OTHER, None) for question in QUESTIONS] * 4
    expected = [model.ask(*job, max_new_tokens=COUNT).token_ids for job in jobs]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda job: model.ask(*job, max_new_tokens=COUNT).token_ids, jobs))
    assert found == expected


def test_stop_tokens_and_stop_strings_end_an_answer(model: EdgeModel) -> None:
    free = model.ask(PICTURE, QUESTIONS[1], max_new_tokens=COUNT)
    assert len(set(free.token_ids)) > 1
    stop_id = free.token_ids[-1]
    stopped = model.ask(PICTURE, QUESTIONS[1], max_new_tokens=COUNT, stop=[stop_id])
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == free.token_ids[: free.token_ids.index(stop_id) + 1]
    assert free.text.startswith(stopped.text)
    stop = free.text[1:3]
    for reply in (
        model.ask(PICTURE, QUESTIONS[1], max_new_tokens=COUNT, stop=["never", stop]),
        model.ask(PICTURE, QUESTIONS[1], max_new_tokens=COUNT, stop=stop),
        model.stream(PICTURE, QUESTIONS[1], max_new_tokens=COUNT, stop=[stop]).reply,
    ):
        assert reply.text == free.text[: free.text.index(stop)]
        assert reply.finish_reason == "stop"


def test_the_manifests_own_stops_are_kept(model: EdgeModel, tmp_path: Path) -> None:
    free = model.ask(PICTURE, QUESTIONS[0], max_new_tokens=COUNT)
    standin.write_bundle(tmp_path / "bundle", stop=StopSpec((free.token_ids[2],), (free.text[1],)))
    reply = EdgeModel.load(tmp_path / "bundle").ask(PICTURE, QUESTIONS[0], max_new_tokens=COUNT, stop=["other"])
    assert reply.finish_reason == "stop"
    assert reply.text == free.text[:1]


def test_the_seed_repeats_a_drawn_answer(model: EdgeModel) -> None:
    options = {"max_new_tokens": COUNT, "temperature": 2.0, "top_k": 50, "top_p": 0.95}
    drawn = [model.ask(PICTURE, QUESTIONS[0], seed=seed, **options).token_ids for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert [reply.token_ids for reply in model.ask_many(PICTURE, [QUESTIONS[0]] * 2, seed=1, **options)] == drawn[:2]


class TickingContext(FakeContext):
    def append(self, embeds: np.ndarray) -> np.ndarray:
        decoder: Any = self._decoder
        decoder.now += 1
        return super().append(embeds)


class TickingDecoder(FakeDecoder):
    """Every call takes a second of a clock that stands still otherwise."""

    now = 0.0

    def start(self, capacity: int) -> FakeContext:
        return TickingContext(self, capacity)


@pytest.mark.parametrize(("deadline_sec", "count"), [(0.5, 1), (1, 1), (1.5, 2), (3.5, 4), (99, COUNT)])
def test_a_deadline_ends_an_answer_between_two_tokens(
    model: EdgeModel, monkeypatch: pytest.MonkeyPatch, deadline_sec: float, count: int
) -> None:
    decoder = TickingDecoder(standin.HIDDEN, standin.VOCAB)
    fake = EdgeModel(model.manifest, model.vision, model.chat, model.embedding, decoder, 256, load_sec=0.0)
    whole = fake.ask(PICTURE, QUESTIONS[0], max_new_tokens=COUNT)
    assert whole.answer_tokens == COUNT
    monkeypatch.setattr(time, "perf_counter", lambda: decoder.now)
    reply = fake.ask(PICTURE, QUESTIONS[0], max_new_tokens=COUNT, deadline_sec=deadline_sec)
    assert reply.token_ids == whole.token_ids[:count]
    assert whole.text.startswith(reply.text)
    assert reply.finish_reason == ("length" if count == COUNT else "deadline")
    # Many questions have one deadline: the second of these comes after it.
    many = fake.ask_many(PICTURE, QUESTIONS[:2], max_new_tokens=COUNT, deadline_sec=deadline_sec)
    assert deadline_sec == 99 or many[1].answer_tokens == 1


def test_a_closed_stream_writes_no_more(model: EdgeModel) -> None:
    whole = model.stream(PICTURE, QUESTIONS[0], max_new_tokens=COUNT)
    reply = whole.reply
    whole.close()
    assert whole.reply is reply
    for begun in (0, 2):
        stream = model.stream(PICTURE, QUESTIONS[0], max_new_tokens=COUNT)
        for _ in range(begun):
            next(stream)
        for _ in range(2):
            stream.close()
        assert list(stream) == []
        with pytest.raises(VzEdgeError, match="closed before its end"):
            stream.reply  # noqa: B018


def test_what_does_not_fit_the_context_is_refused_with_what_would(bundle: Path) -> None:
    model = EdgeModel.load(bundle, threads=1, max_context=64)
    used = model.ask(PICTURE, "Why?", max_new_tokens=1)
    left = 64 - used.prompt_tokens - used.image_tokens
    assert model.ask(PICTURE, "Why?", max_new_tokens=left).answer_tokens == left
    with pytest.raises(ContextLengthError, match=f"lower max_new_tokens to {left}$"):
        model.stream(PICTURE, "Why?", max_new_tokens=left + 1)
    with pytest.raises(ContextLengthError, match="shorten the prompt"):
        model.ask_many(PICTURE, ["Why?", "Why? " * 30], max_new_tokens=1)
    assert EdgeModel.load(bundle, max_context=10**6).context_length == standin.CONTEXT


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"max_new_tokens": 0}, RequestError),
        ({"temperature": -1}, RequestError),
        ({"stop": [""]}, RequestError),
        ({"stop": [np.int64(2)]}, RequestError),
        ({"deadline_sec": 0}, RequestError),
        ({"deadline_sec": float("nan")}, RequestError),
        ({"image": "absent.jpg"}, ImageError),
        ({"image": np.zeros((4, 4), np.uint8)}, ImageError),
        ({"prompt": []}, RequestError),
        ({"image": [PICTURE, PICTURE], "prompt": [{"role": "user", "content": [{"type": "image"}]}]}, RequestError),
    ],
    ids=str,
)
def test_what_is_no_question_is_refused_before_anything_runs(model: EdgeModel, options: dict, error: type) -> None:
    with pytest.raises(error) as caught:
        model.stream(**{"image": PICTURE, "prompt": "Why?", **options})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("pictures", [None, PICTURE, [PICTURE, PICTURE]], ids=["none", "one", "two"])
def test_the_name_of_the_image_token_is_a_word_like_others(model: EdgeModel, pictures: object) -> None:
    plain = model.ask(pictures, "What does <imagf> do?", max_new_tokens=2)
    typed = model.ask(pictures, "What does <image> do?", max_new_tokens=2)
    assert (typed.image_tokens, typed.prompt_tokens) == (plain.image_tokens, plain.prompt_tokens)
    earlier = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Use <image>."}]
    assert model.ask(pictures, [*earlier, {"role": "user", "content": "And?"}], max_new_tokens=1).answer_tokens == 1


def test_a_precision_of_the_other_target_runs_on_the_cpu(tmp_path: Path, model: EdgeModel) -> None:
    standin.write_bundle(tmp_path / "bundle", target="cuda")
    half = EdgeModel.load(tmp_path / "bundle", threads=1)
    assert half.decoder.dtype == np.float16
    reply = half.ask(PICTURE, QUESTIONS[0], max_new_tokens=1)
    assert reply.token_ids == model.ask(PICTURE, QUESTIONS[0], max_new_tokens=1).token_ids


@pytest.mark.parametrize("wrong", [{"threads": 0}, {"max_context": 0}], ids=str)
def test_impossible_sizes_are_refused(bundle: Path, wrong: dict) -> None:
    with pytest.raises(RequestError, match=next(iter(wrong))):
        EdgeModel.load(bundle, **wrong)


def test_a_bundle_larger_than_the_memory_is_refused_before_it_is_loaded(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vz_edge.device.model.available_memory_bytes", lambda provider: 1000)
    monkeypatch.setattr(OnnxDecoder, "open", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(InsufficientMemoryError, match="vz-edge plan"):
        EdgeModel.load(bundle)


def test_a_damaged_bundle_is_refused(bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle, tmp_path / "bundle")
    path = tmp_path / "bundle" / "embedding.data"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptBundleError, match=r"embedding\.data"):
        EdgeModel.load(tmp_path / "bundle")
    manifest = json.loads((bundle / "vz_edge.json").read_text())
    assert set(manifest["files"]) >= {"decoder.onnx", "vision.onnx"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"family": "llava"}, "takes grid_width, pixel_values and the manifest's family llava .* gives pixel_values:"),
        ({"budget": None}, "takes grid_width, pixel_values and .* with 0 budgets gives pixel_values, token_order:"),
        (
            {"more_budgets": [{"dominant": 2, "contextual": 2}]},
            "with 2 budgets gives budget, grid_width, pixel_values:",
        ),
    ],
    ids=str,
)
def test_a_vision_graph_of_another_kind_than_the_manifest_says_is_refused(
    bundle: Path, tmp_path: Path, changed: dict, message: str
) -> None:
    shutil.copytree(bundle, tmp_path / "bundle")
    path = tmp_path / "bundle" / "vz_edge.json"
    manifest = json.loads(path.read_text())
    (manifest["model"] if "family" in changed else manifest).update(changed)
    path.write_text(json.dumps(manifest))
    with pytest.raises(CorruptBundleError, match=message):
        EdgeModel.load(tmp_path / "bundle")


def test_answers_need_no_more_of_a_decoder_than_its_contract(model: EdgeModel) -> None:
    decoder = FakeDecoder(standin.HIDDEN, standin.VOCAB)
    parts = (model.manifest, model.vision, model.chat, model.embedding)
    fake = EdgeModel(*parts, decoder, model.context_length, load_sec=0.0)
    separate = [fake.ask(PICTURE, question, max_new_tokens=COUNT).token_ids for question in QUESTIONS]
    assert len(set(separate)) == len(QUESTIONS)
    assert [reply.token_ids for reply in fake.ask_many(PICTURE, QUESTIONS, max_new_tokens=COUNT)] == separate
    assert list(separate[0]) == reference(fake, [PICTURE], QUESTIONS[0], COUNT)
