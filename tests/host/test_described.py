"""A checkpoint in a plan: what its config alone says, in every layout, is what its export would read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.test_cli import vz_edge
from tests.tiny import make_checkpoint
from vz_edge.errors import CheckpointError, RecipeError
from vz_edge.host import described, source
from vz_edge.host.described import recipe_of
from vz_edge.host.export import ExportRequest, plan_export
from vz_edge.recipe import load_recipe


@pytest.mark.parametrize("family", ["llava", "llava_next"])
@pytest.mark.parametrize("layout", ["new", "original"])
def test_a_config_alone_gives_what_an_export_plans(tmp_path: Path, family: str, layout: str) -> None:
    make_checkpoint(tmp_path / "mine", family=family, layout=layout)  # type: ignore[arg-type]
    export = plan_export(ExportRequest(str(tmp_path / "mine"), tmp_path / "out"))
    for shard in tmp_path.rglob("*.safetensors*"):
        shard.unlink()
    recipe = recipe_of(str(tmp_path / "mine"))
    assert recipe.model == export.model and recipe.name == export.source.name
    assert recipe.tokens == export.budgets[0].total(export.model.max_tiles)
    assert recipe.vanilla_7b == {"llava": "llava-1.5-7b", "llava_next": "llava-next-7b"}[family]
    assert recipe.published_accuracy is None


def test_of_a_hub_id_only_the_config_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkpoint(tmp_path / "mine", family="llava_next")
    asked = []

    def download(hub_id: str, patterns: tuple[str, ...] = source.HUB_PATTERNS) -> Path:
        asked.append((hub_id, patterns))
        return tmp_path / "mine"

    monkeypatch.setattr(described, "download", download)
    assert recipe_of("someone/their-llava").name == "their-llava"
    assert asked == [("someone/their-llava", ("config.json",))]
    assert recipe_of("llava-next-13b") == load_recipe("llava-next-13b") and len(asked) == 1


def test_what_cannot_be_exported_is_not_planned(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "mine", family="llava_next")
    config = json.loads((tmp_path / "mine" / "config.json").read_text())
    (tmp_path / "mine" / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "awq"}})
    )
    with pytest.raises(CheckpointError, match=r"quantised already .*awq"):
        recipe_of(str(tmp_path / "mine"))


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        recipe_of(str(tmp_path))
    with pytest.raises(RecipeError, match="nearest recipes"):
        recipe_of("/nowhere/at/all")


def test_plan_and_inspect_take_a_checkpoint(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "mine", family="llava_next")
    (tmp_path / "mine" / "model.safetensors").write_bytes(b"no weight is read")
    for command in (("plan", "--device", "cpu", "--model"), ("plan", "--solve", "cpu", "--model"), ("inspect",)):
        done = vz_edge(*command, tmp_path / "mine")
        assert done.returncode == 0 and "mine" in done.stdout, done.stderr
    for command in (("plan", "--model"), ("inspect",)):
        for given in (tmp_path, "/nowhere/at/all", "llava-next-13"):
            done = vz_edge(*command, given)
            assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
