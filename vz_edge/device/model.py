"""EdgeModel: a bundle, loaded, that answers questions about pictures.

The way of a question: picture -> tiles -> vision graph -> image tokens; messages -> template -> token ids ->
embeddings with the image tokens in their place -> prefill -> one token at a time -> text.

>>> model = EdgeModel.load("bundles/llava-next-13b")
>>> model.ask("street.jpg", "How many people are crossing?").text
'Three people are crossing the street.'

A model is safe to share between threads, unless it decodes by a CUDA graph: sessions, tokenizer and table are
read-only, and each question has a KV cache of its own.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Generator, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

from vz_edge.arguments import flag, path, shown, whole
from vz_edge.bundle import Manifest, read_manifest
from vz_edge.device.backend import VisionRuntime, choose_backend
from vz_edge.device.closed import CLOSED_MODEL
from vz_edge.device.decoder import Decoder
from vz_edge.device.embedding import EmbeddingTable
from vz_edge.device.guide import GrammarCompiler
from vz_edge.device.image import ImageSource
from vz_edge.device.memory_check import available_memory_bytes, check_memory, memory_need
from vz_edge.device.options import AskOptions
from vz_edge.device.pipeline import CheckedQuestion, Pictures, Pipeline, Prompt, Spent, common_start
from vz_edge.device.prompt import ChatPrompt
from vz_edge.device.reply import Reply, Stream
from vz_edge.device.runtime import CPU, Provider
from vz_edge.device.session import Session
from vz_edge.device.vision import Vision, VisionResult
from vz_edge.errors import BundleError, RequestError

if TYPE_CHECKING:
    from typing_extensions import Unpack  # a type checker brings it along; nothing needs it at run time

    from vz_edge.device.cached_model import CachedModel
    from vz_edge.metrics import Metrics
    from vz_edge.watch.engine import Question
    from vz_edge.watch.frame import Color
    from vz_edge.watch.source import AnySource
    from vz_edge.watch.watch import Watch

MOST_THREADS = 1024  # ONNX Runtime starts as many as it is told to

logger = logging.getLogger(__name__)


class EdgeModel:
    """A bundle that answers. Made by ``EdgeModel.load``; ``with``, or ``close``, gives back what it takes.

    ``manifest`` says which model it is; ``vision``, ``chat``, ``embedding`` and ``decoder`` are its parts, for those
    who measure or compose them differently; ``context_length`` is the most tokens that a question with its
    pictures and its answer may have; ``load_sec`` is what loading took; ``provider`` is ONNX Runtime's name of the
    processor that the decoder runs on.
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
        provider: Provider = CPU,
    ) -> None:
        self.manifest = manifest
        self.vision = vision
        self.chat = chat
        self.embedding = embedding
        self.decoder = decoder
        self.context_length = context_length
        self.load_sec = load_sec
        self.provider = provider
        self._conversations = weakref.WeakSet[Any]()  # sessions and cached models, that end with the model
        self._compiler = GrammarCompiler(chat.tokenizer, decoder.vocab_size, manifest.stop.token_ids)

    @classmethod
    def load(
        cls,
        folder: str | PathLike[str],
        providers: Provider | Sequence[Provider] | None = None,
        threads: int | None = None,
        max_context: int | None = None,
        vision: VisionRuntime = "onnx",
        cuda_graph: bool = False,
        device: int | None = None,
        release_memory: bool | None = None,
    ) -> EdgeModel:
        """Load a bundle written by ``vz-edge export``.

        ``providers`` are ONNX Runtime's ("cpu", "cuda"..., or with options as ("cuda", {"gpu_mem_limit": 2**31}); by
        default CUDA for a bundle exported for it where the machine has it, else the CPU). ``device`` is the number of
        the GPU to run on, as CUDA counts (0 by default). ``threads`` are the physical cores by default;
        ``max_context`` lowers the model's own context, to bound the memory of a question. A bundle with bitsandbytes
        weights runs its language model in torch: on the CPU where ``providers`` begin with it, else on CUDA; torch's
        threads are the process's. Its ``vision`` runs in ONNX Runtime ("onnx") or in torch beside the language model
        ("torch"); other bundles have ONNX Runtime alone. With ``cuda_graph`` tokens are decoded by a CUDA graph
        (``vz_edge.device.cuda_graph``; on CUDA alone, where it has not been run yet): the KV cache of the whole context
        is then allocated here, one conversation at a time has the graph, and all questions must come from one thread.
        ``release_memory`` says if vision on the CPU gives back after each picture what that took of memory
        (docs/sessions.md); None: only where memory is short. Raises BundleError, ProviderError, DependencyError,
        RequestError, and InsufficientMemoryError before anything is loaded where the weights, and a graph's cache, do
        not fit.
        """
        started = time.perf_counter()
        bundle = path("the bundle", folder, BundleError)
        threads = None if threads is None else whole("threads", threads, 1, MOST_THREADS)
        max_context = None if max_context is None else whole("max_context", max_context, 1)
        cuda_graph = flag("cuda_graph", cuda_graph)
        release_memory = None if release_memory is None else flag("release_memory", release_memory)
        manifest = read_manifest(bundle)
        model = manifest.model
        context_length = min(model.decoder.context_length, max_context or model.decoder.context_length)
        graph_tokens = context_length if cuda_graph else 0
        backend = choose_backend(bundle, manifest, providers, vision, graph_tokens, device)
        need = memory_need(bundle, manifest, context_tokens=graph_tokens)
        check_memory([need], available_memory_bytes(backend.provider))
        logger.info("loading %s for %s", bundle, backend.provider)
        chat = ChatPrompt.load(bundle, model.image_token_id)
        encoder = backend.open_vision(bundle, manifest, threads, release_memory)
        logger.debug("opened the vision graph %.2f s after the beginning", time.perf_counter() - started)
        decoder = backend.open(bundle, threads)
        embedding = EmbeddingTable(bundle / "embedding.data", decoder.hidden_size, decoder.dtype)
        load_sec = time.perf_counter() - started
        logger.info("loaded %s in %.2f s", manifest.name, load_sec)
        return cls(manifest, encoder, chat, embedding, decoder, context_length, load_sec, backend.provider)

    def close(self) -> None:
        """Give back what the bundle takes: memory, threads, the GPU. Its sessions and watches end with it.

        Whatever is asked of it afterwards raises a RequestError. An answer that is being written goes on to its end,
        and holds what it needs until then.
        """
        for conversation in list(self._conversations):
            conversation.close()
        if self._compiler is not CLOSED_MODEL:
            self._compiler.close()
        self.vision = self.chat = self.embedding = self.decoder = self._compiler = CLOSED_MODEL

    def check_open(self) -> None:
        """Raise RequestError where the model was closed."""
        self.chat.image_token_id  # noqa: B018 - any part would say it

    def __enter__(self) -> EdgeModel:
        self.check_open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        manifest = self.manifest
        totals = ", ".join(str(budget.total(manifest.model.max_tiles)) for budget in manifest.budgets) or "all"
        closed = ", closed" if self.vision is CLOSED_MODEL else ""
        return (
            f"<EdgeModel {manifest.name}: {manifest.model.family}, {manifest.weights.bits} bits, tokens {totals}, "
            f"context {self.context_length}{closed}>"
        )

    def session(self, system: str | None = None, max_context: int | None = None) -> Session:
        """A conversation that looks at a picture once and answers any number of questions about it.

        ``system`` is what the model is told first; ``max_context`` lowers the context further, to bound the memory
        of the session's KV cache. Raises RequestError, also where the chat template has no place for ``system``,
        and ContextLengthError.
        """
        return Session(self._pipeline, system, max_context, self._conversations)

    def cached(self, max_bytes: int | None = None) -> CachedModel:
        """This model with a memory: a question goes on from the longest start that it shares with earlier ones.

        For callers that send a whole conversation with each question, as HTTP clients do. KV caches and encoded
        pictures of the last conversations are kept, no more than ``max_bytes`` of them; by default a quarter of the
        memory that is available now, and no more than 4 GiB. Raises RequestError.
        """
        from vz_edge.device.cached_model import CachedModel, default_bytes

        self.check_open()
        if max_bytes is None:
            max_bytes = default_bytes(available_memory_bytes(self.provider))
        max_bytes = whole("max_bytes", max_bytes)
        cached = CachedModel(self._pipeline, max_bytes)
        self._conversations.add(cached)
        return cached

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
        tokens: int | None = None,
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
        ``tokens`` is as in ``ask``, for every frame; ``system`` and ``max_context`` are as in ``session``; ``metrics``
        is a registry to count in. Raises RequestError, BudgetError and ContextLengthError; all else that can be wrong
        is in the results, or raised where they are asked for.
        """
        from vz_edge.watch.source import open_source
        from vz_edge.watch.watch import Watch

        return Watch(
            self,
            open_source(source, color),
            questions,
            every=every,
            deadline=deadline,
            unchanged_below=unchanged_below,
            stalled_after=stalled_after,
            tokens=tokens,
            system=system,
            max_context=max_context,
            metrics=metrics,
        )

    def encode(self, image: ImageSource, tokens: int | None = None) -> VisionResult:
        """Look at a picture once; what is returned can be asked about any number of times.

        ``tokens`` is one of the bundle's budgets, by default its first. Raises ImageError, BudgetError.
        """
        budget = self.manifest.budget_of(tokens)
        return self.vision.encode(self.vision.tile(image), budget)

    def ask(
        self, image: Pictures, prompt: Prompt, *, tokens: int | None = None, **options: Unpack[AskOptions]
    ) -> Reply:
        """Answer a question about a picture, several pictures, or none.

        ``image`` is a path, a picture file's bytes, a file that is open for reading bytes, a Pillow image, a uint8
        [height, width, 3] RGB array or what ``encode`` returned; several are a list of these.
        ``prompt`` is a question or a conversation (``[{"role": "user", "content": "..."}, ...]``). ``tokens`` is one of
        the bundle's budgets, by default its first: fewer tokens are read faster and show less; what ``encode`` returned
        has its tokens already. An answer has at most
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
        pipeline = self._pipeline
        return Stream(_start(pipeline, pipeline.questions(image, [prompt], tokens, **options)[0]))

    def ask_many(
        self,
        image: Pictures,
        prompts: str | Sequence[Prompt],
        *,
        tokens: int | None = None,
        **options: Unpack[AskOptions],
    ) -> list[Reply]:
        """Answer separate questions about the same picture, which is encoded and read by the decoder once.

        ``prompts`` is a list of what ``ask`` takes; a string is one question. The tokens that all prompts begin with
        stay in the KV cache. The time they took, the picture's too, is in the first reply.
        """
        pipeline = self._pipeline
        asked = [prompts] if isinstance(prompts, str) else prompts
        if not isinstance(asked, (list, tuple)):
            raise RequestError(f"prompts {shown(prompts)} are not understood; expected a list of questions")
        questions = pipeline.questions(image, asked, tokens, **options)
        if not questions:
            return []
        results, vision_sec = pipeline.look(questions[0])
        context = self.decoder.start(max(question.capacity for question in questions))
        shared = common_start([question.ids[:-1] for question in questions])
        started = time.perf_counter()
        if shared:
            context.append(pipeline.embed(shared, results))
        shared_length = context.length
        spent = Spent(questions[0].preprocess_sec, vision_sec, time.perf_counter() - started)
        replies = []
        for question in questions:
            context.rewind(shared_length)
            replies.append(Stream(pipeline.answer(context, question, len(shared), results, spent)).reply)
            spent = Spent(cached_tokens=shared_length)
        return replies

    @property
    def _pipeline(self) -> Pipeline:
        """The parts as they are now: who measures them may have put others in their place."""
        return Pipeline(
            self.manifest, self.vision, self.chat, self.embedding, self.decoder, self._compiler, self.context_length
        )


def _start(pipeline: Pipeline, question: CheckedQuestion) -> Generator[str, None, Reply]:
    results, vision_sec = pipeline.look(question)
    context = pipeline.decoder.start(question.capacity)
    return (yield from pipeline.answer(context, question, 0, results, Spent(question.preprocess_sec, vision_sec)))
