"""Whether a kernel may read the memory of a tensor now; and a place where nothing of the caller's torch state is active."""

import threading

import torch
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.utils._python_dispatch import _get_current_dispatch_mode

PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter)


def is_direct(tensor):
    """False while a compiler, tracer, fake tensor or transform is active: they understand torch's operators only."""
    return (
        type(tensor) in PLAIN_TENSORS
        and not is_compiling()
        and _get_current_dispatch_mode() is None
        and not torch._C._is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def apart(function):
    """function() in a thread of its own, where nothing of the caller's torch state is active."""
    results = []

    def run():
        try:
            results.append((function(), None))
        except BaseException as error:
            results.append((None, error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    result, error = results[0]
    if error is not None:
        raise error
    return result
