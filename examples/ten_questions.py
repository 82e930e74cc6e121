"""Ten questions about one frame: it is looked at and read once, then each costs its own words alone.

::

    python examples/ten_questions.py bundles/vz-demo examples/scene.jpg
"""

from __future__ import annotations

import argparse

from vz_edge import EdgeModel

QUESTIONS = [
    "how many objects are there?",
    "how many circles do you see?",
    "what shape is the teal object?",
    "what color is the star?",
    "is there a black circle?",
    "is there a red triangle?",
    "is there a teal circle?",
    "is there a number?",
    "is there a blue star?",
    "does the image contain a rectangle?",
]


def main() -> None:
    parser = argparse.ArgumentParser(description="Ten questions about one frame.")
    parser.add_argument("bundle")
    parser.add_argument("picture")
    given = parser.parse_args()
    session = EdgeModel.load(given.bundle).session()
    seen = session.look(given.picture)
    looking_sec = seen.preprocess_sec + seen.vision_sec + seen.prefill_sec
    print(f"{looking_sec:6.3f} s  looked at {given.picture}: {seen.image_tokens} tokens")
    replies = [session.ask(question, max_new_tokens=16) for question in QUESTIONS]
    for question, reply in zip(QUESTIONS, replies, strict=True):
        print(f"{reply.total_sec:6.3f} s  {question} {reply.text.strip()}")
    print(f"{sum(reply.total_sec for reply in replies):6.3f} s  for all ten answers")


if __name__ == "__main__":
    main()
