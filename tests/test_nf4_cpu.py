"""The C kernels: on every instruction set of this CPU they have the bits of nf4_reference.py, and its products up to rounding."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from minitune_kernels import built, nf4, nf4_cpu, nf4_reference

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
LEVELS = {"portable": 0, "AVX2": 1, "AVX-512": 2, "AVX-512 bf16": 3, "AMX": 4, "AMX emulated": 4}
SHAPES = [(1, 64), (5, 192), (3, 21), (130,), (1, 1), (2, 63), (64, 65), (7, 1000), (0, 64)]
MATMULS = [
    (5, 64),
    (33, 192),
    (7, 1024 + 64),
    (16, 2048),
    (3, 2240),
]  # with short last tiles, chunks and pairs of blocks
ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 16, 17, 33, 64, 96)

pytestmark = pytest.mark.skipif(
    nf4_cpu.why_not(torch.device("cpu")) is not None, reason=f"no C kernels: {nf4_cpu.why_not(torch.device('cpu'))}"
)


@pytest.fixture(scope="module")
def emulated():
    """The library with AMX's five instructions written out in C."""
    library = nf4_cpu.typed(built.load(built.build(4, ("-DEMULATE_AMX",))))
    assert library.kernel_level() == 4
    return library


@pytest.fixture(params=LEVELS)
def level(request, monkeypatch):
    """Runs a test on one instruction set. Skips those that this CPU lacks."""
    own, highest = nf4_cpu.library()
    wanted = LEVELS[request.param]
    if request.param == "AMX emulated" and highest >= 3:
        library = request.getfixturevalue("emulated")
    elif wanted > highest:
        pytest.skip(f"this CPU has {built.LEVELS[highest]}, not {request.param}")
    else:
        library = own if wanted == highest else nf4_cpu.typed(built.load(built.build(wanted)))
    monkeypatch.setattr(nf4_cpu, "library", lambda: (library, wanted))
    return wanted


def weights(shape, dtype, seed=0):
    """Random values of falling scale, with a zero block, subnormal values, and ties at the midpoints."""
    n = torch.Size(shape).numel()
    falling = 0.05 * 2.0 ** -(torch.arange(n) // 64 % 9).float()
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed)) * falling
    if n > 300:
        code = torch.tensor(nf4.CODE)
        x[64:128], x[128], x[129:144], x[256:300] = 0, 0.25, (code[:-1] + code[1:]) / 2 * 0.25, x[256:300] * 1e-36
    return x.to(dtype).view(shape)


def same_bits(a, b):
    """Equal bits. Any NaN equals any NaN; 0 is not -0."""
    known = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
    a, b = (torch.where(t.isnan(), torch.nan, t) if t.is_floating_point() else t for t in (a, b))
    return torch.equal(a.view(known.get(a.dtype, a.dtype)), b.view(known.get(b.dtype, b.dtype)))


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_instruction_set_gives_the_bits_of_the_reference(level, dtype):
    for shape in SHAPES:
        weight = weights(shape, dtype)
        packed, absmax = nf4_cpu.quantize(weight)
        expected = nf4_reference.quantize(weight)
        assert same_bits(packed, expected[0]) and same_bits(absmax, expected[1]), shape
        if not weight.numel():
            continue
        nested = nf4_reference.double_quantize(absmax)
        for scales in ((absmax,), nested):
            restored = nf4_reference.double_dequantize(*scales) if scales is nested else absmax
            for out in FLOATS:
                ours = nf4_cpu.dequantize(packed, scales, torch.empty(shape, dtype=out))
                theirs = nf4_reference.dequantize(packed, restored, torch.empty(shape, dtype=out))
                assert same_bits(ours, theirs), (shape, out, len(scales))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e38, 1e-45])
@pytest.mark.parametrize("n", [256, 200])
def test_extreme_values_have_the_bits_of_the_reference(level, value, n):
    weight = weights((n,), torch.float32)
    weight[70], weight[n - 1] = value, value
    packed, absmax = nf4_cpu.quantize(weight)
    expected = nf4_reference.quantize(weight)
    assert same_bits(packed, expected[0]) and same_bits(absmax, expected[1])
    for dtype in FLOATS:
        out = torch.empty(n, dtype=dtype)
        expected = nf4_reference.dequantize(packed, absmax, out.clone())
        assert same_bits(nf4_cpu.dequantize(packed, (absmax,), out.clone()), expected)


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_large_output_written_past_the_caches_has_the_same_bits(level, dtype, monkeypatch):
    monkeypatch.setattr(nf4_cpu, "STREAM_BYTES", 0)
    packed, absmax = nf4_reference.quantize(weights((96, 321), dtype))
    whole = torch.empty(96 * 321 + 1, dtype=dtype)
    expected = nf4_reference.dequantize(packed, absmax, torch.empty(96 * 321, dtype=dtype))
    for out in (whole[:-1], whole[1:]):  # the second is not aligned, so it must not be streamed
        assert same_bits(nf4_cpu.dequantize(packed, (absmax,), out), expected)


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_matmul_is_the_product_with_the_dequantised_weight(level, dtype, nested):
    # Half a unit in the last place for rounding the result, and the rounding of fp32 sums of up to 2240 products.
    tolerance = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 4.5e-3}[dtype]
    for shape in MATMULS:
        packed, absmax = nf4_reference.quantize(weights(shape, dtype))
        scales = nf4_reference.double_quantize(absmax) if nested else (absmax,)
        restored = nf4_reference.double_dequantize(*scales) if nested else absmax
        weight = nf4_reference.dequantize(packed, restored, torch.empty(shape, dtype=dtype)).double()
        for rows in ROWS:
            x = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(rows)).to(dtype)
            out = nf4_cpu.matmul(x, packed, scales, shape, torch.full((rows, shape[0]), torch.nan, dtype=dtype))
            exact = x.double() @ weight.T
            size = x.double().abs() @ weight.abs().T  # the sum of the absolute terms
            assert ((out.double() - exact).abs() <= tolerance * (exact.abs() + size / 16)).all(), (shape, rows)


def test_a_row_of_x_does_not_depend_on_its_neighbours(level):
    packed, absmax = nf4_reference.quantize(weights((24, 1280), torch.bfloat16))
    x = torch.randn(70, 1280, generator=torch.Generator().manual_seed(1)).bfloat16()
    run = lambda rows: nf4_cpu.matmul(rows, packed, (absmax,), (24, 1280), rows.new_empty(len(rows), 24))
    whole = run(x)
    x[3] = torch.nan
    broken = run(x)
    assert broken[3].isnan().all()
    assert torch.equal(broken[torch.arange(70) != 3], whole[torch.arange(70) != 3])


def test_threads_change_nothing(level, monkeypatch):
    packed, absmax = nf4_reference.quantize(weights((50, 320), torch.bfloat16))
    x, results = torch.randn(7, 320).bfloat16(), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 64):
            torch.set_num_threads(threads)
            out = nf4_cpu.dequantize(packed, (absmax,), torch.empty(50, 320).bfloat16())
            results.append((out, nf4_cpu.matmul(x, packed, (absmax,), (50, 320), torch.empty(7, 50).bfloat16())))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0], strict=True))


def test_rows_beyond_the_fused_ones_are_exactly_the_dense_product(monkeypatch):
    monkeypatch.setenv("MINITUNE_KERNELS", "cpu")
    packed, absmax = nf4.quantize(weights((48, 128), torch.bfloat16))
    x = torch.randn(200, 128).bfloat16()
    weight = nf4.dequantize(packed, absmax, (48, 128), torch.bfloat16)
    assert torch.equal(nf4.matmul(x, packed, absmax, (48, 128)), torch.nn.functional.linear(x, weight))


# The choice of a backend


def test_a_backend_that_was_asked_for_and_does_not_run_is_an_error(monkeypatch):
    monkeypatch.setenv("MINITUNE_KERNELS", "cuda")
    with pytest.raises(ValueError, match="MINITUNE_KERNELS=cuda does not run on cpu: "):
        nf4.quantize(torch.ones(4, 64))
    monkeypatch.setenv("MINITUNE_KERNELS", "fast")
    with pytest.raises(ValueError, match="MINITUNE_KERNELS is 'fast', expected torch, cpu, triton, cuda"):
        nf4.quantize(torch.ones(4, 64))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("gcc"), reason="needs gcc for the path of libasan")
def test_the_c_kernels_are_clean_under_sanitizers(tmp_path):
    flags = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-DEMULATE_AMX")
    runtime = subprocess.run(["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    highest = nf4_cpu.library()[1]
    level = 4 if highest >= 3 else highest  # AMX is emulated
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("sanitized.py")), str(built.build(level, flags)), str(level)],
        capture_output=True,
        text=True,
        env={**os.environ, "LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "2"},
    )
    assert done.returncode == 0 and done.stdout.strip() == "clean", done.stdout + done.stderr[-3000:]
