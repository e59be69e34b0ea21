"""Launches the NF4 kernels of nf4.cu. For chips that Triton no longer supports (V100, T4), and any other NVIDIA chip.

nf4.py checks the inputs, this module does not. matmul() multiplies with the fp32 products code * absmax, which are not rounded to
x.dtype, and sums in fp32. NaN stays NaN, but with the bits that the GPU gives it. All work is queued on torch's current stream
without waiting, so a CUDA graph can capture it. The kernels are loaded by the first call, which must not be captured."""

import functools

import torch
from minitune_kernels import nvrtc
from minitune_kernels.cuda_driver import Driver

NAME = "cuda"
DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
ROWS = (1, 4, 8)  # the matmul kernels, by their largest number of rows of x
OPERATIONS = ("quantize", "dequantize", "dequantize_double",
              *(f"matmul_{rows}" for rows in ROWS), *(f"matmul_double_{rows}" for rows in ROWS))  # fmt: skip
# What a block of threads does, as written in nf4.cu.
THREADS = 128
QUANTIZED_BY_BLOCK = THREADS * 8  # elements of the weight
BYTES_BY_BLOCK = THREADS * 4 * 16  # of a dequantised weight
FEATURES_BY_BLOCK = THREADS // 32 * 2  # rows of the weight in a matmul


@functools.cache
def driver():
    return Driver()


def architecture(device):
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def why_not(device):
    """None if these kernels run on `device`, else the reason."""
    if device.type != "cuda":
        return f"device is {device.type}, expected cuda"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    try:
        driver()
    except OSError as error:
        return f"the NVIDIA driver library cannot be loaded: {error}"
    return nvrtc.why_not(architecture(device))


def describe():
    """What runs, for a line on the screen."""
    return "CUDA kernels of nf4.cu"


@functools.cache
def functions(device):
    """{(operation, dtype): handle} on `device`."""
    names = {(operation, dtype): f"{operation}_{name}" for operation in OPERATIONS for dtype, name in DTYPES.items()}
    handles = driver().load(nvrtc.cubin(architecture(device)), names.values(), device.index or 0)
    return {key: handles[name] for key, name in names.items()}


def launch(device, operation, dtype, work, work_by_block, *words):
    """Launch an operation with one block of threads for each `work_by_block` of `work`; nothing if work is 0, which the driver
    refuses. words: the kernel's parameters."""
    if work == 0:
        return
    with torch.cuda.device(device):
        function = functions(device)[operation, dtype]
        stream = torch.cuda.current_stream(device).cuda_stream
        driver().launch(function, -(-work // work_by_block), THREADS, stream, words, device.index or 0)


def quantize(weight):
    """weight (any shape) fp32, fp16 or bf16 -> (packed (ceil(n / 2),) uint8, absmax (ceil(n / 64),) fp32)."""
    n = weight.numel()
    packed = torch.empty((n + 1) // 2, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(-(-n // 64), dtype=torch.float32, device=weight.device)
    pointers = weight.data_ptr(), packed.data_ptr(), absmax.data_ptr()
    launch(weight.device, "quantize", weight.dtype, n, QUANTIZED_BY_BLOCK, *pointers, n)
    return packed, absmax


def dequantize(packed, scales, out):
    """Write the weight into `out` and return it. scales: (absmax,), or (q, absmax2, code2, offset) with double quantisation."""
    n = out.numel()
    operation = "dequantize" if len(scales) == 1 else "dequantize_double"
    pointers = packed.data_ptr(), *(scale.data_ptr() for scale in scales), out.data_ptr()
    launch(out.device, operation, out.dtype, n, BYTES_BY_BLOCK // out.element_size(), *pointers, n)
    return out


def max_rows(shape, dtype):
    """The largest number of rows of x for matmul(): 8, or 0 if blocks cross rows of the weight."""
    return ROWS[-1] if shape[1] % 64 == 0 and shape[1] < 2**30 else 0  # 2**30: nf4.cu counts along a row in 32 bits


def matmul(x, packed, scales, shape, out):
    """Write x (.., in) @ weight.T, M <= 8 rows, into `out` (.., out) and return it."""
    M = x.shape[:-1].numel()
    if x.data_ptr() % 16 or packed.data_ptr() % 4:  # nf4.cu loads 16 and 4 bytes at once; a view may begin anywhere
        x, packed = x.clone(), packed.clone()
    rows = next(rows for rows in ROWS if rows >= M)
    operation = f"matmul_{rows}" if len(scales) == 1 else f"matmul_double_{rows}"
    pointers = x.data_ptr(), packed.data_ptr(), *(scale.data_ptr() for scale in scales), out.data_ptr()
    launch(x.device, operation, x.dtype, shape[0], FEATURES_BY_BLOCK, *pointers, M, shape[1], shape[0])
    return out
