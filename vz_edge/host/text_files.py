"""The small files a bundle takes over from its checkpoint: tokenizer, chat template, picture settings.

Checkpoints keep a chat template in up to four places, some have only a sentencepiece tokenizer, and original
LLaVA ones have no image token at all. What goes into the bundle is always the same: ``tokenizer.json`` with
the image token at the model's own id, ``chat_template.jinja`` and ``preprocessor_config.json``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from vz_edge.bundle import ImageSpec, StopSpec
from vz_edge.device.prompt import render_template, special_tokens
from vz_edge.errors import CheckpointError, RequestError
from vz_edge.recipe import ModelSpec, PromptSpec

IMAGE_TOKEN = "<image>"
# CLIP's own statistics (arXiv 2103.00020), which every LLaVA checkpoint inherits.
CLIP_PREPROCESSING: dict[str, Any] = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "rescale_factor": 1 / 255,
    "resample": 3,
}


def write_tokenizer(folder: Path, out: Path, spec: ModelSpec) -> None:
    """Write tokenizer.json and tokenizer_config.json; the image token gets the id that the model expects.

    Raises CheckpointError where there is no tokenizer or another token sits at that id.
    """
    from tokenizers import AddedToken

    tokenizer = _load_tokenizer(folder)
    if tokenizer.token_to_id(IMAGE_TOKEN) is None:
        # An original LLaVA tokenizer has no image token; ids are given in order, so any gap before it is filled.
        gap = range(tokenizer.get_vocab_size(), spec.image_token_id)
        fillers = [AddedToken(f"<unused_{token_id}>", special=True, normalized=False) for token_id in gap]
        tokenizer.add_special_tokens([*fillers, AddedToken(IMAGE_TOKEN, special=True, normalized=False)])
    if tokenizer.token_to_id(IMAGE_TOKEN) != spec.image_token_id:
        raise CheckpointError(
            f"{folder}: the tokenizer has {IMAGE_TOKEN} at id {tokenizer.token_to_id(IMAGE_TOKEN)}, config.json "
            f"expects {spec.image_token_id}; take tokenizer and config from the same repository"
        )
    tokenizer.save(str(out / "tokenizer.json"))
    config = _read_json(folder / "tokenizer_config.json")
    config.pop("chat_template", None)  # it has a file of its own in the bundle
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_chat_template(folder: Path, out: Path, fallback: PromptSpec | None) -> None:
    """Write chat_template.jinja: the checkpoint's own if it places a picture, else the recipe's.

    A template inherited from the text-only model drops pictures, so each candidate is rendered first.
    """
    candidates = [*_templates(folder), *([fallback.template] if fallback else [])]
    probe = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]
    special = special_tokens(_read_json(folder / "tokenizer_config.json"))
    for template in candidates:
        try:
            rendered = render_template(template, probe, special)
        except RequestError:  # written for text alone
            continue
        if rendered.count(IMAGE_TOKEN) == 1:
            (out / "chat_template.jinja").write_text(template, encoding="utf-8")
            return
    raise CheckpointError(
        f"{folder} has no chat template that places one {IMAGE_TOKEN}, and no recipe has its shape; put a "
        "chat_template.jinja into the folder"
    )


def write_preprocessing(folder: Path, out: Path, mode: Literal["stock", "pad"]) -> ImageSpec:
    """Write preprocessor_config.json (CLIP's settings where the checkpoint has none) and return the part we use."""
    config = _read_json(folder / "preprocessor_config.json") or dict(CLIP_PREPROCESSING)
    (out / "preprocessor_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    values = {key: config.get(key, default) for key, default in CLIP_PREPROCESSING.items()}
    mean, std = tuple(map(float, values["image_mean"])), tuple(map(float, values["image_std"]))
    if len(mean) != 3 or len(std) != 3:
        raise CheckpointError(f"{folder}/preprocessor_config.json: image_mean and image_std must have 3 numbers each")
    return ImageSpec(mode, mean, std, float(values["rescale_factor"]), int(values["resample"]))


def stop_spec(folder: Path, config: dict[str, Any], tokenizer_file: Path, fallback: PromptSpec | None) -> StopSpec:
    """Token ids that end an answer (generation_config, config, the recipe's strings), and strings that are no token."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    ids: set[int] = set()
    text_config = config.get("text_config") or {}
    for value in (
        _read_json(folder / "generation_config.json").get("eos_token_id"),
        config.get("eos_token_id"),
        text_config.get("eos_token_id"),
        tokenizer.token_to_id(special_tokens(_read_json(folder / "tokenizer_config.json")).get("eos_token", "")),
    ):
        ids.update(value if isinstance(value, list) else [] if value is None else [value])
    strings = []
    for stop in fallback.stop if fallback else ():
        token_id = tokenizer.token_to_id(stop)
        if token_id is None:
            strings.append(stop)
        else:
            ids.add(token_id)
    if not ids and not strings:
        raise CheckpointError(
            f"{folder} does not say which token ends an answer (eos_token_id in generation_config.json)"
        )
    return StopSpec(tuple(sorted(ids)), tuple(strings))


def _load_tokenizer(folder: Path) -> Any:
    from tokenizers import Tokenizer

    try:
        if (folder / "tokenizer.json").is_file():
            return Tokenizer.from_file(str(folder / "tokenizer.json"))
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(folder, local_files_only=True).backend_tokenizer
    except Exception as error:  # tokenizers raises bare Exception
        raise CheckpointError(
            f"{folder} has no tokenizer that can be read ({str(error).splitlines()[0]}); expected tokenizer.json "
            "or tokenizer.model"
        ) from error


def _templates(folder: Path) -> list[str]:
    found: list[Any] = []
    if (folder / "chat_template.jinja").is_file():
        found.append((folder / "chat_template.jinja").read_text(encoding="utf-8"))
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        template = _read_json(folder / name).get("chat_template")
        found += [item.get("template") for item in template] if isinstance(template, list) else [template]
    return [template for template in found if isinstance(template, str)]


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}); download the file again") from error
    return data if isinstance(data, dict) else {}
