"""How a checkpoint wants its pictures prepared: from the image processor's settings to an ImageSpec.

The settings are in ``preprocessor_config.json``, or since transformers 5 in the section ``image_processor`` of
``processor_config.json``, which wins; the original LLaVA code takes those of the tower's own repository. Each setting
has the meaning that transformers' class gives it, a missing one the class's default. What would not end in tiles of the
tower's size is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from vz_edge.bundle import ImageSpec
from vz_edge.errors import CheckpointError, ExportError, UnsupportedModelError
from vz_edge.host import original_llava
from vz_edge.host.checkpoint import read_json
from vz_edge.host.fields import check_fields
from vz_edge.host.model_config import grid_pinpoints
from vz_edge.host.source import local_tower
from vz_edge.recipe import ModelSpec

ImageMode = Literal["stock", "pad"]
# CLIP's own statistics (arXiv 2103.00020), which every LLaVA checkpoint inherits.
CLIP_PREPROCESSING: dict[str, Any] = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "rescale_factor": 1 / 255,
    "resample": 3,
}
# By family the classes that make its tiles; each may have "Fast" or "Pil" behind its name.
PROCESSORS = {
    "llava": ("CLIPImageProcessor", "CLIPFeatureExtractor", "LlavaImageProcessor"),
    "llava_next": ("LlavaNextImageProcessor",),
}
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]  # LlavaNextImageProcessor's default


class Settings(NamedTuple):
    """An image processor's settings, the file that has them, and whether the checkpoint is of the original code."""

    values: dict[str, Any]
    where: str
    is_original: bool


def read_settings(folder: Path, config: Mapping[str, Any]) -> Settings:
    """Find the settings of the checkpoint in ``folder``; without a file they are empty. Raises CheckpointError."""
    is_original = original_llava.is_original(dict(config))
    if is_original:
        tower = local_tower(str(config["mm_vision_tower"]), folder)
        if tower is not None and (tower / "preprocessor_config.json").is_file():
            path = tower / "preprocessor_config.json"
            return Settings(read_json(path), str(path), is_original)
    nested = folder / "processor_config.json"
    if nested.is_file() and isinstance(read_json(nested).get("image_processor"), Mapping):
        return Settings(dict(read_json(nested)["image_processor"]), f"{nested}: image_processor", is_original)
    path = folder / "preprocessor_config.json"
    return Settings(read_json(path) if path.is_file() else {}, str(path), is_original)


def image_spec(
    settings: Settings,
    config: Mapping[str, Any],
    model: ModelSpec,
    asked: ImageMode | None,
    fallback: ImageMode,
) -> ImageSpec:
    """What the device does to a picture. ``asked`` is the user's mode, ``fallback`` that of who is not told.

    Raises UnsupportedModelError, CheckpointError, and ExportError for a mode that the family does not have.
    """
    values, where, is_original = settings
    check_fields("image_processor", values, where)
    kind = _processor(settings, model.family)
    read = _Reader(values, where)
    mode = asked or _checkpoint_mode(read, kind, config, is_original) or fallback
    normalised = read.flag("do_normalize")
    spec = ImageSpec(
        mode,
        read.triple("image_mean", CLIP_PREPROCESSING["image_mean"]) if normalised else (0.0, 0.0, 0.0),
        read.triple("image_std", CLIP_PREPROCESSING["image_std"], above_zero=True) if normalised else (1.0, 1.0, 1.0),
        read.number("rescale_factor", CLIP_PREPROCESSING["rescale_factor"]) if read.flag("do_rescale") else 1.0,
        read.filter("resample") if read.flag("do_resize") or model.grid_pinpoints else CLIP_PREPROCESSING["resample"],
    )
    if mode == "pad":
        if model.grid_pinpoints:
            raise ExportError(
                "--image-mode pad does not apply to a model with a grid of tiles, which pads by itself; leave it out"
            )
        if not normalised or not all(0 <= mean <= 1 for mean in spec.mean):
            raise UnsupportedModelError(
                f"{where}: do_normalize {normalised!r} with image_mean {list(spec.mean)} is not supported where "
                "pictures are padded with the mean colour; supported: true, with means from 0 to 1"
            )
    if model.grid_pinpoints:
        _check_grid(read, model, is_original)
        return spec
    return replace(spec, **_scaling(read, model.tower.image_size, mode))


def settings_to_write(settings: Settings) -> dict[str, Any]:
    """What preprocessor_config.json of a bundle says."""
    return settings.values or dict(CLIP_PREPROCESSING)


class _Reader:
    """Reads settings with their types checked. Raises CheckpointError.

    A missing one is the class's default. Null is not: transformers keeps it, and a switch of null is off.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self.where = values, where

    def flag(self, name: str, default: bool = True) -> bool:
        value = self._get(name, default)
        return bool(value) if value is None or isinstance(value, bool) else self._refuse(name, "true or false")

    def number(self, name: str, default: float) -> float:
        value = self._get(name, default)
        return float(value) if _is_number(value) and value > 0 else self._refuse(name, "a number above 0")

    def triple(self, name: str, default: list[float], above_zero: bool = False) -> tuple[float, float, float]:
        value = self._get(name, default)
        numbers = [value] * 3 if _is_number(value) else value
        if not isinstance(numbers, list) or len(numbers) != 3 or not all(map(_is_number, numbers)):
            return self._refuse(name, "a number, or a list of 3 numbers")
        if above_zero and not all(number > 0 for number in numbers):
            return self._refuse(name, "numbers above 0")
        red, green, blue = map(float, numbers)
        return red, green, blue

    def filter(self, name: str) -> int:
        value = self._get(name, CLIP_PREPROCESSING[name])
        if type(value) is not int or not 0 <= value <= 5:
            return self._refuse(name, "one of Pillow's filters, 0 to 5")
        return value

    def size(self, name: str, side: int, square: bool) -> dict[str, int]:
        """As ``{"shortest_edge": n}`` or ``{"height": h, "width": w}``; a bare number is an edge, or a ``square``."""
        value = self._get(name, side)
        if type(value) is int:
            value = {"height": value, "width": value} if square else {"shortest_edge": value}
        elif isinstance(value, list) and len(value) == 2:
            value = {"height": value[0], "width": value[1]}
        if not isinstance(value, Mapping) or not all(type(length) is int and length > 0 for length in value.values()):
            return self._refuse(name, "pixels, as {'shortest_edge': ...} or {'height': ..., 'width': ...}")
        if set(value) not in ({"shortest_edge"}, {"height", "width"}):
            raise UnsupportedModelError(
                f"{self.where}: {name} {dict(value)!r} is not supported; supported: shortest_edge, or height and width"
            )
        return dict(value)

    def _get(self, name: str, default: Any) -> Any:
        return self.values.get(name, default)

    def _refuse(self, name: str, expected: str) -> Any:
        raise CheckpointError(f"{self.where}: {name} is {self.values[name]!r}; expected {expected}")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _processor(settings: Settings, family: str) -> str:
    """The class of the image processor, without the suffix of its backend. Raises UnsupportedModelError."""
    values, where, is_original = settings
    found = values.get("image_processor_type") or values.get("feature_extractor_type")
    # The original code tiles by itself and calls the processor for one tile.
    known = PROCESSORS["llava"] + PROCESSORS["llava_next"] if is_original else PROCESSORS[family]
    if found is None:
        return known[0]
    kind = str(found).removesuffix("Fast").removesuffix("Pil")
    if kind not in known:
        raise UnsupportedModelError(
            f"{where}: image_processor_type {found!r} is not supported for {family}; supported: {', '.join(known)}"
        )
    return kind


def _checkpoint_mode(read: _Reader, kind: str, config: Mapping[str, Any], is_original: bool) -> ImageMode | None:
    """What the checkpoint says of pictures that are no squares, if it does."""
    if is_original:
        return original_llava.image_mode(dict(config))
    if kind != "LlavaImageProcessor" or read.values.get("do_pad") is None:
        return None
    return "pad" if read.flag("do_pad") else "stock"


def _check_grid(read: _Reader, model: ModelSpec, is_original: bool) -> None:
    """A grid's tiles are made at the tower's size and only normalised afterwards."""
    side = model.tower.image_size
    square = read.flag("default_to_square", default=False)
    for name in ("size", "crop_size"):
        found = read.size(name, side, square or name == "crop_size")
        if set(found.values()) != {side}:
            raise UnsupportedModelError(
                f"{read.where}: {name} {read.values[name]!r} is not supported with tiles of {side} pixels; supported: "
                f"{side}"
            )
    if is_original or not read.values:
        return
    if grid_pinpoints(read.values.get("image_grid_pinpoints", PINPOINTS), side) != model.grid_pinpoints:
        raise CheckpointError(
            f"{read.where}: image_grid_pinpoints are others than those of config.json, so that pictures are tiled in "
            "one way and read in another; take both files from the same repository"
        )


def _scaling(read: _Reader, side: int, mode: ImageMode) -> dict[str, Any]:
    """How the one tile is scaled and cut, as fields of ImageSpec that are not the default."""
    square = read.flag("default_to_square", default=False) or read.flag("use_square_size", default=False)
    size, resized = read.size("size", side, square), read.flag("do_resize")
    if read.flag("do_center_crop"):
        crop = read.size("crop_size", side, square=True)
        if set(crop) != {"height", "width"} or set(crop.values()) != {side}:
            raise UnsupportedModelError(
                f"{read.where}: crop_size {read.values['crop_size']!r} is not supported with a tower of {side} pixels; "
                f"supported: {side} x {side}"
            )
    else:
        is_square = set(size.values()) == {side} and ("height" in size or mode == "pad")
        if not resized or not is_square:
            raise UnsupportedModelError(
                f"{read.where}: do_center_crop False with size {size} and do_resize {resized!r} is not supported: it "
                f"gives pictures of many sizes, and the tower reads {side} x {side}; supported: height and width {side}"
            )
    if not resized:
        return {"resize": False}
    if "height" in size:
        return {"exact_size": (size["height"], size["width"])}
    return {} if size["shortest_edge"] == side else {"short_edge": size["shortest_edge"]}
