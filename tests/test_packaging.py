"""The wheel: data folders travel with it, nothing else does, and optimum finds the export in it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

import vz_edge

REPOSITORY = Path(__file__).parents[1]
REGISTERED = "optimum.commands.register.register_vz_edge"
MOST_BYTES = 1_000_000  # a robot downloads it; what is larger belongs elsewhere


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(folder), "."]
    subprocess.run(build, cwd=REPOSITORY, check=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def python(installed: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=installed, env=environment, capture_output=True, text=True, timeout=300
    )


def test_recipes_devices_and_the_calibration_text_ship_in_the_wheel(installed: Path) -> None:
    assert (installed / "vz_edge" / "host" / "calibration.txt").is_file()
    assert (installed / "vz_edge" / "py.typed").is_file()
    for folder in ("export", "profiles", "profiles/runtimes"):
        there = {path.name for path in (installed / "vz_edge" / "data" / folder).glob("*.yaml")}
        assert there == {path.name for path in (REPOSITORY / folder).glob("*.yaml")}
    code = "import vz_edge.recipe as r; print(r.load_recipe('vz-demo').name, r.data_folder('profiles'))"
    done = python(installed, "-c", code)
    assert done.returncode == 0, done.stderr
    name, folder = done.stdout.split(maxsplit=1)
    assert name == "vz-demo" and Path(folder.strip()).is_relative_to(installed)


def test_the_wheel_holds_neither_weights_nor_reports(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert not [name for name in names if name.endswith(".safetensors") or "/reports/" in name or "/vz-demo/" in name]
    assert wheel.stat().st_size < MOST_BYTES
    assert {name.split("/")[0] for name in names} == {"vz_edge", "optimum", f"vz_edge-{vz_edge.__version__}.dist-info"}


def test_the_demo_model_of_an_installed_wheel_is_said_to_be_in_the_sources(installed: Path, tmp_path: Path) -> None:
    done = python(installed, "-m", "vz_edge", "export", "--model", "vz-demo", "--out", str(tmp_path / "bundle"))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "is in vz-edge's sources (export/vz-demo)" in done.stderr
    assert "--model CLONE/export/vz-demo" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_optimum_hands_every_option_to_the_same_export(installed: Path) -> None:
    arguments = ["-m", "optimum.commands.optimum_cli", "export", "vz-edge", "--model", "lava-next-13b", "--bits", "4"]
    # Where the package is installed the subcommand is there already; a second one would be a conflict.
    done = in_a_process(*arguments) if find_spec(REGISTERED) else python(installed, *arguments)
    assert done.returncode == 2
    assert "nearest recipes: llava-next-13b" in done.stderr


def test_the_wheel_brings_the_subcommand(installed: Path) -> None:
    assert (installed / REGISTERED.replace(".", "/")).with_suffix(".py").is_file()


def test_the_changelogs_newest_version_is_this_one() -> None:
    versions = re.findall(r"^## (\S+)", (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    released = [version for version in versions if version != "Unreleased"]
    assert released[0] == vz_edge.__version__ and len(set(versions)) == len(versions)


def test_the_workflows_run_on_every_python_that_is_promised() -> None:
    pyproject = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    promised = re.findall(r"Programming Language :: Python :: (3\.\d+)", pyproject)
    for name, job in (("test", "test"), ("device", "import")):
        workflow = yaml.safe_load((REPOSITORY / ".github" / "workflows" / f"{name}.yml").read_text(encoding="utf-8"))
        assert workflow["jobs"][job]["strategy"]["matrix"]["python"] == promised
    assert promised[0] in re.findall(r"requires-python = \">=(.*)\"", pyproject)


def in_a_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=300)
