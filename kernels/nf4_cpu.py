"""The CPU backend: nf4.c through ctypes."""

import ctypes
import functools

import torch
from minitune_kernels import built, measured
from minitune_kernels.built import INT, LEVELS, POINTER, SIZE, NoCompiler, struct

NAME = "cpu"
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
STREAM_BYTES = 8 << 20  # an output of this size leaves the caches before it is read again: write past them

# The structs of nf4.c, which says what the fields hold.
Weight = struct("Weight", (POINTER, "packed absmax q absmax2 code2 offset"))
Quantize = struct("Quantize", (INT, "dtype"), (POINTER, "weight packed absmax"), (SIZE, "n"))
Dequantize = struct("Dequantize", (INT, "dtype"), (Weight, "weight"), (POINTER, "out"), (SIZE, "n"), (INT, "stream"))
Matmul = struct("Matmul", (INT, "dtype"), (POINTER, "x"), (Weight, "weight"), (POINTER, "out"), (SIZE, "M N K"))


def typed(lib):
    """A loaded library, with the argument types of its functions set: the number of threads, and the address of a struct."""
    for function in (lib.nf4_quantize, lib.nf4_dequantize, lib.nf4_matmul):
        function.argtypes = INT, POINTER
    lib.nf4_quantize.restype = lib.nf4_dequantize.restype = None
    return lib


@functools.cache
def library():
    """(the loaded library, its level). Raises NoCompiler."""
    lib, level = built.library()
    return typed(lib), level


def why_not(device):
    """None if this backend runs on `device`, else the reason in words."""
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


def weight_of(packed, scales):
    """The C struct of a quantised weight. scales: (absmax,), or (q, absmax2, code2, offset) with double quantisation."""
    if len(scales) == 1:
        return Weight(packed.data_ptr(), scales[0].data_ptr())
    q, absmax2, code2, offset = scales
    return Weight(packed.data_ptr(), None, q.data_ptr(), absmax2.data_ptr(), code2.data_ptr(), offset.data_ptr())


def quantize(weight):
    """weight (any shape) fp32, fp16 or bf16 -> (packed (ceil(n / 2),) uint8, absmax (ceil(n / 64),) fp32)."""
    lib, _ = library()
    n = weight.numel()
    packed = weight.new_empty((n + 1) // 2, dtype=torch.uint8)
    absmax = weight.new_empty(-(-n // 64), dtype=torch.float32)
    job = Quantize(DTYPES[weight.dtype], weight.data_ptr(), packed.data_ptr(), absmax.data_ptr(), n)
    lib.nf4_quantize(torch.get_num_threads(), ctypes.addressof(job))
    return packed, absmax


def dequantize(packed, scales, out):
    """Write the weight into `out` and return it. scales: (absmax,), or (q, absmax2, code2, offset) with double quantisation."""
    lib, _ = library()
    weight, stream = weight_of(packed, scales), out.nbytes >= STREAM_BYTES
    job = Dequantize(DTYPES[out.dtype], weight, out.data_ptr(), out.numel(), stream)
    lib.nf4_dequantize(torch.get_num_threads(), ctypes.addressof(job))
    return out


def max_rows(shape, dtype):
    """The largest number of rows of x for which matmul() was measured to be no slower than dequantising the weight and torch's
    GEMM. 0: none, or blocks cross rows of the weight."""
    if shape[1] % 64:
        return 0
    return measured.max_rows("4 bit", dtype)


def steady_rows(shape, dtype):
    """The largest number of rows of x for which a row's product has the same bits as that of the row alone. That is
    max_rows(), but 4 in bf16 with AMX, whose tiles add in another order."""
    rows = max_rows(shape, dtype) or 1
    return min(rows, 4) if dtype == torch.bfloat16 and library()[1] == 4 else rows


def matmul(x, packed, scales, shape, out):
    """Write x (.., in) @ weight.T, M rows, into `out` (.., out) and return it. Sums are fp32; the weight is rounded to x.dtype,
    as by dequantize(). Raises MemoryError."""
    (lib, _), M = library(), x.shape[:-1].numel()
    job = Matmul(DTYPES[x.dtype], x.data_ptr(), weight_of(packed, scales), out.data_ptr(), M, *shape)
    if lib.nf4_matmul(torch.get_num_threads(), ctypes.addressof(job)):
        raise MemoryError(f"no memory for {M} rows of {shape[1]} elements")
    return out
