"""A dora node in place of a person: prints answers, asks a question of the moment, and then ends the dataflow."""

from __future__ import annotations

import json

import pyarrow as pa
from dora import Node

QUESTION = "what shape is the teal object?"


def main() -> None:
    node = Node()
    asked = False
    for event in node:
        if event["type"] != "INPUT":
            continue
        result = json.loads(event["value"][0].as_py())
        if result["error"]:
            print(result["error"], flush=True)
        for reply in result["answers"]:
            print(f"frame {result['frame_id']}: {reply['question']} {reply['text']}", flush=True)
        if not asked:
            node.send_output("question", pa.array([QUESTION]), {"request_id": "1"})
            asked = True
        elif "request_id" in event["metadata"]:
            # The camera ends, and so does this node: the one between them ends when both of its inputs are closed.
            node.send_output("done", pa.array([True]))
            return


if __name__ == "__main__":
    main()
