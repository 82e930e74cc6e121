"""The streamed checkpoint is bit by bit what bitsandbytes and transformers make of the whole model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny import make_checkpoint, make_model
from vz_edge.errors import UnsupportedModelError
from vz_edge.host.checkpoint import Checkpoint
from vz_edge.host.families import spec_from_config
from vz_edge.host.weight import ALL_ROWS, Weight

bitsandbytes = pytest.importorskip("bitsandbytes")
from vz_edge.host.bnb import check_shapes, write_language_model  # noqa: E402
from vz_edge.host.bnb.quantize import int8_tensors, nf4_tensors  # noqa: E402

LAYER = (704, 1088)  # several chunks of rows, the last one smaller; 11968 scales, no multiple of 256


def random_weight(dtype: torch.dtype) -> tuple[Weight, torch.Tensor]:
    values = torch.randn(LAYER, generator=torch.Generator().manual_seed(0)).to(dtype)
    return Weight("layer.weight", LAYER, lambda rows=ALL_ROWS: values[rows]), values


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_layer_is_what_bitsandbytes_makes_of_it(dtype: torch.dtype) -> None:
    weight, values = random_weight(dtype)
    rows, columns = LAYER
    nf4 = bitsandbytes.nn.Linear4bit(columns, rows, bias=False, quant_type="nf4", compress_statistics=True)
    int8 = bitsandbytes.nn.Linear8bitLt(columns, rows, bias=False, has_fp16_weights=False, threshold=6.0)
    for layer in (nf4, int8):
        layer.weight.data = values.clone()
        layer.to("cpu")
    assert_same(nf4_tensors(weight, dtype), nf4.state_dict())
    assert_same(int8_tensors(weight), int8.state_dict())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("decoder", "tied"), [("llama", False), ("mistral", True), ("qwen2", False)])
def test_the_checkpoint_is_what_from_pretrained_makes_of_the_model(
    tmp_path: Path, decoder: Any, tied: bool, bits: int
) -> None:
    text = {"tie_word_embeddings": tied}
    make_checkpoint(tmp_path / "checkpoint", decoder=decoder, text=text, dtype=torch.bfloat16, shards=2)
    checkpoint = Checkpoint.open(tmp_path / "checkpoint")
    spec = spec_from_config(checkpoint.config).decoder
    write_language_model(checkpoint, spec, bits, "cpu", (2,), tmp_path / "ours", lambda *_: None)
    expected, quantization = stock_state(tmp_path / "plain", decoder, text, bits)
    if tied:
        expected.pop("lm_head.weight")
    assert_same(load_file(tmp_path / "ours" / "model-00001-of-00001.safetensors"), expected)
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["quantization_config"] == json.loads(json.dumps(quantization))
    assert config["dtype"] == "bfloat16" and config["eos_token_id"] == [2]


def stock_state(folder: Path, decoder: Any, text: dict[str, Any], bits: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """State dict and quantization_config of the same language model, quantised by transformers while it loads."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    model = make_model("llava", decoder, text, dtype=torch.bfloat16)
    plain = AutoModelForCausalLM.from_config(model.config.text_config, dtype=torch.bfloat16)
    plain.model.load_state_dict(model.model.language_model.state_dict())
    plain.lm_head.load_state_dict(model.lm_head.state_dict())
    plain.save_pretrained(folder)
    options: dict[str, Any] = {"load_in_8bit": True}
    if bits == 4:
        options = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": torch.bfloat16,
        }
    quantization = BitsAndBytesConfig(**options, llm_int8_skip_modules=["lm_head"])
    stock = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, dtype=torch.bfloat16)
    return dict(stock.state_dict()), quantization.to_dict()


@pytest.mark.parametrize("bits", [4, 8])
def test_plain_transformers_loads_it_and_continues_as_the_model_does(tmp_path: Path, bits: int) -> None:
    from transformers import LlamaForCausalLM

    model = make_checkpoint(tmp_path / "checkpoint", decoder="llama")
    checkpoint = Checkpoint.open(tmp_path / "checkpoint")
    spec = spec_from_config(checkpoint.config).decoder
    write_language_model(checkpoint, spec, bits, "cpu", (2,), tmp_path / "ours", lambda *_: None)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "ours")
    kinds = {4: bitsandbytes.nn.Linear4bit, 8: bitsandbytes.nn.Linear8bitLt}
    quantised = {name for name, module in loaded.named_modules() if isinstance(module, kinds[bits])}
    assert len(quantised) == 7 * spec.layers and "lm_head" not in quantised
    ids = torch.tensor([[1, 40, 50, 60, 70]])
    with torch.inference_mode():
        expected = model.lm_head(model.model.language_model(ids).last_hidden_state)
        error = (loaded(ids).logits.float() - expected).norm() / expected.norm()
        assert error < (0.3 if bits == 4 else 0.05)
        assert loaded.generate(ids, max_new_tokens=3, do_sample=False).shape[1] <= 8


def test_layers_that_the_4_bit_kernels_do_not_take_are_refused(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "checkpoint", text={"intermediate_size": 200})
    spec = spec_from_config(Checkpoint.open(tmp_path / "checkpoint").config).decoder
    check_shapes(dataclasses.replace(spec, intermediate_size=256), 4)
    check_shapes(spec, 8)
    with pytest.raises(UnsupportedModelError, match=r"gate_proj is 200 x 128.*--bits 8"):
        check_shapes(spec, 4)
