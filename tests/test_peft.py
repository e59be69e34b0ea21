"""Adapters and losses against PEFT: equal losses, and adapters that each side reads from the other."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import FAMILIES
from small_adapters import adapted, edit, logits, their_base, write_theirs
from torch.nn.utils.rnn import pad_sequence

from minitune import data
from minitune.adapters import lora
from minitune.adapters.peft_files import save_adapter
from minitune.checkpoint import load_model
from minitune.config import TrainConfig
from minitune.model_folder import ModelFolder
from minitune.models import ARCHITECTURES
from minitune.plan import StepPlan
from minitune.tokenizer import load_tokenizer
from minitune.train import train

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
    assert capsys.readouterr().err.endswith("contains lm_head.weight, which replace those of the model, as in PEFT\n")
    save_file(load_file(path) | {key: head[:-1].contiguous()}, path)
    with pytest.raises(ValueError, match=r"lm_head.base_layer.weight \[263, 64\], expected \[264, 64\]"):
        load_model(bases["llama"], adapter=tmp_path)


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
    "fan-in-fan-out": ({}, {"fan_in_fan_out": True}, "fan_in_fan_out, which has no effect on linear layers"),
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
    assert "contains whole modules (modules_to_save), which replace the model's" in said
    assert ("modules_to_save gone, which this model does not have" in said) == ("gone" in modules)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="of a loaded adapter, which cannot be saved with this one"):
        save_adapter(model, tmp_path / "again")
    edit(adapter, modules_to_save=["v_proj"])
    with pytest.raises(
        ValueError, match="modules_to_save names 'v_proj', which this model does not have as plain weights"
    ):
        load_model(base, quantize="nf4", adapter=adapter)


def test_a_model_folder_with_an_adapter_is_the_adapted_model(bases, peft, tmp_path, capsys):
    folder = tmp_path / "both"
    shutil.copytree(bases["phi"], folder)
    write_theirs(peft, their_base(folder), folder, target_modules=["q_proj"])
    from transformers import AutoModelForCausalLM

    expected = logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    capsys.readouterr()
    torch.testing.assert_close(logits(load_model(folder)), expected, rtol=0, atol=1e-5)
    assert "holds an adapter beside the model; it is applied, as in transformers." in capsys.readouterr().err
    save_adapter(adapted(bases["phi"]), tmp_path / "other")
    other = load_model(folder, adapter=tmp_path / "other")
    assert torch.equal(logits(other), logits(load_model(bases["phi"], adapter=tmp_path / "other")))
    assert "holds an adapter beside the model; it is not applied" in capsys.readouterr().err
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


def test_names_that_the_model_does_not_have_are_loudly_passed_over_as_by_peft(bases, peft, tmp_path, capsys):
    expected = write_theirs(peft, their_base(bases["phi"]), tmp_path, target_modules=["q_proj", "o_proj", "Wqkv"])
    capsys.readouterr()
    model = load_model(bases["phi"], adapter=tmp_path)
    warning = capsys.readouterr().err
    assert warning.startswith("warning: ") and warning.count("\n") == 1
    assert "o_proj" in warning and "Wqkv" in warning and "q_proj" not in warning and "ignored" in warning
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    edit(tmp_path, target_modules=["o_proj", "Wqkv"])
    with pytest.raises(ValueError, match="the model has none of target_modules o_proj, Wqkv"):
        load_model(bases["phi"], adapter=tmp_path)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_an_adapter_on_the_embedding_is_refused_by_name(bases, peft, tmp_path):
    write_theirs(peft, their_base(bases["phi"]), tmp_path, target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(ValueError, match="no linear layer is named embed_tokens"):
        load_model(bases["phi"], adapter=tmp_path)
    edit(tmp_path, target_modules=r".*(q_proj|embed_tokens)")
    with pytest.raises(ValueError, match=r"2 unexpected: base_model\.model\.model\.embed_tokens\.lora_embedding_A"):
        load_model(bases["phi"], adapter=tmp_path)
