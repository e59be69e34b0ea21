"""Weights from disk equal what was written, in every layout of files, and loading takes little memory beside the model."""

import json
import os
import re
import shutil
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import BNB, EMBEDDING, FAMILIES, HEAD, SHARD, sizes, write_model, write_weights

from minitune import quant
from minitune.checkpoint import load_model
from minitune.decoding.options import GenerateConfig
from minitune.generate import generate
from minitune.hub import INDEX
from minitune.models import build
from minitune.tokenizer import load_tokenizer

IDS = torch.randint(0, 264, (2, 12), generator=torch.Generator().manual_seed(3))


def loaded(model):
    return {name: p.detach() for name, p in model.named_parameters(remove_duplicate=False)}


# --- what is loaded ---------------------------------------------------------------------------


@torch.no_grad()
def test_logits_of_stories260k_are_those_of_transformers_and_of_float64(data_dir):
    expected = load_file(data_dir / "stories260K/expected_logits.safetensors")
    logits = load_model(data_dir / "stories260K")(expected["input_ids"])
    # Logits reach 22, where fp32 has steps of 2e-6. transformers' two ways of attention differ by 2e-5 here.
    torch.testing.assert_close(logits, expected["logits"], rtol=0, atol=3e-5)
    error, theirs = ((t.double() - expected["logits_f64"]).abs().max() for t in (logits, expected["logits"]))
    assert error < 1.5 * theirs < 3e-5


@torch.no_grad()
def test_greedy_text_of_stories260k_is_the_published_one_with_and_without_a_cache(data_dir):
    model, tokenizer = load_model(data_dir / "stories260K"), load_tokenizer(data_dir / "stories260K")
    stored = json.loads((data_dir / "stories260K/expected_greedy.json").read_text())
    story, prompts = stored["from_bos"], stored["prompts"]
    (new,) = generate(model, [[1]], GenerateConfig(max_new_tokens=256))
    assert [1, *new] == story["published_ids"]
    assert tokenizer.decode(new) == story["published_text"]
    ids = [1]
    for _ in range(100):
        ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
    assert ids == story["published_ids"][:101]
    longest = max(len(p["ids"]) - len(p["prompt_ids"]) for p in prompts)
    answers = generate(model, [p["prompt_ids"] for p in prompts], GenerateConfig(max_new_tokens=longest))
    for prompt, answer in zip(prompts, answers, strict=True):
        both = prompt["prompt_ids"] + answer
        assert both[: len(prompt["ids"])] == prompt["ids"], prompt["prompt"]
        assert tokenizer.decode(prompt["ids"][1:]) == prompt["text"]


@pytest.mark.parametrize("family", FAMILIES)
def test_one_file_and_shards_give_the_weights_that_were_written(family, tmp_path):
    tensors = write_model(tmp_path / "one", family)
    write_model(tmp_path / "three", family, shards=3)
    one, three = load_model(tmp_path / "one"), load_model(tmp_path / "three")
    assert loaded(one).keys() == tensors.keys() == loaded(three).keys()
    for name, tensor in tensors.items():
        assert torch.equal(loaded(one)[name], tensor) and torch.equal(loaded(three)[name], tensor), name
    assert not one.training and not any(p.requires_grad for p in one.parameters())


@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_every_weight_is_rounded_once_to_the_dtype_asked_for(stored, wanted, tmp_path):
    tensors = write_model(tmp_path, "phi", stored)
    model = load_model(tmp_path, dtype=wanted)
    for name, weight in loaded(model).items():
        assert weight.dtype == wanted and torch.equal(weight, tensors[name].to(wanted)), name
    with torch.no_grad():
        assert model(IDS).isfinite().all()


def test_the_model_outlives_its_files(tmp_path):
    tensors, file = quantised_folder(tmp_path), tmp_path / "model.safetensors"
    model = load_model(tmp_path, dtype=torch.bfloat16)
    layer = model.model.layers[1].mlp.up_proj
    before = layer.dequantize()
    file.write_bytes(b"\xff" * file.stat().st_size)
    assert all(torch.equal(weight, tensors[name]) for name, weight in loaded(model).items())
    assert torch.equal(layer.dequantize(), before)


@pytest.mark.parametrize("head", ["absent", "a-copy", "a-copy-in-another-dtype"])
def test_a_tied_head_is_the_embedding(head, tmp_path):
    tensors = write_model(tmp_path, dtype=torch.bfloat16, tie_word_embeddings=True)
    if head != "absent":
        copy = tensors["model.embed_tokens.weight"].clone()
        write_weights(tmp_path, tensors | {"lm_head.weight": copy.float() if "dtype" in head else copy})
    model = load_model(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, tensors["model.embed_tokens.weight"].float())


def test_buffers_that_old_files_hold_are_passed_over(tmp_path):
    tensors = write_model(tmp_path)
    old = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.rand(8) for i in range(2)}
    write_weights(tmp_path, tensors | old)
    assert loaded(load_model(tmp_path)).keys() == tensors.keys()


def test_the_index_says_which_of_two_copies_counts(tmp_path):
    tensors = write_model(tmp_path, shards=2)
    files = ("model-00001-of-00002.safetensors", SHARD)
    stored = [load_file(tmp_path / file) for file in files]
    first, second = (next(iter(part)) for part in stored)
    save_file(stored[0] | {second: torch.zeros_like(tensors[second])}, tmp_path / files[0])
    save_file(stored[1] | {first: torch.zeros_like(tensors[first])}, tmp_path / files[1])
    weights = loaded(load_model(tmp_path))
    assert torch.equal(weights[first], tensors[first]) and torch.equal(weights[second], tensors[second])


def test_a_single_file_goes_before_an_index_as_in_transformers(tmp_path):
    write_model(tmp_path, shards=2)
    tensors = {name: t + 1 for name, t in write_model(tmp_path / "other").items()}
    write_weights(tmp_path, tensors)
    assert torch.equal(loaded(load_model(tmp_path))["model.norm.weight"], tensors["model.norm.weight"])


def test_files_may_be_links_as_in_the_cache_of_the_hub(tmp_path):
    tensors = write_model(tmp_path / "blobs", shards=2)
    (tmp_path / "snapshot").mkdir()
    for path in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    assert loaded(load_model(tmp_path / "snapshot")).keys() == tensors.keys()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("double", [False, True], ids=["nf4", "nf4-dq"])
def test_nf4_takes_the_linear_layers_of_the_blocks_and_nothing_else(family, double, tmp_path):
    tensors = write_model(tmp_path, family, torch.bfloat16, shards=2)
    model = load_model(tmp_path, dtype=torch.float32, quantize="nf4-dq" if double else "nf4")
    plain = loaded(load_model(tmp_path))
    layers = {name: m for name, m in model.named_modules() if isinstance(m, quant.NF4Linear)}
    blocks = {n.removesuffix(".weight") for n, t in tensors.items() if n.startswith("model.layers.") and t.ndim == 2}
    assert layers.keys() == blocks
    for name, layer in layers.items():
        expected = quant.NF4Linear.from_weight(tensors[f"{name}.weight"], None, torch.float32, double)
        assert layer.double_quant == double and torch.equal(layer.dequantize(), expected.dequantize()), name
        plain[f"{name}.weight"] = layer.dequantize()
    assert all(torch.equal(p, plain[name]) for name, p in model.named_parameters())
    reference = build(json.loads((tmp_path / "config.json").read_text())).eval()
    reference.load_state_dict(plain)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS), reference(IDS), rtol=0, atol=1e-5)


@pytest.mark.parametrize("quantize, size", [("none", "215 KB"), ("nf4", "109 KB")])
def test_the_load_line_tells_the_parameters_and_the_size(quantize, size, tmp_path):
    write_model(tmp_path, vocab_size=260, dtype=torch.bfloat16)
    lines = []
    load_model(tmp_path, dtype=torch.bfloat16, quantize=quantize, say=lines.append)
    assert lines[0] == f"Loaded {tmp_path.name}: 107.3 K parameters, {size}."


# --- what transformers loads, loads -------------------------------------------------------------


def logits_of(folder, **options):
    with torch.no_grad():
        return load_model(folder, **options)(IDS)


def rename(change):
    return lambda tensors: {change(name): tensor for name, tensor in tensors.items()}


Q_BIAS = "model.layers.0.self_attn.q_proj.bias"
PASSED = {  # name: (options of the config, what happens to the tensors, what the line says, None for no line)
    "names-without-model": ({}, rename(lambda n: n.removeprefix("model.")), None),
    "model-before-the-head": ({}, rename(lambda n: f"model.{n}" if n == HEAD else n), None),
    "base-of-a-tied-model": ({"tie_word_embeddings": True}, rename(lambda n: n.removeprefix("model.")), None),
    "head-of-a-tied-pair": (
        {"tie_word_embeddings": True},
        rename(lambda n: HEAD if n == EMBEDDING else n),
        "lm_head.weight is used for the embedding too",
    ),
    "head-that-is-not-tied": (
        {"tie_word_embeddings": True},
        lambda t: t | {HEAD: t[EMBEDDING] + 0.1},
        "tie_word_embeddings true, but lm_head.weight differs",
    ),
    "other-heads": (
        {},
        lambda t: t | {"v_head.summary.weight": torch.ones(1, 64), "score.weight": torch.ones(2, 64)},
        "the tensors score.weight, v_head.summary.weight",
    ),
    "tables": (
        {},
        lambda t: t | {f"model.layers.0.self_attn.rotary_emb.{n}_cached": torch.ones(4) for n in ("cos", "sin")},
        "rotary_emb.cos_cached",
    ),
    "inverse-frequencies": ({}, lambda t: t | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, None),
    "zero-bias": ({}, lambda t: t | {Q_BIAS: torch.zeros(64)}, f"the tensors {Q_BIAS}"),
    "bias": (
        {},
        lambda t: t | {Q_BIAS: torch.ones(64)},
        f"warning: .*no place for some tensors: {Q_BIAS}.*will be wrong",
    ),
    "more-layers": (
        {},
        lambda t: t | {n.replace("layers.1", "layers.2"): v.clone() for n, v in t.items() if "layers.1" in n},
        r"no place for some tensors.*\.weight and 6 more",
    ),
    "float64": ({}, lambda t: {n: v.double() + 1e-12 for n, v in t.items()}, None),
    "an-escape": ({}, lambda t: t | {"\x1b[31m" + "x" * 500: torch.ones(1)}, r"tensors \\x1b\[31mxxx.*\.\.\."),
}


@pytest.mark.parametrize("name", PASSED)
def test_what_transformers_passes_over_is_passed_over_in_one_line(name, tmp_path, capsys):
    transformers = pytest.importorskip("transformers", reason="compares with what transformers loads")
    options, change, line = PASSED[name]
    write_weights(tmp_path, {n: v.contiguous() for n, v in change(write_model(tmp_path, **options)).items()})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(IDS).logits
    capsys.readouterr()
    torch.testing.assert_close(logits_of(tmp_path), expected, rtol=0, atol=1e-5)
    said = capsys.readouterr().err
    assert said.count("\n") == (line is not None) and len(said) < 500 and "\x1b" not in said
    assert line is None or re.search(line, said)
    assert load_model(tmp_path, quantize="nf4") is not None


def test_an_index_may_name_what_nobody_needs_or_the_wrong_shard(tmp_path):
    expected = write_model(tmp_path, shards=2)
    index = json.loads((tmp_path / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"] = {name: files[0] for name in index["weight_map"]} | {"gone.weight": files[1]}
    (tmp_path / INDEX).write_text(json.dumps(index))
    found = loaded(load_model(tmp_path))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_end_ids_that_no_token_has_are_left_out(tmp_path):
    write_model(tmp_path, eos_token_id=-1)
    assert load_model(tmp_path).eos_ids == ()
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 10**6, -1]}))
    assert load_model(tmp_path).eos_ids == (3,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ["</s>"]}))
    with pytest.raises(
        ValueError, match=r"generation_config.json: eos_token_id\[0\] is '</s>', expected a whole number"
    ):
        load_model(tmp_path)


def test_a_million_layers_are_refused_at_once(tmp_path):
    write_model(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"num_hidden_layers": 10**6}))
    start = time.process_time()  # other processes do not count
    with pytest.raises(ValueError, match="num_hidden_layers is 1000000, expected a whole number from 1 to 1000"):
        load_model(tmp_path)
    assert time.process_time() - start < 5  # a million would take minutes


# --- what bitsandbytes quantised --------------------------------------------------------------

TRANSFORMERS_NAMES = {"llama": "Llama", "mistral": "Mistral", "phi": "Phi"}
STORED_4BIT = [("llama", "plain", "uint8"), ("mistral", "double", "bfloat16"), ("phi", "double", "uint8")]


@pytest.mark.parametrize("family, kind, storage", STORED_4BIT, ids=["-".join(case) for case in STORED_4BIT])
def test_a_folder_that_bitsandbytes_quantised_loads_without_it(family, kind, storage, tmp_path, monkeypatch):
    reason = "writes the folder to read: pip install minitune[test]"
    transformers = pytest.importorskip("transformers", reason=reason)
    pytest.importorskip("bitsandbytes", reason=reason)
    write_model(tmp_path / "base", family)
    wanted = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=kind == "double",
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_quant_storage=storage,
    )
    load = getattr(transformers, f"{TRANSFORMERS_NAMES[family]}ForCausalLM").from_pretrained
    theirs = load(tmp_path / "base", quantization_config=wanted, device_map="cpu", dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "quantised", max_shard_size="60KB")
    shards = [load_file(path) for path in (tmp_path / "quantised").glob("*.safetensors")]
    stored = next(part[name] for part in shards for name in part if name.endswith("q_proj.weight"))
    assert len(shards) > 1 and stored.dtype == getattr(torch, storage) and stored.shape[1] == 1
    with torch.no_grad():
        expected = theirs.dequantize(dtype=torch.float32)(IDS).logits

    for name in ("bitsandbytes", "transformers", "peft", "accelerate"):
        monkeypatch.setitem(sys.modules, name, None)  # importing them would fail
    model = load_model(tmp_path / "quantised")
    assert isinstance(model.model.layers[1].self_attn.q_proj, quant.NF4Linear)
    assert model.model.layers[1].self_attn.q_proj.double_quant == (kind == "double")
    with torch.no_grad():
        torch.testing.assert_close(model(IDS), expected, rtol=0, atol=1e-5)
    half = load_model(tmp_path / "quantised", dtype=torch.bfloat16)  # the compute dtype is ours to choose
    for name, layer in half.named_modules():
        if isinstance(layer, quant.NF4Linear):
            assert torch.equal(layer.dequantize(), theirs.get_submodule(name).weight.to(torch.bfloat16)), name
    with pytest.raises(ValueError, match="holds 4-bit weights already"):
        load_model(tmp_path / "quantised", quantize="nf4")


def quantised_folder(folder, layer="model.layers.1.mlp.up_proj"):
    """A folder where one layer is stored in 4 bit and the others are not, as llm_int8_skip_modules makes them."""
    tensors = write_model(folder, dtype=torch.bfloat16, quantization_config=BNB)
    tensors |= quant.NF4Linear.from_weight(tensors[f"{layer}.weight"], None, torch.bfloat16).to_bnb(layer)
    write_weights(folder, tensors)
    return tensors


def test_layers_that_were_kept_in_16_bit_are_read_beside_those_in_4_bit(tmp_path):
    quantised_folder(tmp_path)
    found = [name for name, m in load_model(tmp_path).named_modules() if isinstance(m, quant.NF4Linear)]
    assert found == ["model.layers.1.mlp.up_proj"]


@pytest.mark.parametrize(
    "part, tensor, message",
    [
        ("absmax", None, r"up_proj\.weight: missing absmax, unexpected none"),
        ("extra", torch.zeros(1), r"up_proj\.weight: .*unexpected extra"),
        ("absmax", torch.zeros(5), r"up_proj\.weight: absmax has 5 elements, expected 128 for shape \(128, 64\)"),
        ("", torch.zeros(7, 1, dtype=torch.uint8), r"up_proj\.weight: packed has 7 elements, expected 4096"),
        ("", None, r"1 missing: model\.layers\.1\.mlp\.up_proj\.weight$"),
        ("norm", torch.zeros(1), r"1 unexpected: model\.norm\.weight\.absmax"),
        ("embedding", torch.zeros(1), r"1 unexpected: model\.embed_tokens\.weight\.absmax"),
    ],
)
def test_a_stored_4_bit_layer_with_other_parts_is_refused_by_name(part, tensor, message, tmp_path):
    tensors = quantised_folder(tmp_path)
    places = {"norm": "model.norm.weight.absmax", "embedding": "model.embed_tokens.weight.absmax"}
    name = places.get(part, f"model.layers.1.mlp.up_proj.weight.{part}".rstrip("."))
    tensors.pop(name, None)
    write_weights(tmp_path, tensors if tensor is None else tensors | {name: tensor})
    with pytest.raises(ValueError, match=message) as raised:
        load_model(tmp_path)
    assert "\n" not in str(raised.value) and str(tmp_path) in str(raised.value)


def test_a_4_bit_layer_of_another_shape_than_the_model_is_refused(tmp_path):
    tensors = quantised_folder(tmp_path)
    wrong = quant.NF4Linear.from_weight(torch.randn(64, 128), None, torch.bfloat16)  # as many values, transposed
    write_weights(tmp_path, tensors | wrong.to_bnb("model.layers.1.mlp.up_proj"))
    with pytest.raises(ValueError, match=r"up_proj\.weight: .* has shape \[64, 128\], expected \[128, 64\]"):
        load_model(tmp_path)


# --- memory -----------------------------------------------------------------------------------

MEASURE = """
import json, os, sys
import torch
from minitune.checkpoint import load_model, model_bytes
from minitune.device import peak_bytes, reset_peak, resident_bytes
small, large, cpu = sys.argv[1], sys.argv[2], torch.device("cpu")
torch.set_num_threads(1)  # a fork has none of the threads that a product on several left waiting, and would wait for them
load_model(small, quantize="nf4-dq")  # whatever is imported or made at the first load
for quantize, dtype in (("none", "bfloat16"), ("none", "float32"), ("nf4", "bfloat16"), ("nf4-dq", "float32")):
    if os.fork() == 0:  # a process of its own, without the seconds of another import of torch
        before = resident_bytes()
        reset_peak(cpu)
        model = load_model(large, getattr(torch, dtype), quantize=quantize)
        print(json.dumps([quantize, dtype, peak_bytes(cpu) - before - model_bytes(model)]), flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="this system does not tell peak memory")
def test_memory_above_the_loaded_model_stays_below_twice_the_largest_tensor(tmp_path, forks):
    large = sizes(
        vocab_size=16384, hidden_size=1024, intermediate_size=2816, num_hidden_layers=4, num_attention_heads=16
    )
    raw = {"model_type": "llama", **large}
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in build(raw).named_parameters()}
    noise = torch.randn(1 << 20).to(torch.bfloat16)
    tensors = {n: noise.repeat(-(-s.numel() // len(noise)))[: s.numel()].clone().view(s) for n, s in shapes.items()}
    largest, total = (f(t.nbytes for t in tensors.values()) for f in (max, sum))
    slack = 20e6  # what malloc keeps; far below `total`, which a load of all at once would need
    assert total > 150e6 > 2 * largest + slack
    write_model(tmp_path / "small", dtype=torch.bfloat16)
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / "config.json").write_text(json.dumps(raw))
    write_weights(tmp_path / "large", tensors, shards=2)
    del tensors
    try:
        done = forks.start(MEASURE, "measure", tmp_path / "small", tmp_path / "large")
        done.wait(100)
    finally:
        shutil.rmtree(tmp_path / "large")
    measured = [json.loads(line) for line in done.out.read_text().splitlines()]
    assert len(measured) == 4, done.err.read_text()
    for quantize, dtype, above in measured:
        assert above < 2 * largest + slack, f"{quantize} {dtype}: {above / 1e6:.0f} MB above the model"
