"""The bitsandbytes trial against a stand-in that quantises to NF4, rightly and wrongly."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import pytest
import torch

from vz_edge.backends.bitsandbytes_trial import kernel_trial
from vz_edge.device.process import Outcome
from vz_edge.host import doctor

# The code of QLoRA (arXiv 2305.14314, appendix E), rounded.
NEGATIVE = (-1, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911)
POSITIVE = (0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1)
NF4 = torch.tensor([*NEGATIVE, 0, *POSITIVE])


def stand_in(factor: float = 1.0, code: torch.Tensor = NF4, failure: Exception | None = None) -> dict[str, ModuleType]:
    """``bitsandbytes`` with its names; ``factor`` is a fault of the product, ``code`` one of the weights."""
    package, functional = ModuleType("bitsandbytes"), ModuleType("bitsandbytes.functional")

    def quantize_4bit(weight: torch.Tensor, blocksize: int, quant_type: str) -> tuple[torch.Tensor, object]:
        if failure:
            raise failure
        assert quant_type == "nf4"
        blocks = weight.reshape(-1, blocksize)
        largest = blocks.abs().amax(1, keepdim=True)
        nearest = (blocks / largest).unsqueeze(-1).sub(NF4).abs().argmin(-1)
        return torch.zeros(weight.numel() // 2, 1, dtype=torch.uint8), (code[nearest] * largest).reshape(weight.shape)

    functional.quantize_4bit = quantize_4bit  # type: ignore[attr-defined]
    functional.dequantize_4bit = lambda packed, state: state  # type: ignore[attr-defined]
    package.functional = functional  # type: ignore[attr-defined]
    package.matmul_4bit = lambda x, packed, state: factor * x @ state.T  # type: ignore[attr-defined]
    return {"bitsandbytes": package, "bitsandbytes.functional": functional}


def tried(monkeypatch: pytest.MonkeyPatch, modules: dict[str, ModuleType]) -> doctor.Finding:
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return doctor.bitsandbytes_finding(kernel_trial(4, "cpu"))


def test_a_right_kernel_is_told_from_a_wrong_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tried(monkeypatch, stand_in()).state == "ok"
    for broken in (stand_in(factor=1.1), stand_in(factor=float("nan")), stand_in(code=NF4.flip(0))):
        finding = tried(monkeypatch, broken)
        assert finding.state == "warning" and finding.detail.startswith("wrong numbers on cpu")


def test_a_kernel_that_ends_the_process_is_a_warning_with_a_way_out() -> None:
    died = Outcome(None, "the process ended with status 1 (Error named symbol not found at line 233)")
    finding = doctor.bitsandbytes_finding(died)
    assert finding.state == "warning" and "named symbol" in finding.detail and "source" in finding.fix


def test_without_bitsandbytes_there_is_nothing_to_find(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert doctor.bitsandbytes_findings() == []
