"""Trains the vision tower alone: a 5-layer CLIPVisionModel whose hidden state -2 must say what is where.

Losses, all on hidden_states[-2] (the output of layer 4 of 5; the last layer is never used by LLaVA):

    patch   which shape or digit covers this patch, which colour, and that thing's box
    CLS     which of 32 colour-shape pairs, which of 10 digits, and how many shapes (0 to 5) the tile shows

The CLS loss is what makes the CLS row of layer 4's attention find the things in a picture, and VisionZip keeps the
patches that this row attends to. No loss touches the attention itself.

Most of the training sees tiles shrunk to 168 pixels (144 patches, interpolated positions), at a fifth of the cost; a
short end at 336 pixels adapts it ("RECLIP", arXiv 2304.06028).
"""

import time
from pathlib import Path

import numpy as np
import torch
from optimizers import MuonAndAdamW
from scenes import COLOUR_NAMES, SHAPE_NAMES, make_plain_scene, make_scene
from tiles import CLIP_MEAN, CLIP_STD, GRID, WHAT_NAMES, LabelledTile, labelled_tiles
from torch import Tensor, nn
from torch.nn import functional as nnf
from transformers import CLIPVisionConfig, CLIPVisionModel
from workers import average_gradients, worker, worker_count

COLOURS_WITH_NONE = len(COLOUR_NAMES) + 1
PAIR_COUNT = len(COLOUR_NAMES) * len(SHAPE_NAMES)
MAX_COUNT = 5  # shapes of a scene
PLACE_SIZE = 5  # numbers of LabelledTile.place
LOG_EVERY_STEPS = 50


def tower_config() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=5,
        num_attention_heads=4,
        image_size=336,
        patch_size=14,
        hidden_act="quick_gelu",
        projection_dim=256,
    )


def new_tower() -> CLIPVisionModel:
    """A tower with fresh weights. Eager attention: on a CPU its backward pass is much quicker for 145 tokens."""
    return CLIPVisionModel._from_config(tower_config(), attn_implementation="eager")


def sine_positions(side: int, width: int, scale: float = 0.3) -> Tensor:
    """(side * side, width) sines and cosines of x and y: a start for the position table that knows what is near.

    From "Better plain ViT baselines for ImageNet-1k" (arXiv 2205.01580); wavelengths here go from 6 to 600 patches.
    """
    rates = 1.0 / 100 ** (torch.arange(width // 4) / (width // 4 - 1))
    angles = torch.arange(side)[:, None] * rates
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows = waves[:, None].expand(side, side, -1)
    columns = waves[None].expand(side, side, -1)
    return scale * torch.cat([rows, columns], dim=2).flatten(0, 1)


def normalise(pixels: np.ndarray, device: str) -> Tensor:
    """(n, h, w, 3) uint8 -> (n, 3, h, w) float32 as CLIP's preprocessing gives it."""
    scaled = torch.from_numpy(pixels).to(device).float() / 255
    scaled = (scaled - torch.tensor(CLIP_MEAN, device=device)) / torch.tensor(CLIP_STD, device=device)
    return scaled.permute(0, 3, 1, 2).contiguous()


def tower_features(tower: CLIPVisionModel, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden state -2, and the input of the layer that made it (for the CLS attention and the keys).

    pixels: (n, 3, 336, 336), or (n, 3, 168, 168) in training. Returns two tensors (n, 577 or 145, 256).
    """
    small = pixels.shape[-1] != tower.config.image_size
    hidden = tower.pre_layrnorm(tower.embeddings(pixels, interpolate_pos_encoding=small))
    before = hidden
    for layer in tower.encoder.layers[:-1]:
        before, hidden = hidden, layer(hidden, attention_mask=None)
    return hidden, before


def keys_and_scores(tower: CLIPVisionModel, before: Tensor) -> tuple[Tensor, Tensor]:
    """Of the layer that makes hidden state -2: keys averaged over heads, and the CLS attention summed over heads.

    before: (n, tokens, 256), that layer's input. Returns (n, tokens, 64) and (n, tokens - 1).
    """
    layer = tower.encoder.layers[-2]
    attention = layer.self_attn
    heads, head_dim = attention.num_heads, attention.head_dim
    normed = layer.layer_norm1(before)
    keys = attention.k_proj(normed).unflatten(-1, (heads, head_dim))
    query = attention.q_proj(normed[:, :1]).unflatten(-1, (heads, head_dim))
    logits = torch.einsum("nqhd,nkhd->nhk", query, keys).float() * attention.scale
    return keys.mean(2), logits.softmax(-1).sum(1)[:, 1:]


class TowerHeads(nn.Module):
    """Linear read-outs used in training only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patch_norm, self.cls_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.patch = nn.Linear(width, len(WHAT_NAMES) + COLOURS_WITH_NONE + PLACE_SIZE)
        self.cls = nn.Linear(width, PAIR_COUNT + 10 + MAX_COUNT + 1)

    def forward(self, hidden: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
        patch = self.patch(self.patch_norm(hidden[:, 1:])).float()
        cls = self.cls(self.cls_norm(hidden[:, 0])).float()
        return (
            patch.split([len(WHAT_NAMES), COLOURS_WITH_NONE, PLACE_SIZE], -1),
            cls.split([PAIR_COUNT, 10, MAX_COUNT + 1], -1),
        )


def tile_targets(tile: LabelledTile, shrink: int) -> dict[str, np.ndarray]:
    """What the heads are to say of a tile shrunk by `shrink`; -100 and nan mean "do not ask"."""
    side = GRID // shrink
    cover = tile.cover.reshape(-1, side, shrink, side, shrink).mean((2, 4))
    padded = np.concatenate([np.full((1, side, side), 0.2, np.float32), cover])
    owner = padded.argmax(0).reshape(-1)  # an item needs a fifth of a patch to own it
    clear = np.where(tile.seen > 0.3, tile.what, -100)
    pairs, digits = np.zeros(PAIR_COUNT, np.float32), np.zeros(10, np.float32)
    # Barely visible items first, so that a whole one of the same name overrides their "do not ask".
    for n in np.argsort(tile.seen):
        answer = 1.0 if tile.seen[n] > 0.5 else np.nan
        if tile.seen[n] <= 0.02:
            continue
        if tile.colour[n]:
            pairs[(tile.colour[n] - 1) * len(SHAPE_NAMES) + tile.what[n] - 1] = answer
        else:
            digits[tile.what[n] - 1 - len(SHAPE_NAMES)] = answer
    shapes = tile.seen[tile.colour > 0]
    unsure = bool(((shapes > 0.02) & (shapes < 0.5)).any())
    return {
        "what": np.concatenate([[0], clear])[owner],
        "colour": np.concatenate([[0], tile.colour])[owner],
        "place": np.concatenate([np.full((1, PLACE_SIZE), np.nan), tile.place])[owner].astype(np.float32),
        "pairs": pairs,
        "digits": digits,
        "count": np.array(-100 if unsure else int((shapes >= 0.5).sum())),
    }


class TilePool:
    """A pool of labelled tiles, renewed a little at every draw: fresh pictures without waiting for them."""

    def __init__(self, seed: int | tuple[int, ...], capacity: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.capacity = capacity
        self.plain: list[LabelledTile] = []  # in the manner of easy-VQA
        self.whole: list[LabelledTile] = []  # base tiles of scenes
        self.parts: list[LabelledTile] = []  # grid tiles of scenes

    def renew(self, scenes: int) -> None:
        for _ in range(scenes):
            self._put(self.plain, labelled_tiles(make_plain_scene(self.rng))[0])
            base, *grid = labelled_tiles(make_scene(self.rng))
            self._put(self.whole, base)
            for tile in grid:
                self._put(self.parts, tile)

    def _put(self, tiles: list[LabelledTile], tile: LabelledTile) -> None:
        if len(tiles) < self.capacity:
            tiles.append(tile)
        else:
            tiles[int(self.rng.integers(self.capacity))] = tile

    def draw(self, count: int, shrink: int, device: str) -> tuple[Tensor, dict[str, Tensor]]:
        """Pixels and targets of `count` tiles: of six, two are plain, three whole scenes, one a part."""
        kinds = (self.plain, self.whole, self.parts, self.plain, self.whole, self.whole)
        tiles = [kinds[n % 6][int(self.rng.integers(len(kinds[n % 6])))] for n in range(count)]
        rows = [tile_targets(tile, shrink) for tile in tiles]
        targets = {name: torch.from_numpy(np.stack([row[name] for row in rows])).to(device) for name in rows[0]}
        pixels = normalise(np.stack([tile.pixels for tile in tiles]), device)
        return nnf.avg_pool2d(pixels, shrink), targets


def tower_losses(heads: TowerHeads, hidden: Tensor, targets: dict[str, Tensor]) -> dict[str, Tensor]:
    """The six losses, and what is logged beside them: accuracy on patches that show something, recall by CLS."""
    (what, colour, place), (pairs, digits, count) = heads(hidden)
    shown = targets["what"] > 0
    somewhere = ~targets["place"][..., 0].isnan()
    # A third of the weight on background, however much of it there is.
    background = targets["what"] == 0
    weight = torch.where(background, 0.33 / background.sum(), 0.67 / shown.sum().clamp(min=1))
    per_patch = nnf.cross_entropy(what.flatten(0, 1), targets["what"].flatten(), reduction="none", ignore_index=-100)
    per_colour = nnf.cross_entropy(colour.flatten(0, 1), targets["colour"].flatten(), reduction="none")
    return {
        "what": (per_patch * weight.flatten()).sum(),
        "colour": (per_colour * weight.flatten()).sum(),
        "place": nnf.smooth_l1_loss(place[somewhere], targets["place"][somewhere], beta=0.05),
        "pairs": _known_bce(pairs, targets["pairs"]),
        "digits": _known_bce(digits, targets["digits"]),
        "count": nnf.cross_entropy(count, targets["count"], ignore_index=-100),
        "acc_patch": (what.argmax(-1) == targets["what"])[shown].float().mean(),
        "acc_colour": (colour.argmax(-1) == targets["colour"])[shown].float().mean(),
        "recall_pairs": (pairs > 0)[targets["pairs"] == 1].float().mean(),
        "recall_digits": (digits > 0)[targets["digits"] == 1].float().mean(),
        "acc_count": (count.argmax(-1) == targets["count"])[targets["count"] >= 0].float().mean(),
    }


def _known_bce(logits: Tensor, answers: Tensor) -> Tensor:
    known = ~answers.isnan()
    return nnf.binary_cross_entropy_with_logits(logits[known], answers[known])


LOSS_WEIGHTS = {"what": 1.0, "colour": 0.5, "place": 3.0, "pairs": 6.0, "digits": 3.0, "count": 0.3}


def train_tower(
    folder: Path,
    seed: int,
    plan: list[tuple[int, int, int]],
    peak_lr: float,
    device: str,
) -> CLIPVisionModel:
    """Trains by `plan`, a list of (steps, batch over all workers, shrink); resumes from `folder`/tower.pt."""
    schedule = [(batch, shrink) for steps, batch, shrink in plan for _ in range(steps)]
    steps = len(schedule)
    torch.manual_seed(seed)
    tower = new_tower().to(device)
    with torch.no_grad():
        tower.embeddings.position_embedding.weight[1:] = sine_positions(GRID, tower.config.hidden_size)
    heads = TowerHeads(tower.config.hidden_size).to(device)
    unused = (f"encoder.layers.{len(tower.encoder.layers) - 1}.", "post_layernorm")
    used = [(name, parameter) for name, parameter in tower.named_parameters() if not name.startswith(unused)]
    optimizer = MuonAndAdamW([*used, *heads.named_parameters()], peak_lr, steps)
    pool, first, path = TilePool((seed, worker()), capacity=1200), 0, folder / "tower.pt"
    if path.exists():
        state = torch.load(path, weights_only=True)
        tower.load_state_dict(state["tower"])
        heads.load_state_dict(state["heads"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
        pool.rng = np.random.default_rng((seed, worker(), first))
    pool.renew(0 if first >= steps else 100)
    sums: dict[str, list[float]] = {}
    started = time.time()
    for step in range(first, steps):
        batch, shrink = schedule[step]
        t0 = time.time()
        pool.renew(1)
        pixels, targets = pool.draw(batch // worker_count(), shrink, device)
        t1 = time.time()
        with torch.autocast(device, torch.bfloat16):
            hidden, _ = tower_features(tower, pixels)
            losses = tower_losses(heads, hidden, targets)
        sum(weight * losses[name] for name, weight in LOSS_WEIGHTS.items()).backward()
        average_gradients(optimizer.parameters)
        t2 = time.time()
        optimizer.step(step)
        t3 = time.time()
        losses.update(t_data=torch.tensor(t1 - t0), t_fb=torch.tensor(t2 - t1), t_opt=torch.tensor(t3 - t2))
        for name, value in losses.items():
            sums.setdefault(name, []).append(value.item())
        if (step + 1) % LOG_EVERY_STEPS == 0 and worker() == 0:
            means = " ".join(f"{name} {np.nanmean(values):.3f}" for name, values in sums.items())
            print(f"tower {step + 1}/{steps} {time.time() - started:.0f} s: {means}", flush=True)
            sums.clear()
        if ((step + 1) % 250 == 0 or step + 1 == steps) and worker() == 0:
            state = {
                "tower": tower.state_dict(),
                "heads": heads.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step + 1,
            }
            torch.save(state, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").rename(path)
    return tower.eval()
