"""The files of an adapter: what is written, what is read, and what is refused by name."""

import dataclasses
import json
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_adapters import adapted, edit, logits

from minitune.adapters import lora, peft_files
from minitune.adapters.peft_files import load_adapter, save_adapter
from minitune.checkpoint import load_model

# --- what is written and read ---


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
    assert said.count("\n") == bool(value) and ("ignored, as in PEFT: the keys a_key_of_the_future" in said) == bool(
        value
    )


@pytest.mark.parametrize(
    "pattern",
    ["(.*)*x", "((x{1000}){1000}){1000}", "(.*a){20}", "x" * 10**6, "(" * 3000, "[[a]", "x{" + "9" * 5000 + "}"],
)
def test_a_pattern_costs_a_bounded_time(pattern, saved, bases):
    edit(saved, target_modules=pattern)
    model, start = load_model(bases["phi"]), time.process_time()
    with pytest.raises(ValueError) as raised:
        load_adapter(model, saved)
    assert time.process_time() - start < 5 and len(str(raised.value).replace(str(saved), "")) < 400


def test_an_adapter_whose_products_overflow_is_refused(bases, saved):
    tensors = load_file(saved / "adapter_model.safetensors")
    for large in (1e10, -3e38):
        changed = {name: torch.full_like(tensor, large) for name, tensor in tensors.items()}
        save_file(changed, saved / "adapter_model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match="q_proj are too large to compute with .up to .*The adapter is damaged"):
            load_model(bases["phi"], adapter=saved)


def test_a_pattern_that_never_ends_is_stopped():
    with pytest.raises(ValueError, match="needs too much time or memory; use a simpler one, or a list of names"):
        lora.matching(r"(?:(a|aa)+)+\1b|(x+x+)+y", ["a" * 60, "x" * 60])


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
        "adapter_model.bin is a pickle, which minitune does not read: save it again with a newer PEFT",
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
