"""Real exports, asked through EdgeModel: what the published code and transformers answer, the bundle answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.golden_cases import CHECKPOINTS, GOLDEN, Case, cases
from tests.tiny import IMAGE_TOKEN_ID, make_checkpoint
from vz_edge.device.model import EdgeModel
from vz_edge.device.verify import look_again
from vz_edge.host.export import ExportRequest, SilentProgress, plan_export, write_bundle

QUESTION = "What is to the left of the bus?"


def exported(out: Path, checkpoint: Path, **options) -> EdgeModel:
    write_bundle(plan_export(ExportRequest(str(checkpoint), out=out, bits=16, **options)), SilentProgress())
    return EdgeModel.load(out, threads=2)


@pytest.fixture(scope="module", params=CHECKPOINTS)
def golden(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[EdgeModel, list[Case]]:
    """A golden checkpoint exported at its first case's budget, and all its cases."""
    found = cases(request.param)
    budget = found[0].budget
    model = exported(
        tmp_path_factory.mktemp("golden") / "bundle",
        found[0].folder,
        dominant=budget.dominant,
        contextual=budget.contextual,
        image_mode="pad" if request.param == "llava-1.5" else "stock",
    )
    return model, found


def test_golden_pictures_from_file_to_features(golden: tuple[EdgeModel, list[Case]]) -> None:
    model, found = golden
    of_budget = [case for case in found if case.budget == model.manifest.budget]
    assert len(of_budget) >= 2
    for case in of_budget:
        result = model.encode(GOLDEN / case.checkpoint / f"{case.image}.png")
        assert result.kept is not None
        np.testing.assert_array_equal(np.sort(result.kept, axis=1), case.kept)
        case.assert_features(result.features)


def test_golden_features_to_logits(golden: tuple[EdgeModel, list[Case]]) -> None:
    model, found = golden
    image_id = model.manifest.model.image_token_id
    for case in found:
        embeds = model.embedding.place([1, 5, image_id, 7, 9], image_id, [case.features])
        logits = model.decoder.start(len(embeds)).append(embeds)
        assert np.abs(logits - case.last_logits).max() < 1e-3 * np.abs(case.last_logits).max()


@pytest.mark.parametrize(("family", "decoder"), [("llava", "llama"), ("llava_next", "mistral")])
def test_all_tokens_answer_as_transformers_does(tmp_path: Path, family: str, decoder: str) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", family, decoder)
    model = exported(tmp_path / "bundle", tmp_path / "checkpoint", tokens="all")
    for size in ((200, 130), (60, 200), (90, 90)):
        picture = Image.fromarray(
            np.random.default_rng(size[0]).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        )
        expected, image_tokens = stock_answer(checkpoint, tmp_path / "checkpoint", picture)
        reply = model.ask(picture, QUESTION, max_new_tokens=16)
        assert list(reply.token_ids) == expected
        assert reply.image_tokens == image_tokens
    assert look_again(model).agrees("cpu")


def test_with_a_budget_questions_share_a_picture_and_streams_equal_replies(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "checkpoint", "llava_next")
    model = exported(tmp_path / "bundle", tmp_path / "checkpoint", tokens="40")
    picture = np.random.default_rng(0).integers(0, 256, (150, 150, 3), dtype=np.uint8)
    prompts = [QUESTION, "How many people are there?"]
    shared = model.ask_many(picture, prompts, max_new_tokens=12)
    separate = [model.ask(picture, prompt, max_new_tokens=12) for prompt in prompts]
    assert [reply.token_ids for reply in shared] == [reply.token_ids for reply in separate]
    assert shared[0].image_tokens == 40
    assert "".join(model.stream(picture, QUESTION, max_new_tokens=12)) == separate[0].text
    assert look_again(model).agrees("cpu")


def stock_answer(checkpoint, folder: Path, picture: Image.Image) -> tuple[list[int], int]:
    """Greedy answer of transformers to QUESTION about a picture: token ids, and the picture's token count."""
    import torch
    from transformers import AutoTokenizer
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
    from transformers.models.llava.processing_llava import LlavaProcessor
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
    from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

    anyres = checkpoint.config.model_type == "llava_next"
    processor_type = LlavaNextProcessor if anyres else LlavaProcessor
    image_type = LlavaNextImageProcessorPil if anyres else LlavaImageProcessorPil
    processor = processor_type(
        image_type.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
        patch_size=checkpoint.config.vision_config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=(folder / "chat_template.jinja").read_text(),
    )
    content = [{"type": "image", "image": picture}, {"type": "text", "text": QUESTION}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    with torch.inference_mode():
        output = checkpoint.generate(**inputs, max_new_tokens=16, do_sample=False, eos_token_id=2, pad_token_id=3)
    prompt = inputs["input_ids"]
    return output[0, prompt.shape[1] :].tolist(), int((prompt == IMAGE_TOKEN_ID).sum())
