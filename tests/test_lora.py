"""LoRA by hand against PEFT: the same losses from the same start, and adapters that each reads from the other."""

import dataclasses
import json
import math
import shutil
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.utils.rnn import pad_sequence

from minitune import data, quant
from minitune.adapters import lora, peft_files
from minitune.adapters.peft_files import load_adapter, save_adapter
from minitune.checkpoint import load_model
from minitune.config import TrainConfig
from minitune.loss import batch_loss
from minitune.model_folder import ModelFolder
from minitune.models import ARCHITECTURES, build
from minitune.plan import StepPlan
from minitune.tokenizer import load_tokenizer
from minitune.train import train

SIZES = {
    "vocab_size": 264,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
FAMILIES = ("llama", "mistral", "phi")
IDS = torch.randint(0, 264, (2, 12), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """{family: folder with a random model and a tokenizer of bytes}."""
    folders = {}
    for family in FAMILIES:
        folder = folders[family] = tmp_path_factory.mktemp("bases") / family
        folder.mkdir()
        raw = {"model_type": family, **SIZES} | ({"sliding_window": 20} if family == "mistral" else {})
        torch.manual_seed(0)
        net = build(raw)
        for parameter in net.parameters():
            mean, std = (0.0, 0.08) if parameter.ndim > 1 else (1.0, 0.1)
            torch.nn.init.normal_(parameter, mean, std)
        (folder / "config.json").write_text(json.dumps(raw))
        save_file(dict(net.state_dict()), folder / "model.safetensors", metadata={"format": "pt"})
        alphabet = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
        tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.add_special_tokens(["<|endoftext|>"])
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    return folders


@pytest.fixture(scope="module")
def peft():
    reason = "compares with PEFT: pip install minitune[test]"
    pytest.importorskip("transformers", reason=reason)
    return pytest.importorskip("peft", reason=reason)


def their_base(folder, quantize="none"):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options = {}
    if quantize != "none":
        pytest.importorskip("bitsandbytes", reason="the other side's 4 bit: pip install minitune[test]")
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.float32,
            bnb_4bit_use_double_quant=quantize == "nf4-dq",
        )
        options["device_map"] = "cpu"
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


@torch.no_grad()
def logits(model):
    out = model(IDS)
    return out if isinstance(out, torch.Tensor) else out.logits


def adapted(folder, targets=("all-linear",), r=4, alpha=8, quantize="none", dtype=torch.float32, **options):
    """Our model with an adapter whose B is random, so that it says something."""
    model = load_model(folder, quantize=quantize, dtype=dtype)
    lora.inject(model, r, alpha, targets=targets, **options)
    generator = torch.Generator().manual_seed(5)
    for layer in lora.lora_layers(model).values():
        layer.lora_B.weight.data.normal_(0, 0.1, generator=generator)
    return model


# --- the same losses ---------------------------------------------------------------------------

RUNS = [
    *((family, quantize, None) for family in FAMILIES for quantize in ("none", "nf4")),
    ("mistral", "nf4-dq", ("all-linear",)),
    ("phi", "none", ("q_proj", "fc2", "lm_head")),
    ("llama", "none", ("all-linear",)),
]


@pytest.mark.parametrize("family, quantize, targets", RUNS, ids=[f"{r[0]}-{r[1]}-{'-'.join(r[2] or ())}" for r in RUNS])
def test_the_first_20_losses_of_a_run_equal_those_of_peft(family, quantize, targets, bases, peft, tmp_path):
    rows = [{"prompt": f"{'abc ' * (i % 5)}{i} + {i * 7 % 13} =", "completion": f" {i + i * 7 % 13}" * (1 + i % 3)}
            for i in range(100)]  # fmt: skip
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    config = TrainConfig(
        model=str(bases[family]), data=str(tmp_path / "rows.json"), test_size=0, run=str(tmp_path / "run"),
        device="cpu", dtype="fp32", quantize=quantize, lora_rank=8, lora_alpha=16.0, lora_targets=targets,
        max_steps=20, batch_size=3, accumulation=2, learning_rate=5e-3, schedule="constant", weight_decay=0.01,
        max_grad_norm=0.5, samples=0, spike_factor=0, save_every=20, seed=7,
    )  # fmt: skip
    train(config, say=lambda line: None)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    ours, norms = [r["loss"] for r in records], [r["grad_norm"] for r in records]

    names = list(targets or ARCHITECTURES[family][2])
    theirs = peft.get_peft_model(
        their_base(bases[family], quantize),
        peft.LoraConfig(
            r=8, lora_alpha=16, task_type="CAUSAL_LM", target_modules=names[0] if names == ["all-linear"] else names
        ),
    ).train()
    start = load_model(bases[family])
    lora.inject(start, 8, 16, targets=tuple(names), seed=7)
    trained = {n.replace(".default.", "."): p for n, p in theirs.named_parameters() if p.requires_grad}
    assert trained.keys() == lora.adapter_tensors(start).keys()
    for name, tensor in lora.adapter_tensors(start).items():
        trained[name].data.copy_(tensor.data)
    optimizer = torch.optim.AdamW(trained.values(), lr=5e-3, weight_decay=0.01)
    train_set, _ = data.load(config.data, load_tokenizer(bases[family]), test_size=0)
    expected, expected_norms = [], []
    for step in range(20):
        batches = StepPlan(config, train_set).batches(step, train_set, 0)
        parts = [[e for row in b.rows for e in train_set.examples if e.row == row] for b in batches]
        assert any(len({len(e.ids) for e in part}) > 1 for part in parts)
        count = sum(sum(label != -100 for label in e.labels[1:]) for part in parts for e in part)
        total = 0.0
        for part in parts:
            pad = lambda lists, value: pad_sequence([torch.tensor(x) for x in lists], True, value)
            loss = theirs(
                input_ids=pad([e.ids for e in part], 0),
                attention_mask=pad([[1] * len(e.ids) for e in part], 0),
                labels=pad([e.labels for e in part], -100),
                num_items_in_batch=count,
            ).loss
            loss.backward()
            total += loss.item()
        expected.append(total)
        expected_norms.append(torch.nn.utils.clip_grad_norm_(trained.values(), 0.5).item())
        optimizer.step()
        optimizer.zero_grad()
    assert expected[0] - min(expected) > 0.3, "the losses must move, or equality says little"
    assert max(expected_norms) > 0.5, "clipping must have done something"
    assert max(abs(a - b) for a, b in zip(ours, expected, strict=True)) < 1e-4
    assert max(abs(a / b - 1) for a, b in zip(norms, expected_norms, strict=True)) < 1e-3


# --- adapters both ways -------------------------------------------------------------------------

ADAPTERS = {  # name: (targets of a family with this attention output, use_rslora)
    "peft's-defaults": (lambda family: ARCHITECTURES[family][2], False),
    "rslora": (lambda family: ("q_proj", "v_proj"), True),
    "all-linear": (lambda family: ("all-linear",), False),
    "head": (lambda family: ("k_proj", "lm_head"), False),
    "pattern": (lambda family: r"model\.layers\.1\..*(q_proj|dense|down_proj)|lm_head", False),
    "one-layer": (lambda family: ("layers.1.self_attn.k_proj", "model.layers.0.self_attn.v_proj"), False),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ADAPTERS)
def test_our_adapters_give_the_same_logits_in_peft(name, family, bases, peft, tmp_path):
    targets, use_rslora = ADAPTERS[name]
    model = adapted(bases[family], targets(family), use_rslora=use_rslora, dropout=0.1).eval()
    save_adapter(model, tmp_path, base_model=str(bases[family]))
    theirs = peft.PeftModel.from_pretrained(their_base(bases[family]), tmp_path)
    assert (logits(model) - logits(load_model(bases[family]))).abs().max() > 0.01
    torch.testing.assert_close(logits(theirs), logits(model), rtol=0, atol=1e-5)
    assert torch.equal(logits(load_model(bases[family], adapter=tmp_path)), logits(model))
    keys = {field.name for field in dataclasses.fields(peft.LoraConfig)} | {"peft_version"}
    assert json.loads((tmp_path / "adapter_config.json").read_text()).keys() <= keys


def write_theirs(peft, base, folder, seed=0, **options):
    """An adapter with random A and B that PEFT wrote, and its logits."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 8, "init_lora_weights": False, **options})
    theirs = peft.get_peft_model(base, config).eval()
    theirs.save_pretrained(folder)
    return logits(theirs)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", [*ADAPTERS, "unnamed"])
def test_adapters_of_peft_give_the_same_logits_here(name, family, bases, peft, tmp_path, capsys):
    targets, use_rslora = ADAPTERS.get(name, (lambda family: None, False))
    targets = targets(family)
    targets = "all-linear" if targets == ("all-linear",) else list(targets) if isinstance(targets, tuple) else targets
    options = {"target_modules": targets, "use_rslora": use_rslora, "lora_dropout": 0.1}
    expected = write_theirs(peft, their_base(bases[family]), tmp_path, **options)
    capsys.readouterr()
    model = load_model(bases[family], adapter=tmp_path)
    assert (logits(model) - logits(load_model(bases[family]))).abs().max() > 0.01
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    assert not capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings", "ignore:Setting `save_embedding_layers`")
def test_an_adapter_on_a_tied_head_leaves_the_embedding_alone(bases, peft, tmp_path):
    shutil.copytree(bases["llama"], tmp_path / "tied")
    raw = json.loads((tmp_path / "tied" / "config.json").read_text())
    (tmp_path / "tied" / "config.json").write_text(json.dumps(raw | {"tie_word_embeddings": True}))
    tensors = load_file(tmp_path / "tied" / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "tied" / "model.safetensors")
    base = their_base(tmp_path / "tied")
    expected = write_theirs(peft, base, tmp_path / "adapter", target_modules=["lm_head"])
    model = load_model(tmp_path / "tied", adapter=tmp_path / "adapter")
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    assert torch.equal(model.model.embed_tokens.weight, tensors["model.embed_tokens.weight"])


def test_an_adapter_on_a_4_bit_base_gives_the_same_logits_in_peft(bases, peft, tmp_path):
    model = adapted(bases["mistral"], quantize="nf4")
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(
        their_base(bases["mistral"], "nf4"), tmp_path
    ).train()  # in eval mode it computes in bf16
    torch.testing.assert_close(logits(theirs), logits(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_an_adapter_stored_in_another_dtype_is_read_into_fp32(dtype, bases, tmp_path):
    save_adapter(adapted(bases["llama"]), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    stored = {name: t.to(dtype) for name, t in load_file(path).items()}
    save_file(stored, path)
    model = load_model(bases["llama"], adapter=tmp_path)
    for name, tensor in lora.adapter_tensors(model).items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, stored[name].float())


def test_a_frozen_head_that_the_adapter_brings_replaces_the_models_and_is_said(bases, tmp_path, capsys):
    save_adapter(adapted(bases["llama"], ("q_proj", "lm_head")), tmp_path)
    path, key = tmp_path / "adapter_model.safetensors", "base_model.model.lm_head.base_layer.weight"
    head = load_file(bases["llama"] / "model.safetensors")["lm_head.weight"]
    save_file(load_file(path) | {key: head * 2}, path)
    model = load_model(bases["llama"], adapter=tmp_path)
    assert torch.equal(model.lm_head.base_layer.weight, head * 2)
    assert capsys.readouterr().err.endswith("brings its own lm_head.weight, to replace the model's, as in PEFT\n")
    save_file(load_file(path) | {key: head[:-1].contiguous()}, path)
    with pytest.raises(ValueError, match=r"lm_head.base_layer.weight \[263, 64\], expected \[264, 64\]"):
        load_model(bases["llama"], adapter=tmp_path)


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


# --- adapter files ------------------------------------------------------------------------------


def test_a_saved_adapter_has_pefts_names_and_metadata_and_nothing_else_in_the_folder(bases, tmp_path):
    model = adapted(bases["llama"], ("q_proj", "down_proj"), r=4, alpha=8, use_rslora=True)
    save_adapter(model, tmp_path, base_model="owner/name", revision="v1", extra={"template": "alpaca"})
    assert {p.name for p in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "minitune.json"}
    with safe_open(tmp_path / "adapter_model.safetensors", framework="pt") as f:
        assert f.metadata() == {"format": "pt"}
        shapes = {name: tuple(f.get_slice(name).get_shape()) for name in f.keys()}
    prefix = "base_model.model.model.layers.1"
    assert len(shapes) == 8
    assert shapes[f"{prefix}.self_attn.q_proj.lora_A.weight"] == (4, 64)
    assert shapes[f"{prefix}.mlp.down_proj.lora_B.weight"] == (64, 4)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    expected = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "use_rslora": True, "bias": "none"}
    expected |= {"base_model_name_or_path": "owner/name", "revision": "v1", "peft_type": "LORA", "lora_dropout": 0.0}
    assert expected.items() <= stored.items() and isinstance(stored["lora_alpha"], int)
    save_adapter(model, tmp_path)
    assert not (tmp_path / "minitune.json").exists(), "it was of the adapter before"


def test_an_adapter_whose_b_is_zero_is_an_error_unless_it_is_said_to_be_untrained(bases, tmp_path):
    model = load_model(bases["llama"])
    lora.inject(model, 4, 8)
    save_adapter(model, tmp_path / "start", trained=False)
    with pytest.raises(ValueError, match="every lora_B is zero, so the adapter does nothing"):
        save_adapter(model, tmp_path / "trained")
    list(lora.lora_layers(model).values())[-1].lora_B.weight.data[0, 0] = 1e-30
    save_adapter(model, tmp_path / "trained")


def test_an_adapter_that_is_not_finite_is_not_saved_and_the_one_before_stays(bases, tmp_path):
    model = adapted(bases["llama"])
    save_adapter(model, tmp_path)
    before = (tmp_path / "adapter_model.safetensors").read_bytes()
    model.model.layers[1].mlp.up_proj.lora_A.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"1 adapter tensors hold NaN or infinity, not saved: .*up_proj.lora_A.weight"):
        save_adapter(model, tmp_path)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before


def test_what_was_saved_is_read_back(bases, tmp_path, monkeypatch):
    model, write = adapted(bases["llama"]), peft_files.write_whole

    def flip_a_bit(path, content):
        write(path, content[:-1] + bytes([content[-1] ^ 1]))

    def cut(path, content):
        write(path, content[:-1])

    for fault, message in ((flip_a_bit, "does not hold what was written"), (cut, "is not a whole safetensors file")):
        monkeypatch.setattr(peft_files, "write_whole", fault)
        with pytest.raises(ValueError, match=message):
            save_adapter(model, tmp_path)


def test_a_model_without_an_adapter_has_nothing_to_save(bases, tmp_path):
    with pytest.raises(ValueError, match="no LoRA layers to save"):
        save_adapter(load_model(bases["llama"]), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_a_loaded_adapter_is_frozen_unless_it_is_to_be_trained(bases, tmp_path):
    save_adapter(adapted(bases["llama"]), tmp_path)
    for trainable in (False, True):
        model = load_model(bases["llama"])
        load_adapter(model, tmp_path, trainable)
        assert {n for n, p in model.named_parameters() if p.requires_grad} == {
            name.removeprefix("base_model.model.") for name in lora.adapter_tensors(model) if trainable
        }
        assert not any(module.training for module in model.modules())


@pytest.fixture
def saved(bases, tmp_path):
    """A good adapter on the Phi model, to be broken."""
    save_adapter(adapted(bases["phi"]), tmp_path / "adapter")
    return tmp_path / "adapter"


def edit(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


CHANGES = {  # key: values that change what an adapter does, and that are refused
    "use_dora": (True,),
    "layer_replication": ([[0, 1]],),
    "lora_bias": (True,),
    "init_lora_weights": ("pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga", "mica"),
    "loftq_config": ({"loftq_bits": 4},),
    "target_parameters": (["mlp.fc1.weight"],),
    "trainable_token_indices": ([1, 2],),
    "use_qalora": (True,),
    "alora_invocation_tokens": ([1],),
    "megatron_config": ({"a": 1},),
    "task_type": ("SEQ_CLS",),
    "r": (0, "8", 4.0, True, 2**63),
    "lora_alpha": ("8", float("nan"), True),
    "lora_dropout": (1.1, -0.1, "0.1"),
    "rank_pattern": ([1],),
    "bias": ("some",),
    "modules_to_save": ("lm_head",),
    "layers_to_transform": ("1", -1),
    "fan_in_fan_out": ("yes",),
    "use_rslora": ("false", 1),
    "target_modules": ([], "", {"a": 1}),
}


@pytest.mark.parametrize("key", CHANGES)
def test_a_setting_that_is_not_implemented_is_refused_by_name(key, saved, bases):
    for value in CHANGES[key]:
        edit(saved, **{key: value})
        model = load_model(bases["phi"])
        with pytest.raises(ValueError, match=rf"adapter_config.json: {key} is ") as raised:
            load_adapter(model, saved)
        assert "\n" not in str(raised.value) and not lora.lora_layers(model)
        assert len(str(raised.value)) < 450


def test_a_setting_that_asks_for_nothing_is_taken_and_a_missing_target_is_named_last(saved, bases):
    edit(saved, layer_replication=[], alora_invocation_tokens=[], megatron_config={}, lora_ga_config={})
    assert lora.lora_layers(load_model(bases["phi"], adapter=saved))
    edit(saved, target_modules=[], target_parameters=["mlp.fc1.weight"])
    with pytest.raises(ValueError, match="target_parameters is "):
        load_model(bases["phi"], adapter=saved)


@pytest.mark.parametrize(
    "method", ["IA3", "LOHA", "LOKR", "PROMPT_TUNING", "PREFIX_TUNING", "ADALORA", "A_NEW_ONE", ["x"]]
)
def test_an_adapter_of_another_method_is_refused_as_what_it_is(method, saved, bases):
    (saved / "adapter_config.json").write_text(json.dumps({"peft_type": method, "r": "no number"}))
    (saved / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="another method, peft_type .*; minitune reads LORA only") as raised:
        load_model(bases["phi"].parent / "nowhere", adapter=saved)  # before the model is looked for
    assert str(method) in str(raised.value) and "\n" not in str(raised.value)


def test_every_setting_of_the_installed_peft_is_read_or_refused_when_it_is_not_its_default(saved, peft):
    harmless = peft_files.ADAPTER_IGNORED | peft_files.ADAPTER_READ | {"init_lora_weights"}
    defaults = peft.LoraConfig(r=4, target_modules=["fc1"], task_type="CAUSAL_LM").to_dict()
    checked = 0
    for field in dataclasses.fields(peft.LoraConfig):
        if field.name in harmless:
            continue
        default = defaults.get(field.name)
        other = (
            {"none": "all", False: True, None: [1]}.get(default, "other") if not isinstance(default, dict) else {"a": 1}
        )
        edit(saved, **{field.name: other})
        with pytest.raises(ValueError, match=f"adapter_config.json: {field.name} is "):
            peft_files.read_adapter_config(saved)
        edit(saved, **{field.name: default})
        checked += 1
    assert checked > 15
    peft_files.read_adapter_config(saved)  # with every key at PEFT's default


@pytest.mark.parametrize("value", [None, False, {}, [], True, "on", 3, {"a": 1}])
def test_a_key_of_the_future_is_named_where_it_asks_for_something(value, saved, bases, capsys):
    edit(saved, a_key_of_the_future=value)
    load_model(bases["phi"], adapter=saved)
    said = capsys.readouterr().err
    assert said.count("\n") == bool(value) and (
        "passed over, as by PEFT: the keys a_key_of_the_future" in said
    ) == bool(value)


NULL = object()
AS_IN_PEFT = {  # name: (options of the adapter that PEFT writes, changes of its adapter_config.json, what the line says)
    "rank-pattern-of-r": ({}, {"rank_pattern": {"q_proj": 4}}, None),
    "rank-pattern": (
        {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.fc1": 6}, "alpha_pattern": {"fc1": 3.5}},
        {},
        None,
    ),
    "rank-pattern-rslora": ({"rank_pattern": {"^model.layers.0.self_attn.q_proj": 2}, "use_rslora": True}, {}, None),
    "overlapping-patterns": (
        {"alpha_pattern": {"0.mlp.fc1": 1, "fc1": 2}, "rank_pattern": {"fc1|q_proj": 3}},
        {},
        None,
    ),
    "no-targets": ({"target_modules": None}, {"target_modules": None}, None),
    "targets-left-out": ({"target_modules": None}, {"target_modules": NULL}, None),
    "r-and-alpha-left-out": ({"r": 8, "lora_alpha": 8}, {"r": NULL, "lora_alpha": NULL}, None),
    "fan-in-fan-out": ({}, {"fan_in_fan_out": True}, "fan_in_fan_out, which linear layers do not have"),
    "dropout-1": ({"lora_dropout": 1.0}, {}, None),
    "unknown-keys": ({}, {"from_the_future": [1], "enable_lora": [True]}, "the keys from_the_future, enable_lora"),
    "all-linear-in-capitals": ({"target_modules": "all-linear"}, {"target_modules": "ALL-LINEAR"}, None),
    "eva": ({}, {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}}, None),
    "some-layers": ({"layers_to_transform": [1]}, {}, None),
    "a-layer-by-pattern": ({"layers_to_transform": 0, "layers_pattern": "layers"}, {}, None),
    "excluded": ({"exclude_modules": ["layers.0.self_attn.q_proj", "fc1"]}, {}, None),
    "excluded-by-pattern": ({"exclude_modules": r".*\.1\..*"}, {}, None),
    "biases": ({"bias": "all"}, {}, None),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", AS_IN_PEFT)
def test_what_peft_loads_gives_the_same_logits_here(name, bases, peft, tmp_path, capsys):
    options, changes, line = AS_IN_PEFT[name]
    targets = {"target_modules": ["q_proj", "v_proj", "fc1"]}
    write_theirs(peft, their_base(bases["phi"]), tmp_path, **targets | options)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not NULL}))
    expected = logits(peft.PeftModel.from_pretrained(their_base(bases["phi"]), tmp_path).eval())
    assert (expected - logits(load_model(bases["phi"]))).abs().max() > 0.01
    capsys.readouterr()
    model = load_model(bases["phi"], adapter=tmp_path)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    said = capsys.readouterr().err
    assert said.count("\n") == (line is not None) and (line or "") in said
    save_adapter(model, tmp_path / "again")
    assert torch.equal(logits(load_model(bases["phi"], adapter=tmp_path / "again")), logits(model))
    theirs = peft.PeftModel.from_pretrained(their_base(bases["phi"]), tmp_path / "again").eval()
    torch.testing.assert_close(logits(theirs), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "pattern",
    ["(.*)*x", "((x{1000}){1000}){1000}", "(.*a){20}", "x" * 10**6, "(" * 3000, "[[a]", "x{" + "9" * 5000 + "}"],
)
def test_a_pattern_costs_a_bounded_time(pattern, saved, bases):
    edit(saved, target_modules=pattern)
    model, start = load_model(bases["phi"]), time.perf_counter()
    with pytest.raises(ValueError) as raised:
        load_adapter(model, saved)
    assert time.perf_counter() - start < 3.5 and len(str(raised.value).replace(str(saved), "")) < 400


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize(
    "modules", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens", "final_layernorm", "gone"]]
)
def test_modules_that_an_adapter_saves_whole_replace_the_models(modules, is_tied, bases, peft, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    base, adapter = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(bases["phi"], base)
    if is_tied:
        raw, tensors = json.loads((base / "config.json").read_text()), load_file(base / "model.safetensors")
        (base / "config.json").write_text(json.dumps(raw | {"tie_word_embeddings": True}))
        del tensors["lm_head.weight"]
        save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})

    def theirs():
        return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)

    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=modules, init_lora_weights=False)
    trained = peft.get_peft_model(theirs(), config)
    for name, parameter in trained.named_parameters():
        if "modules_to_save" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    trained.save_pretrained(adapter)
    expected = logits(peft.PeftModel.from_pretrained(theirs(), adapter).eval())
    capsys.readouterr()
    model = load_model(base, adapter=adapter)
    said = capsys.readouterr().err
    assert "brings modules_to_save of its own, which replace the model's" in said
    assert ("modules_to_save gone, which this model does not have" in said) == ("gone" in modules)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="of another adapter, which would not be saved"):
        save_adapter(model, tmp_path / "again")
    edit(adapter, modules_to_save=["v_proj"])
    with pytest.raises(
        ValueError, match="modules_to_save names 'v_proj', which this model does not have as plain weights"
    ):
        load_model(base, quantize="nf4", adapter=adapter)


def test_an_adapter_whose_products_overflow_is_refused(bases, saved):
    tensors = load_file(saved / "adapter_model.safetensors")
    for large in (1e10, -3e38):
        changed = {name: torch.full_like(tensor, large) for name, tensor in tensors.items()}
        save_file(changed, saved / "adapter_model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match="q_proj are too large to compute with .up to .*the adapter is damaged"):
            load_model(bases["phi"], adapter=saved)


def test_a_pattern_that_never_ends_is_stopped():
    with pytest.raises(ValueError, match="needs too much time or memory; use a simpler one, or a list of names"):
        lora.matching(r"(?:(a|aa)+)+\1b|(x+x+)+y", ["a" * 60, "x" * 60])


def test_a_model_folder_with_an_adapter_is_the_adapted_model(bases, peft, tmp_path, capsys):
    folder = tmp_path / "both"
    shutil.copytree(bases["phi"], folder)
    write_theirs(peft, their_base(folder), folder, target_modules=["q_proj"])
    from transformers import AutoModelForCausalLM

    expected = logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    capsys.readouterr()
    torch.testing.assert_close(logits(load_model(folder)), expected, rtol=0, atol=1e-5)
    assert "holds an adapter beside the model; it is applied, as transformers does." in capsys.readouterr().err
    save_adapter(adapted(bases["phi"]), tmp_path / "other")
    other = load_model(folder, adapter=tmp_path / "other")
    assert torch.equal(logits(other), logits(load_model(bases["phi"], adapter=tmp_path / "other")))
    assert "holds an adapter of its own, which is left out" in capsys.readouterr().err
    with pytest.raises(ValueError, match="a new one cannot be trained on top of it"):
        ModelFolder(folder).check_trainable()
    edit(folder, peft_type="IA3")
    with pytest.raises(ValueError, match="peft_type 'IA3'"):
        load_model(folder)
    edit(folder, peft_type="LORA", base_model_name_or_path="my/base")
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"holds an adapter, not the weights of a model; name its base \('my/base'\) with"
    ):
        load_model(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"holds an adapter, not a model; name its base \('my/base'\) with --model"):
        load_model(folder)


def test_null_is_the_default_of_every_key_that_has_one(saved, bases):
    expected = logits(load_model(bases["phi"], adapter=saved))
    edit(
        saved,
        **dict.fromkeys([*peft_files.ADAPTER_DEFAULTS, *peft_files.ADAPTER_IGNORED, "lora_dropout", "use_rslora"]),
    )
    assert torch.equal(logits(load_model(bases["phi"], adapter=saved)), expected)


def test_the_oldest_adapters_with_few_keys_load(saved, bases):
    expected = logits(load_model(bases["phi"], adapter=saved))
    stored = json.loads((saved / "adapter_config.json").read_text())
    few = {key: stored[key] for key in ("r", "lora_alpha", "target_modules", "peft_type")}
    (saved / "adapter_config.json").write_text(json.dumps(few))
    assert torch.equal(logits(load_model(bases["phi"], adapter=saved)), expected)


def test_names_that_the_model_does_not_have_are_loudly_passed_over_as_by_peft(bases, peft, tmp_path, capsys):
    expected = write_theirs(peft, their_base(bases["phi"]), tmp_path, target_modules=["q_proj", "o_proj", "Wqkv"])
    capsys.readouterr()
    model = load_model(bases["phi"], adapter=tmp_path)
    warning = capsys.readouterr().err
    assert warning.startswith("warning: ") and warning.count("\n") == 1
    assert "o_proj" in warning and "Wqkv" in warning and "q_proj" not in warning and "passed over" in warning
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    edit(tmp_path, target_modules=["o_proj", "Wqkv"])
    with pytest.raises(ValueError, match="none of target_modules o_proj, Wqkv is in this model"):
        load_model(bases["phi"], adapter=tmp_path)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_an_adapter_on_the_embedding_is_refused_by_name(bases, peft, tmp_path):
    write_theirs(peft, their_base(bases["phi"]), tmp_path, target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(ValueError, match="no linear layer is named embed_tokens"):
        load_model(bases["phi"], adapter=tmp_path)
    edit(tmp_path, target_modules=r".*(q_proj|embed_tokens)")
    with pytest.raises(ValueError, match=r"2 unexpected: base_model\.model\.model\.embed_tokens\.lora_embedding_A"):
        load_model(bases["phi"], adapter=tmp_path)


def replace_tensor(name, make):
    def damage(folder):
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        key = f"base_model.model.model.layers.1.{name}.weight"
        tensor = make(tensors.pop(key, None))
        save_file(tensors if tensor is None else tensors | {key: tensor}, path)

    return damage


def rewrite(file, change):
    return lambda folder: (folder / file).write_bytes(change((folder / file).read_bytes()))


WEIGHTS = "adapter_model.safetensors"
BROKEN = {
    "wrong-shape": (
        replace_tensor("mlp.fc1.lora_A", lambda t: t[:, :-1].contiguous()),
        r"1 of another shape: \S+layers\.1\.mlp\.fc1\.lora_A\.weight \[4, 63\], expected \[4, 64\]",
    ),
    "another-rank": (
        lambda f: edit(f, r=8),
        r"of another shape: (\S+ \[\d+, \d+\], expected \[\d+, \d+\],? ){2}and \d+ more",
    ),
    "missing": (
        replace_tensor("mlp.fc1.lora_B", lambda t: None),
        r"1 missing: \S+layers\.1\.mlp\.fc1\.lora_B\.weight$",
    ),
    "fewer-targets": (
        lambda f: edit(f, target_modules=["fc1"]),
        r"unexpected: (\S+lora_[AB]\.weight,? ){2}and \d+ more",
    ),
    "more-targets": (
        lambda f: edit(f, target_modules=["all-linear", "lm_head"]),
        r"2 missing: \S+lm_head\.lora_A\.weight",
    ),
    "dora-vector": (
        replace_tensor("mlp.fc1.lora_magnitude_vector", lambda t: torch.ones(128)),
        "1 unexpected: .*lora_magnitude_vector",
    ),
    "float8": (
        replace_tensor("mlp.fc1.lora_A", lambda t: t.to(torch.float8_e5m2)),
        r"expected F32, F16, BF16, F64, found .*E5M2",
    ),
    "not-a-number": (
        replace_tensor("mlp.fc1.lora_A", lambda t: t.fill_(torch.nan)),
        f"{WEIGHTS} holds NaN or infinity, expected finite weights: .*fc1.lora_A",
    ),
    "cut-short": (rewrite(WEIGHTS, lambda b: b[:-10]), f"{WEIGHTS} is not a whole safetensors file"),
    "empty": (rewrite(WEIGHTS, lambda b: b""), f"{WEIGHTS} is not a whole safetensors file"),
    "header": (rewrite(WEIGHTS, lambda b: b"\xff" * 8 + b[8:]), f"{WEIGHTS} is not a whole safetensors file"),
    "a-folder": (lambda f: ((f / WEIGHTS).unlink(), (f / WEIGHTS).mkdir()), f"{WEIGHTS} cannot be read"),
    "no-weights": (lambda f: (f / WEIGHTS).unlink(), f"has no {WEIGHTS}; expected a folder in PEFT's format"),
    "pickle": (
        lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin"),
        "adapter_model.bin is a pickle, which is not read: save it again by a new PEFT",
    ),
    "no-config": (lambda f: (f / "adapter_config.json").unlink(), "adapter_config.json does not exist"),
    "config-list": (
        rewrite("adapter_config.json", lambda b: b"[]"),
        r"adapter_config.json: it is \[\], expected an obj",
    ),
    "config-not-json": (
        rewrite("adapter_config.json", lambda b: b[:-5]),
        "adapter_config.json is not valid JSON: line",
    ),
    "pattern": (lambda f: edit(f, target_modules="(q_proj"), r"'\(q_proj' is not a regular expression"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_adapter_is_refused_in_one_line_and_the_model_stays_as_it_was(name, saved, bases):
    damage, message = BROKEN[name]
    model = load_model(bases["phi"])
    before = logits(model)
    damage(saved)
    with pytest.raises(ValueError, match=message) as raised:
        load_adapter(model, saved)
    assert "\n" not in str(raised.value) and str(saved) in str(raised.value)
    assert not lora.lora_layers(model) and torch.equal(logits(model), before)
