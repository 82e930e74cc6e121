"""Python and the packages around it, against what this version of vz-edge declares."""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Callable, Iterable
from importlib import metadata
from typing import TYPE_CHECKING

from vz_edge.device.doctor.finding import Finding, Need
from vz_edge.device.requirements import (
    JETSON_GUIDE,
    Declared,
    base_requirements,
    extra_requirements,
    install_command,
    pip_install,
)

if TYPE_CHECKING:
    from packaging.requirements import Requirement


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
                "pip install . in a clone of vz-edge",
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
        _export_finding(extra_requirements(demands, "export"), installed),
    ]


def _export_finding(requirements: list[Requirement], installed: Callable[[str], str | None]) -> Finding:
    """In one line on a machine that only runs bundles, where a list of all that is missing would look like a fault."""
    if installed("torch") or installed("transformers"):
        return _group(requirements, installed, "export packages", "export")
    detail = "not installed; only the machine that exports needs them"
    return Finding("export packages", "problem", detail, pip_install(requirements), "export")


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
            f"pip uninstall -y {' '.join(names)}, then {install_command(keep)}",
        )
    if importlib.util.find_spec("onnxruntime"):
        return Finding("onnxruntime package", "ok", "a build without package metadata")
    return Finding(
        "onnxruntime package",
        "problem",
        "not installed",
        f"{install_command('cpu')}, or for CUDA {install_command('gpu')}; for CUDA on a Jetson see {JETSON_GUIDE}",
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
    return Finding(name, "problem", listing, pip_install([requirement for requirement, _ in unmet]), need)
