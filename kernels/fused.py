"""The door to the fused operations: RMSNorm, RoPE, SwiGLU and cross-entropy, each in one pass over memory, with a backward.

Beside each stands its reference in plain PyTorch, which is the specification: any device, any float dtype, gradients by
autograd. The door checks what comes in and takes the Triton kernels of ops_triton.py where `why_not(device)` is None,
elsewhere the reference. The kernels compute in fp32 and round where the reference rounds.

Letters: B batch, T tokens, C hidden, H heads, D head dim, V vocabulary, N supervised tokens."""

import functools
import importlib.util
import os

import torch
import torch.nn.functional as F
from minitune_kernels.nf4 import FLOATS, check

MAX_HIDDEN = 8192  # a program of rms_norm keeps a whole row in its registers


@functools.cache
def why_not(device):
    """None where the Triton kernels run on `device`, otherwise the reason in words."""
    device = torch.device(device)
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "on a CPU Triton runs in its interpreter only, under TRITON_INTERPRET=1"
    if device.type not in ("cpu", "cuda"):
        return f"a device of type {device.type} has no Triton kernels here"
    if device.type == "cuda" and (capability := torch.cuda.get_device_capability(device)) < (8, 0):
        return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
    return None


def kernels_for(device):
    """The module ops_triton where it runs on `device`, else None. Triton is imported here, on first use."""
    if why_not(device) is not None:
        return None
    from minitune_kernels import ops_triton

    return ops_triton


def rms_norm_reference(x, weight, eps):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, the mean in fp32 (arXiv 1910.07467)."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def rms_norm(x, weight, eps):
    """See rms_norm_reference. x: (.., C), rows at any strides; weight: (C,), C at most 8192. Returns (.., C), contiguous, in
    the dtype that x and weight promote to. Keeps x and one fp32 number a row for the backward."""
    check("x", x, FLOATS, strided=True)
    if not x.dim() or not 0 < x.shape[-1] <= MAX_HIDDEN:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (.., C) with C from 1 to {MAX_HIDDEN}")
    check("weight", weight, FLOATS, x.device, x.shape[-1], f" for x of shape {tuple(x.shape)}")
    if weight.dim() != 1:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected ({x.shape[-1]},)")
    kernels = kernels_for(x.device)
    return kernels.RMSNorm.apply(x, weight, eps) if kernels else rms_norm_reference(x, weight, eps)


def swiglu_reference(gate, up):
    """silu(gate) * up (arXiv 2002.05202)."""
    return F.silu(gate) * up


def swiglu(gate, up):
    """See swiglu_reference. gate, up: one shape and dtype, copied where not contiguous. Returns the same, contiguous.
    Keeps gate and up for the backward."""
    check("gate", gate, FLOATS, strided=True)
    check("up", up, (gate.dtype,), gate.device, strided=True)
    if gate.shape != up.shape:
        raise ValueError(f"up has shape {tuple(up.shape)}, expected {tuple(gate.shape)}, the shape of gate")
    kernels = kernels_for(gate.device)
    return kernels.SwiGLU.apply(gate, up) if kernels else swiglu_reference(gate, up)


def rope_reference(x, cos, sin):
    """Turn x by its positions (arXiv 2104.09864), Hugging Face's half-split layout: dim i goes with dim i + D/2."""
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


def rope(x, cos, sin):
    """See rope_reference. x: (B, H, T, D), D even, any strides, read without a copy where those of D are 1; cos, sin:
    (B or 1, 1, T, D/2) in x.dtype, without a gradient. Returns (B, H, T, D) laid out as (B, T, H, D), like a projection.
    Keeps cos and sin for the backward, which turns by the opposite angle."""
    check("x", x, FLOATS, strided=True)
    if x.dim() != 4 or x.shape[3] % 2 or not x.shape[3]:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (B, H, T, D) with D even")
    B, _, T, D = x.shape
    for name, table in (("cos", cos), ("sin", sin)):
        check(name, table, (x.dtype,), x.device, strided=True)
        if table.shape not in ((B, 1, T, D // 2), (1, 1, T, D // 2)):
            raise ValueError(f"{name} has shape {tuple(table.shape)}, expected {(B, 1, T, D // 2)} or 1 in place of B")
        if table.requires_grad:
            raise ValueError(f"{name} requires a gradient, which rope does not give; pass {name}.detach()")
    kernels = kernels_for(x.device)
    return kernels.RoPE.apply(x, cos, sin) if kernels else rope_reference(x, cos, sin)


@torch.no_grad()
def cross_entropy_reference_(logits, targets):
    """The sum over rows of log(sum(exp(logits))) - logits[target] in fp32. Writes its gradient over the logits."""
    with torch.enable_grad():
        wide = logits.detach().float().requires_grad_()
        loss = F.cross_entropy(wide, targets, reduction="sum")
        (grad,) = torch.autograd.grad(loss, wide)
    logits.copy_(grad)
    return loss.detach()


@torch.no_grad()
def cross_entropy_(logits, targets):
    """See cross_entropy_reference_. logits: (N, V), contiguous, OVERWRITTEN with the gradient of the loss with respect to
    them, rounded to their dtype; targets: (N,) int64, -100 in rows that do not count. Returns the loss, () fp32, outside
    autograd: give the gradient to torch.autograd.grad(head_output, .., grad_outputs=logits), logits its detach().

    The logits are read twice in their own dtype, in chunks of the vocabulary with a running maximum (online softmax,
    arXiv 1805.02867): there is no fp32 copy of them. The kernel gives NaN for a target outside the vocabulary, the reference
    torch's error."""
    check("logits", logits, FLOATS)
    if logits.dim() != 2 or not logits.shape[1]:
        raise ValueError(f"logits has shape {tuple(logits.shape)}, expected (N, V)")
    if logits.requires_grad:
        raise ValueError("logits requires a gradient, which cross_entropy_ writes over it; pass logits.detach()")
    check("targets", targets, (torch.int64,), logits.device, len(logits), f" for logits of shape {tuple(logits.shape)}")
    if targets.dim() != 1:
        raise ValueError(f"targets has shape {tuple(targets.shape)}, expected ({len(logits)},)")
    kernels = kernels_for(logits.device)
    return kernels.cross_entropy_(logits, targets) if kernels else cross_entropy_reference_(logits, targets)
