"""The C kernels of decoding compute what torch computes, on every instruction set, and are used only where they may be."""

import pytest
import torch
from minitune_kernels import built, formulas, measured, ops, ops_cpu
from torch.nn import functional as F

from minitune.adapters.lora import LoRALinear
from minitune.models import layers
from minitune.models.cache import Cache
from minitune.models.layers import Linear, RMSNorm, project

FLOATS = (torch.float32, torch.bfloat16)
LEVELS = {"portable": 0, "AVX2": 1, "AVX-512": 2, "AVX-512 bf16": 3}
STEP = {torch.float32: 2**-20, torch.bfloat16: 2**-7}  # sums in another order; two roundings: shares of the value

pytestmark = pytest.mark.skipif(not ops_cpu.runs_here(None), reason="there is no C compiler")
with_bf16 = pytest.mark.skipif(
    not ops_cpu.runs_here(None) or ops_cpu.library()[1] < 3, reason="this CPU has no AVX-512 bf16"
)


@pytest.fixture(params=LEVELS)
def level(request, monkeypatch):
    """Runs a test on one instruction set. Skips those that this CPU lacks."""
    library, highest = ops_cpu.library()
    wanted = LEVELS[request.param]
    if wanted > highest:
        pytest.skip(f"this CPU has {built.LEVELS[highest]}, not {request.param}")
    if wanted < highest:
        library = ops_cpu.typed(built.load(built.build(wanted)))
    monkeypatch.setattr(ops_cpu, "library", lambda: (library, wanted))


@pytest.fixture(autouse=True)
def without_gradients(monkeypatch):
    monkeypatch.delenv("MINITUNE_KERNELS", raising=False)  # these tests are about the C kernels
    with torch.no_grad():
        yield


def random(*shape, seed=0, dtype=torch.bfloat16):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(found, expected, dtype, size=1.0):
    """Equal up to the last places of values of about `size`."""
    assert found.dtype == expected.dtype == dtype and found.shape == expected.shape
    bound = STEP[dtype] * expected.double().abs().clamp(min=size)
    assert ((found.double() - expected.double()).abs() <= bound).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(1, 1, 768), (3, 2, 100), (40, 1, 33), (7,), (0, 5)])
def test_rms_norm_equals_torchs(level, dtype, shape):
    x, weight = random(*shape, dtype=dtype), random(shape[-1], seed=1, dtype=dtype)
    close(ops_cpu.rms_norm(x, weight, 1e-5), formulas.rms_norm(x, weight, 1e-5), dtype)
    strided = random(*shape, 2, dtype=dtype)[..., 0]
    assert torch.equal(ops_cpu.rms_norm(strided, weight, 1e-5), ops_cpu.rms_norm(strided.contiguous(), weight, 1e-5))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("B, H, T, D, tables", [(1, 12, 1, 64, 1), (3, 2, 5, 10, 3), (4, 3, 1, 32, 4), (2, 1, 7, 8, 1)])
def test_rope_equals_torchs(level, dtype, B, H, T, D, tables):
    angles = random(tables, 1, T, D // 2, dtype=torch.float32) * 100
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    for x in (random(B, H, T, D, dtype=dtype), random(B, T, H, D, dtype=dtype).transpose(1, 2)):
        close(ops_cpu.rope(x, cos, sin), formulas.rope(x, cos, sin), dtype)
    part = random(B, T, H, 2 * D, dtype=dtype).transpose(1, 2)[..., :D]  # Phi turns the first part of a head
    close(ops_cpu.rope(part, cos, sin), formulas.rope(part, cos, sin), dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("G, T, D", [(3, 1, 2), (7, 1, 6), (3, 3, 20), (7, 3, 40), (3, 1, 100)])
def test_what_a_sequence_attends_to_does_not_depend_on_the_others(level, dtype, G, T, D):
    """Queries are processed in pairs, so their number is odd here. Heads end in the middle of a vector register."""
    n, capacity, new, P = 5, 70, 61, 3
    for seed in range(4):
        q, k, v = (random(n, heads, T, D, seed=seed + 9 * i, dtype=dtype) for i, heads in enumerate((G, 1, 1)))
        prompts = [random(1, 1, P, D, seed=seed + 40 + i, dtype=dtype) for i in range(2)]
        fresh = [random(n, 1, capacity, D, seed=seed + 60 + i, dtype=dtype) for i in range(2)]
        sizes = {"B": 1, "H": G, "H_kv": 1, "T": T, "D": D, "P": P, "capacity": capacity, "new_tokens": new}
        length = torch.tensor([P])
        shape = ops_cpu.Shape(length.data_ptr(), length.data_ptr(), n=n, **sizes)
        together = ops_cpu.attention_over_cache(q, k, v, shape, (*prompts, *fresh))
        for row in range(n):
            shape, part = ops_cpu.Shape(length.data_ptr(), length.data_ptr(), n=1, **sizes), slice(row, row + 1)
            own = [t[part].clone() for t in fresh]
            assert torch.equal(
                ops_cpu.attention_over_cache(q[part], k[part], v[part], shape, (*prompts, *own)), together[part]
            )


def test_shapes_that_do_not_fit_are_left_to_torch(level):
    """The C kernels would read beyond the ends of such tensors."""
    x, cos = torch.ones(2, 4, 3, 16), torch.ones(1, 1, 3, 8)
    for call in (
        lambda: RMSNorm(8, 1e-5)(x),
        lambda: layers.LayerNorm(8, 1e-5)(x),
        lambda: ops.swiglu(x, x[..., :8]),
        lambda: ops.rope(x, cos[:, :, :2], cos[:, :, :2]),
        lambda: ops.rope(x, torch.ones(1, 1, 3, 9), torch.ones(1, 1, 3, 9)),
    ):
        with pytest.raises(RuntimeError):
            call()
    assert torch.equal(ops.swiglu(x, x[:1]), F.silu(x) * x[:1])
    turned = random(1, 1, 8, 3, dtype=torch.float32).mT
    assert torch.equal(ops.rope(x, turned, cos), ops.rope(x, turned.contiguous(), cos))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(1, 1, 2048), (5, 37), (3, 3, 3333), (0, 8)])
def test_swiglu_equals_torchs(level, dtype, shape):
    gate, up = random(*shape, dtype=dtype) * 8, random(*shape, seed=1, dtype=dtype)
    close(ops_cpu.swiglu(gate, up), formulas.swiglu(gate, up), dtype, size=2.0)


def test_swiglu_keeps_nan_and_vanishes_where_it_should(level):
    gate = torch.tensor([torch.nan, 300.0, -300.0, torch.inf, 0.0])
    found = ops_cpu.swiglu(gate, torch.ones(5))
    assert found[0].isnan() and found[1] == 300 and found[2].abs() < 1e-30 and found[3] == torch.inf and found[4] == 0


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("count", [1, 4, 30])
def test_the_likeliest_tokens_are_those_of_log_softmax(level, dtype, count):
    logits = random(5, 1001, dtype=dtype) * 4
    logits[1, :900], logits[2] = -torch.inf, 0.5  # a ban; all equal
    values, ids = ops_cpu.most_likely(logits, count)
    logprobs = logits.double().log_softmax(-1)
    assert (values - logprobs.gather(1, ids)).abs().nan_to_num().max() < 2e-5
    best = logprobs.topk(count).values
    assert torch.equal(logprobs.gather(1, ids), best) and ids[2].tolist() == list(range(count))
    assert all(len(set(row)) == count for row in ids.tolist())


def test_logits_with_nan_have_nan_as_log_probabilities(level):
    logits = random(3, 100, dtype=torch.float32)
    logits[1, 57] = torch.nan
    assert ops_cpu.most_likely(logits, 2)[0].isnan().any(1).tolist() == [False, True, False]


def cached(dtype, lengths, n, heads, kv_heads, D, window=None, new=6, draft=0, seed=0):
    """A cache of one layer whose prompts were read, in the form of the current backend."""
    cache = Cache(1, lengths, n, new, window, draft)
    cache.read([(i, 0, length) for i, length in enumerate(lengths)])
    total = sum(lengths)
    q = random(1, heads, total, D, seed=seed, dtype=dtype)
    k, v = (random(1, kv_heads, total, D, seed=seed + i, dtype=dtype) for i in (1, 2))
    cache.layers[0].attend(q, k, v, None)
    cache.advance(total)
    cache.layers[0].lay_out()
    return cache


class Positions:
    """What attention asks a Layout for."""

    def __init__(self, cache, T):
        self.positions = cache.positions(T, torch.device("cpu"))

    def masks(self, cache):
        return cache.masks(self.positions)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "lengths, n, heads, kv_heads, D, window",
    [
        ([7], 1, 4, 4, 64, None),
        ([5, 9, 1], 1, 4, 2, 16, None),
        ([5, 300, 3], 3, 4, 1, 128, None),
        ([3, 8], 2, 6, 2, 20, 4),
        ([4], 2, 2, 2, 8, 3),
        ([2, 5], 1, 2, 1, 80, 9),
    ],
)
def test_attention_over_the_cache_equals_torchs(level, dtype, lengths, n, heads, kv_heads, D, window, monkeypatch):
    """Unequal prompts, several sequences, windows, reordered beams, prompts that leave."""
    caches = {}
    for name in ("c", "torch"):
        monkeypatch.setenv("MINITUNE_KERNELS", "cpu" if name == "c" else "torch")
        caches[name] = cached(dtype, lengths, n, heads, kv_heads, D, window)
    for step in range(6):
        outputs = {}
        R = len(caches["c"].lengths) * n
        q = random(R, heads, 1, D, seed=10 * step, dtype=dtype) * 2
        k, v = (random(R, kv_heads, 1, D, seed=10 * step + i, dtype=dtype) for i in (1, 2))
        for name, cache in caches.items():
            outputs[name] = cache.layers[0].attend(q, k, v, Positions(cache, 1))
            assert cache.form.has_writers == (name == "c")
            cache.advance(1)
            if n > 1:
                order = torch.randperm(n, generator=torch.Generator().manual_seed(step))
                order[0] = order[-1]  # one beam has two children
                cache.reorder(torch.cat([order + p * n for p in range(len(cache.lengths))]))
            if step == 3 and len(lengths) > 1:
                cache.keep(list(range(1, len(lengths))))
        close(outputs["c"], outputs["torch"], dtype, size=4.0)


def test_several_tokens_at_once_see_those_before_them(level, monkeypatch):
    """A step of prompt lookup: four tokens, two of which are dropped again."""
    outputs = []
    for backend in ("cpu", "torch"):
        monkeypatch.setenv("MINITUNE_KERNELS", backend)
        cache = cached(torch.float32, [5], 1, 4, 2, 16, window=6, new=9, draft=4)
        found = []
        for step in range(3):
            q = random(1, 4, 4, 16, seed=step, dtype=torch.float32)
            k, v = (random(1, 2, 4, 16, seed=step + i, dtype=torch.float32) for i in (1, 2))
            found.append(cache.layers[0].attend(q, k, v, Positions(cache, 4)))
            cache.advance(4)
            cache.drop(2)
        outputs.append(torch.stack(found))
    assert (outputs[0] - outputs[1]).abs().max() < 1e-5


def test_the_cache_of_bf16_is_kept_in_16_bit():
    cache = cached(torch.bfloat16, [4, 2], 2, 4, 2, 16)
    assert cache.layers[0].k.dtype == cache.layers[0].prompt_k.dtype == torch.bfloat16


@with_bf16
@pytest.mark.parametrize("shape", [(1, 32), (7, 64), (33, 96), (64, 1056), (9, 4128)])
def test_rows_are_multiplied_as_in_fp64_and_rounded_once(shape):
    weight, bias = random(*shape), random(shape[0], seed=1)
    for rows in (*range(1, 14), 40, 64):
        x = random(rows, shape[1], seed=rows)
        size = x.double().abs() @ weight.double().abs().T
        for given in (None, bias):
            exact = F.linear(x.double(), weight.double(), None if given is None else given.double())
            found = ops_cpu.linear(x, weight, given).double()
            assert ((found - exact).abs() <= exact.abs() * 2**-8 + size * 2**-20).all()


@with_bf16
def test_a_row_does_not_depend_on_its_neighbours():
    weight, x, bias = random(50, 128), random(64, 128, seed=1), random(50, seed=2)
    whole = ops_cpu.linear(x, weight, bias)
    for rows in (1, 2, 5, 8, 9, 15, 40):
        assert torch.equal(ops_cpu.linear(x[:rows], weight, bias), whole[:rows])


@with_bf16
def test_views_and_more_axes_are_read_where_they_lie():
    weight, x = random(16, 64), random(65, 6, seed=2)
    strided = x[1:].T  # (6, 64), its elements 6 apart
    assert torch.equal(ops_cpu.linear(strided, weight), ops_cpu.linear(strided.contiguous(), weight))
    shifted = random(16 * 64 + 1)[1:].view(16, 64)  # not aligned
    assert torch.equal(ops_cpu.linear(strided, shifted), ops_cpu.linear(strided, shifted.clone()))
    assert ops_cpu.linear(strided.reshape(2, 3, 64), weight).shape == (2, 3, 16)
    assert ops_cpu.linear(random(64), weight).shape == (16,)


@with_bf16
def test_numbers_that_overflow_vanish_or_are_none_come_out_as_such():
    weight = torch.zeros(4, 32, dtype=torch.bfloat16)
    weight[0], weight[1], weight[2], weight[3, 0] = 3e38, torch.nan, torch.inf, 1e-40
    found = ops_cpu.linear(torch.ones(1, 32, dtype=torch.bfloat16), weight)[0]
    assert found[0] == torch.inf and found[1].isnan() and found[2] == torch.inf


@with_bf16
def test_projections_of_one_x_are_the_layers_and_their_hooks_run():
    x = random(3, 1, 64)
    trio = [Linear(64, out, bias=out == 32).bfloat16() for out in (32, 8, 48)]
    apart = [layer(x) for layer in trio]
    assert all(torch.equal(a, b) for a, b in zip(project(x, *trio), apart, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(project(x, *trio[1:]), apart[1:], strict=True))
    seen = []
    trio[1].register_forward_hook(lambda *call: seen.append(1))
    project(x, *trio)
    assert seen == [1]
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        project(random(3, 1, 32), *trio)


def test_the_kernels_are_taken_without_a_gradient_and_on_plain_tensors_only(monkeypatch):
    x = random(2, 64)
    assert ops_cpu.takes(x) and ops_cpu.takes(x.float())
    assert not ops_cpu.takes(x.half()) and not ops_cpu.takes(x.to("meta"))
    with torch.enable_grad():
        assert not ops_cpu.takes(x)
    with torch._subclasses.FakeTensorMode() as mode:
        assert not ops_cpu.takes(mode.from_tensor(x))
    assert not torch.func.vmap(lambda row: row * ops_cpu.takes(row))(x).any()
    monkeypatch.setenv("MINITUNE_KERNELS", "torch")
    assert not ops_cpu.takes(x)


@with_bf16
def test_a_layer_takes_its_kernel_for_few_rows_of_bf16(monkeypatch):
    layer, taken = Linear(64, 16, dtype=torch.bfloat16), []
    monkeypatch.setattr(ops_cpu, "linear", lambda x, *rest: taken.append(x) or x.new_zeros(*x.shape[:-1], 16))
    monkeypatch.setattr(measured, "max_rows", lambda *kind: 128)
    layer(random(2, 32, 64))
    assert len(taken) == 1
    for x in (random(129, 64), random(0, 64)):
        layer(x)
    layer.half()(random(2, 64, dtype=torch.float16))
    assert len(taken) == 1
    layer.float()(random(2, 64, dtype=torch.float32))
    assert len(taken) == 2


def test_layers_with_and_without_a_gradient_agree():
    """The model that is trained and the model that decodes are one function."""
    x, norm = random(4, 1, 64, dtype=torch.float32), RMSNorm(64, 1e-5)
    angles = random(4, 1, 1, 8, dtype=torch.float32)
    heads = x.view(4, 1, 4, 16).transpose(1, 2)
    operations = (norm, lambda x: ops.swiglu(x, x), lambda x: ops.rope(heads, angles.cos(), angles.sin()))
    for operation in operations:
        with torch.enable_grad():
            recorded = operation(x).detach()
        close(operation(x), recorded, torch.float32)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows, features, out, r", [(1, 64, 96, 16), (5, 50, 7, 3), (40, 64, 33, 20)])
def test_lora_is_what_the_layer_computes_with_torch(level, dtype, rows, features, out, r, monkeypatch):
    layer = LoRALinear(Linear(features, out, dtype=dtype), r, alpha=2 * r).eval()
    torch.nn.init.normal_(layer.lora_B.weight)
    x = random(rows, 1, features, dtype=dtype)
    found = layer(x)
    monkeypatch.setenv("MINITUNE_KERNELS", "torch")
    close(found, layer(x), dtype, size=8.0)


@pytest.mark.parametrize("shape", [(1, 32), (7, 64), (33, 96), (64, 1056)])
def test_fp32_rows_are_multiplied_to_the_last_places_and_do_not_depend_on_each_other(level, shape):
    weight, bias, x = (
        random(*s, seed=i, dtype=torch.float32) for i, s in enumerate((shape, shape[:1], (40, shape[1])))
    )
    whole = ops_cpu.linear(x, weight, bias)
    exact = F.linear(x.double(), weight.double(), bias.double())
    assert ((whole - exact).abs() <= 2**-20 * (x.double().abs() @ weight.double().abs().T + 1)).all()
    for rows in (1, 2, 3, 4, 7):
        assert torch.equal(ops_cpu.linear(x[:rows], weight, bias), whole[:rows])


@pytest.mark.parametrize("dtype", FLOATS)
def test_gelu_equals_torchs(level, dtype):
    x = random(3, 333, dtype=dtype) * 4
    close(ops_cpu.gelu_tanh(x), F.gelu(x, approximate="tanh"), dtype)
    odd = ops_cpu.gelu_tanh(torch.tensor([torch.nan, 1e30, -1e30, 0.0]))
    assert odd[0].isnan() and odd[1] == 1e30 and odd[2] == 0 and odd[3] == 0


def test_parameters_that_lie_or_are_otherwise_than_x_go_through_torch():
    x, wide = random(2, 64, dtype=torch.float32), random(128, dtype=torch.float32)
    layer, norm = Linear(64, 64), RMSNorm(64, 1e-5)
    layer.bias.data, norm.weight.data = wide[::2], wide[1::2]
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, wide[::2]))
    torch.testing.assert_close(norm(x), F.rms_norm(x, (64,), wide[1::2], 1e-5), rtol=1e-5, atol=1e-5)
    assert ops_cpu.takes(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert not ops_cpu.takes(x)
    cache = cached(torch.bfloat16, [4], 1, 4, 2, 16)
    with pytest.raises(ValueError, match="expected one dtype"):
        q, k = random(1, 4, 1, 16, dtype=torch.float32), random(1, 2, 1, 16)
        cache.layers[0].attend(q, k, k, None)


def test_nan_in_a_lora_matrix_is_not_rounded_away(level):
    layer = LoRALinear(Linear(64, 8, dtype=torch.bfloat16), 4, alpha=4).eval()
    layer.lora_A.weight.data.view(torch.int32).fill_(-1)  # 0xFFFFFFFF
    torch.nn.init.ones_(layer.lora_B.weight)
    assert layer(random(1, 64)).isnan().all()
