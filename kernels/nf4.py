"""The interface of the NF4 kernels: checks arguments, chooses a backend, and defines the gradient of x.

The format is described in nf4_reference.py, the specification in plain PyTorch. Every backend stores and reads its bits:
    torch   nf4_reference.py: any device
    cpu     nf4.c: portable C, AVX2, AVX-512, AMX
    triton  nf4_triton.py: CUDA from compute capability 8.0 on
    cuda    nf4.cu: V100 and T4, other chips by NVRTC
On a CPU the first of cpu and torch that runs is used, on CUDA the first of triton, cuda and torch. MINITUNE_KERNELS=NAME chooses
another one. describe() says which is used and why. On its first use for a dtype a backend is compared with the specification
(agreement.py): its bits with those of nf4_reference.py, its product with formulas.linear of the dequantised weight. A backend
that differs is not used.

A backend is a module with quantize, dequantize, and matmul for up to max_rows() rows of x. It relies on the checks made here, of
dtype, device, contiguity and sizes. For more rows the weight is dequantised into a reused workspace and multiplied by torch's
GEMM.

absmax is a tensor (ceil(n / 64),) fp32, or with double quantisation the tuple that double_quantize() returns, which the kernels
dequantise themselves. NaN and infinity pass through as in bitsandbytes: the absmax of the block is NaN or infinite. After
dequantising, a block with a NaN is NaN throughout; a block with an infinity is infinite in that place (the sign is lost) and NaN
elsewhere. Other blocks are not affected. Double quantisation spreads either over the whole weight, through the mean."""

import contextlib
import functools
import importlib
import math
import os
import threading

import torch
import torch.nn.functional as F
from minitune_kernels import agreement, built, formulas, nf4_reference
from minitune_kernels.direct import is_direct
from torch.autograd import forward_ad

BLOCK = nf4_reference.BLOCK
NESTED_BLOCK = nf4_reference.NESTED_BLOCK
CODE = nf4_reference.CODE
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_buffers = {}  # (device, dtype) -> the flat tensor that workspace() lends
_lent = threading.Lock()  # held while a workspace is in use


def check(name, tensor, dtypes, device=None, size=None, why="", strided=False):
    """Raises ValueError, which names the argument, unless `tensor` has one of these dtypes, this device and this number of
    elements, and is contiguous. None: any device, any number. why: where the number comes from. strided: any strides."""
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
    """Returns absmax as a tuple: (absmax,), or (q, absmax2, code2, offset)."""
    n = elements(shape)
    why = f" for shape {tuple(shape)}"
    check("packed", packed, (torch.uint8,), size=(n + 1) // 2, why=why)
    scales = tuple(absmax) if isinstance(absmax, (tuple, list)) else (absmax,)
    if len(scales) == 1:
        check("absmax", *scales, (torch.float32,), packed.device, -(-n // BLOCK), why)
    elif len(scales) == 4:
        check_nested(*scales, packed.device, -(-n // BLOCK), why)
    else:
        raise ValueError(f"absmax has {len(scales)} parts, expected a tensor or (q, absmax2, code2, offset)")
    return scales


def check_nested(q, absmax2, code2, offset, device=None, blocks=None, why=""):
    check("q", q, (torch.uint8,), device, blocks, why)
    nested_blocks = -(-q.numel() // NESTED_BLOCK)
    check("absmax2", absmax2, (torch.float32,), q.device, nested_blocks, f" for {q.numel()} values of q")
    check("code2", code2, (torch.float32,), q.device, 256)
    check("offset", offset, (torch.float32,), q.device, 1)


def backend(device):
    """The backend module for `device`. Raises ValueError if MINITUNE_KERNELS names one that does not run there."""
    return chosen(device.type, device.index, os.environ.get("MINITUNE_KERNELS"))[0]


def describe(device):
    """The backend of `device` and the reason for the choice, in a line."""
    module, reason = chosen(device.type, device.index, os.environ.get("MINITUNE_KERNELS"))
    return f"{module.NAME} ({module.describe()}), {reason}"


@functools.cache
def chosen(kind, index, wanted):
    """(module, reason). Writes a line, once, if only plain PyTorch is left."""
    device = torch.device(kind, index)
    names = ["cpu", "torch"] if kind == "cpu" else ["triton", "cuda", "torch"] if kind == "cuda" else ["torch"]
    if wanted:
        built.check_backend(wanted)
        names = [wanted]
    passed = []
    for name in names:
        module = importlib.import_module(f"minitune_kernels.{built.BACKENDS[name]}")
        if not (fault := module.why_not(device)):
            break
        passed.append(f"{name}: {fault}")
    else:
        raise ValueError(f"MINITUNE_KERNELS={wanted} does not run on {device}: {fault}")
    if module is nf4_reference and passed:
        built.tell(f"4-bit weights in plain PyTorch, which is slow. {'; '.join(passed)}")
    return module, "as MINITUNE_KERNELS asks" if wanted else "; not ".join([f"the fastest on {kind} here", *passed])


@torch.no_grad()
def quantize(weight):
    """Quantise to NF4, bit for bit as bitsandbytes does on a CPU.
    weight: (out, in) or any shape, fp32, fp16 or bf16. Returns (packed (ceil(n / 2),) uint8, absmax (ceil(n / 64),) fp32)
    with n the number of elements. Temporaries stay below 64 MB."""
    check("weight", weight, FLOATS)
    if not is_direct(weight):
        return torch.ops.minitune.nf4_quantize(weight)
    return trusted(weight.device, "quantize", weight.dtype).quantize(weight)


@torch.no_grad()
def dequantize(packed, absmax, shape, dtype, out=None):
    """The weight of `shape` in `dtype` (fp32, fp16 or bf16): code * absmax in fp32, rounded once.
    packed: uint8, ceil(n / 2) elements in any shape; absmax: fp32, ceil(n / 64) elements, or the tuple of double_quantize();
    all on one device. out: None, or a contiguous tensor of that shape, dtype and device, which is written and returned."""
    scales = check_quantized(packed, absmax, shape)
    if dtype not in FLOATS:
        raise ValueError(f"dtype is {dtype}, expected {' or '.join(map(str, FLOATS))}")
    if out is not None:
        check("out", out, (dtype,), packed.device)
        if tuple(out.shape) != tuple(shape):
            raise ValueError(f"out has shape {tuple(out.shape)}, expected {tuple(shape)}")
    if not is_direct(packed):
        made = torch.ops.minitune.nf4_dequantize(packed, scales, shape, dtype)
        return made if out is None else out.copy_(made)
    if out is None:
        return dequantize_into(packed, scales, torch.empty(tuple(shape), dtype=dtype, device=packed.device))
    torch.autograd.graph.increment_version(out)  # a backward pass that saved `out` raises, as after any in-place write
    return dequantize_into(packed, scales, out)


def dequantize_into(packed, scales, out):
    """dequantize() into `out` without checks."""
    module = trusted(out.device, "dequantize", out.dtype)
    if module is nf4_reference:
        absmax = nf4_reference.double_dequantize(*scales) if len(scales) == 4 else scales[0]
        return nf4_reference.dequantize(packed.view(-1), absmax.view(-1), out)
    return module.dequantize(packed, scales, out) if out.numel() else out


def steady_rows(device, shape, dtype):
    """The largest number of rows of x for which each row's product is bit-identical to that of the row alone. 1 for backends
    that do not promise it."""
    module = backend(device)
    return module.steady_rows(shape, dtype) if module.NAME == "cpu" and multiplies(module, dtype, device) else 1


def trusted(device, what, dtype):
    """The backend of `device`, or nf4_reference if its `what` (quantize or dequantize) has other bits for this dtype."""
    module = backend(device)
    if module is nf4_reference:
        return module
    key, formula = (f"nf4 {what}", module.NAME, dtype, device.type), getattr(nf4_reference, what)
    agrees = agreement.known(key, formula)
    if agrees is None:
        difference = quantized_apart if what == "quantize" else dequantized_apart
        agrees = agreement.judge(key, formula, lambda: difference(module, dtype, device), f"the backend {module.NAME}")
    return module if agrees else nf4_reference


def multiplies(module, dtype, device):
    """Whether a backend's product equals formulas.linear of the dequantised weight."""
    key = "linear", f"4-bit {module.NAME}", dtype, device.type
    agrees = agreement.known(key, formulas.linear)
    if agrees is None:
        version = f"the 4-bit product of the backend {module.NAME}"
        agrees = agreement.judge(key, formulas.linear, lambda: product_apart(module, dtype, device), version)
    return agrees


def differentiates(dtype, device):
    """Whether the gradient of a 4-bit product equals that of formulas.linear of the dequantised weight."""
    key = "linear", "4-bit gradient", dtype, device.type
    agrees = agreement.known(key, formulas.linear)
    if agrees is None:
        version = "the hand-written gradient of the 4-bit product"
        agrees = agreement.judge(key, formulas.linear, lambda: gradient_apart(dtype, device), version)
    return agrees


def matmul(x, packed, absmax, shape, bias=None):
    """x @ weight.T + bias, with the weight dequantised to x.dtype. Gradients flow to x and bias.
    x: (.., in), any strides; bias: (out,) in x.dtype or None; shape: (out, in). Returns (.., out) in x.dtype."""
    scales = check_quantized(packed, absmax, shape)
    if len(shape) != 2:
        raise ValueError(f"shape is {tuple(shape)}, expected (out, in)")
    check("x", x, FLOATS, packed.device, strided=True)
    if x.dim() == 0 or x.shape[-1] != shape[1]:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (.., {shape[1]})")
    if bias is not None:
        check("bias", bias, (x.dtype,), x.device, shape[0], f" for shape {tuple(shape)}")
        if bias.dim() != 1:
            raise ValueError(f"bias has shape {tuple(bias.shape)}, expected ({shape[0]},)")
    return product(x, packed, scales, shape, bias)


def product(x, packed, scales, shape, bias=None):
    """matmul() without its checks, for NF4Linear, which made its checks when it was built. Only the device and the width of x
    are checked here.

    Without autograd the torch operator is skipped: it costs 20 microseconds a call, as much as a small layer."""
    if x.device != packed.device:
        raise ValueError(f"x is on {x.device}, expected {packed.device}, where the weight is")
    if x.shape[-1:] != shape[1:]:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (.., {shape[1]})")
    recorded = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    if recorded and x.device.type != "meta" and is_direct(x) and not differentiates(x.dtype, x.device):
        return formulas.linear(x, dequantize(packed, scales, shape, x.dtype), bias)
    if is_direct(x) and not recorded:
        return multiply(x, packed, scales, shape, bias)
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
        raise NotImplementedError("forward-mode derivatives of a 4-bit product are not written; use the backward pass")
    return torch.ops.minitune.nf4_matmul(x, packed, scales, shape, bias)


def multiply(x, packed, scales, shape, bias):
    """x (.., in) -> (.., out). Few rows: the backend's kernel. More: the weight is dequantised into the workspace, then torch
    multiplies."""
    module, count = backend(x.device), x.numel() // shape[1] if shape[1] else 0
    if not 0 < count <= module.max_rows(shape, x.dtype) or not multiplies(module, x.dtype, x.device):
        linear = F.linear if agreement.agrees("linear", "torch", x) else formulas.linear
        with workspace(shape, x.dtype, x.device) as weight, torch.autocast(x.device.type, enabled=False):
            return linear(x, dequantize_into(packed, scales, weight), bias)
    out = x.new_empty(*x.shape[:-1], shape[0])  # not a view, since callers add to it in place
    module.matmul(x.contiguous(), packed, scales, shape, out)
    return out if bias is None else out.add_(bias)


# --- torch operators, for torch.compile, torch.export and CUDA graphs ----------------------------------------------------

operators = torch.library.Library("minitune", "DEF")
operators.define("nf4_quantize(Tensor weight) -> (Tensor, Tensor)")
operators.define("nf4_dequantize(Tensor packed, Tensor[] scales, SymInt[] shape, ScalarType dtype) -> Tensor")
operators.define("nf4_matmul(Tensor x, Tensor packed, Tensor[] scales, SymInt[] shape, Tensor? bias) -> Tensor")
operators.define("nf4_matmul_grad(Tensor grad, Tensor packed, Tensor[] scales, SymInt[] shape) -> Tensor")


def operator(name):
    """A decorator: makes a function the operator's implementation on every device."""

    def implement(function):
        operators.impl(name, function, "CompositeExplicitAutograd")
        return function

    return implement


@operator("nf4_quantize")
def quantize_operator(weight):
    return trusted(weight.device, "quantize", weight.dtype).quantize(weight.contiguous())


@operator("nf4_dequantize")
def dequantize_operator(packed, scales, shape, dtype):
    return dequantize_into(packed, scales, torch.empty(shape, dtype=dtype, device=packed.device))


@operator("nf4_matmul")
def matmul_operator(x, packed, scales, shape, bias):
    return multiply(x, packed, scales, shape, bias)


@operator("nf4_matmul_grad")
def matmul_grad_operator(grad, packed, scales, shape):
    """grad (.., out) -> (.., in): grad @ weight, the weight dequantised again."""
    with workspace(shape, grad.dtype, grad.device) as weight, torch.autocast(grad.device.type, enabled=False):
        return grad @ dequantize_into(packed, scales, weight)


@torch.library.register_fake("minitune::nf4_quantize")
def _(weight):
    n = weight.numel()
    return weight.new_empty((n + 1) // 2, dtype=torch.uint8), weight.new_empty(-(-n // BLOCK), dtype=torch.float32)


@torch.library.register_fake("minitune::nf4_dequantize")
def _(packed, scales, shape, dtype):
    return packed.new_empty(shape, dtype=dtype)


@torch.library.register_fake("minitune::nf4_matmul")
def _(x, packed, scales, shape, bias):
    return x.new_empty(*x.shape[:-1], shape[0])


@torch.library.register_fake("minitune::nf4_matmul_grad")
def _(grad, packed, scales, shape):
    return grad.new_empty(*grad.shape[:-1], shape[1])


def remember(ctx, inputs, output):
    """Saves the 4-bit weight only, not the dequantised weight and not x."""
    _, packed, scales, ctx.shape, *_ = inputs
    ctx.save_for_backward(packed, *scales)


def matmul_gradients(ctx, grad):
    packed, *scales = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.minitune.nf4_matmul_grad(grad, packed, scales, ctx.shape)
    if ctx.needs_input_grad[4]:
        grad_bias = grad.reshape(-1, ctx.shape[0]).sum(0)
    return grad_x, None, [None] * len(scales), None, grad_bias


def matmul_grad_gradients(ctx, grad):
    packed, *scales = ctx.saved_tensors
    return torch.ops.minitune.nf4_matmul(grad, packed, scales, ctx.shape, None), None, [None] * len(scales), None


torch.library.register_autograd("minitune::nf4_matmul", matmul_gradients, setup_context=remember)
torch.library.register_autograd("minitune::nf4_matmul_grad", matmul_grad_gradients, setup_context=remember)


@torch.no_grad()
def double_quantize(absmax):
    """Quantise the absmax values themselves to 8 bits, in blocks of 256 around their mean.
    absmax: (m,) fp32, m >= 1. Returns (q (m,) uint8, absmax2 (ceil(m / 256),) fp32, code2 (256,) fp32, offset () fp32),
    bit for bit as bitsandbytes does on a CPU."""
    check("absmax", absmax, (torch.float32,))
    if absmax.dim() != 1 or absmax.numel() == 0:
        raise ValueError(f"absmax has shape {tuple(absmax.shape)}, expected (m,) with m >= 1")
    return nf4_reference.double_quantize(absmax)


@torch.no_grad()
def double_dequantize(q, absmax2, code2, offset):
    """absmax (m,) fp32 = code2[q] * absmax2 + offset, rounded twice, bit for bit as in bitsandbytes."""
    check_nested(q, absmax2, code2, offset)
    return nf4_reference.double_dequantize(q.view(-1), absmax2.view(-1), code2, offset.view(()))


@contextlib.contextmanager
def workspace(shape, dtype, device):
    """Lends a tensor of `shape` for one dequantised weight: `with workspace(...) as weight`.

    Each device and dtype has one buffer, which lives as long as the process and grows to the largest weight: the page faults
    of a fresh output of 117 MB take 30 ms. The tensor is valid inside the `with` only and must never be saved for backward.
    It is lent to one thread at a time; a second one waits. On a GPU both must use the same stream. Nested use is a deadlock."""
    key, n = (torch.device(device), dtype), math.prod(shape)
    with _lent:
        if key not in _buffers or _buffers[key].numel() < n:
            _buffers.pop(key, None)  # free the old one before the new one is made
            with torch.inference_mode(False):  # else a buffer made in inference mode could not be written outside it
                _buffers[key] = torch.empty(n, dtype=dtype, device=device)
        yield _buffers[key][:n].view(tuple(shape))


# --- the comparisons of trusted(), multiplies() and differentiates(). Each returns the difference in words, or None ------


def example(dtype, device, *shape):
    """(weight, packed, absmax): numbers of this shape, quantised by the reference."""
    weight = agreement.Numbers(dtype, device)(*shape).detach()
    return weight, *nf4_reference.quantize(weight)


def quantized_apart(module, dtype, device):
    weight, *expected = example(dtype, device, 3 * BLOCK + 17)  # an odd number of elements; the last block is short
    same = [torch.equal(*pair) for pair in zip(module.quantize(weight), expected, strict=True)]
    return None if all(same) else "has other bits"


def dequantized_apart(module, dtype, device):
    weight, packed, absmax = example(torch.float32, device, 3 * BLOCK + 17)
    nested = nf4_reference.double_quantize(absmax)
    for scales, plain in (((absmax,), absmax), (nested, nf4_reference.double_dequantize(*nested))):
        found, expected = (torch.empty(weight.shape, dtype=dtype, device=device) for _ in range(2))
        module.dequantize(packed, scales, found)
        if not torch.equal(found, nf4_reference.dequantize(packed, plain, expected)):
            return "has other bits"
    return None


def product_apart(module, dtype, device):
    shape = 9, 2 * BLOCK
    weight, packed, absmax = example(dtype, device, *shape)
    nested = nf4_reference.double_quantize(absmax)
    limit = agreement.LIMITS.get(dtype, agreement.FP32_LIMIT)
    for scales, plain in (((absmax,), absmax), (nested, nf4_reference.double_dequantize(*nested))):
        weight = nf4_reference.dequantize(packed, plain, torch.empty_like(weight))
        for rows in {min(rows, module.max_rows(shape, dtype) or 1) for rows in (3, 33)}:
            x = agreement.Numbers(dtype, device)(rows, shape[1]).detach()
            found = module.matmul(x, packed, scales, shape, x.new_empty(rows, shape[0]))
            if share := agreement.distance(found, formulas.linear(x, weight), limit):
                return f"differs by {share} of the values"
    return None


def gradient_apart(dtype, device):
    shape = 9, 2 * BLOCK
    weight, packed, absmax = example(dtype, device, *shape)
    weight = nf4_reference.dequantize(packed, absmax, torch.empty_like(weight))
    numbers = agreement.Numbers(dtype, device)
    given = numbers(3, shape[1]), numbers(shape[0])
    functions = (
        lambda x, bias: torch.ops.minitune.nf4_matmul(x, packed, [absmax], shape, bias),
        lambda x, bias: formulas.linear(x, weight, bias),
    )
    found, expected = agreement.outcomes(functions, given, True)
    limit = 4 * agreement.LIMITS.get(dtype, agreement.FP32_LIMIT)
    for pair in zip(found, expected, strict=True):
        if share := agreement.distance(*pair, limit):
            return f"differs by {share} of the values"
    return None
