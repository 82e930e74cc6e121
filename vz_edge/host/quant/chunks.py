"""Work on a weight in chunks of rows, a chunk a thread."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import torch

CHUNK_VALUES = 256 * 1024  # values quantised at a time by a thread: 1 MB of float32, which stays in the cache


def in_threads(quantize_rows: Callable[[int], None], starts: Iterable[int]) -> None:
    """Call ``quantize_rows`` with the first row of each chunk, on as many threads as torch has.

    torch's own threads would wait for each other after every one of the short operations.
    """
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for _ in pool.map(quantize_rows, starts):
            pass
    torch.set_num_threads(threads)
