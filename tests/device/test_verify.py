"""What ``vz-edge verify`` says of the differences that it finds."""

from __future__ import annotations

import PIL
import pytest

from vz_edge.device.verify import SecondLook


@pytest.mark.parametrize("kept", [None, 1.0])
def test_rounding_alone_is_as_exported(kept: float | None) -> None:
    look = SecondLook(kept, 7.5e-7, True, True)
    assert look.agrees("cpu") and look.verdict("cpu").startswith("as exported")
    assert "could not record" in SecondLook(kept, 0.0, None, True).verdict("cpu")


@pytest.mark.parametrize(
    ("look", "said"),
    [
        (SecondLook(1.0, 2.8e-3, True, True), "the same patches are kept, features differ by 0.28%"),  # Pillow 12, 13
        (SecondLook(None, 2.9e-3, True, True), "as expected: features differ by 0.29%"),
        (SecondLook(0.96, 0.4, True, True), "4.0% of the kept patches are others, at the edge"),
    ],
)
def test_another_pillow_or_processor_is_as_expected(look: SecondLook, said: str) -> None:
    assert look.agrees("cpu")
    assert said in look.verdict("cpu") and "does not matter" in look.verdict("cpu")
    assert f"12 beside 13; here {PIL.__version__}" in look.verdict("cpu")


@pytest.mark.parametrize(
    ("look", "fault"),
    [
        (SecondLook(0.5, 0.4, True, True), "only 50.0% of the kept patches are the same"),
        (SecondLook(0.0, 0.4, True, True), "only 0.0% of the kept patches"),
        (SecondLook(1.0, 0.02, True, True), "features differ by 2.0% of the largest (expected at most 1%)"),
        (SecondLook(None, float("nan"), None, True), "features differ by nan%"),
        (SecondLook(1.0, 0.0, False, True), "the next token is another"),
        (SecondLook(1.0, 0.0, True, False), "logits are not finite"),
    ],
)
def test_what_matters_is_a_fault(look: SecondLook, fault: str) -> None:
    assert not look.agrees("cpu") and [fault in words for words in look.faults("cpu")] == [True]
