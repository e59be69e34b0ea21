"""The CUDA kernels of NF4: their values, on a CPU under cuda_shim.h and on a GPU if there is one; their builds by NVRTC; and the
launcher, with a fake driver library."""

import contextlib
import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from minitune_kernels import built, nf4, nf4_cuda, nf4_reference, nvrtc
from minitune_kernels.cuda_driver import Driver

TESTS = Path(__file__).resolve().parent
CPU = torch.device("cpu")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
NAMES = {f"{operation}_{dtype}" for operation in nf4_cuda.OPERATIONS for dtype in nf4_cuda.DTYPES.values()}
FAKE_STREAM = 0x5EED
STALE = "the stored cubins are stale: run python -m minitune_kernels.nvrtc"
VERBOSE = "--ptxas-options=-v"  # ptxas then says what it did
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover")


def build_fake(path, *options):
    if shutil.which("g++") is None:
        pytest.skip("needs g++ to run the kernels on the CPU")
    flags = "-std=c++17 -O1 -shared -fPIC -ffp-contract=off -Wall -Wno-unknown-pragmas".split()
    include = f"-I{nvrtc.FOLDER}"
    subprocess.run(["g++", *flags, *options, include, TESTS / "fake_cuda.cpp", "-o", path], check=True)
    return path


@pytest.fixture(scope="session")
def fake_library(tmp_path_factory):
    """A libcuda whose kernels run on the CPU."""
    given = os.environ.get("MINITUNE_FAKE_CUDA")  # set by the test that repeats this file under sanitizers
    return given or build_fake(tmp_path_factory.mktemp("fake") / "libfakecuda.so")


@pytest.fixture
def fake(fake_library, monkeypatch, tmp_path):
    """Replaces the driver, and the functions of torch.cuda that are called: the chip is an sm_70.

    Each test loads its own copy of the library: values left by an earlier test in shared memory could hide a missing barrier."""
    driver = Driver(shutil.copy(fake_library, tmp_path))
    monkeypatch.setattr(nf4_cuda, "driver", lambda: driver)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=FAKE_STREAM))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    nf4_cuda.functions.cache_clear()
    yield driver
    nf4_cuda.functions.cache_clear()


@pytest.fixture
def gpu():
    device = torch.device("cuda", 0)
    if reason := nf4_cuda.why_not(device):
        pytest.skip(reason)
    return device


@pytest.fixture(params=["shim", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request):
    """Where the kernels run: on CPU tensors through the fake driver, or on a real GPU."""
    if request.param == "gpu":
        return request.getfixturevalue("gpu")
    request.getfixturevalue("fake")
    return CPU


def random(*shape, dtype=torch.float32, seed=0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.05).to(dtype)


def awkward(*shape, dtype):
    """Random values, but the first blocks hold zeros, ties, NaN, infinities, the smallest and the largest numbers."""
    weight = random(*shape)
    code = torch.tensor(nf4.CODE)
    largest = torch.finfo(dtype).max
    rows = [
        [0.0] * 64,
        [-0.0] * 64,
        [1.0, *((code[:-1] + code[1:]) / 2).tolist()],
        [float("nan"), 1.0, -1.0],
        [-float("nan"), 0.0],
        [float("inf"), 1.0, -1.0],
        [-float("inf"), float("inf"), 0.0],
        [1e-39, -1e-40, *[0.0] * 62],
        [1e-45, *[0.0] * 63],
        [largest, -largest, largest / 3],
    ]
    flat = weight.view(-1)
    for start, row in zip(range(0, flat.numel(), 64), rows, strict=False):
        part = flat[start : start + len(row)]
        part.copy_(torch.tensor(row)[: part.numel()])
    return weight.to(dtype)


def same(actual, expected):
    """Equal bits, but any NaN equals any NaN: its bits depend on the chip, and on a CPU on the instruction."""
    actual = actual.to(expected.device)
    ints = {4: torch.int32, 2: torch.int16}[expected.element_size()]
    whole = lambda tensor: tensor.view(ints).masked_fill(tensor.isnan(), -1)
    return actual.dtype == expected.dtype and torch.equal(whole(actual), whole(expected))


def shifted(tensor, elements):
    """The same values, at an address `elements` elements after an aligned one."""
    room = torch.empty(tensor.numel() + elements, dtype=tensor.dtype, device=tensor.device)
    return room[elements:].view(tensor.shape).copy_(tensor)


def quantized(weight, double, device):
    """(packed, scales, absmax fp32) of the reference. packed and scales, as a backend takes them, are on `device`."""
    packed, absmax = nf4_reference.quantize(weight)
    scales = (absmax,)
    if double:
        scales = nf4_reference.double_quantize(absmax)
        absmax = nf4_reference.double_dequantize(*scales)
    return packed.to(device), tuple(scale.to(device) for scale in scales), absmax


# Values


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 21), (7, 9), (1, 64), (130,), (5, 53), (33, 40), (16, 64), (19, 61)])
def test_quantize_gives_the_bits_of_the_reference(device, shape, dtype):
    for weight in (random(*shape, dtype=dtype), awkward(*shape, dtype=dtype)):
        for given in (weight.to(device), shifted(weight.to(device), 1)):
            packed, absmax = nf4_cuda.quantize(given)
            expected_packed, expected_absmax = nf4_reference.quantize(weight)
            assert torch.equal(packed.cpu(), expected_packed)
            assert same(absmax, expected_absmax)


def test_quantize_multiplies_a_whole_block_and_divides_a_short_one_as_the_reference(device):
    weight = torch.zeros(64)
    weight[0], weight[1] = float.fromhex("0x1.12a8bcp-1"), float.fromhex("0x1.40d126p-3")  # see test_nf4.py
    assert nf4_cuda.quantize(weight.to(device))[0][0] == 0xFB
    assert nf4_cuda.quantize(weight[:10].to(device))[0][0] == 0xFA


@pytest.mark.parametrize("double", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 21), (5, 53), (130,), (64, 64), (65, 64), (3, 4100)])
def test_dequantize_gives_the_bits_of_the_reference(device, shape, dtype, double):
    weight = random(*shape) if double else awkward(*shape, dtype=torch.float32)
    packed, scales, absmax = quantized(weight, double, device)
    expected = nf4_reference.dequantize(packed.cpu(), absmax, torch.empty(shape, dtype=dtype))
    for packed_shift, out_shift in ((0, 0), (1, 0), (2, 0), (0, 1), (3, 1)):
        out = shifted(torch.full(shape, 9.0, dtype=dtype, device=device), out_shift)
        assert nf4_cuda.dequantize(shifted(packed, packed_shift), scales, out) is out
        assert same(out, expected)


@pytest.mark.parametrize("dtype", FLOATS)
def test_dequantize_keeps_the_nan_of_the_reference_that_double_quantisation_spreads(device, dtype):
    q = torch.arange(256, dtype=torch.uint8).repeat(2)
    packed = torch.arange(512 * 32, dtype=torch.int32).to(torch.uint8)
    for bad in (float("nan"), -float("nan"), float("inf")):
        scales = q, torch.tensor([1.0, bad]), nf4_reference.dynamic_map(CPU), torch.tensor(0.1)
        expected = torch.empty(512, 64, dtype=dtype)
        nf4_reference.dequantize(packed, nf4_reference.double_dequantize(*scales), expected)
        out = torch.empty(512, 64, dtype=dtype, device=device)
        nf4_cuda.dequantize(packed.to(device), tuple(scale.to(device) for scale in scales), out)
        assert same(out, expected) and expected.isnan().any()


def assert_product(out, x, weight):
    """out == x @ weight.T up to the rounding of fp32 sums and of out. weight: the fp32 products."""
    exact = x.double() @ weight.double().T
    terms = x.double().abs() @ weight.double().abs().T
    # Roundings of a sum: 8 products of a lane, one for each step of 256 along the row, 5 in the warp's reduction; 2 to spare.
    roundings = 8 + -(-x.shape[1] // 256) + 5 + 2
    half_step = torch.finfo(out.dtype).eps / 2
    bound = terms * roundings * 2**-24 + exact.abs() * half_step + torch.finfo(out.dtype).smallest_normal
    assert ((out.cpu().double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("double", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(1, 64), (7, 320), (18, 1088), (9, 2112)])
def test_matmul_is_the_product_with_the_weight_of_the_reference(device, shape, dtype, double):
    packed, scales, absmax = quantized(random(*shape), double, device)
    weight = nf4_reference.dequantize(packed.cpu(), absmax, torch.empty(shape))
    assert nf4_cuda.max_rows(shape, dtype) == 8
    for rows in range(1, 9):
        x = random(rows, shape[1], dtype=dtype, seed=rows) * 20
        room = torch.full((rows + 1, shape[0]), 9.0, dtype=dtype, device=device)
        out = room[:rows]
        assert nf4_cuda.matmul(x.to(device), packed, scales, shape, out) is out
        assert_product(out, x, weight)
        assert (room[rows] == 9).all()  # nothing is written after the last row


@pytest.mark.parametrize("double", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_row_of_matmul_has_the_same_bits_whatever_rows_come_along(device, dtype, double):
    packed, scales, _ = quantized(random(6, 1344), double, device)
    x = random(8, 1344, dtype=dtype).to(device)

    def product(x):
        return nf4_cuda.matmul(x, packed, scales, (6, 1344), torch.empty(len(x), 6, dtype=dtype, device=device))

    together = product(x)
    for first, last in ((0, 1), (5, 6), (1, 3), (2, 6), (1, 8)):
        assert same(product(x[first:last]), together[first:last].cpu())


@pytest.mark.parametrize("dtype", FLOATS)
def test_matmul_of_pointers_that_are_not_aligned_is_the_product_of_the_reference(device, dtype):
    packed, scales, absmax = quantized(random(6, 128), False, device)
    weight = nf4_reference.dequantize(packed.cpu(), absmax, torch.empty(6, 128))
    x = random(2, 128, dtype=dtype)
    for packed_shift, x_shift in ((1, 0), (4, 0), (0, 1), (8, 2)):
        out = torch.empty(2, 6, dtype=dtype, device=device)
        nf4_cuda.matmul(shifted(x.to(device), x_shift), shifted(packed, packed_shift), scales, (6, 128), out)
        assert_product(out, x, weight)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_matmul_gives_nan_where_the_reference_does(device, bad):
    weight = random(5, 128)
    weight[1, 70], weight[4, 3] = bad, bad
    packed, scales, absmax = quantized(weight, False, device)
    x = random(3, 128)
    x[2, 100] = bad
    out = torch.empty(3, 5, device=device)
    nf4_cuda.matmul(x.to(device), packed, scales, (5, 128), out)
    expected = x @ nf4_reference.dequantize(packed.cpu(), absmax, torch.empty(5, 128)).T
    assert torch.equal(out.cpu().isnan(), expected.isnan()) and out[:2, [0, 2, 3]].isfinite().all()


def test_an_empty_weight_gives_what_the_reference_gives(device):
    packed, absmax = nf4_cuda.quantize(torch.empty(0, 64, device=device))
    assert packed.shape == (0,) and absmax.shape == (0,)
    assert nf4_cuda.dequantize(packed, (absmax,), torch.empty(0, 64, device=device)).shape == (0, 64)
    x, no_columns = torch.ones(2, 64, device=device), torch.empty(2, 0, device=device)
    assert nf4_cuda.matmul(x, packed, (absmax,), (0, 64), no_columns).shape == (2, 0)
    out = torch.ones(2, 3, device=device)
    assert not nf4_cuda.matmul(no_columns, packed, (absmax,), (3, 0), out).any()


def test_rows_of_another_length_than_whole_blocks_have_no_fused_matmul():
    assert nf4_cuda.max_rows((64, 96), torch.float16) == 0 and nf4_cuda.max_rows((96, 64), torch.float16) == 8


def sanitizer(name):
    command = ["g++", f"-print-file-name={name}"]
    path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not Path(path).is_absolute():
        pytest.skip(f"g++ comes without {name}")
    return path


@pytest.fixture(scope="session")
def sanitized(tmp_path_factory):
    """The environment in which a Python process runs the kernels on the CPU under the sanitizers."""
    library = build_fake(tmp_path_factory.mktemp("sanitized") / "libfakecuda.so", *SANITIZE)
    # The stack checks do not know fibers. Leaks are not checked: Python frees little when it ends.
    return os.environ | {
        "MINITUNE_FAKE_CUDA": str(library),
        "LD_PRELOAD": f"{sanitizer('libasan.so')} {sanitizer('libubsan.so')}",
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
    }


def test_every_value_test_passes_under_the_address_and_undefined_behaviour_sanitizers(sanitized):
    argv = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "not gpu", "-k", "reference", __file__]
    # No plugins and no conftest.py: under the sanitizers their imports take longer than the tests.
    environment = sanitized | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*argv, "--noconftest"], env=environment, capture_output=True, text=True, cwd=TESTS.parent)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]


def test_the_sanitizers_see_a_read_beyond_the_end(sanitized):
    code = """
import ctypes, os
from minitune_kernels.cuda_driver import Driver
driver = Driver(os.environ["MINITUNE_FAKE_CUDA"])
function = driver.load(b"\\x7fELF", ["dequantize_float32"])["dequantize_float32"]
packed, absmax, out = (ctypes.create_string_buffer(size) for size in (PACKED, 4096, 8192))
driver.launch(function, 1, 128, 0, [*map(ctypes.addressof, (packed, absmax, out)), 2048])
print("done")
"""
    run = lambda size: subprocess.run(
        [sys.executable, "-c", code.replace("PACKED", size)], env=sanitized, capture_output=True, text=True
    )
    good, bad = run("1024"), run("1023")
    assert good.stdout == "done\n", good.stderr
    assert bad.returncode != 0 and "heap-buffer-overflow" in bad.stderr


# Builds by NVRTC


@pytest.fixture(scope="module")
def compiler():
    found = [compiler for compiler in nvrtc.compilers() if compiler.version == nvrtc.RECIPE_VERSION]
    if not found:
        pytest.skip(f"needs NVRTC {nvrtc.RECIPE_VERSION}: pip install minitune[test]")
    return found[0]


def spills_nothing(log):
    """Whether a verbose log of ptxas names every kernel, each without a stack."""
    stacks = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert set(re.findall(r"Compiling entry function '(\w+)'", log)) == NAMES
    return len(stacks) >= len(NAMES) and set(stacks) == {("0", "0", "0")}


def test_the_stored_cubins_were_built_from_this_source():
    record = json.loads((nvrtc.CUBINS / nvrtc.RECORD).read_text())
    assert record == {"nvrtc": nvrtc.RECIPE_VERSION, "source_sha256": nvrtc.source_hash()}, STALE


def test_the_recipe_writes_the_stored_files_byte_for_byte_and_no_kernel_spills(compiler, tmp_path, monkeypatch):
    logs, build = [], nvrtc.Nvrtc.build

    def verbose(self, source, architecture):
        image, log = build(self, source, architecture, (*nvrtc.OPTIONS, VERBOSE))
        logs.append(log)
        return image, log

    monkeypatch.setattr(nvrtc.Nvrtc, "build", verbose)
    nvrtc.main(tmp_path)
    content = lambda folder: {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len(content(tmp_path)) == 3 and content(tmp_path) == content(nvrtc.CUBINS), STALE
    assert len(logs) == len(nvrtc.STORED) and all(map(spills_nothing, logs))


def test_every_kernel_builds_without_spills_on_a_chip_whose_cubin_is_not_stored(compiler):
    image, log = compiler.build(nvrtc.SOURCE.read_text(), "sm_90", (*nvrtc.OPTIONS, VERBOSE))
    assert image.startswith(b"\x7fELF") and spills_nothing(log)


def test_a_source_that_does_not_build_is_refused_with_the_log(compiler):
    with pytest.raises(RuntimeError, match=r"does not build nf4.cu for sm_80:(.|\n)*no_such_name"):
        compiler.build("__global__ void k() { no_such_name(); }", "sm_80")


# The cache of cubins for other chips

TINY_KERNEL = 'extern "C" __global__ void k(float* x) { x[threadIdx.x] = 1; }'


@pytest.fixture
def cache(compiler, monkeypatch, tmp_path):
    """A small source, an empty cache folder, and the list of the architectures that were built since."""
    (tmp_path / "nf4.cu").write_text(TINY_KERNEL)
    monkeypatch.setattr(nvrtc, "SOURCE", tmp_path / "nf4.cu")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    built, build = [], nvrtc.Nvrtc.build

    def count(self, source, architecture, *options):
        built.append(architecture)
        return build(self, source, architecture, *options)

    monkeypatch.setattr(nvrtc.Nvrtc, "build", count)
    return SimpleNamespace(folder=tmp_path / "cache" / "minitune", source=tmp_path / "nf4.cu", built=built)


def test_a_chip_without_a_stored_cubin_has_it_built_once_and_kept(cache):
    image = nvrtc.cubin("sm_90")
    assert image.startswith(b"\x7fELF") and nvrtc.cubin("sm_90") == image and cache.built == ["sm_90"]
    (kept,) = cache.folder.iterdir()
    assert kept.read_bytes() == image
    cache.source.write_text(TINY_KERNEL.replace("1", "2"))
    assert nvrtc.cubin("sm_90") != image and cache.built == ["sm_90"] * 2
    assert nvrtc.cubin("sm_86") != image and len(list(cache.folder.iterdir())) == 3


def test_a_stored_cubin_needs_no_nvrtc(monkeypatch):
    monkeypatch.setattr(nvrtc, "compilers", lambda: [])
    assert nvrtc.cubin("sm_72") == nvrtc.cubin("sm_70") != nvrtc.cubin("sm_75")
    assert nvrtc.why_not("sm_70") is None and nvrtc.why_not("sm_75") is None


def test_a_cache_folder_that_cannot_be_written_is_reported_and_the_kernels_run(cache, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.source))  # a file in the way
    built.tell.cache_clear()
    image = nvrtc.cubin("sm_90")
    assert image.startswith(b"\x7fELF")
    assert "built kernels are not kept in" in capsys.readouterr().err


# The launcher and the choice


def test_a_launch_goes_to_the_stream_and_the_device_that_are_current(fake, monkeypatch):
    entered = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: entered.append(device) or contextlib.nullcontext())
    nf4_cuda.quantize(torch.ones(64))
    fake._library.fake_last_stream.restype = ctypes.c_void_p
    assert fake._library.fake_last_stream() == FAKE_STREAM and entered == [CPU]


def test_a_thread_without_a_context_gets_torchs(fake):
    results = []
    for _ in range(2):  # the first loads the kernels, the second only launches
        thread = threading.Thread(target=lambda: results.append(nf4_cuda.quantize(torch.ones(64))[0]))
        thread.start()
        thread.join()
    assert [result.tolist() for result in results] == [[0xFF] * 32] * 2


def test_errors_of_the_driver_are_one_clear_line(fake):
    with pytest.raises(RuntimeError, match="^a cubin: CUDA error 200, device kernel image is invalid$"):
        fake.load(b"no ELF", [])
    image = nvrtc.cubin("sm_70")
    with pytest.raises(RuntimeError, match="^kernel missing: CUDA error 500, named symbol not found$"):
        fake.load(image, ["missing"])
    function = fake.load(image, ["quantize_float32"])["quantize_float32"]
    with pytest.raises(RuntimeError, match="^a launch of 0 x 128 threads: CUDA error 1, invalid argument$"):
        fake.launch(function, 0, 128, 0, [0, 0, 0, 0])
    with pytest.raises(OSError, match="libnothere"):
        Driver("libnothere.so")


def test_why_not_says_what_is_missing(fake_library, monkeypatch):
    def missing():
        raise OSError("libcuda.so.1: cannot open shared object file")

    cuda = torch.device("cuda", 0)
    assert nf4_cuda.why_not(torch.device("cpu")) == "device is cpu, expected cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert nf4_cuda.why_not(cuda) == "torch sees no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(nf4_cuda, "driver", missing)
    assert nf4_cuda.why_not(cuda).startswith("the NVIDIA driver library cannot be loaded: libcuda.so.1")
    monkeypatch.setattr(nf4_cuda, "driver", lambda: Driver(fake_library))
    for compilers, reason in (
        ([], "no cubin is stored for sm_90 and NVRTC is not installed: pip install nvidia-cuda-nvrtc-cu12"),
        ([SimpleNamespace(version="11.0", architectures=["sm_80"])], "NVRTC 11.0 does not build for sm_90"),
        ([SimpleNamespace(version="12.9", architectures=["sm_90"])], None),
    ):
        monkeypatch.setattr(nvrtc, "compilers", lambda compilers=compilers: compilers)
        found = nf4_cuda.why_not(cuda)
        assert found == reason or reason is not None and found.startswith(reason)


# On a GPU only


@pytest.mark.gpu
def test_a_cuda_graph_replays_on_new_values(gpu):
    weights = [random(32, 128, seed=seed) for seed in range(2)]
    packed, scales, _ = quantized(weights[0], False, gpu)
    x = random(1, 128, dtype=torch.float16).to(gpu)
    dense, out = (torch.empty(shape, dtype=torch.float16, device=gpu) for shape in ((32, 128), (1, 32)))

    def run():
        nf4_cuda.dequantize(packed, scales, dense)
        nf4_cuda.matmul(x, packed, scales, (32, 128), out)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    new_packed, (new_absmax,), _ = quantized(weights[1], False, gpu)
    packed.copy_(new_packed)
    scales[0].copy_(new_absmax)
    graph.replay()
    captured = dense.clone(), out.clone()
    run()
    assert torch.equal(captured[0], dense) and torch.equal(captured[1], out)


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31_elements_are_right(gpu):
    rows, columns = 2**17 + 3, 2**14  # 2.1 G elements: 1 GB packed, 4.3 GB in fp16
    packed = torch.zeros(rows * columns // 2, dtype=torch.uint8, device=gpu)
    absmax = torch.ones(rows * columns // 64, device=gpu)
    packed[-columns // 2 :], absmax[-columns // 64 :] = 0xFF, 2.0
    dense = torch.empty(rows, columns, dtype=torch.float16, device=gpu)
    nf4_cuda.dequantize(packed, (absmax,), dense)
    assert (dense[-1] == 2).all() and (dense[-2] == -1).all()
    out = torch.empty(1, rows, device=gpu)
    nf4_cuda.matmul(torch.ones(1, columns, device=gpu), packed, (absmax,), (rows, columns), out)
    assert out[0, -1] == 2 * columns and (out[0, :-1] == -columns).all()
    again_packed, again_absmax = nf4_cuda.quantize(dense)
    assert torch.equal(again_packed, packed) and torch.equal(again_absmax, absmax)
