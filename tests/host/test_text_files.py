"""What ends an answer, which special tokens a template gets, and how the original code cuts text around pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import Tokenizer
from transformers import AutoTokenizer, GenerationConfig

from tests.tiny import make_checkpoint
from vz_edge.errors import CheckpointError, UnsupportedModelError
from vz_edge.host.opened import open_model
from vz_edge.host.text_files import (
    check_text_files,
    stop_ids,
    stop_spec,
    tokenizer_config,
    write_chat_template,
    write_tokenizer,
)

TEXT = "USER: What is this? A picture of a door and a ball. ASSISTANT: It is.\n"


def write(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_checkpoint(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": 5}, {"eos_token_id": 6, "text_config": {"eos_token_id": 2}}, {5}),
        ({"eos_token_id": [5, 9]}, {"text_config": {"eos_token_id": 2}}, {5, 9}),
        ({}, {"eos_token_id": 6, "text_config": {"eos_token_id": 2}}, {6}),
        ({"eos_token_id": None}, {"text_config": {"eos_token_id": [2, 4]}}, {2, 4}),
        ({}, {}, set()),
    ],
)
def test_the_first_eos_that_is_said_ends_an_answer(
    tmp_path: Path, generation: dict[str, Any], config: dict[str, Any], expected: set[int]
) -> None:
    write(tmp_path / "generation_config.json", generation)
    assert stop_ids(tmp_path, config) == expected
    if generation.get("eos_token_id"):
        theirs = GenerationConfig.from_pretrained(tmp_path).eos_token_id
        assert set(theirs if isinstance(theirs, list) else [theirs]) == expected


@pytest.mark.parametrize("value", ["</s>", 2.0, True, -1, [2, "x"], {"id": 2}], ids=repr)
def test_an_eos_that_is_no_id_is_refused(tmp_path: Path, value: Any) -> None:
    write(tmp_path / "generation_config.json", {"eos_token_id": value})
    with pytest.raises(CheckpointError, match=r"generation_config\.json: eos_token_id is "):
        stop_ids(tmp_path, {})


def test_stop_strings_of_a_checkpoint_end_an_answer(folder: Path) -> None:
    write(folder / "generation_config.json", {"eos_token_id": 2, "stop_strings": ["</s>", "\n\n", "<pad>"]})
    found = stop_spec(folder, {}, folder / "tokenizer.json", None)
    assert (found.token_ids, found.strings) == ((2, 3), ("\n\n",))
    write(folder / "generation_config.json", {"eos_token_id": 2, "stop_strings": 7})
    with pytest.raises(CheckpointError, match="stop_strings is 7"):
        stop_spec(folder, {}, folder / "tokenizer.json", None)


def test_special_tokens_that_only_the_older_file_has(folder: Path) -> None:
    names = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>"}
    write(folder / "special_tokens_map.json", names)
    write(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<pad>"})
    found = tokenizer_config(folder)
    assert (found["bos_token"], found["eos_token"]) == ("<s>", "<pad>")
    assert AutoTokenizer.from_pretrained(folder).bos_token == "<s>"


def test_an_image_token_of_another_name_is_refused_wherever_it_is_said(folder: Path) -> None:
    assert check_text_files(folder) == []
    config = json.loads((folder / "tokenizer_config.json").read_text())
    for said in ({"image_token": {"content": "<picture>"}}, {"extra_special_tokens": {"image_token": "<picture>"}}):
        write(folder / "tokenizer_config.json", config | said)
        with pytest.raises(UnsupportedModelError, match="image_token '<picture>'"):
            check_text_files(folder)
    write(folder / "tokenizer_config.json", config | {"extra_special_tokens": {"image_token": "<image>"}})
    assert check_text_files(folder) == []


def test_tokens_that_only_the_config_has_are_added_as_transformers_does(folder: Path, tmp_path: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["content"] == "<image>"]
    write(folder / "tokenizer.json", tokenizer)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    tokens = {"0": "<unk>", "1": "<s>", "2": "</s>", "3": "<pad>"}
    decoder = {token_id: {"content": content, **flags} for token_id, content in tokens.items()}
    write(folder / "tokenizer_config.json", config | {"added_tokens_decoder": decoder})
    write_tokenizer(folder, tmp_path, open_model(folder).model, is_original=False)
    found, theirs = Tokenizer.from_file(str(tmp_path / "tokenizer.json")), AutoTokenizer.from_pretrained(folder)
    for text in ("a</s>b", "<s>", "<image>\n<pad>"):
        assert found.encode(text).ids == theirs.encode(text)
    assert found.token_to_id("<image>") == 511
    write(folder / "tokenizer_config.json", config | {"added_tokens_decoder": {"x": "<s>"}})
    with pytest.raises(CheckpointError, match="added_tokens_decoder is malformed"):
        write_tokenizer(folder, tmp_path, open_model(folder).model, is_original=False)


def test_of_templates_by_name_the_default_is_taken(folder: Path, tmp_path: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    named = [{"name": "rag", "template": "<image> rag"}, {"name": "default", "template": "<image> default"}]
    write(folder / "tokenizer_config.json", {"chat_template": named})
    write_chat_template(folder, tmp_path, None)
    assert (tmp_path / "chat_template.jinja").read_text() == "<image> default"
    write(folder / "chat_template.json", {"chat_template": {"tool_use": "<image> tools", "default": "<image> first"}})
    write_chat_template(folder, tmp_path, None)
    assert (tmp_path / "chat_template.jinja").read_text() == "<image> first"


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small sentencepiece model as Llama's are."""
    folder = tmp_path_factory.mktemp("pieces")
    (folder / "text").write_text(TEXT * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "tokenizer"), vocab_size=300, model_type="bpe",
        byte_fallback=True, hard_vocab_limit=False, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
    )  # fmt: skip
    return folder / "tokenizer.model"


@pytest.mark.parametrize("with_json", [False, True])
@pytest.mark.parametrize(
    "text",
    [
        "USER: <image>\nWhat is this? ASSISTANT:",
        "<image>door",
        "USER: a <image> ball<image><image>\n\nWhat?",
        "USER: What<image>",
        "no picture",
    ],
)
def test_original_checkpoints_cut_the_text_between_pictures_on_its_own(
    tmp_path: Path, pieces: Path, text: str, with_json: bool
) -> None:
    """As tokenizer_image_token of the original code: each part begins as a text does, and BOS is there once."""
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(pieces))
    size = theirs.get_piece_size()
    folder = tmp_path / "model"
    make_checkpoint(folder, layout="original", text={"vocab_size": size + 1, "pad_token_id": 0})
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(pieces.read_bytes())
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    write(folder / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", "legacy": False, **names})
    if with_json:
        AutoTokenizer.from_pretrained(folder).backend_tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer.model").unlink()
    (tmp_path / "bundle").mkdir()
    write_tokenizer(folder, tmp_path / "bundle", open_model(folder).model, is_original=True)
    found = Tokenizer.from_file(str(tmp_path / "bundle/tokenizer.json")).encode(text).ids
    expected = [1]
    for number, part in enumerate(text.split("<image>")):
        expected += ([size] if number else []) + theirs.encode(part)
    assert found == expected


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({}, [1, 7]),
        ({"add_bos_token": False}, [7]),
        ({"add_eos_token": True}, [1, 7, 2]),
        ({"bos_token": None}, [1, 7]),
    ],
)
def test_original_llama_tokenizers_put_bos_in_front(tmp_path: Path, said: dict[str, Any], expected: list[int]) -> None:
    make_checkpoint(tmp_path / "model", layout="original")
    config = json.loads((tmp_path / "model/tokenizer_config.json").read_text())
    write(tmp_path / "model/tokenizer_config.json", config | {"tokenizer_class": "LlamaTokenizer"} | said)
    write_tokenizer(tmp_path / "model", tmp_path, open_model(tmp_path / "model").model, is_original=True)
    found = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert found.encode(found.decode([7])).ids == expected


def test_other_original_tokenizers_stay_as_they_are(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "model", layout="original")
    write_tokenizer(tmp_path / "model", tmp_path, open_model(tmp_path / "model").model, is_original=True)
    written = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    plain = Tokenizer.from_file(str(tmp_path / "model/tokenizer.json"))
    assert written.normalizer is None
    assert written.encode("a<image>\nb").ids == [*plain.encode("a").ids, 511, *plain.encode("\nb").ids]
