"""Sums over the processes that train one model together, one a device. A process alone is rank 0, and its sums are its values."""

import torch
from torch import distributed


def is_open():
    """Whether there are several processes: torch.distributed has a group."""
    return distributed.is_available() and distributed.is_initialized()


def rank():
    """Number of this process among them, from 0."""
    return distributed.get_rank() if is_open() else 0


def total(number):
    """The sum of a number over all ranks, of the number's own type."""
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
