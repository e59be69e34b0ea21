"""NF4: the bits of bitsandbytes, the layer around them, and its checkpoint format."""

import copy
import hashlib
import json
import threading

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from minitune_kernels import nf4, nf4_reference
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from minitune.quant import BNB_STATE, NF4Linear, is_bnb_4bit, unknown_keys

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
CPU = torch.device("cpu")
WIDEST_HALF_STEP = (1.0 - 0.6961928009986877) / 2


@pytest.fixture(scope="module")
def bnb():
    return pytest.importorskip("bitsandbytes", reason="compares with bitsandbytes: pip install minitune[test]")


@pytest.fixture
def specification(monkeypatch):
    """The torch backend: the same products of the same bits as a dense layer, whatever the number of rows."""
    monkeypatch.setenv("MINITUNE_KERNELS", "torch")


def random_weight(*shape, dtype=torch.float32, seed=0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.05).to(dtype)


def bits(tensor):
    """Equal bits, not equal values: NaN equals itself and 0 is not -0."""
    return bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist())


def digest(tensor):
    return hashlib.sha256(bits(tensor)).hexdigest()[:16]


def as_suffixes(stored, prefix):
    """{"P.weight": .., "P.weight.absmax": ..} -> {"weight": .., "absmax": ..}, without the bias."""
    keys = {key: key.removeprefix(f"{prefix}.").removeprefix("weight.") for key in stored if key != f"{prefix}.bias"}
    return {short: stored[key] for key, short in keys.items()}


# Frozen vectors, made with bitsandbytes 0.50.2 on a CPU, so that the claim holds where it is not installed.


def sample_weight():
    """265 exact values: four blocks of falling scale (one all zero, one with every tie) and an odd rest of 9."""
    i = torch.arange(265)
    x = ((i * 40503 + 12345) % 65536 - 32768).float() / 2.0**15 * 2.0 ** -(i // 64).float()
    x[64:128] = 0
    code = torch.tensor(nf4.CODE)
    x[128], x[129:144] = 0.25, (code[:-1] + code[1:]) / 2 * 0.25
    return x.view(5, 53)


START = "1d50b3e71c4fa2e61c3f81d50a2e71c4f92d60b3e81d4fa2e61c3f91d50b2e71" + "77" * 32
END = (
    "1d50b3e71c4f92e60b3e81d50a2e71c4f92d60b3e81d4fa2e61c3f81d50b2e71c4f92e60b3e81d50a2e71c4f"
    "91d50b3e71d4fa2e60c3f81d50a2e71c47"
)
FROZEN = {  # dtype of the weight -> packed, bits of absmax, digests of it dequantised to fp32, fp16, bf16
    torch.float32: (
        START + "f0123456789abcde" + END,
        (0x3F7FC800, 0x0, 0x3E800000, 0x3DFBBC00, 0x3D752000),
        ("5116c691633509f1", "a64e80ffbf9085f3", "bfc4dc226c88452f"),
    ),
    torch.float16: (
        START + "f0134456889accde" + END,
        (0x3F7FC000, 0x0, 0x3E800000, 0x3DFBC000, 0x3D752000),
        ("2a243d826d0c7a32", "dc3b1f3ea57f7b61", "3617422ede6a44f4"),
    ),
    torch.bfloat16: (
        START + "f1223567889bbcef" + END,
        (0x3F800000, 0x0, 0x3E800000, 0x3DFC0000, 0x3D750000),
        ("13d819d53d731cd4", "b9a123f120e0f4e3", "dcf5f4efeb2b0d7b"),
    ),
}
FROZEN_Q = (
    "00edddcebc3e2e1e0ffcecddcdb93d2d1e0efbecdcccb63c2d1d0dfbebdcccb33c2c1d0dfaebdbcbb03b2c1c0cfaeadacbad"
    "3b2b1b0cf9e9dacaab3a2a1b0bf9e9d9caa8392a1a0bf8e8d9c9a539291a0af7e8d8c8a238291909f7e7d7c89f38281809f6"
    "e7d7c79237281808f6e6d6c76837271708f5e5d6c65e36261707f4e5d5c55b35261606f4e4d5c55835251606f3e4d4c45634"
    "251505f3e3d3c45334241405f2e2d3c35033231404f2e2d2c34d33231304f1e1d2c24a32221303f0e1d1c14731221202f0e0"
    "d0c14431211102efe0d0c04130211101efdfcfc03f30201001eedecfbf3f2f1f1000eddecebe3e2e1f0f00edddcebc3e2e1e"
    "0ffcecddcdb93c2c1c0bffeedecdb73c2b1b0bfeeeddcdb43b2b1b0afdedddccb13b2a1a0afdecdcccae3a2a1909fcecdbcb"
)


@pytest.mark.parametrize("dtype", FLOATS)
def test_quantize_gives_the_frozen_bits_of_bitsandbytes(dtype):
    packed, absmax = nf4.quantize(sample_weight().to(dtype))
    expected_packed, expected_absmax, _ = FROZEN[dtype]
    assert bytes(packed.tolist()).hex() == expected_packed
    assert absmax.dtype == torch.float32 and absmax.view(torch.int32).tolist() == list(expected_absmax)


@pytest.mark.parametrize("dtype", FLOATS)
def test_dequantize_gives_the_frozen_bits_of_bitsandbytes(dtype):
    packed, absmax, digests = FROZEN[dtype]
    packed = torch.tensor(list(bytes.fromhex(packed)), dtype=torch.uint8)
    absmax = torch.tensor(absmax, dtype=torch.int32).view(torch.float32)
    assert tuple(digest(nf4.dequantize(packed, absmax, (5, 53), to)) for to in FLOATS) == digests


def test_double_quantisation_gives_the_frozen_bits_of_bitsandbytes():
    absmax = ((torch.arange(300) * 40503 + 7) % 4096 + 1).float() / 4096
    q, absmax2, code2, offset = nf4.double_quantize(absmax)
    assert bytes(q.tolist()).hex() == FROZEN_Q
    assert absmax2.tolist() == [0.5071012377738953, 0.48459798097610474] and offset.item() == 0.5085660815238953
    # torch.linspace, which the map is made with on both sides, rounds once where the CPU has FMA and twice elsewhere.
    digests = digest(code2), digest(nf4.double_dequantize(q, absmax2, code2, offset))
    assert digests in (("e732639a65f497b4", "1412a2ea2d262ecc"), ("dad4c269c3243d17", "673c959f90be5a57"))


# Against bitsandbytes itself


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(512, 768), (33, 40), (1, 64), (7, 9), (1, 1), (3, 21), (130,)])
def test_quantize_equals_bitsandbytes(bnb, shape, dtype):
    weight = random_weight(*shape, dtype=dtype)
    theirs, state = bnb.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    packed, absmax = nf4.quantize(weight)
    assert torch.equal(packed, theirs.view(-1)) and torch.equal(absmax, state.absmax)


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
}


@pytest.mark.parametrize("length", [64, 17], ids=["whole block", "short block"])
@pytest.mark.parametrize("name", SPECIAL)
def test_extreme_values_are_stored_as_bitsandbytes_stores_them(bnb, name, length):
    weight = torch.tensor([0.25, -1.0] * 32 + SPECIAL[name][:length])
    theirs, state = bnb.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    packed, absmax = nf4.quantize(weight)
    assert bits(packed) == bits(theirs)
    same_nan = [t.nan_to_num(12345.0, torch.inf) for t in (absmax, state.absmax)]  # which NaN, torch's max leaves open
    assert bits(same_nan[0]) == bits(same_nan[1])


def test_nan_and_infinity_stay_in_their_block_and_show_when_dequantised():
    weight = torch.full((3, 64), 0.5)
    weight[0, 3], weight[1, 5] = float("nan"), -float("inf")
    back = nf4.dequantize(*nf4.quantize(weight), (3, 64), torch.float32)
    assert back[0].isnan().all() and torch.equal(back[2], weight[2])
    assert back[1, 5].isinf() and back[1].isnan().sum() == 63


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "double"])
def test_dequantize_equals_bitsandbytes(bnb, dtype, nested):
    # Rows of a multiple of 64: bitsandbytes 0.50 on a CPU reads others wrongly. The frozen vectors have an odd row.
    weight = random_weight(300, 256, dtype=dtype)
    theirs, state = bnb.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=nested)
    absmax = state.absmax
    if nested:
        absmax = nf4.double_dequantize(absmax, state.state2.absmax, state.state2.code, state.offset)
    for to in FLOATS:
        state.dtype = to
        expected = bnb.functional.dequantize_4bit(theirs, state)
        assert torch.equal(nf4.dequantize(theirs, absmax, (300, 256), to), expected)


@pytest.mark.parametrize("count", [1, 255, 256, 257, 5000])
def test_double_quantize_equals_bitsandbytes(bnb, count):
    _, absmax = nf4.quantize(random_weight(count, 64))
    offset = absmax.mean()
    theirs, state = bnb.functional.quantize_blockwise(absmax - offset, blocksize=256)
    q, absmax2, code2, ours = nf4.double_quantize(absmax)
    assert torch.equal(q, theirs) and torch.equal(absmax2, state.absmax) and torch.equal(code2, state.code)
    assert torch.equal(ours, offset)


def test_double_quantisation_keeps_absmax_values_that_are_all_equal():
    absmax = torch.full((600,), 0.25)
    assert torch.equal(nf4.double_dequantize(*nf4.double_quantize(absmax)), absmax)


# Invariants of the format


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 70), st.sampled_from(FLOATS), st.integers(0, 2**31), st.floats(1e-4, 1e3))
def test_any_shape_comes_back_within_half_the_widest_code_step(rows, columns, dtype, seed, scale):
    weight = (random_weight(rows, columns, seed=seed) * scale).to(dtype)
    n = weight.numel()
    packed, absmax = nf4.quantize(weight)
    assert packed.shape == ((n + 1) // 2,) and absmax.shape == (-(-n // 64),)
    assert n % 2 == 0 or packed[-1] & 15 == 7
    back = nf4.dequantize(packed, absmax, weight.shape, torch.float32)
    bound = absmax.repeat_interleave(64)[:n].view(weight.shape) * WIDEST_HALF_STEP
    assert ((back - weight.float()).abs() <= bound * (1 + 1e-6)).all()  # 1e-6: the fp32 rounding of scale and product
    again, absmax_again = nf4.quantize(back)  # a code value is its own nearest
    assert torch.equal(again, packed) and torch.equal(absmax_again, absmax)


def test_table_search_counts_the_midpoints_below_every_float_around_them():
    midpoints = nf4_reference.tables(CPU)[1]
    around = midpoints.view(torch.int32).unsqueeze(1) + torch.arange(-70_000, 70_000, dtype=torch.int32)
    special = torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, float("nan"), -float("nan")])
    values = torch.cat([around.view(-1).view(torch.float32), torch.linspace(-1, 1, 100_001), special])
    assert torch.equal(nf4_reference.nearest(values), torch.bucketize(values, midpoints).to(torch.uint8))


def test_a_tie_between_two_code_values_goes_down():
    code = torch.tensor(nf4.CODE)
    weight = torch.cat([torch.ones(1), (code[:-1] + code[1:]) / 2])  # absmax 1: the midpoints stay exact
    packed, _ = nf4.quantize(weight)
    assert bytes(packed.tolist()).hex() == "f0123456789abcde"


def test_a_whole_block_is_multiplied_by_the_reciprocal_and_a_short_one_is_divided():
    # The two differ here by one rounding, across a midpoint. bitsandbytes 0.50.2 on a CPU gives fb and fa.
    weight = torch.zeros(64)
    weight[0], weight[1] = float.fromhex("0x1.12a8bcp-1"), float.fromhex("0x1.40d126p-3")
    assert nf4.quantize(weight)[0][0] == 0xFB and nf4.quantize(weight[:10])[0][0] == 0xFA


def test_slabs_do_not_show_in_the_result(monkeypatch):
    weight = random_weight(37, 41, dtype=torch.bfloat16)
    packed, absmax = nf4.quantize(weight)
    back = nf4.dequantize(packed, absmax, weight.shape, torch.bfloat16)
    monkeypatch.setattr(nf4_reference, "slab_blocks", lambda device: 3)
    packed_slabs, absmax_slabs = nf4.quantize(weight)
    assert torch.equal(packed_slabs, packed) and torch.equal(absmax_slabs, absmax)
    assert torch.equal(nf4.dequantize(packed, absmax, weight.shape, torch.bfloat16), back)


class LargestResult(TorchDispatchMode):
    """Records the bytes of the largest tensor that an operation returns, views aside."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not func.is_view:
            self.bytes = max(self.bytes, result.numel() * result.element_size())
        return result


def test_temporaries_do_not_grow_with_the_weight():
    weight = random_weight(2048, 4096, dtype=torch.bfloat16)  # 32 MiB in fp32, packed 4 MiB
    out = torch.empty_like(weight)
    with LargestResult() as largest:
        packed, absmax = nf4_reference.quantize(weight)
        nf4_reference.dequantize(packed, absmax, out)
    assert largest.bytes <= 4 << 20


def test_the_callers_tensors_are_not_written():
    weight = random_weight(3, 50)
    kept = weight.clone()
    packed, absmax = nf4.quantize(weight)
    kept_packed, kept_absmax = packed.clone(), absmax.clone()
    nf4.dequantize(packed, absmax, (3, 50), torch.float32)
    q, absmax2, code2, offset = nf4.double_quantize(absmax)
    nf4.double_dequantize(q, absmax2, code2, offset)
    nf4.matmul(random_weight(2, 50), packed, absmax, (3, 50))
    assert torch.equal(weight, kept) and torch.equal(packed, kept_packed) and torch.equal(absmax, kept_absmax)


def test_an_empty_weight_has_no_blocks():
    packed, absmax = nf4.quantize(torch.empty(0, 64))
    assert packed.shape == (0,) and absmax.shape == (0,)
    assert nf4.dequantize(packed, absmax, (0, 64), torch.float16).shape == (0, 64)


def test_dequantize_writes_into_out():
    packed, absmax = nf4.quantize(random_weight(6, 40))
    out = torch.full((6, 40), 9.0, dtype=torch.bfloat16)
    assert nf4.dequantize(packed, absmax, (6, 40), torch.bfloat16, out=out) is out
    assert torch.equal(out, nf4.dequantize(packed, absmax, (6, 40), torch.bfloat16))


PACKED, ABSMAX, X = torch.zeros(96, dtype=torch.uint8), torch.ones(3), torch.ones(2, 64)
BAD_INPUTS = {
    "weight is a list": lambda: nf4.quantize([1.0]),
    "weight has dtype torch.float64": lambda: nf4.quantize(torch.ones(4, dtype=torch.float64)),
    "weight has dtype torch.int8": lambda: nf4.quantize(torch.ones(4, dtype=torch.int8)),
    "weight of shape (64, 4) is not contiguous": lambda: nf4.quantize(torch.ones(4, 64).T),
    "weight is on the meta device": lambda: nf4.quantize(torch.ones(4, 64, device="meta")),
    "packed has dtype torch.int8": lambda: nf4.dequantize(PACKED.to(torch.int8), ABSMAX, (3, 64), torch.float32),
    "packed has 95 elements, expected 96": lambda: nf4.dequantize(PACKED[:95], ABSMAX, (3, 64), torch.float32),
    "packed of shape (96,) is not contiguous": lambda: nf4.dequantize(
        torch.zeros(192, dtype=torch.uint8)[::2], ABSMAX, (3, 64), torch.float32
    ),
    "absmax has 2 elements, expected 3": lambda: nf4.dequantize(PACKED, ABSMAX[:2], (3, 64), torch.float32),
    "absmax has dtype torch.bfloat16": lambda: nf4.dequantize(PACKED, ABSMAX.bfloat16(), (3, 64), torch.float32),
    "absmax is on the meta device": lambda: nf4.dequantize(PACKED, ABSMAX.to("meta"), (3, 64), torch.float32),
    "shape is (3.0, 64)": lambda: nf4.dequantize(PACKED, ABSMAX, (3.0, 64), torch.float32),
    "shape is 192": lambda: nf4.dequantize(PACKED, ABSMAX, 192, torch.float32),
    "dtype is torch.float64": lambda: nf4.dequantize(PACKED, ABSMAX, (3, 64), torch.float64),
    "out has dtype torch.float32": lambda: nf4.dequantize(
        PACKED, ABSMAX, (3, 64), torch.bfloat16, out=torch.empty(3, 64)
    ),
    "out has shape (64, 3)": lambda: nf4.dequantize(PACKED, ABSMAX, (3, 64), torch.float32, out=torch.empty(64, 3)),
    "out of shape (3, 64) is not contiguous": lambda: nf4.dequantize(
        PACKED, ABSMAX, (3, 64), torch.float32, out=torch.empty(64, 3).T
    ),
    "x has shape (2, 63)": lambda: nf4.matmul(X[:, :63], PACKED, ABSMAX, (3, 64)),
    "x has dtype torch.int64": lambda: nf4.matmul(X.long(), PACKED, ABSMAX, (3, 64)),
    "shape is (192,)": lambda: nf4.matmul(X, PACKED, ABSMAX, (192,)),
    "bias has 2 elements, expected 3": lambda: nf4.matmul(X, PACKED, ABSMAX, (3, 64), torch.ones(2)),
    "bias has shape (3, 1), expected (3,)": lambda: nf4.matmul(X, PACKED, ABSMAX, (3, 64), torch.ones(3, 1)),
    "absmax has 2 parts": lambda: nf4.matmul(X, PACKED, (PACKED[:3], ABSMAX), (3, 64)),
    "q has 2 elements, expected 3": lambda: nf4.matmul(
        X, PACKED, (PACKED[:2], ABSMAX[:1], torch.ones(256), torch.ones(())), (3, 64)
    ),
    "absmax has dtype torch.float16": lambda: nf4.double_quantize(ABSMAX.half()),
    "absmax has shape (0,)": lambda: nf4.double_quantize(ABSMAX[:0]),
    "q has dtype torch.float32": lambda: nf4.double_dequantize(ABSMAX, ABSMAX[:1], torch.ones(256), torch.ones(())),
    "absmax2 has 2 elements, expected 1": lambda: nf4.double_dequantize(
        PACKED, ABSMAX[:2], torch.ones(256), torch.ones(())
    ),
    "code2 has 16 elements, expected 256": lambda: nf4.double_dequantize(
        PACKED, ABSMAX[:1], torch.ones(16), torch.ones(())
    ),
    "offset has 3 elements, expected 1": lambda: nf4.double_dequantize(PACKED, ABSMAX[:1], torch.ones(256), ABSMAX),
}


@pytest.mark.parametrize("message", BAD_INPUTS)
def test_the_door_refuses_a_bad_input_by_name(message):
    with pytest.raises(ValueError) as error:
        BAD_INPUTS[message]()
    assert str(error.value).startswith(message)


# The workspace


def test_matmul_equals_linear_with_the_dequantised_weight(specification):
    for dtype in FLOATS:
        packed, absmax = nf4.quantize(random_weight(48, 64, dtype=dtype))
        weight = nf4.dequantize(packed, absmax, (48, 64), dtype)
        x, bias = random_weight(2, 3, 64, dtype=dtype, seed=1), random_weight(48, dtype=dtype, seed=2)
        assert torch.equal(nf4.matmul(x, packed, absmax, (48, 64)), F.linear(x, weight))
        assert torch.equal(nf4.matmul(x, packed, absmax, (48, 64), bias), F.linear(x, weight, bias))


def test_workspace_is_one_memory_that_grows_to_the_largest(monkeypatch):
    monkeypatch.setattr(nf4, "_buffers", {})
    with nf4.workspace((8, 64), torch.float32, CPU) as large:
        address = large.data_ptr()
    with nf4.workspace((4, 32), torch.float32, CPU) as small:
        assert small.data_ptr() == address and small.shape == (4, 32)
    with nf4.workspace((16, 64), torch.float32, CPU) as larger:
        assert larger.shape == (16, 64)
    with nf4.workspace((4, 32), torch.bfloat16, CPU) as other:
        assert other.dtype == torch.bfloat16
    assert {key: buffer.numel() for key, buffer in nf4._buffers.items()} == {
        (CPU, torch.float32): 1024,
        (CPU, torch.bfloat16): 128,
    }


def test_workspace_made_in_inference_mode_serves_training(monkeypatch):
    monkeypatch.setattr(nf4, "_buffers", {})
    layer = NF4Linear.from_weight(random_weight(8, 64), None, torch.float32)
    with torch.inference_mode():
        expected = layer(torch.ones(2, 64))
    x = torch.ones(2, 64, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert torch.equal(y, expected) and x.grad is not None


def test_threads_do_not_overwrite_each_others_weight(specification):
    layers = [NF4Linear.from_weight(random_weight(64, 256, seed=i), None, torch.float32) for i in range(3)]
    x = random_weight(4, 256, seed=9)
    expected = [F.linear(x, layer.dequantize()) for layer in layers]
    wrong = []

    def work(i):
        for _ in range(30):
            with torch.no_grad():
                if not torch.equal(layers[i](x), expected[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not wrong and not any(thread.is_alive() for thread in threads)


# NF4Linear


def layer_and_dense(dtype=torch.float32, double_quant=False, bias=True, out=48, seed=0):
    """An NF4Linear (in 64) and the nn.Linear with its dequantised weight."""
    given = torch.nn.Parameter(random_weight(out, seed=seed + 1, dtype=dtype)) if bias else None
    layer = NF4Linear.from_weight(random_weight(out, 64, dtype=dtype, seed=seed), given, dtype, double_quant)
    dense = torch.nn.Linear(64, out, bias=bias, dtype=dtype)
    dense.weight.data = layer.dequantize()
    if bias:
        dense.bias.data = given.data.clone()
    return layer, dense


INPUTS = {
    "(B, T, C)": lambda dtype: random_weight(2, 5, 64, dtype=dtype, seed=3),
    "(C,)": lambda dtype: random_weight(64, dtype=dtype, seed=3),
    "strided": lambda dtype: random_weight(64, 5, 2, dtype=dtype, seed=3).permute(2, 1, 0),
    "no rows": lambda dtype: torch.empty(2, 0, 64, dtype=dtype),
}


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", INPUTS)
def test_forward_and_gradients_equal_a_dense_layer_with_the_dequantised_weight(
    name, dtype, double_quant, specification
):
    layer, dense = layer_and_dense(dtype, double_quant)
    results = []
    for module in (layer, dense):
        x = INPUTS[name](dtype).requires_grad_()
        y = module(x)
        y.backward(random_weight(*y.shape, dtype=dtype, seed=4))
        results.append((y, x.grad, module.bias.grad))
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == dtype and ours.shape == theirs.shape
        if (
            name == "strided"
        ):  # torch may lay x out anew or add the bias later: another order of sums, with several threads
            torch.testing.assert_close(ours, theirs, rtol=0, atol=torch.finfo(dtype).eps * theirs.abs().max().item())
        else:
            assert torch.equal(ours, theirs)  # the same products of the same bits


def test_output_has_the_dtype_of_x_and_the_product_that_of_the_layer(specification):
    layer, dense = layer_and_dense(torch.bfloat16, bias=False)
    x = random_weight(3, 64, seed=5).requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert y.dtype == torch.float32 and x.grad.dtype == torch.float32
    assert torch.equal(y, dense(x.bfloat16()).float())


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double"])
def test_only_the_4_bit_weight_is_saved_for_backward(double_quant):
    layer, _ = layer_and_dense(double_quant=double_quant)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(random_weight(2, 64).requires_grad_())
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in layer.buffers()}
    assert all(t.numel() < layer.in_features * layer.out_features for t in saved)


def test_layers_that_share_the_workspace_have_their_own_gradients(specification):
    layers, dense = zip(*(layer_and_dense(out=64, seed=seed) for seed in (0, 10, 20)), strict=True)
    gradients = []
    for chain in (layers, dense):
        x = random_weight(7, 64, seed=6).requires_grad_()
        h = x
        for module in chain:
            h = F.silu(module(h)) + h
        h.square().sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def test_checkpointing_changes_nothing():
    layers = torch.nn.Sequential(*(layer_and_dense(out=64, seed=seed)[0] for seed in (0, 10)))
    gradients = []
    for run in (layers, lambda x: checkpoint(layers, x, use_reentrant=False)):
        x = random_weight(7, 64, seed=6).requires_grad_()
        run(x).square().sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def test_no_graph_is_built_where_nothing_requires_a_gradient():
    layer, _ = layer_and_dense(bias=False)
    assert layer(torch.ones(2, 64)).grad_fn is None
    assert not list(layer.parameters())


def test_the_output_may_be_written_in_place_as_lora_does():
    for rows in (2, 200):  # by a fused kernel, and by the library's
        layer, _ = layer_and_dense(bias=False)
        x = random_weight(rows, 64, seed=8).requires_grad_()
        layer(x).add_(1).square().sum().backward()
        torch.testing.assert_close(x.grad, 2 * (layer(x) + 1).detach() @ layer.dequantize())


def test_the_second_derivative_is_that_of_a_dense_layer(specification):
    seconds = []
    for module in layer_and_dense(bias=False):
        x = random_weight(2, 64, seed=7).requires_grad_()
        (grad,) = torch.autograd.grad(module(x).pow(3).sum(), x, create_graph=True)
        grad.square().sum().backward()
        seconds.append(x.grad)
    assert seconds[0].any() and torch.allclose(*seconds, rtol=1e-6)


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("cast", ["half", "bfloat16", "float"])
def test_a_cast_changes_the_compute_dtype_and_no_stored_bit(cast, double_quant):
    layer, _ = layer_and_dense(torch.bfloat16, double_quant)
    before = {name: (t.dtype, t.shape, bits(t)) for name, t in layer.named_buffers()}
    weight = layer.dequantize(torch.float32)
    dtype = torch.ones(1).to(getattr(torch, {"half": "float16", "float": "float32"}.get(cast, cast))).dtype
    for result in (getattr(layer, cast)(), layer.to(dtype)):
        assert {name: (t.dtype, t.shape, bits(t)) for name, t in result.named_buffers()} == before
        assert result.dtype == dtype and result.bias.dtype == dtype
        assert torch.equal(result.dequantize(torch.float32), weight)
        assert result(torch.ones(1, 64, dtype=dtype)).dtype == dtype


def test_a_cast_to_a_dtype_without_kernels_is_refused():
    layer, _ = layer_and_dense()
    with pytest.raises(ValueError, match="dtype is torch.float64"):
        layer.double()


def test_state_dict_copies_and_the_meta_device_keep_the_stored_bits():
    layer, _ = layer_and_dense(double_quant=True)
    empty = copy.deepcopy(layer).to("meta")
    assert all(t.is_meta for t in empty.state_dict().values()) and empty.absmax2.dtype == torch.float32
    other = empty.to_empty(device="cpu")
    other.load_state_dict(layer.state_dict())
    x = random_weight(2, 64)
    assert torch.equal(other(x), layer(x))


def test_layers_are_made_while_meta_is_the_default_device():
    weight = random_weight(4, 64)
    expected = NF4Linear.from_weight(weight, None, torch.float32, True).dequantize()
    for cached in (nf4_reference.tables, nf4_reference.halves, nf4_reference.dynamic_map):
        cached.cache_clear()
    with torch.device("meta"):
        layer = NF4Linear.from_weight(weight, None, torch.float32, True)
        again = NF4Linear.from_bnb(as_suffixes(layer.to_bnb("P"), "P"))
    assert torch.equal(layer.dequantize(), expected) and torch.equal(again.dequantize(), expected)


def test_a_weight_that_is_not_finite_is_refused():
    weight = random_weight(4, 64)
    weight[2, 3] = float("nan")
    with pytest.raises(ValueError, match=r"NaN or infinity in 1 of 4 blocks"):
        NF4Linear.from_weight(weight, None, torch.float32)
    with pytest.raises(ValueError, match=r"weight has shape \(64,\), expected \(out, in\)"):
        NF4Linear.from_weight(weight[0], None, torch.float32)


# bitsandbytes' checkpoints


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double"])
def test_a_stored_layer_comes_back_bit_for_bit(double_quant):
    layer, _ = layer_and_dense(torch.bfloat16, double_quant)
    stored = layer.to_bnb("model.layers.0.mlp.up_proj")
    assert stored["model.layers.0.mlp.up_proj.weight"].shape == (48 * 64 // 2, 1)
    assert torch.equal(stored["model.layers.0.mlp.up_proj.bias"], layer.bias)
    again = NF4Linear.from_bnb(as_suffixes(stored, "model.layers.0.mlp.up_proj"), layer.bias, shape=(48, 64))
    assert again.dtype == torch.bfloat16
    assert {k: bits(v) for k, v in again.state_dict().items()} == {k: bits(v) for k, v in layer.state_dict().items()}


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double"])
def test_bitsandbytes_layers_are_read(bnb, double_quant, storage):
    module = bnb.nn.Linear4bit(
        128, 96, compute_dtype=torch.bfloat16, compress_statistics=double_quant, quant_type="nf4", quant_storage=storage
    )
    state = module.to("cpu").state_dict()  # .to quantises
    assert state["weight"].dtype == storage
    stored = {key.removeprefix("weight."): tensor for key, tensor in state.items() if key != "bias"}
    layer = NF4Linear.from_bnb(stored, module.bias, torch.float32)
    expected = bnb.functional.dequantize_4bit(module.weight.data.view(torch.uint8), module.weight.quant_state)
    assert torch.equal(layer.dequantize(expected.dtype), expected)


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double"])
def test_bitsandbytes_reads_our_layers(bnb, double_quant):
    layer, _ = layer_and_dense(torch.bfloat16, double_quant)
    stored = as_suffixes(layer.to_bnb("P"), "P")
    packed = stored.pop("weight")
    state = bnb.functional.QuantState.from_dict(dict(stored), CPU)
    assert torch.equal(bnb.functional.dequantize_4bit(packed, state), layer.dequantize())
    # and writes the same tensors again, JSON included
    theirs = state.as_dict(packed=True)
    assert {key: bits(t) for key, t in theirs.items()} == {key: bits(t) for key, t in stored.items()}


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double"])
def test_a_folder_that_transformers_quantised_is_read_and_ours_is_read_by_it(bnb, double_quant, tmp_path):
    transformers = pytest.importorskip("transformers", reason="compares with transformers: pip install minitune[test]")
    pytest.importorskip("accelerate", reason="transformers needs it to quantise")
    from safetensors.torch import load_file, save_file

    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, vocab_size=50
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    wanted = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    load = transformers.LlamaForCausalLM.from_pretrained
    theirs = load(tmp_path / "base", quantization_config=wanted, device_map="cpu", dtype=torch.bfloat16)
    theirs.save_pretrained(tmp_path / "theirs")

    folder_config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert is_bnb_4bit(folder_config) is True
    stored = load_file(tmp_path / "theirs" / "model.safetensors")
    base = load_file(tmp_path / "base" / "model.safetensors")
    ours, layers = {}, 0
    for name, tensor in stored.items():
        prefix, mark, _ = name.partition(".weight")
        if f"{prefix}.weight.{BNB_STATE}" not in stored:
            ours[name] = tensor
        elif name == f"{prefix}.weight":
            parts = {key: t for key, t in stored.items() if key.startswith(f"{prefix}.weight")}
            layer = NF4Linear.from_bnb(as_suffixes(parts, prefix))
            quantised = NF4Linear.from_weight(base[name], None, torch.bfloat16, double_quant)
            for key, tensor in quantised.state_dict().items():
                assert bits(tensor) == bits(layer.state_dict()[key]), key
            expected = theirs.get_submodule(prefix).weight
            assert torch.equal(layer.dequantize(), bnb.functional.dequantize_4bit(expected.data, expected.quant_state))
            ours |= quantised.to_bnb(prefix)
            layers += 1
    assert layers == 7 and set(ours) == set(stored)

    save_file(ours, tmp_path / "theirs" / "model.safetensors", metadata={"format": "pt"})
    again = load(tmp_path / "theirs", device_map="cpu")
    tokens = torch.arange(12).view(2, 6)
    assert torch.equal(again(tokens).logits, theirs(tokens).logits)


def test_a_broken_stored_layer_is_refused_with_its_name():
    good = as_suffixes(layer_and_dense(double_quant=True)[0].to_bnb("P"), "P")
    state = json.loads(bytes(good[BNB_STATE].tolist()))

    def refused(message, **changes):
        tensors = {key: tensor for key, tensor in (good | changes).items() if tensor is not None}
        with pytest.raises(ValueError) as error:
            NF4Linear.from_bnb(tensors, shape=(48, 64), name="layer 7")
        assert str(error.value).startswith(f"layer 7: {message}"), error.value
        assert len(str(error.value)) < 300

    def with_text(text):
        return {BNB_STATE: torch.tensor(list(text.encode()), dtype=torch.uint8)}

    def with_state(**changes):
        return with_text(json.dumps(state | changes))

    refused("missing quant_map, unexpected none", quant_map=None)
    refused("missing none, unexpected SCB", SCB=torch.ones(1))
    refused("missing nested_quant_map", nested_quant_map=None)
    refused("quant_map is not the NF4 table", quant_map=torch.linspace(-1, 1, 16))
    refused("quant_map is not the NF4 table", quant_map=torch.ones(()))
    refused("packed has 1535 elements, expected 1536", weight=good["weight"][:-1])
    refused("q has dtype torch.float32", absmax=torch.ones(48))
    refused("q has 47 elements, expected 48", absmax=good["absmax"][:-1])
    refused("absmax2 has 2 elements, expected 1", nested_absmax=torch.ones(2))
    refused("its scales hold NaN or infinity", nested_absmax=good["nested_absmax"] * torch.nan)
    refused(f"{BNB_STATE} is not valid JSON", **{BNB_STATE: good[BNB_STATE][:-1]})
    refused(f"{BNB_STATE} is not valid JSON for us: it is nested too deeply", **with_text("[" * 9000))
    refused(f"{BNB_STATE} is not JSON in uint8", **with_text("[" * 90_000))
    refused(f"{BNB_STATE} is not JSON in uint8", **{BNB_STATE: torch.tensor([255, 254], dtype=torch.uint8)})
    refused(f"{BNB_STATE} is not JSON in uint8", **{BNB_STATE: torch.tensor(1.0)})
    refused(f"{BNB_STATE}: it is [], expected an object", **with_text("[7]".replace("7", "")))
    refused(f"{BNB_STATE}: quant_type is 'fp4', expected one of nf4", **with_state(quant_type="fp4"))
    refused(f"{BNB_STATE}: blocksize is 128", **with_state(blocksize=128))
    refused(f"{BNB_STATE}: nested_blocksize is 64", **with_state(nested_blocksize=64))
    for offset in (None, float("nan"), float("inf"), "1", 10**299):
        refused(f"{BNB_STATE}: nested_offset is ", **with_state(nested_offset=offset))
    refused(f"{BNB_STATE} is not valid JSON for us: it has a whole number of", **with_state(nested_offset=10**400))
    refused(f"{BNB_STATE}: shape[1] is -64", **with_state(shape=[48, -64]))
    refused(f"{BNB_STATE}: shape is [48], expected [out, in]", **with_state(shape=[48]))
    refused("the stored 4-bit weight has shape [64, 48], expected [48, 64]", **with_state(shape=[64, 48]))
    refused(f"{BNB_STATE}: dtype is 'int8'", **with_state(dtype="int8"))


BNB_CONFIG = {
    "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "_load_in_4bit": True,
    "_load_in_8bit": False, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_use_double_quant": True, "bnb_4bit_quant_storage": "uint8", "llm_int8_enable_fp32_cpu_offload": False,
    "llm_int8_has_fp16_weight": False, "llm_int8_skip_modules": None, "llm_int8_threshold": 6.0,
}  # fmt: skip


def test_nf4_in_a_config_is_recognised():
    assert is_bnb_4bit({}) is False and is_bnb_4bit({"quantization_config": None}) is False
    assert is_bnb_4bit({"quantization_config": BNB_CONFIG}) is True
    old = {key: value for key, value in BNB_CONFIG.items() if key != "quant_method" and not key.startswith("_")}
    assert is_bnb_4bit({"quantization_config": old}) is True
    assert is_bnb_4bit({"quantization_config": BNB_CONFIG | {"bnb_4bit_quant_storage": "bfloat16"}}) is True
    neither = {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": False}
    assert is_bnb_4bit({"quantization_config": neither}) is False
    leftover = {"quantization_config": BNB_CONFIG | {"bnb_4bit_blocksize": 128}}  # the layers themselves say 64
    assert is_bnb_4bit(leftover) is True and unknown_keys(leftover) == ["quantization_config.bnb_4bit_blocksize"]


@pytest.mark.parametrize(
    "quantization, message",
    [
        (BNB_CONFIG | {"bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type='fp4' in DIR/config.json"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bnb_4bit_quant_type='fp4'"),
        (BNB_CONFIG | {"load_in_8bit": True, "load_in_4bit": False}, "load_in_8bit=True"),
        ({"load_in_8bit": True}, "load_in_8bit=True"),
        ({"quant_method": "gptq", "bits": 4}, "quant_method='gptq'"),
        ({"quant_method": "awq", "bits": 4}, "quant_method='awq'"),
        ({"bits": 4}, "quant_method=None"),
        (BNB_CONFIG | {"bnb_4bit_quant_storage": "int4"}, "bnb_4bit_quant_storage='int4'"),
        ("nf4", "is 'nf4', expected an object"),
    ],
)
def test_another_quantisation_in_a_config_is_refused_with_the_way_out(quantization, message):
    with pytest.raises(ValueError) as error:
        is_bnb_4bit({"quantization_config": quantization}, source="DIR/config.json")
    assert message in str(error.value) and "DIR/config.json" in str(error.value)
    assert "expected" in str(error.value) or "use the original checkpoint" in str(error.value)


# Through torch's compilers, tracers and transforms


def test_tracers_fake_tensors_and_forward_derivatives_see_the_product():
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    packed, absmax = nf4.quantize(random_weight(8, 64))
    x, other = random_weight(2, 64, seed=1), random_weight(2, 64, seed=2)
    run = lambda x: nf4.matmul(x, packed, absmax, (8, 64))
    torch.testing.assert_close(torch.jit.trace(run, (x,), check_trace=False)(other), run(other))
    torch.testing.assert_close(make_fx(run)(x)(other), run(other))
    with FakeTensorMode():
        fake, scales = nf4.quantize(torch.randn(8, 64))
        assert fake.shape == (256,) and scales.shape == (8,)
        assert nf4.dequantize(fake, scales, (8, 64), torch.bfloat16).dtype == torch.bfloat16
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError):
        run(torch.autograd.forward_ad.make_dual(x, other))


@pytest.mark.parametrize("rows", [2, 200])
def test_autocast_does_not_change_the_dtype(rows):
    packed, absmax = nf4.quantize(random_weight(8, 64))
    x = random_weight(rows, 64, seed=1).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = nf4.matmul(x, packed, absmax, (8, 64))
        y.sum().backward()
    assert y.dtype == x.grad.dtype == torch.float32


def test_a_workspace_that_is_overwritten_before_the_backward_pass_is_an_error():
    packed, absmax = nf4.quantize(random_weight(8, 64))
    out = nf4.dequantize(packed, absmax, (8, 64), torch.float32)
    y = (torch.ones(8, 64, requires_grad=True) * out).sum()
    nf4.dequantize(packed, 2 * absmax, (8, 64), torch.float32, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_a_cast_that_is_refused_leaves_the_layer_as_it_was():
    layer, _ = layer_and_dense()
    x, before = random_weight(200, 64, seed=1), bits(layer.packed)
    expected = layer(x)
    for cast in (lambda: layer.double(), lambda: layer.type(torch.float16)):
        with pytest.raises(ValueError):
            cast()
        assert bits(layer.packed) == before and torch.equal(layer(x), expected)


def test_an_input_of_another_width_is_named():
    layer, _ = layer_and_dense()
    with pytest.raises(ValueError, match=r"x has shape \(2, 65\), expected \(.., 64\)"):
        layer(torch.ones(2, 65))


def test_the_operators_keep_the_rules_of_torch():
    packed, absmax = nf4.quantize(random_weight(8, 64))
    nested = list(nf4.double_quantize(absmax))
    x, bias = random_weight(3, 64, seed=1).requires_grad_(), random_weight(8, seed=2).requires_grad_()
    check = torch.library.opcheck
    check(torch.ops.minitune.nf4_quantize, (random_weight(8, 64),))
    check(torch.ops.minitune.nf4_dequantize, (packed, nested, [8, 64], torch.bfloat16))
    check(torch.ops.minitune.nf4_matmul, (x, packed, [absmax], [8, 64], bias))
    check(torch.ops.minitune.nf4_matmul_grad, (random_weight(3, 8).requires_grad_(), packed, nested, [8, 64]))


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double"])
def test_a_compiled_layer_is_the_layer(double_quant):
    layer, _ = layer_and_dense(double_quant=double_quant)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)  # no break: one graph, forward and backward
    results = []
    for run in (layer, compiled):
        x = random_weight(5, 64, seed=3).requires_grad_()
        y = run(x)
        y.square().sum().backward()
        results.append((y, x.grad, layer.bias.grad.clone()))
        layer.bias.grad = None
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))
