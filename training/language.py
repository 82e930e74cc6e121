"""Trains projector, newline and decoder on frozen tower features, many questions a picture at once.

One sequence is: the prefix "<s>USER: ", the picture's tokens, then all its questions with their answers. A mask lets
a question see the prefix, the picture and itself only, and its positions restart after the picture, so each
question is computed exactly as if it were alone; the picture is paid once for about 15 answers.

Token budgets are mixed: 32, 64 or 128 tokens a tile by VisionZip selection, or all tokens in transformers' own order.
"""

import math
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from checkpoint import ANSWER_TEXT, EOS_ID, PREFIX_TEXT, QUESTION_TEXT
from PIL import Image
from scenes import (
    EasyVqaEntry,
    Item,
    Question,
    Scene,
    ask,
    ask_attributes,
    easy_vqa_item,
    easy_vqa_kind,
    make_scene,
    picker,
)
from tiles import PINPOINTS, TILE_PX, anyres_tiles
from torch import Tensor, nn
from torch.nn import functional as nnf
from tower import keys_and_scores, normalise, tower_features
from transformers import CLIPVisionModel, LlavaNextForConditionalGeneration, PreTrainedTokenizerFast
from transformers.image_processing_utils import select_best_resolution
from visionzip import select_picture
from workers import average_gradients, worker, worker_count

BUDGETS = {32: (27, 5), 64: (54, 10), 128: (108, 20)}  # tokens a tile: dominant (with CLS), contextual
ALL_TOKENS = 577
ONLY_FEW_TOKENS = 0.75  # of the steps
ALL_SHARE = 0.2


@dataclass(frozen=True)
class Picture:
    """Tower output of a picture's tiles, and what to ask about it."""

    hidden: Tensor  # (tiles, 577, width)
    scores: Tensor  # (tiles, 576)
    keys: Tensor  # (tiles, 577, head_dim)
    size_hw: tuple[int, int]
    source: str  # "scenes" or "easy-vqa"
    questions: list[Question]
    items: tuple[Item, ...] = ()  # if given, `renewed` can ask something else

    @property
    def grid(self) -> tuple[int, int]:
        height, width = select_best_resolution(self.size_hw, PINPOINTS)
        return height // TILE_PX, width // TILE_PX

    def renewed(self, rng: np.random.Generator, most: int) -> list[Question]:
        """At most `most` questions, asked anew."""
        if self.source == "scenes":
            questions = ask(rng, list(self.items), self.size_hw[::-1])
        else:
            questions = self.questions + (ask_attributes(picker(rng), list(self.items)) if self.items else [])
        return [questions[n] for n in rng.permutation(len(questions))[:most]]


@torch.no_grad()
def see(tower: CLIPVisionModel, image: Image.Image, device: str, dtype: torch.dtype, **fields: object) -> Picture:
    """Runs the tower over a picture's tiles; equal tiles (pictures smaller than a tile) are computed once."""
    pixels = anyres_tiles(image)
    same = len(pixels) == 2 and bool((pixels[0] == pixels[1]).all())
    with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
        hidden, before = tower_features(tower, normalise(pixels[:1] if same else pixels, device))
        keys, scores = keys_and_scores(tower, before)
    parts = [part.to(dtype).expand(2, *part.shape[1:]) if same else part.to(dtype) for part in (hidden, scores, keys)]
    return Picture(*parts, size_hw=(image.height, image.width), **fields)


def see_scene(tower: CLIPVisionModel, scene: Scene, device: str, dtype: torch.dtype) -> Picture:
    fields = {"source": "scenes", "questions": scene.questions, "items": scene.items}
    return see(tower, scene.image, device, dtype, **fields)


def see_easy_vqa(tower: CLIPVisionModel, entry: EasyVqaEntry, device: str, dtype: torch.dtype) -> Picture:
    path, pairs = entry
    questions = [(question, answer, easy_vqa_kind(answer)) for question, answer in pairs]
    item = easy_vqa_item(pairs)
    fields = {"source": "easy-vqa", "questions": questions, "items": (item,) if item else ()}
    return see(tower, Image.open(path).convert("RGB"), device, dtype, **fields)


def picture_tokens(model: LlavaNextForConditionalGeneration, picture: Picture, budget: int) -> Tensor:
    """Projected tokens of a picture, (tokens, width): VisionZip's choice, or all in transformers' own order."""
    if budget != ALL_TOKENS:
        chosen = select_picture(picture.hidden, picture.scores, picture.keys, picture.grid, *BUDGETS[budget])
        return model.model.multi_modal_projector(chosen.float())
    projected = model.model.multi_modal_projector(picture.hidden[:, 1:].float())
    size = torch.tensor([picture.size_hw])
    packed, _ = model.model.pack_image_features([projected], size, "default", model.model.image_newline)
    return packed[0]


@dataclass(frozen=True)
class Texts:
    """All questions of one picture in one row."""

    ids: Tensor  # (length,)
    block: Tensor  # (length,) which question a token belongs to
    position: Tensor  # (length,) place inside its own question
    target: Tensor  # (length,) the next token where it is to be predicted, else -100


def encode(tokenizer: PreTrainedTokenizerFast, questions: list[Question]) -> Texts:
    ids, block, position, target = [], [], [], []
    for number, (question, answer, _) in enumerate(questions):
        asked = tokenizer.encode(QUESTION_TEXT.format(question=question), add_special_tokens=False)
        answered = [*tokenizer.encode(ANSWER_TEXT.format(answer=answer), add_special_tokens=False), EOS_ID]
        row = asked + answered[:-1]
        ids += row
        target += [-100] * (len(asked) - 1) + answered
        block += [number] * len(row)
        position += range(len(row))
    return Texts(*(torch.tensor(values) for values in (ids, block, position, target)))


def answer_logits(
    model: LlavaNextForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, tokens: Tensor, texts: Texts
) -> Tensor:
    """Logits at the places of `texts` that predict something, (predictions, vocabulary)."""
    device = tokens.device
    embed = model.get_input_embeddings()
    prefix = torch.tensor(tokenizer.encode(PREFIX_TEXT), device=device)
    start = torch.cat([embed(prefix), tokens])
    row = torch.cat([start, embed(texts.ids.to(device))])[None]
    block = torch.cat([torch.full((len(start),), -1), texts.block]).to(device)
    position = torch.cat([torch.arange(len(start)), len(start) + texts.position]).to(device)
    order = torch.arange(len(block), device=device)
    seen = (order[:, None] >= order[None]) & ((block[None] == -1) | (block[:, None] == block[None]))
    mask = torch.where(seen, 0.0, float("-inf"))[None, None]
    output = model.model.language_model(
        inputs_embeds=row, attention_mask=mask, position_ids=position[None], use_cache=False
    )
    asked = torch.cat([torch.full((len(start),), -100), texts.target]) != -100
    return model.lm_head(output.last_hidden_state[0, asked.to(device)])


def right_answers(logits: Tensor, texts: Texts) -> list[bool]:
    """Per question: is every token of the answer, and its end, the most likely one? That is greedy exact match."""
    predicted = texts.target != -100
    right = logits.argmax(-1).cpu() == texts.target[predicted]
    return [bool(right[texts.block[predicted] == n].all()) for n in range(int(texts.block[-1]) + 1)]


class PicturePool:
    """Pictures with tower features, renewed a little at every step; the oldest scenes go first."""

    def __init__(
        self, tower: CLIPVisionModel, easy_vqa: list, seed: tuple[int, ...], scene_capacity: int, device: str
    ) -> None:
        self.tower, self.easy_vqa, self.device = tower, easy_vqa, device
        self.rng = np.random.default_rng((*seed, worker()))
        self.scene_capacity = scene_capacity
        self.order = np.random.default_rng(seed).permutation(len(easy_vqa))[worker() :: worker_count()]
        self.plain: list[Picture] = []
        self.scenes: list[Picture] = []

    def renew(self, scenes: int, plain: int) -> None:
        for _ in range(scenes):
            self.scenes.append(see_scene(self.tower, make_scene(self.rng), self.device, torch.bfloat16))
        del self.scenes[: max(0, len(self.scenes) - self.scene_capacity)]
        for index in self.order[len(self.plain) : len(self.plain) + plain]:
            self.plain.append(see_easy_vqa(self.tower, self.easy_vqa[index], self.device, torch.bfloat16))

    def draw(self, scenes: int, plain: int) -> list[Picture]:
        pick = self.rng.integers
        return [self.scenes[pick(len(self.scenes))] for _ in range(scenes)] + [
            self.plain[pick(len(self.plain))] for _ in range(plain)
        ]


@torch.no_grad()
def accuracy(
    model: LlavaNextForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    pictures: list[Picture],
    budget: int,
) -> dict[tuple[str, str], tuple[int, int]]:
    """(source, kind) -> (right, asked)."""
    tally: dict[tuple[str, str], tuple[int, int]] = defaultdict(lambda: (0, 0))
    for picture in pictures:
        texts = encode(tokenizer, picture.questions)
        right = right_answers(answer_logits(model, tokenizer, picture_tokens(model, picture, budget), texts), texts)
        for (_, _, kind), good in zip(picture.questions, right, strict=True):
            hits, asked = tally[picture.source, kind]
            tally[picture.source, kind] = hits + good, asked + 1
    return dict(tally)


def draw_budget(rng: np.random.Generator, picture: Picture, progress: float) -> int:
    """First only 32 tokens a tile, which is quick; then 32, 64 or 128, and all of them in a part of the draws."""
    some, draw = int(rng.choice([32, 64, 128], p=[0.4, 0.35, 0.25])), rng.random()
    if progress < ONLY_FEW_TOKENS:
        return 32
    share = ALL_SHARE if len(picture.hidden) <= 3 else ALL_SHARE / 3
    return ALL_TOKENS if draw < share else some


def steps_done(folder: Path) -> int:
    """How far an earlier run came."""
    path = folder / "language.pt"
    return torch.load(path, weights_only=True)["step"] if path.exists() else 0


def train_language(
    model: LlavaNextForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    pool: PicturePool,
    held_out: list[Picture],
    folder: Path,
    seed: int,
    steps: int,
    peak_lr: float,
    each_step: dict[str, int],
    device: str,
    on_save,
) -> None:
    """Trains everything but the tower for `steps`; resumes from `folder`/language.pt."""
    model.model.vision_tower.requires_grad_(False)
    rng = np.random.default_rng(seed)  # the same in every worker, so that they draw budgets of equal cost
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=peak_lr, betas=(0.9, 0.95), weight_decay=0.02)
    path, first = folder / "language.pt", 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    started, sums = time.time(), defaultdict(list)
    for step in range(first, steps):
        progress = step / steps
        for group in optimizer.param_groups:
            warm = min(1.0, (step + 1) / 60)
            group["lr"] = peak_lr * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        t0 = time.time()
        if step % each_step["steps_a_renewal"] == 0:
            pool.renew(each_step["new_scenes"], each_step["new_plain"])
        sums["data_sec"].append(time.time() - t0)
        pictures = pool.draw(each_step["scenes"], each_step["plain"])
        for picture in pictures:
            budget = draw_budget(rng, picture, progress)
            texts = encode(tokenizer, picture.renewed(rng, each_step["questions"]))
            with torch.autocast(device, torch.bfloat16):
                logits = answer_logits(model, tokenizer, picture_tokens(model, picture, budget), texts).float()
                wanted = texts.target[texts.target != -100].to(device)
                loss = nnf.cross_entropy(logits, wanted)
            (loss / len(pictures)).backward()
            sums[f"loss_{picture.source}"].append(loss.item())
            sums[f"right_{picture.source}_{budget}"] += right_answers(logits, texts)
        average_gradients(parameters)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        sums["step_sec"].append(time.time() - t0)
        if (step + 1) % 25 == 0 and worker() == 0:
            means = " ".join(f"{name} {np.mean(values):.3f}" for name, values in sorted(sums.items()))
            print(f"language {step + 1}/{steps} {time.time() - started:.0f} s: {means}", flush=True)
            sums.clear()
        if ((step + 1) % 100 == 0 or step + 1 == steps) and worker() == 0:
            tally = accuracy(model, tokenizer, held_out, 64)
            table = " ".join(f"{kind} {a / b:.3f}" for (_, kind), (a, b) in sorted(tally.items()))
            print(f"held out, 64 tokens a tile: {table}", flush=True)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(state, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").rename(path)
            on_save(model)
