"""RMSNorm, SwiGLU, RoPE and cross-entropy in Triton, for compute capability 8.0 and up, each with its gradient.

Functions of the formulas' names (formulas.py), which the door ops.py takes where MINITUNE_KERNELS=triton asks for them and
fits_..() says that the shapes are theirs. They are bound by memory, so each reads and writes every value once (cross-entropy
reads twice). Arithmetic is fp32, with the roundings to the tensors' dtype that the formula makes between its steps and without
fused multiply-add, so that results differ from the formula's only by the order of sums and the last bit of exp and rsqrt. They
are proven under Triton's interpreter and built for sm_80, sm_89 and sm_90; no GPU was at hand to measure them."""

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

IGNORED = tl.constexpr(-100)  # ignore_index of torch's cross_entropy
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
NO_FMA = {"enable_fp_fusion": False}
MAX_HIDDEN = 8192  # a program of rms_norm keeps a whole row in its registers


def rows_of(x):
    """x (.., C) as (rows, C) with the values of a row side by side; a copy only where the strides allow no view."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


# RMSNorm: a program holds a whole row, 16 values a thread; with 32, at C = 16384, the backward would spill.
BACKWARD_PROGRAMS = 256  # at most: two a multiprocessor on the largest chips; their sums are 4 MB at C = 4096


def rms_norm_options(columns):
    BLOCK = triton.next_power_of_2(columns)
    return {"BLOCK": BLOCK, "num_warps": max(BLOCK // 512, 1), **NO_FMA}


@triton.jit
def rms_norm_kernel(x_ptr, weight_ptr, out_ptr, scale_ptr, x_stride, columns, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < columns
    x = tl.load(x_ptr + row * x_stride + at, mask=inside, other=0)
    weight = tl.load(weight_ptr + at, mask=inside, other=0).to(tl.float32)
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide) / columns + eps)
    normed = (wide * scale).to(x.dtype).to(tl.float32)
    tl.store(out_ptr + row * columns + at, (weight * normed).to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(scale_ptr + row, scale)


@triton.jit
def rms_norm_backward_kernel(
    grad_ptr, x_ptr, weight_ptr, scale_ptr, grad_x_ptr, partial_ptr, grad_stride, x_stride, rows, columns,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Each program walks every `programs`th row and, unless partial_ptr is None, sums its share of weight's gradient."""
    first = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < columns
    weight = tl.load(weight_ptr + at, mask=inside, other=0).to(tl.float32)
    partial = tl.zeros((BLOCK,), tl.float32)
    for row in range(first, rows, tl.num_programs(0)):
        grad = tl.load(grad_ptr + row * grad_stride + at, mask=inside, other=0)
        x = tl.load(x_ptr + row * x_stride + at, mask=inside, other=0).to(tl.float32)
        scale = tl.load(scale_ptr + row)
        normed = x * scale
        inner = (grad.to(tl.float32) * weight).to(grad.dtype).to(tl.float32)
        along = tl.sum(inner * normed) / columns
        grad_x = (inner - normed * along) * scale
        tl.store(grad_x_ptr + row * columns + at, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
        if partial_ptr is not None:
            partial += grad.to(tl.float32) * normed
    if partial_ptr is not None:
        tl.store(partial_ptr + first * columns + at, partial, mask=inside)


class RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        rows = rows_of(x)
        out = torch.empty(x.shape, dtype=torch.result_type(x, weight), device=x.device)
        scale = torch.empty(len(rows), dtype=torch.float32, device=x.device)
        with torch.cuda.device_of(x):
            rms_norm_kernel[(len(rows),)](
                rows, weight, out, scale, rows.stride(0), x.shape[-1], eps, **rms_norm_options(x.shape[-1])
            )
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        rows, grad_rows, columns = rows_of(x), rows_of(grad), x.shape[-1]
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        programs, partial = len(rows), None
        if ctx.needs_input_grad[1]:
            programs = min(len(rows), BACKWARD_PROGRAMS)
            partial = torch.empty(programs, columns, dtype=torch.float32, device=x.device)
        with torch.cuda.device_of(x):
            rms_norm_backward_kernel[(programs,)](
                grad_rows, rows, weight, scale, grad_x, partial, grad_rows.stride(0), rows.stride(0), len(rows), columns,
                **rms_norm_options(columns),
            )  # fmt: skip
        return grad_x, None if partial is None else partial.sum(0).to(weight.dtype), None


# SwiGLU: one value after another, no matter what the shape.

SWIGLU_BLOCK = 1024


@triton.jit
def swiglu_kernel(gate_ptr, up_ptr, out_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    gate = tl.load(gate_ptr + at, mask=inside, other=0)
    up = tl.load(up_ptr + at, mask=inside, other=0)
    wide = gate.to(tl.float32)
    silu = (wide / (1 + tl.exp(-wide))).to(gate.dtype).to(tl.float32)
    tl.store(out_ptr + at, (silu * up.to(tl.float32)).to(gate.dtype), mask=inside)


@triton.jit
def swiglu_backward_kernel(grad_ptr, gate_ptr, up_ptr, grad_gate_ptr, grad_up_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    gate = tl.load(gate_ptr + at, mask=inside, other=0)
    grad = tl.load(grad_ptr + at, mask=inside, other=0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=inside, other=0).to(tl.float32)
    wide = gate.to(tl.float32)
    below = 1 + tl.exp(-wide)
    sigmoid = 1 / below
    silu = (wide / below).to(gate.dtype).to(tl.float32)
    grad_silu = (grad * up).to(gate.dtype).to(tl.float32)
    grad_gate = grad_silu * sigmoid * (1 + wide * (1 - sigmoid))
    tl.store(grad_gate_ptr + at, grad_gate.to(gate.dtype), mask=inside)
    tl.store(grad_up_ptr + at, (grad * silu).to(gate.dtype), mask=inside)


class SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        out = torch.empty_like(gate)
        with torch.cuda.device_of(gate):
            swiglu_kernel[(triton.cdiv(out.numel(), SWIGLU_BLOCK),)](
                gate, up, out, out.numel(), BLOCK=SWIGLU_BLOCK, **NO_FMA
            )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        with torch.cuda.device_of(gate):
            swiglu_backward_kernel[(triton.cdiv(gate.numel(), SWIGLU_BLOCK),)](
                grad.contiguous(), gate, up, grad_gate, grad_up, gate.numel(), BLOCK=SWIGLU_BLOCK, **NO_FMA
            )
        return grad_gate, grad_up


# RoPE: a program turns up to 2048 pairs of one token, so that its cos and sin are read once for many heads.


@triton.jit
def rope_kernel(
    x_ptr, cos_ptr, sin_ptr, out_ptr, stride_b, stride_h, stride_t, table_stride_b, T, H, half,
    BACKWARD: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Strides are in elements; those of D are 1. cos, sin: (B, T, half) with table_stride_b; out: (B, T, H, 2 * half)."""
    token = tl.program_id(0).to(tl.int64)
    b, t = token // T, token % T
    pair = tl.arange(0, HALF)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    inside = (head < H) & (pair < half)[None, :]
    table = b * table_stride_b + t * half + pair
    cos = tl.load(cos_ptr + table, mask=pair < half, other=0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + table, mask=pair < half, other=0).to(tl.float32)[None, :]
    if BACKWARD:
        sin = -sin
    x_ptr += b * stride_b + t * stride_t + head.to(tl.int64) * stride_h + pair[None, :]
    dtype = out_ptr.dtype.element_ty
    low = tl.load(x_ptr, mask=inside, other=0).to(tl.float32)
    high = tl.load(x_ptr + half, mask=inside, other=0).to(tl.float32)
    out_low = (low * cos).to(dtype).to(tl.float32) - (high * sin).to(dtype).to(tl.float32)
    out_high = (high * cos).to(dtype).to(tl.float32) + (low * sin).to(dtype).to(tl.float32)
    out_ptr += (token * H + head) * 2 * half + pair[None, :]
    tl.store(out_ptr, out_low.to(dtype), mask=inside)
    tl.store(out_ptr + half, out_high.to(dtype), mask=inside)


def turn(x, cos, sin, backward):
    """x (B, H, T, D); cos, sin: (B or 1, 1, T, D/2), contiguous. Returns (B, H, T, D) over the memory of (B, T, H, D)."""
    B, H, T, D = x.shape
    x = x if x.stride(3) == 1 else x.contiguous()
    out = torch.empty(B, T, H, D, dtype=x.dtype, device=x.device).transpose(1, 2)
    HALF = triton.next_power_of_2(D // 2)
    HEADS = max(min(triton.next_power_of_2(H), 2048 // HALF), 1)
    with torch.cuda.device_of(x):
        rope_kernel[(B * T, triton.cdiv(H, HEADS))](
            x, cos, sin, out, *x.stride()[:3], T * (D // 2) if len(cos) == B else 0, T, H, D // 2,
            BACKWARD=backward, HEADS=HEADS, HALF=HALF, **NO_FMA,
        )  # fmt: skip
    return out


class RoPE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(cos, sin)
        return turn(x, cos, sin, backward=False)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return turn(grad, *ctx.saved_tensors, backward=True), None, None


# Cross-entropy: a program owns a row of the logits.


@triton.jit
def cross_entropy_kernel(logits_ptr, targets_ptr, losses_ptr, V, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * V
    target = tl.load(targets_ptr + row)
    is_ignored = target == IGNORED
    is_known = (target >= 0) & (target < V)
    # Read before the loops: the barriers of their reductions keep it ahead of the second loop's writes.
    picked = tl.load(logits_ptr + target, mask=is_known, other=float("nan")).to(tl.float32)
    highest = tl.full((), LOWEST, tl.float32)  # finite: -inf - -inf would make a masked-out first block NaN
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        logits = tl.load(logits_ptr + at, mask=at < V, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(highest, tl.max(logits))
        total = total * tl.exp(highest - higher) + tl.exp(logits - higher)
        highest = higher
    summed = tl.sum(total)
    tl.store(losses_ptr + row, tl.where(is_ignored, 0.0, tl.log(summed) - (picked - highest)))
    scale = 1 / summed
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        logits = tl.load(logits_ptr + at, mask=at < V, other=0)
        grad = tl.exp(logits.to(tl.float32) - highest) * scale - tl.where(at == target, 1.0, 0.0)
        tl.store(logits_ptr + at, tl.where(is_ignored, 0.0, grad).to(logits.dtype), mask=at < V)


def cross_entropy_(logits, targets):
    """logits (N, V), overwritten with their gradient; targets (N,) int64. Returns the summed loss, () fp32."""
    N, V = logits.shape
    losses = torch.empty(N, dtype=torch.float32, device=logits.device)
    BLOCK = min(triton.next_power_of_2(V), 8192)
    with torch.cuda.device_of(logits):
        cross_entropy_kernel[(N,)](logits, targets, losses, V, BLOCK=BLOCK, num_warps=max(BLOCK // 512, 1), **NO_FMA)
    torch.autograd.graph.increment_version(logits)  # autograd then refuses a backward that still needs the old values
    return losses.sum()


def loss_and_gradient(logits, targets):
    """Of ops_torch.CrossEntropy. The gradient is written over the logits, which are read in chunks of the vocabulary with a
    running maximum (online softmax, arXiv 1805.02867). A target outside the vocabulary gives NaN."""
    logits = logits.contiguous()
    return cross_entropy_(logits, targets), logits


# The formulas' functions, and whether their shapes are taken.

rms_norm, swiglu, rope = RMSNorm.apply, SwiGLU.apply, RoPE.apply


def fits_rms_norm(x, weight):
    """Whether x has rows that fit the registers, and weight is as long as they are."""
    is_beside = weight.device == x.device and weight.is_contiguous() and weight.is_floating_point()
    return is_beside and weight.shape == x.shape[-1:] and 0 < x.shape[-1] <= MAX_HIDDEN


def fits_rope(x, cos, sin):
    """Whether whole heads of x (B, H, T, D) turn by tables of its dtype."""
    if x.dim() != 4:
        return False
    B, _, T, D = x.shape
    tables = (B, 1, T, D // 2), (1, 1, T, D // 2)
    return (
        D % 2 == 0
        and D > 0
        and all(
            t.shape in tables and t.dtype is x.dtype and t.device == x.device and not t.requires_grad
            for t in (cos, sin)
        )
    )
