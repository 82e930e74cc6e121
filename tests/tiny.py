"""Tiny random checkpoints in every layout that exists, made with transformers' own classes.

    model = make_checkpoint(tmp_path / "model", family="llava_next", decoder="mistral", layout="old")

writes config, safetensors, tokenizer, chat template and processor configs, and returns the model that was
saved (float32, eval). The weights are large enough that attention, norms and biases all move the logits.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel

Family = Literal["llava", "llava_next"]
Decoder = Literal["llama", "mistral", "qwen2"]
Layout = Literal["new", "old", "saved", "original", "original_with_tower"]

VOCAB_SIZE = 512
IMAGE_TOKEN_ID = 511
TEXT = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
    "vocab_size": VOCAB_SIZE,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
KV_HEADS = {"llama": 4, "mistral": 2, "qwen2": 2}
VISION = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 84,
    "patch_size": 14,
}
TOWER_FOLDER = "clip-vit-large-patch14-336"
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}USER: {% else %}ASSISTANT: {% endif %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %} {% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
RENAMINGS: dict[str, tuple[tuple[str, str], ...]] = {  # from transformers' state_dict, first match wins
    "new": (("model.vision_tower.", "model.vision_tower.vision_model."),),
    "old": (
        ("lm_head.", "language_model.lm_head."),
        ("model.language_model.", "language_model.model."),
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.", ""),
    ),
    "original": (
        ("model.language_model.", "model."),
        ("model.vision_tower.", "model.vision_tower.vision_tower.vision_model."),
        ("model.multi_modal_projector.linear_1.", "model.mm_projector.0."),
        ("model.multi_modal_projector.linear_2.", "model.mm_projector.2."),
    ),
}


def make_checkpoint(
    folder: Path,
    family: Family = "llava",
    decoder: Decoder = "llama",
    layout: Layout = "new",
    *,
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    whole: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    shards: int = 1,
    seed: int = 0,
) -> torch.nn.Module:
    """Write a checkpoint and return its model.

    ``text`` and ``vision`` override the two configs, ``whole`` the one around them. Layout "saved" is what the
    installed transformers' save_pretrained writes. "original" puts the tower into a CLIP folder beside; the original
    layouts have no image token, in the vocabulary or the tokenizer.
    """
    original = layout.startswith("original")
    model = make_model(family, decoder, text, vision, dtype, seed, whole)
    folder.mkdir(parents=True, exist_ok=True)
    if layout == "saved":
        model.save_pretrained(folder)
    else:
        _write_renamed(model, folder, layout, shards)
        _write_json(folder / "config.json", _original_config(model) if original else model.config.to_dict())
    _write_tokenizer(folder, with_image=not original)
    _write_processor(folder, model)
    return model.float()


def make_model(
    family: Family = "llava",
    decoder: Decoder = "llama",
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    whole: dict[str, Any] | None = None,
) -> Any:
    """A random vision-language model of transformers in ``dtype``, in eval mode."""
    from transformers import AutoConfig, AutoModelForImageTextToText, CLIPVisionConfig

    vision_config = CLIPVisionConfig(**(VISION | (vision or {})))
    text_options = TEXT | {"num_key_value_heads": KV_HEADS[decoder]} | (text or {})
    options: dict[str, Any] = {
        "text_config": AutoConfig.for_model(decoder, **text_options),
        "vision_config": vision_config,
        "image_token_index": text_options["vocab_size"] - 1,
        "tie_word_embeddings": text_options.get("tie_word_embeddings", False),
    }
    if family == "llava_next":
        side = vision_config.image_size
        grids = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
        options["image_grid_pinpoints"] = [[rows * side, columns * side] for rows, columns in grids]
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(family, **options | (whole or {})))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _randomize(name, parameter, generator)
    return model.to(dtype).eval()


def _randomize(name: str, parameter: torch.Tensor, generator: torch.Generator) -> None:
    random = torch.randn(parameter.shape, generator=generator)
    if parameter.ndim == 1:
        is_scale = name.endswith("weight")  # of a norm
        parameter.copy_(random * 0.1 + (1 if is_scale else 0))
    else:
        parameter.copy_(random if "embed" in name else random * parameter[0].numel() ** -0.5)


def _write_renamed(model: Any, folder: Path, layout: str, shards: int) -> None:
    vocab_size = model.config.text_config.vocab_size
    base = layout.removesuffix("_with_tower")
    tensors, tower = {}, {}
    for key, value in model.state_dict().items():
        if base == "original" and value.shape[0] == vocab_size:
            value = value[: vocab_size - 1]
        if layout == "original" and key.startswith("model.vision_tower."):
            tower[key.replace("model.vision_tower.", "vision_model.")] = value.contiguous()
        else:
            tensors[_renamed(key, base)] = value.contiguous()
    if model.config.text_config.tie_word_embeddings:
        tensors = {key: value for key, value in tensors.items() if "lm_head" not in key}
    write_shards(folder, tensors, shards)
    if base == "original":
        tower_folder = folder.parent / TOWER_FOLDER
        tower_folder.mkdir(exist_ok=True)
        _write_json(tower_folder / "config.json", model.config.vision_config.to_dict())
        save_file(tower, tower_folder / "model.safetensors", metadata={"format": "pt"})


def write_shards(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 1) -> None:
    """Write safetensors: one file, or several with an index."""
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(tensors)
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[number::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    _write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def _renamed(key: str, layout: str) -> str:
    for prefix, replacement in RENAMINGS[layout]:
        if key.startswith(prefix):
            return replacement + key.removeprefix(prefix)
    return key


def _original_config(model: Any) -> dict[str, Any]:
    """What the original LLaVA code saves: the decoder's keys at the top, ``mm_*`` beside them."""
    config = model.config
    text = config.text_config.to_dict()
    parameters = text.pop("rope_parameters")
    side = config.vision_config.image_size
    grid = [[width, height] for height, width in getattr(config, "image_grid_pinpoints", ())]
    anyres = {"image_aspect_ratio": "anyres", "image_grid_pinpoints": grid, "mm_patch_merge_type": "spatial_unpad"}
    return {
        **text,
        "model_type": {"llama": "llava_llama", "mistral": "llava_mistral", "qwen2": "llava_qwen"}[text["model_type"]],
        "architectures": ["LlavaLlamaForCausalLM"],
        "rope_theta": parameters["rope_theta"],
        "vocab_size": text["vocab_size"] - 1,
        "mm_vision_tower": f"openai/{TOWER_FOLDER}",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": config.vision_config.hidden_size,
        "image_crop_resolution": side,
        **(anyres if grid else {"image_aspect_ratio": "pad"}),
    }


def _write_tokenizer(folder: Path, with_image: bool) -> None:
    """A byte-level tokenizer without merges: an id a byte."""
    specials = {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3} | ({"<image>": IMAGE_TOKEN_ID} if with_image else {})
    letters = {letter: 4 + number for number, letter in enumerate(sorted(ByteLevel.alphabet()))}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [{"id": number, "content": content, **flags} for content, number in specials.items()],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": specials | letters, "merges": []},
    }
    _write_json(folder / "tokenizer.json", tokenizer)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 1024, "chat_template": TEMPLATE}
    _write_json(folder / "tokenizer_config.json", config | names)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    _write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3})


def _write_processor(folder: Path, model: Any) -> None:
    config = model.config
    side = config.vision_config.image_size
    grid = getattr(config, "image_grid_pinpoints", None)
    preprocessing = {
        "image_processor_type": "LlavaNextImageProcessor" if grid else "CLIPImageProcessor",
        "size": {"shortest_edge": side},
        "crop_size": {"height": side, "width": side},
        "do_resize": True,
        "do_center_crop": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_convert_rgb": True,
        "rescale_factor": 1 / 255,
        "resample": 3,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        **({"image_grid_pinpoints": grid, "do_pad": True} if grid else {}),
    }
    _write_json(folder / "preprocessor_config.json", preprocessing)
    processor = {
        "processor_class": "LlavaNextProcessor" if grid else "LlavaProcessor",
        "patch_size": config.vision_config.patch_size,
        "image_token": "<image>",
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    }
    _write_json(folder / "processor_config.json", processor)


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=1), encoding="utf-8")
