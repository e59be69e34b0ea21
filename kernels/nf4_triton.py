"""NF4 in Triton, for NVIDIA GPUs of compute capability 8.0 and up. Format and bits are those of nf4_reference.py. nf4.py checks
the inputs, this module does not. There is no autotuning and there are no atomics, so every run gives the same bits. The first
call for a dtype, number of rows of x and width compiles, in about a second. After it a CUDA graph may capture the kernels.

These kernels are limited more by the instructions of the 4-bit look-up than by memory. While an H200 reads one weight of a GEMV
from memory, its SMs can issue about four instructions; while it dequantises one, about twenty. So a thread reads eight weights as
one 32-bit word, takes each nibble with a shift and a mask, and looks it up in the 16 code values in shared memory, without bank
conflicts. That is about five instructions a weight in the GEMV and seven in dequantize, counted in the builds for sm_90. A table
in global memory would take two more for its 64-bit addresses; a tree of selects would take 15 instead of the one look-up.

The compiler must not contract products and sums into FMAs (enable_fp_fusion=False; tl.fma where one is wanted): the absmax of
double quantisation is rounded after the product and after the sum."""

import importlib.util
import os
import types

import torch
from minitune_kernels import nf4_reference

NAME = "triton"
OLDEST = (3, 5)  # the oldest version of triton that was tried
if importlib.util.find_spec("triton"):
    import triton
    import triton.language as tl

    jit = triton.jit
else:  # the module can still be imported, and why_not() says that triton is missing
    triton, jit = None, lambda *function, **options: function[0] if function else jit
    tl = types.SimpleNamespace(constexpr=None, int64=None)  # for the annotations

QUANTIZE = {"BLOCKS": 32, "num_warps": 4, "enable_fp_fusion": False}
# A thread writes 4 groups of 16 bytes: 8 weights of 16 bits or 4 of 32 each. By the bytes of an output element.
DEQUANTIZE = {
    2: {"GROUPS": 1024, "BYTES": 4, "num_warps": 8, "enable_fp_fusion": False},
    4: {"GROUPS": 1024, "BYTES": 2, "num_warps": 8, "enable_fp_fusion": False},
}
# Rows of x -> rows of the weight in a program of the GEMV. More rows share what is loaded of x; fewer need fewer registers.
GEMV_ROWS = {1: 8, 2: 4, 3: 4, 4: 4}
GEMV = {"CHUNKS": 128, "num_warps": 4, "enable_fp_fusion": False}  # chunks of 8 columns, one for each thread
# From 5 rows of x on, tensor cores multiply. ROWS of the weight: the M of a Hopper wgmma is 64.
GEMM = {"ROWS": 64, "COLUMNS": 64, "num_warps": 4, "num_stages": 3, "enable_fp_fusion": False}
GEMM_MAX_ROWS = 64
GEMM_PROGRAMS = 512  # programs that the columns are split for: about four on each SM of an H100
SUM = {"SIZE": 512, "num_warps": 4, "enable_fp_fusion": False}


def why_not(device):
    """None if the backend runs on this torch.device, else the reason. With TRITON_INTERPRET=1 it runs on the CPU."""
    if triton is None:
        return "triton is not installed"
    if tuple(map(int, triton.__version__.split(".")[:2])) < OLDEST:
        return f"triton {triton.__version__} is older than {'.'.join(map(str, OLDEST))}"
    if os.environ.get("TRITON_INTERPRET") == "1" and device.type == "cpu":
        return None
    if device.type != "cuda" or torch.version.hip:
        return f"it runs on NVIDIA GPUs only, not on {'AMD' if device.type == 'cuda' else device.type}"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"compute capability {major}.{minor} is below 8.0"


def describe():
    """What runs, for a line on the screen."""
    return f"Triton {triton.__version__}"


@jit
def load(pointer, mask):
    if mask is None:
        return tl.load(pointer)
    else:
        return tl.load(pointer, mask=mask, other=0)


@jit
def load_absmax(scales, block, mask):
    if len(scales) == 1:
        return load(scales[0] + block, mask)
    else:
        q, absmax2, code2, offset = scales
        code = tl.load(code2 + load(q + block, mask).to(tl.int32))
        return code * load(absmax2 + (block >> 8), mask) + tl.load(offset)


@jit
def look_up(code, packed):
    """code (16,) fp32, packed (A, B, bytes) uint8 -> (A, B, 2 * bytes) fp32. The sum joins the bytes of a thread to one word."""
    A: tl.constexpr = packed.shape[0]
    B: tl.constexpr = packed.shape[1]
    N: tl.constexpr = packed.shape[2] * 2
    byte = tl.arange(0, N // 2)
    word = tl.sum(packed.to(tl.uint32) << (byte * 8)[None, None, :], axis=2)
    i = tl.arange(0, N)
    index = (word[:, :, None] >> (i // 2 * 8 + 4 - i % 2 * 4)[None, None, :]) & 15  # the high nibble comes first
    return tl.reshape(tl.gather(code, tl.reshape(index.to(tl.int32), (A * B * N,)), 0), (A, B, N))


@jit
def quantize_tile(weight, midpoints, packed, absmax, left, BLOCKS: tl.constexpr, FULL: tl.constexpr):
    block = tl.arange(0, BLOCKS)
    i = block[:, None] * 64 + tl.arange(0, 64)[None, :]
    byte = block[:, None] * 32 + tl.arange(0, 32)[None, :]
    x = load(weight + i, None if FULL else i < left).to(tl.float32)
    # The bits of absolute values are in the order of the values, with NaN above infinity. A maximum of floats would drop NaN.
    largest = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    largest = tl.where(largest > 0x7F800000, 0x7FC00000, largest)
    at_least_tiny = tl.maximum(largest, 0x006CE3EE)  # the bits of nf4_reference.TINY
    divisor = at_least_tiny.to(tl.float32, bitcast=True)
    scaled = x * tl.div_rn(1.0, divisor)[:, None]
    if not FULL:
        is_short = block * 64 + 64 > left
        largest = tl.where(is_short, at_least_tiny, largest)
        scaled = tl.where(is_short[:, None], tl.div_rn(x, divisor[:, None]), scaled)
    index = tl.full((BLOCKS, 64), 15, tl.int32)
    for m in tl.static_range(15):
        index -= (scaled <= tl.load(midpoints + m)).to(tl.int32)  # false for NaN, whose index stays 15
    if not FULL:
        index = tl.where(i < left, index, 7)
    high, low = tl.split(tl.reshape(index, (BLOCKS, 32, 2)))
    tl.store(packed + byte, (high << 4 | low).to(tl.uint8), None if FULL else byte * 2 < left)
    tl.store(absmax + block, largest.to(tl.float32, bitcast=True), None if FULL else block * 64 < left)


@jit(do_not_specialize=["n"])
def quantize_kernel(weight, midpoints, packed, absmax, n: tl.int64, BLOCKS: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCKS  # blocks
    left = n - start * 64
    weight, packed, absmax = weight + start * 64, packed + start * 32, absmax + start
    if left >= BLOCKS * 64:
        quantize_tile(weight, midpoints, packed, absmax, left, BLOCKS, True)
    else:
        quantize_tile(weight, midpoints, packed, absmax, left, BLOCKS, False)


@jit
def dequantize_tile(
    code, packed, scales, out, block, left, GROUPS: tl.constexpr, BYTES: tl.constexpr, FULL: tl.constexpr
):
    group = tl.arange(0, GROUPS)[None, :]
    byte = group[:, :, None] * BYTES + tl.arange(0, BYTES)[None, None, :]
    i = group[:, :, None] * BYTES * 2 + tl.arange(0, BYTES * 2)[None, None, :]
    absmax = load_absmax(scales, block + group // (32 // BYTES), None if FULL else group * BYTES * 2 < left)
    weight = look_up(code, load(packed + byte, None if FULL else byte * 2 < left)) * absmax[:, :, None]
    tl.store(out + i, weight.to(out.dtype.element_ty), None if FULL else i < left)


@jit(do_not_specialize=["n"])
def dequantize_kernel(code, packed, scales, out, n: tl.int64, GROUPS: tl.constexpr, BYTES: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * (GROUPS * BYTES)  # bytes, a whole number of blocks
    left = n - start * 2
    code = tl.load(code + tl.arange(0, 16))
    packed, out, block = packed + start, out + start * 2, start // 32
    if left >= GROUPS * BYTES * 2:
        dequantize_tile(code, packed, scales, out, block, left, GROUPS, BYTES, True)
    else:
        dequantize_tile(code, packed, scales, out, block, left, GROUPS, BYTES, False)


@jit
def eighths(t):
    """(A, B, 8) -> eight tensors (A, B), in order."""
    even, odd = tl.split(tl.reshape(t, (t.shape[0], t.shape[1], 4, 2)))
    even, odd = tl.reshape(even, (t.shape[0], t.shape[1], 2, 2)), tl.reshape(odd, (t.shape[0], t.shape[1], 2, 2))
    even0, even1 = tl.split(even)
    odd0, odd1 = tl.split(odd)
    t0, t4 = tl.split(even0)
    t2, t6 = tl.split(even1)
    t1, t5 = tl.split(odd0)
    t3, t7 = tl.split(odd1)
    return t0, t1, t2, t3, t4, t5, t6, t7


@jit(do_not_specialize=["N"])
def gemv_kernel(
    x,
    code,
    packed,
    scales,
    out,
    N,
    K: tl.constexpr,
    M: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    row = tl.minimum(tl.program_id(0) * ROWS, N - ROWS)  # the last program overlaps the one before, so that it is whole
    r = tl.arange(0, ROWS)[:, None]
    chunk = tl.arange(0, CHUNKS)[None, :]  # eight columns, which share an absmax
    code = tl.load(code + tl.arange(0, 16))
    packed += row.to(tl.int64) * (K // 2)
    block = row.to(tl.int64) * (K // 64)
    byte = (r * (K // 2) + chunk * 4)[:, :, None] + tl.arange(0, 4)[None, None, :]
    column = chunk[:, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    sums = (tl.zeros((ROWS, CHUNKS), tl.float32),) * M
    for start in range(0, K, CHUNKS * 8):
        is_inside = None if K % (CHUNKS * 8) == 0 else chunk < (K - start) // 8
        is_inside3 = None if K % (CHUNKS * 8) == 0 else (chunk < (K - start) // 8)[:, :, None]
        absmax = load_absmax(scales, block + (start // 64 + r * (K // 64) + chunk // 8), is_inside)
        weights = eighths(look_up(code, load(packed + start // 2 + byte, is_inside3)))
        rows = ()
        for m in tl.static_range(M):
            values = eighths(load(x + m * K + start + column, is_inside3).to(tl.float32))
            dot = weights[0] * values[0]
            for i in tl.static_range(1, 8):
                dot = tl.fma(weights[i], values[i], dot)
            rows += (tl.fma(dot, absmax, sums[m]),)
        sums = rows
    for m in tl.static_range(M):
        tl.store(out + m * N + row + tl.arange(0, ROWS), tl.sum(sums[m], axis=1).to(out.dtype.element_ty))


@jit(do_not_specialize=["M", "N", "steps"])  # one build serves every M
def gemm_kernel(
    x,
    code,
    packed,
    scales,
    partial,
    M,
    N,
    steps,
    K: tl.constexpr,
    X_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.minimum(tl.program_id(0) * ROWS, N - ROWS)  # as in gemv_kernel
    part = tl.program_id(1)
    r = tl.arange(0, ROWS)[:, None]
    m = tl.arange(0, X_ROWS)[None, :]
    chunk = tl.arange(0, COLUMNS // 8)[None, :]
    code = tl.load(code + tl.arange(0, 16))
    packed += row.to(tl.int64) * (K // 2)
    block = row.to(tl.int64) * (K // 64)
    byte = (r * (K // 2) + chunk * 4)[:, :, None] + tl.arange(0, 4)[None, None, :]
    i = m * K + tl.arange(0, COLUMNS)[:, None]
    acc = tl.zeros((ROWS, X_ROWS), tl.float32)
    first = part * steps * COLUMNS
    for start in range(first, tl.minimum(first + steps * COLUMNS, K), COLUMNS):
        absmax = load_absmax(scales, block + (start // 64 + r * (K // 64) + chunk // 8), None)
        weight = (look_up(code, tl.load(packed + start // 2 + byte)) * absmax[:, :, None]).to(x.dtype.element_ty)
        acc = tl.dot(tl.reshape(weight, (ROWS, COLUMNS)), load(x + start + i, m < M), acc)
    tl.store(partial + (part.to(tl.int64) * M + m) * N + row + r, acc, m < M)


@jit(do_not_specialize=["parts", "size"])
def sum_kernel(partial, out, parts, size, SIZE: tl.constexpr):
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    total = tl.zeros((SIZE,), tl.float32)
    for _ in range(parts):
        total += tl.load(partial + i, i < size, other=0)
        partial += size
    tl.store(out + i, total.to(out.dtype.element_ty), i < size)


def quantize(weight):
    """weight (any shape, contiguous) fp32, fp16 or bf16 -> (packed (ceil(n / 2),) uint8, absmax (ceil(n / 64),) fp32)."""
    n = weight.numel()
    packed = torch.empty((n + 1) // 2, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(-(-n // 64), dtype=torch.float32, device=weight.device)
    if n:
        midpoints, grid = nf4_reference.tables(weight.device)[1], (triton.cdiv(n, QUANTIZE["BLOCKS"] * 64),)
        with torch.cuda.device_of(weight):
            quantize_kernel[grid](weight, midpoints, packed, absmax, n, **QUANTIZE)
    return packed, absmax


def dequantize(packed, scales, out):
    """Write code * absmax, a product in fp32 rounded once, into `out` (any shape, contiguous; fp32, fp16 or bf16).
    scales: (absmax,), or (q, absmax2, code2, offset) with double quantisation, which is undone in the same pass."""
    options, n = DEQUANTIZE[out.element_size()], out.numel()
    if n:
        code, grid = nf4_reference.tables(out.device)[0], (triton.cdiv(n, options["GROUPS"] * options["BYTES"] * 2),)
        with torch.cuda.device_of(out):
            dequantize_kernel[grid](code, packed, scales, out, n, **options)
    return out


def max_rows(shape, dtype):
    """The largest number of rows of x (.., in) for matmul() with a weight (out, in). 0 if blocks cross rows of the weight. In
    fp32 only the GEMV is used, because tensor cores would round x to TF32."""
    if 0 in shape or shape[1] % 64:
        return 0
    return max(GEMV_ROWS) if dtype == torch.float32 or shape[0] < GEMM["ROWS"] else GEMM_MAX_ROWS


def matmul(x, packed, scales, shape, out):
    """Write x (.., in) @ weight.T, 1 <= M <= max_rows() rows, into `out` (.., out) and return it. scales: as in dequantize().

    Sums are fp32, rounded once to x.dtype. Up to 4 rows the weights are the fp32 products code * absmax; from 5 rows on they are
    rounded to x.dtype, as by dequantize(). The width is a constant of the build, so that row offsets cost no instructions."""
    (N, K), M = shape, x.shape[:-1].numel()
    code = nf4_reference.tables(x.device)[0]
    with torch.cuda.device_of(x):
        if M in GEMV_ROWS:
            rows = min(GEMV_ROWS[M], 1 << (N.bit_length() - 1))  # a power of two, at most the rows of the weight
            gemv_kernel[(triton.cdiv(N, rows),)](x, code, packed, scales, out, N, K, M=M, ROWS=rows, **GEMV)
            return out
        tiles, steps = triton.cdiv(N, GEMM["ROWS"]), K // GEMM["COLUMNS"]
        steps_each = triton.cdiv(steps, min(steps, triton.cdiv(GEMM_PROGRAMS, tiles)))
        parts = triton.cdiv(steps, steps_each)
        partial = torch.empty(parts, M, N, dtype=torch.float32, device=x.device)
        x_rows = max(16, triton.next_power_of_2(M))
        gemm_kernel[(tiles, parts)](x, code, packed, scales, partial, M, N, steps_each, K=K, X_ROWS=x_rows, **GEMM)
        sum_kernel[(triton.cdiv(M * N, SUM["SIZE"]),)](partial, out, parts, M * N, **SUM)
    return out
