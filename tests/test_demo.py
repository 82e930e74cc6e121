"""The embedded model through the whole path, as `make demo` takes it: it answers right, here and in stock GenAI."""

from __future__ import annotations

import doctest
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pydantic
import pytest
from easy_vqa import get_test_image_paths, get_test_questions
from PIL import Image

from vz_edge import EdgeModel
from vz_edge.device.verify import look_again

PICTURE = Path(__file__).parents[1] / "examples" / "scene.jpg"
DOCS = Path(__file__).parents[1] / "docs"
# What anyone sees in examples/scene.jpg; the second is the question of `make demo`.
ANSWERS = {
    "what color is the star?": "blue",
    "how many circles do you see?": "2",
    "what shape is the teal object?": "circle",
    "is there a black circle?": "yes",
    "does the image contain a rectangle?": "no",
    "how many objects are there?": "3",
    "is there a number?": "yes",
}
EASY_VQA_PICTURES = 40
LEAST_EASY_VQA_PERCENT = 97  # profiles/reports/demo_accuracy.md has the whole set


class Count(pydantic.RootModel[Annotated[int, pydantic.Field(ge=0, le=9)]]):
    pass


class Scene(pydantic.BaseModel):
    shape: Literal["circle", "rectangle", "triangle"]
    color: Literal["teal", "blue"]


@pytest.fixture(scope="module")
def demo(demo_bundle: Path) -> tuple[Path, EdgeModel]:
    return demo_bundle, EdgeModel.load(demo_bundle, threads=2)


def test_it_sees_the_example(demo: tuple[Path, EdgeModel]) -> None:
    _, model = demo
    replies = model.ask_many(PICTURE, list(ANSWERS), max_new_tokens=8)
    assert {question: reply.text.strip() for question, reply in zip(ANSWERS, replies, strict=True)} == ANSWERS
    assert len({reply.image_tokens for reply in replies}) == 1
    assert {reply.finish_reason for reply in replies} == {"stop"}


def test_a_memory_of_two_conversations_answers_as_fresh_asks_do(demo: tuple[Path, EdgeModel]) -> None:
    """Taking turns: each goes on where it was."""
    _, model = demo
    cached = model.cached(8 * 2**20)
    mirrored = np.asarray(Image.open(PICTURE).convert("RGB"))[:, ::-1].copy()
    conversations: list[tuple[Any, list[dict[str, str]]]] = [(PICTURE, []), (mirrored, [])]
    known = 0
    for question in ANSWERS:
        for picture, messages in conversations:
            messages.append({"role": "user", "content": question})
            found, fresh = (asked.ask(picture, messages, max_new_tokens=8) for asked in (cached, model))
            assert (found.text, found.token_ids) == (fresh.text, fresh.token_ids)
            messages.append({"role": "assistant", "content": found.text})
            known += found.cached_tokens
    assert known > 0


def test_a_session_answers_as_fresh_asks_do(demo: tuple[Path, EdgeModel]) -> None:
    """The tokens that are kept of a picture serve any question, so one look at it is enough."""
    _, model = demo
    session = model.session()
    session.look(PICTURE)
    replies = [session.ask(question, max_new_tokens=8) for question in ANSWERS]
    fresh = [model.ask(PICTURE, question, max_new_tokens=8) for question in ANSWERS]
    assert [reply.token_ids for reply in replies] == [reply.token_ids for reply in fresh]
    assert all(reply.cached_tokens > reply.image_tokens for reply in replies)


def test_choices_agree_with_what_it_writes_freely(demo: tuple[Path, EdgeModel]) -> None:
    _, model = demo
    questions, answers, numbers = get_test_questions()
    shapes = ["circle", "rectangle", "triangle"]
    for number in sorted(set(numbers))[:EASY_VQA_PICTURES:8]:
        asked = [q for q, a, n in zip(questions, answers, numbers, strict=True) if n == number and a in shapes]
        picture = model.encode(get_test_image_paths()[number])
        for free, chosen in zip(
            model.ask_many(picture, asked, max_new_tokens=8), model.ask_many(picture, asked, schema=shapes), strict=True
        ):
            assert chosen.value == free.text
            assert chosen.token_ids == free.token_ids[:-1]  # the stop token
            assert sum(chosen.probabilities.values()) == pytest.approx(1)


def test_it_answers_with_a_pydantic_object(demo: tuple[Path, EdgeModel]) -> None:
    _, model = demo
    session = model.session()
    session.look(PICTURE)
    assert session.ask("how many objects are there?", schema=Count).value == Count(3)
    scene = session.ask("what shape is the teal object?", schema=Scene).value
    assert isinstance(scene, Scene) and scene.color in ("teal", "blue")
    assert {q: session.ask(q, max_new_tokens=8).text for q in ANSWERS} == ANSWERS


def test_the_examples_of_the_docs_are_what_it_says(
    demo: tuple[Path, EdgeModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model = demo
    monkeypatch.chdir(PICTURE.parents[1])
    blocks = re.findall("```python\n(.*?)```", (DOCS / "answers.md").read_text(encoding="utf-8"), re.DOTALL)
    examples = doctest.DocTestParser().get_doctest("".join(blocks), {"model": model}, "answers.md", None, 0)
    assert len(examples.examples) > 5
    assert doctest.DocTestRunner().run(examples).failed == 0


def test_it_sees_pictures_that_training_never_saw(demo: tuple[Path, EdgeModel]) -> None:
    _, model = demo
    questions, answers, numbers = get_test_questions()
    right = []
    for number in sorted(set(numbers))[:EASY_VQA_PICTURES]:
        asked = [(q, a) for q, a, n in zip(questions, answers, numbers, strict=True) if n == number]
        replies = model.ask_many(get_test_image_paths()[number], [q for q, _ in asked], max_new_tokens=8)
        right += [reply.text.strip() == answer for reply, (_, answer) in zip(replies, asked, strict=True)]
    assert 100 * np.mean(right) >= LEAST_EASY_VQA_PERCENT


def test_the_exports_picture_looks_the_same_again(demo: tuple[Path, EdgeModel]) -> None:
    _, model = demo
    assert look_again(model).agrees("cpu")


def test_stock_genai_gives_the_same_tokens(demo: tuple[Path, EdgeModel]) -> None:
    og = pytest.importorskip("onnxruntime_genai")
    folder, model = demo
    genai = og.Model(str(folder))
    tiles = model.vision.tile(PICTURE)
    assert tiles.grid is not None
    for question in ANSWERS:
        reply = model.ask(PICTURE, question, max_new_tokens=8)
        content = [{"type": "image"}, {"type": "text", "text": question}]
        ids = model.chat.ids([{"role": "user", "content": content}])
        place = ids.index(model.chat.image_token_id)
        expanded = [*ids[:place], *[model.chat.image_token_id] * reply.image_tokens, *ids[place + 1 :]]
        inputs = og.NamedTensors()
        inputs["pixel_values"] = og.Tensor(tiles.pixel_values)
        inputs["grid_width"] = og.Tensor(np.array([tiles.grid[0]], dtype=np.int64))
        inputs["num_image_tokens"] = og.Tensor(np.array([reply.image_tokens], dtype=np.int64))
        inputs["input_ids"] = og.Tensor(np.array([expanded], dtype=np.int32))
        assert generated(og, genai, inputs, len(expanded) + 8) == list(reply.token_ids)


def generated(og: Any, genai: Any, inputs: Any, max_length: int) -> list[int]:
    parameters = og.GeneratorParams(genai)
    parameters.set_search_options(max_length=max_length)
    generator = og.Generator(genai, parameters)
    generator.set_inputs(inputs)
    tokens = []
    while not generator.is_done():
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
    return tokens
