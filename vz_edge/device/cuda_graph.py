"""Decoding by a CUDA graph: the kernels of one token's step are captured once, and launched as one from then on.

A replay computes with the addresses and shapes of its capture. So the step has a KV cache, an embedding, a mask and
logits that stay where they are on the GPU, and the mask always has the cache's whole length, ones for the tokens that
are read and zeros after them: GroupQueryAttention takes how many there are from the sum, and what it must be ready for
from the length. ONNX Runtime GenAI decodes in this way (its pull 271). Prefill, whose length varies, is not captured.

ONNX Runtime keeps a captured graph as long as its session, and lets such a session run on one thread alone (its page
on the CUDA provider). A graph for each context would never be given back; so there is one, and one context at a time
decodes by it.

It has not been run on CUDA. On the CPU the same steps run without being captured, which is how they are tested.
"""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING

import numpy as np

from vz_edge.device.decoder import check_append
from vz_edge.device.onnx_decoder import KVCache, OnnxContext, OnnxDecoder
from vz_edge.device.runtime import import_onnxruntime
from vz_edge.errors import RequestError

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, IOBinding, RunOptions

# Values of the run option gpu_graph_id; 0 is ONNX Runtime's own.
NOT_CAPTURED, CAPTURED = -1, 1


class GraphDecoder(OnnxDecoder):
    """An OnnxDecoder that decodes by a CUDA graph, in one context at a time; for the thread that first runs it.

    Contexts of more than ``capacity`` tokens, those that are started while another has the graph, and forks decode
    without it. The graph's KV cache is allocated here, and kept.
    """

    contexts_at_once: int | None = 1

    def __init__(self, session: InferenceSession, capacity: int) -> None:
        super().__init__(session)
        self._thread: int | None = None
        self._not_captured, self._captured = _run_options(NOT_CAPTURED), _run_options(CAPTURED)
        self._step = _Step(self, capacity)
        self._decoding = weakref.WeakSet[GraphContext]()  # one at most

    def start(self, capacity: int) -> OnnxContext:
        """As OnnxDecoder.start."""
        if capacity > self._step.cache.capacity or self._decoding:
            return super().start(capacity)
        context = GraphContext(self, capacity, self._step.cache)
        self._decoding.add(context)
        return context

    def run(self, binding: IOBinding) -> None:
        """As OnnxDecoder.run. Raises RequestError on another thread than the first."""
        self._check_thread()
        self.session.run_with_iobinding(binding, self._not_captured)

    def step(self, embeds: np.ndarray, total: int) -> np.ndarray:
        """Read an embedding [1, hidden] as the last of ``total`` tokens by the graph; the logits [vocab], float32.

        ONNX Runtime runs the first step several times to capture it, which writes the same keys and values again.
        Raises RequestError on another thread than the first.
        """
        self._check_thread()
        self._step.write(embeds, total)
        self.session.run_with_iobinding(self._step.binding, self._captured)
        return self._step.logits()

    def _check_thread(self) -> None:
        thread = threading.get_ident()
        if self._thread is None:
            self._thread = thread
        if self._thread != thread:
            raise RequestError(
                "a model with a CUDA graph was asked on a second thread, where ONNX Runtime cannot run it; ask it on "
                "one thread, or load it without cuda_graph"
            )


class GraphContext(OnnxContext):
    """A context whose tokens are read by the graph where they come one by one."""

    _decoder: GraphDecoder

    @property
    def cache_bytes(self) -> int:
        """As Context.cache_bytes: nothing, since the graph's KV cache stays when this goes."""
        return 0

    def append(self, embeds: np.ndarray) -> np.ndarray:
        """As Context.append."""
        if len(embeds) != 1:
            return super().append(embeds)
        check_append(self, 1)
        logits = self._decoder.step(embeds, self.length + 1)
        self.length += 1
        return logits


class _Step:
    """All that the captured step reads and writes, bound once."""

    def __init__(self, decoder: OnnxDecoder, capacity: int) -> None:
        self.cache = KVCache(decoder, capacity)
        self.binding = self.cache.bind(decoder.session)
        self._dtype = decoder.dtype
        self._positions = np.arange(capacity)[None]
        self._embeds = decoder.allocate((1, 1, decoder.hidden_size), decoder.dtype)
        self._mask = decoder.allocate((1, capacity), np.dtype(np.int64))
        self._logits = decoder.allocate((1, 1, decoder.vocab_size), decoder.logits_dtype)
        self.binding.bind_ortvalue_input("inputs_embeds", self._embeds)
        self.binding.bind_ortvalue_input("attention_mask", self._mask)
        self.binding.bind_ortvalue_output("logits", self._logits)

    def write(self, embeds: np.ndarray, total: int) -> None:
        self._embeds.update_inplace(np.ascontiguousarray(embeds[None], dtype=self._dtype))
        self._mask.update_inplace((self._positions < total).astype(np.int64))

    def logits(self) -> np.ndarray:
        logits: np.ndarray = self._logits.numpy()[0, 0].astype(np.float32)
        return logits


def _run_options(graph_id: int) -> RunOptions:
    options = import_onnxruntime().RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(graph_id))
    return options
