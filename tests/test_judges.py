"""GPT-2, RoBERTa and BERT by hand against transformers, loaded from the files that it writes: fp32, 1e-5."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from minitune.checkpoint import load_encoder, load_model
from minitune.decoding.options import GenerateConfig
from minitune.generate import generate
from minitune.model_folder import ModelFolder

transformers = pytest.importorskip("transformers", reason="parity is proven against transformers")

GPT2 = dict(vocab_size=97, n_embd=64, n_layer=3, n_head=4, n_positions=48)
ENCODER = dict(
    vocab_size=97, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=112, type_vocab_size=2
)
ENCODERS = {
    "roberta": ("Roberta", {"max_position_embeddings": 50, "type_vocab_size": 1, "layer_norm_eps": 1e-5}),
    "roberta-pad-5": ("Roberta", {"max_position_embeddings": 54, "pad_token_id": 5}),
    "bert": ("Bert", {"max_position_embeddings": 48}),
    "bert-gelu-new": ("Bert", {"max_position_embeddings": 48, "hidden_act": "gelu_new", "intermediate_size": 64}),
}


def randomise(model):
    """Draw larger weights than models start with, so that errors show."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        is_scale = parameter.ndim == 1 and name.endswith("weight")  # of a LayerNorm
        torch.nn.init.normal_(parameter, float(is_scale), 0.15 if parameter.ndim > 1 else 0.1)
    return model.eval()


def tokens(*shape, seed=1):
    return torch.randint(6, 97, shape, generator=torch.Generator().manual_seed(seed))


def gpt2(folder, **options):
    theirs = randomise(transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2 | options)))
    theirs.save_pretrained(folder)
    return theirs


def encoder(folder, name="roberta", head="Model", **options):
    family, own = ENCODERS[name]
    config = getattr(transformers, f"{family}Config")(**ENCODER | own | options)
    theirs = randomise(getattr(transformers, f"{family}{head}")(config))
    theirs.save_pretrained(folder)
    return theirs


def rewrite(folder, change):
    """Change the tensors of a saved model: `change` gets and returns a dict."""
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in change(load_file(file)).items()}
    save_file(tensors, file, metadata={"format": "pt"})


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


# --- GPT-2 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"n_inner": 80}, {"tie_word_embeddings": False}, {"activation_function": "gelu"}],
    ids=["plain", "n_inner", "untied", "gelu"],
)
@torch.no_grad()
def test_gpt2_logits_equal_transformers(tmp_path, options):
    theirs, ids = gpt2(tmp_path, **options), tokens(2, 48)
    close(load_model(tmp_path)(ids), theirs(ids).logits)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_gpt2_padded_logits_equal_transformers_where_there_are_tokens(tmp_path, side):
    theirs, ids, mask = gpt2(tmp_path), tokens(3, 40), torch.ones(3, 40, dtype=torch.long)
    mask[0, slice(0, 7) if side == "left" else slice(33, 40)] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = theirs(ids, attention_mask=mask, position_ids=positions).logits
    close(load_model(tmp_path)(ids, attention_mask=mask)[mask.bool()], expected[mask.bool()])


@torch.no_grad()
def test_gpt2_packed_texts_equal_each_alone_even_past_the_context_together(tmp_path):
    theirs, ids, lengths = gpt2(tmp_path), tokens(1, 90), [5, 1, 48, 36]
    found = load_model(tmp_path)(ids, documents=lengths)
    close(found, torch.cat([theirs(part).logits for part in ids.split(lengths, dim=1)], dim=1))


def test_gpt2_decodes_from_the_cache_as_transformers_does(tmp_path):
    theirs = gpt2(tmp_path)
    prompts = [tokens(9)[i:].tolist() for i in (0, 4)]
    found = generate(load_model(tmp_path), prompts, GenerateConfig(max_new_tokens=12, eos_ids=()))
    for prompt, answer in zip(prompts, found, strict=True):
        with torch.no_grad():
            ids = torch.tensor([prompt + answer])
            close(theirs(ids).logits[0, len(prompt) - 1 : -1].argmax(-1).tolist(), answer)


@torch.no_grad()
def test_gpt2_loads_openais_spelling_without_prefix_and_with_the_old_masks(tmp_path):
    theirs, ids = gpt2(tmp_path), tokens(2, 20)

    def old(tensors):
        tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 48, 48).tril() for i in range(3)}
        return tensors | masks | {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(3)}

    rewrite(tmp_path, old)
    close(load_model(tmp_path)(ids), theirs(ids).logits)


def test_gpt2_refuses_a_missing_an_unknown_and_a_doubled_tensor(tmp_path):
    gpt2(tmp_path)
    rewrite(tmp_path, lambda t: {k: v for k, v in t.items() if "ln_f.bias" not in k} | {"h.0.extra": torch.ones(1)})
    with pytest.raises(ValueError, match=r"1 missing: transformer.ln_f.bias; 1 with other names: h.0.extra$"):
        load_model(tmp_path)
    gpt2(tmp_path)
    rewrite(tmp_path, lambda t: t | {"wpe.weight": t["transformer.wpe.weight"]})
    with pytest.raises(ValueError, match="holds transformer.wpe.weight twice"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "key, value",
    [
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("activation_function", "relu"),
        ("hidden_size", 32),
        ("is_causal", False),
        ("n_head", 5),
    ],
)
def test_gpt2_config_that_changes_the_model_is_refused_by_name(tmp_path, key, value):
    gpt2(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {key: value}))
    with pytest.raises(ValueError, match=key):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "key, value", [("reorder_and_upcast_attn", True), ("n_ctx", 20), ("rope_theta", 1e4), ("hidden_size", 64)]
)
def test_gpt2_config_that_changes_nothing_in_transformers_changes_nothing_here(tmp_path, key, value):
    theirs, ids, raw = gpt2(tmp_path), tokens(2, 40), json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {key: value}))
    close(load_model(tmp_path)(ids), theirs(ids).logits)


def test_gpt2_says_that_a_text_is_longer_than_its_positions(tmp_path):
    gpt2(tmp_path)
    with pytest.raises(ValueError, match="longer than this GPT-2's 48 positions"):
        load_model(tmp_path)(tokens(1, 49))


def test_a_judge_is_neither_trained_nor_quantised(tmp_path):
    gpt2(tmp_path)
    with pytest.raises(ValueError, match="for perplexity and does not train"):
        ModelFolder(tmp_path).default_targets()
    with pytest.raises(ValueError, match="which minitune does not quantise"):
        load_model(tmp_path, quantize="nf4")


# --- RoBERTa and BERT ----------------------------------------------------------------------------


def padded(theirs, lengths=(40, 17, 1, 33)):
    """(ids, mask) of texts of unequal length, padded with the model's own token."""
    ids, mask = tokens(len(lengths), max(lengths)), torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for i, length in enumerate(lengths):
        mask[i, :length] = 1
    return ids.masked_fill(mask == 0, theirs.config.pad_token_id), mask


@pytest.mark.parametrize("gradients", [False, True], ids=["oneDNN", "autograd"])
@pytest.mark.parametrize("name", ENCODERS)
def test_every_hidden_state_equals_transformers_under_padding(tmp_path, name, gradients):
    theirs = encoder(tmp_path, name)
    ids, mask = padded(theirs)
    with torch.set_grad_enabled(gradients):
        found = load_encoder(tmp_path).hidden_states(ids, mask)
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    assert len(found) == len(expected) == 4
    for ours, reference in zip(found, expected, strict=True):
        close(ours[mask.bool()], reference[mask.bool()])


@pytest.mark.parametrize("name", ["roberta", "bert"])
@torch.no_grad()
def test_packed_texts_equal_padded_ones(tmp_path, name):
    theirs, lengths = encoder(tmp_path, name), (40, 17, 17, 17, 1, 33)
    ids, mask = padded(theirs, lengths)
    ours = load_encoder(tmp_path)
    packed = ours(ids[mask.bool()][None], lengths=list(lengths), layer=2)
    close(packed[0], ours(ids, mask, layer=2)[mask.bool()])


@torch.no_grad()
def test_a_layer_in_the_middle_is_where_transformers_stops(tmp_path):
    theirs, ids = encoder(tmp_path), tokens(2, 20)
    states = theirs(ids, output_hidden_states=True).hidden_states
    ours = load_encoder(tmp_path)
    for layer in range(4):
        close(ours(ids, layer=layer), states[layer])
    with pytest.raises(ValueError, match="layer is 4, expected 0 to 3"):
        ours(ids, layer=4)


@torch.no_grad()
def test_bert_token_types_equal_transformers(tmp_path):
    theirs, ids = encoder(tmp_path, "bert"), tokens(2, 20)
    types = (torch.arange(20) > 8).long().expand(2, 20)
    expected = theirs(ids, token_type_ids=types).last_hidden_state
    close(load_encoder(tmp_path)(ids, token_type_ids=types), expected)
    assert (expected - theirs(ids).last_hidden_state).abs().max() > 1e-3, "the types must matter"


@torch.no_grad()
@pytest.mark.parametrize("name", ["roberta", "bert"])
def test_an_encoder_without_a_padding_token_equals_transformers(tmp_path, name):
    encoder(tmp_path, name)
    ids, raw = tokens(1, 20), json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"pad_token_id": -1}))
    theirs = transformers.AutoModel.from_pretrained(tmp_path).eval()
    close(load_encoder(tmp_path)(ids), theirs(ids).last_hidden_state)


def test_roberta_does_not_count_a_padding_token_inside_a_text(tmp_path):
    theirs, ids = encoder(tmp_path), tokens(1, 20)
    ids[0, 7] = theirs.config.pad_token_id
    close(load_encoder(tmp_path)(ids), theirs(ids).last_hidden_state)
    close(load_encoder(tmp_path)(ids, lengths=[20]), theirs(ids).last_hidden_state)


@pytest.mark.parametrize(
    "name, head",
    [
        ("roberta", "ForMaskedLM"),
        ("roberta", "ForSequenceClassification"),
        ("bert", "ForPreTraining"),
        ("bert", "ForMaskedLM"),
    ],
)
@torch.no_grad()
def test_encoder_inside_a_model_with_a_head_is_found(tmp_path, name, head):
    theirs, ids = encoder(tmp_path, name, head), tokens(2, 20)
    close(load_encoder(tmp_path)(ids), theirs.base_model(ids).last_hidden_state)


@torch.no_grad()
def test_bert_loads_the_old_spelling_of_layer_norm_and_old_buffers(tmp_path):
    theirs, ids = encoder(tmp_path, "bert", "ForPreTraining"), tokens(2, 20)

    def old(tensors):
        spelled = {
            k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v
            for k, v in tensors.items()
        }
        return spelled | {"bert.embeddings.position_ids": torch.arange(48)[None]}

    rewrite(tmp_path, old)
    assert any(name.endswith("LayerNorm.gamma") for name in load_file(tmp_path / "model.safetensors"))
    close(load_encoder(tmp_path)(ids), theirs.base_model(ids).last_hidden_state)


@torch.no_grad()
def test_encoder_loads_from_shards(tmp_path):
    theirs, ids = encoder(tmp_path / "whole"), tokens(2, 20)
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    assert not (tmp_path / "shards/model.safetensors").exists()
    close(load_encoder(tmp_path / "shards")(ids), theirs(ids).last_hidden_state)


def test_encoder_refuses_a_missing_and_an_unknown_tensor(tmp_path):
    encoder(tmp_path)
    gone = "encoder.layer.1.output.dense.bias"
    rewrite(tmp_path, lambda t: {k: v for k, v in t.items() if k != gone} | {"adapter.weight": torch.ones(1)})
    with pytest.raises(ValueError, match=f"1 missing: {gone}; 1 with other names: adapter.weight$"):
        load_encoder(tmp_path)


@pytest.mark.parametrize(
    "key, value",
    [
        ("is_decoder", True),
        ("hidden_act", "relu"),
        ("is_causal", True),
        ("per_layer_config", {"0": {"hidden_act": "relu"}}),
    ],
)
def test_encoder_config_that_changes_the_model_is_refused_by_name(tmp_path, key, value):
    encoder(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {key: value}))
    with pytest.raises(ValueError, match=key):
        load_encoder(tmp_path)


def test_longest_text_is_the_models_own(tmp_path):
    for name, longest in (("roberta", 48), ("bert", 48)):
        encoder(tmp_path / name, name)
        ours = load_encoder(tmp_path / name)
        assert ours.config.max_length == longest and ours(tokens(1, longest)).isfinite().all()
        with pytest.raises(ValueError, match=f"{longest + 1} tokens is longer than the {longest}"):
            ours(tokens(1, longest + 1))


def test_encoders_and_language_models_are_not_taken_for_each_other(tmp_path):
    encoder(tmp_path / "encoder"), gpt2(tmp_path / "gpt2")
    with pytest.raises(ValueError, match="an encoder, which predicts no next token"):
        load_model(tmp_path / "encoder")
    with pytest.raises(ValueError, match="model_type is 'gpt2', expected an encoder"):
        load_encoder(tmp_path / "gpt2")
