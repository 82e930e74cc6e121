"""Watch a camera and raise an event when the answer to a question changes; one line of JSON for each.

::

    python examples/watch_camera.py llava-13b 0 "Is there a person in the picture?"
    python examples/watch_camera.py bundles/vz-demo recorded_pictures/ "is there a black circle?"

An event begins when yes is likely and ends when it is unlikely; between the two bounds nothing changes, so that a
doubtful answer does not flicker.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator

from vz_edge import EdgeModel
from vz_edge.watch import Result

BEGINS_AT, ENDS_AT = 0.8, 0.3


def events(results: Iterable[Result]) -> Iterator[dict[str, object]]:
    """The frames of ``results`` with which an event begins or ends."""
    under_way = False
    for result in results:
        (reply,) = result.replies
        if reply is None or reply.probabilities is None:
            print(f"frame {result.frame_id} was not answered: {result.error or 'its time was over'}", file=sys.stderr)
            continue
        yes = reply.probabilities["yes"]
        if yes < ENDS_AT if under_way else yes >= BEGINS_AT:
            under_way = not under_way
            yield {
                "event": "begins" if under_way else "ends",
                "frame": result.frame_id,
                "probability": round(yes, 4),
                "latency_sec": round(result.latency_sec, 3),
            }


def main() -> None:
    parser = argparse.ArgumentParser(description="Raise an event when the answer to a question changes.")
    parser.add_argument("bundle")
    parser.add_argument("source", help="a camera's number, an address, a video, a folder or a bag")
    parser.add_argument("question", help="one that is answered by yes or no")
    parser.add_argument("--deadline", type=float, help="seconds that a frame has")
    given = parser.parse_args()
    source = int(given.source) if given.source.isdigit() else given.source
    questions = [(given.question, {"schema": ["yes", "no"]})]
    model = EdgeModel.load(given.bundle)
    with model.watch(source, questions, deadline=given.deadline, unchanged_below=8) as results:
        for event in events(results):
            print(json.dumps(event), flush=True)


if __name__ == "__main__":
    main()
