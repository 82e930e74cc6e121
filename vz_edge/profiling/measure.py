"""The process that is measured: loads one bundle, then answers a fixed question about a picture of noise, in rounds.

    python -m vz_edge.profiling.measure BUNDLE --threads 4 --metered CPUExecutionProvider

is started by ``vz_edge.profiling.run`` and spoken to in lines of JSON (vz_edge.profiling.processes). An answer is
greedy and has exactly the number of tokens asked for: stop tokens are ignored.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vz_edge.device.model import EdgeModel
from vz_edge.device.prompt import messages_of
from vz_edge.device.runtime import on_device
from vz_edge.errors import ContextLengthError
from vz_edge.profiling.meter import MemoryMeter
from vz_edge.profiling.process_memory import cached_share
from vz_edge.profiling.processes import serve

QUESTION = "What is in this picture, and what is to the left of it?"
PICTURE_SEED = 0


def prepare(
    folder: Path,
    metered: str,
    providers: Sequence[str] | None,
    threads: int,
    device_id: int | None = None,
    release_memory: bool | None = None,
) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Load the bundle; the returned function answers ``{"what": "load"}`` and ``{"what": "round", ...}``.

    ``metered`` is ONNX Runtime's name of the processor whose memory is read; ``device_id`` is the ``device`` of
    ``EdgeModel.load``, the rest is as there.
    """
    meter = MemoryMeter(on_device(metered, device_id))
    cached = cached_share(path for path in sorted(folder.rglob("*")) if path.is_file())
    meter.begin_turn()
    model = EdgeModel.load(
        folder, providers=providers, threads=threads, device=device_id, release_memory=release_memory
    )
    loaded = {"load_sec": model.load_sec, "cached_share": cached, "memory": {"load": meter.end_stage()}}

    def handle(request: dict[str, Any]) -> dict[str, Any]:
        if request["what"] == "load":
            return loaded
        meter.begin_turn()
        return {**answer(model, meter, tuple(request["size"]), request["answer_tokens"]), "notes": meter.notes}

    return handle


def answer(model: EdgeModel, meter: MemoryMeter, size: tuple[int, int], answer_tokens: int) -> dict[str, Any]:
    """One round: look, read, write ``answer_tokens`` tokens; seconds and memory (bytes by kind) of each stage.

    ``size`` is the picture's (width, height) in pixels. Prefill holds what is between the picture's features and the
    choice of the first token: embeddings, a new KV cache, the decoder's pass. Raises ContextLengthError.
    """
    picture = np.random.default_rng(PICTURE_SEED).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    ids = model.chat.ids(messages_of(QUESTION, 1))
    memory = {}

    meter.begin_stage()
    started = time.perf_counter()
    tiles = model.vision.tile(picture)
    tiled = time.perf_counter()
    features = model.vision.encode(tiles).features
    vision_sec = time.perf_counter() - tiled
    memory["picture"] = meter.end_stage()

    prompt_tokens = len(ids) - 1
    capacity = prompt_tokens + len(features) + answer_tokens
    if capacity > model.context_length:
        raise ContextLengthError(
            f"{prompt_tokens} prompt tokens, {len(features)} image tokens and {answer_tokens} answer tokens do not fit "
            f"the context of {model.context_length}; lower --answer-tokens or take a smaller --size"
        )
    meter.begin_stage()
    prefill_started = time.perf_counter()
    context = model.decoder.start(capacity)
    logits = context.append(model.embedding.place(ids, model.chat.image_token_id, [features]))
    token_id = int(logits.argmax())
    prefill_sec = time.perf_counter() - prefill_started
    memory["prefill"] = meter.end_stage()

    meter.begin_stage()
    decode_started = time.perf_counter()
    for _ in range(answer_tokens - 1):
        token_id = int(context.append(model.embedding.rows([token_id])).argmax())
    decode_sec = time.perf_counter() - decode_started
    memory["decode"] = meter.end_stage()

    return {
        "tiles": len(tiles.pixel_values),
        "image_tokens": len(features),
        "prompt_tokens": prompt_tokens,
        "preprocess_sec": tiled - started,
        "vision_sec": vision_sec,
        "prefill_sec": prefill_sec,
        "decode_sec": decode_sec,
        "memory": memory,
    }


def main() -> None:
    """Be the process that is measured."""
    parser = argparse.ArgumentParser(description="Measure one bundle; spoken to in JSON lines.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--metered", required=True)
    parser.add_argument("--providers", nargs="+")
    parser.add_argument("--device-id", type=int)
    parser.add_argument("--release-memory", action="store_true", default=None)
    parser.add_argument("--keep-memory", action="store_false", dest="release_memory", default=None)
    given = parser.parse_args()
    options = (given.threads, given.device_id, given.release_memory)
    serve(lambda: prepare(given.bundle, given.metered, given.providers, *options))


if __name__ == "__main__":
    main()
