"""NF4 in Triton against nf4_reference.py, on a GPU if there is one, else in Triton's interpreter; and the builds for other GPUs.
As a program, with a compute capability as its argument, it builds every launch and prints facts on each build as JSON."""

import json
import os
import re
import runpy
import subprocess
import sys
import tempfile
import types

import pytest
import torch
import triton_interpreter
from minitune_kernels import nf4_reference, nf4_triton
from minitune_kernels.nf4_triton import jit, tl

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Compute capability -> dtypes that are built for it; a build takes 0.8 s. 80 has bf16 but no conversion instruction for it.
CAPABILITIES = {80: (torch.float32, torch.bfloat16), 89: (torch.float16,), 90: (torch.bfloat16,)}
KERNELS = {"quantize_kernel", "dequantize_kernel", "gemv_kernel", "gemm_kernel", "sum_kernel"}
# numpy warns when the interpreter computes with NaN or infinity; a GPU does not
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
HAS_GPU = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")


@pytest.fixture(scope="module")
def backend():
    if reason := nf4_triton.why_not(DEVICE):
        pytest.skip(f"no Triton on {DEVICE}: {reason}")
    if DEVICE.type == "cpu":
        triton_interpreter.install()
    return nf4_triton


def random_weight(*shape, dtype=torch.float32, seed=0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.05).to(dtype)


def assert_same_bits(got, expected):
    """0 is not -0. Any NaN equals any NaN: a GPU does not keep its sign and payload."""
    got = got.cpu()
    assert got.dtype == expected.dtype and got.shape == expected.shape
    if expected.is_floating_point():
        assert torch.equal(got.isnan(), expected.isnan())
        integer = torch.int32 if expected.element_size() == 4 else torch.int16
        got, expected = (t.masked_fill(expected.isnan(), 0).view(integer) for t in (got, expected))
    assert torch.equal(got, expected)


def quantized(shape, nested, seed=0):
    """(packed, scales, absmax) on the CPU. absmax: (n / 64,) fp32, also with double quantisation."""
    packed, absmax = nf4_reference.quantize(random_weight(*shape, seed=seed))
    if not nested:
        return packed, (absmax,), absmax
    scales = nf4_reference.double_quantize(absmax)
    return packed, scales, nf4_reference.double_dequantize(*scales)


def to_device(*tensors):
    return tuple(t.to(DEVICE) for t in tensors)


# Where it runs


def test_why_not_gives_the_reason(monkeypatch):
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(nf4_triton, "triton", types.SimpleNamespace(__version__="3.9.0"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability in ((8, 0), (8, 9), (9, 0), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, answer=capability: answer)
        assert nf4_triton.why_not(cuda) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert nf4_triton.why_not(cuda) == "compute capability 7.5 is below 8.0"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert nf4_triton.why_not(cuda) == "torch finds no CUDA device"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert nf4_triton.why_not(torch.device("cpu")) is None
    monkeypatch.delenv("TRITON_INTERPRET")
    assert nf4_triton.why_not(torch.device("cpu")) == "it runs on NVIDIA GPUs only, not on cpu"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert nf4_triton.why_not(cuda) == "it runs on NVIDIA GPUs only, not on AMD"
    nf4_triton.triton.__version__ = "3.4.1"
    assert nf4_triton.why_not(cuda) == "triton 3.4.1 is older than 3.5"


def test_without_triton_the_module_can_be_imported_and_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    module = runpy.run_path(nf4_triton.__file__)
    assert module["why_not"](torch.device("cuda")) == "triton is not installed"


def test_max_rows_asks_for_whole_blocks_and_keeps_fp32_from_tensor_cores():
    assert nf4_triton.max_rows((4096, 14336), torch.bfloat16) == nf4_triton.max_rows((64, 64), torch.float16) == 64
    assert nf4_triton.max_rows((4096, 14336), torch.float32) == nf4_triton.max_rows((63, 64), torch.bfloat16) == 4
    for shape in ((64, 96), (64, 0), (0, 64)):
        assert nf4_triton.max_rows(shape, torch.bfloat16) == 0


# The interpreter


@jit
def bf16_kernel(a, b, sums, quotients, larger, roots, product, N: tl.constexpr):
    i = tl.arange(0, N)
    x, y = tl.load(a + i), tl.load(b + i)
    tl.store(sums + i, x * y + x)
    tl.store(quotients + i, (x.to(tl.float32) / y.to(tl.float32)).to(tl.bfloat16))
    tl.store(larger + i, tl.where(x < y, y, x))
    tl.store(roots + i, tl.sqrt(tl.abs(x).to(tl.float32)))
    j = tl.arange(0, 16)
    dot = tl.dot(tl.reshape(x, (16, N // 16)), tl.reshape(y, (N // 16, 16)))
    tl.store(product + j[:, None] * 16 + j[None, :], dot)


def test_bf16_arithmetic_rounds_as_torch_does(backend):
    a, b = (random_weight(512, dtype=torch.bfloat16, seed=seed) for seed in (1, 2))
    results = [torch.empty(512, dtype=torch.bfloat16, device=DEVICE) for _ in range(3)]
    roots, product = torch.empty(512, device=DEVICE), torch.empty(16, 16, device=DEVICE)
    bf16_kernel[(1,)](*to_device(a, b), *results, roots, product, N=512, enable_fp_fusion=False)
    for got, expected in zip(results[1:], ((a.float() / b.float()).bfloat16(), torch.maximum(a, b)), strict=True):
        assert_same_bits(got, expected)
    exact = a.double() * b.double() + a.double()  # two roundings, each of at most half a bf16 step
    assert ((results[0].cpu().double() - exact).abs() <= 2**-8 * (exact.abs() + (a.double() * b.double()).abs())).all()
    torch.testing.assert_close(roots.cpu(), a.float().abs().sqrt(), rtol=2**-22, atol=0)
    expected = a.view(16, 32).float() @ b.view(32, 16).float()
    torch.testing.assert_close(product.cpu(), expected, rtol=2**-18, atol=2**-24)


# Bits


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(0,), (1,), (2,), (63,), (64,), (7, 9), (5, 13), (32, 64), (33, 63), (3, 1431)])
def test_quantize_gives_the_bits_of_the_reference(backend, shape, dtype):
    weight = random_weight(*shape, dtype=dtype)
    for got, expected in zip(backend.quantize(weight.to(DEVICE)), nf4_reference.quantize(weight), strict=True):
        assert_same_bits(got, expected)


def test_whole_blocks_multiply_by_the_reciprocal_and_a_short_block_divides(backend):
    midpoints = nf4_reference.tables(torch.device("cpu"))[1]
    absmax = torch.rand(400, generator=torch.Generator().manual_seed(5)) + 0.5
    blocks = torch.cat([midpoints * absmax[:, None], absmax[:, None]], dim=1)  # (400, 16), each value at a tie
    divided, multiplied = blocks / absmax[:, None], blocks * (1 / absmax)[:, None]
    differ = (torch.bucketize(divided, midpoints) != torch.bucketize(multiplied, midpoints)).any(dim=1)
    # The first 384 fill whole blocks; each of the others is tried as the short last block.
    assert differ[:384].any() and differ[384:].any()
    for rest in blocks[384:][differ[384:]]:
        weight = torch.cat([blocks[:384].repeat_interleave(4, 0).view(-1), rest])
        assert_same_bits(backend.quantize(weight.to(DEVICE))[0], nf4_reference.quantize(weight)[0])


def test_quantize_puts_ties_down(backend):
    code = torch.tensor(nf4_reference.CODE)
    ties = torch.cat([(code[:-1] + code[1:]) / 2, torch.ones(49)])
    assert_same_bits(backend.quantize(ties.to(DEVICE))[0], nf4_reference.quantize(ties)[0])


SPECIAL = {
    "zeros": [0.0] * 64,
    "negative zeros": [-0.0] * 64,
    "subnormal": [1e-39, -1e-40] + [0.0] * 62,
    "smallest": [1e-45] + [0.0] * 63,
    "huge": [3e38, -3e38, 1e38] + [1e-38] * 61,
    "nan": [float("nan"), 1.0, -1.0] + [0.5] * 61,
    "negative nan": [-float("nan"), 1.0, -1.0] + [0.5] * 61,
    "infinity": [float("inf"), 1.0, -1.0] + [0.5] * 61,
    "minus infinity": [-float("inf"), 1.0, float("inf")] + [0.5] * 61,
    "nan and infinity": [float("nan"), float("inf")] + [0.5] * 62,
}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("length", [64, 17], ids=["whole block", "short block"])
@pytest.mark.parametrize("name", SPECIAL)
def test_extreme_values_are_stored_as_the_reference_stores_them(backend, name, length, dtype):
    weight = torch.tensor([0.25, -1.0] * 32 + SPECIAL[name][:length]).to(dtype)
    for got, expected in zip(backend.quantize(weight.to(DEVICE)), nf4_reference.quantize(weight), strict=True):
        assert_same_bits(got, expected)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("shape", [(1,), (2,), (63,), (64,), (5, 13), (64, 64), (91, 91), (128, 64), (257, 65)])
def test_dequantize_gives_the_bits_of_the_reference(backend, shape, nested, dtype):
    packed, scales, absmax = quantized(shape, nested)
    out = torch.full(shape, 7.0, dtype=dtype, device=DEVICE)
    assert backend.dequantize(packed.to(DEVICE), to_device(*scales), out) is out
    assert_same_bits(out, nf4_reference.dequantize(packed, absmax, torch.empty(shape, dtype=dtype)))


@pytest.mark.parametrize("dtype", FLOATS)
def test_dequantize_of_extreme_scales_gives_the_bits_of_the_reference(backend, dtype):
    scales = [0.0, -0.0, 1e-45, -1e-40, 1e-38, 6e-8, 65519.0, 65520.0, 3.4e38, -2.5, float("inf"), float("nan")]
    packed = torch.arange(256, dtype=torch.uint8).repeat(len(scales))  # each byte with each scale
    absmax = torch.tensor(scales).repeat_interleave(8)
    out = torch.empty(packed.numel() * 2, dtype=dtype, device=DEVICE)
    backend.dequantize(*to_device(packed), to_device(absmax), out)
    assert_same_bits(out, nf4_reference.dequantize(packed, absmax, torch.empty(out.shape, dtype=dtype)))


def test_dequantize_of_no_elements_does_nothing(backend):
    packed, absmax = backend.quantize(torch.empty(0, 64, device=DEVICE))
    assert backend.dequantize(packed, (absmax,), torch.empty(0, 64, device=DEVICE)).shape == (0, 64)


def test_tensors_may_start_at_any_element(backend):
    packed, (absmax,), _ = quantized((200, 64), False)
    shifted = [torch.cat([t[:1], t]).to(DEVICE)[1:] for t in (packed, absmax)]
    out = torch.zeros(200 * 64 + 2, dtype=torch.bfloat16, device=DEVICE)
    backend.dequantize(shifted[0], (shifted[1],), out[1:-1])
    expected = nf4_reference.dequantize(packed, absmax, torch.zeros(200 * 64, dtype=torch.bfloat16))
    around = torch.zeros(1)  # nothing is written before or after the weight
    assert_same_bits(out, torch.cat([around, expected, around]).bfloat16())


# Products


def assert_product(out, x, packed, absmax, shape):
    """out == x @ weight.T up to half a step of its dtype and 2**-17 of the sum of the absolute products, for the fp32 sums.
    Rounding the weights of a GEMV to bf16 would cost 2**-14 of it."""
    weight_dtype = torch.float32 if x.shape[0] <= 4 else x.dtype
    weight = nf4_reference.dequantize(packed, absmax, torch.empty(shape, dtype=weight_dtype)).double()
    exact, x = x.double() @ weight.T, x.double()
    bound = torch.finfo(out.dtype).eps / 2 * exact.abs() + 2**-17 * (x.abs() @ weight.abs().T)
    assert ((out.cpu().double() - exact).abs() <= bound).all()


@pytest.mark.parametrize(
    "dtype, rows",
    [(torch.float32, rows) for rows in (1, 2, 3, 4)]
    + [(dtype, rows) for dtype in FLOATS[1:] for rows in (1, 2, 3, 4, 5, 8, 15, 16, 17, 31, 33, 64)],
)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "double"])
def test_matmul_equals_the_product_with_the_dequantized_weight(backend, monkeypatch, nested, dtype, rows):
    # The GEMV takes a second step, mostly masked; the GEMM has two tiles of rows, and two parts of three and two steps.
    shape = (13, 1088) if rows <= 4 else (70, 320)
    assert rows <= backend.max_rows(shape, dtype)
    monkeypatch.setattr(backend, "GEMM_PROGRAMS", 4)
    packed, scales, absmax = quantized(shape, nested)
    x = random_weight(rows, shape[1], dtype=dtype, seed=1)
    out = torch.full((rows, shape[0]), 7.0, dtype=dtype, device=DEVICE)
    assert backend.matmul(x.to(DEVICE), packed.to(DEVICE), to_device(*scales), shape, out) is out
    assert_product(out, x, packed, absmax, shape)


@pytest.mark.parametrize(
    "rows, shape",
    [(rows, shape) for rows in (1, 4) for shape in ((1, 64), (3, 128), (7, 64), (65, 192), (9, 1024))]
    + [(6, (64, 64)), (6, (65, 192)), (6, (130, 256))],
)
def test_matmul_takes_any_number_of_blocks_and_rows_of_the_weight(backend, rows, shape):
    packed, scales, absmax = quantized(shape, False, seed=2)
    x = random_weight(rows, shape[1], dtype=torch.float16, seed=3)
    out = torch.empty(rows, shape[0], dtype=torch.float16, device=DEVICE)
    backend.matmul(x.to(DEVICE), packed.to(DEVICE), to_device(*scales), shape, out)
    assert_product(out, x, packed, absmax, shape)


@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_matmul_keeps_nan_and_infinity_in_the_row_of_the_weight(backend, rows, value):
    weight = random_weight(66, 128)
    weight[3, 70] = value
    packed, absmax = nf4_reference.quantize(weight)
    x = random_weight(rows, 128, dtype=torch.bfloat16, seed=1)
    out = torch.empty(rows, 66, dtype=torch.bfloat16, device=DEVICE)
    backend.matmul(*to_device(x, packed), to_device(absmax), (66, 128), out)
    assert out[:, 3].isnan().all() and out[:, :3].isfinite().all() and out[:, 4:].isfinite().all()


# On a GPU only


@pytest.mark.gpu
@HAS_GPU
def test_a_cuda_graph_replays_every_operation(backend):
    shape = (256, 1024)
    weight, x = random_weight(*shape).to(DEVICE), random_weight(8, 1024, dtype=torch.bfloat16).to(DEVICE)
    back, one, many = (torch.empty(s, dtype=torch.bfloat16, device=DEVICE) for s in (shape, (1, 256), (8, 256)))

    def step():
        packed, absmax = backend.quantize(weight)
        backend.dequantize(packed, (absmax,), back)
        backend.matmul(x[:1], packed, (absmax,), shape, one)
        backend.matmul(x, packed, (absmax,), shape, many)

    step()  # compiles
    expected = [t.clone() for t in (back, one, many)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for t in (back, one, many):
        t.zero_()
    graph.replay()
    torch.cuda.synchronize()
    for got, want in zip((back, one, many), expected, strict=True):
        assert_same_bits(got, want.cpu())


@pytest.mark.gpu
@HAS_GPU
def test_more_than_two_to_the_31_elements_are_addressed(backend):
    n, tail = 2**31 + 3 * 64 + 5, 2 * 64 + 5
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free GPU memory")
    weight = torch.zeros(n, dtype=torch.bfloat16, device=DEVICE)
    weight[-tail:] = random_weight(tail).to(DEVICE)
    packed, absmax = backend.quantize(weight)
    expected = nf4_reference.quantize(weight[-tail:].cpu())
    assert_same_bits(packed[-((tail + 1) // 2) :], expected[0])
    assert_same_bits(absmax[-3:], expected[1])
    backend.dequantize(packed, (absmax,), weight)
    assert_same_bits(weight[-tail:], nf4_reference.dequantize(*expected, torch.empty(tail, dtype=torch.bfloat16)))


# Builds


def every_launch(dtypes):
    """(kernel, arguments, keywords) of the launches of the backend for these dtypes, both kinds of scales and every number of
    rows of x that has its own build. They are recorded instead of run, so that exactly what would be launched is built."""
    launches = []
    nf4_triton.triton.JITFunction.run = lambda kernel, *args, grid, warmup, **options: launches.append(
        (kernel, args, options)
    )
    for dtype in dtypes:
        packed, absmax = nf4_triton.quantize(torch.empty(4096, dtype=dtype))
        q, code2 = torch.empty(absmax.numel(), dtype=torch.uint8), torch.empty(256)
        for scales in ((absmax,), (q, absmax[:1], code2, code2[0])):
            nf4_triton.dequantize(packed, scales, torch.empty(4096, dtype=dtype))
            for rows, columns in ((1, 1024), *((rows, 1088) for rows in (1, 2, 3, 4, 5, 17, 64))):
                if rows <= nf4_triton.max_rows((64, columns), dtype):  # 1024: no step of the GEMV is masked
                    x, out = (torch.empty(rows, size, dtype=dtype) for size in (columns, 64))
                    nf4_triton.matmul(x, packed, scales, (64, columns), out)
    nf4_triton.dequantize(torch.empty(2049, dtype=torch.uint8)[1:], (absmax,), torch.empty(4096, dtype=torch.bfloat16))
    return launches


def build_every_launch(capability):
    """Facts on each build, as a list of dicts. Arguments are specialised as by Triton's own launcher."""
    from triton import compile, knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    target, builds = GPUTarget("cuda", capability, 32), {}
    made = make_backend(target)
    for kernel, args, options in every_launch(CAPABILITIES[capability]):
        bind = create_function_from_signature(kernel.signature, kernel.params, made)
        bound, specialization, options = bind(*args, **options)
        key = kernel.__name__, str(specialization), str(options)
        if key in builds:
            continue
        options, signature, constants, attributes = kernel._pack_args(made, options, bound, specialization, options)
        source = ASTSource(kernel, signature, constants, attributes)
        built = compile(source, target=target, options=options.__dict__)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(built.asm["cubin"])
            file.flush()
            usage = subprocess.check_output([knobs.nvidia.cuobjdump.path, "-res-usage", file.name], text=True)
        ptx = built.asm["ptx"]
        builds[key] = {
            "kernel": kernel.__name__,
            "signature": str(signature),
            "stack_bytes": sum(int(size) for size in re.findall(r"(?:STACK|LOCAL):(\d+)", usage)),
            "shared_bytes": built.metadata.shared,
            "has_wide_stores": "st.global.v4.b32" in ptx,
            "has_mma": "mma.sync" in ptx or "wgmma.mma_async" in ptx,
            "has_fma": bool(re.search(r"\bfma\.rn\.f32\b", ptx)),
            "flushes_subnormals": ".ftz" in ptx,
        }
    return list(builds.values())


@pytest.fixture(scope="module")
def builds(backend):
    """{compute capability: builds}, each from a process of its own: this one may have the interpreter, which cannot compile."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, __file__]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    running = {capability: subprocess.Popen([*command, str(capability)], **pipes) for capability in CAPABILITIES}
    done = {capability: (*process.communicate(), process.returncode) for capability, process in running.items()}
    assert all(code == 0 for _, _, code in done.values()), [errors[-2000:] for _, errors, _ in done.values()]
    return {capability: json.loads(printed) for capability, (printed, _, _) in done.items()}


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_kernel_builds_without_spills(builds, capability):
    assert {build["kernel"] for build in builds[capability]} == KERNELS
    for build in builds[capability]:
        assert build["stack_bytes"] == 0, build
        assert build["shared_bytes"] <= 48 * 1024, build  # two programs fit on an SM of any of these chips


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_no_kernel_contracts_products_or_flushes_subnormals(builds, capability):
    for build in builds[capability]:
        assert not build["flushes_subnormals"], build
        assert build["has_fma"] == (build["kernel"] == "gemv_kernel"), build


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_dequantize_stores_16_bytes_at_once_and_gemm_uses_the_tensor_cores(builds, capability):
    for build in builds[capability]:
        assert build["has_wide_stores"] or build["kernel"] != "dequantize_kernel", build
        assert build["has_mma"] == (build["kernel"] == "gemm_kernel"), build


if __name__ == "__main__":
    print(json.dumps(build_every_launch(int(sys.argv[1]))))
