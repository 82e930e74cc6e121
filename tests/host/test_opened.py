"""Where an original checkpoint's tower is, and a plan's model without weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import TOWER_FOLDER, VISION, make_checkpoint
from vz_edge.errors import CheckpointError, UnsupportedModelError
from vz_edge.host import source
from vz_edge.host.opened import open_model, read_model


def name_tower(folder: Path, tower: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"mm_vision_tower": tower}))


@pytest.mark.parametrize("place", ["absolute", "inside", "beside", "cached"])
def test_the_config_of_a_tower_whose_weights_are_in_the_shards(tmp_path: Path, place: str) -> None:
    """It is no ViT-L, which is what a name without a folder would mean."""
    make_checkpoint(tmp_path / "model", layout="original_with_tower")
    tower = {"inside": tmp_path / "model/clip", "cached": tmp_path / "models--me--clip"}.get(place, tmp_path / "clip")
    (tmp_path / TOWER_FOLDER).rename(tower)
    if place == "cached":
        (tower / "snapshots").mkdir()
        (tower / "config.json").rename(tmp_path / "config.json")
        (tower / "snapshots/1").mkdir()
        (tmp_path / "config.json").rename(tower / "snapshots/1/config.json")
    name_tower(tmp_path / "model", {"inside": "clip", "beside": "owner/clip"}.get(place, str(tower)))
    found = open_model(tmp_path / "model").model
    assert found.tower.hidden_size == VISION["hidden_size"] and found.tower.layers == VISION["num_hidden_layers"]


def test_the_tower_that_everybody_has_needs_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "download", lambda *_: pytest.fail("nothing is to be downloaded"))
    make_checkpoint(tmp_path / "model", layout="original_with_tower")
    (tmp_path / TOWER_FOLDER).rename(tmp_path / "elsewhere")
    assert open_model(tmp_path / "model").model.tower.layers == 24


def test_of_another_tower_the_config_alone_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkpoint(tmp_path / "model", layout="original_with_tower")
    (tmp_path / TOWER_FOLDER).rename(tmp_path / "downloaded")
    name_tower(tmp_path / "model", "me/clip-of-mine")
    asked: list[Any] = []
    monkeypatch.setattr(source, "download", lambda *args: asked.append(args) or tmp_path / "downloaded")
    assert open_model(tmp_path / "model").model.tower.hidden_size == VISION["hidden_size"]
    assert asked == [("me/clip-of-mine", ("config.json",))]


@pytest.mark.parametrize("layout", ["new", "original", "original_with_tower"])
def test_a_plan_needs_no_weights(tmp_path: Path, layout: Any) -> None:
    make_checkpoint(tmp_path / "model", "llava_next", layout=layout)
    expected = read_model(tmp_path / "model")
    assert expected == open_model(tmp_path / "model").model
    (tmp_path / "model/model.safetensors").unlink()
    assert read_model(tmp_path / "model") == expected


@pytest.mark.parametrize("value", [None, 7, ["clip"]], ids=repr)
def test_a_tower_that_is_no_name(tmp_path: Path, value: Any) -> None:
    make_checkpoint(tmp_path / "model", layout="original_with_tower")
    name_tower(tmp_path / "model", value)
    with pytest.raises((CheckpointError, UnsupportedModelError), match="mm_vision_tower"):
        open_model(tmp_path / "model")
