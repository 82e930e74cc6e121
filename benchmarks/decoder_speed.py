"""Prefill and decode of a 1B-shaped decoder on the CPU, beside llama.cpp.

    python -m benchmarks.decoder_speed

Same shape (0.94 B Llama, 2048 wide, 16 layers), same number of threads, greedy, interleaved rounds of a prefill of
384 tokens and a decode of 64 more. Where a process's weights happen to lie in memory moves its decoding by a tenth for
as long as it lives, so every rival is started anew several times:

* the device side's OnnxDecoder on the decoder.onnx that ``vz-edge export --bits 4`` writes (with ``--quantizer rtn``
  where the bundle is made for this: how weights were rounded changes no speed)
* llama.cpp through llama-cpp-python, Q4_0, with and without flash attention (see llama_cpp_model.py)
* stock ONNX Runtime GenAI on the very same bundle: after a first turn with a picture, which is not timed, a turn
  of 384 text tokens

Both llama.cpp and llama-cpp-python must be built for the processor at hand (``pip install`` does that).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks import bundles
from benchmarks.llama_cpp_model import random_ids, write_gguf
from benchmarks.make_checkpoint import model_of_shape
from benchmarks.report import REPORTS, Bar, Cell, Report, Samples
from vz_edge.bundle import read_manifest
from vz_edge.profiling.environment import busy_percent
from vz_edge.profiling.processes import interleave, serve, workers

OURS, GENAI = "vz-edge Decoder, 4 bits", "ONNX Runtime GenAI, same bundle"
LLAMA, LLAMA_FLASH = "llama.cpp Q4_0", "llama.cpp Q4_0, flash attention"
PROMPT_TOKENS, ANSWER_TOKENS, CAPACITY_TOKENS = 384, 64, 1024
LEAST_PREFILL, LEAST_DECODE = 1.25, 1.15


def prepare_ours(bundle: Path, threads: int) -> Callable[[dict], dict]:
    """Load our decoder; the returned function prefills and decodes as ``llama_cpp_model.prepare``'s does."""
    from vz_edge.device.embedding import EmbeddingTable
    from vz_edge.device.onnx_decoder import OnnxDecoder

    decoder = OnnxDecoder.open(bundle, ["CPUExecutionProvider"], threads)
    table = EmbeddingTable(bundle / "embedding.data", decoder.hidden_size, decoder.dtype)
    context = decoder.start(CAPACITY_TOKENS)

    def measure(request: dict) -> dict:
        prompt = random_ids(decoder.vocab_size, request["prompt_tokens"])
        context.rewind(0)
        start = time.perf_counter()
        token = int(context.append(table.rows(prompt)).argmax())
        prefilled = time.perf_counter()
        for _ in range(request["answer_tokens"]):
            token = int(context.append(table.rows([token])).argmax())
        return {"prefill_sec": prefilled - start, "decode_sec": time.perf_counter() - prefilled}

    return measure


def prepare_genai(bundle: Path, threads: int) -> Callable[[dict], dict]:
    """Load the bundle in stock GenAI; the returned function measures a text turn that follows a picture's."""
    import onnxruntime_genai as og

    manifest = read_manifest(bundle)
    spec, budget = manifest.model, manifest.budget
    assert budget is not None
    sessions = {part: {"session_options": {"intra_op_num_threads": threads}} for part in ("decoder", "embedding")}
    config = og.Config(str(bundle))
    config.overlay(json.dumps({"model": sessions}))
    genai = og.Model(config)
    picture_tokens = budget.per_tile + 1  # a picture of one tile gets the newline token, too
    pixels = np.zeros((1, 3, spec.tower.image_size, spec.tower.image_size), np.float32)
    turn = og.NamedTensors()
    turn["pixel_values"] = og.Tensor(pixels)
    turn["grid_width"] = og.Tensor(np.array([1]))
    turn["num_image_tokens"] = og.Tensor(np.array([picture_tokens]))
    turn["input_ids"] = og.Tensor(np.array([[1, *[spec.image_token_id] * picture_tokens]], dtype=np.int32))

    def measure(request: dict) -> dict:
        parameters = og.GeneratorParams(genai)
        parameters.set_search_options(max_length=CAPACITY_TOKENS)
        generator = og.Generator(genai, parameters)
        generator.set_inputs(turn)
        generator.generate_next_token()
        generator.get_logits()  # the token just chosen enters the cache with this
        prompt = np.array([random_ids(spec.decoder.vocab_size, request["prompt_tokens"])], dtype=np.int32)
        start = time.perf_counter()
        generator.append_tokens(prompt)
        generator.generate_next_token()
        prefilled = time.perf_counter()
        for _ in range(request["answer_tokens"]):
            generator.generate_next_token()
        return {"prefill_sec": prefilled - start, "decode_sec": time.perf_counter() - prefilled}

    return measure


def measure(shape: str, threads: int, work: Path, processes: int, rounds: int, request: dict) -> dict[str, list[dict]]:
    """Answers of every rival, by name."""
    bundle = bundles.bundle(shape, "cpu", work)
    gguf = work / f"{shape}-q4_0.gguf"
    write_gguf(gguf, model_of_shape(shape).decoder)
    options = ["--threads", str(threads)]
    ours = [sys.executable, "-m", "benchmarks.decoder_speed", *options, "--bundle", str(bundle), "--worker"]
    llama = [sys.executable, "-m", "benchmarks.llama_cpp_model", *options, str(gguf)]
    commands = {
        OURS: [*ours, "ours"],
        LLAMA: llama,
        LLAMA_FLASH: [*llama, "--flash-attention"],
        GENAI: [*ours, "genai"],
    }
    answers: dict[str, list[dict]] = {name: [] for name in commands}
    for _ in range(processes):
        with workers(commands, threads) as rivals:
            for name, given in interleave(rivals, request, rounds).items():
                answers[name] += given
    return answers


def report(
    shape: str, threads: int, processes: int, answers: dict[str, list[dict]], request: dict, busy: float
) -> Report:
    """Rates and ratios."""
    rates = {
        name: {
            phase: Samples(tuple(request[f"{count}_tokens"] / answer[f"{phase}_sec"] for answer in given), "tokens/s")
            for phase, count in (("prefill", "prompt"), ("decode", "answer"))
        }
        for name, given in answers.items()
    }
    rows: list[dict[str, Cell]] = [{"rival": name, **phases} for name, phases in rates.items()]
    bars = []
    for phase, least in (("prefill", LEAST_PREFILL), ("decode", LEAST_DECODE)):
        best = max((LLAMA, LLAMA_FLASH), key=lambda name, phase=phase: rates[name][phase].median)  # type: ignore[misc]
        ratio = rates[OURS][phase].median / rates[best][phase].median
        bars.append(Bar(f"{phase}, ours / {best}", ratio, ">=", least, "x"))
    return Report(
        name="decoder_speed",
        title=f"Decoder of shape {shape} on the CPU: prefill of {request['prompt_tokens']} tokens, then decode",
        busy_percent=busy,
        notes=[
            f"{threads} threads, random weights, greedy, {len(answers[OURS])} samples in interleaved rounds; "
            f"each rival was started {processes} times.",
            "Ours: 4 bits in blocks of 128, lm_head at the export's default of 8 bits. llama.cpp's Q4_0: 4 bits in "
            "blocks of 32, output matrix Q6_K, as llama-quantize writes it. The bars take the faster of its two rows.",
            "GenAI's row is a turn of text after a turn with one picture, so its context is longer by that picture.",
        ],
        rows=rows,
        bars=bars if shape == "1b" else (),
        settings={"threads": threads, "shape": shape, **request},
    )


def main() -> None:
    """Parse the command line; measure, or be one of the rivals."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="1b", help="1b or tiny")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--processes", type=int, default=6, help="of each rival, one after the other")
    parser.add_argument("--rounds", type=int, default=2, help="in each process")
    parser.add_argument("--work", type=Path, default=bundles.WORK)
    parser.add_argument("--reports", type=Path, default=REPORTS)
    parser.add_argument("--worker", choices=("ours", "genai"), help=argparse.SUPPRESS)
    parser.add_argument("--bundle", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        prepare = {"ours": prepare_ours, "genai": prepare_genai}[arguments.worker]
        serve(lambda: prepare(arguments.bundle, arguments.threads))
        return
    request = {"prompt_tokens": PROMPT_TOKENS, "answer_tokens": ANSWER_TOKENS}
    busy = busy_percent()
    processes = arguments.processes
    answers = measure(arguments.shape, arguments.threads, arguments.work, processes, arguments.rounds, request)
    report(arguments.shape, arguments.threads, processes, answers, request, busy).write(arguments.reports)


if __name__ == "__main__":
    main()
