"""Products of few rows with a bf16 weight on a CPU: the layers that are not quantised, while token after token is decoded.

torch's GEMM reads such a weight at two thirds of the memory's speed. Everywhere else torch is as fast, and is used."""

import functools
import os

import torch
from minitune_kernels import nf4_cpu

MAX_ROWS = 8


@functools.cache
def runs_here(wanted):
    """Whether this CPU has the instructions, there is a compiler, and MINITUNE_KERNELS does not ask for another backend."""
    return wanted in (None, "", "cpu") and nf4_cpu.why_not(torch.device("cpu")) is None and nf4_cpu.library()[1] >= 3


def fits(x, weight):
    """Whether linear() takes these: few rows in bf16 on a CPU, nothing to record, whole vectors."""
    return (
        x.dtype == weight.dtype == torch.bfloat16
        and x.device.type == weight.device.type == "cpu"
        and 0 < x.numel() <= MAX_ROWS * x.shape[-1]
        and x.shape[-1] % 32 == 0
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        and weight.is_contiguous()
        and not torch.compiler.is_compiling()
        and runs_here(os.environ.get("MINITUNE_KERNELS"))
    )


def linear(x, weight, bias=None):
    """x (.., in) @ weight (out, in).T + bias, summed in fp32 and rounded once. x, weight: as fits() says."""
    (N, K), M = weight.shape, x.numel() // x.shape[-1]
    out = x.new_empty(*x.shape[:-1], N)
    lib, level = nf4_cpu.library()
    x = x.contiguous()
    lib.nf4_dense_matmul(level, torch.get_num_threads(), x.data_ptr(), weight.data_ptr(), out.data_ptr(), M, N, K)
    return out if bias is None else out.add_(bias)
