from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import bundles, serve_cache
from benchmarks.serve_cache import Turn


@pytest.mark.parametrize("there", [False, True])
def test_what_was_not_there_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    checkpoint, bundle = tmp_path / "tiny", bundles.bundle_folder("tiny", "cpu", tmp_path)
    if there:
        checkpoint.mkdir()

    def made(shape: str, target: str, work: Path) -> Path:
        for folder in (checkpoint, bundle):
            folder.mkdir(exist_ok=True)
        return bundle

    monkeypatch.setattr(bundles, "bundle", made)
    with pytest.raises(KeyError), serve_cache.lent_bundle("tiny", tmp_path) as lent:
        assert lent == bundle and lent.exists()
        raise KeyError
    assert checkpoint.exists() == there and not bundle.exists()


def test_the_bar_is_the_median_of_the_rounds_own_ratios() -> None:
    rounds = [(Turn(first, "a", 400, 0), Turn(1.0, "b", 440, 400)) for first in (4.0, 9.0, 10.0)]
    taken = {"kept": rounds, "nothing kept": rounds}
    made = serve_cache.report("1b", taken, busy=0.0)
    assert [(bar.value, bar.met) for bar in made.bars] == [(9.0, True)]
    assert [row["of them cached"] for row in made.rows] == ["0", "400"] * 2
    assert not serve_cache.report("tiny", taken, busy=0.0).bars
