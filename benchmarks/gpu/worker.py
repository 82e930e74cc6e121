"""One process of ``benchmarks.gpu``: a random model with one kind of weights, measured in several ways.

    python -m benchmarks.gpu.worker JOB RESULTS

JOB is a Job in JSON; a line of JSON is appended to RESULTS as soon as a way is measured, so that what was measured is
there even where this process ends in native code. A way that failed has ``failure``, one line.

The memory of each stage is that of its first run; then come two runs that are not counted, and those that are. Prefill
is the token table's rows, the picture's features put among them, and the language model up to the first token. Answers
grow transformers' own cache, greedily, with nothing read back from the device before the end.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vz_edge
from benchmarks.gpu.configurations import ANSWER_TOKENS, PROMPT_TOKENS, Job
from benchmarks.gpu.gauge import GAUGES, Gauge
from benchmarks.make_checkpoint import model_of_shape, write_configs
from benchmarks.published_vision import published_features
from benchmarks.random_model import DTYPE, random_model, stock_processor
from vz_edge.budget import split_tokens
from vz_edge.device.process import one_line
from vz_edge.recipe import ModelSpec

TILES_PER_ROW = 2
WARM_UPS = 2
Features = Callable[[], Tensor]


@dataclass(frozen=True)
class Subject:
    """A model, its own processor, and a picture: ``pixel_values`` [1, 5, 3, s, s], ``image_sizes`` [1, 2]."""

    model: Any
    spec: ModelSpec
    processor: Any
    pixel_values: Tensor
    image_sizes: Tensor

    @classmethod
    def random(cls, job: Job) -> Subject:
        """Random weights and pixels. The image's size is a tensor on the device, as ``inputs.to(device)`` makes it."""
        spec = model_of_shape(job.shape)
        side = spec.tower.image_size
        with tempfile.TemporaryDirectory() as folder:
            write_configs(spec, Path(folder), "all")
            processor = stock_processor(spec, Path(folder))
        model = random_model(spec, job.bits, job.device)
        with torch.device(job.device):
            pixels = torch.randn(1, 1 + TILES_PER_ROW**2, 3, side, side, dtype=DTYPE)
            sizes = torch.tensor([[TILES_PER_ROW * side] * 2])
        return cls(model, spec, processor, pixels, sizes)

    @contextmanager
    def features(self, way: str, tokens: int | None) -> Iterator[Features]:
        """A function that gives the picture's features [tokens, hidden] in that way."""
        if way == "compress":
            vz_edge.compress(self.model, self.processor, tokens)
            yield self._transformers
            vz_edge.restore(self.model)
        elif way == "published":
            yield self._published(tokens)
        else:
            yield self._transformers

    def prompt(self, image_tokens: int) -> Tensor:
        """Token ids [1, n] with the picture's tokens in the middle of PROMPT_TOKENS others."""
        text = torch.randint(3, 256, (PROMPT_TOKENS,))
        image = torch.full((image_tokens,), self.spec.image_token_id)
        half = PROMPT_TOKENS // 2
        return torch.cat([text[:half], image, text[half:]])[None].to(self.pixel_values.device)

    def prefill(self, ids: Tensor, features: Tensor) -> tuple[Tensor, Any]:
        """The first token [1, 1], and the cache."""
        embeds = self.model.get_input_embeddings()(ids)
        embeds = embeds.masked_scatter((ids == self.spec.image_token_id).unsqueeze(-1), features)
        output = self.model(inputs_embeds=embeds, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1:].argmax(-1), output.past_key_values

    def step(self, token: Tensor, cache: Any) -> Tensor:
        """The token after ``token``; both are [1, 1]."""
        output = self.model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1:].argmax(-1)

    def _transformers(self) -> Tensor:
        output = self.model.get_image_features(self.pixel_values, image_sizes=self.image_sizes)
        return torch.cat(list(output.pooler_output))

    def _published(self, tokens: int | None) -> Features:
        """The tower keeps eager attention and a hook: the last way of a job."""
        assert tokens is not None
        inner = self.model.model
        inner.vision_tower.set_attn_implementation("eager")
        budget = split_tokens(tokens, self.spec.max_tiles, self.spec.tower.patches)
        features = published_features(inner.vision_tower, inner.multi_modal_projector, self.spec, budget)
        return lambda: features(self.pixel_values[0], TILES_PER_ROW)


def measure(job: Job) -> Iterator[dict[str, Any]]:
    """A mapping a way; on CUDA then one more for each whose prefill could be recorded as a CUDA graph."""
    gauge: Gauge = GAUGES[job.device]()
    try:
        gauge.begin_stage()
        memory = {"start": gauge.end_stage()}  # before a weight is there
        subject = Subject.random(job)
        memory["making"] = gauge.end_stage()
        gauge.release()
        gauge.begin_stage()
        memory["load"] = gauge.end_stage()
    except Exception as error:  # out of memory, or a package or a kernel that is missing
        yield from ({"way": way, "tokens": tokens, "failure": one_line(error)} for way, tokens in job.ways)
        return
    for way, tokens in job.ways:
        facts = {"way": way, "tokens": tokens, "device_name": gauge.device_name}
        yield facts | _result(partial(_measure_way, subject, gauge, way, tokens, job.runs, memory), "failure")
        gauge.release()
    # LLM.int8() asks the device which columns have outliers, which no graph can record.
    if job.device == "cuda" and job.bits != 8:
        for way, tokens in job.ways:
            if way != "published":
                facts = {"way": way, "tokens": tokens}
                yield facts | _result(partial(_measure_graph, subject, gauge, way, tokens, job.runs), "graph_failure")
                gauge.release()


def _result(run: Callable[[], dict[str, Any]], failure: str) -> dict[str, Any]:
    try:
        with torch.inference_mode():
            return run()
    except Exception as error:  # torch's out of memory, bitsandbytes' own: no common base class
        return {failure: one_line(error)}


def _measure_way(
    subject: Subject, gauge: Gauge, way: str, tokens: int | None, runs: int, before: dict[str, Any]
) -> dict[str, Any]:
    with subject.features(way, tokens) as features:
        memory, ids = _measure_memory(subject, gauge, features)
        rounds = [_time_to_first_token(subject, gauge, features, ids) for _ in range(WARM_UPS + runs)][WARM_UPS:]
        token, cache = subject.prefill(ids, features())
        marks = [gauge.mark()]
        for _ in range(ANSWER_TOKENS - 1):
            token = subject.step(token, cache)
            marks.append(gauge.mark())
    return {
        "image_tokens": ids.shape[1] - PROMPT_TOKENS,
        "memory": before | memory,
        "vision_sec": [vision for vision, _ in rounds],
        "prefill_sec": [prefill for _, prefill in rounds],
        "ttft_sec": [sum(one) for one in rounds],
        "decode_sec": gauge.seconds(marks),
    }


def _measure_memory(subject: Subject, gauge: Gauge, features: Features) -> tuple[dict[str, Any], Tensor]:
    """Memory by stage, and the prompt."""
    memory = {}
    gauge.begin_stage()
    found = features()
    memory["vision"] = gauge.end_stage()
    ids = subject.prompt(len(found))
    gauge.begin_stage()
    token, cache = subject.prefill(ids, found)
    memory["prefill"] = gauge.end_stage()
    del found
    gauge.begin_stage()
    for _ in range(ANSWER_TOKENS - 1):
        token = subject.step(token, cache)
    memory["decode"] = gauge.end_stage()
    return memory, ids


def _time_to_first_token(subject: Subject, gauge: Gauge, features: Features, ids: Tensor) -> list[float]:
    """Seconds of vision and of prefill."""
    marks = [gauge.mark()]
    found = features()
    marks.append(gauge.mark())
    subject.prefill(ids, found)
    marks.append(gauge.mark())
    return gauge.seconds(marks)


def _measure_graph(subject: Subject, gauge: Gauge, way: str, tokens: int | None, runs: int) -> dict[str, Any]:
    """Prefill again, recorded once and replayed as a CUDA graph: what it takes without the processor's launches.

    A prompt of some 200 tokens keeps a large card busy for less time than a processor needs to launch its kernels.
    """
    with subject.features(way, tokens) as features:
        found = features()
        ids = subject.prompt(len(found))
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what is made at first use must not be made while recording
            subject.prefill(ids, found)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            subject.prefill(ids, found)
        seconds = []
        for _ in range(WARM_UPS + runs):
            marks = [gauge.mark()]
            graph.replay()
            marks.append(gauge.mark())
            seconds += gauge.seconds(marks)
    return {"graph_prefill_sec": seconds[WARM_UPS:]}


def main() -> None:
    """Measure a job."""
    job = Job(**json.loads(sys.argv[1]))
    with Path(sys.argv[2]).open("a", encoding="utf-8") as results:
        for result in measure(job):
            results.write(json.dumps(result) + "\n")
            results.flush()


if __name__ == "__main__":
    main()
