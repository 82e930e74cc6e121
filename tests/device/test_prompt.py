"""The same token ids as transformers' processors give, whatever the template does."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, processors

from tests.device import standin
from vz_edge.device.prompt import ChatPrompt, messages_of, render_template, special_tokens
from vz_edge.errors import CorruptBundleError, RequestError

VICUNA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# pictures first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
WITH_BOS = (
    "{{ bos_token }}\n{% for message in messages %}\n    {%- if loop.index > 9 %}{% break %}{% endif %}\n"
    "    {{- '<|' + message['role'] + '|>' }}\n    {%- for part in message['content'] %}\n"
    "        {%- if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] | tojson }}{% endif %}\n"
    "    {%- endfor %}{{ eos_token }}\n{% endfor %}\n{%- if add_generation_prompt %}<|assistant|>{% endif %}"
)
CHAT = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is <this>? Größe 語"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A house."}]},
    {"role": "user", "content": [{"type": "text", "text": "And behind  it?"}]},
]


def bytes_tokenizer() -> Tokenizer:
    return standin.byte_tokenizer()


def sentencepiece_tokenizer() -> Tokenizer:
    """As Llama's: a word-boundary mark in front, unknown characters as bytes."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *map(chr, range(97, 123)),
        "A:",
        "US",
        "ER",
    ]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", "<image>"])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def write(folder: Path, tokenizer: Tokenizer, template: str, config: dict[str, Any]) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    whole = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(whole))
    (folder / "chat_template.jinja").write_text(template)


def stock_ids(folder: Path, chat: list[dict], image_id: int) -> list[int]:
    """Ids from transformers' processor, with each run of image tokens put back to one."""
    from transformers import AutoTokenizer
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
    from transformers.models.llava.processing_llava import LlavaProcessor

    picture = {"type": "image", "image": Image.new("RGB", (40, 30))}
    chat = [
        {**message, "content": [picture if part["type"] == "image" else part for part in message["content"]]}
        for message in chat
    ]
    processor = LlavaProcessor(
        LlavaImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        AutoTokenizer.from_pretrained(folder),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=(folder / "chat_template.jinja").read_text(),
    )
    ids = processor.apply_chat_template(chat, tokenize=True, add_generation_prompt=True)
    ids = list(ids[0]) if isinstance(ids[0], list) else list(ids)
    assert ids.count(image_id) == 4  # 28 px of 14 px patches
    return [token_id for token_id, run in groupby(ids) for _ in ([0] if token_id == image_id else run)]


CONFIGS = [{}, {"add_bos_token": True}, {"add_bos_token": False}, {"bos_token": None}]
WITH_TOOLS = (
    "{% if documents is not none %}{{ documents | length }}{% endif %}{% for m in messages %}"
    "{% if tools is not none and m['role'] == 'user' %}[TOOLS]{% for tool in tools %}{{ tool }}{% endfor %}{% endif %}"
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}<image>\n{% else %}"
    "{{ part['text'] | tojson(sort_keys=True, separators=(',', ':')) }}{% endif %}{% endfor %}{% endfor %}"
)
TEMPLATES = [(standin.TEMPLATE, CONFIGS), (VICUNA, CONFIGS), (WITH_BOS, CONFIGS[:3]), (WITH_TOOLS, CONFIGS[:1])]


@pytest.mark.parametrize(("template", "config"), [(t, config) for t, configs in TEMPLATES for config in configs])
@pytest.mark.parametrize("make_tokenizer", [bytes_tokenizer, sentencepiece_tokenizer])
def test_ids_are_those_of_the_stock_processor(tmp_path: Path, make_tokenizer, template: str, config: dict) -> None:
    tokenizer = make_tokenizer()
    write(tmp_path, tokenizer, template, config)
    image_id = tokenizer.token_to_id("<image>")
    found = ChatPrompt.load(tmp_path, image_id).ids(messages_of(CHAT, pictures=1))
    assert found == stock_ids(tmp_path, CHAT, image_id)


def test_a_template_that_writes_bos_gets_no_second_one(tmp_path: Path) -> None:
    write(tmp_path, bytes_tokenizer(), WITH_BOS, {"add_bos_token": True})
    ids = ChatPrompt.load(tmp_path, standin.IMAGE_TOKEN_ID).ids(messages_of("hello", 1))
    assert ids.count(standin.BOS) == 1
    assert ids[0] == standin.BOS


def test_truncation_and_padding_saved_in_the_tokenizer_are_off(tmp_path: Path) -> None:
    tokenizer = bytes_tokenizer()
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=4000)
    write(tmp_path, tokenizer, standin.TEMPLATE, {})
    assert len(ChatPrompt.load(tmp_path, standin.IMAGE_TOKEN_ID).ids(messages_of("a" * 100, 1))) == 100 + len(
        "<USER: >\n ASSISTANT:"
    )


def test_pictures_go_in_front_of_the_first_user_message() -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Compare."}]
    messages = messages_of(chat, pictures=2)
    assert [part["type"] for part in messages[1]["content"]] == ["image", "image", "text"]
    assert messages[0]["content"] == [{"type": "text", "text": "Be brief."}]
    assert chat[1]["content"] == "Compare."  # the caller's messages stay as they were


def test_templates_see_plain_data_only(tmp_path: Path) -> None:
    picture = Image.new("RGB", (4, 4))
    messages = messages_of([{"role": "user", "content": [{"type": "image", "image": picture}], "extra": picture}], 1)
    assert messages == [{"role": "user", "content": [{"type": "image"}]}]
    for attack in ("{{ messages.__class__.__mro__ }}", "{{ ''.__class__.__base__.__subclasses__() }}"):
        with pytest.raises(RequestError, match="template"):
            render_template(attack, messages, {})


@pytest.mark.parametrize(
    "chat",
    [
        [],
        [{"role": "assistant", "content": "hello"}],
        [{"role": "user"}],
        [{"content": "no role"}],
        [{"role": "user", "content": [{"type": "video"}]}],
        [{"role": "user", "content": [{"type": "text", "text": 7}]}],
        [{"role": "user", "content": [{"type": "image"}, {"type": "image"}]}],
    ],
    ids=str,
)
def test_messages_that_are_no_question_are_refused(chat: list[dict]) -> None:
    with pytest.raises(RequestError):
        messages_of(chat, pictures=1)


def test_what_a_template_refuses_is_a_request_error() -> None:
    template = "{{ raise_exception('roles must take turns') }}"
    with pytest.raises(RequestError, match="roles must take turns"):
        render_template(template, messages_of("hello", 0), {})


def test_special_tokens_are_read_in_both_spellings() -> None:
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": None, "add_bos_token": True}
    assert special_tokens(config) == {"bos_token": "<s>", "eos_token": "</s>"}


def test_a_broken_tokenizer_is_a_corrupt_bundle(tmp_path: Path) -> None:
    write(tmp_path, bytes_tokenizer(), standin.TEMPLATE, {})
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CorruptBundleError):
        ChatPrompt.load(tmp_path, standin.IMAGE_TOKEN_ID)


def test_the_time_of_day_is_there_for_templates_that_ask() -> None:
    assert len(render_template("{{ strftime_now('%Y') }}", messages_of("hello", 0), {})) == 4


TYPED = ["What does <image> do?", "</s>", "<s><s>a</s>b", "<image>", "a<image>\nb </s> ", "<unk>", "\U000ffffe<image>"]


def plain_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """``text`` as a tokenizer cuts it that has no control tokens, but the same vocabulary."""
    data = json.loads(tokenizer.to_str())
    data["added_tokens"] = []
    return Tokenizer.from_str(json.dumps(data)).encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("typed", TYPED, ids=ascii)
@pytest.mark.parametrize("make_tokenizer", [bytes_tokenizer, sentencepiece_tokenizer])
def test_what_a_user_types_is_never_a_control_token(tmp_path: Path, make_tokenizer, typed: str) -> None:
    tokenizer = make_tokenizer()
    image_id = tokenizer.token_to_id("<image>")
    write(tmp_path, tokenizer, standin.TEMPLATE, {})
    chat = ChatPrompt.load(tmp_path, image_id)
    conversation = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": typed}]},
        {"role": "assistant", "content": typed},
        {"role": "user", "content": typed},
    ]
    ids = chat.ids(messages_of(conversation, pictures=1))
    for control in (image_id, tokenizer.token_to_id("<s>")):
        assert ids.count(control) == 1  # the picture's place, and BOS
    assert tokenizer.token_to_id("</s>") not in ids
    words = tokenizer.decode(ids, skip_special_tokens=True)
    assert words.count(typed.replace("\U000ffffe", "\ufffd")) == 3


@pytest.mark.parametrize("make_tokenizer", [bytes_tokenizer, sentencepiece_tokenizer])
def test_typed_controls_leave_the_rest_of_the_prompt_as_it_was(tmp_path: Path, make_tokenizer) -> None:
    """The tokenizer that knows control tokens by their mark cuts everything else as the plain one."""
    write(tmp_path, make_tokenizer(), VICUNA, {})
    chat = ChatPrompt.load(tmp_path, make_tokenizer().token_to_id("<image>"))
    ordinary, typed = (chat.ids(messages_of(f"Say {word} twice", pictures=1)) for word in ("xyz", "</s>"))
    before = chat.tokenizer.encode("USER: <image>\nSay ").ids
    assert ordinary[: len(before) - 1] == typed[: len(before) - 1]
    after = plain_ids(chat.tokenizer, " twice ASSISTANT:")[2:]
    assert ordinary[-len(after) :] == typed[-len(after) :] == after


def test_a_role_is_no_way_in_either(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m['role'] }}:{{ m['content'][0]['text'] }}{% endfor %}"
    write(tmp_path, bytes_tokenizer(), template, {})
    chat = ChatPrompt.load(tmp_path, standin.IMAGE_TOKEN_ID)
    ids = chat.ids(messages_of([{"role": "</s>", "content": "a"}, {"role": "user", "content": "b"}], 0))
    assert chat.tokenizer.decode(ids) == "</s>:auser:b"
    assert chat.tokenizer.token_to_id("</s>") not in ids


DROPS_SYSTEM = (
    "{% for m in messages if m['role'] in ('user', 'assistant') %}{{ m['content'][-1]['text'] }} {% endfor %}"
)


@pytest.mark.parametrize(("role", "what"), [("system", "a system prompt"), ("tool", "a message of the role 'tool'")])
def test_what_a_template_leaves_out_is_refused(tmp_path: Path, role: str, what: str) -> None:
    write(tmp_path, bytes_tokenizer(), DROPS_SYSTEM, {})
    chat = ChatPrompt.load(tmp_path, standin.IMAGE_TOKEN_ID)
    talk = [{"role": role, "content": "Be brief."}, {"role": "user", "content": "hello"}]
    with pytest.raises(RequestError, match=f"leaves {what} out; put its words in front of the questions"):
        chat.ids(messages_of(talk, 0))
    write(tmp_path, bytes_tokenizer(), "{{ messages[0]['content'][0]['text'] }}", {})
    assert ChatPrompt.load(tmp_path, standin.IMAGE_TOKEN_ID).ids(messages_of(talk, 0))
    empty = [{"role": role, "content": ""}, {"role": "user", "content": "hello"}]
    assert chat.ids(messages_of(empty, 0)) == chat.ids(messages_of("hello", 0))


@pytest.mark.parametrize(
    "template", ["{{ 1 / 0 }}", "{{ messages[0].content.nothing.at_all }}", "{{ '' | int('x') | tojson(9, 9, 9) }}"]
)
def test_whatever_a_template_trips_over_is_a_request_error(template: str) -> None:
    with pytest.raises(RequestError, match=r"chat template cannot write these messages down: .") as caught:
        render_template(template, messages_of("hello", 0), {})
    assert "\n" not in str(caught.value)
