"""The embedded model through the whole path, as `make demo` takes it: it answers right, here and in stock GenAI."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vz_edge import EdgeModel
from vz_edge.device.verify import look_again
from vz_edge.host.export import ExportRequest, plan_export, write_bundle

PICTURE = Path(__file__).parents[1] / "examples" / "scene.png"
# What anyone sees in examples/scene.png.
ANSWERS = {
    "what color is the star?": "brown",
    "what color is the rectangle?": "black",
    "what shape is the green object?": "circle",
    "is there a green circle?": "yes",
    "is there a red star?": "no",
    "how many circles are there?": "1",
}


class Silent:
    def start(self, stage: str, total_bytes: int) -> None: ...

    def advance(self, item: str, size_bytes: int) -> None: ...


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, EdgeModel]:
    out = tmp_path_factory.mktemp("demo") / "bundle"
    write_bundle(plan_export(ExportRequest("vz-demo", out, bits=4, tokens="320")), Silent())
    return out, EdgeModel.load(out, threads=2)


def test_it_sees(demo: tuple[Path, EdgeModel]) -> None:
    _, model = demo
    replies = model.ask_many(PICTURE, list(ANSWERS), max_new_tokens=8)
    assert {question: reply.text.strip() for question, reply in zip(ANSWERS, replies, strict=True)} == ANSWERS
    assert {reply.image_tokens for reply in replies} == {320}
    assert {reply.finish_reason for reply in replies} == {"stop"}


def test_the_answer_depends_on_the_picture(demo: tuple[Path, EdgeModel]) -> None:
    _, model = demo
    blank = np.full((535, 803, 3), 230, dtype=np.uint8)
    assert model.ask(blank, "is there a green circle?", max_new_tokens=8).text.strip() == "no"


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
