"""Session: a picture is looked at once and asked about many times.

>>> session = model.session(system="Answer in one word.")
>>> for frame in camera:
...     session.look(frame)  # through the vision graph and into the KV cache, in the old frame's place
...     door, person = session.ask("Is the door open?"), session.ask("Is anyone there?")

Which tokens of a picture are kept does not depend on the question (VisionZip's selection sees the picture alone,
arXiv 2412.04467), so what was read once serves every question.

The KV cache is only ever a memory of what was read: each prompt is written down whole by the chat template and cut
into token ids, and the cache is rewound to the longest start that it has in common with what it holds. Ids are
compared, not strings, because a tokenizer may merge the end of one part with the beginning of the next; and nothing
is assumed about the template, so one that rewrites history costs time, never a wrong answer.
"""

from __future__ import annotations

import copy
import logging
import time
import weakref
from collections.abc import Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from vz_edge.arguments import flag, whole
from vz_edge.arguments import text as checked_text
from vz_edge.device.closed import CLOSED_SESSION
from vz_edge.device.image import ImageSource
from vz_edge.device.options import AskOptions
from vz_edge.device.pipeline import CheckedQuestion, Picture, Pipeline, Spent, common_start
from vz_edge.device.prefix_cache import Item, Prefix, common_length, token_count
from vz_edge.device.prompt import Message, messages_of
from vz_edge.device.reply import Reply, Stream
from vz_edge.device.vision import VisionResult

if TYPE_CHECKING:
    from typing_extensions import Unpack

IMAGE = {"type": "image"}
# Two questions that begin differently: what the prompts with them have in common comes before any question.
PROBES = ("0", "What")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Look:
    """What ``Session.look`` took in, and the seconds that it took; ``prefill_sec`` is the decoder's part."""

    picture: VisionResult
    preprocess_sec: float
    vision_sec: float
    prefill_sec: float

    @property
    def image_tokens(self) -> int:
        """Tokens of this picture."""
        return len(self.picture.features)


@dataclass(frozen=True)
class _Conversation:
    """Messages and the pictures that they mark. A last message of the user's is open: it waits for its question."""

    messages: tuple[Message, ...] = ()
    pictures: tuple[Picture, ...] = ()

    def shown(self, picture: Picture) -> _Conversation:
        return _Conversation(_with_part(self.messages, IMAGE), (*self.pictures, picture))

    def asked(self, question: str) -> _Conversation:
        return replace(self, messages=_with_part(self.messages, {"type": "text", "text": question}))

    def answered(self, text: str) -> _Conversation:
        return replace(self, messages=(*self.messages, _message("assistant", text)))

    def before_last_picture(self) -> _Conversation:
        """Back to before the last picture was shown; what was said about it goes with it."""
        if not self.pictures:
            return self
        place = max(index for index, message in enumerate(self.messages) if IMAGE in message["content"])
        others = [part for part in self.messages[place]["content"] if part == IMAGE][:-1]
        open_message = ({"role": "user", "content": others},) if others else ()
        return _Conversation((*self.messages[:place], *open_message), self.pictures[:-1])


class Session:
    """One conversation's KV cache. Made by ``EdgeModel.session``; for one thread at a time.

    ``context_length`` is the most tokens that the conversation with its pictures, a question and its answer may
    have. The cache is of that length from the start: ``model.decoder.cache_bytes_per_token`` bytes a token, on the
    CPU only for those that were read. An error, or a stream that is not read to its end, leaves the session as it was.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        system: str | None = None,
        max_context: int | None = None,
        siblings: weakref.WeakSet[Any] | None = None,
    ) -> None:
        """As ``EdgeModel.session``, which is the way to make one; it closes ``siblings`` with the model."""
        max_context = None if max_context is None else whole("max_context", max_context, 1)
        system = None if system is None else checked_text("system", system)
        self.context_length = min(pipeline.context_length, max_context or pipeline.context_length)
        self._pipeline = replace(pipeline, context_length=self.context_length)
        self._open: Generator[str, None, Reply] | None = None
        conversation = _begun(system)
        self._check(conversation)
        self._prefix = Prefix(pipeline.decoder.start(self.context_length))
        self._conversation = conversation
        self._start: list[Item] | None = None  # what all its prompts begin with; None until it is needed
        self._turn_to(conversation)
        self._siblings = weakref.WeakSet[Any]() if siblings is None else siblings
        self._siblings.add(self)

    def close(self) -> None:
        """Give back the KV cache. Whatever is asked of the session afterwards raises a RequestError."""
        with suppress(ValueError):  # another thread is just generating: its answer ends with that error
            self._end_stream()
        self._pipeline = self._prefix = CLOSED_SESSION
        self._start, self._conversation = None, _Conversation()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        if self._pipeline is CLOSED_SESSION:
            return "<Session: closed>"
        turns = sum(message["role"] == "assistant" for message in self._conversation.messages)
        pictures, read = len(self._conversation.pictures), self._prefix.context.length
        return f"<Session: {pictures} picture(s), {turns} turn(s), {read} of {self.context_length} tokens read>"

    def look(self, image: ImageSource | VisionResult, *, add: bool = False, tokens: int | None = None) -> Look:
        """Take in a picture: encode it, and read the prompt up to and including it.

        The picture replaces the last one, and the turns that were kept since then go with that one; with ``add`` it
        comes after all that there is, in front of the next question. ``image`` and ``tokens`` are as in
        ``EdgeModel.ask``; what ``encode`` returned is not encoded again. Raises ImageError, BudgetError, RequestError,
        and ContextLengthError before the picture is encoded where no question about it would fit.
        """
        self._end_stream()
        before = self._conversation if flag("add", add) else self._conversation.before_last_picture()
        conversation = before.shown(image)
        question = self._check(conversation, tokens)
        pictures, vision_sec = self._pipeline.look(question)
        started = time.perf_counter()
        self._turn_to(replace(conversation, pictures=tuple(pictures)))
        return Look(pictures[-1], question.preprocess_sec, vision_sec, time.perf_counter() - started)

    def restart(
        self, images: Sequence[Picture] = (), *, system: str | None = None, tokens: int | None = None
    ) -> list[VisionResult]:
        """Forget the conversation and its pictures, and begin another one with ``system`` and about ``images``.

        What both begin with stays in the KV cache, so forgetting the turns alone costs nothing. Returns the encoded
        pictures, which may be given again. ``images`` and ``tokens`` are as in ``look``; raises as ``look`` does, and
        RequestError where the chat template has no place for ``system``.
        """
        self._end_stream()
        conversation = _begun(system)
        for image in images:
            conversation = conversation.shown(image)
        pictures, _ = self._pipeline.look(self._check(conversation, tokens))
        self._turn_to(replace(conversation, pictures=tuple(pictures)))
        return pictures

    def ask(self, question: str, *, keep: bool = False, **options: Unpack[AskOptions]) -> Reply:
        """Answer a question about what was looked at, as ``EdgeModel.ask`` would with the whole conversation.

        Then question and answer are forgotten, and the KV cache goes back to just after the picture; with ``keep``
        they become a turn of the conversation. ``cached_tokens`` of the reply did not have to be read again. Raises
        RequestError, and ContextLengthError before anything is read.
        """
        return self.stream(question, keep=keep, **options).reply

    def stream(self, question: str, *, keep: bool = False, **options: Unpack[AskOptions]) -> Stream:
        """As ``ask``, but the text comes in pieces while it is written.

        A stream ends when the session is used for something else, and a turn is kept only if it was read to its end.
        """
        self._end_stream()
        keep = flag("keep", keep)
        asked = self._conversation.asked(checked_text("the question", question))
        checked = self._pipeline.questions(asked.pictures, [asked.messages], **options)[0]
        self._open = self._answer(checked, asked if keep else None)
        return Stream(self._open)

    def fork(self) -> Session:
        """An independent session with the same past, for another thread or another course of the conversation.

        Copies the part of the KV cache that is in use, ``cache_bytes_per_token`` bytes a token, and reads nothing
        again; on CUDA the whole cache, by way of the host's memory.
        """
        self._end_stream()
        branch = copy.copy(self)
        branch._prefix = self._prefix.fork()
        self._siblings.add(branch)
        return branch

    def _answer(self, question: CheckedQuestion, kept: _Conversation | None) -> Generator[str, None, Reply]:
        """Answer a question; ``kept`` is the conversation with it where it is to become a turn."""
        pictures = [picture for picture in question.pictures if isinstance(picture, VisionResult)]
        items = self._pipeline.items(question.ids, pictures)
        if self._start is None:
            self._start = self._start_of(self._conversation)
        after = items[: common_length(self._start, items)]
        common = self._prefix.rewind_to_common(items[:-1])  # the last one is always read: it gives the logits
        context = self._prefix.context
        try:
            spent = Spent(cached_tokens=context.length)
            reply = yield from self._pipeline.answer(context, question, common, pictures, spent)
            if kept is not None:
                # The last token of an answer is chosen, never read.
                after = [*items, *reply.token_ids[: context.length - token_count(items)]]
                self._conversation, self._start = kept.answered(reply.text), None
        finally:
            self._prefix.hold(after)
        return reply

    def _turn_to(self, conversation: _Conversation) -> None:
        """Read what every question of ``conversation`` begins with, then make it the session's."""
        start = self._start_of(conversation)
        common = self._prefix.rewind_to_common(start)
        if common < len(start):
            embeds = self._embed(start[common:])
            logger.info("reading %d tokens, %d are in the KV cache", len(embeds), self._prefix.context.length)
            self._prefix.context.append(embeds)
        self._prefix.hold(start)
        self._conversation, self._start = conversation, start

    def _end_stream(self) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None

    def _check(self, conversation: _Conversation, tokens: int | None = None) -> CheckedQuestion:
        """Raise unless a short question with an answer of one token would fit; its pictures are tiled."""
        asked = conversation.asked(PROBES[0])
        return self._pipeline.questions(asked.pictures, [asked.messages], tokens, max_new_tokens=1)[0]

    def _start_of(self, conversation: _Conversation) -> list[Item]:
        """What all prompts of ``conversation``, whose pictures are encoded, begin with."""
        pictures = [picture for picture in conversation.pictures if isinstance(picture, VisionResult)]
        ids = common_start([self._ids(conversation.asked(probe)) for probe in PROBES])
        return self._pipeline.items(ids, pictures)

    def _ids(self, conversation: _Conversation) -> list[int]:
        return self._pipeline.chat.ids(messages_of(conversation.messages, len(conversation.pictures)))

    def _embed(self, items: Sequence[Item]) -> np.ndarray:
        pictures = [item for item in items if isinstance(item, VisionResult)]
        image_token_id = self._pipeline.chat.image_token_id
        ids = [image_token_id if isinstance(item, VisionResult) else item for item in items]
        return self._pipeline.embed(ids, pictures)


def _begun(system: str | None) -> _Conversation:
    """A conversation in which nothing but ``system`` was said."""
    return _Conversation((_message("system", system),)) if system else _Conversation()


def _message(role: str, text: str) -> Message:
    return {"role": role, "content": [{"type": "text", "text": text}]}


def _with_part(messages: tuple[Message, ...], part: dict[str, str]) -> tuple[Message, ...]:
    """``messages`` with ``part`` in the user's open message, or in a new one."""
    if messages and messages[-1]["role"] == "user":
        *before, last = messages
        return (*before, {"role": "user", "content": [*last["content"], part]})
    return (*messages, {"role": "user", "content": [part]})
