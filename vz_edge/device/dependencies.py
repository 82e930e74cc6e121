"""Packages of an extra: whether they are here and import, known before anything is begun."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable

from vz_edge.device.process import one_line
from vz_edge.errors import DependencyError


def require_installed(what: str, packages: Iterable[str], remedy: str) -> None:
    """Raise DependencyError naming those of ``packages`` that are not installed; ``what`` needs them."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise DependencyError(f"{what} needs {', '.join(missing)}, not installed here; {remedy}")


def require_imports(what: str, packages: Iterable[str], remedy: str) -> None:
    """Import ``packages``. Raises DependencyError naming the first that does not import, and why."""
    for name in packages:
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever a package raises whose libraries are not on this machine
            raise DependencyError(
                f"{what} needs {name}, which cannot be imported here ({one_line(error)}); {remedy}"
            ) from error
