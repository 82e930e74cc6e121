"""What stored weights cost a trained model: layers, perplexity, the next token, answers.

    python -m benchmarks.weights_quality

Two models in float32 on the CPU, each linear layer replaced by what a runtime would multiply with
(``stored_weights.py``): SmolLM2-135M-Instruct (``smollm2.py``) on documentation strings of Python's library, and the
embedded vz-demo on questions about easy-VQA's test pictures and generated scenes.

* error of a layer: ``||Wx - W'x|| / ||Wx||`` over the inputs that it has in the fp16 model
* perplexity: exp of the mean of ``-log p(token)`` in windows of 512 tokens; its change is the mean over tokens of the
  difference to fp16, with its standard error (the same tokens, so that the text's own spread falls out)
* same token: positions whose most likely next token is fp16's; same answer: greedy answers that are fp16's, word for
  word

Writes two reports: ``weights_quality`` and, by kind of layer, ``weights_quality_layers``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import smollm2
from benchmarks.demo_accuracy import LONGEST_ANSWER_TOKENS, Pictured, pictures
from benchmarks.report import REPORTS, Cell, Report, Samples
from benchmarks.stored_weights import (
    ALIKE,
    EXPORT,
    FP16,
    INT8,
    NF4,
    RANDOM,
    UNIFORM,
    Setting,
    Shapes,
    blocks,
    symmetric,
    weighted,
)
from training.scenes import make_scenes
from vz_edge import EdgeModel
from vz_edge.backends.transformers_decoder import TransformersDecoder
from vz_edge.bundle import MANIFEST
from vz_edge.device.vision import VisionResult
from vz_edge.host.bnb import linear_layers
from vz_edge.host.calibration import TEXT as CALIBRATION
from vz_edge.host.calibration import TEXT_TOKENS, calibration_embeds
from vz_edge.host.checkpoint import Checkpoint
from vz_edge.host.decoder_spec import decoder_config
from vz_edge.host.export import ExportRequest, SilentProgress, plan_export, write_bundle
from vz_edge.host.parity_picture import look
from vz_edge.profiling.environment import busy_percent
from vz_edge.recipe import DecoderSpec, load_recipe

TEXT = ("statistics", "difflib", "textwrap", "heapq", "random", "subprocess", "shutil", "tempfile")
# What forms weighted by inputs "alike" take mean squares of: text and pictures of the same kind, but other ones.
OTHER_TEXT = ("doctest", "logging", "configparser")
OTHER_WINDOWS, OTHER_SCENES, OTHER_SEED = 3, 6, 91_000
WINDOW_TOKENS = 512
INPUTS = 256  # positions at which the error of a layer is taken
SIZED = "llava-1.5-7b"  # whose layers the bits a weight are of: SmolLM2's would be padded to blocks of 128
HEAD = blocks(8, 128)
RTN_128 = blocks(4, 128)
SETTINGS = [
    Setting(FP16, FP16),
    Setting(INT8, FP16),
    Setting(blocks(8, 128), HEAD),
    Setting(NF4, FP16),
    *(Setting(blocks(4, size, method), HEAD) for method in ("rtn", "hqq") for size in (32, 64, 128)),
    *(Setting(symmetric(size), HEAD) for size in (32, 128)),
    Setting(RTN_128, FP16),
    Setting(RTN_128, RTN_128),
    *(Setting(RTN_128, HEAD, {kind: blocks(8, 128)}) for kind in ("v_proj", "down_proj")),
    *(Setting(weighted(size), HEAD) for size in (32, 64, 128)),
    Setting(weighted(128), weighted(128)),
    *(Setting(weighted(128, source), HEAD) for source in (ALIKE, RANDOM, UNIFORM)),
]
NOTES = (
    f"fp16 is what the GGUF file holds, whose layers are {smollm2.SOURCE}: compare rows, not with the perplexity of "
    "SmolLM2 as it was trained. Channels are shuffled, so that no block here is a block of the file.",
    "Weights alone: activations stay fp32 here. MatMulNBits rounds them to int8 at run time as the exporter sets it, "
    "LLM.int8() all but the outliers.",
    "Bits a weight are of LLaVA-1.5-7B's layers without lm_head, scales and zero points included. On the CPU scales, "
    "and layers that are not quantised, are fp32; on CUDA fp16.",
    "Most of SmolLM2's layers read 576 channels: four blocks of 128 and one of 64, which flatters the former a little.",
    "Weighted: each weight's error counts by the mean square of its input, taken on the exporter's own text (and, in "
    f"vz-demo, its picture). By inputs alike: on {OTHER_WINDOWS * WINDOW_TOKENS} other tokens of the same kind "
    f"({', '.join(OTHER_TEXT)}) and {OTHER_SCENES} other scenes. By nothing: all inputs count the same, so that only "
    "the error of the weights is lowered.",
    "Default: weighted at 4 bits. It takes neither bytes nor time on a device.",
    "Default: blocks of 128, for their speed on a processor (quantizers); smaller ones lose less and take more bytes.",
    "Default: lm_head at 8 bits, which costs nothing that shows here; 4 bits would cost a large part of what all other "
    "layers do together.",
    "vz-demo, which is trained for these questions, shows next to none of all this in its answers.",
)
LAYER_NOTES = (
    "Median over the layers of a kind and, in brackets, the smallest and the largest: change of a layer's output on "
    "the inputs that it has in the fp16 model.",
)
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")


class Replaceable:
    """The linear layers of a torch model: what they read and were, and their replacement."""

    def __init__(self, model: Any) -> None:
        self.model = model
        linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
        self._linears: dict[str, torch.nn.Linear] = linears
        self._original = {name: linear.weight.half() for name, linear in linears.items()}
        self._inputs: dict[str, torch.Tensor] = {}
        self._mean_squares = {UNIFORM: {name: torch.ones(linear.in_features) for name, linear in linears.items()}}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Remember what every layer reads first, to take errors at, for as long as the context lasts."""
        read: dict[str, list[torch.Tensor]] = {name: [] for name in self._linears}

        def remember(name: str, x: torch.Tensor) -> None:
            left = INPUTS - sum(map(len, read[name]))
            read[name].append(x[:left].clone())

        with self._watching(remember):
            yield
        self._inputs = {name: torch.cat(pieces) for name, pieces in read.items()}

    @contextmanager
    def weighing(self, source: str) -> Iterator[None]:
        """Take the mean squares of every layer's inputs, for forms that weigh by this ``source``."""
        squares = {name: torch.zeros(linear.in_features) for name, linear in self._linears.items()}
        positions = dict.fromkeys(self._linears, 0)

        def add(name: str, x: torch.Tensor) -> None:
            squares[name] += x.square().sum(0)
            positions[name] += len(x)

        with self._watching(add):
            yield
        self._mean_squares[source] = {name: total / positions[name] for name, total in squares.items()}

    @contextmanager
    def _watching(self, watch: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
        """Call ``watch`` with the name and the inputs [positions, in] of every layer that runs."""
        hooks = [
            linear.register_forward_pre_hook(lambda _, arguments, name=name: watch(name, arguments[0].flatten(0, -2)))
            for name, linear in self._linears.items()
        ]
        yield
        for hook in hooks:
            hook.remove()

    @torch.no_grad()  # and not inference_mode, which the quantisers' threads would not be in
    def replace(self, setting: Setting) -> None:
        """Give every layer the weights that ``setting`` leaves of it."""
        for name, linear in self._linears.items():
            form = setting.form(kind_of(name))
            mean_squares = self._mean_squares[form.source][name]
            linear.weight.copy_(form.restore(self._original[name].float(), mean_squares))

    @torch.inference_mode()
    def errors(self) -> dict[str, tuple[float, ...]]:
        """By kind of layer, the relative output error of each with its present weights."""
        found: dict[str, tuple[float, ...]] = {kind: () for kind in KINDS}
        for name, linear in self._linears.items():
            x, original = self._inputs[name], self._original[name].float()
            change = (x @ (linear.weight - original).T).norm() / (x @ original.T).norm()
            found[kind_of(name)] += (float(change),)
        return found


def kind_of(name: str) -> str:
    """The last part of a module's name."""
    return name.rpartition(".")[2]


@torch.inference_mode()
def read_text(model: Any, windows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``-log p`` of every token of ``windows`` [count, length] but the first, and the most likely one in its place."""
    losses, best = [], []
    for window in windows:
        logits = model(window[None], use_cache=False).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, window[1:], reduction="none"))
        best.append(logits.argmax(-1))
    return torch.cat(losses), torch.cat(best)


class Asked(NamedTuple):
    """An encoded picture and its questions as (question, answer, kind)."""

    picture: VisionResult
    questions: Sequence[tuple[str, str, str]]


class Demo:
    """vz-demo with a decoder in torch, and questions about pictures that went through its vision graph once.

    ``asked`` are those that count, ``others`` of scenes that are none of these; ``calibration`` [1, n, hidden] is what
    an export reads.
    """

    def __init__(self, work: Path, easy_vqa: int, scenes: int) -> None:
        folder = work / "vz-demo-320-16"
        plan = plan_export(ExportRequest("vz-demo", folder, bits=16, tokens="320", force=True))
        if not (folder / MANIFEST).exists():
            write_bundle(plan, SilentProgress())
        bundle = EdgeModel.load(folder)
        self.decoder = torch_decoder(plan.checkpoint, plan.model.decoder)
        seen = look(plan.checkpoint, plan.model, bundle.manifest.image, plan.budgets)
        self.calibration = calibration_embeds(plan.checkpoint, plan.model, bundle.chat.tokenizer, seen.patches)
        parts = (bundle.manifest, bundle.vision, bundle.chat, bundle.embedding)
        self._model = EdgeModel(*parts, TransformersDecoder(self.decoder), bundle.context_length, bundle.load_sec)
        self.asked = [self._seen(each) for each in pictures(easy_vqa, scenes, part=0, parts=1)]
        others = make_scenes(OTHER_SEED, OTHER_SCENES)
        self.others = [self._seen(Pictured(scene.image, scene.questions)) for scene in others]

    def _seen(self, pictured: Pictured) -> Asked:
        return Asked(self._model.encode(pictured.image), pictured.questions)

    def answers(self, asked: Sequence[Asked]) -> list[str]:
        """Greedy answers to all questions, with the decoder's present weights."""
        found = []
        for picture, questions in asked:
            texts = [question for question, _, _ in questions]
            replies = self._model.ask_many(picture, texts, max_new_tokens=LONGEST_ANSWER_TOKENS)
            found += [reply.text.strip() for reply in replies]
        return found


def torch_decoder(checkpoint: Checkpoint, spec: DecoderSpec) -> Any:
    """The checkpoint's language model as transformers', in float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(decoder_config(spec), dtype=torch.float32).eval()
    for name, parameter in model.requires_grad_(False).named_parameters():
        parameter.copy_(checkpoint.load(name.replace("model.", "language_model.", 1)))
    return model


@dataclass(frozen=True)
class Outcome:
    """What one setting gave: errors by kind of layer for each model, losses and best tokens, answers."""

    setting: Setting
    errors: dict[str, dict[str, tuple[float, ...]]]
    losses: torch.Tensor
    best: torch.Tensor
    answers: list[str]


@torch.inference_mode()
def weigh(text: Replaceable, tokenizer: Any, picture: Replaceable, demo: Demo) -> None:
    """Take the mean squares of what the layers of both models read, from every source."""
    ids = torch.tensor([tokenizer(CALIBRATION.read_text(encoding="utf-8"))["input_ids"][:TEXT_TOKENS]])
    with text.weighing(EXPORT):
        text.model(ids)
    with picture.weighing(EXPORT):
        picture.model(inputs_embeds=demo.calibration)
    with text.weighing(ALIKE):
        read_text(text.model, smollm2.windows(tokenizer, OTHER_TEXT, OTHER_WINDOWS, WINDOW_TOKENS))
    with picture.weighing(ALIKE):
        demo.answers(demo.others)
    generator = torch.Generator().manual_seed(OTHER_SEED)
    for model in (text, picture):
        with model.weighing(RANDOM):
            model.model(torch.randint(model.model.config.vocab_size, (1, TEXT_TOKENS), generator=generator))


def measure(
    text_model: Any, tokenizer: Any, windows: torch.Tensor, demo: Demo, settings: Sequence[Setting]
) -> list[Outcome]:
    """The outcome of each setting. What layers read is taken from the models as they are."""
    models = {"SmolLM2": Replaceable(text_model), "vz-demo": Replaceable(demo.decoder)}
    weigh(models["SmolLM2"], tokenizer, models["vz-demo"], demo)
    with models["SmolLM2"].recording():
        read_text(text_model, windows[: -(-INPUTS // windows.shape[1])])
    with models["vz-demo"].recording():
        demo.answers(demo.asked)
    outcomes = []
    for setting in settings:
        started = time.perf_counter()
        for model in models.values():
            model.replace(setting)
        errors = {name: model.errors() for name, model in models.items()}
        outcomes.append(Outcome(setting, errors, *read_text(text_model, windows), demo.answers(demo.asked)))
        perplexity, seconds = outcomes[-1].losses.mean().exp(), time.perf_counter() - started
        print(f"{setting.name}: perplexity {perplexity:.3f}, {seconds:.0f} s", file=sys.stderr, flush=True)
    return outcomes


def layer_shapes(recipe: str) -> dict[str, Shapes]:
    """(outputs, inputs) of the layers of a recipe's language model, by kind."""
    shapes: dict[str, Shapes] = {}
    for name, rows, columns, _ in linear_layers(load_recipe(recipe).model.decoder):
        shapes.setdefault(kind_of(name), []).append((rows, columns))
    return shapes


def row(outcome: Outcome, fp16: Outcome, asked: Sequence[Asked], shapes: dict[str, Shapes]) -> dict[str, Cell]:
    """One setting's cells."""
    setting = outcome.setting
    expected = [(answer, kind == "easy-VQA") for _, questions in asked for _, answer, kind in questions]
    right = [(found == answer, easy) for found, (answer, easy) in zip(outcome.answers, expected, strict=True)]
    same = [found == theirs for found, theirs in zip(outcome.answers, fp16.answers, strict=True)]
    return {
        "layers": setting.name,
        "lm_head": setting.lm_head.name,
        "bits a weight, CPU": f"{setting.bits_a_weight(shapes, 'cpu'):.2f}",
        "bits a weight, CUDA": f"{setting.bits_a_weight(shapes, 'cuda'):.2f}",
        "SmolLM2: error of a layer": f"{100 * middle_error(outcome.errors['SmolLM2']):.1f} %",
        "perplexity": f"{outcome.losses.mean().exp():.3f}",
        "change": change(outcome.losses, fp16.losses),
        "same token": f"{percent(outcome.best == fp16.best):.1f} %",
        "vz-demo: error of a layer": f"{100 * middle_error(outcome.errors['vz-demo']):.1f} %",
        "easy-VQA right": f"{percent([hit for hit, easy in right if easy]):.1f} %",
        "scenes right": f"{percent([hit for hit, easy in right if not easy]):.1f} %",
        "same answer": f"{percent(same):.1f} %",
    }


def middle_error(errors: dict[str, tuple[float, ...]]) -> float:
    """The median over all layers but lm_head."""
    return statistics.median(error for kind, found in errors.items() if kind != "lm_head" for error in found)


def change(losses: torch.Tensor, reference: torch.Tensor) -> str:
    """The change of the perplexity in percent, and its standard error."""
    difference = losses - reference
    deviation = difference.std() / len(difference) ** 0.5
    return f"{100 * difference.mean().expm1():+.1f} ± {100 * deviation:.1f} %"


def percent(hits: Any) -> float:
    """The share that is true."""
    return 100 * sum(map(bool, hits)) / len(hits)


def layer_rows(outcomes: list[Outcome]) -> list[dict[str, Cell]]:
    """A row a model and setting: median, smallest and largest error of each kind of layer."""
    return [
        {"model": model, "stored as": outcome.setting.name, "with lm_head as": outcome.setting.lm_head.name}
        | {
            kind.removesuffix("_proj"): Samples(tuple(100 * error for error in outcome.errors[model][kind]), "%")
            for kind in KINDS
        }
        for model in outcomes[0].errors
        for outcome in outcomes
    ]


def main() -> None:
    """Measure and write the two reports."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--windows", type=int, default=16, help=f"of {WINDOW_TOKENS} tokens of text")
    parser.add_argument("--easy-vqa", type=int, default=30, help="test pictures of easy-VQA")
    parser.add_argument("--scenes", type=int, default=40, help="scene pictures")
    parser.add_argument("--settings", type=int, default=len(SETTINGS), help="only the first ones, to try the script")
    parser.add_argument("--work", type=Path, default=Path("build/benchmarks"))
    parser.add_argument("--reports", type=Path, default=REPORTS)
    arguments = parser.parse_args()
    busy = busy_percent()
    demo = Demo(arguments.work, arguments.easy_vqa, arguments.scenes)
    model, tokenizer = smollm2.load(smollm2.checkpoint(arguments.work))
    windows = smollm2.windows(tokenizer, TEXT, arguments.windows, WINDOW_TOKENS)
    outcomes = measure(model, tokenizer, windows, demo, SETTINGS[: arguments.settings])
    scored = f"{len(outcomes[0].losses):,} tokens scored, {len(outcomes[0].answers):,} questions asked."
    shapes = layer_shapes(SIZED)
    rows = [row(outcome, outcomes[0], demo.asked, shapes) for outcome in outcomes]
    title = "Stored weights: what they cost trained models"
    Report("weights_quality", title, busy, (scored, *NOTES), rows).write(arguments.reports)
    title = "Stored weights: the error of every kind of layer"
    Report("weights_quality_layers", title, busy, LAYER_NOTES, layer_rows(outcomes)).write(arguments.reports)


if __name__ == "__main__":
    main()
