from pathlib import Path

import pytest

from vz_edge.errors import CheckpointError, ExportError, RecipeError
from vz_edge.host import source
from vz_edge.recipe import load_recipe


def test_a_folder_is_named_after_itself(tmp_path: Path) -> None:
    found = source.resolve(str(tmp_path))
    assert (found.name, found.folder, found.recipe) == (tmp_path.name, tmp_path, None)


def test_a_recipe_brings_its_checkpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []
    monkeypatch.setattr(source, "fetch", lambda hub_id: asked.append(hub_id) or tmp_path)
    found = source.resolve("llava-next-13b")
    assert found.recipe == load_recipe("llava-next-13b")
    assert found.folder == tmp_path
    assert asked == ["llava-hf/llava-v1.6-vicuna-13b-hf"]
    assert source.resolve("someone/their-llava").checkpoint == "someone/their-llava"


@pytest.mark.parametrize("model", ["lava-next-13b", "/nowhere", "./nowhere", "a/b/c"])
def test_what_is_nothing_is_refused_with_the_nearest(model: str) -> None:
    with pytest.raises(RecipeError, match="nearest recipes"):
        source.resolve(model)


def test_the_tower_may_lie_beside_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"mm_vision_tower": "openai/clip-vit-large-patch14-336"}
    monkeypatch.setattr(source, "download", lambda hub_id: Path("downloaded") / hub_id)
    checkpoint = tmp_path / "llava"
    assert source.resolve_tower(config, checkpoint) == Path("downloaded/openai/clip-vit-large-patch14-336")
    (tmp_path / "clip-vit-large-patch14-336").mkdir()
    assert source.resolve_tower(config, checkpoint) == tmp_path / "clip-vit-large-patch14-336"
    with pytest.raises(CheckpointError, match="mm_vision_tower"):
        source.resolve_tower({}, checkpoint)


def test_a_checkpoint_without_a_prompt_takes_that_of_its_shape() -> None:
    model = load_recipe("llava-next-34b").model
    assert source.matching_recipe(model) == load_recipe("llava-next-34b")


def test_a_recipe_of_another_model_than_its_checkpoint_is_refused(tmp_path: Path) -> None:
    recipe = load_recipe("llava-next-7b")
    found = source.Source(recipe.name, recipe.checkpoint, tmp_path, recipe)
    source.check_recipe(found, recipe.model)
    with pytest.raises(ExportError, match=r"40 layers.* the recipe llava-next-7b says .*32 layers.*as --model"):
        source.check_recipe(found, load_recipe("llava-next-13b").model)
    source.check_recipe(source.Source("any", "any", tmp_path, None), recipe.model)


def hub_cache(tmp_path: Path, snapshots: int = 1) -> Path:
    root = tmp_path / "models--me--my-llava"
    for number in range(snapshots):
        (root / f"snapshots/{number}").mkdir(parents=True)
        (root / f"snapshots/{number}/config.json").write_text("{}")
    return root


@pytest.mark.parametrize("inside", ["", "snapshots", "snapshots/0"])
def test_a_folder_of_the_hubs_cache_is_its_snapshot_and_named_after_the_model(tmp_path: Path, inside: str) -> None:
    root = hub_cache(tmp_path)
    found = source.resolve(str(root / inside))
    assert (found.name, found.checkpoint, found.folder) == ("my-llava", "me/my-llava", root / "snapshots/0")


def test_of_several_snapshots_the_main_one_is_taken(tmp_path: Path) -> None:
    root = hub_cache(tmp_path, snapshots=2)
    with pytest.raises(CheckpointError, match=r"several snapshots \(0, 1\); give the folder of one"):
        source.resolve(str(root))
    (root / "refs").mkdir()
    (root / "refs/main").write_text("1\n")
    assert source.resolve(str(root)).folder == root / "snapshots/1"
    assert source.resolve(str(root / "snapshots/0")).folder == root / "snapshots/0"


def test_an_empty_cache_and_a_file_say_what_to_give(tmp_path: Path) -> None:
    (tmp_path / "models--a--b/snapshots").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="no snapshot"):
        source.resolve(str(tmp_path / "models--a--b"))
    (tmp_path / "model.gguf").write_text("")
    with pytest.raises(CheckpointError, match="is a file; expected the folder"):
        source.resolve(str(tmp_path / "model.gguf"))


def test_weights_that_cannot_be_exported_are_not_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []
    monkeypatch.setattr(source, "download", lambda hub_id, patterns=None: asked.append(patterns) or tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llava", "quantization_config": {"quant_method": "awq"}}')
    with pytest.raises(CheckpointError, match="quantised already"):
        source.resolve("someone/llava-awq")
    assert asked == [source.SMALL_FILES]
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    assert source.resolve("someone/llava").folder == tmp_path
    assert asked[1:] == [source.SMALL_FILES, None]
