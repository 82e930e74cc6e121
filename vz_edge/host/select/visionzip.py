"""VisionZip's token selection (arXiv 2412.04467, section 3): which visual tokens of a tile are worth keeping.

A tile of ``p`` patches leaves the tower as ``1 + p`` tokens, CLS first. Two kinds survive:

* **dominant** tokens: CLS and the patches that CLS attends to most. A few patches carry almost all of that
  attention, because a deep layer gathers what it has understood in few places.
* **contextual** tokens: what is left is not thrown away but merged. Evenly spaced targets are picked from the
  rest, every other token joins the target whose attention key is most like its own, and a contextual token is
  its target plus the mean of those that joined.

Everything here is plain batched torch over tiles, with sizes fixed by the budget and a free number of tiles, so
the same code runs inside a torch model and, traced, inside the vision graph.

>>> selection = select(hidden, cls_scores(query, key, heads), mean_keys(key, heads), TokenBudget(54, 10))
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vz_edge.budget import TokenBudget

SMALLEST_NORM = 1e-12  # a key of zeros is like nothing, not NaN


class Selection(NamedTuple):
    """What is kept of ``t`` tiles.

    ``kept`` [t, dominant] int64: positions among the 1 + p tokens, ascending, 0 (CLS) first.
    ``dominant`` [t, dominant, d]: the hidden states at these positions.
    ``contextual`` [t, contextual, d]: the merged rest, in the order of their targets.
    ``merged`` [t, 1 + p] int64: which contextual token each position went into, its target too; -1 for those kept.
    """

    kept: Tensor
    dominant: Tensor
    contextual: Tensor
    merged: Tensor


def cls_scores(query: Tensor, key: Tensor, heads: int) -> Tensor:
    """Attention that CLS pays to each patch, summed over heads.

    ``query`` [t, d] is the CLS row and ``key`` [t, 1 + p, d] all rows of the layer that produced the hidden
    states. Returns [t, p] float32, in which softmax ran over CLS too, as in the layer itself.
    """
    per_head = key.float().unflatten(-1, (heads, -1)).permute(0, 2, 3, 1)  # [t, heads, head_dim, 1 + p]
    head_query = query.float().unflatten(-1, (heads, 1, -1))  # [t, heads, 1, head_dim]
    attention = (head_query @ per_head * per_head.shape[2] ** -0.5).softmax(dim=-1)
    return attention.sum(dim=1)[:, 0, 1:]


def mean_keys(key: Tensor, heads: int) -> Tensor:
    """Keys [t, 1 + p, d] averaged over heads: [t, 1 + p, d / heads] float32."""
    return key.float().unflatten(-1, (heads, -1)).mean(dim=2)


def select(hidden: Tensor, scores: Tensor, keys: Tensor, budget: TokenBudget) -> Selection:
    """Reduce ``hidden`` [t, 1 + p, d] to ``budget`` tokens a tile.

    ``scores`` [t, p] ranks the patches; ``keys`` [t, 1 + p, head_dim] says which tokens are alike (they are
    L2-normalised here). Scores, similarity and means are computed in float32 whatever the dtype of ``hidden``,
    because rounding them would change which tokens are kept; the result has the dtype of ``hidden``.

    Of equal scores ONNX Runtime keeps the lower position; torch leaves that choice to the device.
    """
    tokens = hidden.shape[1]
    position = torch.arange(tokens, device=hidden.device)
    best = scores.float().topk(budget.dominant - 1).indices + 1
    dropped = (position > 0).long().expand(hidden.shape[0], -1).scatter(1, best, 0)
    # Sorting these unique keys lists the kept positions, then the others, each in spatial order.
    order = (position + tokens * dropped).topk(tokens, largest=False).indices
    kept, rest = order.split([budget.dominant, tokens - budget.dominant], dim=1)

    stride = rest.shape[1] // budget.contextual
    targets = rest[:, : stride * budget.contextual : stride]
    joining = dropped.scatter(1, targets, 0)

    alike = keys.float() / keys.float().norm(dim=-1, keepdim=True).clamp(min=SMALLEST_NORM)
    nearest = (alike @ _rows(alike, targets).transpose(1, 2)).argmax(dim=-1)  # [t, 1 + p], the first maximum
    number = position[: budget.contextual]
    members = (nearest.unsqueeze(-1) == number) * joining.unsqueeze(-1).float()
    share = members / members.sum(dim=1, keepdim=True).clamp(min=1)  # [t, 1 + p, contextual]
    mean = share.transpose(1, 2) @ hidden.float()
    contextual = _rows(hidden, targets) + mean.to(hidden.dtype)
    merged = nearest.where(joining > 0, -1).scatter(1, targets, number.expand_as(targets))
    return Selection(kept, _rows(hidden, kept), contextual, merged)


def _rows(values: Tensor, positions: Tensor) -> Tensor:
    """Rows ``positions`` [t, k] of ``values`` [t, n, d], as [t, k, d]."""
    tiles, tokens, width = values.shape
    start = torch.arange(tiles, device=values.device).unsqueeze(1) * tokens
    return values.reshape(-1, width).index_select(0, (positions + start).flatten()).reshape(tiles, -1, width)
