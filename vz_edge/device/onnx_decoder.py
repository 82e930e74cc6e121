"""The decoder in ONNX Runtime: a session of ``decoder.onnx`` and its KV cache.

Each layer's keys and values live in one preallocated buffer [1, kv_heads, capacity, head_dim] that is bound
both as past and as present (IO binding), so GroupQueryAttention appends in place and nothing is copied from
token to token. The length of what is valid is told by the attention mask, which makes going back free.
"""

from __future__ import annotations

import math
import mmap
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vz_edge.device.decoder import check_append, check_fork, check_rewind
from vz_edge.device.mapped import MappedWeights
from vz_edge.device.runtime import CUDA, DEVICE_ID, Provider, open_session
from vz_edge.errors import CorruptBundleError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from onnxruntime import InferenceSession, IOBinding, OrtValue

DTYPES: dict[str, np.dtype] = {"tensor(float)": np.dtype(np.float32), "tensor(float16)": np.dtype(np.float16)}
PAST, PRESENT = "past_key_values.", "present."


class OnnxDecoder:
    """``decoder.onnx`` as a Decoder; ``dtype`` is the precision of embeddings and cache."""

    contexts_at_once: int | None = None

    def __init__(self, session: InferenceSession) -> None:
        self.session = session
        inputs = {value.name: value for value in session.get_inputs()}
        outputs = {value.name: value for value in session.get_outputs()}
        self.cache_names = [name.removeprefix(PAST) for name in inputs if name.startswith(PAST)]
        try:
            embeds, past = inputs["inputs_embeds"], inputs[PAST + self.cache_names[0]]
            self.dtype = DTYPES[embeds.type]
            self.hidden_size = int(embeds.shape[2])
            self.kv_heads, self.head_dim = int(past.shape[1]), int(past.shape[3])
            self.vocab_size = int(outputs["logits"].shape[2])
            self.logits_dtype = DTYPES[outputs["logits"].type]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise CorruptBundleError(
                f"decoder.onnx has inputs {sorted(inputs)[:4]}... that no bundle has; export the bundle again"
            ) from error
        self.device = "cuda" if session.get_providers()[0] == CUDA else "cpu"
        self.device_id = int(session.get_provider_options().get(CUDA, {}).get(DEVICE_ID, 0))

    @staticmethod
    def open(folder: Path, providers: Sequence[Provider], threads: int | None) -> OnnxDecoder:
        """Open the bundle's decoder. Raises CorruptBundleError or ProviderError."""
        return OnnxDecoder(open_decoder_session(folder, providers, threads))

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes of KV cache that a token takes, all layers together."""
        return len(self.cache_names) * self.kv_heads * self.head_dim * self.dtype.itemsize

    def start(self, capacity: int) -> OnnxContext:
        """An empty context for up to ``capacity`` tokens."""
        return OnnxContext(self, capacity, KVCache(self, capacity))

    def run(self, binding: IOBinding) -> None:
        """Run the graph on what is bound."""
        self.session.run_with_iobinding(binding)

    def allocate(self, shape: tuple[int, ...], dtype: np.dtype) -> OrtValue:
        """A tensor on the decoder's device, with anything in it."""
        from onnxruntime import OrtValue

        return OrtValue.ortvalue_from_shape_and_type(shape, dtype, self.device, self.device_id)


def open_decoder_session(
    folder: Path, providers: Sequence[Provider], threads: int | None, cuda_graph: bool = False
) -> InferenceSession:
    """A session of the bundle's decoder, as ``open_session``."""
    session = open_session(folder / "decoder.onnx", providers, threads, cuda_graph=cuda_graph)
    MappedWeights(folder / "decoder.onnx.data").release()
    return session


class KVCache:
    """Each layer's keys and values, in buffers that stay where they are.

    On the CPU they are zero pages until written, so capacity that is not used costs no memory.
    """

    def __init__(self, decoder: OnnxDecoder, capacity: int) -> None:
        from onnxruntime import OrtValue

        self.capacity = capacity
        self._names = decoder.cache_names
        self._pages: np.ndarray | None = None  # what the buffers are views of, on the CPU
        self._shape = (1, decoder.kv_heads, capacity, decoder.head_dim)
        self._dtype = decoder.dtype
        if decoder.device == "cuda":
            self._buffers = [decoder.allocate(self._shape, decoder.dtype) for _ in self._names]
        else:
            self._pages = _untouched((len(self._names), *self._shape), decoder.dtype)
            self._buffers = [OrtValue.ortvalue_from_numpy(buffer) for buffer in self._pages]

    def bind(self, session: InferenceSession) -> IOBinding:
        """A binding in which each buffer is a past and its present."""
        binding = session.io_binding()
        for name, buffer in zip(self._names, self._buffers, strict=True):
            binding.bind_ortvalue_input(PAST + name, buffer)
            binding.bind_ortvalue_output(PRESENT + name, buffer)
        return binding

    def taken_bytes(self, length: int) -> int:
        """Bytes of memory that are taken once ``length`` tokens were written; on CUDA all are from the start.

        On the CPU each head's tokens lie together, and take whole pages.
        """
        heads, row_bytes = len(self._names) * self._shape[1], self._shape[3] * self._dtype.itemsize
        if self._pages is None:
            return heads * self.capacity * row_bytes
        unaligned = bool(self.capacity * row_bytes % mmap.PAGESIZE)  # a row may begin in the midst of a page
        pages = -(-length * row_bytes // mmap.PAGESIZE) + unaligned
        return min(heads * pages * mmap.PAGESIZE, self._pages.nbytes)

    def copy_from(self, other: KVCache, length: int) -> None:
        """Take over the first ``length`` tokens of another cache."""
        if self._pages is not None and other._pages is not None:
            self._pages[..., :length, :] = other._pages[..., :length, :]
            return
        for buffer, source in zip(self._buffers, other._buffers, strict=True):
            copy = np.zeros(self._shape, self._dtype)
            copy[..., :length, :] = source.numpy()[..., :length, :]
            buffer.update_inplace(copy)


class OnnxContext:
    """How much of a KV cache, which may be larger than ``capacity``, was read."""

    def __init__(self, decoder: OnnxDecoder, capacity: int, cache: KVCache) -> None:
        self.capacity = capacity
        self.length = 0
        self._longest = 0  # that it ever was
        self._decoder = decoder
        self._cache = cache
        self._binding = cache.bind(decoder.session)
        self._mask = np.ones((1, capacity), dtype=np.int64)
        self._logits = np.empty((1, 1, decoder.vocab_size), dtype=decoder.logits_dtype)
        self._binding.bind_output(
            "logits", "cpu", 0, decoder.logits_dtype, self._logits.shape, self._logits.ctypes.data
        )

    def append(self, embeds: np.ndarray) -> np.ndarray:
        """As Context.append."""
        check_append(self, len(embeds))
        total = self.length + len(embeds)
        # Bound anew each time: on CUDA this is when the numbers are copied to the device.
        row_major = np.ascontiguousarray(embeds[None], dtype=self._decoder.dtype)
        self._binding.bind_cpu_input("inputs_embeds", row_major)
        self._binding.bind_cpu_input("attention_mask", self._mask[:, :total])
        self._longest = max(self._longest, total)
        self._decoder.run(self._binding)
        self.length = total
        return self._logits[0, 0].astype(np.float32)

    @property
    def cache_bytes(self) -> int:
        """As Context.cache_bytes: what was read once keeps its memory, also when it is forgotten."""
        return self._cache.taken_bytes(self._longest)

    def rewind(self, length: int) -> None:
        """As Context.rewind."""
        check_rewind(self, length)
        self.length = length

    def fork(self, length: int | None = None, capacity: int | None = None) -> OnnxContext:
        """As Context.fork. On CUDA all of the cache is copied, a layer at a time through the host's memory."""
        length, capacity = check_fork(self, length, capacity)
        twin = OnnxContext(self._decoder, capacity, KVCache(self._decoder, capacity))
        twin._cache.copy_from(self._cache, length)
        twin.length = twin._longest = length
        return twin


def _untouched(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Zeros whose small pages become real when they are written.

    numpy asks for huge pages, and a head's first token would then make 2 MB of every head's future real.
    """
    pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        pages.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(pages, dtype=dtype).reshape(shape)
