"""A compressed model in what people do with transformers: generate, pipelines, batches, training, quantised weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, pipeline

import vz_edge
from tests.host.compressing import (
    FAMILIES,
    TOTAL,
    Plain,
    features_by_hooks,
    inputs_of,
    pictures,
    tiles_of,
    tower_layers,
    vision_inputs,
)

REPOSITORY = Path(__file__).parents[2]
NEW_TOKENS = 6
GREEDY = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}


@pytest.fixture(scope="module", params=FAMILIES)
def plain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Plain:
    return Plain(tmp_path_factory.mktemp(request.param) / "model", request.param)


@pytest.fixture(scope="module")
def compressed(plain: Plain) -> tuple[Any, Any]:
    model, processor = plain.compressed()
    processor.tokenizer.padding_side = "left"
    return model, processor


def step_by_step(model: Any, processor: Any, inputs: Any) -> list[int]:
    """Greedy tokens of one prompt, each from a forward pass over all that is known, without generate and its cache."""
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    features = torch.cat(model.get_image_features(**vision_inputs(inputs)).pooler_output)
    embeds[inputs["input_ids"] == processor.image_token_id] = features
    tokens = []
    for _ in range(NEW_TOKENS):
        logits = model(inputs_embeds=embeds, use_cache=False).logits[0, -1]
        logits[model.generation_config.eos_token_id] = -torch.inf
        tokens.append(int(logits.argmax()))
        embeds = torch.cat([embeds, model.get_input_embeddings()(torch.tensor([tokens[-1:]]))], dim=1)
    return tokens


@torch.inference_mode()
def answers(model: Any, inputs: Any, **options: Any) -> list[list[int]]:
    return model.generate(**inputs, **GREEDY | options)[:, inputs["input_ids"].shape[1] :].tolist()


@torch.inference_mode()
def test_generate_is_what_the_features_say(compressed: tuple[Any, Any]) -> None:
    model, processor = compressed
    inputs = inputs_of(processor, 2)
    assert answers(model, inputs) == [step_by_step(model, processor, inputs)]


@pytest.mark.parametrize("beams", [1, 3])
def test_a_batch_answers_as_one_by_one(compressed: tuple[Any, Any], beams: int) -> None:
    """Prompts of several lengths and several pictures, padded on the left."""
    model, processor = compressed
    first, second, third, fourth = pictures()
    prompts = [("<image>\nwhat?", [first]), ("no picture", []), ("<image> or <image>\nlonger?", [second, third])]
    prompts.append(("a<image>", [fourth]))
    alone = []
    for text, shown in prompts:
        inputs = processor(images=shown or None, text=text, return_tensors="pt")
        alone += answers(model, inputs, num_beams=beams)
    every_picture = [picture for _, shown in prompts for picture in shown]
    texts = [text for text, _ in prompts]
    inputs = processor(images=every_picture, text=texts, padding=True, return_tensors="pt")
    assert (inputs["attention_mask"][:, 0] == 0).sum() == len(prompts) - 1
    assert answers(model, inputs, num_beams=beams) == alone


@torch.inference_mode()
def test_pipeline(compressed: tuple[Any, Any]) -> None:
    model, processor = compressed
    answer = pipeline("image-text-to-text", model=model, processor=processor)
    picture = pictures()[0]
    chat = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "what?"}]}]
    (found,) = answer(text=chat, generate_kwargs=GREEDY, return_full_text=False)
    inputs = processor.apply_chat_template(
        chat, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
    )
    assert (inputs["input_ids"] == processor.image_token_id).sum() == TOTAL_OF_FIRST[model.config.model_type]
    expected = step_by_step(model, processor, inputs)
    assert found["generated_text"] == processor.decode(expected, skip_special_tokens=True)


TOTAL_OF_FIRST = {"llava": 12, "llava_next": 60}  # the first picture has a grid of 2 x 2


def test_a_compiled_language_model(tmp_path: Path) -> None:
    model, processor = Plain(tmp_path, "llava_next").compressed()
    inputs = inputs_of(processor)
    graphs = []

    def backend(graph: torch.fx.GraphModule, _inputs: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    with torch.inference_mode():
        expected = model(**inputs).logits
        model.model.language_model.compile(backend=backend)
        torch.testing.assert_close(model(**inputs).logits, expected)
    assert graphs


def gradients(model: Any, inputs: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def test_training_with_gradient_checkpointing(plain: Plain) -> None:
    model, processor = plain.compressed()
    model.train()
    inputs = inputs_of(processor, 2)
    expected = gradients(model, inputs)
    assert expected["model.multi_modal_projector.linear_1.weight"].abs().max() > 0
    assert tower_layers(model)[1].self_attn.v_proj.weight.grad.abs().max() > 0
    assert all(value.grad is None for value in tower_layers(model)[2].parameters())
    model.gradient_checkpointing_enable()
    found = gradients(model, inputs)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


def test_the_projector_learns_alone(plain: Plain) -> None:
    """As the paper tunes it: all else is frozen."""
    model, processor = plain.compressed()
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    assert {name.split(".")[1] for name in gradients(model, inputs_of(processor))} == {"multi_modal_projector"}


@torch.inference_mode()
def assert_features_are_those_of_the_whole_tower(model: Any, plain: Plain, tolerance: float) -> None:
    """``model`` is plain and may be in half precision, quantised or on several devices; it is compressed here."""
    inputs = inputs_of(plain.processor, 3)
    pixels = tiles_of(inputs, plain)
    expected = [features_by_hooks(model, plain, values.to(model.dtype), columns) for values, columns in pixels]
    vz_edge.compress(model, plain.processor, TOTAL[plain.family])
    found = model.get_image_features(**vision_inputs(inputs.to(model.dtype)))
    for features, kept, (wanted, wanted_kept) in zip(found.pooler_output, found.kept, expected, strict=True):
        assert torch.equal(kept, wanted_kept)
        assert (features - wanted).abs().max() <= tolerance * wanted.abs().max()


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes(plain: Plain, bits: int) -> None:
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    config = BitsAndBytesConfig(**nf4 if bits == 4 else {"load_in_8bit": True})
    model = AutoModelForImageTextToText.from_pretrained(
        plain.folder, quantization_config=config, dtype=torch.float32, device_map="cpu"
    ).eval()
    quantised = type(tower_layers(model)[0].self_attn.q_proj)
    assert quantised is not torch.nn.Linear
    assert_features_are_those_of_the_whole_tower(copy.deepcopy(model), plain, tolerance=0.02)
    processor = vz_edge.compress(model, plain.processor, TOTAL[plain.family])
    assert len(answers(model, inputs_of(processor))[0]) == NEW_TOKENS


@pytest.mark.filterwarnings("ignore:The following device_map keys")  # the newline is a parameter, not a module
def test_weights_on_disk(plain: Plain, tmp_path: Path) -> None:
    """A device map of accelerate's that leaves tower and projector on the disk until a layer runs."""
    pytest.importorskip("accelerate")
    device_map = {"model.vision_tower": "disk", "model.multi_modal_projector": "disk"}
    device_map |= {"model.language_model": "cpu", "lm_head": "cpu"}
    if plain.family == "llava_next":
        device_map["model.image_newline"] = "cpu"
    model = AutoModelForImageTextToText.from_pretrained(
        plain.folder, device_map=device_map, offload_folder=tmp_path, dtype=torch.float32
    ).eval()
    assert tower_layers(model)[0].self_attn.q_proj.weight.is_meta
    inputs = inputs_of(plain.processor, 3)
    processor = vz_edge.compress(model, plain.processor, TOTAL[plain.family])
    exact, _ = plain.compressed()
    expected = exact.get_image_features(**vision_inputs(inputs)).pooler_output
    for found, wanted in zip(model.get_image_features(**vision_inputs(inputs)).pooler_output, expected, strict=True):
        torch.testing.assert_close(found, wanted)
    assert answers(model, inputs_of(processor)) == answers(exact, inputs_of(processor))


def test_the_example_of_the_documentation_runs_as_written(capsys: pytest.CaptureFixture[str]) -> None:
    text = (REPOSITORY / "docs" / "transformers.md").read_text(encoding="utf-8")
    example = text.split("```python\n")[1].split("```")[0]
    for written, here in (
        ("llava-hf/llava-v1.6-vicuna-7b-hf", REPOSITORY / "export" / "vz-demo"),
        ("street.jpg", REPOSITORY / "examples" / "scene.jpg"),
        ("What is in the picture?", "Is there a circle?"),
    ):
        assert written in example
        example = example.replace(written, str(here))
    exec(compile(example, "docs/transformers.md", "exec"), {})
    assert capsys.readouterr().out.strip() == "yes"
