"""The small files a bundle takes over from its checkpoint: tokenizer, chat template, what ends an answer.

Checkpoints keep a chat template in up to four places, some have only a sentencepiece tokenizer, and original
LLaVA ones have no image token at all. What goes into the bundle is always the same: ``tokenizer.json`` with
the image token at the model's own id, and ``chat_template.jinja``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vz_edge.bundle import StopSpec
from vz_edge.device.prompt import render_template, special_tokens
from vz_edge.errors import CheckpointError, RequestError
from vz_edge.host.checkpoint import read_json
from vz_edge.host.fields import check_fields
from vz_edge.recipe import ModelSpec, PromptSpec

IMAGE_TOKEN = "<image>"
SPACE = "\u2581"  # how sentencepiece writes a space, and what it puts in front of a text
# The place after a picture where words follow; never the token's own end, which would then be another token.
AFTER_PICTURE = rf"(?<={IMAGE_TOKEN})(?!\z|{IMAGE_TOKEN})"


def check_text_files(folder: Path) -> list[str]:
    """The fields of processor, tokenizer and generation config that no table has (``vz_edge.host.fields``).

    Raises UnsupportedModelError for a value that is refused, CheckpointError for one of a wrong type.
    """
    tokens = tokenizer_config(folder)
    extra = tokens.get("extra_special_tokens")
    named = special_tokens(extra if isinstance(extra, Mapping) else {}) | special_tokens(tokens)
    checked = tokens | {name: value for name, value in named.items() if name == "image_token"}
    stop_ids(folder, {})
    return [
        *check_fields("processor", _read_json(folder / "processor_config.json"), f"{folder}/processor_config.json"),
        *check_fields("tokenizer", checked, f"{folder}/tokenizer_config.json"),
        *check_fields("generation", _read_json(folder / "generation_config.json"), f"{folder}/generation_config.json"),
    ]


def write_tokenizer(folder: Path, out: Path, spec: ModelSpec, is_original: bool) -> None:
    """Write tokenizer.json and tokenizer_config.json; the image token gets the id that the model expects.

    Raises CheckpointError where there is no tokenizer or another token sits at that id.
    """
    from tokenizers import AddedToken

    tokenizer = _load_tokenizer(folder)
    _add_tokens(tokenizer, folder)
    if tokenizer.token_to_id(IMAGE_TOKEN) is None:
        # An original LLaVA tokenizer has no image token; ids are given in order, so any gap before it is filled.
        gap = range(tokenizer.get_vocab_size(), spec.image_token_id)
        fillers = [AddedToken(f"<unused_{token_id}>", special=True, normalized=False) for token_id in gap]
        tokenizer.add_special_tokens([*fillers, AddedToken(IMAGE_TOKEN, special=True, normalized=is_original)])
        if is_original:
            _begin_again_after_pictures(tokenizer)
    if tokenizer.token_to_id(IMAGE_TOKEN) != spec.image_token_id:
        raise CheckpointError(
            f"{folder}: the tokenizer has {IMAGE_TOKEN} at id {tokenizer.token_to_id(IMAGE_TOKEN)}, config.json "
            f"expects {spec.image_token_id}; take tokenizer and config from the same repository"
        )
    config = tokenizer_config(folder)
    if is_original and str(config.get("tokenizer_class")).removesuffix("Fast") == "LlamaTokenizer":
        _frame(tokenizer, config)
    tokenizer.save(str(out / "tokenizer.json"))
    config.pop("chat_template", None)  # it has a file of its own in the bundle
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def tokenizer_config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, with special tokens that it lacks from special_tokens_map.json. Raises CheckpointError."""
    named = special_tokens(_read_json(folder / "special_tokens_map.json"))
    return named | _read_json(folder / "tokenizer_config.json")


def _add_tokens(tokenizer: Any, folder: Path) -> None:
    """Add the control tokens that tokenizer_config.json (or added_tokens.json) has and tokenizer.json lacks.

    transformers adds them when it loads the two; a token keeps the id that the file gives it. Raises CheckpointError.
    """
    from tokenizers import AddedToken

    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    listed = {
        str(token_id): {"content": content} for content, token_id in _read_json(folder / "added_tokens.json").items()
    }
    decoder = _read_json(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}
    there = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    try:
        found = sorted((int(token_id), token["content"], token) for token_id, token in (listed | decoder).items())
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{folder}/tokenizer_config.json: added_tokens_decoder is malformed; expected tokens by their ids"
        ) from error
    for token_id, content, token in found:
        now = tokenizer.token_to_id(content)
        if content not in there and token_id == (tokenizer.get_vocab_size() if now is None else now):
            given = {flag: bool(token[flag]) for flag in flags if flag in token}
            tokenizer.add_tokens([AddedToken(content, **({"special": True, "normalized": False} | given))])


def _begin_again_after_pictures(tokenizer: Any) -> None:
    """Let a sentencepiece tokenizer put a space in front of the words behind a picture.

    The original code cuts each text between two pictures on its own (llava/mm_utils.py, tokenizer_image_token), so that
    each begins as a text does. Other tokenizers begin texts with nothing.
    """
    from tokenizers import Regex, normalizers

    def first_piece(text: str, at: int) -> str:
        return str(tokenizer.encode(text, add_special_tokens=False).tokens[at])

    if not first_piece("a", 0).startswith(SPACE) or first_piece(f"{IMAGE_TOKEN}a", 1).startswith(SPACE):
        return
    others = [] if tokenizer.normalizer is None else [tokenizer.normalizer]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(Regex(AFTER_PICTURE), SPACE), *others])


def _frame(tokenizer: Any, config: Mapping[str, Any]) -> None:
    """Put BOS in front of a prompt unless tokenizer_config.json says otherwise, as Llama's first tokenizer did.

    That is the one that the original code loads (``use_fast=False``); transformers 5 has it no more.
    """
    from tokenizers import processors

    special = special_tokens(config)
    bos, eos = special.get("bos_token", "<s>"), special.get("eos_token", "</s>")
    before = [bos] if config.get("add_bos_token") is not False and tokenizer.token_to_id(bos) is not None else []
    after = [eos] if config.get("add_eos_token") is True and tokenizer.token_to_id(eos) is not None else []
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in {*before, *after}],
    )


def write_chat_template(folder: Path, out: Path, fallback: PromptSpec | None) -> None:
    """Write chat_template.jinja: the checkpoint's own if it places a picture, else the recipe's.

    A template inherited from the text-only model drops pictures, so each candidate is rendered first.
    """
    candidates = [*_templates(folder), *([fallback.template] if fallback else [])]
    probe = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]
    special = special_tokens(tokenizer_config(folder))
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


def stop_spec(folder: Path, config: dict[str, Any], tokenizer_file: Path, fallback: PromptSpec | None) -> StopSpec:
    """Token ids that end an answer (the checkpoint's, the recipe's strings), and strings that are no token.

    Raises CheckpointError.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    ids = stop_ids(folder, config)
    eos_id = tokenizer.token_to_id(special_tokens(tokenizer_config(folder)).get("eos_token", ""))
    ids |= set() if eos_id is None else {eos_id}
    strings = []
    for stop in (*_stop_strings(folder), *(fallback.stop if fallback else ())):
        token_id = tokenizer.token_to_id(stop)
        if token_id is not None:
            ids.add(token_id)
        elif stop not in strings:
            strings.append(stop)
    if not ids and not strings:
        raise CheckpointError(
            f"{folder} does not say which token ends an answer (eos_token_id in generation_config.json)"
        )
    return StopSpec(tuple(sorted(ids)), tuple(strings))


def stop_ids(folder: Path, config: Mapping[str, Any]) -> set[int]:
    """The first ``eos_token_id`` there is: of generation_config.json, config.json, its text_config, as transformers.

    A config that was saved with its class's defaults says 2, which may be any word of a vocabulary. Raises
    CheckpointError.
    """
    generation = folder / "generation_config.json"
    for where, values in (
        (str(generation), _read_json(generation)),
        ("config.json", config),
        ("config.json: text_config", config.get("text_config") or {}),
    ):
        found = values.get("eos_token_id")
        ids = found if isinstance(found, list) else [] if found is None else [found]
        if not all(type(token_id) is int and token_id >= 0 for token_id in ids):
            raise CheckpointError(f"{where}: eos_token_id is {found!r}; expected a token's id, or a list of them")
        if ids:
            return set(ids)
    return set()


def _stop_strings(folder: Path) -> list[str]:
    found = _read_json(folder / "generation_config.json").get("stop_strings")
    strings = [found] if isinstance(found, str) else [] if found is None else found
    if not isinstance(strings, list) or not all(isinstance(text, str) and text for text in strings):
        raise CheckpointError(f"{folder}/generation_config.json: stop_strings is {found!r}; expected a list of texts")
    return strings


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
    """Every chat template, in the order in which transformers looks for them; of several by name the default first."""
    found: list[Any] = []
    if (folder / "chat_template.jinja").is_file():
        found.append((folder / "chat_template.jinja").read_text(encoding="utf-8"))
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        template = _read_json(folder / name).get("chat_template")
        if isinstance(template, list):
            template = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
        if isinstance(template, dict):
            found += [template[key] for key in sorted(template, key=lambda key: key != "default")]
        else:
            found.append(template)
    return [template for template in found if isinstance(template, str)]


def _read_json(path: Path) -> dict[str, Any]:
    """A file that need not be there. Raises CheckpointError."""
    return read_json(path) if path.is_file() else {}
