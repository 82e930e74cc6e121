"""A dora node for the test: writes down what it is sent, and asks a question until it is answered without an error."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pyarrow as pa
from dora import Node

ENCODINGS = 4  # of the camera's pictures, in turn

if __name__ == "__main__":
    node = Node()
    seen, waiting, answered = set(), False, False
    with Path(os.environ["OUT"]).open("w") as out:
        for event in node:
            if event["type"] != "INPUT":
                continue
            answers, metadata = json.loads(event["value"][0].as_py()), event["metadata"]
            metadata["timestamp"] = metadata["timestamp"].timestamp()
            print(json.dumps([answers, metadata]), file=out)
            if "request_id" in metadata:
                answered = answered or answers["error"] is None
                waiting = False
            else:
                seen.add(answers["frame_id"] % ENCODINGS)
            if answered and len(seen) == ENCODINGS:
                node.send_output("done", pa.array([True]))
                sys.exit()
            if not (waiting or answered):
                node.send_output("question", pa.array([os.environ["QUESTION"]]), {"request_id": "r1"})
                waiting = True
