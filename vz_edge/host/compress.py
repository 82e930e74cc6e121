r"""VisionZip inside a transformers model, without leaving PyTorch.

>>> processor = vz_edge.compress(model, processor, tokens=320)
>>> inputs = processor(images=picture, text="USER: <image>\nWhat is this? ASSISTANT:", return_tensors="pt")
>>> model.generate(**inputs, max_new_tokens=50)

It keeps what a bundle of the same budget keeps: selection, token order and tile counts are the very functions that
the export uses.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from vz_edge.arguments import MOST, shown
from vz_edge.budget import split_tokens
from vz_edge.device.process import one_line
from vz_edge.device.requirements import install_command
from vz_edge.errors import BudgetError, CompressionError, DependencyError, UnsupportedModelError

try:
    import torch  # noqa: F401
    from transformers import (
        LlavaForConditionalGeneration,
        LlavaNextForConditionalGeneration,
        LlavaNextProcessor,
        LlavaProcessor,
    )
except (ImportError, OSError) as error:  # OSError: a build of torch whose libraries are not on this machine
    raise DependencyError(
        f"vz_edge.compress needs torch and transformers 5 or later, which cannot be imported here ({one_line(error)}); "
        f"{install_command('export')}"
    ) from error

from vz_edge.host.compressed_model import Compression, attach, compression_of, detach
from vz_edge.host.compressed_processor import compressed, uncompressed
from vz_edge.host.model_config import TOWER_TYPES, feature_layers, grid_pinpoints, require, tower_spec


class _Classes(NamedTuple):
    """What a family is made of in transformers."""

    model: Any
    processor: Any


CLASSES = {
    "llava": _Classes(LlavaForConditionalGeneration, LlavaProcessor),
    "llava_next": _Classes(LlavaNextForConditionalGeneration, LlavaNextProcessor),
}


def compress(model: Any, processor: Any, tokens: int = 320) -> Any:
    """Reduce the visual tokens of ``model`` in place, and return the processor to use with it from now on.

    ``model`` is a LlavaForConditionalGeneration or LlavaNextForConditionalGeneration, however it was loaded;
    ``processor`` is its own and stays as it is: a copy is returned. ``tokens`` is the total of the picture that
    costs the most, split over tiles and kinds as the export's ``--tokens``. No library class changes, and no other
    model. Copies and pickles of the model are compressed too; ``save_pretrained``, of model and processor, writes
    the plain ones. Compressing once more with the same tokens changes nothing.

    Raises UnsupportedModelError, BudgetError, and CompressionError where the processor does not belong to the model
    or the model is compressed to other tokens; nothing has changed then.
    """
    compression = _compression(_family(model), model.config, tokens)
    _check_processor(uncompressed(processor), model.config, compression)
    present = compression_of(model.model)
    if present not in (None, compression):
        raise CompressionError(
            f"the model is compressed to {present.total} tokens already; vz_edge.restore(model) first, then compress "
            f"it to {tokens}"
        )
    attach(model.model, compression)
    return compressed(processor, compression)


def restore(model: Any) -> None:
    """Undo ``compress``: the model is what it was, and needs the processor that it had.

    Raises CompressionError where the model is not compressed.
    """
    inner = getattr(model, "model", None)
    if compression_of(inner) is None:
        raise CompressionError(
            f"this {type(model).__name__} is not a compressed model, so there is nothing to restore; expected the "
            "model that was given to vz_edge.compress"
        )
    detach(inner)


def _family(model: Any) -> str:
    for family, classes in CLASSES.items():
        if isinstance(model, classes.model):
            return family
    raise UnsupportedModelError(
        f"a model of class {type(model).__name__} cannot be compressed; expected transformers' "
        f"{' or '.join(classes.model.__name__ for classes in CLASSES.values())}, loaded with from_pretrained (where "
        "PEFT or torch.compile has wrapped one, pass the model inside)"
    )


def _compression(family: str, config: Any, tokens: Any) -> Compression:
    """Read what matters of the model's config. Raises UnsupportedModelError, BudgetError."""
    require("vision_config.model_type", config.vision_config.model_type, *TOWER_TYPES)
    if isinstance(tokens, bool) or not isinstance(tokens, int) or abs(tokens) > MOST:
        given = shown(tokens)
        raise BudgetError(
            f"tokens={given}: expected a whole number (int), the total of a picture; a model with all tokens is the "
            "one that was not compressed"
        )
    tower = tower_spec(config.vision_config)
    states_read = tuple(tower.layers_before(layer) for layer in feature_layers(config.vision_feature_layer, tower))
    pinpoints = grid_pinpoints(getattr(config, "image_grid_pinpoints", ()), tower.image_size)
    side = tower.image_size
    max_tiles = 1 + max(((height // side) * (width // side) for height, width in pinpoints), default=0)
    return Compression(family, tower, states_read, pinpoints, tokens, split_tokens(tokens, max_tiles, tower.patches))


def _check_processor(processor: Any, config: Any, compression: Compression) -> None:
    """Raise CompressionError where the processor makes other pictures or prompts than the model reads."""
    expected = CLASSES[compression.family].processor
    if type(processor) is not expected:
        raise CompressionError(
            f"a {type(processor).__name__} does not belong to this model; expected a {expected.__name__}: load it "
            "from the model's own checkpoint, with AutoProcessor.from_pretrained"
        )
    image_processor = processor.image_processor
    side = compression.tower.image_size
    found_and_expected: dict[str, tuple[Any, Any]] = {
        "tile size": (_tile_size(image_processor, bool(compression.grid_pinpoints)), (side, side)),
        "patch size": (processor.patch_size, compression.tower.patch_size),
        "image token id": (processor.image_token_id, config.image_token_id),
    }
    if compression.grid_pinpoints:
        given = getattr(image_processor, "image_grid_pinpoints", None) or ()
        pinpoints = tuple(tuple(pinpoint) for pinpoint in given)
        found_and_expected["image_grid_pinpoints"] = pinpoints, compression.grid_pinpoints
    for what, (found, wanted) in found_and_expected.items():
        if found != wanted:
            raise CompressionError(
                f"the processor's {what} is {found} and the model's {wanted}: it is another model's; load it from the "
                "model's own checkpoint, with AutoProcessor.from_pretrained"
            )


def _tile_size(image_processor: Any, has_grid: bool) -> tuple[int, int] | None:
    """(height, width) of the tiles that a processor makes; None where they depend on the picture."""
    cropped = has_grid or getattr(image_processor, "do_center_crop", None)
    size = dict(getattr(image_processor, "crop_size" if cropped else "size", None) or {})
    if not cropped and getattr(image_processor, "do_pad", None) and size.get("shortest_edge"):
        return size["shortest_edge"], size["shortest_edge"]
    height, width = size.get("height"), size.get("width")
    return None if height is None or width is None else (height, width)
