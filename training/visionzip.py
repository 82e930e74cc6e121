"""VisionZip selection in torch, for training at mixed token budgets (arXiv 2412.04467, its published code).

A tile has 577 tokens, CLS first. `dominant` counts CLS: "54 dominant" is CLS and the 53 patches with the highest
CLS attention. The rest is merged into `contextual` tokens by similarity of keys.
"""

import torch
from torch import Tensor
from torch.nn import functional as nnf


def select_tile(
    hidden: Tensor, scores: Tensor, keys: Tensor, dominant: int, contextual: int
) -> tuple[Tensor, Tensor, Tensor]:
    """One tile: hidden (577, width), scores (576,), keys (577, head_dim).

    Returns the kept patch numbers in spatial order (dominant - 1,), the tokens CLS and kept patches
    (dominant, width), and the merged ones (contextual, width).
    """
    patches = scores.topk(dominant - 1).indices.sort().values
    kept = torch.cat([patches.new_zeros(1), patches + 1])
    is_rest = torch.ones(len(hidden), dtype=torch.bool)
    is_rest[kept] = False
    rest, metric = hidden[is_rest], nnf.normalize(keys[is_rest].float(), dim=-1)
    is_target = torch.zeros(len(rest), dtype=torch.bool)
    is_target[torch.arange(contextual) * max(1, len(rest) // contextual)] = True
    nearest = (metric[~is_target] @ metric[is_target].T).argmax(-1)
    assigned = nnf.one_hot(nearest, contextual).float()
    mean = assigned.T @ rest[~is_target].float() / assigned.sum(0).clamp(min=1)[:, None]
    return patches, hidden[kept], rest[is_target] + mean.to(hidden.dtype)


def select_picture(
    hidden: Tensor, scores: Tensor, keys: Tensor, grid: tuple[int, int], dominant: int, contextual: int
) -> Tensor:
    """All tiles of a picture, base tile first, in VisionZip's anyres order: (tiles * (dominant + contextual), width).

    Base tile as it is; then the dominant patches of the whole grid row by row (a row runs across tiles), then the
    grid tiles' CLS tokens, then their contextual tokens. grid: (rows, columns) of tiles.
    """
    parts = [select_tile(h, s, k, dominant, contextual) for h, s, k in zip(hidden, scores, keys, strict=True)]
    side = int(scores.shape[1] ** 0.5)
    places = []
    for tile, (patches, _, _) in enumerate(parts[1:]):
        row = tile // grid[1] * side + patches // side
        column = tile % grid[1] * side + patches % side
        places.append(row * side * grid[1] + column)
    order = torch.cat(places).argsort()
    grid_patches = torch.cat([kept[1:] for _, kept, _ in parts[1:]])[order]
    grid_cls = torch.cat([kept[:1] for _, kept, _ in parts[1:]])
    grid_merged = torch.cat([merged for _, _, merged in parts[1:]])
    return torch.cat([parts[0][1], parts[0][2], grid_patches, grid_cls, grid_merged])
