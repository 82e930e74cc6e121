"""What is no plain checkpoint is told at once, by what it is and what to take instead."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import make_checkpoint
from vz_edge.errors import CheckpointError, UnsupportedModelError
from vz_edge.host import precheck
from vz_edge.host.opened import open_model


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "model"
    make_checkpoint(folder)
    return folder


@pytest.fixture
def folder(plain: Path, tmp_path: Path) -> Path:
    """A copy whose files may be changed."""
    for path in plain.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def say(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def change_weights(folder: Path, rename: Any) -> None:
    file = folder / "model.safetensors"
    save_file(dict(rename(name, value) for name, value in load_file(file).items()), file, metadata={"format": "pt"})


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_model(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


METHODS = [
    ({"quant_method": "awq", "bits": 4}, "awq"),
    ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq"),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
    ({"load_in_8bit": True, "llm_int8_threshold": 6.0}, "bitsandbytes"),
    ({"quant_method": "fp8", "activation_scheme": "dynamic"}, "fp8"),
    ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors"),
    ({"quant_method": "torchao"}, "torchao"),
    ({"quant_method": "hqq"}, "hqq"),
    ({"group_size": 64, "bits": 4}, "without a name"),
]


@pytest.mark.parametrize(("found", "name"), METHODS, ids=str)
@pytest.mark.parametrize("place", ["quantization_config", "compression_config", "quantization", "text_config"])
def test_quantised_weights_are_named_by_their_method(folder: Path, found: Any, name: str, place: str) -> None:
    say(folder, **({place: {"quantization_config": found}} if place == "text_config" else {place: found}))
    assert f"config.json: {name}); take the 16-bit safetensors that it was quantised from" in refusal(folder)


@pytest.mark.parametrize(
    "nothing", [None, {}, {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": False}]
)
def test_a_config_that_says_nothing_is_quantised(folder: Path, nothing: Any) -> None:
    say(folder, quantization_config=nothing)
    open_model(folder)


@pytest.mark.parametrize(
    "name", ["model-q4_0.gguf", "quantize_config.json", "quant_config.json", "hf_quant_config.json", "rank0.engine"]
)
def test_quantised_files_are_named(folder: Path, name: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / name).write_text("{}")
    assert f"is quantised already ({name})" in refusal(folder)


def test_a_gguf_beside_a_checkpoint_is_no_reason_to_refuse(folder: Path) -> None:
    (folder / "model-q4_0.gguf").write_text("")
    open_model(folder)


@pytest.mark.parametrize("part", ["qweight", "weight_packed", "weight_scale", "SCB", "weight.absmax", "W_q"])
def test_quantised_tensors_are_found_without_a_config(folder: Path, part: str) -> None:
    change_weights(folder, lambda name, value: (name.replace("q_proj.weight", f"q_proj.{part}"), value))
    assert f"q_proj.{part} has dtype F32" in refusal(folder)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn])
def test_weights_of_few_bits_are_found_without_a_config(folder: Path, dtype: torch.dtype) -> None:
    change_weights(folder, lambda name, value: (name, value.to(dtype) if name.endswith("q_proj.weight") else value))
    assert "is quantised already" in refusal(folder)


def test_a_peft_adapter_names_its_base(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "llava-hf/llava-1.5-7b-hf"}))
    save_file({"base_model.model.x.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "adapter_model.safetensors")
    message = refusal(tmp_path)
    assert "holds a LoRA adapter" in message and "llava-hf/llava-1.5-7b-hf first" in message and "beside" not in message
    assert "merge_and_unload()" in message


def test_an_adapter_beside_a_checkpoint_is_not_passed_by(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    assert "beside a checkpoint" in refusal(folder) and "move the adapter out" in refusal(folder)


def test_an_adapter_of_the_original_code(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "model", layout="original")
    (tmp_path / "model/model.safetensors").unlink()
    (tmp_path / "model/non_lora_trainables.bin").write_bytes(b"")
    assert "merge_lora_weights.py" in refusal(tmp_path / "model")


def test_a_projector_alone(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "model", layout="original")
    (tmp_path / "model/model.safetensors").unlink()
    (tmp_path / "model/mm_projector.bin").write_bytes(b"")
    assert "a projector alone" in refusal(tmp_path / "model")


@pytest.mark.parametrize("name", ["base_model.model.{}", "{}.lora_A.default.weight", "{}.base_layer.weight"])
def test_tensors_of_an_adapter(folder: Path, name: str) -> None:
    change_weights(folder, lambda key, value: (name.format(key), value))
    assert "LoRA adapter" in refusal(folder) and "merge_and_unload()" in refusal(folder)


def test_original_pickles_are_not_sent_to_transformers(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "model", layout="original")
    (tmp_path / "model/model.safetensors").rename(tmp_path / "model/pytorch_model.bin")
    message = refusal(tmp_path / "model")
    assert "LLaVA's own code" in message and "AutoModel" not in message


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "qwen2_vl"}, "model_type 'qwen2_vl' is not supported; supported are llava, llava_next"),
        ({"model_type": "llama"}, "'llama' (a language model without a vision tower)"),
        ({"model_type": "bunny-phi", "mm_vision_tower": "x"}, "model_type 'bunny-phi' is not supported"),
    ],
)
def test_a_family_that_is_not_there_is_named_before_its_tower_is_looked_for(
    folder: Path, config: dict[str, Any], message: str
) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    change_weights(folder, lambda name, value: (name.replace("vision_tower", "visual"), value))
    with pytest.raises(UnsupportedModelError) as caught:
        open_model(folder)
    assert message in str(caught.value)


def test_an_original_config_without_a_tower(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "llava_llama"}))
    assert "has no mm_vision_tower" in refusal(folder)


def test_names_of_plain_weights_are_no_reason() -> None:
    names = ["model.layers.0.self_attn.q_proj.weight", "vision_model.embeddings.position_ids", "lm_head.bias"]
    precheck.check_tensors([(names[0], "BF16"), (names[1], "I64"), (names[2], "F16")], Path("folder"))
