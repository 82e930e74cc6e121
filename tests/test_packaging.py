"""The wheel: data folders travel with it, and optimum finds the export in it."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
REGISTERED = "optimum.commands.register.register_vz_edge"


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


def test_recipes_the_demo_model_and_the_calibration_text_ship_in_the_wheel(installed: Path) -> None:
    assert (installed / "vz_edge" / "host" / "calibration.txt").is_file()
    code = "from vz_edge.recipe import *; r = load_recipe('vz-demo'); print(data_folder('export') / r.checkpoint)"
    done = python(installed, "-c", code)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(installed)
    assert (Path(done.stdout.strip()) / "model.safetensors").is_file()


def test_optimum_hands_every_option_to_the_same_export(installed: Path) -> None:
    arguments = ["-m", "optimum.commands.optimum_cli", "export", "vz-edge", "--model", "lava-next-13b", "--bits", "4"]
    # Where the package is installed the subcommand is there already; a second one would be a conflict.
    done = in_a_process(*arguments) if find_spec(REGISTERED) else python(installed, *arguments)
    assert done.returncode == 2
    assert "nearest recipes: llava-next-13b" in done.stderr


def test_the_wheel_brings_the_subcommand(installed: Path) -> None:
    assert (installed / REGISTERED.replace(".", "/")).with_suffix(".py").is_file()


def in_a_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=300)
