"""The door to the NF4 kernels: checks what comes in, then calls a backend. One for now: plain PyTorch, on any device.

The format is described in reference.py. The kernels behind this door assume what is checked here: dtype, device,
contiguity and sizes. Nothing here takes part in autograd; minitune.quant.NF4Linear gives the gradient.

NaN and infinity pass through as in bitsandbytes: the absmax of the block is NaN or infinite. Dequantised, a block with a
NaN is NaN throughout, one with an infinity is infinite in that place (the sign is lost) and NaN elsewhere. Other blocks
are not touched. Double quantisation spreads either over the whole weight, by the mean."""

import contextlib
import math
import threading

import torch
import torch.nn.functional as F
from minitune_kernels import reference

BLOCK = reference.BLOCK
NESTED_BLOCK = reference.NESTED_BLOCK
CODE = reference.CODE
FLOATS = (torch.float32, torch.float16, torch.bfloat16)

_buffers = {}  # (device, dtype) -> the flat tensor that `workspace` lends
_lent = threading.Lock()


def check(name, tensor, dtypes, device=None, size=None, why="", strided=False):
    """Raises ValueError, naming the argument, unless `tensor` is contiguous (or `strided` allowed) and of these dtypes, this
    device and this number of elements (`why` says where the number comes from)."""
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{name} is a {type(tensor).__name__}, expected a torch.Tensor")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} has dtype {tensor.dtype}, expected {' or '.join(map(str, dtypes))}")
    if tensor.device.type == "meta":
        raise ValueError(f"{name} is on the meta device and holds no values; load it first")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, expected {device}, where the other tensors are")
    if not (strided or tensor.is_contiguous()):
        raise ValueError(f"{name} of shape {tuple(tensor.shape)} is not contiguous; pass {name}.contiguous()")
    if size is not None and tensor.numel() != size:
        raise ValueError(f"{name} has {tensor.numel()} elements, expected {size}{why}")


def elements(shape):
    """The number of elements of `shape`. Raises ValueError unless it is a sequence of whole numbers, 0 or more."""
    if not isinstance(shape, (tuple, list)) or not all(type(side) is int and side >= 0 for side in shape):
        raise ValueError(f"shape is {shape!r}, expected a tuple of whole numbers such as (out, in)")
    return math.prod(shape)


def check_quantized(packed, absmax, shape):
    n = elements(shape)
    why = f" for shape {tuple(shape)}"
    check("packed", packed, (torch.uint8,), size=(n + 1) // 2, why=why)
    check("absmax", absmax, (torch.float32,), packed.device, -(-n // BLOCK), why)


@torch.no_grad()
def quantize(weight):
    """Quantise to NF4, bit for bit as bitsandbytes does on a CPU.
    weight: (out, in) or any shape, fp32, fp16 or bf16. Returns (packed (ceil(n / 2),) uint8, absmax (ceil(n / 64),) fp32)
    with n the number of elements. Temporaries stay below 64 MB."""
    check("weight", weight, FLOATS)
    return reference.quantize(weight)


@torch.no_grad()
def dequantize(packed, absmax, shape, dtype, out=None):
    """The weight of `shape` in `dtype` (fp32, fp16 or bf16): code * absmax in fp32, rounded once.
    packed: uint8, n / 2 elements in any shape; absmax: fp32, n / 64 elements; both rounded up, on one device.
    out: written and returned where it is given: contiguous, of that shape, dtype and device."""
    check_quantized(packed, absmax, shape)
    if dtype not in FLOATS:
        raise ValueError(f"dtype is {dtype}, expected {' or '.join(map(str, FLOATS))}")
    if out is None:
        out = torch.empty(tuple(shape), dtype=dtype, device=packed.device)
    else:
        check("out", out, (dtype,), packed.device)
        if tuple(out.shape) != tuple(shape):
            raise ValueError(f"out has shape {tuple(out.shape)}, expected {tuple(shape)}")
    return reference.dequantize(packed.view(-1), absmax.view(-1), out)


def matmul(x, packed, absmax, shape, bias=None):
    """x @ weight.T + bias, with the weight dequantised to x.dtype. Raises ValueError where a gradient of x is asked for.
    x: (.., in), any strides; bias: (out,) in x.dtype or None; shape: (out, in). Returns (.., out) in x.dtype."""
    check_quantized(packed, absmax, shape)
    if len(shape) != 2:
        raise ValueError(f"shape is {tuple(shape)}, expected (out, in)")
    check("x", x, FLOATS, packed.device, strided=True)
    if x.dim() == 0 or x.shape[-1] != shape[1]:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (.., {shape[1]})")
    if bias is not None:
        check("bias", bias, (x.dtype,), x.device, shape[0], f" for shape {tuple(shape)}")
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        raise ValueError(
            "x or bias requires a gradient, which matmul has not; use NF4Linear, or call it in torch.no_grad()"
        )
    with torch.no_grad(), workspace(shape, x.dtype, x.device) as weight:
        return F.linear(x, dequantize(packed, absmax, shape, x.dtype, out=weight), bias)


@torch.no_grad()
def double_quantize(absmax):
    """Quantise the absmax values themselves to 8 bits, in blocks of 256 around their mean.
    absmax: (m,) fp32, m >= 1. Returns (q (m,) uint8, absmax2 (ceil(m / 256),) fp32, code2 (256,) fp32, offset () fp32),
    bit for bit bitsandbytes' on a CPU."""
    check("absmax", absmax, (torch.float32,))
    if absmax.dim() != 1 or absmax.numel() == 0:
        raise ValueError(f"absmax has shape {tuple(absmax.shape)}, expected (m,) with m >= 1")
    return reference.double_quantize(absmax)


@torch.no_grad()
def double_dequantize(q, absmax2, code2, offset):
    """absmax (m,) fp32 = code2[q] * absmax2 + offset, rounded twice, bit for bit bitsandbytes'."""
    check("q", q, (torch.uint8,))
    why = f" for {q.numel()} values of q"
    check("absmax2", absmax2, (torch.float32,), q.device, -(-q.numel() // NESTED_BLOCK), why)
    check("code2", code2, (torch.float32,), q.device, 256)
    check("offset", offset, (torch.float32,), q.device, 1)
    return reference.double_dequantize(q.view(-1), absmax2.view(-1), code2, offset.view(()))


@contextlib.contextmanager
def workspace(shape, dtype, device):
    """Lends a tensor of `shape` for one dequantised weight: `with workspace(...) as weight`.

    One buffer per device and dtype is kept for the life of the process and grows to the largest weight: a fresh 117 MB
    output costs 30 ms of page faults. The tensor is valid inside the `with` only and must never be saved for backward.
    One borrower at a time: a second thread waits (on a GPU both must use one stream), and nesting would wait forever."""
    key, n = (torch.device(device), dtype), math.prod(shape)
    with _lent:
        if key not in _buffers or _buffers[key].numel() < n:
            _buffers.pop(key, None)  # the old one goes before the new one comes
            with torch.inference_mode(False):  # a buffer made in inference mode could not be written outside it
                _buffers[key] = torch.empty(n, dtype=dtype, device=device)
        yield _buffers[key][:n].view(tuple(shape))
