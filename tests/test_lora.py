"""The LoRA layer: its formula, its start, its gradients, and which layers get one."""

import math

import pytest
import torch
from small import FAMILIES
from small_adapters import IDS, adapted, logits

from minitune import data, quant
from minitune.adapters import lora
from minitune.adapters.peft_files import load_adapter, save_adapter
from minitune.checkpoint import load_model
from minitune.loss import batch_loss

# --- the layer ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_step_0_is_the_base_bit_for_bit(family, quantize, dtype, bases):
    model = load_model(bases[family], dtype=dtype, quantize=quantize)
    base = logits(model)
    lora.inject(model, 8, 16, 0.5, ("all-linear",))
    assert torch.equal(logits(model), base)
    assert torch.equal(logits(model.train()), base)


@pytest.mark.parametrize("use_rslora, scaling", [(False, 12 / 9), (True, 12 / 3)])
def test_the_layer_is_its_formula(use_rslora, scaling):
    torch.manual_seed(0)
    base = torch.nn.Linear(10, 6)
    layer = lora.LoRALinear(base, 9, 12, use_rslora=use_rslora)
    layer.lora_B.weight.data.normal_()
    x = torch.randn(2, 3, 10)
    expected = base(x) + x @ layer.lora_A.weight.T @ layer.lora_B.weight.T * scaling
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-5)


def test_the_start_depends_on_the_seed_and_on_nothing_else(bases):
    def start(seed, quantize="none", dtype=torch.float32):
        torch.manual_seed(torch.seed() % 1000)
        model = load_model(bases["llama"], quantize=quantize, dtype=dtype)
        lora.inject(model, 8, 16, seed=seed)
        return lora.adapter_tensors(model)

    first = start(1)
    for again in (start(1), start(1, "nf4"), start(1, dtype=torch.bfloat16)):
        assert all(torch.equal(again[name], tensor) for name, tensor in first.items())
    other = start(2)
    assert all(torch.equal(other[n], t) == ("lora_B" in n) for n, t in first.items())
    matrices = [t for n, t in first.items() if "lora_A" in n]
    assert len({t.sum().item() for t in matrices}) == len(matrices), "layers must not start alike"


def test_a_is_drawn_as_pefts_and_b_is_zero(peft):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(300, 20)

    torch.manual_seed(0)
    theirs = peft.get_peft_model(Model(), peft.LoraConfig(r=64, target_modules=["layer"])).base_model.model.layer
    ours = Model()
    lora.inject(ours, 64, 16, targets=("layer",))
    bound = 1 / math.sqrt(300)  # kaiming-uniform with a = sqrt(5)
    for A in (theirs.lora_A["default"].weight, ours.layer.lora_A.weight):
        assert 0.99 * bound < A.abs().max() <= bound
        assert abs(A.std() / (bound / math.sqrt(3)) - 1) < 0.02 and abs(A.mean()) < 0.02 * bound
    assert not theirs.lora_B["default"].weight.any() and not ours.layer.lora_B.weight.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_adapters_stay_fp32_and_get_fp32_gradients_under_16_bit_compute(quantize, dtype, bases):
    tolerance = {torch.bfloat16: 0.25, torch.float16: 0.03}[dtype]  # steps of 2**-8 and 2**-11, through both blocks
    grads = {}
    for compute in (torch.float32, dtype):
        model = adapted(bases["phi"], quantize=quantize, dtype=compute).train()
        out = model(IDS)
        assert out.dtype == compute
        torch.nn.functional.cross_entropy(out[:, :-1].flatten(0, 1).float(), IDS[:, 1:].flatten()).backward()
        grads[compute] = {name: t.grad for name, t in lora.adapter_tensors(model).items()}
        assert all(t.dtype == t.grad.dtype == torch.float32 for t in lora.adapter_tensors(model).values())
        frozen = [p for n, p in model.named_parameters() if "lora_" not in n]
        assert frozen and all(p.grad is None and not p.requires_grad and p.dtype == compute for p in frozen)
    for name, grad in grads[dtype].items():
        error = (grad - grads[torch.float32][name]).norm() / grads[torch.float32][name].norm()
        assert error < tolerance, f"{name}: relative error {error:.3f}"


def test_dropout_acts_in_training_only_and_only_on_the_adapters_input(bases):
    plain, model = adapted(bases["llama"]), adapted(bases["llama"], dropout=0.5)
    assert torch.equal(logits(model), logits(plain)) and torch.equal(logits(model), logits(model))
    model.train()
    torch.manual_seed(0)
    assert not torch.equal(logits(model), logits(model))
    layer, x = next(iter(lora.lora_layers(model).values())), torch.ones(4000, 64)
    layer.lora_A.weight.data.fill_(1.0)
    with torch.no_grad():
        low = (layer(x) - layer.base_layer(x)) / (layer.lora_B.weight.sum(1) * layer.scaling)
    assert abs(low.mean() / 64 - 1) < 0.02  # kept inputs are scaled up: the same in the mean
    assert abs(low.std() / 8 - 1) < 0.1  # 64 coins, each 0 or 2


def test_a_trained_head_gets_the_gradient_of_the_plain_loss(bases):
    model = adapted(bases["phi"], ("q_proj", "lm_head")).train()
    example = data.Example(IDS[0].tolist(), [-100] * 4 + IDS[0, 4:].tolist(), 0, 4)
    batch_loss(model, data.collate([example], 0)).backward()
    found = {name: t.grad.clone() for name, t in lora.adapter_tensors(model).items()}
    model.zero_grad()
    torch.nn.functional.cross_entropy(model(IDS[:1])[0, 3:-1], IDS[0, 4:], reduction="sum").backward()
    for name, tensor in lora.adapter_tensors(model).items():
        torch.testing.assert_close(found[name], tensor.grad, rtol=1e-4, atol=1e-5)


# --- which layers -------------------------------------------------------------------------------


def test_all_linear_is_every_linear_layer_but_the_head(bases):
    model = load_model(bases["phi"], quantize="nf4")
    names = lora.inject(model, 4, 8)
    leaves = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.dense", "mlp.fc1", "mlp.fc2")
    assert names == [f"model.layers.{i}.{leaf}" for i in range(2) for leaf in leaves]
    assert all(isinstance(layer.base_layer, quant.NF4Linear) for layer in lora.lora_layers(model).values())
    assert list(lora.lora_layers(model)) == names


@pytest.mark.parametrize(
    "targets, message",
    [
        (
            ("q_proj", "o_proj", "Wqkv"),
            r"no linear layer is named o_proj, Wqkv; this model has q_proj, k_proj, v_proj, dens",
        ),
        (("proj",), "no linear layer is named proj"),
        (("embed_tokens",), "no linear layer is named embed_tokens"),
        (r".*\.o_proj", r"no linear layer matches the pattern '\.\*\\\\\.o_proj'"),
        ("q_proj", "no linear layer matches the pattern 'q_proj'"),  # a pattern is for whole names, as in PEFT
        ("*_proj", r"'\*_proj' is not a regular expression"),
    ],
)
def test_targets_that_no_layer_has_are_named_and_the_model_stays_as_it_was(targets, message, bases):
    model = load_model(bases["phi"]).requires_grad_(True)
    with pytest.raises(ValueError, match=message):
        lora.inject(model, 4, 8, targets=targets)
    assert not lora.lora_layers(model) and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("r", [0, -1, 2.0])
def test_a_rank_that_is_no_rank_is_refused(r, bases):
    with pytest.raises(ValueError, match="the rank r is .*, expected a whole number above 0"):
        lora.inject(load_model(bases["llama"]), r, 8)


def test_a_second_adapter_on_the_same_model_is_refused(bases, tmp_path):
    model = adapted(bases["llama"])
    save_adapter(model, tmp_path)
    before = logits(model)
    for again in (lambda: lora.inject(model, 4, 8), lambda: load_adapter(model, tmp_path)):
        with pytest.raises(ValueError, match="the model has LoRA layers already; load it again"):
            again()
    assert torch.equal(logits(model), before)
