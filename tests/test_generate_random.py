"""Decoding against transformers with options drawn at random, in fp32 on random tiny models of each family."""

import json
import random
from collections import Counter

import pytest
import torch

from minitune.decoding.options import GenerateConfig
from minitune.generate import decode
from minitune.models import build

CASES = 40  # of each family
UNUSED = {"pad_token_id": 0, "bos_token_id": None}


def pair(family, rng):
    """(transformers' model, ours) of random sizes with the same random weights, which make sharp choices."""
    transformers = pytest.importorskip("transformers", reason="parity is proven against transformers")
    kv_heads = {"num_key_value_heads": rng.choice([1, 2, 4])}
    options = {
        "Llama": kv_heads | {"tie_word_embeddings": rng.random() < 0.3},
        "Mistral": kv_heads | {"sliding_window": rng.choice([None, 3, 6, 20])},
        "Phi": {"partial_rotary_factor": 0.5},
    }[family]
    config = getattr(transformers, f"{family}Config")(
        vocab_size=rng.choice([13, 61, 97]),
        hidden_size=32,
        intermediate_size=rng.choice([48, 64]),  # 48: torch multiplies, and no step is replayed
        num_hidden_layers=rng.choice([1, 2]),
        num_attention_heads=4,
        max_position_embeddings=256,
        attn_implementation="eager",
        **options,
    )
    torch.manual_seed(rng.randrange(2**31))
    theirs, scale = getattr(transformers, f"{family}ForCausalLM")(config).eval(), rng.choice([0.15, 0.3, 0.5])
    for parameter in theirs.parameters():
        one_dim = parameter.ndim == 1
        torch.nn.init.normal_(parameter, float(one_dim), 0.1 if one_dim else scale)
    ours = build(json.loads(config.to_json_string())).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def draw_options(rng, vocabulary):
    """Options of generate() with the meaning that both sides give them."""
    beams, new = rng.choice([1, 1, 2, 3, 4, 7]), rng.choice([1, 2, 5, 9, 16])
    options = {"max_new_tokens": new, "num_beams": beams, "num_return_sequences": rng.randint(1, beams)}
    choices = {
        "repetition_penalty": [0.7, 1.1, 1.7, 3.0],
        "no_repeat_ngram_size": [2, 3, 5],
        "min_new_tokens": range(new + 1),
    }
    if beams > 1:
        choices |= {"length_penalty": [-2.0, -1.0, 0.0, 0.5, 2.0], "early_stopping": [True, False, "never"]}
    options |= {name: rng.choice(values) for name, values in choices.items() if rng.random() < 0.5}
    return options, tuple(rng.sample(range(vocabulary), rng.choice([0, 1, 2, 3])))


def theirs_of(model, prompts, eos, **options):
    """What transformers generates for prompts of one length: new ids, the end token left out."""
    out = model.generate(
        torch.tensor(prompts),
        attention_mask=torch.ones(len(prompts), len(prompts[0]), dtype=torch.long),
        eos_token_id=list(eos) or None,
        **UNUSED,
        **options,
    )
    answers = out[:, len(prompts[0]) :].tolist()
    return [ids[: next((i for i, token in enumerate(ids) if token in eos), None)] for ids in answers]


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Phi"])
def test_answers_equal_transformers_whatever_the_options(family):
    rng = random.Random(family)
    for case in range(CASES):
        if case % 8 == 0:
            theirs, ours = pair(family, rng)
        vocabulary = ours.config.vocab_size
        options, eos = draw_options(rng, vocabulary)
        lengths = [rng.choice([1, 2, 5, 17, 40]) for _ in range(rng.choice([1, 3]))]
        prompts = [[rng.randrange(vocabulary) for _ in range(length)] for length in lengths]
        found = [answer.ids for answer in decode(ours, prompts, GenerateConfig(eos_ids=eos, **options))[0]]
        expected = [ids for prompt in prompts for ids in theirs_of(theirs, [prompt], eos, do_sample=False, **options)]
        assert found == expected, (case, options, eos, prompts)


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Phi"])
def test_beam_sampling_draws_answers_as_often_as_transformers(family):
    """A test of homogeneity over 1000 draws of the best beam and of the last; a right sampler fails once in ten thousand."""
    from scipy.stats import chi2_contingency

    rng, draws = random.Random(family), 1000
    theirs, ours = pair(family, rng)
    options = {"max_new_tokens": 2, "num_beams": 2, "num_return_sequences": 2, "do_sample": True, "top_k": 5}
    options |= {"top_p": 0.95, "temperature": 1.3, "repetition_penalty": 1.3, "length_penalty": 0.5}
    prompts, eos = [[rng.randrange(13) for _ in range(6)]] * draws, (3, 7)
    torch.manual_seed(0)
    expected = theirs_of(theirs, prompts, eos, **options)
    found = [answer.ids for answer in decode(ours, prompts, GenerateConfig(eos_ids=eos, **options))[0]]
    for beam in range(2):
        a, b = (Counter(map(tuple, answers[beam::2])) for answers in (expected, found))
        often = [ids for ids in a | b if a[ids] + b[ids] >= 10]  # rarer ones together
        table = [[count[ids] for ids in often] + [draws - sum(count[ids] for ids in often)] for count in (a, b)]
        table = [column for column in zip(*table, strict=True) if sum(column)]
        assert len(table) > 2 and chi2_contingency(table).pvalue > 1e-4
