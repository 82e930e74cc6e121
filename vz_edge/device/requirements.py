"""What pyproject.toml demands of Python and of other packages, and how to install what an extra brings.

vz-edge is on no package index, so a hint like ``pip install 'vz-edge[cpu]'`` would find nothing. A hint names the
packages of the extra instead, which is right wherever vz-edge itself was installed from: a clone or a built wheel.

>>> install_command("schema")
"pip install 'llguidance>=1.9'"
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from packaging.requirements import Requirement

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
JETSON_GUIDE = "docs/jetson.md in vz-edge's sources"  # which the wheel does not hold


@dataclass(frozen=True)
class Declared:
    """What pyproject.toml demands: Python's versions, and requirements as PEP 508 strings with their extras."""

    python: str
    requirements: tuple[str, ...]


def declared() -> Declared | None:
    """From the installed package's metadata, else from the clone; None where there is neither, or no tomllib."""
    try:
        package = metadata.distribution("vz-edge")
        return Declared(package.metadata["Requires-Python"] or "", tuple(package.requires or ()))
    except metadata.PackageNotFoundError:
        return _of_clone()


def _of_clone() -> Declared | None:
    if sys.version_info >= (3, 11):
        import tomllib

        try:
            project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
        except (OSError, ValueError, KeyError):
            return None
        extras = project["optional-dependencies"].items()
        optional = [_of_extra(requirement, extra) for extra, lines in extras for requirement in lines]
        return Declared(project["requires-python"], (*project["dependencies"], *optional))
    return None


def base_requirements(demands: Declared) -> list[Requirement]:
    """Requirements without an extra that apply to this machine."""
    return [requirement for requirement in _parsed(demands) if _applies(requirement, "")]


def extra_requirements(demands: Declared, extra: str) -> list[Requirement]:
    """Requirements that only ``extra`` adds, of those that apply to this machine."""
    return [r for r in _parsed(demands) if _applies(r, extra) and not _applies(r, "")]


def install_command(*extras: str) -> str:
    """The pip command that installs the packages of ``extras``, each named with the versions that are demanded.

    Where this version's demands cannot be read, the command to run in a clone.
    """
    demands = declared()
    try:
        found = [] if demands is None else [r for extra in extras for r in extra_requirements(demands, extra)]
    except ImportError:  # packaging is missing, and doctor has to say so in its own words
        found = []
    if not found:
        return f"pip install '.[{','.join(extras)}]' in a clone of vz-edge"
    return pip_install(found)


def pip_install(requirements: list[Requirement]) -> str:
    """The pip command for ``requirements``, each once and quoted for a shell."""
    return " ".join(["pip install", *dict.fromkeys(f"'{r.name}{r.specifier}'" for r in requirements)])


def _of_extra(requirement: str, extra: str) -> str:
    """A requirement as a wheel's metadata has it: its extra is one more condition."""
    name, _, condition = requirement.partition(";")
    return f"{name}; ({condition.strip()}) and extra == '{extra}'" if condition else f"{name}; extra == '{extra}'"


def _parsed(demands: Declared) -> list[Requirement]:
    from packaging.requirements import Requirement

    return [Requirement(line) for line in demands.requirements]


def _applies(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})
