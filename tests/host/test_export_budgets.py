"""A bundle of several budgets gives for each of them what a bundle of that one gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.cli.test_cli import vz_edge
from tests.tiny import make_checkpoint
from vz_edge.device.model import EdgeModel
from vz_edge.errors import BudgetError, RequestError
from vz_edge.host.export import ExportRequest, SilentProgress, plan_export, write_bundle
from vz_edge.serve.robot import CameraSettings, PushedCamera
from vz_edge.watch import Frame

PICTURE = np.random.default_rng(0).integers(0, 256, (150, 150, 3), dtype=np.uint8)
TOTALS = (90, 60, 25)  # of five tiles
QUESTION = "What is this?"


def exported(folder: Path, tokens: str) -> EdgeModel:
    out = folder / tokens.replace(",", "-")
    write_bundle(
        plan_export(ExportRequest(str(folder / "checkpoint"), out, tokens=tokens, force=True)), SilentProgress()
    )
    return EdgeModel.load(out, threads=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("budgets")
    make_checkpoint(folder / "checkpoint", family="llava_next")
    return folder


@pytest.fixture(scope="module")
def several(folder: Path) -> EdgeModel:
    return exported(folder, ",".join(map(str, TOTALS)))


@pytest.mark.parametrize("tokens", TOTALS)
def test_each_budget_is_what_it_is_alone(several: EdgeModel, folder: Path, tokens: int) -> None:
    alone = exported(folder, str(tokens))
    found, expected = several.encode(PICTURE, tokens), alone.encode(PICTURE)
    np.testing.assert_array_equal(found.features, expected.features)
    np.testing.assert_array_equal(found.kept, expected.kept)
    replies = [
        alone.ask(PICTURE, QUESTION, max_new_tokens=6),
        several.ask(PICTURE, QUESTION, tokens=tokens, max_new_tokens=6),
        several.ask_many(PICTURE, [QUESTION], tokens=tokens, max_new_tokens=6)[0],
    ]
    assert {reply.token_ids for reply in replies} == {replies[0].token_ids}
    assert {reply.image_tokens for reply in replies} == {tokens}


def test_the_first_is_the_default(several: EdgeModel) -> None:
    np.testing.assert_array_equal(several.encode(PICTURE).features, several.encode(PICTURE, TOTALS[0]).features)


def test_a_session_takes_each_picture_at_its_own_budget(several: EdgeModel) -> None:
    session = several.session()
    assert session.look(PICTURE).image_tokens == TOTALS[0]
    assert session.look(PICTURE, tokens=25).image_tokens == 25
    reply = session.ask(QUESTION, max_new_tokens=6)
    assert reply.token_ids == several.ask(PICTURE, QUESTION, tokens=25, max_new_tokens=6).token_ids
    session.look(PICTURE, add=True, tokens=60)
    assert session.ask(QUESTION, max_new_tokens=2).image_tokens == 25 + 60


def test_a_picture_that_is_encoded_has_its_tokens_already(several: EdgeModel) -> None:
    encoded, session = several.encode(PICTURE, 25), several.session()
    for ask in (several.ask, several.stream):
        with pytest.raises(RequestError, match="tokens 60 came with a picture that is encoded"):
            ask(encoded, QUESTION, tokens=60)
    with pytest.raises(RequestError, match="tokens 60 came"):
        several.ask_many([encoded, encoded], [QUESTION], tokens=60)
    session.look(PICTURE)
    with pytest.raises(RequestError, match="tokens 25 came"):
        session.look(encoded, add=True, tokens=25)
    # The one that is not encoded yet is meant.
    assert several.ask([encoded, PICTURE], QUESTION, tokens=60, max_new_tokens=2).image_tokens == 25 + 60


def test_frames_are_looked_at_with_the_budget_that_was_asked_for(several: EdgeModel) -> None:
    asked = (QUESTION, {"max_new_tokens": 6})
    expected = several.ask(PICTURE, QUESTION, tokens=25, max_new_tokens=6).token_ids
    watched = list(several.watch([PICTURE], [asked], tokens=25))
    camera = PushedCamera(several, [], CameraSettings(tokens=25), lambda result: None)
    camera.put(Frame(PICTURE))
    for result in (*watched, camera.ask([asked])):
        (reply,) = result.replies
        assert reply is not None and (reply.image_tokens, reply.token_ids) == (25, expected)
    (reply,) = next(several.watch([PICTURE], [asked])).replies
    assert reply is not None and reply.image_tokens == TOTALS[0]


def test_the_export_compares_every_budget_with_torch(several: EdgeModel) -> None:
    vision = several.manifest.parity.vision
    assert vision is not None
    for record, total in zip([vision, *several.manifest.parity.more_budgets], TOTALS, strict=True):
        assert record.tokens == total * vision.tiles // 5
        assert record.max_error < 1e-4 and record.kept_agreement == 1.0


def test_a_budget_that_is_not_there_is_refused(several: EdgeModel, folder: Path) -> None:
    with pytest.raises(BudgetError, match="has budgets of 90, 60, 25 tokens, not of 30"):
        several.encode(PICTURE, 30)
    with pytest.raises(BudgetError, match="exported with all tokens, not of 90"):
        exported(folder, "all").ask(PICTURE, QUESTION, tokens=90)
    refused = vz_edge("run", folder / "90-60-25", "--tokens", "30", "--image", "examples/scene.jpg", QUESTION)
    assert refused.returncode == 2 and "not of 30" in refused.stderr


def test_inspect_names_all_budgets(several: EdgeModel, folder: Path) -> None:
    shown = vz_edge("inspect", folder / "90-60-25")
    assert shown.returncode == 0, shown.stderr
    assert "further budgets, in all: 60, 25 tokens" in shown.stdout
    assert "vision at 60 tokens against torch: tokens 36" in shown.stdout


@pytest.mark.parametrize(
    ("tokens", "message"),
    [("90,all", "stands alone"), ("90,60,90", "names a total twice"), ("90,61", "nearest: 60 or 65"), ("90,", "whole")],
)
def test_impossible_lists_are_refused(folder: Path, tokens: str, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        plan_export(ExportRequest(str(folder / "checkpoint"), folder / "refused", tokens=tokens))


def test_what_one_budget_needs_is_all_that_several_store(several: EdgeModel, folder: Path) -> None:
    several_bytes = several.manifest.files["vision.onnx.data"].size_bytes
    alone_bytes = exported(folder, "90").manifest.files["vision.onnx.data"].size_bytes
    assert several_bytes - alone_bytes < 2_000 * len(TOTALS)  # positions 0 to 36, which each selection counts
