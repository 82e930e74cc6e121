"""Every error this package raises on purpose.

::

    VzEdgeError
    ├── RecipeError            unknown recipe, or a recipe file that breaks the schema
    ├── DeviceError            unknown device or runtime, or a profile with an impossible figure
    ├── BudgetError            a token budget that the model cannot give
    ├── CheckpointError        a checkpoint that cannot be read
    │   ├── MissingTensorError     a tensor or shard is not there
    │   ├── TensorShapeError       a tensor is there with another shape than the config says
    │   └── UnsafeCheckpointError  a pickle, which is never loaded
    ├── UnsupportedModelError  an architecture, activation or rotary variant that has no graph here
    ├── ExportError            the export cannot start or its result disagrees with torch
    │   ├── DiskSpaceError         not enough room at the target
    │   └── TargetExistsError      the target folder is there already
    ├── BundleError            a folder that is not a bundle this version can use
    │   ├── CorruptBundleError     a file is missing or differs from its recorded hash
    │   └── BundleVersionError     written by a newer format
    ├── CompressionError       a model, processor and budget that do not go together in compress and restore
    ├── ImageError             a picture that cannot be read
    ├── SourceError            a source of frames that cannot be opened, is empty, or broke off
    ├── RequestError           messages, pictures or settings that do not make a question
    ├── AnswerError            an answer that is not what its schema says: cut off, or refused
    ├── ContextLengthError     prompt, picture and answer do not fit the context
    ├── ProviderError          an execution provider that this machine cannot give
    ├── InsufficientMemoryError  a bundle that does not fit into this machine's memory
    ├── ServeError             a server that cannot start as it was told to
    ├── MeasurementError       a measurement that broke off, or that cannot be compared
    └── DependencyError        an optional package is needed and absent, or does not import

A message says what was wrong, what was expected and what to do, in one line. The command line prints
that line and exits with status 2.
"""

from __future__ import annotations

LONGEST_MESSAGE = 2000  # characters; a path or a choice of the caller's may have any number


class VzEdgeError(Exception):
    """Base of all errors raised on purpose by vz_edge.

    Its message is one line that can be printed, whatever a caller's names and values in it hold.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(_one_line(message))


def _one_line(message: str) -> str:
    text = " ".join(str(message).split())
    text = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
    if len(text) <= LONGEST_MESSAGE:
        return text
    half = LONGEST_MESSAGE // 2
    return f"{text[:half]} ... {text[-half:]}"


class RecipeError(VzEdgeError):
    """A recipe is unknown or breaks the schema."""


class DeviceError(VzEdgeError):
    """A device or runtime is unknown, or its profile has a missing or impossible figure."""


class BudgetError(VzEdgeError):
    """A token budget that the model cannot give."""


class CheckpointError(VzEdgeError):
    """A checkpoint that cannot be read."""


class MissingTensorError(CheckpointError):
    """A tensor or a shard that the model needs is not in the checkpoint."""


class TensorShapeError(CheckpointError):
    """A tensor has another shape than the checkpoint's config says."""


class UnsafeCheckpointError(CheckpointError):
    """The checkpoint is a pickle, which could run code when loaded."""


class UnsupportedModelError(VzEdgeError):
    """The architecture, or a variant of it, has no graph here."""


class ExportError(VzEdgeError):
    """The export cannot start, or what it wrote disagrees with torch."""


class DiskSpaceError(ExportError):
    """Not enough room at the target for the predicted size."""


class TargetExistsError(ExportError):
    """The target folder exists and replacing it was not asked for."""


class BundleError(VzEdgeError):
    """The folder is not a bundle that this version can use."""


class CorruptBundleError(BundleError):
    """A file of the bundle is missing or differs from what was written."""


class BundleVersionError(BundleError):
    """The bundle was written by a newer format than this version reads."""


class CompressionError(VzEdgeError):
    """Model, processor and budget do not go together: in ``compress``, or in ``restore`` of a plain model."""


class ImageError(VzEdgeError):
    """A picture that cannot be read."""


class SourceError(VzEdgeError):
    """A source of frames that cannot be opened, has no frames, or broke off."""


class RequestError(VzEdgeError):
    """Messages, pictures or settings that do not make a question."""


class AnswerError(VzEdgeError):
    """An answer that is not what its schema says: it was cut off, or the schema refuses it."""


class ContextLengthError(VzEdgeError):
    """Prompt, picture and answer do not fit the model's context."""


class ProviderError(VzEdgeError):
    """An execution provider that this machine cannot give."""


class InsufficientMemoryError(VzEdgeError):
    """A bundle that does not fit into this machine's memory."""


class ServeError(VzEdgeError):
    """A server that cannot start as it was told to: its address, its token, its limits."""


class MeasurementError(VzEdgeError):
    """A measurement that broke off, or that cannot be compared with another."""


class DependencyError(VzEdgeError):
    """An optional package is needed and absent, or its build does not fit the machine."""
