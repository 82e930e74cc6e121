"""The steps of a question through a bundle's parts: check, look, embed, answer.

``EdgeModel`` and ``Session`` are made of them; what stays in the KV cache between two questions is theirs to say.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vz_edge.arguments import shown
from vz_edge.budget import TokenBudget
from vz_edge.bundle import Manifest
from vz_edge.device.choices import Choices, choose
from vz_edge.device.decoder import Context, Decoder
from vz_edge.device.embedding import EmbeddingTable
from vz_edge.device.generate import Limits, generate
from vz_edge.device.guide import GrammarCompiler
from vz_edge.device.image import ImageSource, Tiles, token_count
from vz_edge.device.options import AskOptions, check_options
from vz_edge.device.prefix_cache import Item
from vz_edge.device.prompt import ChatPrompt, Message, messages_of
from vz_edge.device.reply import Reply
from vz_edge.device.vision import Vision, VisionResult
from vz_edge.errors import ContextLengthError, RequestError

if TYPE_CHECKING:
    from typing_extensions import Unpack  # a type checker brings it along; nothing needs it at run time

Picture = ImageSource | VisionResult
Pictures = Picture | Sequence[Picture] | None
Prompt = str | Sequence[Message]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckedQuestion:
    """A question that is known to fit: token ids, and pictures that may still have to go through the vision graph."""

    ids: list[int]
    pictures: list[Tiles | VisionResult]
    budget: TokenBudget | None  # of pictures that were not encoded
    image_tokens: int
    preprocess_sec: float
    limits: Limits
    choices: Choices | None

    @property
    def prompt_tokens(self) -> int:
        """Tokens of text; each picture's place is one id."""
        return len(self.ids) - len(self.pictures)

    @property
    def capacity(self) -> int:
        """Tokens that the KV cache must hold. The last token of an answer is never read again."""
        return self.prompt_tokens + self.image_tokens + self.limits.max_new_tokens


class Spent(NamedTuple):
    """Seconds that went into a question before its own prefill, and tokens that were read before it was asked."""

    preprocess_sec: float = 0.0
    vision_sec: float = 0.0
    shared_prefill_sec: float = 0.0
    cached_tokens: int = 0


@dataclass(frozen=True)
class Pipeline:
    """The parts of a loaded bundle; a question, its pictures and its answer may have ``context_length`` tokens."""

    manifest: Manifest
    vision: Vision
    chat: ChatPrompt
    embedding: EmbeddingTable
    decoder: Decoder
    compiler: GrammarCompiler
    context_length: int

    def questions(
        self, image: Pictures, prompts: Sequence[Prompt], tokens: int | None = None, **options: Unpack[AskOptions]
    ) -> list[CheckedQuestion]:
        """Check everything that can be wrong with questions about the same pictures, before anything slow is done.

        Raises ImageError, BudgetError, RequestError, ContextLengthError and DependencyError.
        """
        budget = self.manifest.budget_of(tokens)
        limits, choices = check_options(self.manifest.stop, self.chat.tokenizer, self.compiler, options)
        started = time.perf_counter()
        pictures = [
            picture if isinstance(picture, VisionResult) else self.vision.tile(picture) for picture in listed(image)
        ]
        preprocess_sec = time.perf_counter() - started
        if tokens is not None and pictures and not any(isinstance(picture, Tiles) for picture in pictures):
            raise RequestError(
                f"tokens {tokens} came with a picture that is encoded and has its tokens already; leave tokens out, or "
                "give the picture itself"
            )
        image_tokens = sum(self._token_count(picture, budget) for picture in pictures)
        questions = []
        for prompt in prompts:
            ids = self.chat.ids(messages_of(prompt, len(pictures)))
            marks = ids.count(self.chat.image_token_id)
            if marks != len(pictures):
                raise RequestError(
                    f"the prompt has {marks} image tokens, {len(pictures)} picture(s) were given; write the question "
                    "without the image token: the chat template places it"
                )
            question = CheckedQuestion(ids, pictures, budget, image_tokens, preprocess_sec, limits, choices)
            self._check_context(question)
            questions.append(question)
        return questions

    def look(self, question: CheckedQuestion) -> tuple[list[VisionResult], float]:
        """What each of its pictures shows, and the seconds that it took to look at those which were not encoded."""
        started = time.perf_counter()
        results = [
            self.vision.encode(picture, question.budget) if isinstance(picture, Tiles) else picture
            for picture in question.pictures
        ]
        return results, time.perf_counter() - started

    def items(self, ids: Sequence[int], results: Sequence[VisionResult]) -> list[Item]:
        """``ids`` with ``results`` in the places of its image tokens."""
        following = iter(results)
        return [next(following) if token_id == self.chat.image_token_id else token_id for token_id in ids]

    def embed(self, ids: list[int], results: list[VisionResult]) -> np.ndarray:
        """Embeddings [positions, hidden] of ``ids``, with the first ``results`` in the places of its image tokens."""
        count = ids.count(self.chat.image_token_id)
        features = [result.features for result in results[:count]]
        return self.embedding.place(ids, self.chat.image_token_id, features)

    def answer(
        self, context: Context, question: CheckedQuestion, read: int, results: list[VisionResult], spent: Spent
    ) -> Generator[str, None, Reply]:
        """Answer in a context that has read the first ``read`` ids of the question."""
        pictures_read = question.ids[:read].count(self.chat.image_token_id)
        embeds = self.embed(question.ids[read:], results[pictures_read:])
        logger.info("reading %d tokens, %d are in the KV cache", len(embeds), context.length)
        if question.choices:
            answer = yield from choose(context, embeds, self.embedding, question.choices, question.limits)
        else:
            answer = yield from generate(context, embeds, self.embedding, self.chat.tokenizer, question.limits)
        return Reply(
            text=answer.text,
            finish_reason=answer.finish_reason,
            token_ids=answer.token_ids,
            prompt_tokens=question.prompt_tokens,
            image_tokens=question.image_tokens,
            cached_tokens=spent.cached_tokens,
            preprocess_sec=spent.preprocess_sec,
            vision_sec=spent.vision_sec,
            prefill_sec=spent.shared_prefill_sec + answer.prefill_sec,
            decode_sec=answer.decode_sec,
            value=answer.value,
            logprobs=answer.logprobs,
            probabilities=answer.probabilities,
        )

    def _token_count(self, picture: Tiles | VisionResult, budget: TokenBudget | None) -> int:
        if isinstance(picture, VisionResult):
            self._check_features(picture.features)
            return len(picture.features)
        return token_count(picture.original_size, self.manifest.model, budget)

    def _check_features(self, features: object) -> None:
        """Raise RequestError for a picture that another model encoded."""
        width = self.decoder.hidden_size
        if isinstance(features, np.ndarray) and features.dtype.kind == "f" and features.shape[1:] == (width,):
            return
        found = f"{features.dtype} {list(features.shape)}" if isinstance(features, np.ndarray) else shown(features)
        raise RequestError(
            f"an encoded picture has features {found}, and this model reads floats [tokens, {width}]; encode the "
            "picture with this model"
        )

    def _check_context(self, question: CheckedQuestion) -> None:
        left = self.context_length - question.prompt_tokens - question.image_tokens
        if question.limits.max_new_tokens <= left:
            return
        shorter = f"shorten the prompt by {1 - left} tokens, or export with fewer --tokens"
        fits = f"lower max_new_tokens to {left}" if left > 0 else shorter
        raise ContextLengthError(
            f"{question.prompt_tokens} prompt tokens, {question.image_tokens} image tokens and "
            f"{question.limits.max_new_tokens} new ones do not fit the context of {self.context_length}; {fits}"
        )


def common_start(sequences: Sequence[list[int]]) -> list[int]:
    """The longest list that all ``sequences`` begin with."""
    shared = []
    for ids in zip(*sequences, strict=False):
        if len(set(ids)) > 1:
            break
        shared.append(ids[0])
    return shared


def listed(image: Pictures) -> list[Picture]:
    """Pictures as they are given, as a list."""
    if image is None:
        return []
    return list(image) if isinstance(image, (list, tuple)) else [image]  # type: ignore[list-item]
