"""A dora node in place of a camera: sends examples/scene.jpg ten times a second until somebody says it is done."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
from dora import Node

PICTURE = Path(__file__).parents[1] / "scene.jpg"
PERIOD_SEC = 0.1


def main() -> None:
    data = pa.array(np.fromfile(PICTURE, np.uint8))
    node = Node()
    number = 0
    while (event := node.next(timeout=PERIOD_SEC)) is None or event["type"] not in ("INPUT", "STOP"):
        node.send_output("image", data, {"encoding": "jpeg", "frame_id": number})
        number += 1


if __name__ == "__main__":
    main()
