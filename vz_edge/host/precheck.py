"""What looks like a checkpoint and is none that can be exported: adapters, and weights that are quantised already.

All of it is known from file names, configs and the headers of the shards, and is said before a weight is read, with
what to take instead.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vz_edge.errors import CheckpointError, UnsafeCheckpointError

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "non_lora_trainables.bin")
ADAPTER_TENSOR = re.compile(
    r"^base_model\.model\.|\.lora_|\.lora\.|\.base_layer\.|\.modules_to_save\.|\.original_module\.|\.ia3_l|\.hada_|\.oft_"
)
QUANTISED_FILES = ("*.gguf", "*.ggml", "quantize_config.json", "quant_config.json", "hf_quant_config.json", "*.engine")
QUANTISED_KEYS = ("quantization_config", "compression_config", "quantization")
QUANTISED_TENSOR = re.compile(
    r"\.(qweight|qzeros|g_idx|weight_packed|weight_scale|weight_scale_inv|input_scale|SCB|weight\.(absmax|quant_map)"
    r"|weight_format|W_q|codebooks|biases)$"
)
FLOATS = ("F64", "F32", "F16", "BF16")
INSTEAD = "take the 16-bit safetensors that it was quantised from: the export quantises by itself (--bits 4 or 8)"


def check_folder(folder: Path) -> None:
    """Raise CheckpointError for a folder of an adapter, or of weights that are quantised already."""
    for name in ADAPTER_FILES:
        if (folder / name).is_file():
            raise CheckpointError(_adapter_message(folder, name))
    if (folder / "mm_projector.bin").is_file() and not any(folder.glob("*.safetensors")):
        raise UnsafeCheckpointError(
            f"{folder} holds a projector alone (mm_projector.bin), a pickle; load it with its language model in "
            "LLaVA's own code and save the whole model with save_pretrained(NEW_FOLDER, safe_serialization=True)"
        )
    for pattern in QUANTISED_FILES:
        for path in sorted(folder.glob(pattern)):
            is_alone = path.suffix == ".json" or not any(folder.glob("*.safetensors"))
            if is_alone:
                raise CheckpointError(f"{folder} is quantised already ({path.name}); {INSTEAD}")


def check_config(config: Mapping[str, Any], folder: Path) -> None:
    """Raise CheckpointError where a config.json says that the weights are quantised already."""
    for section in (config, config.get("text_config"), config.get("vision_config")):
        for key in QUANTISED_KEYS:
            found = section.get(key) if isinstance(section, Mapping) else None
            method = _quant_method(found)
            if method:
                raise CheckpointError(f"{folder} is quantised already ({key} in config.json: {method}); {INSTEAD}")


def check_tensors(tensors: Iterable[tuple[str, str]], folder: Path) -> None:
    """``tensors`` are (name in the file, dtype). Raises CheckpointError where they are an adapter's, or quantised."""
    for name, dtype in tensors:
        if ADAPTER_TENSOR.search(name):
            raise CheckpointError(
                f"{folder} has tensors of a LoRA adapter or its wrapper ({name}); merge them first: load the model "
                "with PEFT, then merge_and_unload() and save_pretrained(NEW_FOLDER), and export that folder"
            )
        if QUANTISED_TENSOR.search(name) or (name.endswith(".weight") and dtype not in FLOATS):
            raise CheckpointError(f"{folder} is quantised already ({name} has dtype {dtype}); {INSTEAD}")


def _adapter_message(folder: Path, name: str) -> str:
    base = _base_of(folder / "adapter_config.json")
    if (folder / "non_lora_trainables.bin").is_file():
        return (
            f"{folder} holds a LoRA adapter of LLaVA's own code ({name}); merge it into its base model{base} first, "
            "with LLaVA's scripts/merge_lora_weights.py, and export the merged folder, saved as safetensors"
        )
    beside = any((folder / file).is_file() for file in ("model.safetensors", "model.safetensors.index.json"))
    return (
        f"{folder} holds a LoRA adapter ({name}){' beside a checkpoint' if beside else ''}; merge it into its base "
        f"model{base} first (PEFT: PeftModel.from_pretrained(base, folder).merge_and_unload().save_pretrained("
        f"NEW_FOLDER)) and export NEW_FOLDER{', or move the adapter out of the folder' if beside else ''}"
    )


def _base_of(adapter_config: Path) -> str:
    try:
        base = json.loads(adapter_config.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        return ""
    return f" {base}" if isinstance(base, str) and base else ""


def _quant_method(found: Any) -> str | None:
    """The name of the method in a ``quantization_config``; None where it says that nothing is quantised."""
    if not found:
        return None
    if not isinstance(found, Mapping):
        return repr(found)
    loaded = [found.get(key) for key in ("load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit")]
    if any(loaded):
        return "bitsandbytes"
    if str(found.get("quant_method", "bitsandbytes")) == "bitsandbytes" and False in loaded:
        return None
    return str(found.get("quant_method") or found.get("quant_type") or found.get("format") or "without a name")
