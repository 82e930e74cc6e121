"""Which of several objects to grasp, as JSON.

::

    python examples/pick.py bundles/vz-demo examples/scene.jpg "red triangle" "black circle" "gray rectangle"

The picture is looked at once; each object costs a short question whose answer is a probability, not a sentence. Where
none of them is there with enough of it, the object is null: a gripper should then not move.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from vz_edge import EdgeModel


def pick(model: EdgeModel, picture: str, objects: Sequence[str], at_least: float) -> dict[str, object]:
    """The likeliest of ``objects`` in ``picture``, and the probability that each of them is there."""
    session = model.session()
    session.look(picture)
    there = {}
    for name in objects:
        reply = session.ask(f"is there a {name}?", schema=["yes", "no"])
        assert reply.probabilities is not None  # a list of choices always has them
        there[name] = reply.probabilities["yes"]
    likeliest = max(there, key=lambda name: there[name])
    return {
        "object": likeliest if there[likeliest] >= at_least else None,
        "probabilities": {name: round(probability, 4) for name, probability in there.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Which of several objects to grasp, as JSON.")
    parser.add_argument("bundle")
    parser.add_argument("picture")
    parser.add_argument("objects", nargs="+", help="as a question would name them: 'black circle'")
    parser.add_argument("--at-least", type=float, default=0.9, help="probability; below it nothing is picked")
    given = parser.parse_args()
    print(json.dumps(pick(EdgeModel.load(given.bundle), given.picture, given.objects, given.at_least)))


if __name__ == "__main__":
    main()
