"""Data-parallel training on the cores of one machine, one single-threaded process a core, started by torchrun.

On a busy machine this is twice as fast as one process with as many threads: those wait for each other in every
operation, these once a step. Without torchrun everything here is a no-op for one worker.
"""

import os
from collections.abc import Iterable

import torch
from torch import distributed


def start_workers() -> None:
    if "RANK" in os.environ:
        distributed.init_process_group("gloo")


def worker() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def worker_count() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replaces every gradient by its mean over the workers (a parameter without one counts as zero)."""
    if worker_count() == 1:
        return
    chosen = list(parameters)
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in chosen])
    distributed.all_reduce(flat)
    flat /= worker_count()
    for parameter, part in zip(chosen, flat.split([p.numel() for p in chosen]), strict=True):
        parameter.grad = part.view_as(parameter)
