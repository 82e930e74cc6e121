"""The command line as a person meets it: what it prints on its two streams, and its exit status.

Most commands run in this process, which has torch loaded already; what start-up costs is checked in its own.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from PIL import Image

from tests.tiny import make_checkpoint
from vz_edge import __version__ as vz_edge_version
from vz_edge.cli import app
from vz_edge.device.requirements import install_command
from vz_edge.recipe import recipe_names

REPOSITORY = Path(__file__).parents[2]


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def vz_edge(*arguments: object, typed: str = "") -> Done:
    stdout, stderr = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as redirected:
        patch.setattr(sys, "stdin", io.StringIO(typed))
        patch.setenv("COLUMNS", "200")
        redirected.enter_context(contextlib.redirect_stdout(stdout))
        redirected.enter_context(contextlib.redirect_stderr(stderr))
        with pytest.raises(SystemExit) as ended:
            app([str(argument) for argument in arguments], prog_name="vz-edge")
    return Done(int(ended.value.code or 0), stdout.getvalue(), stderr.getvalue())


def in_a_process(*command: str) -> Done:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, timeout=300)
    return Done(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with a checkpoint, its bundle and a picture."""
    folder = tmp_path_factory.mktemp("cli")
    make_checkpoint(folder / "checkpoint", family="llava_next")
    Image.effect_mandelbrot((300, 200), (-2, -1, 1, 1), 50).save(folder / "picture.png")
    done = vz_edge("export", "--model", folder / "checkpoint", "--tokens", "90", "--out", folder / "bundle")
    assert done.returncode == 0, done.stderr
    assert "predicted:" in done.stdout and "against torch" in done.stdout
    return folder


def test_run_prints_the_answer_on_stdout_and_timings_on_stderr(folder: Path) -> None:
    done = vz_edge("run", folder / "bundle", "--image", folder / "picture.png", "what?", "--max-new-tokens", 4)
    assert done.returncode == 0, done.stderr
    assert "90 image" in done.stderr and "first token after" in done.stderr
    streamed = vz_edge(
        "run", folder / "bundle", "--image", folder / "picture.png", "what?", "--max-new-tokens", 4, "--stream"
    )
    assert streamed.stdout == done.stdout


def test_run_as_json_carries_its_measurements(folder: Path) -> None:
    done = vz_edge(
        "run", folder / "bundle", "--image", folder / "picture.png", "what?", "--max-new-tokens", 4, "--json"
    )
    reply = json.loads(done.stdout)
    assert reply["image_tokens"] == 90 and reply["answer_tokens"] == len(reply["token_ids"]) <= 4
    assert reply["ttft_sec"] > 0


def test_run_answers_to_a_schema_or_with_a_choice(folder: Path) -> None:
    ask = ("run", folder / "bundle", "--image", folder / "picture.png", "what?")
    schema = folder / "schema.json"
    schema.write_text('{"type": "array", "items": {"enum": ["a", 2]}, "minItems": 1, "maxItems": 2}', encoding="utf-8")
    answer = json.loads(vz_edge(*ask, "--schema", schema).stdout)
    assert 1 <= len(answer) <= 2 and set(answer) <= {"a", 2}
    reply = json.loads(vz_edge(*ask, "--schema", schema, "--json").stdout)
    assert reply["value"] == answer == json.loads(reply["text"])
    chosen = vz_edge(*ask, "--choices", "yes, no").stdout.strip()
    probabilities = json.loads(vz_edge(*ask, "--choices", "yes, no", "--json").stdout)["probabilities"]
    assert set(probabilities) == {"yes", "no"} and chosen == max(probabilities, key=probabilities.get)


def test_a_chat_remembers_and_ends_with_an_empty_line(folder: Path) -> None:
    done = vz_edge(
        "run", folder / "bundle", "--image", folder / "picture.png", "--max-new-tokens", 3, typed="one\ntwo\n\n"
    )
    assert done.returncode == 0, done.stderr
    prompts = [
        int(line.split(" + ")[1].split(" prompt")[0]) for line in done.stderr.splitlines() if " image + " in line
    ]
    assert len(prompts) == 2 and prompts[1] > prompts[0] * 1.5


def test_verify_hashes_and_looks_again(folder: Path) -> None:
    done = vz_edge("verify", folder / "bundle")
    assert done.returncode == 0, done.stderr
    assert "every hash is as recorded" in done.stdout and "100.0% of the kept positions" in done.stdout
    assert (
        done.stdout.splitlines()[-1]
        == "verdict: as exported: nothing differs but rounding, and the next token is the same"
    )
    quick = vz_edge("verify", folder / "bundle", "--hashes-only")
    assert quick.stdout.splitlines()[-1].startswith("verdict: the files are what was exported")


def test_inspect_a_bundle_and_a_recipe(folder: Path) -> None:
    bundle = json.loads(vz_edge("inspect", folder / "bundle", "--json").stdout)
    assert bundle["budget_per_tile"] == {"dominant": 15, "contextual": 3}
    assert bundle["parity"]["vision"]["kept_agreement"] == 1.0
    recipe = json.loads(vz_edge("inspect", "llava-next-13b", "--tokens", "160", "--json").stdout)
    tokens = {row["size"]: (row["tiles"], row["tokens"]) for row in recipe["pictures"]}
    assert tokens["640x480"] == (5, 160) and tokens["2000x500"] == (4, 128)
    assert 8e9 < sum(recipe["bytes"].values()) < 8.7e9
    assert "picture" in vz_edge("inspect", "llava-1.5-7b").stdout


def test_verify_needs_the_record_of_the_export(folder: Path) -> None:
    bundle = folder / "other record"
    shutil.copytree(folder / "bundle", bundle)
    manifest = json.loads((bundle / "vz_edge.json").read_text())
    vision = manifest["parity"]["vision"]
    for parity, message in (
        ({}, "records no parity picture (parity), so there is nothing to compare with"),
        (manifest["parity"] | {"vision": vision | {"kept": vision["kept"][:-1]}}, "another bundle's parity picture"),
        (manifest["parity"] | {"vision": vision | {"feature_sample": []}}, "another bundle's parity picture"),
        ({"vision": {}}, "parity.vision.tiles: missing"),
    ):
        (bundle / "vz_edge.json").write_text(json.dumps(manifest | {"parity": parity}))
        done = vz_edge("verify", bundle)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
    (bundle / "vz_edge.json").write_text(json.dumps(manifest | {"parity": {}}))
    assert vz_edge("verify", bundle, "--hashes-only").returncode == 0
    assert vz_edge("inspect", bundle).returncode == 0


@pytest.mark.parametrize("broken", ["torch", "transformers"])
@pytest.mark.parametrize("raised", [OSError("libcudart.so.12:\nno such file"), ImportError("too old")], ids=repr)
def test_what_does_not_import_is_named_before_an_export(
    monkeypatch: pytest.MonkeyPatch, broken: str, raised: Exception
) -> None:
    real = importlib.import_module

    def import_module(name: str, package: str | None = None) -> Any:
        if name == broken:
            raise raised
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", import_module)
    reason = " ".join(str(raised).split())
    for format_, extras in (("onnx", ("export", "cpu")), ("bnb", ("export", "bnb", "cpu"))):
        done = vz_edge("export", "--model", "vz-demo", "--format", format_)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert f"exporting needs {broken}, which cannot be imported here ({reason}); on the" in done.stderr
        assert install_command(*extras) in done.stderr


def test_what_is_missing_for_an_export_is_named_with_the_packages_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec

    def find_spec(name: str, package: str | None = None) -> Any:
        return None if name in ("torch", "bitsandbytes") else real(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    for format_, said in (
        ("onnx", "exporting needs torch, not installed here; on the machine that exports, pip install '"),
        ("bnb", "needs torch, bitsandbytes, not installed here; on the machine that exports, pip install '"),
    ):
        done = vz_edge("export", "--model", "vz-demo", "--format", format_)
        assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr
        assert (
            " 'torch>=" in done.stderr
            and " 'onnxruntime>=" in done.stderr
            and ("'bitsandbytes>=" in done.stderr) == (format_ == "bnb")
        )


def test_models_lists_every_recipe_with_the_license_of_its_weights() -> None:
    rows = {row["name"]: row for row in json.loads(vz_edge("models", "--json").stdout)}
    assert list(rows) == recipe_names()
    assert rows["llava-next-13b"]["license"]["name"] == "Llama 2 Community License"
    printed = vz_edge("models").stdout
    for row in rows.values():
        assert row["name"] in printed and row["checkpoint"] in printed and row["license"]["name"] in printed


def test_what_a_person_gets_wrong_is_one_line_and_status_2(folder: Path) -> None:
    bundle, checkpoint, picture = folder / "bundle", folder / "checkpoint", folder / "picture.png"
    (folder / "empty.png").write_bytes(b"")
    (folder / "list.json").write_text("[]")
    (folder / "pickled").mkdir(exist_ok=True)
    (folder / "pickled" / "pytorch_model.bin").write_bytes(b"\x80\x02")
    (folder / "pickled" / "config.json").write_text((checkpoint / "config.json").read_text())
    export = ("export", "--model", checkpoint, "--out", folder / "never")
    wrong = {
        "nearest recipes: llava-next-13b": ("export", "--model", "lava-next-13b"),
        "neither a recipe": ("export", "--model", "/no/such/folder"),
        "cannot download owner/name": ("export", "--model", "owner/name"),
        "nearest: 90 or 95": (*export, "--tokens", "92"),
        "expected a whole number": (*export, "--tokens", "few"),
        "go together": (*export, "--dominant", "9"),
        "give one or the other": (*export, "--dominant", "9", "--contextual", "3", "--tokens", "90"),
        "replace it with --force": ("export", "--model", checkpoint, "--out", bundle),
        "is the checkpoint": ("export", "--model", checkpoint, "--out", checkpoint, "--force"),
        "pickle": ("export", "--model", folder / "pickled", "--out", folder / "never"),
        "empty.png cannot be read": ("run", bundle, "--image", folder / "empty.png", "what?"),
        "absent.png does not exist": ("run", bundle, "--image", folder / "absent.png", "what?"),
        "do not fit the context of 100": ("run", bundle, "--image", picture, "what?", "--max-context", "100"),
        "lower max_new_tokens": ("run", bundle, "--image", picture, "what?", "--max-new-tokens", "100000"),
        "one of them": ("run", bundle, "what?", "--schema", folder / "schema.json", "--choices", "yes,no"),
        "cannot be read as JSON": ("run", bundle, "what?", "--schema", folder / "absent.json"),
        "is no JSON schema": ("run", bundle, "what?", "--schema", folder / "list.json"),
        "the choice ''": ("run", bundle, "what?", "--choices", "yes,,no"),
        "NoSuchExecutionProvider": (
            "run",
            bundle,
            "--image",
            picture,
            "what?",
            "--provider",
            "NoSuchExecutionProvider",
        ),
        "is not a bundle": ("run", checkpoint, "what?"),
        "does not exist": ("verify", folder / "nothing"),
        "no recipe": ("inspect", "llava-next-14b"),
        "no 16 bits": ("inspect", "llava-next-7b", "--format", "bnb", "--bits", "16"),
        "its vision does not run in torch": ("run", bundle, "what?", "--vision", "torch"),
        "--bits 8 is for a recipe's name; leave it out": ("inspect", bundle, "--bits", "8"),
        "--format onnx, --tokens 90, --target cpu is": (
            *("inspect", bundle, "--format", "onnx", "--tokens", "90", "--target", "cpu"),
        ),
    }
    for message, arguments in wrong.items():
        done = vz_edge(*arguments)
        assert done.returncode == 2, (arguments, done.stderr)
        assert message in done.stderr, (message, done.stderr)
        assert done.stderr.count("\n") == 1, done.stderr
    assert not (folder / "never").exists() and not list(folder.glob(".*partial*"))


def test_a_process_ends_with_status_2_and_shows_a_traceback_only_when_asked(folder: Path) -> None:
    plain = in_a_process("-m", "vz_edge", "verify", str(folder / "nothing"))
    assert plain.returncode == 2 and plain.stderr.count("\n") == 1 and plain.stdout == ""
    debug = in_a_process("-m", "vz_edge", "--debug", "verify", str(folder / "nothing"))
    assert debug.returncode != 0 and "Traceback" in debug.stderr and "BundleError" in debug.stderr


def test_version_needs_no_command() -> None:
    assert vz_edge("--version") == Done(0, f"vz-edge {vz_edge_version}\n", "")


def test_starting_up_imports_nothing_heavy() -> None:
    heavy = {"torch", "transformers", "onnxruntime", "onnx", "onnx_ir", "numpy", "PIL", "tokenizers", "yaml"}
    done = in_a_process(
        "-c",
        "import sys; from vz_edge.cli import app; app(['--help'], standalone_mode=False);"
        f"print(sorted({heavy!r} & set(sys.modules)))",
    )
    assert done.stdout.strip().endswith("[]"), done.stdout + done.stderr
