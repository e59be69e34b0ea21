"""The blocks by hand against transformers: logits to 1e-5 and gradients to 1e-4 relative, in fp32, in every corner."""

import copy
import json

import pytest
import torch
from minitune_kernels import ops, ops_torch
from small import draw, sizes
from torch.nn import functional as F

from minitune.checkpoint import load_model
from minitune.models import ARCHITECTURES, build, build_encoder, config_json
from minitune.models.cache import Cache
from minitune.models.layers import Linear

SIZES = sizes(vocab_size=97, intermediate_size=112, num_hidden_layers=3, max_position_embeddings=64)
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CORNERS = {
    "llama": ("Llama", {}),
    "llama-gqa": ("Llama", {"num_key_value_heads": 2}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("Llama", {"head_dim": 24}),
    "llama-linear": ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 3.0}}),
    "llama-dynamic": ("Llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 3.0}}),
    "llama-dynamic-with-original-length": (
        "Llama",
        {"rope_scaling": {"rope_type": "dynamic", "factor": 3.0, "original_max_position_embeddings": 24}},
    ),
    "llama-llama3": ("Llama", {"rope_scaling": LLAMA3}),
    "mistral-window": ("Mistral", {"num_key_value_heads": 2, "sliding_window": 8}),
    "mistral-no-window": ("Mistral", {"num_key_value_heads": 2, "sliding_window": None, "rope_theta": 1e6}),
    "mistral-head-dim": ("Mistral", {"num_key_value_heads": 1, "sliding_window": None, "head_dim": 24}),
    "phi": ("Phi", {}),
    "phi-2": ("Phi", {"partial_rotary_factor": 0.4, "resid_pdrop": 0.1}),
    "phi-gqa": ("Phi", {"num_key_value_heads": 2}),
}


def pair(corner, seed=0):
    """(transformers' model, ours) with the same random weights, larger than models start with, so that errors show."""
    transformers = pytest.importorskip("transformers", reason="parity is proven against transformers")
    family, options = CORNERS[corner]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**SIZES, **copy.deepcopy(options))
    theirs = draw(getattr(transformers, f"{family}ForCausalLM")(config).eval())
    ours = build(json.loads(config.to_json_string())).eval()
    if config.tie_word_embeddings:
        ours.lm_head.weight = ours.model.embed_tokens.weight
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def tokens(*shape, seed=1):
    return torch.randint(0, SIZES["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("length", [40, 90], ids=["inside-the-context", "past-the-context"])
@pytest.mark.parametrize("corner", CORNERS)
@torch.no_grad()
def test_logits_equal_transformers(corner, length):
    theirs, ours = pair(corner)
    ids = tokens(2, length)
    torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=0, atol=1e-5)


@torch.no_grad()
def test_llama3s_bounds_in_the_wrong_order_are_those_of_transformers():
    theirs, ours = pair("llama-llama3")
    raw = json.loads(theirs.config.to_json_string())
    raw["rope_parameters"] |= {"low_freq_factor": 4.0, "high_freq_factor": 1.0}
    peer = type(theirs)(type(theirs.config).from_dict(copy.deepcopy(raw))).eval()
    peer.load_state_dict(theirs.state_dict())
    changed = build(raw).eval()
    changed.load_state_dict(ours.state_dict())
    torch.testing.assert_close(changed(tokens(1, 40)), peer(tokens(1, 40)).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("corner", CORNERS)
@torch.no_grad()
def test_padded_logits_equal_transformers_where_there_are_tokens(corner, side):
    theirs, ours = pair(corner)
    ids, mask = tokens(3, 40), torch.ones(3, 40, dtype=torch.long)
    padding = slice(0, 7) if side == "left" else slice(33, 40)
    mask[0, padding] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = theirs(ids, attention_mask=mask, position_ids=positions).logits
    found = ours(ids, attention_mask=mask)
    assert found.isfinite().all()
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-5)


@pytest.mark.parametrize("corner", CORNERS)
@torch.no_grad()
def test_packed_documents_equal_each_document_alone_and_transformers(corner):
    theirs, ours = pair(corner)
    ids, documents = tokens(1, 100), [5, 82, 13]  # one is longer than the context
    packed = ours(ids, documents=documents)
    alone = torch.cat([ours(part) for part in ids.split(documents, dim=1)], dim=1)
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-5)
    if "dynamic" in corner:
        return  # transformers stretches all documents by the length of the longest
    positions = torch.cat([torch.arange(n) for n in documents])[None]
    expected = theirs(ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(packed, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", ["plain", "padded", "packed"])
@pytest.mark.parametrize("corner", CORNERS)
def test_gradients_equal_transformers(corner, layout):
    theirs, ours = pair(corner)
    mask, positions, documents = None, None, None
    if layout == "packed":
        ids, documents = tokens(1, 40), [5, 22, 13]
        positions = torch.cat([torch.arange(n) for n in documents])[None]
    else:
        ids = tokens(2, 30)
    labels = ids.clone()
    if layout == "padded":
        mask = torch.ones(2, 30, dtype=torch.long)
        mask[0, :6] = 0
        labels[0, :7] = -100  # nothing is predicted from padding
        positions = (mask.cumsum(1) - 1).clamp(min=0)
    outputs = (
        (theirs, theirs(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits),
        (ours, ours(ids, attention_mask=mask, documents=documents)),
    )
    for model, logits in outputs:
        F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).backward()
        assert all(p.grad is not None for p in model.parameters())
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        error = (parameter.grad - expected[name].grad).norm() / expected[name].grad.norm()
        assert error < 1e-4, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("corner", CORNERS)
@torch.no_grad()
def test_cached_equals_uncached(corner):
    if "dynamic" in corner:
        pytest.skip("dynamic scaling turns the cached keys by the length at their time, in transformers too")
    _, ours = pair(corner)
    ids, lengths, new = tokens(2, 30), (12, 5), 18
    cache = Cache(
        SIZES["num_hidden_layers"], lengths, max_new_tokens=new, window=getattr(ours.config, "sliding_window", None)
    )
    for pieces in ([(0, 0, 7)], [(0, 7, 12), (1, 0, 5)]):
        cache.read(pieces)
        last = ours(torch.cat([ids[i, start:stop] for i, start, stop in pieces])[None], cache=cache)
    steps = torch.stack([ids[i, length : length + new] for i, length in enumerate(lengths)])
    found = torch.cat([ours(part, cache=cache) for part in steps.split(1, dim=1)], dim=1)
    for i, length in enumerate(lengths):
        whole = ours(ids[i : i + 1, : length + new])
        torch.testing.assert_close(found[i], whole[0, length:], rtol=0, atol=1e-5)
    torch.testing.assert_close(last[0, -5:], ours(ids[1:, :5])[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("corner", ["llama-gqa", "mistral-window", "phi"])
def test_recomputed_blocks_give_the_same_gradients(corner):
    _, ours = pair(corner)
    ours.train()
    for module in ours.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    grads = []
    for ours.model.recompute in (False, True):
        ours.zero_grad()
        ours(tokens(1, 24), documents=[10, 14]).square().mean().backward()
        grads.append([p.grad.clone() for p in ours.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_phi_scores_beyond_the_range_of_fp16_stay_finite(dtype):
    _, ours = pair("phi")
    for block in ours.model.layers:
        block.self_attn.q_proj.weight.mul_(60)
        block.self_attn.k_proj.weight.mul_(60)
    scores = ours.model.layers[0].self_attn.q_proj(
        ours.model.layers[0].input_layernorm(ours.model.embed_tokens(tokens(1, 20)))
    )
    assert scores.square().sum(-1).max() > 65504, "the test must reach beyond fp16"
    assert ours.to(dtype)(tokens(1, 20)).isfinite().all()


@pytest.mark.parametrize("head_bias", [False, True])
def test_cross_entropy_in_chunks_equals_the_whole(head_bias, monkeypatch):
    monkeypatch.setattr(ops_torch, "CHUNK", 10)
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 50, bias=head_bias)
    targets = torch.randint(0, 50, (37,))
    results = []
    for loss_of in (
        lambda h: F.cross_entropy(head(h), targets, reduction="sum"),
        lambda h: ops.cross_entropy(h, head, targets),
    ):
        hidden = torch.linspace(-1, 1, 37 * 16).view(37, 16).requires_grad_()
        head.zero_grad()
        loss = loss_of(hidden)
        (loss / 37).backward()
        results.append([loss.detach(), hidden.grad, *(p.grad.clone() for p in head.parameters())])
    for whole, chunks in zip(*results, strict=True):
        torch.testing.assert_close(chunks, whole, rtol=1e-5, atol=1e-6)


def test_cross_entropy_of_no_tokens_is_zero_and_has_a_gradient():
    head, hidden = torch.nn.Linear(4, 5).requires_grad_(False), torch.randn(0, 4, requires_grad=True)
    loss = ops.cross_entropy(hidden, head, torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0 and hidden.grad.shape == (0, 4)


CONFIG = {"model_type": "llama", **SIZES, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "'yarn' is not supported"),
        ({"rope_scaling": {"rope_type": "linear"}}, "needs factor"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"is_causal": False}, "is_causal is False"),
        ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "layer_types is "),
        ({"text_config": {"vocab_size": 3}}, "text_config is "),
        ({"model_type": "gpt_neox"}, "expected one of llama, mistral, phi"),
        ({"sliding_window": 32}, "sliding_window is 32"),
        ({"attention_chunk_size": 8}, "attention_chunk_size is 8"),
        ({"hidden_size": "64"}, "expected a whole number"),
        ({"num_hidden_layers": 0}, "expected a whole number from 1 to 1000"),
        ({"num_hidden_layers": 10**6}, "expected a whole number from 1 to 1000"),
        ({"vocab_size": 2**63}, "vocab_size is 9223372036854775808, expected a whole number from 1 to"),
        ({"hidden_size": 10**400}, "hidden_size is 1000.*, expected a whole number"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps is 1000.*, expected a number"),
        ({"rope_theta": 10**299}, "rope_theta is 1000.*, expected a number above 0"),
        ({"hidden_act": "x" * 10_000}, r"hidden_act is 'x{30,60}\.\.\.x"),
        ({"num_key_value_heads": 3}, "expected a multiple of num_key_value_heads, 3"),
        ({"head_dim": 15}, "expected an even number"),
        ({"partial_rotary_factor": 0.5, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rotates whole heads"),
        ({"rope_theta": "1e4"}, "rope_theta is '1e4'"),
        ({"rope_scaling": {"type": "linear", "factor": "4"}}, "factor is '4'"),
        ({"rope_parameters": [1]}, "expected an object or null"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
    ],
)
def test_a_key_that_is_not_supported_is_named(change, message):
    with pytest.raises(ValueError, match=message) as raised:
        build(CONFIG | change)
    assert len(str(raised.value)) < 500


@torch.no_grad()
@pytest.mark.parametrize(
    "old, new",
    [
        ({"rope_theta": 5e5}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
        (
            {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}},
        ),
        ({"rope_theta": 5e5, "rope_scaling": LLAMA3}, {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}}),
    ],
)
def test_both_spellings_of_the_rope_keys_mean_the_same(old, new):
    first, second = build(CONFIG | old | {"torch_dtype": "bfloat16"}), build(CONFIG | new | {"dtype": "bfloat16"})
    assert first.config == second.config
    assert first.config.rope.theta == 5e5


BOTH = {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
LINEAR = {"rope_type": "linear", "factor": 2.0}
HARMLESS = [  # what transformers loads with the same logits as without, beside keys that nobody reads
    {"attention_dropout": 0.1},
    {"sliding_window": 64},
    {"attention_chunk_size": 64},
    {"layer_types": ["full_attention"] * 3},
    {"is_causal": True, "decoder": None, "kv_sharing_modes": None, "per_layer_config": {}},
    {"partial_rotary_factor": 0.5},
    {"original_max_position_embeddings": 16},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "factor": 3.0, "beta_fast": 32}},
    {
        "rope_interleaved": True,
        "mup": True,
        "logit_scale": 3.0,
        "embedding_multiplier": 2,
        "n_embd": 7,
        "num_experts": 4,
    },
    {
        "use_sliding_window": True,
        "max_window_layers": 2,
        "no_rope_layers": [0],
        "use_qk_norm": True,
        "x" * 300: "\x1b[31m",
    },
]
ROPE = [  # settings in more than one spelling, and what transformers takes of them
    BOTH,
    {"rope_theta": 1e3, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    {"rope_scaling": LINEAR, "rope_parameters": LINEAR | {"rope_theta": 1e4}},
    {"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    {"rope_theta": 5e5, "rope_scaling": LINEAR | {"rope_theta": 1e3, "type": "linear"}},
    {"rope_scaling": LINEAR | {"type": "dynamic", "beta_slow": 1}},
    {"rope_scaling": {}, "rope_parameters": LINEAR},
    {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 8}, "original_max_position_embeddings": 32},
]


@pytest.mark.parametrize("change", [*HARMLESS, *ROPE], ids=lambda change: next(iter(change))[:30])
@torch.no_grad()
def test_a_config_that_transformers_takes_gives_the_same_logits(change, tmp_path, capsys):
    transformers = pytest.importorskip("transformers", reason="parity is proven against transformers")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, initializer_range=0.2))
    model.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    if any(key.startswith("rope") for key in change):
        del raw["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps(raw | change))
    ids = tokens(1, 40)
    expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(ids).logits
    capsys.readouterr()
    ours = load_model(tmp_path)
    # Logits reach 6 with these large weights, and each side's fp32 is 1e-5 from its fp64, another 1e-5 on each kind of CPU.
    torch.testing.assert_close(ours(ids), expected, rtol=0, atol=2.5e-5)
    line = capsys.readouterr().err
    assert line.count("\n") <= 1 and "\x1b" not in line and len(line) < 500
    if change in HARMLESS:
        assert torch.equal(expected, model.eval()(ids).logits)
        known = {"sliding_window", "layer_types", "is_causal", "attention_chunk_size"}
        assert known & change.keys() or "ignored, because this model does not use it" in line


@torch.no_grad()
@pytest.mark.parametrize("kinds, window", [("full_attention", 8), ("sliding_attention", 8)])
def test_mistral_layers_of_one_kind_equal_transformers(kinds, window, tmp_path):
    transformers = pytest.importorskip("transformers", reason="parity is proven against transformers")
    config = transformers.MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=window, initializer_range=0.2)
    transformers.MistralForCausalLM(config).save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"layer_types": [kinds] * 3}))
    ids = tokens(1, 40)
    expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(ids).logits
    torch.testing.assert_close(load_model(tmp_path)(ids), expected, rtol=0, atol=1e-5)


def keys_read(transformers, folder, auto):
    """The keys of config.json that transformers asks for while it loads a model and decodes with it, the methods of the
    class apart."""
    base, asked = transformers.PretrainedConfig, set()
    ask = base.__getattribute__

    def note(self, key):
        asked.add(key)
        return ask(self, key)

    base.__getattribute__ = note
    try:
        model = auto.from_pretrained(folder).eval()
        model(tokens(1, 5))
        if auto is transformers.AutoModelForCausalLM:
            model.generate(tokens(1, 5), max_new_tokens=2, do_sample=False)
    finally:
        base.__getattribute__ = ask
    return {key for key in asked if not callable(getattr(model.config, key, None)) and not key.startswith("__")}


NO_LOGITS = set(  # asked for, and without effect on the logits: seen by trying them, and named where they are in a file
    """
    _attn_implementation_internal _experts_implementation _experts_implementation_internal _heterogeneity_spec
    _output_attentions _post_init_done _rope_type_labels default_rope_type default_theta distributed_config fusion_config
    ignore_keys_at_rope_validation is_heterogeneous mtp_layer_types num_heads sub_configs sub_configs_defaults extra_files
    base_model_tp_plan base_model_fsdp_plan base_model_pp_plan base_model_ep_plan output_cross_attentions vision_aspect_ratio
    vision_feature_layer vision_feature_select_strategy assistant_confidence_threshold assistant_lookbehind
    encoder_repetition_penalty epsilon_cutoff eta_cutoff num_assistant_tokens num_assistant_tokens_schedule
    target_lookbehind head_dim rope_parameters _auto_class summary_type base_config_key extra_config_files
    """.split()
)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["Llama", "Mistral", "Phi", "GPT2", "Roberta", "Bert"])
def test_every_key_that_transformers_asks_for_is_read_or_refused_here(family, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers", reason="reads the keys that it asks for")
    sizes = (
        dict(n_embd=64, n_head=4, n_layer=2, vocab_size=97)
        if family == "GPT2"
        else {**SIZES, **({"num_key_value_heads": 2} if family == "Mistral" else {})}
    )
    Auto = transformers.AutoModel if family in ("Roberta", "Bert") else transformers.AutoModelForCausalLM
    Model = getattr(
        transformers, family + {"GPT2": "LMHeadModel", "Roberta": "Model", "Bert": "Model"}.get(family, "ForCausalLM")
    )
    Model(getattr(transformers, f"{family}Config")(**sizes)).save_pretrained(tmp_path)
    readers = []
    start = config_json.Reader.__init__
    monkeypatch.setattr(
        config_json.Reader, "__init__", lambda self, *args: (start(self, *args), readers.append(self))[0]
    )
    raw = json.loads((tmp_path / "config.json").read_text())
    (build_encoder if Auto is transformers.AutoModel else build)(raw)
    asked = keys_read(transformers, tmp_path, Auto)
    assert len(asked) > 60, "the probe sees what transformers asks for"
    harmless = NO_LOGITS | ({"decoder", "generator", "text_config"} if Auto is transformers.AutoModel else set())
    assert asked - readers[-1].seen - harmless == set()


CONTRACT = {  # a small config.json for each row of the table
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 4},
    "phi": {"partial_rotary_factor": 0.5},
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64},
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_row_of_the_table_keeps_the_contract(name):
    """The contract in minitune/models/__init__.py, in its order."""
    Config, Model, targets = ARCHITECTURES[name]
    config = Config.from_json(SIZES | CONTRACT[name] | {"model_type": name})
    for key in ("vocab_size", "max_position_embeddings", "num_hidden_layers", "num_attention_heads", "hidden_size"):
        assert getattr(config, key) == SIZES[key]
    assert isinstance(config.unread, tuple) and isinstance(config.tie_word_embeddings, bool)
    model, ids = Model(config).eval(), tokens(1, 10)
    rope = getattr(config, "rope", None)
    assert rope is None or [len(t.shape) for t in rope.tables(torch.arange(10)[None], torch.float32)] == [4, 4]
    with torch.no_grad():
        logits, hidden = model(ids), model.model(ids)
        assert logits.shape == (1, 10, SIZES["vocab_size"]) and hidden.shape == (1, 10, SIZES["hidden_size"])
        assert torch.equal(model.lm_head(hidden), logits)
        assert torch.allclose(model(ids, documents=[4, 6])[:, :4], model(ids[:, :4]), atol=1e-5)
        mask = torch.ones(1, 10, dtype=torch.int64)
        assert torch.allclose(model(ids, attention_mask=mask), logits, atol=1e-5)
        if targets:  # the others are judges, which decode nothing
            cache = Cache(config.num_hidden_layers, [10], window=getattr(config, "sliding_window", None))
            cache.read([(0, 0, 10)])
            assert torch.allclose(model(ids, cache=cache), logits, atol=1e-5) and cache.pieces == []
    if config.tie_word_embeddings:
        tied = [name for name, p in model.named_parameters(remove_duplicate=False) if p is model.lm_head.weight]
        assert len(tied) == 2
    if targets:
        assert model.model.embed_tokens.weight.shape == (SIZES["vocab_size"], SIZES["hidden_size"])
        linear = {name.rpartition(".")[2] for name, module in model.named_modules() if type(module) is Linear}
        assert set(targets) <= linear
        model.train().requires_grad_(True)
        gradients = []
        for model.model.recompute in (False, True):
            model.zero_grad()
            model(ids).float().logsumexp(-1).sum().backward()
            gradients.append([p.grad.clone() for p in model.parameters()])
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*gradients, strict=True))
