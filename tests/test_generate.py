"""Decoding against transformers, token for token; what is refused; and what an answer leaves behind."""

import dataclasses
import json

import pytest
import torch
from small import draw
from small_decoding import ENDS, PROMPTS, SIZES

from minitune.checkpoint import load_model
from minitune.decoding import sampling
from minitune.decoding.options import GenerateConfig
from minitune.generate import decode, earlier_copies, generate
from minitune.models import build
from minitune.tokenizer import load_tokenizer

UNUSED = {"pad_token_id": 0, "bos_token_id": None}


@pytest.fixture(scope="module")
def stories(data_dir):
    folder = data_dir / "stories260K"
    return load_model(folder), load_tokenizer(folder), folder


def theirs_of(model, prompt, eos=ENDS, **options):
    """What transformers generates for one prompt: lists of new ids, the end token left out."""
    options = {"max_new_tokens": 14, "do_sample": False, "eos_token_id": list(eos), **UNUSED, **options}
    out = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), **options)
    answers = []
    for ids in out[:, len(prompt) :].tolist():
        ends = [i for i, token in enumerate(ids) if token in eos]
        answers.append(ids[: ends[0]] if ends else ids)
    return answers


# Against transformers

RULES = {
    "plain": {},
    "repetition": {"repetition_penalty": 1.7},
    "ngrams": {"no_repeat_ngram_size": 2},
    "least length": {"min_new_tokens": 9},
    "all": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "min_new_tokens": 5},
}


@pytest.mark.parametrize("rules", RULES)
def test_greedy_answers_equal_transformers(pair, rules):
    theirs, ours = pair
    expected = [theirs_of(theirs, prompt, **RULES[rules])[0] for prompt in PROMPTS]
    assert len(set(map(tuple, expected))) > 1
    assert generate(ours, PROMPTS, GenerateConfig(max_new_tokens=14, eos_ids=ENDS, **RULES[rules])) == expected


BEAMS = {
    "2": {"num_beams": 2},
    "5": {"num_beams": 5},
    "all returned": {"num_beams": 4, "num_return_sequences": 4},
    "short": {"num_beams": 3, "length_penalty": -1.0},
    "long": {"num_beams": 3, "length_penalty": 2.0},
    "stop early": {"num_beams": 4, "early_stopping": True, "num_return_sequences": 2},
    "never early": {"num_beams": 4, "early_stopping": "never", "length_penalty": 1.5},
    "penalties": {"num_beams": 4, "repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "min_new_tokens": 6},
}


@pytest.mark.parametrize("case", BEAMS)
def test_beam_answers_equal_transformers(pair, case):
    theirs, ours = pair
    expected = [answer for prompt in PROMPTS for answer in theirs_of(theirs, prompt, **BEAMS[case])]
    config = GenerateConfig(max_new_tokens=14, eos_ids=ENDS, **BEAMS[case])
    assert generate(ours, PROMPTS, config) == expected


def test_beams_and_scores_of_stories260k_are_those_of_transformers(stories):
    model, _, folder = stories
    cases = json.loads((folder / "expected_beam.json").read_text())["cases"]
    for case in cases:
        config = GenerateConfig(
            max_new_tokens=case["max_new_tokens"],
            num_beams=case["num_beams"],
            num_return_sequences=case["num_beams"],
        )
        answers, _ = decode(model, [case["prompt_ids"]], config)
        assert [case["prompt_ids"] + answer.ids for answer in answers] == case["sequences"]
        torch.testing.assert_close([a.score for a in answers], case["sequences_scores"], rtol=0, atol=2e-5)


def test_the_end_of_the_checkpoint_ends_a_story(stories):
    model, _, folder = stories
    full = json.loads((folder / "expected_greedy.json").read_text())["from_bos"]["full_ids"]
    (answer,), _ = decode(model, [full[:1]], GenerateConfig(max_new_tokens=400))
    assert answer.ids == full[1:-1] and answer.ended_by == "eos" and model.eos_ids == (2, 1)


WARPERS = {
    "temperature": {"temperature": 0.6, "top_k": 0},
    "top k": {"top_k": 7},
    "top p": {"top_k": 0, "top_p": 0.8},
    "min p": {"top_k": 0, "min_p": 0.1},
    "all": {"temperature": 1.4, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
    "all, penalised": {"temperature": 1.4, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.5},
}


@pytest.mark.parametrize("case", WARPERS)
def test_sampled_tokens_are_as_frequent_as_transformers_says(pair, case):
    """chi-squared over 4000 draws of the first token; a right sampler fails once in ten thousand."""
    from scipy.stats import chisquare

    theirs, ours = pair
    prompt, draws = PROMPTS[0], 4000
    options = {"max_new_tokens": 1, "do_sample": True, "eos_token_id": list(ENDS), **UNUSED, **WARPERS[case]}
    out = theirs.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), output_scores=True,
        return_dict_in_generate=True, **options,
    )  # fmt: skip
    expected = out.scores[0][0].softmax(-1)
    config = GenerateConfig(max_new_tokens=1, do_sample=True, eos_ids=(), num_return_sequences=draws, **WARPERS[case])
    drawn = torch.tensor(generate(ours, [prompt], config))[:, 0]
    counts = torch.bincount(drawn, minlength=SIZES["vocab_size"]).double()
    assert not counts[expected == 0].any(), "a token was drawn that transformers excludes"
    often = expected * draws >= 5  # rarer ones together: the test wants 5 expected of each
    found = torch.cat([counts[often], counts[~often].sum()[None]])
    wanted = torch.cat([expected[often], expected[~often].sum()[None]]).double()
    found, wanted = found[wanted > 0], wanted[wanted > 0]
    assert len(found) > 2
    assert chisquare(found, wanted / wanted.sum() * draws).pvalue > 1e-4


def test_beam_sampling_draws_without_replacement_with_the_right_probabilities():
    """The first of two draws has the probabilities, the pair those of drawing one after the other."""
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    generator, pairs = torch.Generator().manual_seed(0), {}
    for _ in range(20000):
        numbers = torch.rand(4, generator=generator, dtype=torch.float64)
        pair = tuple(sampling.draw_several(probabilities.log(), numbers, 2).tolist())
        pairs[pair] = pairs.get(pair, 0) + 1
    for (a, b), count in pairs.items():
        expected = probabilities[a] * probabilities[b] / (1 - probabilities[a]) * 20000
        assert abs(count - expected) < 5 * expected**0.5, (a, b)
    assert len(pairs) == 12


def test_beam_sampling_repeats_by_its_seed_and_returns_distinct_beams(pair):
    _, ours = pair
    config = GenerateConfig(max_new_tokens=8, num_beams=4, do_sample=True, num_return_sequences=4, seed=3, eos_ids=ENDS)
    answers = generate(ours, PROMPTS, config)
    assert answers == generate(ours, PROMPTS, config)
    assert answers != generate(ours, PROMPTS, dataclasses.replace(config, seed=4))
    assert all(len(set(map(tuple, answers[i : i + 4]))) == 4 for i in range(0, 12, 4))


def test_logprobs_are_those_of_the_model(pair):
    _, ours = pair
    for mode in ({}, {"do_sample": True, "temperature": 0.5}, {"num_beams": 3}):
        (answer, *_), _ = decode(ours, PROMPTS[:1], GenerateConfig(max_new_tokens=8, eos_ids=(), **mode))
        whole = torch.tensor([PROMPTS[0] + answer.ids])
        with torch.no_grad():
            logits = ours(whole)[0, len(PROMPTS[0]) - 1 : -1].log_softmax(-1)
        expected = logits.gather(1, torch.tensor(answer.ids)[:, None])[:, 0].tolist()
        torch.testing.assert_close(answer.logprobs, expected, rtol=0, atol=1e-4)


def test_temperature_0_is_greedy(pair):
    _, ours = pair
    cold = GenerateConfig(max_new_tokens=10, do_sample=True, temperature=0.0, eos_ids=())
    assert generate(ours, PROMPTS, cold) == generate(ours, PROMPTS, GenerateConfig(max_new_tokens=10, eos_ids=()))


def test_identical_prompts_get_different_samples_and_the_same_by_the_same_seed(pair):
    _, ours = pair
    config = GenerateConfig(max_new_tokens=12, do_sample=True, top_k=0, temperature=2.0, eos_ids=())
    first, second = generate(ours, [PROMPTS[0], PROMPTS[0]], config)
    assert first != second and [first, second] == generate(ours, [PROMPTS[0]] * 2, config)
    copies = earlier_copies([PROMPTS[0], PROMPTS[1], PROMPTS[0]])
    assert copies == [0, 0, 1]
    apart = [decode(ours, [PROMPTS[0]], config, copies=[copy])[0][0].ids for copy in (copies[0], copies[2])]
    assert apart == [first, second]  # in whatever batches they are


def test_a_stop_text_across_token_borders_ends_the_answer(stories):
    model, tokenizer, _ = stories
    prompt = tokenizer.encode("Once upon a time, there was a")
    text = tokenizer.decode(generate(model, [prompt], GenerateConfig(max_new_tokens=60))[0])
    stop = text[41:49]
    (answer,), _ = decode(model, [prompt], GenerateConfig(max_new_tokens=60, stop=(stop,)), tokenizer)
    found = tokenizer.decode(answer.ids)
    assert answer.ended_by == "stop" and stop in found and text.startswith(found[: found.index(stop)])
    assert found.index(stop) == text.index(stop) and len(found) < text.index(stop) + len(stop) + 12
    (beam,), _ = decode(model, [prompt], GenerateConfig(max_new_tokens=60, stop=(".",), num_beams=3), tokenizer)
    assert beam.ended_by == "stop" and tokenizer.decode(beam.ids).endswith(".")


def test_a_streamed_answer_is_the_answer(pair):
    _, ours = pair
    streamed = []
    (answer,), _ = decode(ours, PROMPTS[:1], GenerateConfig(max_new_tokens=9, eos_ids=ENDS), on_token=streamed.append)
    assert streamed == answer.ids


# What is refused

MODEL = lambda: build({"model_type": "llama", **SIZES}).eval()
REFUSED = {
    "prompt 1 has no tokens": lambda: generate(MODEL(), [[1], []], GenerateConfig()),
    "prompt 0 has 256 tokens, but the model's context is 256": lambda: generate(MODEL(), [[1] * 256], GenerateConfig()),
    "prompt 0 has the token 61, but the model has 61 tokens": lambda: generate(MODEL(), [[61]], GenerateConfig()),
    "stop is given without a tokenizer": lambda: generate(MODEL(), [[1]], GenerateConfig(stop=("x",))),
    "streaming needs a single answer without beams": lambda: decode(
        MODEL(), [[1]], GenerateConfig(num_beams=2), on_token=print
    ),
    "lookup is for one prompt at a time": lambda: generate(MODEL(), [[1], [2]], GenerateConfig(lookup=3)),
    "lookup is for greedy decoding": lambda: GenerateConfig(lookup=3, num_beams=2),
    "max_new_tokens is 0": lambda: GenerateConfig(max_new_tokens=0),
    "top_p is 0.0, expected": lambda: GenerateConfig(top_p=0.0),
    "top_p is 1.5, expected": lambda: GenerateConfig(top_p=1.5),
    "min_p is -0.1, expected": lambda: GenerateConfig(min_p=-0.1),
    "temperature is -1.0, expected": lambda: GenerateConfig(temperature=-1.0),
    "top_k is -1, expected": lambda: GenerateConfig(top_k=-1),
    "top_k is 2.5, expected a whole number": lambda: GenerateConfig(top_k=2.5),
    "num_beams is 0": lambda: GenerateConfig(num_beams=0),
    "early_stopping is 'sometimes', expected one of": lambda: GenerateConfig(early_stopping="sometimes"),
    "num_return_sequences is 3, but greedy": lambda: GenerateConfig(num_return_sequences=3),
    "min_new_tokens 9 is above max_new_tokens 4": lambda: GenerateConfig(min_new_tokens=9, max_new_tokens=4),
    "stop has an empty text": lambda: GenerateConfig(stop=("",)),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_is_refused_by_name(message):
    with pytest.raises(ValueError) as error:
        REFUSED[message]()
    assert str(error.value).startswith(message)


def test_nan_in_the_logits_is_one_clear_line():
    model = MODEL()
    model.lm_head.weight.data.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="the model's logits are NaN"):
        generate(model, [[1, 2]], GenerateConfig())


def test_no_prompts_give_no_answers():
    assert generate(MODEL(), [], GenerateConfig()) == []


def test_a_model_in_training_stays_in_training():
    model = build({"model_type": "phi", **SIZES, "resid_pdrop": 0.5}).train()
    config = GenerateConfig(max_new_tokens=5, eos_ids=())
    assert generate(model, PROMPTS, config) == generate(model, PROMPTS, config) and model.training


def test_modules_are_left_in_the_mode_in_which_they_were():
    model = build({"model_type": "llama", **SIZES}).train()
    model.model.layers[0].eval()
    generate(model, [[4]], GenerateConfig(max_new_tokens=2))
    assert model.training and model.model.layers[1].training and not model.model.layers[0].mlp.training


def test_scores_that_overflow_do_not_stop_the_search():
    for penalty in (10000.0, -10000.0):
        options = GenerateConfig(max_new_tokens=4, num_beams=2, eos_ids=(), length_penalty=penalty)
        assert len(decode(MODEL(), [[4]], options)[0][0].ids) == 4
    few = build({"model_type": "llama", **SIZES, "vocab_size": 3}).eval()
    assert decode(few, [[1]], GenerateConfig(max_new_tokens=3, num_beams=4, eos_ids=(0, 1, 2)))[0]


@pytest.mark.parametrize("early_stopping", [False, True])
def test_a_beam_that_took_a_banned_token_is_no_answer(early_stopping):
    """A vocabulary of seven runs out of tokens under no_repeat_ngram_size."""
    transformers = pytest.importorskip("transformers", reason="parity is proven against transformers")
    sizes = SIZES | {"vocab_size": 7, "num_key_value_heads": 2}
    compared = 0
    for seed in range(8):
        torch.manual_seed(seed)
        config = transformers.LlamaConfig(**sizes, attn_implementation="eager")
        theirs = draw(transformers.LlamaForCausalLM(config).eval(), 0.3)
        ours = build(json.loads(config.to_json_string())).eval()
        ours.load_state_dict(theirs.state_dict())
        options = {"num_beams": 3, "no_repeat_ngram_size": 1, "early_stopping": early_stopping}
        [answer], _ = decode(ours, [[1, 2, 3]], GenerateConfig(max_new_tokens=14, eos_ids=(1, 5), **options))
        if answer.score > -1e8:  # else none ended before the tokens were used up
            assert [answer.ids] == theirs_of(theirs, [1, 2, 3], eos=(1, 5), **options)
            compared += 1
    assert compared >= 4
