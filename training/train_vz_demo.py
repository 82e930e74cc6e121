"""Trains `vz-demo` from nothing and writes the checkpoint. One seeded command, each stage resumable.

    torchrun --nproc-per-node 2 training/train_vz_demo.py --work-dir build/vz-demo --out export/vz-demo

1. tower     a CLIP vision tower on generated pictures (tower.py)
2. language  projector and decoder on the frozen tower, many questions a picture at once (language.py)
3. write     the fp16 Hugging Face folder (checkpoint.py); also after every 100 steps of stage 2

Runs on CUDA where there is one, else on CPU, with one single-threaded worker a core (workers.py).
Interrupt it and start it again with the same arguments to go on.
"""

import argparse
from pathlib import Path

import torch
from checkpoint import build_processor, build_tokenizer, model_config, write_checkpoint
from language import PicturePool, see_easy_vqa, see_scene, start_from_features, steps_done, train_language
from scenes import easy_vqa_train, make_scenes
from tower import train_tower
from transformers import LlavaNextForConditionalGeneration, LlavaNextProcessor
from workers import start_workers

TOWER_PLAN = [(1200, 32, 2), (360, 16, 1)]  # steps, tiles a step over all workers, how much smaller the tiles are
LANGUAGE_STEPS = 1500
HELD_OUT = 16  # pictures of each source, for the accuracy printed during training
FIRST_SCENES, FIRST_PLAIN = 250, 300  # a worker, before the first step
SCENE_CAPACITY = 1200  # a worker; 1.4 MB each


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work-dir", type=Path, required=True, help="where the stages keep their state")
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="of each worker")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    start_workers()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    work, seed = arguments.work_dir, arguments.seed
    work.mkdir(parents=True, exist_ok=True)

    tower = train_tower(work, seed, TOWER_PLAN, peak_lr=1e-3, device=device)

    torch.manual_seed(seed + 1)
    # A folder that is there keeps its tokenizer, so that token ids never change under those who use it.
    written = (arguments.out / "tokenizer.json").exists()
    tokenizer = LlavaNextProcessor.from_pretrained(arguments.out).tokenizer if written else build_tokenizer(seed)
    processor = build_processor(tokenizer)
    model = LlavaNextForConditionalGeneration(model_config()).to(device)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    easy_vqa = easy_vqa_train()
    held_out = [see_scene(tower, scene, device, torch.bfloat16) for scene in make_scenes(seed + 3, HELD_OUT)]
    held_out += [see_easy_vqa(tower, entry, device, torch.bfloat16) for entry in easy_vqa[:HELD_OUT]]
    start_from_features(model, torch.cat([picture.hidden.flatten(0, 1).float() for picture in held_out]))
    pool = PicturePool(tower, easy_vqa[HELD_OUT:], (seed + 2, steps_done(work)), SCENE_CAPACITY, device)
    pool.renew(FIRST_SCENES, FIRST_PLAIN)
    train_language(
        model,
        tokenizer,
        pool,
        held_out,
        work,
        seed,
        LANGUAGE_STEPS,
        1.2e-3,
        device,
        on_save=lambda trained: write_checkpoint(trained, processor, arguments.out),
    )


if __name__ == "__main__":
    main()
