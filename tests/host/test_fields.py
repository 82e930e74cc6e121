"""No field of a checkpoint's files is passed by in silence: each is read, refused by name, or known to be harmless."""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any

import pytest

from tests.host.test_families import ORIGINAL
from vz_edge.errors import CheckpointError, UnsupportedModelError
from vz_edge.host.families import spec_from_config, unknown_fields
from vz_edge.host.fields import TABLES, check_fields, positive, whole_number


def config_fields(name: str) -> set[str]:
    """What transformers' config class of that model type has, and what it writes."""
    from transformers import AutoConfig

    cls = type(AutoConfig.for_model(name))
    return {field.name for field in dataclasses.fields(cls)} | set(cls().to_dict()) | set(cls.attribute_map)


def image_processor_fields() -> set[str]:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    classes = (CLIPImageProcessorPil, LlavaImageProcessorPil, LlavaNextImageProcessorPil)
    return set().union(*(set(cls().to_dict()) | set(cls.valid_kwargs.__annotations__) for cls in classes))


def processor_fields() -> set[str]:
    from transformers import LlavaNextProcessor, LlavaProcessor

    found = set().union(*(inspect.signature(cls.__init__).parameters for cls in (LlavaProcessor, LlavaNextProcessor)))
    return (found - {"self", "kwargs"}) | {"processor_class"}


def generation_fields() -> set[str]:
    from transformers import GenerationConfig

    return set(vars(GenerationConfig())) | set(GenerationConfig().to_dict())


def tokenizer_fields() -> set[str]:
    from transformers import LlamaTokenizer, PreTrainedTokenizerBase

    given = set(inspect.signature(LlamaTokenizer.__init__).parameters) - {"self", "kwargs", "vocab", "merges"}
    return given | set(PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES) | {"chat_template", "tokenizer_class"}


SOURCES = {name: lambda name=name: config_fields(name) for name in ("llava", "llava_next", "clip_vision_model")}
SOURCES |= {name: lambda name=name: config_fields(name) for name in ("llama", "mistral", "qwen2")}
SOURCES |= {
    "image_processor": image_processor_fields,
    "processor": processor_fields,
    "generation": generation_fields,
    "tokenizer": tokenizer_fields,
}


@pytest.mark.parametrize("section", SOURCES)
def test_every_field_of_transformers_own_classes_is_in_a_table(section: str) -> None:
    missing = {name for name in SOURCES[section]() if name not in TABLES[section]}
    assert not missing


@pytest.mark.parametrize("section", TABLES)
def test_a_field_is_in_one_group_only(section: str) -> None:
    table = TABLES[section]
    groups = [set(table.read), set(table.refused), set(table.without_effect)]
    assert sum(map(len, groups)) == len(set().union(*groups))
    assert all(table.without_effect.values())


def other_than(allowed: tuple[Any, ...]) -> Any:
    return next(value for value in (True, 7, ["x"], "x") if value not in allowed)


@pytest.mark.parametrize(
    ("section", "name"), [(section, name) for section, table in TABLES.items() for name in table.refused]
)
def test_what_is_refused_is_refused_by_name(section: str, name: str) -> None:
    allowed = TABLES[section].refused[name]
    for value in (None, *allowed):
        assert check_fields(section, {name: value}, "file.json") == []
    value = other_than(allowed)
    with pytest.raises(UnsupportedModelError, match=re.escape(f"file.json: {name} {value!r} is not supported; ")):
        check_fields(section, {name: value}, "file.json")


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2"])
def test_a_saved_config_has_no_unknown_field(name: str) -> None:
    from transformers import AutoConfig

    for family in ("llava", "llava_next"):
        config = AutoConfig.for_model(family, text_config=AutoConfig.for_model(name))
        assert unknown_fields(config.to_dict()) == []


def test_unknown_fields_are_named_and_stop_nothing() -> None:
    config = {
        "model_type": "llava",
        "mine": 1,
        "text_config": {"model_type": "llama", "yours": 2},
        "vision_config": {"model_type": "clip_vision_model", "theirs": 3},
    }
    assert unknown_fields(config) == [
        "config.json: mine",
        "config.json: text_config: yours",
        "config.json: vision_config: theirs",
    ]
    spec_from_config(config)
    assert unknown_fields(ORIGINAL) == []
    assert unknown_fields(ORIGINAL | {"mm_novelty": 1}) == ["config.json: mm_novelty"]


@pytest.mark.parametrize("value", [None, "7", 7.0, True, 0, -1, [7]], ids=repr)
def test_a_number_of_another_type_is_refused_in_one_line(value: Any) -> None:
    with pytest.raises(CheckpointError, match=r"^config\.json: layers is .*expected a whole number from 1$"):
        whole_number("layers", value)
    if type(value) is not float:
        with pytest.raises(CheckpointError, match=r"^config\.json: eps is .*expected a number above 0$"):
            positive("eps", value)


TYPES: list[dict[str, Any]] = [
    {"text_config": "llama"},
    {"text_config": ["llama"]},
    {"vision_config": 7},
    {"text_config": {"rope_parameters": {"rope_type": "linear", "factor": "2", "rope_theta": 1e4}}},
    {"text_config": {"rope_theta": "much"}},
    {"text_config": {"rope_theta": -1.0}},
    {"text_config": {"rms_norm_eps": None}},
    {"text_config": {"num_hidden_layers": 0}},
    {"text_config": {"num_attention_heads": 32, "num_key_value_heads": 5}},
    {"text_config": {"head_dim": 33, "num_attention_heads": 32}},
    {"vision_config": {"image_size": [336, 336]}},
    {"vision_config": {"patch_size": "14"}},
    {"vision_config": {"patch_size": 500}},
    {"vision_config": {"model_type": ["clip_vision_model"]}},
    {"text_config": {"model_type": ["llama"]}},
    {"model_type": ["llava"]},
    {"image_token_index": -1},
    {"image_token_index": "32000"},
    {"model_type": "llava_next", "image_grid_pinpoints": 7},
    {"model_type": "llava_next", "image_grid_pinpoints": [[336]]},
    {"model_type": "llava_next", "image_grid_pinpoints": [["336", 672]]},
    ORIGINAL | {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad", "image_grid_pinpoints": "(1x"},
    ORIGINAL | {"hidden_size": "wide"},
]


@pytest.mark.parametrize("changes", TYPES, ids=lambda changes: str(changes)[:60])
def test_a_field_of_another_type_is_one_line_at_the_border(changes: dict[str, Any]) -> None:
    with pytest.raises((CheckpointError, UnsupportedModelError)) as caught:
        spec_from_config({"model_type": "llava"} | changes)
    assert "\n" not in str(caught.value)
