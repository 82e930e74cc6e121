"""A decoder graph run by hand: prefill and steps with everything bound once, in any precision, on any device.

The device side knows float32 and float16 and copies embeddings to the device at every step. What the stages "operators"
and "blocks" ask is what the graph itself costs, so here its inputs lie on the device, whatever their type.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import onnx_ir as ir

from vz_edge.device.cuda_graph import CAPTURED, NOT_CAPTURED
from vz_edge.device.onnx_decoder import PAST, PRESENT
from vz_edge.device.runtime import CUDA, import_onnxruntime

ONNX_TYPES = {"tensor(float)": ir.DataType.FLOAT, "tensor(float16)": ir.DataType.FLOAT16}
ONNX_TYPES["tensor(bfloat16)"] = ir.DataType.BFLOAT16


class BareDecoder:
    """A session of a decoder graph with a KV cache of ``capacity`` tokens, which holds numbers that mean nothing."""

    def __init__(self, session: Any, capacity: int) -> None:
        self._session = session
        self._device = "cuda" if session.get_providers()[0] == CUDA else "cpu"
        self._capacity = capacity
        self._inputs = {value.name: value for value in session.get_inputs()}
        self._caches = {
            name.removeprefix(PAST): self._tensor(value.type, (1, int(value.shape[1]), capacity, int(value.shape[3])))
            for name, value in self._inputs.items()
            if name.startswith(PAST)
        }
        self._hidden = int(self._inputs["inputs_embeds"].shape[2])

    def prefill_sec(self, tokens: int) -> float:
        """Seconds to read a prompt of so many tokens into an empty cache."""
        binding = self._bind(tokens, tokens)
        started = time.perf_counter()
        self._run(binding, NOT_CAPTURED)
        return time.perf_counter() - started

    def steps_sec(self, past: int, steps: int, graph: bool = False) -> list[float]:
        """Seconds of each of ``steps`` tokens after ``past`` others; by a CUDA graph the mask has its whole length."""
        binding = self._bind(1, past + 1, self._capacity if graph else None)
        found = []
        for _ in range(steps):
            started = time.perf_counter()
            self._run(binding, CAPTURED if graph else NOT_CAPTURED)
            found.append(time.perf_counter() - started)
        return found

    def _run(self, binding: Any, graph_id: int) -> None:
        options = import_onnxruntime().RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(graph_id))
        self._session.run_with_iobinding(binding, options)

    def _bind(self, new: int, total: int, mask_length: int | None = None) -> Any:
        """Inputs of ``new`` tokens, the last of ``total``, on the device, and outputs there."""
        from onnxruntime import OrtValue

        binding = self._session.io_binding()
        embeds = self._embeds(new)
        mask = (np.arange(mask_length or total) < total).astype(np.int64)[None]
        binding.bind_ortvalue_input("inputs_embeds", embeds)
        binding.bind_ortvalue_input("attention_mask", OrtValue.ortvalue_from_numpy(mask, self._device, 0))
        logits = next(value for value in self._session.get_outputs() if value.name == "logits")
        output = self._tensor(logits.type, (1, 1, int(logits.shape[2])))
        binding.bind_ortvalue_output("logits", output)
        for name, cache in self._caches.items():
            binding.bind_ortvalue_input(PAST + name, cache)
            binding.bind_ortvalue_output(PRESENT + name, cache)
        return binding

    def _embeds(self, tokens: int) -> Any:
        """Small random embeddings [1, tokens, hidden] in the graph's precision, on the device."""
        from onnxruntime import OrtValue

        numbers = 0.02 * np.random.default_rng(0).standard_normal((1, tokens, self._hidden), dtype=np.float32)
        kind = ONNX_TYPES[self._inputs["inputs_embeds"].type]
        stored = ir.tensor(numbers.astype(kind.numpy()), dtype=kind).numpy()
        if kind != ir.DataType.BFLOAT16:
            return OrtValue.ortvalue_from_numpy(stored, self._device, 0)
        value = self._tensor("tensor(bfloat16)", stored.shape)
        value.update_inplace(stored.view(np.uint16))
        return value

    def _tensor(self, kind: str, shape: tuple[int, ...]) -> Any:
        from onnxruntime import OrtValue

        return OrtValue.ortvalue_from_shape_and_type(shape, int(ONNX_TYPES[kind]), self._device, 0)
