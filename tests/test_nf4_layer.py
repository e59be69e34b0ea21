"""NF4Linear, bitsandbytes' checkpoint format, and the product under torch's compilers and tracers."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from minitune_kernels import nf4, nf4_reference
from small import FLOATS, bits, random_weight
from torch.utils.checkpoint import checkpoint

from minitune.quant import BNB_STATE, NF4Linear, is_bnb_4bit, unknown_keys


def as_suffixes(stored, prefix):
    """{"P.weight": .., "P.weight.absmax": ..} -> {"weight": .., "absmax": ..}, without the bias."""
    keys = {key: key.removeprefix(f"{prefix}.").removeprefix("weight.") for key in stored if key != f"{prefix}.bias"}
    return {short: stored[key] for key, short in keys.items()}


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
        ):  # torch may copy x or add the bias later, which changes the order of sums with several threads
            torch.testing.assert_close(ours, theirs, rtol=0, atol=torch.finfo(dtype).eps * theirs.abs().max().item())
        else:
            assert torch.equal(ours, theirs)  # the same product of the same bits


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
    for rows in (2, 200):  # by the backend's kernel, and by torch's product
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
    state = bnb.functional.QuantState.from_dict(dict(stored), torch.device("cpu"))
    assert torch.equal(bnb.functional.dequantize_4bit(packed, state), layer.dequantize())
    # bitsandbytes writes the same tensors again, JSON included.
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
    refused(f"{BNB_STATE} cannot be read as JSON: it is nested too deeply", **with_text("[" * 9000))
    refused(f"{BNB_STATE} is not JSON in uint8", **with_text("[" * 90_000))
    refused(f"{BNB_STATE} is not JSON in uint8", **{BNB_STATE: torch.tensor([255, 254], dtype=torch.uint8)})
    refused(f"{BNB_STATE} is not JSON in uint8", **{BNB_STATE: torch.tensor(1.0)})
    refused(f"{BNB_STATE}: it is [], expected an object", **with_text("[7]".replace("7", "")))
    refused(f"{BNB_STATE}: quant_type is 'fp4', expected one of nf4", **with_state(quant_type="fp4"))
    refused(f"{BNB_STATE}: blocksize is 128", **with_state(blocksize=128))
    refused(f"{BNB_STATE}: nested_blocksize is 64", **with_state(nested_blocksize=64))
    for offset in (None, float("nan"), float("inf"), "1", 10**299):
        refused(f"{BNB_STATE}: nested_offset is ", **with_state(nested_offset=offset))
    refused(f"{BNB_STATE} cannot be read as JSON: it has a whole number of", **with_state(nested_offset=10**400))
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
