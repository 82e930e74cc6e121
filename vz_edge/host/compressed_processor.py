"""The processor side of ``vz_edge.compress``: as many image tokens in the prompt as the compressed model gives.

A compressed processor is a copy of the given one, with a subclass of its class that counts otherwise; text,
pictures, padding and chat templates are transformers' own. What it saves is the processor that it was made from,
because a compressed model saves plain weights too: both come back as they were before ``compress``.
"""

from __future__ import annotations

import copy
from typing import Any

from transformers import LlavaNextProcessor, LlavaProcessor

from vz_edge.host.compressed_model import Compression


class _Compressed:
    """What both processors have: ``compression``, and that they are written as what they were made from."""

    compression: Compression

    def to_dict(self) -> dict[str, Any]:
        """The configuration of the processor that this one was made from."""
        return uncompressed(self).to_dict()

    def save_pretrained(self, *args: Any, **kwargs: Any) -> list[str]:
        """Save the processor that this one was made from."""
        return uncompressed(self).save_pretrained(*args, **kwargs)


class CompressedLlavaProcessor(_Compressed, LlavaProcessor):
    """Expands ``<image>`` to the tokens of one tile."""

    @property
    def num_additional_image_tokens(self) -> int:
        """Tokens of a picture beyond its patches, from which LlavaProcessor takes 1 off for CLS: a negative number."""
        without_cls = self.vision_feature_select_strategy == "default"
        return self.compression.budget.total(1) - self.compression.tower.patches + without_cls


class CompressedLlavaNextProcessor(_Compressed, LlavaNextProcessor):
    """Expands ``<image>`` to the tokens of as many tiles as the picture has."""

    def _get_number_of_features(self, orig_height: int, orig_width: int, height: int, width: int) -> int:
        # LlavaNextProcessor takes 1 off for CLS.
        without_cls = self.vision_feature_select_strategy == "default"
        return self.compression.tokens(orig_height, orig_width) + without_cls


COMPRESSED_PROCESSORS = {
    LlavaProcessor: CompressedLlavaProcessor,
    LlavaNextProcessor: CompressedLlavaNextProcessor,
}


def compressed(processor: Any, compression: Compression) -> Any:
    """A copy of ``processor`` (compressed already or not) that counts for ``compression``."""
    copied = copy.deepcopy(uncompressed(processor))
    copied.__class__ = COMPRESSED_PROCESSORS[type(copied)]
    copied.compression = compression
    return copied


def uncompressed(processor: Any) -> Any:
    """The processor that ``processor`` was made from, sharing its parts; itself where it is not compressed."""
    if not isinstance(processor, _Compressed):
        return processor
    plain = copy.copy(processor)
    plain.__class__ = {ours: theirs for theirs, ours in COMPRESSED_PROCESSORS.items()}[type(processor)]
    del plain.compression
    return plain
