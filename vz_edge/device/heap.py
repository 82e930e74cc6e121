"""Memory that was freed, given back to the system.

The C library keeps what is freed in pieces below 32 MB, for the next ones to take. A layer's weights and activations
come and go in other sizes than the next layer's, and the heap of a 1B's export grew to twice what was in use. Where a
picture's activations were, a little is kept, and the next picture's no longer fit.
"""

from __future__ import annotations

import ctypes
import sys


def give_back_freed_memory() -> None:
    """Return free pages of the heap, where the C library is one that does (glibc)."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
