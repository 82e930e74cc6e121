"""Picture settings in every spelling: the device's pixels are those of the processor that transformers loads."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import AutoImageProcessor

from vz_edge.bundle import ImageSpec
from vz_edge.device.image import load_image, make_tiles
from vz_edge.errors import CheckpointError, ExportError, UnsupportedModelError, VzEdgeError
from vz_edge.host.preprocessing import image_spec, read_settings, settings_to_write
from vz_edge.recipe import ModelSpec, TowerSpec, load_recipe

SIDE = 28
GRID = ((28, 56), (56, 28), (56, 56))
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 90, 3), dtype=np.uint8))
USUAL: dict[str, Any] = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": SIDE},
    "crop_size": {"height": SIDE, "width": SIDE},
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
LLAVA = {"image_processor_type": "LlavaImageProcessor"}


def model_of(family: str) -> ModelSpec:
    recipe = load_recipe("llava-1.5-7b" if family == "llava" else "llava-next-7b").model
    grid = GRID if family == "llava_next" else ()
    return dataclasses.replace(recipe, tower=TowerSpec(image_size=SIDE), grid_pinpoints=grid)


def read(
    folder: Path, settings: dict[str, Any], family: str = "llava", asked: Any = None, config: Any = None
) -> ImageSpec:
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    config = {"model_type": family} if config is None else config
    return image_spec(read_settings(folder, config), config, model_of(family), asked, "stock")


SPELLINGS: list[dict[str, Any]] = [
    {},
    {"size": SIDE, "crop_size": SIDE},
    {"size": 41},
    {"size": [SIDE, SIDE], "crop_size": [SIDE, SIDE]},
    {"size": {"height": SIDE, "width": SIDE}, "do_center_crop": False},
    {"size": SIDE, "default_to_square": True, "do_center_crop": False},
    {"size": {"height": 40, "width": 31}},
    {"size": {"shortest_edge": 40}},
    {"do_resize": False},
    {"do_rescale": False},
    {"do_normalize": False},
    {"do_rescale": False, "do_normalize": False},
    {"rescale_factor": 1 / 127.5},
    {"image_mean": 0.5, "image_std": 0.25},
    *({name: None} for name in ("do_resize", "do_rescale", "do_normalize")),
    {"do_resize": False, "resample": None},
    {"do_normalize": False, "image_mean": None, "image_std": None},
    {"do_convert_rgb": False},
    {"do_pad": True},
    *({"resample": number} for number in range(6)),
    {"image_processor_type": "CLIPImageProcessorFast"},
    {"image_processor_type": "CLIPImageProcessorPil"},
    {"image_processor_type": None, "feature_extractor_type": "CLIPFeatureExtractor"},
    LLAVA,
    LLAVA | {"do_pad": True},
    LLAVA | {"do_pad": True, "size": {"shortest_edge": 40}},
    LLAVA | {"do_pad": True, "do_center_crop": False},
    LLAVA | {"do_pad": False},
]


@pytest.mark.parametrize("settings", SPELLINGS, ids=str)
@pytest.mark.parametrize("nested", [False, True])
def test_pixels_are_those_of_the_processor_that_transformers_loads(
    tmp_path: Path, settings: dict[str, Any], nested: bool
) -> None:
    found = {key: value for key, value in (USUAL | settings).items() if key in settings or value is not None}
    kind = found.get("image_processor_type") or "CLIPImageProcessor"
    if nested:
        (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": found}))
        spec = read(tmp_path, {"image_mean": [0.1, 0.2, 0.3]})
    else:
        spec = read(tmp_path, found)
    # The processor is loaded by the name that is in the file, for the backend that the device has.
    loadable = found | {
        "image_processor_type": kind.removesuffix("Fast").removesuffix("Pil"),
        "feature_extractor_type": None,
    }
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/preprocessor_config.json").write_text(json.dumps(loadable))
    processor = AutoImageProcessor.from_pretrained(tmp_path / "theirs", backend="pil")
    assert type(processor).__name__.endswith("Pil")
    expected = processor(PICTURE, return_tensors="np")["pixel_values"].astype(np.float32)
    pixels = make_tiles(load_image(PICTURE), model_of("llava"), spec).pixel_values
    np.testing.assert_array_equal(pixels, expected)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"do_normalize": False},
        {"do_rescale": False},
        {"do_resize": False},
        {"do_center_crop": False},
        {"do_pad": False},
        {"resample": 2},
    ],
    ids=str,
)
def test_a_grids_pixels_are_those_of_the_processor(tmp_path: Path, settings: dict[str, Any]) -> None:
    whole = USUAL | {"image_processor_type": "LlavaNextImageProcessor", "image_grid_pinpoints": [list(p) for p in GRID]}
    spec = read(tmp_path, whole | settings, "llava_next")
    processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    expected = np.asarray(processor(PICTURE, return_tensors="np")["pixel_values"][0], dtype=np.float32)
    np.testing.assert_array_equal(make_tiles(PICTURE, model_of("llava_next"), spec).pixel_values, expected)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llava", {"crop_size": {"height": 20, "width": 20}}, "crop_size"),
    ("llava", {"crop_size": {"shortest_edge": SIDE}}, "crop_size"),
    ("llava", {"do_center_crop": False}, "do_center_crop False"),
    ("llava", {"do_center_crop": False, "do_resize": False}, "do_center_crop False"),
    ("llava", {"do_center_crop": False, "size": {"height": 40, "width": SIDE}}, "do_center_crop False"),
    ("llava", {"size": {"shortest_edge": SIDE, "longest_edge": 90}}, "size"),
    ("llava", {"size": {"max_height": SIDE, "max_width": SIDE}}, "size"),
    ("llava", {"size": "large"}, "size is 'large'"),
    ("llava", {"size": {"shortest_edge": "28"}}, "size is"),
    ("llava", {"size": 0}, "size is"),
    ("llava", {"do_normalize": 1}, "do_normalize is 1; expected true or false"),
    ("llava", {"rescale_factor": "1/255"}, "rescale_factor"),
    ("llava", {"rescale_factor": True}, "rescale_factor"),
    ("llava", {"image_mean": [0.5, 0.5]}, "image_mean"),
    ("llava", {"image_std": [0.5, 0.0, 0.5]}, "image_std"),
    ("llava", {"image_mean": None}, "image_mean is None"),
    ("llava", {"rescale_factor": None}, "rescale_factor is None"),
    ("llava", {"size": None}, "size is None"),
    ("llava", {"do_center_crop": None}, "do_center_crop False"),
    ("llava", {"resample": None}, "resample is None"),
    ("llava", {"resample": 6}, "resample"),
    ("llava", {"resample": "bicubic"}, "resample"),
    ("llava", {"pad_size": {"height": 40, "width": 40}}, "pad_size"),
    ("llava", {"image_processor_type": "SiglipImageProcessor"}, "image_processor_type 'SiglipImageProcessor'"),
    ("llava", {"image_processor_type": "LlavaNextImageProcessor"}, "image_processor_type 'LlavaNextImageProcessor'"),
    ("llava", LLAVA | {"do_pad": True, "do_normalize": False}, "do_normalize False"),
    ("llava", LLAVA | {"do_pad": True, "image_mean": [120.0, 110.0, 100.0]}, "image_mean"),
    ("llava_next", {}, "image_processor_type 'CLIPImageProcessor'"),
    ("llava_next", {"image_processor_type": "LlavaNextImageProcessor"}, "image_grid_pinpoints"),
    (
        "llava_next",
        {"image_processor_type": "LlavaNextImageProcessor", "image_grid_pinpoints": [[56, 56]]},
        "others than",
    ),
    ("llava_next", {"image_processor_type": "LlavaNextImageProcessor", "size": {"shortest_edge": 40}}, "size"),
]


@pytest.mark.parametrize(("family", "settings", "message"), REFUSED, ids=str)
def test_what_gives_other_tiles_is_refused_by_name(
    tmp_path: Path, family: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises((CheckpointError, UnsupportedModelError)) as caught:
        read(tmp_path, USUAL | settings, family)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_who_says_how_pictures_that_are_no_squares_are_fitted(tmp_path: Path) -> None:
    padding = USUAL | LLAVA | {"do_pad": True}
    original = {"model_type": "llava_llama", "mm_vision_tower": "nowhere/clip", "image_aspect_ratio": "pad"}
    assert read(tmp_path, USUAL).mode == "stock"
    assert read(tmp_path, padding).mode == "pad"
    assert read(tmp_path, padding, asked="stock").mode == "stock"
    assert read(tmp_path, USUAL, config=original).mode == "pad"
    assert read(tmp_path, USUAL, config=original | {"image_aspect_ratio": None}).mode == "stock"
    with pytest.raises(ExportError):
        read(tmp_path, {}, "llava_next", asked="pad")


def test_the_original_code_takes_the_settings_of_the_tower(tmp_path: Path) -> None:
    tower = tmp_path / "clip"
    tower.mkdir()
    (tower / "preprocessor_config.json").write_text(json.dumps(USUAL | {"image_mean": [0.5] * 3}))
    config = {"model_type": "llava_llama", "mm_vision_tower": "openai/clip"}
    (tmp_path / "model").mkdir()
    assert read(tmp_path / "model", USUAL, config=config).mean == (0.5,) * 3


def test_without_a_file_pictures_are_clips(tmp_path: Path) -> None:
    config = {"model_type": "llava"}
    settings = read_settings(tmp_path, config)
    assert image_spec(settings, config, model_of("llava"), None, "stock").mean == tuple(USUAL["image_mean"])
    assert settings_to_write(settings)["image_std"] == USUAL["image_std"]


@pytest.mark.parametrize("text", ["[]", "{", '"x"', "7"])
def test_a_file_that_is_no_object_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(VzEdgeError, match=r"preprocessor_config\.json"):
        read_settings(tmp_path, {})
