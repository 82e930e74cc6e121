"""The decoder graph gives transformers' logits: prefill, decode, rewinding, every decoder and rotary variant."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from tests.tiny import make_checkpoint
from vz_edge.errors import TensorShapeError, UnsupportedModelError
from vz_edge.host.checkpoint import Checkpoint
from vz_edge.host.decoder_graph import DecoderQuant, build_decoder
from vz_edge.host.decoder_spec import decoder_spec
from vz_edge.host.head_padding import HeadPadding
from vz_edge.host.quant import QuantConfig, quantize
from vz_edge.host.quant.pack import dequantize
from vz_edge.host.weight import ALL_ROWS, Weight
from vz_edge.recipe import DecoderSpec

CAPACITY = 64
UNQUANTISED = DecoderQuant(linear=None, lm_head=None)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256, "beta_fast": 16.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}


class Decoder:
    """decoder.onnx with one shared buffer a layer for past and present, as the device binds them."""

    def __init__(self, path: Path, spec: DecoderSpec, dtype: type = np.float32) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.shape, self.dtype = (1, spec.kv_heads, CAPACITY, HeadPadding.of(spec).stored), dtype
        names = [value.name for value in self.session.get_inputs() if value.name.startswith("past")]
        zeros = np.zeros(self.shape, dtype)
        self.cache = {name: ort.OrtValue.ortvalue_from_numpy(zeros.copy()) for name in names}

    def __call__(self, embeds: torch.Tensor, past: int) -> torch.Tensor:
        """Logits [vocab] after ``embeds`` [1, n, hidden] that follow ``past`` tokens of the cache."""
        binding = self.session.io_binding()
        binding.bind_cpu_input("inputs_embeds", embeds.numpy().astype(self.dtype))
        binding.bind_cpu_input("attention_mask", np.ones((1, past + embeds.shape[1]), np.int64))
        binding.bind_output("logits")
        for name, value in self.cache.items():
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), value)
        self.session.run_with_iobinding(binding)
        return torch.from_numpy(binding.copy_outputs_to_cpu()[0])[0, 0]


def export(
    tmp_path: Path,
    decoder: Any = "llama",
    text: dict[str, Any] | None = None,
    weights: DecoderQuant = UNQUANTISED,
    precision: ir.DataType = ir.DataType.FLOAT,
    layers: int | None = None,
) -> tuple[torch.nn.Module, DecoderSpec, Path]:
    """A tiny model, its spec, and its decoder.onnx."""
    model: Any = make_checkpoint(tmp_path / "model", decoder=decoder, text=text)
    spec = decoder_spec(model.config.text_config, tie_word_embeddings=model.config.tie_word_embeddings)
    path = tmp_path / "decoder.onnx"
    build_decoder(Checkpoint.open(tmp_path / "model"), spec, precision, weights, layers).save(path, lambda *_: None)
    return model, spec, path


def torch_logits(model: Any, embeds: torch.Tensor) -> torch.Tensor:
    """Logits [n, vocab] of transformers."""
    with torch.no_grad():
        return model.lm_head(model.model.language_model(inputs_embeds=embeds).last_hidden_state)[0]


def embeddings(tokens: int, hidden: int = 128) -> torch.Tensor:
    return torch.randn(1, tokens, hidden, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("decoder", "text"),
    [
        ("llama", {}),
        (
            "llama",
            {"num_key_value_heads": 1, "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
        ),
        ("llama", {"attention_bias": True, "mlp_bias": True, "rope_parameters": {**LLAMA3, "rope_theta": 5e5}}),
        ("llama", {"tie_word_embeddings": True, "head_dim": 16, "hidden_size": 128}),
        ("llama", {"hidden_size": 48, "intermediate_size": 96}),
        ("llama", {"hidden_size": 200, "num_attention_heads": 2, "num_key_value_heads": 1}),  # heads of 100
        ("llama", {"hidden_size": 80, "rope_parameters": {**YARN, "rope_theta": 1e4}}),  # heads of 20
        ("llama", {"rope_parameters": {**YARN, "attention_factor": 0.7, "truncate": False, "rope_theta": 1e4}}),
        ("llama", {"sliding_window": 7}),  # which Llama's class does not read
        ("mistral", {}),
        ("mistral", {"sliding_window": 7}),
        ("qwen2", {"rms_norm_eps": 1e-6}),
    ],
)
def test_prefill_decode_and_rewind_give_transformers_logits(tmp_path: Path, decoder: str, text: dict[str, Any]) -> None:
    model, spec, path = export(tmp_path, decoder, text)
    embeds = embeddings(24, spec.hidden_size)
    expected = torch_logits(model, embeds)
    assert expected.std() > 0.3  # or the comparison would say little
    run = Decoder(path, spec)
    assert torch.allclose(run(embeds[:, :12], past=0), expected[11], atol=1e-3)
    for position in range(12, 16):
        assert torch.allclose(run(embeds[:, position : position + 1], past=position), expected[position], atol=1e-3)
    assert torch.allclose(run(embeds[:, 16:], past=16), expected[-1], atol=1e-3)
    rewound = torch.cat([embeds[:, :10], embeds[:, 20:23]], dim=1)
    assert torch.allclose(run(embeds[:, 20:23], past=10), torch_logits(model, rewound)[-1], atol=1e-3)


def some_squares() -> dict[str, torch.Tensor]:
    """Mean squares of what every layer of the tiny model reads, the same where layers read the same."""
    readers = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",))
    readers += (("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))
    squares = {"lm_head.weight": torch.rand(128) ** 4}
    for layer in range(2):
        for parts in readers:
            read = torch.rand(256 if parts == ("mlp.down_proj",) else 128) ** 4
            squares |= {f"language_model.layers.{layer}.{part}.weight": read for part in parts}
    return squares


@pytest.mark.parametrize(
    ("bits", "head_bits", "method"), [(4, 8, "rtn"), (8, 8, "rtn"), (4, None, "rtn"), (4, None, "weighted")]
)
def test_quantised_graph_equals_torch_with_the_dequantised_weights(
    tmp_path: Path, bits: Any, head_bits: int | None, method: Any
) -> None:
    linear = QuantConfig(bits, 32, method, accuracy_level=1)  # float32 products: the weights alone are inexact
    head = linear if head_bits is None else QuantConfig(8, block_size=32, accuracy_level=1)
    squares = some_squares()
    model, spec, path = export(tmp_path, "qwen2", weights=DecoderQuant(linear, head, squares))
    checkpoint = Checkpoint.open(tmp_path / "model")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if (known := name.removeprefix("model.")) in squares:
                quant = head if "lm_head" in name else linear
                weight = checkpoint.weight(known, tuple(parameter.shape))
                q = quantize(replace(weight, input_squares=squares[known]), quant)
                parameter.copy_(dequantize(q.packed, q.scales, q.zero_points, quant.bits, parameter.shape[1]))
    embeds = embeddings(9)
    expected = torch_logits(model, embeds)
    run = Decoder(path, spec)
    assert torch.allclose(run(embeds[:, :8], past=0), expected[7], atol=1e-3)
    assert torch.allclose(run(embeds[:, 8:], past=8), expected[8], atol=1e-3)


def test_padded_heads_keep_the_squares_of_their_inputs() -> None:
    values, squares = torch.randn(6, 24), torch.rand(24)
    padded = HeadPadding(12, 16).columns(Weight("o_proj.weight", (6, 24), lambda rows=ALL_ROWS: values[rows], squares))
    assert padded.input_squares is not None and padded.input_squares.shape == (32,)
    # A column and its square move together: the same columns count as much as before, and zeros not at all.
    assert torch.allclose((padded.load() ** 2) @ padded.input_squares, (values**2) @ squares)


def test_half_precision_graph_stays_close(tmp_path: Path) -> None:
    quant = QuantConfig(8, block_size=32)
    model, spec, path = export(tmp_path, "llama", {}, DecoderQuant(quant, quant), ir.DataType.FLOAT16)
    embeds = embeddings(9)
    expected = torch_logits(model, embeds)[-1]
    logits = Decoder(path, spec, np.float16)(embeds, past=0)
    assert logits.dtype == torch.float32
    assert torch.cosine_similarity(logits, expected, dim=0) > 0.999


def test_first_layers_alone_equal_a_shorter_model(tmp_path: Path) -> None:
    model, spec, path = export(tmp_path, layers=1)
    del model.model.language_model.layers[1:]
    embeds = embeddings(6)
    assert torch.allclose(Decoder(path, spec)(embeds, past=0), torch_logits(model, embeds)[-1], atol=1e-3)


def test_unsupported_rotary_variant_is_refused_with_the_supported_ones(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    with pytest.raises(UnsupportedModelError, match=r"'dynamic'.*default, linear, llama3"):
        export(tmp_path, text={"rope_parameters": rope})


def test_weights_that_do_not_fit_the_config_are_refused_before_any_is_read(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, text={"intermediate_size": 192})
    spec = DecoderSpec("llama", 128, 256, 2, 4, 4, 32, 512, 1024)
    with pytest.raises(TensorShapeError, match=r"gate_proj.weight has shape \[192, 128\], expected \[256, 128\]"):
        build_decoder(Checkpoint.open(tmp_path), spec, ir.DataType.FLOAT, UNQUANTISED)
