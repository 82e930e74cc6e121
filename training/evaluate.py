"""Accuracy of a `vz-demo` checkpoint in torch, fp32, greedy exact match.

Use:

    python training/evaluate.py export/vz-demo --tokens 577 64 --scenes 200 --check 10

An answer counts when every one of its tokens, and the end after it, is the most likely one; that is the same as
comparing greedy generation with the answer. `--check` proves it on a few questions with the stock processor and
`generate`. easy-VQA: its 1,000 test pictures, 9,673 questions, which training never sees. Scenes: a seed of their own.
"""

import argparse
from pathlib import Path

import torch
from language import ALL_TOKENS, BUDGETS, Picture, accuracy, see_easy_vqa, see_scene
from scenes import Scene, easy_vqa_test, make_scenes
from transformers import LlavaNextForConditionalGeneration, LlavaNextProcessor

TEST_SEED = 20_000


def generated(
    model: LlavaNextForConditionalGeneration, processor: LlavaNextProcessor, scene: Scene, question: str
) -> str:
    """The stock way: chat template, processor, generate."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=scene.image, text=text, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    return processor.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True).strip()


def table(tallies: dict[int, dict[tuple[str, str], tuple[int, int]]]) -> str:
    """Markdown: a row a kind of question and a row a source, a column a token budget."""
    names = ["all" if budget == ALL_TOKENS else str(budget) for budget in tallies]
    lines = ["| questions | number | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(names)]
    rows = sorted(next(iter(tallies.values())))
    for source in sorted({source for source, _ in rows}):
        for kind in [kind for origin, kind in rows if origin == source] + [None]:
            cells = []
            for tally in tallies.values():
                chosen = [v for (origin, k), v in tally.items() if origin == source and kind in (None, k)]
                right, asked = (sum(values) for values in zip(*chosen, strict=True))
                cells.append(f"{100 * right / asked:.2f}")
            lines.append(f"| {source}, {kind or 'all kinds'} | {asked} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--tokens", type=int, nargs="+", default=[ALL_TOKENS], choices=[ALL_TOKENS, *BUDGETS])
    parser.add_argument("--scenes", type=int, default=200, help="scene pictures to ask about")
    parser.add_argument("--easy-vqa", type=int, default=1000, help="easy-VQA test pictures to ask about")
    parser.add_argument("--check", type=int, default=0, help="scenes whose first question also goes through generate")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = LlavaNextForConditionalGeneration.from_pretrained(arguments.checkpoint, dtype=torch.float32).eval()
    processor = LlavaNextProcessor.from_pretrained(arguments.checkpoint)
    tower = model.model.vision_tower
    scenes = make_scenes(TEST_SEED, arguments.scenes)
    totals: dict[int, dict[tuple[str, str], tuple[int, int]]] = {budget: {} for budget in arguments.tokens}

    def add(picture: Picture) -> None:
        for budget, total in totals.items():
            for key, (right, asked) in accuracy(model, processor.tokenizer, [picture], budget).items():
                before = total.get(key, (0, 0))
                total[key] = before[0] + right, before[1] + asked

    for scene in scenes:
        add(see_scene(tower, scene, "cpu", torch.float32))
    for entry in easy_vqa_test()[: arguments.easy_vqa]:
        add(see_easy_vqa(tower, entry, "cpu", torch.float32))
    print(table(totals))
    for scene in scenes[: arguments.check]:
        question, answer, _ = scene.questions[0]
        print(f"{question} -> {generated(model, processor, scene, question)} (right: {answer})")


if __name__ == "__main__":
    main()
