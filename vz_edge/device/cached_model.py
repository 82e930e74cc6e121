"""CachedModel: a model that goes on from what it read before, for callers that send the whole conversation each time.

>>> cached = model.cached(max_bytes=2 * 2**30)
>>> messages = [{"role": "user", "content": "Is the door open?"}]
>>> reply = cached.ask("street.jpg", messages)
>>> messages += [{"role": "assistant", "content": reply.text}, {"role": "user", "content": "And the window?"}]
>>> cached.ask("street.jpg", messages).cached_tokens  # the picture, and the first turn
352

Where ``Session`` is one conversation that its caller drives, this finds out which of many a question goes on from: the
prompt with the longest common start. An answer is that of a model that has read nothing before.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING

from vz_edge.budget import TokenBudget
from vz_edge.device.closed import CLOSED_MODEL
from vz_edge.device.image import ImageSource, Tiles, load_image
from vz_edge.device.options import AskOptions
from vz_edge.device.picture_cache import PictureCache, PictureKey, picture_key
from vz_edge.device.pipeline import CheckedQuestion, Picture, Pictures, Pipeline, Prompt, Spent, listed
from vz_edge.device.prefix_cache import Item, Prefix, PrefixCache, token_count
from vz_edge.device.reply import Reply, Stream
from vz_edge.device.session import Look
from vz_edge.device.vision import VisionResult
from vz_edge.errors import VzEdgeError

if TYPE_CHECKING:
    from typing_extensions import Unpack

PICTURES_SHARE = 8  # pictures get an eighth: each is a small part of the KV cache that it is read into
# What is kept by default: a quarter of the memory that is available, but no more than a few conversations of 13B.
AVAILABLE_SHARE, MOST_BYTES = 4, 4 * 2**30
BYTES_IF_UNKNOWN = 2**30


class CachedModel:
    """A model with a memory. Made by ``EdgeModel.cached``; safe to share between threads where the model is."""

    def __init__(self, pipeline: Pipeline, max_bytes: int) -> None:
        """As ``EdgeModel.cached``, which is the way to make one."""
        self._pipeline = pipeline
        pictures_bytes = max_bytes // PICTURES_SHARE
        self._pictures = PictureCache(pictures_bytes)
        self._prompts = PrefixCache(pipeline.decoder, pipeline.context_length, max_bytes - pictures_bytes)

    @property
    def size_bytes(self) -> int:
        """Memory that is kept: KV caches and encoded pictures."""
        return self._pictures.size_bytes + self._prompts.size_bytes

    def clear(self) -> None:
        """Forget everything; the memory is given back."""
        self._prompts.clear()
        self._pictures.clear()

    def close(self) -> None:
        """Forget everything. Whatever is asked of it afterwards raises a RequestError."""
        self._pipeline = CLOSED_MODEL
        self._prompts, self._pictures = PrefixCache(CLOSED_MODEL, 0, 0), PictureCache(0)

    def look(self, image: ImageSource, tokens: int | None = None) -> Look:
        """Encode a picture as ``EdgeModel.encode``, for the questions about it to find. Nothing is prefilled."""
        started = time.perf_counter()
        budget = self._pipeline.manifest.budget_of(tokens)
        key, picture = self._recall(image, budget)
        tiles = picture if isinstance(picture, VisionResult) else self._pipeline.vision.tile(picture)
        tiled = time.perf_counter()
        result = self._encoded(key, tiles, budget)
        return Look(result, tiled - started, time.perf_counter() - tiled, prefill_sec=0.0)

    def ask(
        self, image: Pictures, prompt: Prompt, *, tokens: int | None = None, **options: Unpack[AskOptions]
    ) -> Reply:
        """As ``EdgeModel.ask``; ``cached_tokens`` of the reply did not have to be read."""
        return self.stream(image, prompt, tokens=tokens, **options).reply

    def stream(
        self, image: Pictures, prompt: Prompt, *, tokens: int | None = None, **options: Unpack[AskOptions]
    ) -> Stream:
        """As ``EdgeModel.stream``. What was read is kept when the answer ends, or is closed."""
        started = time.perf_counter()
        budget = self._pipeline.manifest.budget_of(tokens)
        recalled = [self._recall(picture, budget) for picture in listed(image)]
        recall_sec = time.perf_counter() - started
        pictures = [picture for _, picture in recalled]
        if any(key for key, _ in recalled) and all(isinstance(picture, VisionResult) for picture in pictures):
            tokens = None  # they were encoded with this budget
        question = self._pipeline.questions(pictures, [prompt], tokens, **options)[0]
        return Stream(self._answer(question, [key for key, _ in recalled], recall_sec))

    def _answer(
        self, question: CheckedQuestion, keys: Sequence[PictureKey | None], recall_sec: float
    ) -> Generator[str, None, Reply]:
        pipeline, prompts = self._pipeline, self._prompts  # an answer goes on to its end where this is closed meanwhile
        started = time.perf_counter()
        pictures = [
            self._encoded(key, picture, question.budget) for key, picture in zip(keys, question.pictures, strict=True)
        ]
        looked = time.perf_counter()
        items = pipeline.items(question.ids, pictures)
        prefix = prompts.take(items, question.capacity)
        spent = Spent(
            recall_sec + question.preprocess_sec,
            looked - started,
            time.perf_counter() - looked,
            cached_tokens=prefix.context.length,
        )
        try:
            reply = yield from pipeline.answer(prefix.context, question, len(prefix.items), pictures, spent)
        except (VzEdgeError, GeneratorExit):  # after any other error nobody knows what the context holds
            _keep(prompts, prefix, items)
            raise
        # The last token of an answer is chosen, never read.
        _keep(prompts, prefix, [*items, *reply.token_ids[: prefix.context.length - token_count(items)]])
        return reply

    def _recall(self, picture: Picture, budget: TokenBudget | None) -> tuple[PictureKey | None, Picture]:
        """The picture as it was encoded before, else its pixels, and the key of these."""
        if isinstance(picture, VisionResult):
            return None, picture
        pixels = load_image(picture)
        key = picture_key(pixels, budget)
        return key, self._pictures.get(key) or pixels

    def _encoded(
        self, key: PictureKey | None, picture: Tiles | VisionResult, budget: TokenBudget | None
    ) -> VisionResult:
        if isinstance(picture, VisionResult):
            return picture
        assert key is not None
        found = self._pictures.get(key)  # where a question has a picture twice
        if found is None:
            found = self._pictures.put(key, self._pipeline.vision.encode(picture, budget))
        return found


def default_bytes(available_bytes: int | None) -> int:
    """What to keep where nobody says: a part of the memory that is available now; None where that is not known."""
    return BYTES_IF_UNKNOWN if available_bytes is None else min(available_bytes // AVAILABLE_SHARE, MOST_BYTES)


def _keep(prompts: PrefixCache, prefix: Prefix, items: list[Item]) -> None:
    prefix.hold(items)
    prompts.put(prefix)
