"""What a GPU says of every promise that is made of it, in eight minutes, the most valuable stages first.

    python -m benchmarks.gpu.truth --out build/reports/h100                      # all of it
    python -m benchmarks.gpu.truth --out build/reports/h100 --only headline plan # some stages
    python -m benchmarks.gpu.truth --out build/rehearsal --shape tiny --device cpu   # a rehearsal without a GPU

Each stage runs in a process of its own with a time box of its own (stage.py), and writes ``<out>/<stage>.json`` while
it goes; ``<out>/truth.md`` has a line and the tables of every stage that has ended, and is written anew after each. A
stage that fails or runs out of time is a line that says why, and the next one starts. Time that a stage leaves over
is the later ones'. Nothing is downloaded; models are random and have the true shapes (random_bundle.py), but for
vz-demo.

The exit status is 0 where every stage is done, 1 where one is not.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, get_args

from benchmarks.gpu.stage import Device, Settings, Shape, Stage, run_stage
from benchmarks.report import PACKAGES, command_line
from vz_edge.profiling.environment import environment
from vz_edge.profiling.run_table import digits

STAGES = (
    Stage("versions", "Environment: what is here, and does it compute", 60),
    Stage("same_answers", "The same answers on the GPU as on the processor", 110),
    Stage("headline", "13B at 320 tokens beside 7B", 200),
    Stage("plan", "Predicted beside measured", 20),
    Stage("operators", "Where the time goes", 70),
    Stage("in_transformers", "transformers and bitsandbytes", 150),
    Stage("blocks", "Block sizes, ONNX Runtime's options, bfloat16", 120),
)
MORE_PACKAGES = ("onnxruntime-gpu", "onnxscript", "tokenizers", "pillow", "nvidia-ml-py")
OVERVIEW = "truth.md"
LEAST_BOX_SEC = 5.0  # with less left, a stage is not begun


def run(stages: Sequence[Stage], settings: Settings, minutes: float) -> dict[str, dict[str, Any]]:
    """Run the stages in turn, each within its box and all within ``minutes``; what each wrote down, by name."""
    end = time.monotonic() + 60 * minutes
    found: dict[str, dict[str, Any]] = {}
    for stage in stages:
        left_sec = end - time.monotonic()
        print(f"{stage.name}: at most {min(stage.box_sec, max(left_sec, 0)):.0f} s", flush=True)
        if left_sec < LEAST_BOX_SEC:
            found[stage.name] = {"state": "out of time", "why": f"not begun: the {minutes:g} minutes were over"}
        else:
            found[stage.name] = run_stage(stage, settings, min(stage.box_sec, left_sec))
        Path(settings.out, OVERVIEW).write_text(overview(stages, found), encoding="utf-8")
        print(_overview_row(stage, found[stage.name]), flush=True)
    return found


def overview(stages: Sequence[Stage], found: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: where it ran, a line per stage that has ended, then their tables."""
    machine = environment((*PACKAGES, *MORE_PACKAGES))
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    lines = ["# The GPU's truth", "", f"`{command_line()}`, {date.today().isoformat()}", ""]
    lines += [f"{', '.join(machine.gpus) or 'no GPU'}; {machine.cpu}, {machine.cores} cores, "]
    lines[-1] += f"{machine.memory_gb} GB of memory, {machine.system}; {versions}"
    lines += ["", *_table(("stage", "state", "time", "in a line"), [])]
    ended = [stage for stage in stages if stage.name in found]
    lines += [_overview_row(stage, found[stage.name]) for stage in ended]
    for stage in ended:
        lines += _section(stage, found[stage.name])
    return "\n".join(lines) + "\n"


def _overview_row(stage: Stage, result: Mapping[str, Any]) -> str:
    state = result["state"] + (f": {result['why']}" if result.get("why") else "")
    return _row([stage.name, state, f"{result.get('wall_sec', 0):g} s", result.get("line") or "–"])


def _section(stage: Stage, result: Mapping[str, Any]) -> list[str]:
    lines = ["", f"## {stage.title}", ""]
    for table in result.get("tables", ()):
        columns = list(dict.fromkeys(column for row in table["rows"] for column in row))
        columns.sort(key="failed".__eq__)  # the last one
        rows = [[row.get(column, "–") for column in columns] for row in table["rows"]]
        lines += [f"**{table['title']}**", "", *_table(columns, rows), ""]
    if result.get("bars"):
        bars = [
            [
                bar["what"],
                f"{digits(bar['value'])} {bar['unit']}",
                f"{'at most' if bar['relation'] == '<=' else 'at least'} {bar['limit']:g} {bar['unit']}",
                "yes" if bar["met"] else "**no**",
            ]
            for bar in result["bars"]
        ]
        lines += [*_table(("bar", "measured", "limit", "met"), bars), ""]
    for block in result.get("blocks", ()):
        lines += [f"**{block['title']}**", "", "```yaml", block["text"].rstrip(), "```", ""]
    return lines + [f"- {note}" for note in result.get("notes", ())]


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [_row(columns), _row(["---"] * len(columns)), *map(_row, rows)]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |"


def main() -> None:
    """Run the stages and print the overview."""
    names = [stage.name for stage in STAGES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the reports")
    parser.add_argument("--minutes", type=float, default=8.0, help="of all stages together")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="STAGE", help=", ".join(names))
    parser.add_argument("--shape", choices=get_args(Shape), default="true", help="tiny: small models, for a rehearsal")
    parser.add_argument("--device", choices=get_args(Device), default="cuda")
    parser.add_argument("--work", type=Path, default=Path("build/benchmarks/gpu"), help="where bundles are made")
    arguments = parser.parse_args()
    if arguments.minutes <= 0:
        parser.error(f"--minutes {arguments.minutes:g} leaves no time; expected more than 0")
    chosen = [stage for stage in STAGES if stage.name in arguments.only]
    for folder in (arguments.out, arguments.work):
        folder.mkdir(parents=True, exist_ok=True)
    settings = Settings(arguments.device, arguments.shape, str(arguments.out), str(arguments.work))
    found = run(chosen, settings, arguments.minutes)
    print(Path(arguments.out, OVERVIEW).read_text(encoding="utf-8"), flush=True)
    sys.exit(0 if all(result["state"] == "done" for result in found.values()) else 1)


if __name__ == "__main__":
    main()
