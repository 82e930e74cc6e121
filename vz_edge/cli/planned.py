"""What ``plan`` and ``inspect`` take for a model, as export does: a recipe's name, a folder or a hub id."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vz_edge.recipe import Recipe


def planned_recipe(model: str) -> Recipe:
    """The recipe of that name; of a checkpoint, one made from its config, for which the export side must be installed.

    Raises RecipeError, CheckpointError, UnsupportedModelError and DependencyError.
    """
    from vz_edge.recipe import load_recipe, recipe_names

    if model in recipe_names() or ("/" not in model and not Path(model).is_dir()):
        return load_recipe(model)
    from vz_edge.device.dependencies import require_imports, require_installed

    modules = ("torch", "transformers")  # whose classes fill what a config leaves out
    what, remedy = (
        f"reading the config of {model}",
        "pip install 'vz-edge[export]', or name a recipe ('vz-edge models')",
    )
    require_installed(what, modules, remedy)
    require_imports(what, modules, remedy)
    from vz_edge.host.described import recipe_of

    return recipe_of(model)
