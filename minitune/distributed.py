"""Sums over the processes (ranks) that train one model together, one process for each device. A single process is rank 0, and
its sums are its own values."""

import torch
from torch import distributed


def is_open():
    """Whether there are several processes: torch.distributed is initialised."""
    return distributed.is_available() and distributed.is_initialized()


def rank():
    """Rank of this process, from 0."""
    return distributed.get_rank() if is_open() else 0


def total(number):
    """Sum of an int or a float over all ranks, in the same type."""
    if not is_open():
        return number
    tensor = torch.tensor(number, dtype=torch.float64 if isinstance(number, float) else torch.int64)
    distributed.all_reduce(tensor)
    return tensor.item()


def add_up(tensors):
    """Replace each tensor by its sum over all ranks, in place."""
    if is_open():
        for tensor in tensors:
            distributed.all_reduce(tensor)
