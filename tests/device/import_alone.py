"""Import every module of the device side with nothing at hand but what the extra ``cpu`` brings.

::

    pip install '.[cpu]'
    python tests/device/import_alone.py

Packages that happen to be installed beside those are hidden, so it says the same in a full environment as in an empty
one. It needs neither pytest nor this repository as the current folder.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
import re
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

PARTS = ("vz_edge.device", "vz_edge.watch", "vz_edge.planning", "vz_edge.profiling", "vz_edge.pages", "vz_edge.cli")
# Beside the standard library, whose own parts are never hidden.
ALWAYS = {"vz_edge", "optimum"}  # optimum: the folder that the wheel brings
HOST_SIDE = {"vz_edge.cli.optimum_export"}  # optimum itself imports it, where that is installed


def closure(extra: str) -> set[str]:
    """Names of the distributions that vz-edge with ``extra`` depends on, however far."""
    from packaging.requirements import Requirement

    found: set[str] = set()
    waiting = [("vz-edge", {"", extra})]
    while waiting:
        name, extras = waiting.pop()
        for line in importlib.metadata.requires(name) or ():
            requirement = Requirement(line)
            applies = requirement.marker is None or any(requirement.marker.evaluate({"extra": e}) for e in extras)
            key = normal(requirement.name)
            if applies and key not in found:
                found.add(key)
                waiting.append((requirement.name, {"", *requirement.extras}))
    return found


def normal(name: str) -> str:
    """A distribution's name as PEP 503 compares them."""
    return re.sub(r"[-_.]+", "-", name).lower()


class Hidden:
    """A finder that comes first and lets only some top-level modules be found."""

    def __init__(self, hidden: set[str]) -> None:
        self.hidden = hidden

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Nothing, or ModuleNotFoundError for a hidden module."""
        if name.partition(".")[0] in self.hidden:
            raise ModuleNotFoundError(f"No module named {name!r} (hidden: the extra cpu does not bring it)", name=name)
        return None


def main() -> None:
    """Import them all; the first that fails ends it with its traceback."""
    brought = closure("cpu")
    providers = importlib.metadata.packages_distributions()
    hidden = {
        module
        for module, names in providers.items()
        if module not in ALWAYS and not {normal(name) for name in names} & brought
    }
    sys.meta_path.insert(0, Hidden(hidden))  # type: ignore[arg-type]
    names = []
    for part in PARTS:
        package = importlib.import_module(part)
        names += [part, *(module.name for module in pkgutil.walk_packages(package.__path__, f"{part}."))]
    names = [name for name in names if name not in HOST_SIDE]
    for name in names:
        importlib.import_module(name)
    print(f"{len(names)} modules imported with what the extra cpu brings: {', '.join(sorted(brought))}")


if __name__ == "__main__":
    main()
