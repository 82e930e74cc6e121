"""What pyproject.toml demands, read where vz-edge is installed and in a clone, and the hints made of it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

import vz_edge
from vz_edge.device import requirements
from vz_edge.device.requirements import Declared, base_requirements, declared, extra_requirements, install_command

DEMANDS = Declared(
    ">=3.10",
    (
        "numpy>=1.26",
        "onnxruntime>=1.22; extra == 'cpu'",
        "torch>=2.6; extra == 'export'",
        "torch>=2.6; extra == 'bnb'",
        "bitsandbytes>=0.50; extra == 'bnb'",
        "oldest>=1; (python_version < '3') and extra == 'bnb'",
    ),
)


@pytest.fixture
def not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def distribution(name: str) -> None:
        raise requirements.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(requirements.metadata, "distribution", distribution)


@pytest.mark.usefixtures("not_installed")
@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib")
def test_a_clone_declares_what_its_pyproject_does() -> None:
    demands = declared()
    assert demands is not None and demands.python == ">=3.10"
    base = {requirement.name for requirement in base_requirements(demands)}
    assert {"numpy", "tokenizers", "rich", "packaging"} <= base and not base & {"torch", "onnxruntime"}
    assert "torch" in {requirement.name for requirement in extra_requirements(demands, "export")}


@pytest.mark.usefixtures("not_installed")
def test_with_neither_metadata_nor_a_clone_nothing_is_declared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements, "PYPROJECT", Path("/no/such/pyproject.toml"))
    assert declared() is None
    assert install_command("export", "cpu") == "pip install '.[export,cpu]' in a clone of vz-edge"


def test_the_hint_names_each_package_of_the_extras_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements, "declared", lambda: DEMANDS)
    assert install_command("cpu") == "pip install 'onnxruntime>=1.22'"
    assert install_command("export", "bnb") == "pip install 'torch>=2.6' 'bitsandbytes>=0.50'"


def test_without_packaging_the_hint_is_the_clones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "packaging.requirements", None)
    assert install_command("cpu") == "pip install '.[cpu]' in a clone of vz-edge"


def test_no_message_sends_anyone_to_an_index_for_vz_edge_itself() -> None:
    """The package is on none; pip would find nothing, or another package of that name."""
    asks_an_index = re.compile(r"pip install (-\S+ )*['\"]?vz[-_]edge")
    for file in Path(vz_edge.__file__).parent.rglob("*.py"):
        text = file.read_text(encoding="utf-8").replace(requirements.__doc__ or "", "")
        assert not asks_an_index.search(text), file
