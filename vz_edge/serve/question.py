"""From OpenAI's request to what the model is asked: messages, picture files and options."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from pydantic import ValidationError

from vz_edge.device.prompt import ChatPrompt, messages_of
from vz_edge.serve import remote
from vz_edge.serve.engine import Question
from vz_edge.serve.openai_api import (
    AssistantMessage,
    ChatRequest,
    ImagePart,
    JsonFormat,
    Message,
    RefusalPart,
    SchemaFormat,
    TextPart,
    Unsupported,
)
from vz_edge.serve.pictures import check_pixels, from_data_url
from vz_edge.serve.problem import Problem, invalid
from vz_edge.serve.settings import Settings

DEFAULT_NEW_TOKENS = 256
ANY_OBJECT = {"type": "object"}


class Link(NamedTuple):
    """A picture's URL and its place in the request."""

    url: str
    where: str


def parse(body: bytes, model_name: str, settings: Settings) -> ChatRequest:
    """Check a body against the API and the server's bounds. Raises Problem."""
    try:
        request = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        raise invalid(error, body, frozenset(Unsupported.model_fields)) from error
    if request.model != model_name:
        raise model_not_found(request.model, model_name)
    if request.max_tokens is not None and request.max_completion_tokens is not None:
        raise Problem(
            400, "invalid_value", "max_tokens and max_completion_tokens are the same; give one", "max_completion_tokens"
        )
    characters = sum(len(text) for message in request.messages for text in _texts(message))
    if characters > settings.max_prompt_chars:
        raise Problem(
            400,
            "string_above_max_length",
            f"the messages have {characters} characters, more than {settings.max_prompt_chars}; shorten them",
            "messages",
        )
    pictures = len(_links(request.messages))
    if pictures > settings.max_pictures:
        raise Problem(
            400, "too_many_images", f"{pictures} pictures were sent, more than {settings.max_pictures}", "messages"
        )
    return request


async def question_of(request: ChatRequest, context_length: int, settings: Settings) -> Question:
    """What the model is asked; the pictures are fetched where need be, and measured. Raises Problem."""
    files, left = [], settings.remote
    for link in _links(request.messages):
        if link.url[:5].lower() == "data:":
            files.append(await asyncio.to_thread(from_data_url, *link))
        elif left is None:
            raise Problem(
                400,
                "invalid_image_url",
                f"{link.where} is no data URL; send data:image/...;base64,... (this server fetches no pictures)",
                link.where,
            )
        else:
            files.append(await remote.fetch(link.url, left, link.where))
            left = replace(left, max_bytes=left.max_bytes - len(files[-1]))
    await asyncio.to_thread(check_pixels, files, settings.max_pixels, "messages")
    return Question(_messages(request, settings), files, _options(request, context_length))


def check_system(chat: ChatPrompt, system: str) -> None:
    """Raise RequestError where the chat template leaves the server's system prompt out."""
    question = {"role": "user", "content": "0"}
    chat.ids(messages_of([{"role": "system", "content": system}, question], pictures=0))


def model_not_found(asked: str, served: str) -> Problem:
    """The answer to who asks for another model."""
    return Problem(
        404, "model_not_found", f"the model {asked[:64]!r} is not here; this server has {served!r} alone", "model"
    )


def _options(request: ChatRequest, context_length: int) -> dict[str, Any]:
    """EdgeModel.stream's. Without a temperature answers are greedy, as everywhere in this package (OpenAI's: 1)."""
    options: dict[str, Any] = {
        "max_new_tokens": request.max_completion_tokens
        or request.max_tokens
        or min(DEFAULT_NEW_TOKENS, context_length // 4),
        "temperature": request.temperature or 0.0,
        "top_p": 1.0 if request.top_p is None else request.top_p,
        "seed": None if request.seed is None else request.seed % 2**64,  # numpy takes no negative ones
        "stop": [request.stop] if isinstance(request.stop, str) else request.stop or [],
        "logprobs": bool(request.logprobs),
    }
    if request.tokens is not None:
        options["tokens"] = request.tokens
    if isinstance(request.response_format, SchemaFormat):
        options["schema"] = request.response_format.json_schema.json_schema
    elif isinstance(request.response_format, JsonFormat):
        options["schema"] = ANY_OBJECT
    return options


def _messages(request: ChatRequest, settings: Settings) -> list[dict[str, Any]]:
    """Messages as EdgeModel takes them, with the server's system prompt where they bring none."""
    messages = [_plain(message) for message in request.messages]
    if settings.system and not any(message["role"] == "system" for message in messages):
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": settings.system}]})
    return messages


def _plain(message: Message) -> dict[str, Any]:
    """A message as EdgeModel takes it; the newer name of the system's role is one that chat templates do not know."""
    role = "system" if message.role == "developer" else message.role
    parts = [
        {"type": "image"} if isinstance(part, ImagePart) else {"type": "text", "text": _text(part)}
        for part in _parts(message)
    ]
    return {"role": role, "content": parts}


def _parts(message: Message) -> Sequence[TextPart | RefusalPart | ImagePart]:
    """What a message says, one part or more; an answer that was refused says so behind what else it says."""
    parts: list[TextPart | RefusalPart | ImagePart] = []
    if isinstance(message.content, str):
        parts.append(TextPart(type="text", text=message.content))
    elif message.content is not None:
        parts += message.content
    if isinstance(message, AssistantMessage) and message.refusal is not None:
        parts.append(RefusalPart(type="refusal", refusal=message.refusal))
    return parts or [TextPart(type="text", text="")]


def _text(part: TextPart | RefusalPart) -> str:
    return part.refusal if isinstance(part, RefusalPart) else part.text


def _texts(message: Message) -> list[str]:
    return [_text(part) for part in _parts(message) if not isinstance(part, ImagePart)]


def _links(messages: list[Message]) -> list[Link]:
    return [
        Link(part.url, f"messages.{i}.content.{k}.image_url" + ("" if isinstance(part.image_url, str) else ".url"))
        for i, message in enumerate(messages)
        for k, part in enumerate(_parts(message))
        if isinstance(part, ImagePart)
    ]
