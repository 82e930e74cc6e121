"""From the model's reply to OpenAI's answer, whole or in chunks (server-sent events)."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from vz_edge.device.answer_text import Detokenizer
from vz_edge.device.reply import Reply
from vz_edge.serve.engine import Ticket
from vz_edge.serve.openai_api import (
    AnswerMessage,
    ChatChunk,
    ChatCompletion,
    Choice,
    ChunkChoice,
    FinishReason,
    Logprobs,
    PromptDetails,
    Timings,
    TokenLogprob,
    Usage,
)
from vz_edge.serve.problem import problem_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer

DONE = b"data: [DONE]\n\n"


def completion(reply: Reply, model_name: str, tokenizer: Tokenizer) -> ChatCompletion:
    """A whole answer."""
    choice = Choice(
        message=AnswerMessage(content=reply.text),
        logprobs=_logprobs(reply, tokenizer),
        finish_reason=_finish_reason(reply),
    )
    return ChatCompletion(
        id=_new_id(),
        created=int(time.time()),
        model=model_name,
        choices=[choice],
        usage=_usage(reply),
        timings=_timings(reply),
    )


async def events(
    first: str, rest: AsyncIterator[str], ticket: Ticket, model_name: str, tokenizer: Tokenizer, with_usage: bool
) -> AsyncIterator[bytes]:
    """An answer as server-sent events: the role, the text in pieces, the end, the usage if asked for, ``[DONE]``.

    ``first`` is the piece that came already, empty for an answer without text; ``rest`` are those to come.
    Log-probabilities are in the chunk that ends the answer. An error in the midst is an event with OpenAI's error
    body, and the last one.
    """
    head = ChatChunk(id=_new_id(), created=int(time.time()), model=model_name, choices=[])

    def chunk(choice: ChunkChoice) -> bytes:
        return _event(head.model_copy(update={"choices": [choice]}))

    yield chunk(ChunkChoice(delta={"role": "assistant", "content": ""}))
    try:
        if first:
            yield chunk(ChunkChoice(delta={"content": first}))
        async for piece in rest:
            yield chunk(ChunkChoice(delta={"content": piece}))
    except Exception as error:
        yield b"data: " + json.dumps(problem_of(error).body.model_dump()).encode() + b"\n\n"
        return
    reply = ticket.reply
    logprobs = _logprobs(reply, tokenizer)
    yield chunk(ChunkChoice(delta={}, logprobs=logprobs, finish_reason=_finish_reason(reply)))
    if with_usage:
        yield _event(head.model_copy(update={"usage": _usage(reply), "timings": _timings(reply)}))
    yield DONE


class EventStream(StreamingResponse):
    """Sends events and closes the ticket when the last is sent or the client has gone, whichever comes first."""

    def __init__(self, content: AsyncIterator[bytes], ticket: Ticket) -> None:
        super().__init__(content, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._ticket = ticket

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI calls it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._ticket.close()


def _event(chunk: ChatChunk) -> bytes:
    return b"data: " + chunk.model_dump_json().encode() + b"\n\n"


def _new_id() -> str:
    return f"chatcmpl-{secrets.token_hex(12)}"


def _finish_reason(reply: Reply) -> FinishReason:
    return "length" if reply.finish_reason == "length" else "stop"


def _usage(reply: Reply) -> Usage:
    prompt_tokens = reply.prompt_tokens + reply.image_tokens
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=reply.answer_tokens,
        total_tokens=prompt_tokens + reply.answer_tokens,
        prompt_tokens_details=PromptDetails(cached_tokens=reply.cached_tokens, image_tokens=reply.image_tokens),
    )


def _timings(reply: Reply) -> Timings:
    return Timings(
        preprocess_sec=reply.preprocess_sec,
        vision_sec=reply.vision_sec,
        prefill_sec=reply.prefill_sec,
        decode_sec=reply.decode_sec,
    )


def _logprobs(reply: Reply, tokenizer: Tokenizer) -> Logprobs | None:
    if reply.logprobs is None:
        return None
    text = Detokenizer(tokenizer)
    tokens = [text.push(token_id) for token_id in reply.token_ids]
    return Logprobs(
        content=[
            TokenLogprob(token=token, logprob=logprob, bytes=list(token.encode()) if token else None)
            for token, logprob in zip(tokens, reply.logprobs, strict=True)
        ]
    )
