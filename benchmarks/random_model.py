"""A random LLaVA-NeXT of a given shape, made on the device it will run on, with 16, 8 or 4 bits.

No checkpoint is read and no more than one decoder layer exists in 16 bits at a time, so that a 13B at 4 bits is there
in seconds and its peak while loading is close to its size. ``lm_head``, token table, tower and projector stay bf16, as
bitsandbytes leaves them in transformers.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    LlavaNextConfig,
    LlavaNextProcessor,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from benchmarks.make_checkpoint import llava_config
from vz_edge.backends.bitsandbytes_trial import OUTLIER_THRESHOLD
from vz_edge.recipe import ModelSpec

DTYPE = torch.bfloat16


def random_model(spec: ModelSpec, bits: int, device: str) -> Any:
    """A LlavaNextForConditionalGeneration in eval mode with transformers' fused attention.

    Layers of the decoder (a Llama's) are appended to a model that was made with none, each quantised at once.
    """
    config = LlavaNextConfig(**llava_config(spec))
    config.text_config.num_hidden_layers = 0
    with torch.device(device):
        model: Any = AutoModelForImageTextToText.from_config(config, dtype=DTYPE, attn_implementation="sdpa")
        decoder = model.model.language_model
        for index in range(spec.decoder.layers):
            layer = LlamaDecoderLayer(decoder.config, index).to(DTYPE)
            decoder.layers.append(layer if bits == 16 else _quantised(layer, bits))
    for found in (decoder.config, model.config.text_config):
        found.num_hidden_layers = spec.decoder.layers
    return model.requires_grad_(False).eval()


def stock_processor(spec: ModelSpec, folder: Path) -> Any:
    """The processor of a checkpoint of that shape, of which make_checkpoint.py wrote ``folder`` or its configs."""
    return LlavaNextProcessor(
        image_processor=LlavaNextImageProcessorPil.from_pretrained(folder),  # the other needs torchvision
        tokenizer=AutoTokenizer.from_pretrained(folder),
        patch_size=spec.tower.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def _quantised(layer: nn.Module, bits: int) -> nn.Module:
    """``layer`` with bitsandbytes' linear layers."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of LLM.int8()'s cast to fp16
    make = _nf4 if bits == 4 else _int8
    for name, module in list(layer.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, child = name.rpartition(".")
            setattr(layer.get_submodule(parent), child, make(module))
    return layer


def _nf4(linear: nn.Linear) -> nn.Module:
    """NF4 with double quantisation; moving the weight to its own device quantises it."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    options: dict[str, Any] = {"compress_statistics": True, "quant_type": "nf4"}
    layer = Linear4bit(
        linear.in_features, linear.out_features, bias=False, compute_dtype=DTYPE, device="meta", **options
    )
    weight = linear.weight
    layer.weight = Params4bit(weight.data, requires_grad=False, module=layer, **options).to(weight.device)
    return layer


def _int8(linear: nn.Linear) -> nn.Module:
    """LLM.int8(), which takes fp16; ``Int8Params.to`` would quantise only what comes from the processor's memory."""
    from bitsandbytes.functional import int8_vectorwise_quant
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    rows, scales, _ = int8_vectorwise_quant(linear.weight.data.half())
    layer = Linear8bitLt(
        linear.in_features,
        linear.out_features,
        bias=False,
        has_fp16_weights=False,
        threshold=OUTLIER_THRESHOLD,
        device="meta",
    )
    layer.weight = Int8Params(rows, requires_grad=False, has_fp16_weights=False, CB=rows, SCB=scales)
    return layer
