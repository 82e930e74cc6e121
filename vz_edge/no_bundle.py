"""A path that was given as a bundle and is none: what it is instead, and what to do.

People give the recipe's name that they exported, the manifest instead of its folder, a checkpoint, an address. Each
of these can be told apart without reading more than names.
"""

from __future__ import annotations

import difflib
import re
from contextlib import suppress
from os.path import exists, isdir, isfile  # which say no of what is no path at all: too long, or with a zero byte
from pathlib import Path

from vz_edge.recipe import recipe_names

ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/{1,2}(?!/)")  # a Path keeps one of an address's two slashes
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z")
EXPORTED_TO = Path("bundles")  # where 'vz-edge export' writes unless told otherwise
SHOWN = 5  # names of bundles, where a folder holds many


def why_no_bundle(path: Path, manifest: str) -> str:
    """One line about ``path``, which lacks the file ``manifest``: what it is, what was expected, what to do."""
    if match := ADDRESS.match(str(path)):
        address = f"{match[1]}://{str(path)[match.end() :]}"
        return f"{address} is an address; expected a bundle's folder on this machine: download it and give its folder"
    if isdir(path):
        return f"{path} is not a bundle (no {manifest}); {_about_folder(path, manifest)}"
    if isfile(path):
        return f"{path} is a file, expected a bundle's folder; {_about_file(path, manifest)}"
    return f"{path} does not exist; {_about_name(path, manifest)}"


def _about_folder(path: Path, manifest: str) -> str:
    if inside := _enclosing_bundle(path, manifest):
        return f"it is a part of the bundle {inside}; give {inside}"
    if isfile(path / "config.json"):
        return f"it is a checkpoint; export it first: vz-edge export --model {path}"
    if within := _bundles_in(path, manifest):
        return f"it holds bundles; give one of them: {_listed(within)}"
    return "expected a folder written by 'vz-edge export'"


def _about_file(path: Path, manifest: str) -> str:
    if inside := _enclosing_bundle(path, manifest):
        return f"it is a part of the bundle {inside}; give {inside}"
    if path.suffix.lower() in ARCHIVES:
        return "unpack it, and give the folder that has the vz_edge.json in it"
    return "expected what 'vz-edge export' wrote"


def _about_name(path: Path, manifest: str) -> str:
    name = str(path)
    if name in recipe_names():
        exported = EXPORTED_TO / name
        if isfile(exported / manifest):
            return f"{name} is a recipe's name; its bundle is {exported}"
        return f"{name} is a recipe's name; export it first (vz-edge export --model {name}) and give {exported}"
    if not path.is_absolute() and len(path.parts) == 2 and not exists(path.parent):
        return f"expected a bundle's folder; if {name} is a hub id, export it first: vz-edge export --model {name}"
    neighbours = _bundles_in(path.parent, manifest) + _bundles_in(EXPORTED_TO, manifest)
    if near := difflib.get_close_matches(path.name, [found.name for found in neighbours], n=1, cutoff=0.8):
        return f"did you mean {next(found for found in neighbours if found.name == near[0])}?"
    if near := difflib.get_close_matches(name, recipe_names(), n=1, cutoff=0.8):
        return f"if you mean the recipe {near[0]}, export it first: vz-edge export --model {near[0]}"
    return "expected a folder written by 'vz-edge export'"


def _enclosing_bundle(path: Path, manifest: str) -> Path | None:
    return next((parent for parent in list(path.parents)[:2] if isfile(parent / manifest)), None)


def _bundles_in(folder: Path, manifest: str) -> list[Path]:
    with suppress(OSError, ValueError):  # there is no such folder, or it may not be read
        return sorted(found for found in folder.iterdir() if isfile(found / manifest) and found.name[0] != ".")
    return []


def _listed(paths: list[Path]) -> str:
    more = f" and {len(paths) - SHOWN} more" if len(paths) > SHOWN else ""
    return ", ".join(map(str, paths[:SHOWN])) + more
