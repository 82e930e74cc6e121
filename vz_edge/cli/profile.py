"""``vz-edge profile``: measure bundles on this machine, beside each other, a prediction and an earlier measurement."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from vz_edge.profiling.run import RunPlan
    from vz_edge.profiling.run_report import RunReport

STATUS_WORSE = 1


def command(
    bundles: Annotated[list[Path], typer.Argument(help="Folders written by 'vz-edge export'.")],
    runs: Annotated[int, typer.Option(help="Runs of each bundle, after one that warms up.")] = 5,
    answer_tokens: Annotated[int, typer.Option(help="Tokens of each answer; stop tokens are ignored.")] = 64,
    size: Annotated[
        str | None, typer.Option(help="The picture, WIDTHxHEIGHT in pixels. Default: one that gives the most tiles.")
    ] = None,
    provider: Annotated[
        list[str] | None, typer.Option(help="cpu, cuda or a provider of ONNX Runtime's; default: what fits the bundle.")
    ] = None,
    device_id: Annotated[int | None, typer.Option(help="The number of the GPU, as CUDA counts; default: 0.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads; default: the physical cores.")] = None,
    release_memory: Annotated[
        bool | None,
        typer.Option(
            "--release-memory/--keep-memory",
            help="As for 'vz-edge run'; what --device predicts of memory is with --release-memory.",
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="A device's name, 'this' or a profile's .yaml: puts its prediction beside.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all that was measured as JSON.")] = None,
    html_file: Annotated[Path | None, typer.Option("--html", help="Write a page with tables and bars.")] = None,
    baseline: Annotated[
        Path | None, typer.Option(help="Compare with an earlier --json of the same bundles on the same hardware.")
    ] = None,
    fail_above: Annotated[
        str, typer.Option(help="With --baseline: end with status 1 where something is worse by more than this.")
    ] = "10%",
) -> None:
    """Measure bundles: time to first token by stage, decode rate and memory, in interleaved runs.

    Ends with status 1 where --baseline was given and a median is worse than it by more than --fail-above.
    """
    from vz_edge.cli.output_file import write_text
    from vz_edge.cli.planned import planned_device
    from vz_edge.profiling.baseline import check_comparable, parse_share, regressions
    from vz_edge.profiling.beside import predict_bundle, with_predictions
    from vz_edge.profiling.run import RunOptions, plan_run
    from vz_edge.profiling.run_page import page
    from vz_edge.profiling.run_report import read_report, to_json

    limit = parse_share(fail_above)
    earlier = read_report(baseline) if baseline else None
    profile = planned_device(device) if device else None
    _check_folders(json_file, html_file)
    chosen = tuple(provider) if provider else None
    options = RunOptions(runs, answer_tokens, _parse_size(size), chosen, threads, device_id, release_memory)
    plan = plan_run(bundles, options)
    if earlier and baseline:
        identities = [bundle.identity for bundle in plan.bundles]
        check_comparable(baseline, earlier, plan.settings, plan.environment, identities)
    if profile:
        for bundle in plan.bundles:  # what it cannot predict is said before minutes are spent
            predict_bundle(bundle, answer_tokens, profile)
    report = _measure(plan)
    if profile:
        report = with_predictions(report, plan, profile)
    if json_file:
        write_text(json_file, to_json(report))
    if html_file:
        write_text(html_file, page(report))
    _print(report)
    worse = regressions(earlier, report, limit) if earlier else []
    for line in worse:
        print(f"worse than {baseline}: {line}", file=sys.stderr)
    if worse:
        raise typer.Exit(STATUS_WORSE)


def _measure(plan: RunPlan) -> RunReport:
    """Measure with a bar on stderr, so that the table can be piped on."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from vz_edge.cli.verbosity import is_quiet
    from vz_edge.profiling.run import measure, steps

    columns = (BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True, quiet=is_quiet()), transient=True) as bar:
        task = bar.add_task("is the machine idle?", total=steps(plan))
        started = 0

        def progress(what: str) -> None:
            nonlocal started
            bar.update(task, description=what, completed=started)  # the step before this one is done
            started += 1

        return measure(plan, progress)


def _print(report: RunReport) -> None:
    from rich.console import Console
    from rich.text import Text

    from vz_edge.profiling.run_table import title

    console = Console(highlight=False)
    machine, settings = report.environment, report.settings
    where = ", ".join([machine.cpu, *machine.gpus, *filter(None, [machine.board, machine.power_mode])])
    console.print(f"{where}; {settings.threads} threads; {machine.memory_gb:g} GB of memory")
    console.print(
        f"a picture of {settings.picture_size[0]}x{settings.picture_size[1]}, {settings.answer_tokens} answer tokens; "
        f"medians of {report.runs} run(s), spread in brackets"
    )
    for number, run in enumerate(report.bundles):
        console.print()
        console.print(Text(title(run), style="bold"))
        if number:
            console.print("ratio: measured, against the first bundle")
        if run.predicted:
            console.print(f"predicted: for {run.predicted.device}; of that: what was measured, in units of it")
        console.print(_table(report, number))
    for run in report.bundles:
        cached = "not known" if run.cached_share is None else f"{run.cached_share:.0%}"
        notes = "".join(f"; {note}" for note in run.notes)
        console.print(f"{run.bundle}: in the page cache when loading began: {cached}{notes}", markup=False)
    if report.tegrastats_peak_bytes is not None:
        console.print(f"whole system, by tegrastats: {report.tegrastats_peak_bytes / 1e9:.2f} GB at most")
    for note in report.notes:
        console.print(note, markup=False)
    for warning in report.warnings:
        console.print(Text(f"disturbed: {warning}", style="bold red"))


def _table(report: RunReport, number: int) -> Table:
    """What was measured of one bundle, with the first bundle and the prediction beside; within 80 columns."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from vz_edge.profiling.run_table import rows

    predicted = report.bundles[number].predicted
    columns = ["measured", *(["ratio"] if number else []), *(["predicted", "of that"] if predicted else [])]
    table = Table("", *columns, box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows(report):
        cell = row.cells[number]
        cells = [Text(f"! {cell.measured}", style="bold red") if cell.disturbed else Text(cell.measured)]
        cells += [Text(cell.ratio)] if number else []
        cells += [Text(cell.predicted), Text(cell.of_predicted)] if predicted else []
        table.add_row(row.label, *cells)
    return table


def _parse_size(text: str | None) -> tuple[int, int] | None:
    from vz_edge.errors import RequestError

    if text is None:
        return None
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise RequestError(f"--size {text}: expected WIDTHxHEIGHT in pixels, such as 1280x720")
    return int(match[1]), int(match[2])


def _check_folders(*files: Path | None) -> None:
    """What is to be written has a place, known before minutes are spent."""
    from vz_edge.errors import RequestError

    for file in files:
        if file is not None and (file.is_dir() or not file.absolute().parent.is_dir()):
            what = "is a folder" if file.is_dir() else f"lies in {file.parent}, which does not exist"
            raise RequestError(f"{file} {what}; name a file in a folder that is there")
