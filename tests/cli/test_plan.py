"""``vz-edge plan``, and the memory plan of ``vz-edge inspect``, as a person meets them."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.cli.test_cli import vz_edge
from tests.device import standin
from vz_edge.bundle import bitsandbytes_weights
from vz_edge.cli import app
from vz_edge.cli.plan import command
from vz_edge.planning.devices import device_names
from vz_edge.planning.plan import Asked
from vz_edge.recipe import data_folder


def rows_of(stdout: str) -> list[list[str]]:
    """The words of the table's lines that begin with a device's name."""
    lines = [line.split() for line in stdout.splitlines()]
    return [words for words in lines if words and words[0] in device_names()]


def test_by_default_there_is_one_table_of_80_columns_with_a_row_per_device() -> None:
    done = CliRunner().invoke(app, ["plan"], env={"COLUMNS": "80"})
    assert done.exit_code == 0, done.output
    assert max(map(len, done.stdout.splitlines())) <= 80 and "…" not in done.stdout
    rows = rows_of(done.stdout)
    assert sorted(row[0] for row in rows) == device_names()
    assert all(len(row) == 2 + 2 * 4 for row in rows)  # nothing is wrapped: of each of the two models four figures
    planned = json.loads(vz_edge("plan", "--json").stdout)["rows"]
    for row in rows:
        for cells, found in zip((row[2:6], row[6:]), [f for f in planned if f["device"] == row[0]], strict=True):
            assert cells[0] == f"{found['peak_bytes'] / 1e9:.1f}"
            assert cells[1] == {"fits": "yes", "fits with less context": "less", "does not fit": "no"}[found["fit"]]
            assert (cells[2] == "-") == (cells[1] == "no")
    assert "A beats the vanilla 7B on " in done.stdout and "The vanilla 7B fits on " in done.stdout


def test_more_candidates_than_two_have_a_row_each() -> None:
    asked = ["--bits", "4", "--bits", "8", "--frames-per-minute", "6", "--device", "orin-nx-16", "--device", "cpu"]
    done = CliRunner().invoke(app, ["plan", *asked], env={"COLUMNS": "80"})
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80 and [row[0] for row in rows_of(done.stdout)] == ["orin-nx-16", "cpu"]
    assert sum("llava-next-7b 8 bits 320" in line for line in lines) == 2
    assert "keeps up with 6 frames a minute on: orin-nx-16." in " ".join(done.stdout.split())


def test_long_names_lose_no_letter(tmp_path: Path) -> None:
    name = "the-board-in-the-left-arm-of-the-robot-in-the-second-hall"
    profile = (data_folder("profiles") / "orin-nx-16.yaml").read_text().replace("name: orin-nx-16", f"name: {name}")
    (tmp_path / f"{name}.yaml").write_text(profile)
    for bits in (["4"], ["4", "8"]):
        asked = [part for width in bits for part in ("--bits", width)]
        board = str(tmp_path / f"{name}.yaml")
        done = CliRunner().invoke(app, ["plan", "--device", board, *asked], env={"COLUMNS": "80"})
        lines = done.stdout.splitlines()
        assert max(map(len, lines)) <= 80 and "…" not in done.stdout
        first, rest = lines[-20:], "".join(line.split()[0] for line in lines if line.split())
        assert name in rest, first


def test_verbose_says_everything_within_100_columns() -> None:
    done = CliRunner().invoke(app, ["plan", "-v"], env={"COLUMNS": "100"})
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 100
    assert all(any(line.startswith(f"{name}: ") for line in lines) for name in device_names())
    assert "does not fit (" in done.stdout and "fits (" in done.stdout
    assert "beats the vanilla 7B: yes (" in done.stdout and "the vanilla 7B does not fit here (" in done.stdout


@pytest.mark.parametrize("asked", [("--verbose", "--device", "agx-orin-64"), ("--solve", "orin-nano-8")])
def test_narrow_terminals_lose_no_word(asked: tuple[str, ...]) -> None:
    done = CliRunner().invoke(app, ["plan", *asked], env={"COLUMNS": "80"})
    assert "…" not in done.stdout and max(map(len, done.stdout.splitlines())) <= 80


def test_solve_never_recommends_the_demonstration(tmp_path: Path) -> None:
    for asked in ((), ("--model", "vz-demo"), ("--within-sec", 0.5), ("--answer-tokens", 1)):
        found = vz_edge("plan", "--solve", "cpu", *asked, "--json")
        rows = json.loads(found.stdout)["rows"]
        assert found.returncode == (0 if rows else 1) and "vz-demo" not in {row["model"] for row in rows}
    small = tmp_path / "small.yaml"
    profile = (data_folder("profiles") / "cpu.yaml").read_text().replace("name: cpu", "name: small")
    small.write_text(re.sub(r"(?m)value: \d{11}$", "value: 1000000000", profile))
    assert json.loads(vz_edge("plan", "--device", small, "--model", "vz-demo", "--json").stdout)["rows"]
    none = vz_edge("plan", "--solve", small)
    assert none.returncode == 1 and "nothing fits" in none.stdout


def test_the_defaults_are_those_of_a_plan() -> None:
    options = inspect.signature(command).parameters
    assert options["prompt_tokens"].default == Asked().prompt_tokens
    assert options["answer_tokens"].default == Asked().answer_tokens
    assert options["runtime"].default == Asked().runtime


def test_json_and_page(tmp_path: Path) -> None:
    mine = tmp_path / "my-board.yaml"
    mine.write_text(
        (data_folder("profiles") / "orin-nx-16.yaml").read_text().replace("name: orin-nx-16", "name: my-board")
    )
    asked = ["--model", "llava-next-13b", "--bits", 4, "--bits", 8, "--tokens", 320, "--tokens", "all"]
    html = tmp_path / "plan.html"
    done = vz_edge("plan", *asked, "--device", mine, "--device", "orin-nx-16", "--json", "--html", html)
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    shown = [(row["device"], row["bits"], row["tokens"]) for row in data["rows"]]
    assert shown == [(name, bits, n) for name in ("my-board", "orin-nx-16") for bits in (4, 8) for n in (320, None)]
    first, *_ = data["rows"]
    assert first["peak_bytes"] == data["rows"][4]["peak_bytes"] and "fits" in first["verdicts"][0]
    assert first["vanilla_7b"]["model"] == "llava-next-7b"
    assert html.read_text().startswith("<!doctype html>") and "my-board" in html.read_text()


def test_the_papers_code_is_planned_on_gpus_alone() -> None:
    done = vz_edge("plan", "--runtime", "transformers", "--json")
    assert {row["device"] for row in json.loads(done.stdout)["rows"]} == {*device_names()} - {"cpu"}


def test_solve_shows_the_best_ten_or_says_there_is_none(tmp_path: Path) -> None:
    done = vz_edge("plan", "--solve", "agx-orin-64", "--json")
    rows = json.loads(done.stdout)["rows"]
    scores = [row["published_score"] for row in rows]
    assert len(rows) == 10 and scores == sorted(scores, reverse=True) and rows[0]["model"] == "llava-next-13b"
    table = vz_edge("plan", "--solve", "orin-nano-8", "--within-sec", 2, "--frames-per-minute", 6)
    assert table.returncode == 0 and "llava-1.5-7b" in table.stdout and "no published figure" in table.stdout
    html = tmp_path / "never.html"
    none = vz_edge("plan", "--solve", "cpu", "--model", "llava-next-34b", "--within-sec", 1, "--html", html)
    assert none.returncode == 1 and "nothing fits and meets the limits" in none.stdout and not html.exists()


def test_what_cannot_be_planned_is_one_line_and_status_2(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    standin.write_bundle(bundle)
    wrong = {
        "no device 'agx-orin'; nearest: agx-orin-": ("--device", "agx-orin"),
        "no recipe 'llava-next-14b'; nearest: llava-next-": ("--model", "llava-next-14b"),
        "my.yaml does not exist": ("--device", tmp_path / "my.yaml"),
        "nearest: 320 or 325": ("--tokens", 321),
        "--tokens few: expected a whole number or 'all'": ("--tokens", "few"),
        "--bits 3 is impossible": ("--bits", 3),
        "a picture of 9 tiles is impossible": ("--tiles", 9),
        "0 answer tokens are impossible": ("--answer-tokens", 0),
        "--max-context 100 is impossible": ("--max-context", 100),
        "--frames-per-minute -1 is impossible": ("--frames-per-minute", -1),
        "--within-sec is a limit for --solve": ("--within-sec", 1),
        "--solve names the device itself": ("--solve", "cpu", "--device", "cpu"),
        "no figures of transformers on a device of class cpu": ("--device", "cpu", "--runtime", "transformers"),
        "cannot be written": ("--device", "cpu", "--html", tmp_path / "absent" / "plan.html"),
        "is a bundle, exported already; 'vz-edge inspect": ("--model", bundle),
        "no recipe 'nnnn": ("--model", "n" * 5000),
        "no device 'nnnn": ("--device", "n" * 5000),
        "nnn does not exist; expected a device profile": ("--device", "/" + "n" * 5000),
    }
    for message, arguments in wrong.items():
        done = vz_edge("plan", *arguments)
        assert done.returncode == 2, (arguments, done.stderr)
        assert message in done.stderr and done.stderr.count("\n") == 1 and done.stdout == "", done.stderr


def test_inspect_shows_the_memory_plan_of_a_recipe_and_of_a_bundle(tmp_path: Path) -> None:
    for target, device in (("cpu", "cpu"), ("cuda", "agx-orin-64")):
        plan = json.loads(vz_edge("inspect", "llava-next-13b", "--target", target, "--json").stdout)["memory_plan"]
        assert plan["device"] == device
        assert plan["peak_bytes"] == max(sum(parts.values()) for parts in plan["stages"].values())
        planned = vz_edge("plan", "--model", "llava-next-13b", "--device", device, "--json")
        assert json.loads(planned.stdout)["rows"][0]["memory"] == plan["stages"]
    text = vz_edge("inspect", "llava-next-13b", "--target", "cuda", "--device", "orin-nano-8").stdout
    assert "memory on orin-nano-8, GB" in text and "GB short" in text
    wrong = vz_edge("inspect", "llava-next-13b", "--device", "orin-nano-8")
    assert wrong.returncode == 2 and "orin-nano-8 cannot run what is exported for cpu" in wrong.stderr

    standin.write_bundle(tmp_path / "bundle")
    done = vz_edge("inspect", tmp_path / "bundle")  # whose manifest has neither predictions nor a comparison
    assert done.returncode == 0 and "memory on cpu, GB" in done.stdout, done.stderr


@pytest.mark.parametrize("bits", ["4", "8"])
@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_inspect_plans_a_bundle_with_bitsandbytes_weights(bits: str, target: str) -> None:
    options = ("inspect", "llava-next-13b", "--format", "bnb", "--bits", bits, "--target", target)
    report = json.loads(vz_edge(*options, "--json").stdout)
    assert report["format"] == "bnb"
    assert report["weights"] == dataclasses.asdict(bitsandbytes_weights(int(bits)))  # type: ignore[arg-type]
    plan, sizes = report["memory_plan"], report["bytes"]
    stages = plan["stages"]
    # The checkpoint's token table is there while it is loaded, and the cache has 16 bits on both targets.
    assert stages["load"]["token_table"] + stages["answer"]["decoder"] == sizes["decoder"]
    assert stages["answer"]["kv_cache"] == plan["context_tokens"] * report["kv_cache_bytes_per_token"]
    assert report["kv_cache_bytes_per_token"] == 2 * 40 * 5120 * 2
    assert ("vision" in stages["answer"]) == (target == "cuda")
    assert ("unpacked_layer" in stages["answer"]) == (bits == "4")
    shown = vz_edge(*options).stdout
    assert ("nf4, blocks of 64" if bits == "4" else "int8, a scale a row") in shown and "token_table" in shown
