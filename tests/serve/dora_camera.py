"""A dora node for the test: sends pictures in every encoding, and a broken one, until the sink has seen enough."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
from dora import Node
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.watch.camera import picture

ENCODINGS = ("rgb8", "bgr8", "png", "yuv422")


def encoded(number: int) -> tuple[np.ndarray, dict[str, object]]:
    encoding = ENCODINGS[number % len(ENCODINGS)]
    pixels = picture(number % len(ENCODINGS))
    height, width, _ = pixels.shape
    data = pixels[..., ::-1] if encoding == "bgr8" else pixels
    if encoding == "png":
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "png")
        data = np.frombuffer(buffer.getvalue(), np.uint8)
    return data.ravel(), {"encoding": encoding, "width": width, "height": height, "frame_id": number}


if __name__ == "__main__":
    node = Node()
    number = 0
    while (event := node.next(timeout=0.05)) is None or event["type"] not in ("INPUT", "STOP"):
        data, metadata = encoded(number)
        node.send_output("image", pa.array(data), metadata)
        number += 1
