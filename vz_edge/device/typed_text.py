"""Words that look like control tokens: what a user types stays text.

A chat template writes control tokens (``<image>``, ``</s>``, ``<|im_end|>``) between the words of a conversation, and
a tokenizer cuts them out wherever they stand. A question about the HTML tag <image> would so ask for a second picture,
and an ``</s>`` in it would end the turn. Here the words go through the template with a stand-in for each such text, so
that afterwards the template's own tokens can be told from the words. A copy of the tokenizer, whose control tokens have
a mark in front that no text has, then cuts both at once: words and template are cut as always, borders included.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Two of Unicode's noncharacters, which no text may hold (Unicode 16, section 23.7). The mark stands in front of a
# control token, the stand-in around a control token's number.
MARK = "\U000ffffe"
STAND_IN = "\U000fffff"
REPLACEMENT = "\ufffd"


@dataclass(frozen=True)
class ControlTokens:
    """A tokenizer's control tokens, the longest first, and the tokenizer that knows them by their mark alone."""

    contents: tuple[str, ...]
    marked: Tokenizer

    @classmethod
    def of(cls, tokenizer: Tokenizer, contents: Sequence[str]) -> ControlTokens:
        """Copy ``tokenizer`` so that it takes ``contents`` for control tokens only behind a mark."""
        from tokenizers import Tokenizer

        data = json.loads(tokenizer.to_str())
        names = {content: MARK + content for content in contents}
        for token in data["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        data["normalizer"] = _renamed_within(data.get("normalizer"), names)
        model = data["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {names.get(token, token): token_id for token, token_id in model["vocab"].items()}
        else:  # Unigram: [token, score]
            model["vocab"] = [[names.get(token, token), score] for token, score in model["vocab"]]
        if model.get("unk_token") in names:
            model["unk_token"] = names[model["unk_token"]]
        longest_first = tuple(sorted(contents, key=len, reverse=True))
        return cls(longest_first, Tokenizer.from_str(json.dumps(data, ensure_ascii=False)))

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids of ``text``, in which stand-ins are words and control tokens are the template's."""
        marked = re.sub("|".join(map(re.escape, self.contents)), lambda found: MARK + found[0], text)
        words = re.sub(f"{STAND_IN}(\\d+){STAND_IN}", lambda found: self.contents[int(found[1])], marked)
        return self.marked.encode(words, add_special_tokens=add_special_tokens).ids


def control_contents(tokenizer: Tokenizer, image_token_id: int) -> tuple[str, ...]:
    """The texts that ``tokenizer`` takes for control tokens, the longest first."""
    added = tokenizer.get_added_tokens_decoder()
    found = {token.content for token_id, token in added.items() if token.special or token_id == image_token_id}
    return tuple(sorted(found, key=len, reverse=True))


def with_stand_ins(messages: Sequence[Mapping[str, Any]], contents: Sequence[str]) -> tuple[list[dict[str, Any]], bool]:
    """``messages`` (as ``messages_of`` makes them) with stand-ins for control tokens in their words; whether any is."""
    if not contents:
        return [dict(message) for message in messages], False
    pattern = re.compile("|".join(map(re.escape, contents)))
    numbers = {content: f"{STAND_IN}{number}{STAND_IN}" for number, content in enumerate(contents)}
    found = 0

    def hidden(text: str) -> str:
        nonlocal found
        clean = text.replace(MARK, REPLACEMENT).replace(STAND_IN, REPLACEMENT)
        replaced, count = pattern.subn(lambda match: numbers[match[0]], clean)
        found += count
        return replaced

    replaced = [
        {
            "role": hidden(message["role"]),
            "content": [
                part | {"text": hidden(part["text"])} if "text" in part else part for part in message["content"]
            ],
        }
        for message in messages
    ]
    return replaced, found > 0


def _renamed_within(value: Any, names: Mapping[str, str]) -> Any:
    """Every text of a normalizer's JSON with control tokens renamed: it may speak of them."""
    if isinstance(value, dict):
        return {key: _renamed_within(item, names) for key, item in value.items()}
    if isinstance(value, list):
        return [_renamed_within(item, names) for item in value]
    if isinstance(value, str):
        for content, name in names.items():
            value = value.replace(content, name)
    return value
