"""The CPU backend: nf4.c through ctypes."""

import ctypes
import functools

import torch
from minitune_kernels import built, measured
from minitune_kernels.built import LEVELS, NoCompiler

NAME = "cpu"
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
STREAM_BYTES = 8 << 20  # an output of this size leaves the caches before it is read again: write past them


def typed(lib):
    """A loaded library, with the types of its functions."""
    i, p, n = ctypes.c_int, ctypes.c_void_p, ctypes.c_int64
    lib.nf4_quantize.argtypes, lib.nf4_quantize.restype = (i, i, p, p, p, n), None
    lib.nf4_dequantize.argtypes, lib.nf4_dequantize.restype = (i, i, p, p, p, p, p, p, p, n, i), None
    lib.nf4_matmul.argtypes = (i, i, p, p, p, p, p, p, p, p, n, n, n)
    return lib


@functools.cache
def library():
    """(the loaded library, its level). Raises NoCompiler."""
    lib, level = built.library()
    return typed(lib), level


def why_not(device):
    """None where this backend runs on `device`, else the reason in words."""
    if device.type != "cpu":
        return f"its kernels are for the CPU, not for {device.type}"
    try:
        library()
    except NoCompiler as error:
        return str(error)
    return None


def describe():
    """What runs, for a line on the screen."""
    return f"C kernels, {LEVELS[library()[1]]}"


def scale_arguments(scales):
    """(absmax, q, absmax2, code2, offset) as the C functions take them."""
    if len(scales) == 1:
        return scales[0].data_ptr(), None, None, None, None
    return None, *(scale.data_ptr() for scale in scales)


def quantize(weight):
    """weight (any shape) fp32, fp16 or bf16 -> (packed (ceil(n / 2),) uint8, absmax (ceil(n / 64),) fp32)."""
    lib, _ = library()
    n = weight.numel()
    packed = weight.new_empty((n + 1) // 2, dtype=torch.uint8)
    absmax = weight.new_empty(-(-n // 64), dtype=torch.float32)
    pointers = weight.data_ptr(), packed.data_ptr(), absmax.data_ptr()
    lib.nf4_quantize(torch.get_num_threads(), DTYPES[weight.dtype], *pointers, n)
    return packed, absmax


def dequantize(packed, scales, out):
    """Write the weight into `out`. scales: (absmax,), or (q, absmax2, code2, offset) with double quantisation."""
    lib, _ = library()
    stream = out.nbytes >= STREAM_BYTES
    arguments = packed.data_ptr(), *scale_arguments(scales), out.data_ptr(), out.numel(), stream
    lib.nf4_dequantize(torch.get_num_threads(), DTYPES[out.dtype], *arguments)
    return out


def max_rows(shape, dtype):
    """Rows of x up to which `matmul` was measured to be no slower than dequantising and the library's GEMM; 0: none, and where a
    block crosses rows."""
    if shape[1] % 64:
        return 0
    return measured.max_rows("4 bit", dtype)


def steady_rows(shape, dtype):
    """Rows of x up to which `matmul` sums every row in one order: up to max_rows, but 4 where AMX takes over; else 1."""
    rows = max_rows(shape, dtype) or 1
    return min(rows, 4) if dtype == torch.bfloat16 and library()[1] == 4 else rows


def matmul(x, packed, scales, shape, out):
    """out (.., out) = x (.., in) @ weight.T, M rows, summed in fp32; the weight is rounded to x.dtype as dequantize does."""
    (lib, _), M = library(), x.shape[:-1].numel()
    arguments = x.data_ptr(), packed.data_ptr(), *scale_arguments(scales), out.data_ptr(), M, *shape
    if lib.nf4_matmul(torch.get_num_threads(), DTYPES[x.dtype], *arguments):
        raise MemoryError(f"no memory for {M} rows of {shape[1]} elements")
    return out
