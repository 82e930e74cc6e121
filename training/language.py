"""Trains projector, newline and decoder on frozen tower features, many questions a picture at once.

One row of a batch is: the prefix "<s>USER: ", a picture's tokens, then all its questions with their answers. A mask
lets a question see the prefix, the picture and itself only, and its positions restart after the picture, so each
question is computed exactly as if it were alone; the picture is paid once for about 12 answers.

Token budgets are mixed: 32, 64 or 128 tokens a tile by VisionZip selection, or all tokens in transformers' own order.
"""

import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from checkpoint import ANSWER_TEXT, EOS_ID, PREFIX_TEXT, QUESTION_TEXT
from optimizers import MuonAndAdamW
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
from tiles import GRID, PINPOINTS, TILE_PX, anyres_tiles
from torch import Tensor
from torch.nn import functional as nnf
from tower import keys_and_scores, normalise, tower_features
from transformers import CLIPVisionModel, LlavaNextForConditionalGeneration, PreTrainedTokenizerFast
from transformers.image_processing_utils import select_best_resolution
from workers import average_gradients, worker, worker_count

from vz_edge.budget import TokenBudget
from vz_edge.host.families.llava_next import arrange
from vz_edge.host.select.visionzip import select

BUDGETS = {32: TokenBudget(27, 5), 64: TokenBudget(54, 10), 128: TokenBudget(108, 20)}  # tokens a tile
ALL_TOKENS = 577
BATCH = {32: 8, 64: 5, 128: 3, ALL_TOKENS: 1}  # pictures of each source, a step and worker: equally long steps
ONLY_FEW_TOKENS = 0.6  # of the steps
MIXED_SHARES = {32: 0.35, 64: 0.25, 128: 0.2, ALL_TOKENS: 0.2}  # of the other steps
MOST_QUESTIONS = 12  # of a picture in a step
MASKED = -1e9


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
        kept, dominant, contextual, _ = select(picture.hidden, picture.scores, picture.keys, BUDGETS[budget])
        chosen = arrange(torch.cat([dominant, contextual], dim=1), kept, picture.grid[1], GRID)
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
    model: LlavaNextForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    pictures: list[Tensor],
    texts: list[Texts],
) -> list[Tensor]:
    """For each picture's tokens (tokens, width) the logits where `texts` predicts something, (predictions, vocabulary).

    Rows are padded after the picture and after the text; nothing sees the padding.
    """
    device = pictures[0].device
    embed = model.get_input_embeddings()
    prefix = embed(torch.tensor(tokenizer.encode(PREFIX_TEXT), device=device))
    heads = [torch.cat([prefix, picture]) for picture in pictures]
    head_length, length = max(map(len, heads)), max(map(len, heads)) + max(len(text.ids) for text in texts)
    row = prefix.new_zeros(len(heads), length, prefix.shape[1])
    block = torch.full((len(heads), length), -2)  # -1 is prefix and picture, -2 padding
    position = torch.zeros(len(heads), length, dtype=torch.long)
    predicts = torch.zeros(len(heads), length, dtype=torch.bool)
    for n, (head, text) in enumerate(zip(heads, texts, strict=True)):
        tail = slice(head_length, head_length + len(text.ids))
        row[n, : len(head)], row[n, tail] = head, embed(text.ids.to(device))
        block[n, : len(head)], block[n, tail] = -1, text.block
        position[n, : len(head)], position[n, tail] = torch.arange(len(head)), len(head) + text.position
        predicts[n, tail] = text.target != -100
    order = torch.arange(length)
    same = (block[:, None] == -1) | (block[:, :, None] == block[:, None])
    seen = (order[:, None] >= order) & same
    output = model.model.language_model(
        inputs_embeds=row,
        attention_mask=torch.where(seen, 0.0, MASKED)[:, None].to(device),
        position_ids=position.to(device),
        use_cache=False,
    )
    logits = model.lm_head(output.last_hidden_state[predicts.to(device)])
    return list(logits.split(predicts.sum(1).tolist()))


def right_answers(logits: Tensor, texts: Texts) -> list[bool]:
    """Per question: is every token of the answer, and its end, the most likely one? That is greedy exact match."""
    predicted = texts.target != -100
    right = logits.argmax(-1).cpu() == texts.target[predicted]
    return [bool(right[texts.block[predicted] == n].all()) for n in range(int(texts.block[-1]) + 1)]


@torch.no_grad()
def start_from_features(model: LlavaNextForConditionalGeneration, features: Tensor) -> None:
    """Fresh weights of projector and decoder, at scales at which words and picture tokens can be compared.

    features: (n, width) of the frozen tower. With transformers' own start a word's embedding has length 0.3 and a
    projected token 60, most of it the same for all tokens: then "is it blue?" takes thousands of steps to learn.
    Here the projector starts by whitening the features, and everything that enters the decoder has components of
    variance 1.
    """
    projector, decoder = model.model.multi_modal_projector, model.model.language_model
    decoder.embed_tokens.weight.normal_()
    model.model.image_newline.normal_()
    for name, weight in decoder.layers.named_parameters():
        if weight.ndim == 2:
            ends_block = name.endswith(("o_proj.weight", "down_proj.weight"))
            blocks = 2 * len(decoder.layers) if ends_block else 1
            weight.normal_(std=(weight.shape[1] * blocks) ** -0.5)
    mean, (variance, axes) = features.mean(0), torch.linalg.eigh(features.T.cov())
    whiten = axes * (variance + 0.01 * variance.mean()).rsqrt() @ axes.T
    first, second = projector.linear_1, projector.linear_2
    first.weight.copy_(torch.randn_like(first.weight) * len(whiten) ** -0.5 @ whiten)
    first.bias.copy_(-first.weight @ mean)
    hidden = projector.act(first(features))
    centre = hidden.mean(0)
    second.weight.normal_(std=len(whiten) ** -0.5 / float((hidden - centre).std()))
    second.bias.copy_(-second.weight @ centre)


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

    def draw(self, count: int) -> list[list[Picture]]:
        """`count` scenes, and as many easy-VQA pictures."""
        return [[kind[int(self.rng.integers(len(kind)))] for _ in range(count)] for kind in (self.scenes, self.plain)]


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
        logits = answer_logits(model, tokenizer, [picture_tokens(model, picture, budget)], [texts])
        for (_, _, kind), good in zip(picture.questions, right_answers(logits[0], texts), strict=True):
            hits, asked = tally[picture.source, kind]
            tally[picture.source, kind] = hits + good, asked + 1
    return dict(tally)


def draw_budget(rng: np.random.Generator, progress: float) -> int:
    """First only 32 tokens a tile, which is quick; then a mix."""
    mixed = int(rng.choice(list(MIXED_SHARES), p=list(MIXED_SHARES.values())))
    return 32 if progress < ONLY_FEW_TOKENS else mixed


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
    device: str,
    on_save,
) -> None:
    """Trains everything but the tower for `steps`; resumes from `folder`/language.pt."""
    model.model.vision_tower.requires_grad_(False)
    rng = np.random.default_rng(seed)  # the same in every worker, so that they draw budgets of equal cost
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    optimizer = MuonAndAdamW(named, peak_lr, steps)
    path, first = folder / "language.pt", 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    started, sums = time.time(), defaultdict(list)
    for step in range(first, steps):
        t0 = time.time()
        pool.renew(scenes=step % 2, plain=2)
        sums["data_sec"].append(time.time() - t0)
        budget = draw_budget(rng, step / steps)
        for pictures in pool.draw(BATCH[budget]):
            texts = [encode(tokenizer, picture.renewed(pool.rng, MOST_QUESTIONS)) for picture in pictures]
            with torch.autocast(device, torch.bfloat16):
                tokens = [picture_tokens(model, picture, budget) for picture in pictures]
                logits = answer_logits(model, tokenizer, tokens, texts)
            wanted = torch.cat([text.target[text.target != -100] for text in texts]).to(device)
            loss = nnf.cross_entropy(torch.cat(logits).float(), wanted)
            loss.backward()
            source = pictures[0].source
            sums[f"loss_{source}"].append(loss.item())
            for answered, text in zip(logits, texts, strict=True):
                sums[f"right_{source}_{budget}"] += right_answers(answered, text)
        average_gradients(optimizer.parameters)
        optimizer.step(step)
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
