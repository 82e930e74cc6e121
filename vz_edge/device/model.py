"""EdgeModel: a bundle, loaded, that answers questions about pictures.

The way of a question: picture -> tiles -> vision graph -> image tokens; messages -> template -> token ids ->
embeddings with the image tokens in their place -> prefill -> one token at a time -> text.

>>> model = EdgeModel.load("bundles/llava-next-13b")
>>> model.ask("street.jpg", "How many people are crossing?").text
'Three people are crossing the street.'

A model is safe to share between threads: sessions, tokenizer and table are read-only, and each question has a
KV cache of its own.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vz_edge.budget import TokenBudget
from vz_edge.bundle import Manifest, read_manifest
from vz_edge.device.backend import VisionRuntime, choose_backend
from vz_edge.device.choices import Choices, choose
from vz_edge.device.decoder import Context, Decoder
from vz_edge.device.embedding import EmbeddingTable
from vz_edge.device.generate import Limits, generate
from vz_edge.device.guide import GrammarCompiler
from vz_edge.device.image import ImageSource, Tiles, token_count
from vz_edge.device.memory_check import available_memory_bytes, check_memory, memory_need
from vz_edge.device.options import AskOptions, check_options
from vz_edge.device.prompt import ChatPrompt, Message, messages_of
from vz_edge.device.reply import Reply, Stream
from vz_edge.device.vision import Vision, VisionResult
from vz_edge.errors import ContextLengthError, RequestError

if TYPE_CHECKING:
    from typing_extensions import Unpack  # a type checker brings it along; nothing needs it at run time

    from vz_edge.device.session import Session
    from vz_edge.metrics import Metrics
    from vz_edge.watch.engine import Question
    from vz_edge.watch.frame import Color
    from vz_edge.watch.source import AnySource
    from vz_edge.watch.watch import Watch

Picture = ImageSource | VisionResult
Pictures = Picture | Sequence[Picture] | None
Prompt = str | Sequence[Message]


@dataclass(frozen=True)
class _Question:
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


class _Spent(NamedTuple):
    """Seconds that went into a question before its own prefill, and tokens that were read before it was asked."""

    preprocess_sec: float = 0.0
    vision_sec: float = 0.0
    shared_prefill_sec: float = 0.0
    cached_tokens: int = 0


class EdgeModel:
    """A bundle that answers. Made by ``EdgeModel.load``.

    ``manifest`` says which model it is; ``vision``, ``chat``, ``embedding`` and ``decoder`` are its parts, for those
    who measure or compose them differently; ``context_length`` is the most tokens that a question with its
    pictures and its answer may have; ``load_sec`` is what loading took.
    """

    def __init__(
        self,
        manifest: Manifest,
        vision: Vision,
        chat: ChatPrompt,
        embedding: EmbeddingTable,
        decoder: Decoder,
        context_length: int,
        load_sec: float,
    ) -> None:
        self.manifest = manifest
        self.vision = vision
        self.chat = chat
        self.embedding = embedding
        self.decoder = decoder
        self.context_length = context_length
        self.load_sec = load_sec
        self._compiler = GrammarCompiler(chat.tokenizer, decoder.vocab_size, manifest.stop.token_ids)

    @classmethod
    def load(
        cls,
        folder: str | PathLike[str],
        providers: Sequence[str] | None = None,
        threads: int | None = None,
        max_context: int | None = None,
        vision: VisionRuntime = "onnx",
    ) -> EdgeModel:
        """Load a bundle written by ``vz-edge export``.

        ``providers`` are ONNX Runtime's ("cpu", "cuda"...; by default CUDA for a bundle exported for it where the
        machine has it, else the CPU), ``threads`` the physical cores by default; ``max_context`` lowers the model's
        own context, to bound the memory of a question. A bundle with bitsandbytes weights runs its language model
        in torch: on the CPU where ``providers`` begin with it, else on CUDA; torch's threads are the process's. Its
        ``vision`` runs in ONNX Runtime ("onnx") or in torch beside the language model ("torch"); other bundles have
        ONNX Runtime alone. Raises BundleError, ProviderError, DependencyError, RequestError, and
        InsufficientMemoryError before anything is loaded where the weights alone do not fit.
        """
        started = time.perf_counter()
        for name, value in (("threads", threads), ("max_context", max_context)):
            if value is not None and value < 1:
                raise RequestError(f"{name} {value} is impossible; expected 1 or more")
        bundle = Path(folder)
        manifest = read_manifest(bundle)
        model = manifest.model
        backend = choose_backend(bundle, manifest, providers, vision)
        check_memory([memory_need(bundle, manifest, context_tokens=0)], available_memory_bytes(backend.provider))
        chat = ChatPrompt.load(bundle, model.image_token_id)
        encoder = backend.open_vision(bundle, manifest, threads)
        decoder = backend.open(bundle, threads)
        embedding = EmbeddingTable(bundle / "embedding.data", decoder.hidden_size, decoder.dtype)
        context_length = min(model.decoder.context_length, max_context or model.decoder.context_length)
        return cls(manifest, encoder, chat, embedding, decoder, context_length, time.perf_counter() - started)

    def session(self, system: str | None = None, max_context: int | None = None) -> Session:
        """A conversation that looks at a picture once and answers any number of questions about it.

        ``system`` is what the model is told first; ``max_context`` lowers the context further, to bound the memory
        of the session's KV cache. Raises RequestError, also where the chat template has no place for ``system``,
        and ContextLengthError.
        """
        from vz_edge.device.session import Session

        return Session(self, system, max_context)

    def watch(
        self,
        source: AnySource,
        questions: str | Sequence[Question],
        *,
        every: float | None = None,
        deadline: float | None = None,
        color: Color = "rgb",
        unchanged_below: float | None = None,
        stalled_after: float | None = 10.0,
        system: str | None = None,
        max_context: int | None = None,
        metrics: Metrics | None = None,
    ) -> Watch:
        """Answer ``questions`` about the newest frame of ``source``, again and again (docs/streams.md).

        ``source`` is an iterable of pictures, a camera's number, an address, a GStreamer pipeline, a video file, a
        folder, a ROS bag, or a source of ``vz_edge.watch``; arrays of an iterable are in the order of ``color``. A
        question is a string, or a string with its options for ``ask``. Frames are taken at least ``every`` seconds
        apart, and each has ``deadline`` seconds from then. A picture no patch of which differs from the last one that
        was looked at by ``unchanged_below`` grey levels of 255 is not looked at. A source is given up after
        ``stalled_after`` seconds without a frame.
        ``system`` and ``max_context`` are as in ``session``; ``metrics`` is a registry to count in. Raises RequestError
        and ContextLengthError; all else that can be wrong is in the results, or raised where they are asked for.
        """
        from vz_edge.watch.source import open_source
        from vz_edge.watch.watch import Watch

        return Watch(
            self,
            open_source(source, color),
            [questions] if isinstance(questions, str) else questions,
            every=every,
            deadline=deadline,
            unchanged_below=unchanged_below,
            stalled_after=stalled_after,
            system=system,
            max_context=max_context,
            metrics=metrics,
        )

    def encode(self, image: ImageSource, tokens: int | None = None) -> VisionResult:
        """Look at a picture once; what is returned can be asked about any number of times.

        ``tokens`` is one of the bundle's budgets, by default its first. Raises ImageError, BudgetError.
        """
        return self.vision.encode(self.vision.tile(image), self._budget(tokens))

    def ask(
        self, image: Pictures, prompt: Prompt, *, tokens: int | None = None, **options: Unpack[AskOptions]
    ) -> Reply:
        """Answer a question about a picture, several pictures, or none.

        ``image`` is a path, a Pillow image, a uint8 [height, width, 3] RGB array or what ``encode`` returned.
        ``prompt`` is a question or a conversation (``[{"role": "user", "content": "..."}, ...]``). ``tokens`` is one of
        the bundle's budgets, by default its first: fewer tokens are read faster and show less. An answer has at most
        ``max_new_tokens`` (128) and is greedy; a ``temperature`` above 0 draws, with a ``seed`` repeatably, from the
        ``top_k`` likeliest tokens (0: all) and those of them that make up ``top_p``. ``stop`` adds strings and token
        ids to the model's own. ``deadline_sec`` after the call no further token is begun, and
        what was written so far is the answer; looking and reading are not cut short, and their token is always
        there. ``schema`` is what the answer must be: a JSON schema, a pydantic model, a list of choices, a compiled
        regular expression or a ``Lark`` grammar (docs/answers.md). ``logprobs`` asks for those of the reply. Raises
        ImageError, BudgetError, RequestError, ContextLengthError, and AnswerError where the answer to a schema was cut
        off.
        """
        return self.stream(image, prompt, tokens=tokens, **options).reply

    def stream(
        self, image: Pictures, prompt: Prompt, *, tokens: int | None = None, **options: Unpack[AskOptions]
    ) -> Stream:
        """As ``ask``, but the text comes in pieces while it is written.

        What is wrong with the question is raised here; looking and answering begin with the first piece.
        """
        question = self._questions(image, [prompt], tokens, **options)[0]
        return Stream(self._start(question))

    def ask_many(
        self, image: Pictures, prompts: Sequence[Prompt], *, tokens: int | None = None, **options: Unpack[AskOptions]
    ) -> list[Reply]:
        """Answer separate questions about the same picture, which is encoded and read by the decoder once.

        The tokens that all prompts begin with stay in the KV cache. The time they took, the picture's too, is in
        the first reply.
        """
        questions = self._questions(image, prompts, tokens, **options)
        if not questions:
            return []
        results, vision_sec = self._look(questions[0])
        context = self.decoder.start(max(question.capacity for question in questions))
        shared = _common_start([question.ids[:-1] for question in questions])
        started = time.perf_counter()
        if shared:
            context.append(self._embed(shared, results))
        shared_length = context.length
        spent = _Spent(questions[0].preprocess_sec, vision_sec, time.perf_counter() - started)
        replies = []
        for question in questions:
            context.rewind(shared_length)
            replies.append(Stream(self._answer(context, question, len(shared), results, spent)).reply)
            spent = _Spent(cached_tokens=shared_length)
        return replies

    def _start(self, question: _Question) -> Generator[str, None, Reply]:
        results, vision_sec = self._look(question)
        context = self.decoder.start(question.capacity)
        return (yield from self._answer(context, question, 0, results, _Spent(question.preprocess_sec, vision_sec)))

    def _answer(
        self, context: Context, question: _Question, read: int, results: list[VisionResult], spent: _Spent
    ) -> Generator[str, None, Reply]:
        """Answer in a context that has read the first ``read`` ids of the question."""
        pictures_read = question.ids[:read].count(self.chat.image_token_id)
        embeds = self._embed(question.ids[read:], results[pictures_read:])
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

    def _look(self, question: _Question) -> tuple[list[VisionResult], float]:
        """What each of its pictures shows, and the seconds that it took to look at those which were not encoded."""
        started = time.perf_counter()
        results = [
            self.vision.encode(picture, question.budget) if isinstance(picture, Tiles) else picture
            for picture in question.pictures
        ]
        return results, time.perf_counter() - started

    def _embed(self, ids: list[int], results: list[VisionResult]) -> np.ndarray:
        count = ids.count(self.chat.image_token_id)
        features = [result.features for result in results[:count]]
        return self.embedding.place(ids, self.chat.image_token_id, features)

    def _questions(
        self, image: Pictures, prompts: Sequence[Prompt], tokens: int | None = None, **options: Unpack[AskOptions]
    ) -> list[_Question]:
        """Check everything that can be wrong with questions, before anything slow is done."""
        budget = self._budget(tokens)
        limits, choices = check_options(self.manifest.stop, self.chat.tokenizer, self._compiler, **options)
        started = time.perf_counter()
        pictures = [
            picture if isinstance(picture, VisionResult) else self.vision.tile(picture) for picture in _listed(image)
        ]
        preprocess_sec = time.perf_counter() - started
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
            question = _Question(ids, pictures, budget, image_tokens, preprocess_sec, limits, choices)
            self._check_context(question)
            questions.append(question)
        return questions

    def _budget(self, tokens: int | None) -> TokenBudget | None:
        return self.manifest.budget if tokens is None else self.manifest.budget_of(tokens)

    def _token_count(self, picture: Tiles | VisionResult, budget: TokenBudget | None) -> int:
        if isinstance(picture, VisionResult):
            return len(picture.features)
        return token_count(picture.original_size, self.manifest.model, budget)

    def _check_context(self, question: _Question) -> None:
        left = self.context_length - question.prompt_tokens - question.image_tokens
        if question.limits.max_new_tokens <= left:
            return
        shorter = f"shorten the prompt by {1 - left} tokens, or export with fewer --tokens"
        fits = f"lower max_new_tokens to {left}" if left > 0 else shorter
        raise ContextLengthError(
            f"{question.prompt_tokens} prompt tokens, {question.image_tokens} image tokens and "
            f"{question.limits.max_new_tokens} new ones do not fit the context of {self.context_length}; {fits}"
        )


def _listed(image: Pictures) -> list[Picture]:
    if image is None:
        return []
    return list(image) if isinstance(image, (list, tuple)) else [image]  # type: ignore[list-item]


def _common_start(sequences: Sequence[list[int]]) -> list[int]:
    """The longest list that all ``sequences`` begin with."""
    shared = []
    for ids in zip(*sequences, strict=False):
        if len(set(ids)) > 1:
            break
        shared.append(ids[0])
    return shared
