"""Whether a kernel may read the memory of a tensor now; and a place where nothing of the caller's torch state is active."""

import functools
import os
import queue
import threading

import torch
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.utils._python_dispatch import _get_current_dispatch_mode

PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter)


def is_direct(tensor):
    """Whether C may read the memory of `tensor`. False while a compiler, tracer, fake tensor or transform is active: they only
    understand torch's operators."""
    return (
        type(tensor) in PLAIN_TENSORS
        and not is_compiling()
        and _get_current_dispatch_mode() is None
        and not torch._C._is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def apart(function):
    """function() in a thread of its own, where nothing of the caller's torch state is active. One thread serves all calls, as a
    new one costs half a millisecond."""
    thread, calls = server(os.getpid())
    if threading.current_thread() is thread:
        return function()
    answer = queue.SimpleQueue()
    calls.put((function, answer))
    result, error = answer.get()
    if error is not None:
        raise error
    return result


@functools.cache
def server(process):
    """(the thread that computes for apart(), its queue of (function, queue for the answer)). process: number of the process; a
    forked one has no other threads than its own."""
    calls = queue.SimpleQueue()

    def serve():
        while True:
            function, answer = calls.get()
            try:
                answer.put((function(), None))
            except BaseException as error:
                answer.put((None, error))

    thread = threading.Thread(target=serve, daemon=True, name="minitune checks")
    thread.start()
    return thread, calls
