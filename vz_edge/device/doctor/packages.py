"""Python and the packages around it, against what this version of vz-edge declares."""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from vz_edge.device.doctor.finding import Finding, Need

if TYPE_CHECKING:
    from packaging.requirements import Requirement

PYPROJECT = Path(__file__).parents[3] / "pyproject.toml"


@dataclass(frozen=True)
class Declared:
    """What pyproject.toml demands: Python's versions, and requirements as PEP 508 strings with their extras."""

    python: str
    requirements: tuple[str, ...]


def declared() -> Declared | None:
    """From the installed package's metadata, else from the checkout; None where there is neither."""
    try:
        package = metadata.distribution("vz-edge")
        return Declared(package.metadata["Requires-Python"] or "", tuple(package.requires or ()))
    except metadata.PackageNotFoundError:
        pass
    try:
        import tomllib  # Python 3.11

        project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    except (ImportError, OSError, ValueError, KeyError):
        return None
    extras = project["optional-dependencies"].items()
    optional = [_of_extra(requirement, extra) for extra, lines in extras for requirement in lines]
    return Declared(project["requires-python"], (*project["dependencies"], *optional))


def _of_extra(requirement: str, extra: str) -> str:
    """A requirement as a wheel's metadata has it: its extra is one more condition."""
    name, _, condition = requirement.partition(";")
    return f"{name}; ({condition.strip()}) and extra == '{extra}'" if condition else f"{name}; extra == '{extra}'"


def installed_version(name: str) -> str | None:
    """The version of an installed package; None where it is missing."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def onnxruntime_packages() -> dict[str, str]:
    """Names and versions of the installed packages that bring the module ``onnxruntime``."""
    found = {}
    for package in metadata.distributions():
        name = package.metadata["Name"] or ""
        modules = (package.read_text("top_level.txt") or "").split()
        if name in ("onnxruntime", "onnxruntime-gpu") or (name.startswith("onnxruntime") and "onnxruntime" in modules):
            found[name] = package.version
    return found


def package_findings(
    demands: Declared | None,
    installed: Callable[[str], str | None] = installed_version,
    python: str | None = None,
) -> list[Finding]:
    """Python, the base packages and those of the export extra; ``installed`` gives a package's version by name."""
    python = python or platform.python_version()
    if demands is None:
        return [
            Finding(
                "Python and packages",
                "warning",
                f"Python {python}; vz-edge is not installed as a package, so its demands are unknown",
                "pip install vz-edge, or pip install -e . in a checkout",
            )
        ]
    try:
        from packaging.specifiers import SpecifierSet
    except ImportError:
        return [Finding("packages", "problem", "packaging is not installed", "pip install packaging")]
    fits = SpecifierSet(demands.python).contains(python, prereleases=True)
    return [
        Finding("Python", "ok", python)
        if fits
        else Finding(
            "Python",
            "problem",
            f"{python}, expected {demands.python}",
            f"make a virtual environment with Python {demands.python} and install vz-edge there",
        ),
        _group(base_requirements(demands), installed, "base packages", "both"),
        _group(extra_requirements(demands, "export"), installed, "export packages", "export"),
    ]


def base_requirements(demands: Declared) -> list[Requirement]:
    """Requirements without an extra that apply to this machine."""
    return [requirement for requirement in _parsed(demands) if _applies(requirement, "")]


def extra_requirements(demands: Declared, extra: str) -> list[Requirement]:
    """Requirements that only ``extra`` adds, of those that apply to this machine."""
    return [r for r in _parsed(demands) if _applies(r, extra) and not _applies(r, "")]


def onnxruntime_finding(packages: dict[str, str]) -> Finding:
    """Exactly one package may bring the module: two overwrite each other's files."""
    names = sorted(packages)
    listing = ", ".join(f"{name} {packages[name]}" for name in names)
    if len(names) == 1:
        return Finding("onnxruntime package", "ok", listing)
    if names:
        keep = "gpu" if "onnxruntime-gpu" in names else "cpu"
        return Finding(
            "onnxruntime package",
            "problem",
            f"{listing} are installed at once and overwrite each other's files",
            f"pip uninstall -y {' '.join(names)}, then pip install 'vz-edge[{keep}]'",
        )
    if importlib.util.find_spec("onnxruntime"):
        return Finding("onnxruntime package", "ok", "a build without package metadata")
    return Finding(
        "onnxruntime package",
        "problem",
        "not installed",
        "pip install 'vz-edge[cpu]', or 'vz-edge[gpu]' for CUDA; for CUDA on a Jetson see docs/jetson.md",
    )


def export_is_expected(installed: Callable[[str], str | None] = installed_version) -> bool:
    """Whether this machine is meant to export: torch and transformers are both there."""
    return all(installed(name) for name in ("torch", "transformers"))


def _group(
    requirements: Iterable[Requirement], installed: Callable[[str], str | None], name: str, need: Need
) -> Finding:
    versions = [(requirement, installed(requirement.name)) for requirement in requirements]
    unmet = [
        (requirement, version)
        for requirement, version in versions
        if version is None or not requirement.specifier.contains(version, prereleases=True)
    ]
    if not unmet:
        listing = ", ".join(f"{requirement.name} {version}" for requirement, version in versions)
        return Finding(name, "ok", listing, needed_for=need)
    listing = ", ".join(
        f"{requirement.name} {version or 'missing'} (expected {requirement.specifier or 'any'})"
        for requirement, version in unmet
    )
    install = " ".join(f"'{requirement.name}{requirement.specifier}'" for requirement, _ in unmet)
    return Finding(name, "problem", listing, f"pip install {install}", need)


def _parsed(demands: Declared) -> list[Requirement]:
    from packaging.requirements import Requirement

    return [Requirement(line) for line in demands.requirements]


def _applies(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})
