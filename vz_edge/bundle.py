"""The bundle: one folder with all that a device needs to answer questions, and nothing else.

``vz_edge.json``, the manifest, says which model it is, how pictures are tiled, how many tokens are kept,
and the size and SHA-256 of every other file. It is written last, into a staging folder that takes the final
name when it is whole (``vz_edge.staging``), so a folder that loads is a folder that was finished.
``docs/bundle.md`` is the specification.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vz_edge import strict
from vz_edge.arguments import whole
from vz_edge.budget import TokenBudget
from vz_edge.errors import (
    BudgetError,
    BundleError,
    BundleVersionError,
    CorruptBundleError,
    ExportError,
)
from vz_edge.no_bundle import why_no_bundle
from vz_edge.recipe import ModelSpec

FORMAT_VERSION = 3
READABLE_VERSIONS = (1, 2, 3, 4)  # 1 had no ``format``, all were ONNX; 2 had one budget at most
# Keys that older devices do not know. One with its default value is not written, and a bundle without any of them is
# of format 3, so that they read it; a bundle with one of them would be answered wrongly there and is of format 4.
KEYS_OF_FORMAT_4 = {
    "model": ("feature_layers", "cls_is_token", "projector_bias"),
    "image": ("short_edge", "exact_size", "resize"),
}
MANIFEST = "vz_edge.json"
LANGUAGE_MODEL = "language_model"  # the folder of a bundle with bitsandbytes weights
DECODER_FILE = {"onnx": "decoder.onnx", "bnb": f"{LANGUAGE_MODEL}/config.json"}  # by format: which of the two is there
HASH_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True)
class FileEntry:
    """What a file of the bundle must be."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class WeightSpec:
    """Bits a weight of each part of the model; 16 means not quantised (stored at the target's precision).

    ``block_size`` weights share a scale; 0: those of a row do, as in LLM.int8() (``quantizer`` "int8"). "weighted" is
    for the language model alone; the vision graph is then rounded to nearest.
    """

    bits: Literal[4, 8, 16]
    lm_head_bits: Literal[4, 8, 16]
    vision_bits: Literal[8, 16]
    block_size: int
    quantizer: Literal["rtn", "hqq", "weighted", "nf4", "int8"]


def default_weights(bits: Literal[4, 8, 16]) -> WeightSpec:
    """The bits and block size an export takes unless told otherwise.

    profiles/reports/quantizers.md (speed, size) and weights_quality.md (perplexity, answers) say why.
    """
    quantizer: Literal["rtn", "weighted"] = "weighted" if bits == 4 else "rtn"  # 8 bits lose nothing to be won back
    return WeightSpec(bits, 16 if bits == 16 else 8, vision_bits=16, block_size=128, quantizer=quantizer)


def bitsandbytes_weights(bits: Literal[4, 8, 16]) -> WeightSpec:
    """What bitsandbytes does: NF4 in blocks of 64 with double quantisation, or LLM.int8() with a scale a row.

    Sources: QLoRA (arXiv 2305.14314), LLM.int8() (arXiv 2208.07339). lm_head, tower and projector keep 16 bits.
    Raises ExportError for 16 bits.
    """
    if bits == 16:
        raise ExportError(
            "--format bnb has no 16 bits: bitsandbytes quantises to 4 (NF4) or 8 (LLM.int8()); take --bits 4 or 8, or "
            "--format onnx"
        )
    block_size, quantizer = (64, "nf4") if bits == 4 else (0, "int8")
    return WeightSpec(bits, 16, 16, block_size, quantizer)  # type: ignore[arg-type]


@dataclass(frozen=True)
class ImageSpec:
    """How pixels become numbers, from the checkpoint's preprocessor_config.json.

    ``mode`` "stock" is what transformers' processor does; "pad" is LLaVA-1.5's published evaluation (pad to a
    square with the mean colour). ``resample`` is Pillow's filter number (3: bicubic).

    In a family without a grid the picture's short edge is then scaled to the tile's side, or to ``short_edge`` pixels,
    or the picture is squeezed to ``exact_size`` (height, width), or it stays as it is (``resize`` false); last its
    centre is cut out, filled up with black where it is smaller than a tile.
    """

    mode: Literal["stock", "pad"]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    rescale_factor: float = 1 / 255
    resample: int = 3
    short_edge: int | None = None
    exact_size: tuple[int, int] | None = None
    resize: bool = True


@dataclass(frozen=True)
class StopSpec:
    """What ends an answer."""

    token_ids: tuple[int, ...]
    strings: tuple[str, ...]


@dataclass(frozen=True)
class VisionParity:
    """The parity picture through the vision graph, against torch (docs/bundle.md says what is compared).

    ``kept`` [tiles, dominant] and ``feature_sample`` [tokens, values] are what the bundle gave; ``kept`` and
    ``kept_agreement`` are None without a budget.
    """

    tiles: int
    tokens: int
    max_error: float
    kept_agreement: float | None
    kept: tuple[tuple[int, ...], ...] | None
    feature_sample: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class BudgetParity:
    """The same picture with a further budget."""

    tokens: int
    max_error: float
    kept_agreement: float | None


@dataclass(frozen=True)
class DecoderParity:
    """The first ``layers`` layers of the language model, against torch; ``top_token`` is None where there are more."""

    layers: int
    output: Literal["logits", "residual"]
    relative_error: float
    top_token: int | None


@dataclass(frozen=True)
class Parity:
    """What the export measured against torch; None: not compared."""

    vision: VisionParity | None = None
    more_budgets: tuple[BudgetParity, ...] = ()
    decoder: DecoderParity | None = None


@dataclass(frozen=True, repr=False)
class Manifest:
    """``vz_edge.json``. ``budget`` is None in a bundle exported with all tokens.

    ``more_budgets`` can be asked for instead of ``budget``; the vision graph knows them by their place in ``budgets``.

    ``format`` says what the language model is: "onnx", a graph, or "bnb", a transformers checkpoint with
    bitsandbytes weights.

    ``predicted`` holds byte counts by part, stated before the export; ``parity`` what was measured after it.
    """

    format_version: int
    created_by: str
    name: str
    checkpoint: str
    model: ModelSpec
    target: Literal["cpu", "cuda"]
    budget: TokenBudget | None
    weights: WeightSpec
    image: ImageSpec
    stop: StopSpec
    format: Literal["onnx", "bnb"] = "onnx"
    more_budgets: tuple[TokenBudget, ...] = ()
    predicted: dict[str, int] = field(default_factory=dict)
    parity: Parity = Parity()
    files: dict[str, FileEntry] = field(default_factory=dict)

    def __repr__(self) -> str:
        totals = ", ".join(str(budget.total(self.model.max_tiles)) for budget in self.budgets) or "all"
        size_gb = sum(entry.size_bytes for entry in self.files.values()) / 1e9
        return (
            f"Manifest({self.name!r}, format {self.format_version} {self.format!r}, {self.model.family}, target "
            f"{self.target!r}, {self.weights.bits} bits, tokens {totals}, {len(self.files)} files of {size_gb:.2f} GB)"
        )

    @property
    def budgets(self) -> tuple[TokenBudget, ...]:
        """All budgets, the default first; none in a bundle exported with all tokens."""
        return () if self.budget is None else (self.budget, *self.more_budgets)

    def budget_of(self, tokens: int | None) -> TokenBudget | None:
        """The budget of that total at the model's largest tile count; of None the default. Raises BudgetError."""
        if tokens is None:
            return self.budget
        totals = {budget.total(self.model.max_tiles): budget for budget in self.budgets}
        tokens = whole("tokens", tokens, error=BudgetError)
        if tokens not in totals:
            there = f"has budgets of {', '.join(map(str, totals))} tokens" if totals else "was exported with all tokens"
            raise BudgetError(f"this bundle {there}, not of {tokens}; ask for one of its own, or export it with others")
        return totals[tokens]


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest and check that every file is there with its size (hashes: verify_files).

    Raises BundleError, BundleVersionError or CorruptBundleError.
    """
    path = folder / MANIFEST
    _check_name(path, folder)
    if not os.path.isfile(path):
        raise BundleError(why_no_bundle(folder, MANIFEST))
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        version = data["format_version"]
    except OSError as error:
        raise BundleError(f"{path} cannot be read ({error.strerror}); make it readable, or copy it again") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptBundleError(f"{path} is not a manifest ({error}); export the bundle again") from error
    if type(version) is not int or version < 1:  # "3" and 3.0 are no formats, nor is True
        raise CorruptBundleError(
            f"{path}: format_version: expected an int from 1, got {version!r}; export the bundle again"
        )
    if version not in READABLE_VERSIONS:
        raise BundleVersionError(
            f"{folder} has bundle format {version}, this version of vz-edge reads up to format "
            f"{max(READABLE_VERSIONS)}; "
            "upgrade vz-edge, or export the bundle again"
        )
    try:
        manifest = strict.load(Manifest, data)
    except strict.SchemaError as error:
        raise CorruptBundleError(f"{path}: {error}; export the bundle again") from error
    if DECODER_FILE[manifest.format] not in manifest.files:
        raise CorruptBundleError(
            f"{path} says format {manifest.format!r} and lists no {DECODER_FILE[manifest.format]}, which a bundle of "
            "that format has; copy or export the bundle again"
        )
    for name, entry in manifest.files.items():
        _check_size(folder / name, entry)
    return manifest


def _check_name(path: Path, folder: Path) -> None:
    """Raise BundleError for a name that no file can have, or a folder that may not be looked into."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass  # which is said otherwise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BundleError(
            f"{folder} cannot be opened ({reason}); expected a folder written by 'vz-edge export'"
        ) from error


def verify_files(folder: Path, manifest: Manifest, progress: Callable[[str, int], None]) -> None:
    """Hash every file; ``progress(file name, bytes hashed)`` is called as it goes. Raises CorruptBundleError."""
    for name, entry in manifest.files.items():
        _check_size(folder / name, entry)
        found = sha256(folder / name, lambda count, name=name: progress(name, count))  # type: ignore[misc]
        if found != entry.sha256:
            raise CorruptBundleError(
                f"{folder / name} has SHA-256 {found[:16]}…, the manifest says {entry.sha256[:16]}…; "
                "copy or export the bundle again"
            )


def write_manifest(folder: Path, manifest: Manifest, progress: Callable[[str, int], None]) -> Manifest:
    """Hash all that lies in ``folder`` and below into the manifest and write it, last of all files."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST):
        name = path.relative_to(folder).as_posix()
        digest = sha256(path, lambda count, name=name: progress(name, count))  # type: ignore[misc]
        files[name] = FileEntry(path.stat().st_size, digest)
    complete = dataclasses.replace(manifest, files=files)
    if _has_keys_of_format_4(complete):
        complete = dataclasses.replace(complete, format_version=4)
    (folder / MANIFEST).write_text(json.dumps(_as_data(complete), indent=2) + "\n", encoding="utf-8")
    return complete


def _has_keys_of_format_4(manifest: Manifest) -> bool:
    data = _as_data(manifest)
    return any(name in data[part] for part, names in KEYS_OF_FORMAT_4.items() for name in names)


def _as_data(manifest: Manifest) -> dict[str, Any]:
    """What is written; a key of format 4 is left out where it has its default value."""
    data = dataclasses.asdict(manifest)
    for part, names in KEYS_OF_FORMAT_4.items():
        defaults = {field.name: field.default for field in dataclasses.fields(getattr(manifest, part))}
        for name in names:
            if data[part][name] == defaults[name]:
                del data[part][name]
    return data


def listed_files(folder: Path) -> set[str]:
    """Names of the files that the manifest in ``folder`` lists, whichever format it has. Raises CorruptBundleError."""
    path = folder / MANIFEST
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if not str(data["created_by"]).startswith("vz-edge") or type(data["format_version"]) is not int:
            raise ValueError("written by something else")
        return set(data["files"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptBundleError(f"{path} is not a manifest ({type(error).__name__}: {error})") from error


def sha256(path: Path, progress: Callable[[int], None]) -> str:
    """Hexadecimal SHA-256 of a file, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
            progress(len(chunk))
    return digest.hexdigest()


def _check_size(path: Path, entry: FileEntry) -> None:
    size = os.path.getsize(path) if os.path.isfile(path) else None
    if size != entry.size_bytes:
        found = "is missing" if size is None else f"has {size} bytes"
        raise CorruptBundleError(
            f"{path} {found}, the manifest says {entry.size_bytes} bytes; copy or export the bundle again"
        )
