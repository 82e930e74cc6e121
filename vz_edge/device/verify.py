"""Is this bundle what was exported, and does it still see the same? Hashes, and the export's picture again.

The export shows every bundle one picture, made here from arithmetic alone, and records what it gave in the
manifest, beside its differences from torch. On a device the same picture must give the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import PIL
from PIL import Image

from vz_edge.errors import BundleError, CorruptBundleError

if TYPE_CHECKING:
    from vz_edge.device.model import EdgeModel

PARITY_PROMPT = "What is in the picture?"
SAMPLE_TOKENS, SAMPLE_VALUES = 8, 4
# Another processor sums in another order; a kept position on the edge may then fall to the other side.
LARGEST_FEATURE_ERROR = {"cpu": 0.01, "cuda": 0.05}
LEAST_KEPT_AGREEMENT = 0.95
ROUNDING = {"cpu": 1e-5, "cuda": 1e-2}  # of the largest feature: what the order of sums alone makes in fp32 and fp16


@dataclass(frozen=True)
class SecondLook:
    """What the parity picture gave now, against the export's record.

    ``kept_agreement`` is the share of kept positions that are the same (None without a budget), ``feature_error``
    the largest difference over the sampled features' largest value, ``same_token`` whether the next token is the
    one recorded (None where the export could not run the whole decoder), ``finite`` whether all logits are.
    """

    kept_agreement: float | None
    feature_error: float
    same_token: bool | None
    finite: bool

    def agrees(self, target: str) -> bool:
        """Whether the differences are within what another processor may make of the same bundle."""
        return not self.faults(target)

    def faults(self, target: str) -> list[str]:
        """What no other processor and no other Pillow makes of the same bundle, in words; empty where it agrees."""
        kept = self.kept_agreement
        found = {
            f"only {kept or 0:.1%} of the kept patches are the same (expected {LEAST_KEPT_AGREEMENT:.0%} or more)": (
                kept is not None and kept < LEAST_KEPT_AGREEMENT
            ),
            f"features differ by {self.feature_error:.1%} of the largest (expected at most "
            f"{LARGEST_FEATURE_ERROR[target]:.0%})": (
                not self.feature_error <= LARGEST_FEATURE_ERROR[target] and kept in (None, 1.0)
            ),
            "the next token is another": self.same_token is False,
            "logits are not finite": not self.finite,
        }
        return [words for words, there in found.items() if there]

    def verdict(self, target: str) -> str:
        """What differs from the export, and whether it matters, for a look that agrees."""
        token = "the next token is the same" if self.same_token else "the export could not record the next token"
        if self.kept_agreement in (None, 1.0) and self.feature_error <= ROUNDING[target]:
            return f"as exported: nothing differs but rounding, and {token}"
        kept = {None: "", 1.0: "the same patches are kept, "}.get(
            self.kept_agreement, f"{1 - (self.kept_agreement or 0):.1%} of the kept patches are others, at the edge, "
        )
        return (
            f"as expected: {kept}features differ by {self.feature_error:.2%} of the largest, and {token}. It does not "
            "matter: another processor sums in another order, and another Pillow resizes in another order (12 beside "
            f"13; here {PIL.__version__}). Single words of answers may differ"
        )


def parity_picture() -> Image.Image:
    """A picture of 400 x 800 pixels with gradients, edges and texture, the same on every machine (integers only)."""
    y, x = np.mgrid[0:800, 0:400]
    red = (x * 255 // 400 + 60 * ((x // 40 + y // 40) % 2)) % 256
    green = y * 255 // 800
    blue = ((x * x // 97 + y * y // 89) // 4) % 256
    disc = (x - 250) ** 2 + (y - 300) ** 2 < 90**2
    bar = (abs(x - 120) < 30) & (abs(y - 560) < 160)
    picture = np.stack([red, green, blue], axis=-1)
    picture[disc] = (230, 30, 40)
    picture[bar] = (20, 60, 220)
    return Image.fromarray(picture.astype(np.uint8))


def feature_sample(features: np.ndarray) -> tuple[tuple[float, ...], ...]:
    """The first values of evenly spaced tokens of ``features`` [tokens, hidden]: enough to tell them apart."""
    rows = np.linspace(0, len(features) - 1, SAMPLE_TOKENS).astype(int)
    return tuple(tuple(float(value) for value in features[row, :SAMPLE_VALUES]) for row in rows)


def look_again(model: EdgeModel) -> SecondLook:
    """Show the parity picture to a loaded model and compare with the manifest's record.

    Raises BundleError where there is no record, and CorruptBundleError where it is another bundle's.
    """
    recorded, decoder = model.manifest.parity.vision, model.manifest.parity.decoder
    if recorded is None or decoder is None:
        raise BundleError(
            f"the manifest of {model.manifest.name} records no parity picture (parity), so there is nothing to compare "
            "with; compare the hashes alone (--hashes-only), or export the bundle again"
        )
    result = model.encode(parity_picture())
    found = feature_sample(result.features)
    if _lengths(recorded.feature_sample) != _lengths(found) or _lengths(recorded.kept) != _lengths(result.kept):
        raise CorruptBundleError(
            f"the manifest of {model.manifest.name} records another bundle's parity picture (parity.vision: other "
            "numbers of tiles, positions or values than this one gives); copy or export the bundle again"
        )
    expected = np.array(recorded.feature_sample, dtype=np.float32)
    error = float(np.abs(np.array(found) - expected).max() / np.abs(expected).max())
    logits = next_logits(model, result.features)
    token = decoder.top_token
    return SecondLook(
        kept_agreement=None if result.kept is None else kept_agreement(result.kept, np.array(recorded.kept)),
        feature_error=error,
        same_token=None if token is None else int(logits.argmax()) == token,
        finite=bool(np.isfinite(logits).all()),
    )


def next_logits(model: EdgeModel, features: np.ndarray) -> np.ndarray:
    """Logits [vocab] after ``features`` [tokens, hidden] and PARITY_PROMPT."""
    ids = model.chat.tokenizer.encode(PARITY_PROMPT).ids
    embeds = np.concatenate([features, model.embedding.rows(ids)])
    return model.decoder.start(len(embeds)).append(embeds)


def kept_agreement(found: np.ndarray, expected: np.ndarray) -> float:
    """Share of kept positions [tiles, dominant] that both have."""
    same = sum(len(np.intersect1d(a, b)) for a, b in zip(found, expected, strict=True))
    return same / expected.size


def _lengths(rows: Iterable[Sized] | None) -> list[int] | None:
    return None if rows is None else [len(row) for row in rows]
