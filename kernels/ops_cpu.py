"""The operations of formulas.py on a CPU, in C (attend.c, linear.c, lora.c, rows.c), in one call each.

A step of a 110 M model reads its weights in 7 ms. The overhead of torch's small calls took as long again. Used in fp32 and bf16
if no gradient is recorded (`takes`). Otherwise torch computes the same. Letters: R sequences, B prompts, n
sequences of each, H heads, H_kv key-value heads, T tokens of this call, D head dim."""

import ctypes
import functools
import os

import torch
from minitune_kernels import built, measured
from minitune_kernels.built import INT, POINTER, SIZE, struct
from minitune_kernels.direct import is_direct

MAX_ROWS = 128  # of x in add_lora(), and the most that measured.max_rows() gives for linear()
DTYPES = {torch.float32: 0, torch.bfloat16: 2}


class Shape(ctypes.Structure):
    """Which tokens a cache holds, and where: attend.c's struct of this name, which explains the fields."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("lengths", "stored", "writers")] + [
        (name, ctypes.c_int64) for name in ("B", "n", "H", "H_kv", "T", "D", "P", "capacity", "new_tokens", "window")
    ]


Rope = struct(
    "Rope",
    (INT, "dtype"),
    (POINTER, "x cos sin out"),
    (SIZE, "rows H T D turned row_stride head_stride token_stride table_stride"),
)
Linear = struct("Linear", (INT, "dtype"), (POINTER, "x weight bias out"), (SIZE, "M N K"))
LoRA = struct(
    "LoRA", (INT, "dtype"), (POINTER, "x out A B"), (SIZE, "M N K rank"), (ctypes.c_float, "scaling"), (POINTER, "low")
)
Attention = struct("Attention", (INT, "dtype"), (POINTER, "q k v out shape prompt_k prompt_v new_k new_v failed"))
PRODUCTS = [Linear * count for count in range(4)]


def typed(lib):
    """A loaded library, with the argument types of its functions set."""
    i, p, n, f = INT, POINTER, SIZE, ctypes.c_float
    lib.rms_norm.argtypes, lib.rms_norm.restype = (i, i, p, p, p, n, n, f), None
    lib.layer_norm.argtypes, lib.layer_norm.restype = (i, i, p, p, p, p, n, n, f), None
    lib.add.argtypes, lib.add.restype = (i, i, p, p, p, n, n), None
    lib.rope.argtypes, lib.rope.restype = (i, p), None
    lib.swiglu.argtypes, lib.swiglu.restype = (i, i, p, p, p, n), None
    lib.gelu_tanh.argtypes, lib.gelu_tanh.restype = (i, i, p, p, n), None
    lib.attention.argtypes = lib.lora.argtypes = (i, p)
    lib.most_likely.argtypes, lib.most_likely.restype = (i, i, p, p, p, n, n, n), None
    lib.linears.argtypes = (i, p, i)
    lib.tape_new.argtypes, lib.tape_new.restype = (), p
    lib.tape_run.argtypes = lib.tape_free.argtypes = (p,)
    lib.tape_free.restype = None
    return lib


@functools.cache
def library():
    """(the loaded library, its level). Raises NoCompiler."""
    lib, level = built.library()
    return typed(lib), level


@functools.cache
def runs_here(wanted):
    """Whether the C kernels can be built, and MINITUNE_KERNELS (`wanted`) does not ask for another backend. A line says, once,
    why they cannot. Raises ValueError where they are asked for by name."""
    try:
        return wanted in (None, "", "cpu") and library()[1] >= 0
    except built.NoCompiler as error:
        if wanted:
            raise ValueError(f"MINITUNE_KERNELS={wanted} does not run on cpu: {error}") from None
        built.tell(f"computing in plain PyTorch, which is slower: {error}")
        return False


def prepare():
    """Build and load the C kernels where they will be used, and measure where they are faster than torch, once a machine. Call it
    before a measured time begins. Raises ValueError where MINITUNE_KERNELS names no backend."""
    wanted = os.environ.get("MINITUNE_KERNELS")
    built.check_backend(wanted)
    if runs_here(wanted):
        measured.machine()


def takes(x):
    """Whether these operations can be used on x now: fp32 or bf16 on a CPU, no gradient to record, no compiler, tracer or
    autocast active."""
    return (
        not torch.is_grad_enabled()
        and x.is_cpu
        and x.dtype in DTYPES
        and is_direct(x)
        and not torch.is_autocast_enabled("cpu")
        and runs_here(os.environ.get("MINITUNE_KERNELS"))
    )


def multiplies(dtype):
    """Whether linear() has instructions for a dtype: bf16 takes AVX-512 bf16."""
    return dtype is torch.float32 or library()[1] >= 3


def max_rows(dtype):
    """The largest number of rows of x for which linear() was measured to be no slower than torch; 0: none. A row's bits do not
    depend on it."""
    return measured.max_rows("linear", dtype) if multiplies(dtype) else 0


def is_beside(parameter, x):
    """Whether a parameter may be read beside x: of its dtype, on the CPU, contiguous."""
    return parameter.dtype is x.dtype and parameter.is_cpu and parameter.is_contiguous()


def is_along(parameter, x):
    """Whether a parameter may be read along the last axis of x: is_beside(), and as long."""
    return is_beside(parameter, x) and parameter.shape == x.shape[-1:]


def turns(table, x):
    """Whether rope() may rotate x (B, H, T, D) by this table of cosines or sines."""
    B, _, T, D = x.shape
    half = table.shape[-1]
    return is_beside(table, x) and table.shape in ((B, 1, T, half), (1, 1, T, half)) and 2 * half <= D


def fits(x, weight, bias=None):
    """Whether linear() can be used: one dtype, few rows, sizes that are whole vectors."""
    K = weight.shape[1]
    return (
        takes(x)
        and 0 < x.numel() <= max_rows(x.dtype) * K
        and K % 32 == 0
        and x.shape[-1] == K  # else torch says what is wrong
        and is_beside(weight, x)
        and (bias is None or is_beside(bias, x))
    )


def linear(x, weight, bias=None):
    """x (.., in) @ weight (out, in).T + bias, summed in fp32 and rounded once. x, weight: as fits() says."""
    return linears(x, (weight, bias))[0]


def linears(x, *layers):
    """The products of x with up to three layers, (weight, bias or None) each, in one call: a list."""
    *rows, K = x.shape
    if not x.is_contiguous():
        x = x.contiguous()
    dtype, pointer, M = DTYPES[x.dtype], x.data_ptr(), x.numel() // K
    outs, products = [], PRODUCTS[len(layers)]()
    for i, (weight, bias) in enumerate(layers):
        N = len(weight)
        out = x.new_empty(*rows, N)
        bias = bias if bias is None else bias.data_ptr()
        products[i] = dtype, pointer, weight.data_ptr(), bias, out.data_ptr(), M, N, K
        outs.append(out)
    library()[0].linears(torch.get_num_threads(), ctypes.addressof(products), len(layers))
    return outs


def add_lora(out, x, A, B, scaling):
    """out (.., out) += x (.., in) A^T B^T * scaling, in place. A (r, in), B (out, r): fp32, rounded to x.dtype as they are read;
    x A^T is rounded too. x: as takes() says, up to MAX_ROWS rows."""
    lib, _ = library()
    x, A, B = x.contiguous(), A.contiguous(), B.contiguous()
    (N, r), K = B.shape, A.shape[1]
    pointers = x.data_ptr(), out.data_ptr(), A.data_ptr(), B.data_ptr()
    job = LoRA(DTYPES[x.dtype], *pointers, x.numel() // K, N, K, r, scaling)
    if lib.lora(torch.get_num_threads(), ctypes.addressof(job)):
        raise MemoryError(f"no memory for {x.numel() // K} x {r} numbers")
    return out


def rms_norm(x, weight, eps):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis. x: as takes() says; weight in its dtype."""
    lib, _ = library()
    x, K = x.contiguous(), x.shape[-1]
    out = torch.empty_like(x)
    pointers = x.data_ptr(), weight.data_ptr(), out.data_ptr()
    lib.rms_norm(torch.get_num_threads(), DTYPES[x.dtype], *pointers, x.numel() // K if K else 0, K, eps)
    return out


def layer_norm(x, weight, bias, eps):
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last axis. x: as takes() says; weight and bias in its dtype."""
    lib, _ = library()
    x, K = x.contiguous(), x.shape[-1]
    out = torch.empty_like(x)
    pointers = x.data_ptr(), weight.data_ptr(), bias.data_ptr(), out.data_ptr()
    lib.layer_norm(torch.get_num_threads(), DTYPES[x.dtype], *pointers, x.numel() // K if K else 0, K, eps)
    return out


def add(x, y, out=None):
    """x (.., K) + y, of the same shape or (K,), both contiguous and of one dtype; out: x itself, or None: a new tensor."""
    out = torch.empty_like(x) if out is None else out
    lib, _ = library()
    pointers = x.data_ptr(), y.data_ptr(), out.data_ptr()
    lib.add(torch.get_num_threads(), DTYPES[x.dtype], *pointers, x.numel(), y.numel())
    return out


def rope(x, cos, sin):
    """Rotate the first d dims of x (B, H, T, D), its last axis contiguous, by cos, sin (B or 1, 1, T, d / 2), contiguous and in
    x.dtype. Returns (B, H, T, D), in memory as (B, T, H, D)."""
    B, H, T, D = x.shape
    out = x.new_empty(B, T, H, D)
    lib, _ = library()
    row, head, token, _ = x.stride()
    half = cos.shape[-1]
    sizes = B, H, T, D, 2 * half, row, head, token, T * half if cos.shape[0] > 1 else 0
    job = Rope(DTYPES[x.dtype], x.data_ptr(), cos.data_ptr(), sin.data_ptr(), out.data_ptr(), *sizes)
    lib.rope(torch.get_num_threads(), ctypes.addressof(job))
    return out.transpose(1, 2)


def swiglu(gate, up):
    """silu(gate) * up, two tensors of one shape and dtype."""
    lib, _ = library()
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    pointers = gate.data_ptr(), up.data_ptr(), out.data_ptr()
    lib.swiglu(torch.get_num_threads(), DTYPES[gate.dtype], *pointers, gate.numel())
    return out


def gelu_tanh(x):
    """GELU with tanh for the error function."""
    lib, _ = library()
    x = x.contiguous()
    out = torch.empty_like(x)
    lib.gelu_tanh(torch.get_num_threads(), DTYPES[x.dtype], x.data_ptr(), out.data_ptr(), x.numel())
    return out


def attention_over_cache(q, k, v, shape, caches):
    """Store k, v (R, H_kv, T, D) in the cache, and attend with q (R, H, T, D), scores over sqrt(D). Returns (R, T, H * D).

    shape: a Shape that fits; caches: of the prompts, k and v (B, H_kv, P, D), and of the new tokens (R, H_kv, capacity, D)."""
    if {k.dtype, v.dtype, *(t.dtype for t in caches)} != {q.dtype}:
        raise ValueError(
            f"q is {q.dtype}, k {k.dtype}, v {v.dtype}, and the cache {caches[0].dtype}; expected one dtype"
        )
    R, H, T, D = q.shape
    q, k, v = (t.transpose(1, 2).contiguous() for t in (q, k, v))  # (R, T, heads, D), their usual layout
    out = q.new_empty(R, T, H * D)
    lib, _ = library()
    pointers = q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), ctypes.addressof(shape)
    job = Attention(DTYPES[q.dtype], *pointers, *(t.data_ptr() for t in caches))
    if lib.attention(torch.get_num_threads(), ctypes.addressof(job)):
        raise MemoryError(f"no memory for the scores of {R} x {T} tokens over {shape.P} + {shape.new_tokens} keys")
    return out


def most_likely(logits, count):
    """The `count` most likely of V tokens: (log-probabilities (R, count) fp32, ids (R, count) int64), the best first.

    logits (R, V), as takes() says. Of equal ones the lower id is first; the log-probabilities of a row with NaN are NaN."""
    R, V = logits.shape
    logits = logits.contiguous()
    values, ids = logits.new_empty(R, count, dtype=torch.float32), logits.new_empty(R, count, dtype=torch.int64)
    lib, _ = library()
    pointers = logits.data_ptr(), values.data_ptr(), ids.data_ptr()
    lib.most_likely(torch.get_num_threads(), DTYPES[logits.dtype], *pointers, R, V, count)
    return values, ids
