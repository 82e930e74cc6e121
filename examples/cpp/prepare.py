"""Write what a question about a picture is to the graphs of a bundle, as .npy files for ask.cpp.

::

    python examples/cpp/prepare.py bundles/vz-demo examples/scene.jpg "what color is the star?" inputs/
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from vz_edge import EdgeModel
from vz_edge.device.image import token_count


def inputs_of(model: EdgeModel, picture: str, question: str) -> dict[str, np.ndarray]:
    """The named tensors of docs/bundle.md for a bundle with a token budget, or for LLaVA-1.5."""
    tiles = model.vision.tile(picture)
    image_tokens = token_count(tiles.original_size, model.manifest.model, model.manifest.budget)
    ids = model.chat.ids([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}])
    place = ids.index(model.chat.image_token_id)
    ids[place : place + 1] = [model.chat.image_token_id] * image_tokens
    inputs = {
        "pixel_values": tiles.pixel_values.astype(np.float32),
        "num_image_tokens": np.array([image_tokens], np.int64),
        "input_ids": np.array([ids], np.int32),
    }
    if tiles.grid is not None:
        inputs["grid_width"] = np.array([tiles.grid[0]], np.int64)
    return inputs


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a question about a picture as .npy files for ask.cpp.")
    for name in ("bundle", "picture", "question", "out"):
        parser.add_argument(name)
    given = parser.parse_args()
    out = Path(given.out)
    out.mkdir(parents=True, exist_ok=True)
    for name, array in inputs_of(EdgeModel.load(given.bundle), given.picture, given.question).items():
        np.save(out / f"{name}.npy", array)


if __name__ == "__main__":
    main()
