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
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vz_edge.arguments import shown
from vz_edge.arguments import text as checked_text
from vz_edge.device.prompt_trial import check_prompt_files
from vz_edge.device.typed_text import ControlTokens, control_contents, with_stand_ins
from vz_edge.errors import CorruptBundleError, RequestError

if TYPE_CHECKING:
    import jinja2
    from tokenizers import Tokenizer

Message = Mapping[str, Any]

MOST_CHARACTERS = 2**24  # that a template may write, or multiply a text to
MOST_BITS = 2**14  # of an integer that a template computes


@dataclass(frozen=True)
class ChatPrompt:
    """A bundle's chat template and tokenizer; ``special`` are the template's variables (``bos_token``...)."""

    template: str
    tokenizer: Tokenizer
    special: dict[str, str]
    image_token_id: int

    @classmethod
    def load(cls, folder: Path, image_token_id: int) -> ChatPrompt:
        """Read chat_template.jinja, tokenizer.json and tokenizer_config.json, once a trial of them went well.

        Both are run, and the folder may be a stranger's: see ``prompt_trial``. Raises CorruptBundleError.
        """
        check_prompt_files(folder, image_token_id)
        return cls.read(folder, image_token_id)

    @classmethod
    def read(cls, folder: Path, image_token_id: int) -> ChatPrompt:
        """As ``load``, without a trial."""
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
        """Token ids of the conversation (as ``messages_of`` makes it), up to where the answer starts.

        Words that look like a control token, as ``<image>`` and ``</s>`` do, stay words. Raises RequestError, also
        where the template leaves out what the model was to be told.
        """
        written, has_typed = with_stand_ins(messages, self._control_contents)
        text = render_template(self.template, written, self.special)
        self._check_complete(written, text)
        bos = self.special.get("bos_token")
        # A template that writes BOS itself must not get a second one from tokenizer.json's post-processor.
        writes_bos = bos is not None and text.startswith(bos)
        if has_typed:
            return self._control_tokens.encode(text, add_special_tokens=not writes_bos)
        return self.tokenizer.encode(text, add_special_tokens=not writes_bos).ids

    def _check_complete(self, messages: Sequence[Message], text: str) -> None:
        """Raise RequestError where ``text`` would be the same with other words in a system prompt or the like."""
        for index, message in enumerate(messages):
            if message["role"] in ("user", "assistant") or not any(part.get("text") for part in message["content"]):
                continue
            words = [{**part, "text": part["text"] + "0"} if "text" in part else part for part in message["content"]]
            other = {"role": message["role"], "content": words}
            try:
                changed = render_template(
                    self.template, [*messages[:index], other, *messages[index + 1 :]], self.special
                )
            except RequestError:  # the words matter to the template
                continue
            if changed == text:
                what = (
                    "a system prompt" if message["role"] == "system" else f"a message of the role {message['role']!r}"
                )
                raise RequestError(
                    f"the model's chat template leaves {what} out; put its words in front of the questions"
                )

    @cached_property
    def _control_contents(self) -> tuple[str, ...]:
        return control_contents(self.tokenizer, self.image_token_id)

    @cached_property
    def _control_tokens(self) -> ControlTokens:
        """Made when it is first needed: a large vocabulary takes a second to copy."""
        return ControlTokens.of(self.tokenizer, self._control_contents)


def messages_of(prompt: str | Sequence[Message], pictures: int) -> list[dict[str, Any]]:
    """Messages with the place of each picture marked.

    ``prompt`` is a question, or a conversation whose contents are strings or lists of ``{"type": "text", "text":
    ...}`` and ``{"type": "image"}``. Where it marks no picture, all go in front of the first user message. Raises
    RequestError.
    """
    if not isinstance(prompt, (str, list, tuple)):
        raise RequestError(
            f"a prompt {shown(prompt)} is not understood; expected a question as a string, or a list of messages"
        )
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
    try:
        # tools and documents as transformers has them where there are none: a template may ask "is not none".
        pieces = _compile(template).generate(
            messages=messages, tools=None, documents=None, add_generation_prompt=True, **special
        )
        return _bounded(pieces)
    except Exception as error:  # a template is code of the checkpoint's
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RequestError(f"the model's chat template cannot write these messages down: {reason}") from error


def _bounded(pieces: Iterator[str]) -> str:
    written, characters = list[str](), 0
    for piece in pieces:
        written.append(piece)
        characters += len(piece)
        if characters > MOST_CHARACTERS:
            raise ValueError(f"it writes more than {MOST_CHARACTERS} characters")
    return "".join(written)


def special_tokens(tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """The ``*_token`` strings of a tokenizer_config.json, as chat templates use them."""
    contents = {
        key: value.get("content") if isinstance(value, dict) else value for key, value in tokenizer_config.items()
    }
    return {key: value for key, value in contents.items() if key.endswith("_token") and isinstance(value, str)}


def _plain(message: object) -> dict[str, Any]:
    """A copy with nothing in it but what templates read: a template is the checkpoint's code, not ours."""
    role, content = (message.get("role"), message.get("content")) if isinstance(message, Mapping) else (None, None)
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(role, str) or not isinstance(parts, (list, tuple)):
        raise RequestError(f"message {shown(message)} is not understood; expected {{'role': ..., 'content': ...}}")
    return {"role": checked_text("a role", role), "content": [_plain_part(part) for part in parts]}


def _plain_part(part: object) -> dict[str, str]:
    kind, words = (part.get("type"), part.get("text")) if isinstance(part, Mapping) else (None, None)
    if isinstance(kind, str) and kind == "image":
        return {"type": "image"}
    if isinstance(kind, str) and kind == "text" and isinstance(words, str):
        return {"type": "text", "text": str(checked_text("the text of a message", words))}
    raise RequestError(
        f"content {shown(part)} is not understood; expected {{'type': 'text', 'text': ...}} or {{'type': 'image'}}"
    )


@lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    """Compile as transformers does: sandboxed, blocks trimmed, with the functions that templates on the hub call."""
    from jinja2.ext import Extension, loopcontrols
    from jinja2.nodes import Node
    from jinja2.parser import Parser
    from jinja2.runtime import Context
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationTag(Extension):
        """``{% generation %}`` marks the assistant's words for training; here its body is all that counts."""

        tags = {"generation"}  # noqa: RUF012 (jinja2's own protocol)

        def parse(self, parser: Parser) -> list[Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class BoundedEnvironment(ImmutableSandboxedEnvironment):
        """Two short operands can make a result that fills the memory; the sandbox bounds ``range`` alone."""

        intercepted_binops = frozenset({"*", "**", "%"})

        def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
            if _result_is_huge(operator, left, right):
                raise ValueError(f"the result of {operator} is too large")
            return super().call_binop(context, operator, left, right)

    environment = BoundedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


def _result_is_huge(operator: str, left: Any, right: Any) -> bool:
    if operator == "%":  # of a text: the width of a field
        return isinstance(left, str) and ("*" in left or re.search(r"[0-9]{6}", left) is not None)
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
        return bits > MOST_BITS
    lengths = [operand if isinstance(operand, int) else len(operand) for operand in (left, right) if _counts(operand)]
    return len(lengths) == 2 and lengths[0] * lengths[1] > MOST_CHARACTERS


def _counts(operand: Any) -> bool:
    return isinstance(operand, (int, str, list, tuple))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers' filter of that name; jinja2's own escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)
