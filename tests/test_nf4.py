"""NF4: the bits of bitsandbytes, and the door to the kernels."""

import hashlib
import threading

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from minitune_kernels import nf4, nf4_reference
from small import FLOATS, bits, random_weight
from torch.utils._python_dispatch import TorchDispatchMode

from minitune.quant import NF4Linear

CPU = torch.device("cpu")
WIDEST_HALF_STEP = (1.0 - 0.6961928009986877) / 2


def digest(tensor):
    return hashlib.sha256(bits(tensor)).hexdigest()[:16]


# Frozen vectors from bitsandbytes 0.50.2 on a CPU. They need no bitsandbytes.


def sample_weight():
    """265 exact values: four blocks of falling scale, one of them all zero and one with every tie, and a short block of 9."""
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
    # Both sides make the map with torch.linspace, which rounds once on a CPU with FMA and twice on others.
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
    same_nan = [
        t.nan_to_num(12345.0, torch.inf) for t in (absmax, state.absmax)
    ]  # torch's max does not define which NaN it returns
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
    # Row lengths are a multiple of 64: bitsandbytes 0.50 on a CPU reads others wrongly. The frozen vectors have 53.
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
    assert (
        (back - weight.float()).abs() <= bound * (1 + 1e-6)
    ).all()  # 1e-6: rounding of the scale and the product in fp32
    again, absmax_again = nf4.quantize(back)  # the nearest code value to a code value is itself
    assert torch.equal(again, packed) and torch.equal(absmax_again, absmax)


def test_table_search_counts_the_midpoints_below_every_float_around_them():
    midpoints = nf4_reference.tables(CPU)[1]
    around = midpoints.view(torch.int32).unsqueeze(1) + torch.arange(-70_000, 70_000, dtype=torch.int32)
    special = torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, float("nan"), -float("nan")])
    values = torch.cat([around.view(-1).view(torch.float32), torch.linspace(-1, 1, 100_001), special])
    assert torch.equal(nf4_reference.nearest(values), torch.bucketize(values, midpoints).to(torch.uint8))


def test_a_tie_between_two_code_values_goes_down():
    code = torch.tensor(nf4.CODE)
    weight = torch.cat([torch.ones(1), (code[:-1] + code[1:]) / 2])  # absmax 1: dividing by it changes no midpoint
    packed, _ = nf4.quantize(weight)
    assert bytes(packed.tolist()).hex() == "f0123456789abcde"


def test_a_whole_block_is_multiplied_by_the_reciprocal_and_a_short_one_is_divided():
    # Here the two results differ by one rounding, across a midpoint. bitsandbytes 0.50.2 on a CPU gives fb and fa.
    weight = torch.zeros(64)
    weight[0], weight[1] = float.fromhex("0x1.12a8bcp-1"), float.fromhex("0x1.40d126p-3")
    assert nf4.quantize(weight)[0][0] == 0xFB and nf4.quantize(weight[:10])[0][0] == 0xFA


def test_the_size_of_slabs_does_not_change_the_result(monkeypatch):
    weight = random_weight(37, 41, dtype=torch.bfloat16)
    packed, absmax = nf4.quantize(weight)
    back = nf4.dequantize(packed, absmax, weight.shape, torch.bfloat16)
    monkeypatch.setattr(nf4_reference, "slab_blocks", lambda device: 3)
    packed_slabs, absmax_slabs = nf4.quantize(weight)
    assert torch.equal(packed_slabs, packed) and torch.equal(absmax_slabs, absmax)
    assert torch.equal(nf4.dequantize(packed, absmax, weight.shape, torch.bfloat16), back)


class LargestResult(TorchDispatchMode):
    """Records the bytes of the largest tensor that an operation returns. Views do not count."""

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
