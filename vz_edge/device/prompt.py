"""From messages to token ids, with one image token where each picture goes.

A chat template (Jinja, ``chat_template.jinja``) writes the messages down as the model was trained to see them,
``tokenizer.json`` cuts the text into tokens. The picture's own tokens are no text: its place is held by one
image token, and ``EdgeModel`` puts the picture's features there.

>>> prompt = ChatPrompt.load(folder, image_token_id=32000)
>>> prompt.ids(messages_of("What is this?", pictures=1))
[1, 3148, 1001, 29901, 29871, 32000, 29871, 13, 5618, ...]
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vz_edge.errors import CorruptBundleError, RequestError

if TYPE_CHECKING:
    import jinja2
    from tokenizers import Tokenizer

Message = Mapping[str, Any]


@dataclass(frozen=True)
class ChatPrompt:
    """A bundle's chat template and tokenizer; ``special`` are the template's variables (``bos_token``...)."""

    template: str
    tokenizer: Tokenizer
    special: dict[str, str]
    image_token_id: int

    @classmethod
    def load(cls, folder: Path, image_token_id: int) -> ChatPrompt:
        """Read chat_template.jinja, tokenizer.json and tokenizer_config.json. Raises CorruptBundleError."""
        from tokenizers import Tokenizer

        try:
            template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
            config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # tokenizers raises bare Exception
            raise CorruptBundleError(
                f"{folder}: tokenizer or chat template cannot be read ({error}); export the bundle again"
            ) from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return cls(template, tokenizer, special_tokens(config), image_token_id)

    def ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of the conversation, up to where the answer starts. Raises RequestError."""
        text = render_template(self.template, messages, self.special)
        bos = self.special.get("bos_token")
        # A template that writes BOS itself must not get a second one from tokenizer.json's post-processor.
        writes_bos = bos is not None and text.startswith(bos)
        return self.tokenizer.encode(text, add_special_tokens=not writes_bos).ids


def messages_of(prompt: str | Sequence[Message], pictures: int) -> list[dict[str, Any]]:
    """Messages with the place of each picture marked.

    ``prompt`` is a question, or a conversation whose contents are strings or lists of ``{"type": "text", "text":
    ...}`` and ``{"type": "image"}``. Where it marks no picture, all go in front of the first user message. Raises
    RequestError.
    """
    messages = [
        _plain(message) for message in ([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt)
    ]
    if not any(message["role"] == "user" for message in messages):
        raise RequestError("the conversation has no message of the role 'user'; expected a question to answer")
    marked = sum(part["type"] == "image" for message in messages for part in message["content"])
    if not marked:
        first = next(message for message in messages if message["role"] == "user")
        first["content"][:0] = [{"type": "image"}] * pictures
    elif marked != pictures:
        raise RequestError(
            f"the messages mark {marked} picture(s), {pictures} were given; give one picture for each mark"
        )
    return messages


def render_template(template: str, messages: Sequence[Message], special: Mapping[str, str]) -> str:
    """Write the conversation down, ready for the answer. Raises RequestError where the template refuses it."""
    import jinja2

    try:
        return _compile(template).render(messages=messages, add_generation_prompt=True, **special)
    except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
        raise RequestError(f"the model's chat template cannot write these messages down: {error}") from error


def special_tokens(tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """The ``*_token`` strings of a tokenizer_config.json, as chat templates use them."""
    contents = {
        key: value.get("content") if isinstance(value, dict) else value for key, value in tokenizer_config.items()
    }
    return {key: value for key, value in contents.items() if key.endswith("_token") and isinstance(value, str)}


def _plain(message: Message) -> dict[str, Any]:
    """A copy with nothing in it but what templates read: a template is the checkpoint's code, not ours."""
    role, content = message.get("role"), message.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(role, str) or not isinstance(parts, Sequence):
        raise RequestError(f"message {message!r} is not understood; expected {{'role': ..., 'content': ...}}")
    return {"role": role, "content": [_plain_part(part) for part in parts]}


def _plain_part(part: Any) -> dict[str, str]:
    if isinstance(part, Mapping) and part.get("type") == "image":
        return {"type": "image"}
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": str(part["text"])}
    raise RequestError(
        f"content {part!r} is not understood; expected {{'type': 'text', 'text': ...}} or {{'type': 'image'}}"
    )


@lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    """Compile as transformers does: sandboxed, blocks trimmed, with the functions that templates on the hub call."""
    from jinja2.ext import Extension, loopcontrols
    from jinja2.nodes import Node
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationTag(Extension):
        """``{% generation %}`` marks the assistant's words for training; here its body is all that counts."""

        tags = {"generation"}  # noqa: RUF012 (jinja2's own protocol)

        def parse(self, parser: Parser) -> list[Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)  # jinja2's own escapes HTML


def _raise_exception(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)
