"""What plans take: as a model what export takes (a recipe, a folder, a hub id), as a device this machine too."""

from __future__ import annotations

import sys
from os.path import isdir, isfile  # which say no of what is no path at all
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vz_edge.planning.devices import DeviceProfile
    from vz_edge.recipe import Recipe

THIS_MACHINE = ("this", "here")


def planned_device(name: str, measure: bool = False) -> DeviceProfile:
    """A device by its name or its profile's path; "this" or "here": this machine, measured where it was not yet.

    ``measure``: measured anew. Raises DeviceError, DependencyError.
    """
    if name not in THIS_MACHINE:
        from vz_edge.planning.devices import load_device

        return load_device(name)
    from vz_edge.profiling.this_machine import this_machine

    return this_machine(measure, announce)


def announce(line: str) -> None:
    """Say on stderr what takes time."""
    print(line, file=sys.stderr)


def planned_recipe(model: str) -> Recipe:
    """The recipe of that name; of a checkpoint, one made from its config, for which the export side must be installed.

    Raises RecipeError, CheckpointError, UnsupportedModelError and DependencyError.
    """
    from vz_edge.bundle import MANIFEST
    from vz_edge.errors import RecipeError
    from vz_edge.recipe import load_recipe, recipe_names

    if isfile(Path(model) / MANIFEST):
        raise RecipeError(
            f"{model} is a bundle, exported already; 'vz-edge inspect {model} --device NAME' plans its memory, and "
            f"'vz-edge profile {model} --device NAME' measures it beside its prediction"
        )
    if model in recipe_names() or ("/" not in model and not isdir(model)):
        return load_recipe(model)
    from vz_edge.device.dependencies import require_imports, require_installed
    from vz_edge.device.requirements import install_command

    modules = ("torch", "transformers")  # whose classes fill what a config leaves out
    what = f"reading the config of {model}"
    remedy = f"{install_command('export')}, or name a recipe ('vz-edge models')"
    require_installed(what, modules, remedy)
    require_imports(what, modules, remedy)
    from vz_edge.host.described import recipe_of

    return recipe_of(model)
