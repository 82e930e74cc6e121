"""Muon for the matrices of transformer layers, AdamW for everything else, one schedule for both.

Muon ("Muon: an optimizer for hidden layers in neural networks", K. Jordan, 2024) is what makes training on two cores
feasible: the tower reads digits after a fifth of the steps that AdamW needs to know shapes.
"""

import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.nn import Parameter

MUON_LR = 0.02
WARM_UP_STEPS = 40
LAST_LR_SHARE = 0.02


class MuonAndAdamW:
    """Steps both optimizers on the clipped mean gradient over workers; the rate falls as a cosine over `steps`."""

    def __init__(self, named: Iterable[tuple[str, Parameter]], adamw_lr: float, steps: int) -> None:
        chosen = list(named)
        matrices = [parameter for name, parameter in chosen if ".layers." in name and parameter.ndim == 2]
        others = [parameter for name, parameter in chosen if ".layers." not in name or parameter.ndim != 2]
        self.steps = steps
        self.parameters = matrices + others
        self._optimizers = [
            torch.optim.Muon(matrices, lr=MUON_LR, weight_decay=0.0, momentum=0.95),
            torch.optim.AdamW(others, lr=adamw_lr, betas=(0.9, 0.97), weight_decay=0.0),
        ]
        self._peaks = [MUON_LR, adamw_lr]

    def step(self, number: int) -> None:
        """Step `number` (from 0) of `steps`; gradients are cleared after it."""
        warm = min(1.0, (number + 1) / WARM_UP_STEPS)
        share = LAST_LR_SHARE + (1 - LAST_LR_SHARE) * (1 + math.cos(math.pi * number / self.steps)) / 2
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer, peak in zip(self._optimizers, self._peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * warm * share
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict]:
        return [optimizer.state_dict() for optimizer in self._optimizers]

    def load_state_dict(self, states: list[dict]) -> None:
        for optimizer, state in zip(self._optimizers, states, strict=True):
            optimizer.load_state_dict(state)
