"""Decoding against transformers, token for token, and what must hold by itself: cached as uncached, in a batch as alone."""

import dataclasses
import gc
import json
import sys
import weakref

import pytest
import torch

from minitune.adapters import lora
from minitune.checkpoint import load_model
from minitune.decoding import sampling
from minitune.decoding.lookup import Lookup
from minitune.decoding.options import GenerateConfig
from minitune.generate import decode, earlier_copies, generate, steady_rows
from minitune.models import build
from minitune.models.cache import Cache, Memory
from minitune.quant import NF4Linear
from minitune.tokenizer import load_tokenizer

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
FAMILIES = {
    "llama": ("Llama", {"num_key_value_heads": 2}),
    "mistral": ("Mistral", {"num_key_value_heads": 2, "sliding_window": 6}),
    "phi": ("Phi", {"partial_rotary_factor": 0.5}),
}
PROMPTS = [[5, 9, 3, 7, 7, 1, 30, 12, 44], [4], [8, 8, 2, 50]]
ENDS = (11, 17)
UNUSED = {"pad_token_id": 0, "bos_token_id": None}


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request):
    """(transformers' model, ours) with the same random weights, which make sharp choices."""
    transformers = pytest.importorskip("transformers", reason="parity is proven against transformers")
    family, options = FAMILIES[request.param]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES, **options, attn_implementation="eager")
    theirs = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.1 if parameter.ndim == 1 else 0.3)
    ours = build(json.loads(config.to_json_string())).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


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


def test_beam_sampling_draws_without_putting_back_as_often_as_it_should():
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


# What must hold by itself

MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "seed": 7},
    "samples": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 4, "num_return_sequences": 2},
    "beam sampling": {"num_beams": 3, "do_sample": True},
}


@pytest.mark.parametrize("mode", MODES)
def test_an_answer_does_not_depend_on_what_else_is_in_the_batch(pair, mode):
    _, ours = pair
    config = GenerateConfig(max_new_tokens=20, eos_ids=ENDS, **MODES[mode])
    alone = [answer for prompt in PROMPTS for answer in generate(ours, [prompt], config)]
    assert generate(ours, PROMPTS, config) == alone
    assert generate(ours, PROMPTS[::-1], config) != alone or len(set(map(tuple, alone))) == 1
    n = config.num_return_sequences
    turned = generate(ours, PROMPTS[::-1], config)
    assert [turned[i : i + n] for i in range(0, len(turned), n)][::-1] == [
        alone[i : i + n] for i in range(0, len(alone), n)
    ]


@torch.no_grad()
def without_cache(model, prompt, count):
    ids = list(prompt)
    for _ in range(count):
        ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
    return ids[len(prompt) :]


def test_greedy_over_the_cache_equals_recomputing_everything(pair):
    _, ours = pair
    config = GenerateConfig(max_new_tokens=24, eos_ids=())
    assert generate(ours, PROMPTS, config) == [without_cache(ours, prompt, 24) for prompt in PROMPTS]


def test_prompts_read_in_pieces_give_the_same_answers(pair, monkeypatch):
    _, ours = pair
    long = torch.randint(0, 61, (50,), generator=torch.Generator().manual_seed(1)).tolist()
    config = GenerateConfig(max_new_tokens=10, eos_ids=())
    expected = generate(ours, [*PROMPTS, long], config)
    monkeypatch.setattr("minitune.generate.PREFILL_TOKENS", 7)
    assert generate(ours, [*PROMPTS, long], config) == expected
    assert expected[-1] == without_cache(ours, long, 10)


@torch.no_grad()
def test_cached_hidden_states_equal_uncached_ones(pair):
    """Prompts of unequal length in pieces, then new tokens one and several at a time, in two sequences of each prompt."""
    _, ours = pair
    new = torch.randint(0, 61, (len(PROMPTS) * 2, 9), generator=torch.Generator().manual_seed(2))
    window = getattr(ours.config, "sliding_window", None)
    cache = Cache(2, [len(p) for p in PROMPTS], sequences=2, max_new_tokens=9, window=window, draft=2)
    cache.read([(0, 0, 4)])
    ours.model(torch.tensor([PROMPTS[0][:4]]), cache=cache)
    cache.read([(0, 4, 9), (1, 0, 1), (2, 0, 4)])
    ours.model(torch.tensor([PROMPTS[0][4:] + PROMPTS[1] + PROMPTS[2]]), cache=cache)
    steps = [ours.model(new[:, a:b], cache=cache) for a, b in ((0, 1), (1, 4), (4, 5))]
    ours.model(new[:, 7:9], cache=cache)  # two that are taken back
    cache.drop(2)
    steps += [ours.model(new[:, a:b], cache=cache) for a, b in ((5, 6), (6, 9))]
    found = torch.cat(steps, dim=1)
    for row, tokens in enumerate(new.tolist()):
        whole = ours.model(torch.tensor([PROMPTS[row // 2] + tokens]))[0, -9:]
        torch.testing.assert_close(found[row], whole, rtol=0, atol=1e-5)


def test_beams_share_the_cache_of_their_prompt():
    """With ten times the beams the cache grows by the new tokens of these, not by copies of the prompt."""
    torch.manual_seed(0)
    model = build({"model_type": "llama", **SIZES}).eval()
    held = []

    def count(*args, **kwargs):
        made = Cache(*args, **kwargs)
        held.append(made)
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minitune.generate.Cache", count)
        for beams in (2, 20):
            generate(model, [[1] * 200], GenerateConfig(max_new_tokens=4, num_beams=beams, eos_ids=()))
    sizes = [sum(t.numel() for layer in c.layers for t in (layer.prompt_k, layer.k)) for c in held]
    assert sizes[1] - sizes[0] == 2 * 18 * 4 * 32  # layers, beams, new tokens, heads * head dim
    assert sizes[0] < 2 * 200 * 32 * 1.1


def test_the_window_bounds_the_cache():
    torch.manual_seed(0)
    model = build({"model_type": "mistral", **SIZES, "num_key_value_heads": 4, "sliding_window": 6}).eval()
    cache = Cache(2, [100], max_new_tokens=50, window=6)
    cache.read([(0, 0, 100)])
    with torch.no_grad():
        model.model(torch.ones(1, 100, dtype=torch.long), cache=cache)
        for _ in range(20):
            model.model(torch.ones(1, 1, dtype=torch.long), cache=cache)
    assert cache.layers[0].prompt_k.shape[2] == 5 and cache.layers[0].k.shape[2] == 6


@pytest.mark.parametrize("count", [1, 3, 8])
def test_lookup_gives_the_greedy_answer_in_fewer_steps(pair, count):
    _, ours = pair
    prompt = [3, 4, 5, 6, 7] * 4
    plain, plain_counts = decode(ours, [prompt], GenerateConfig(max_new_tokens=40, eos_ids=()))
    found, counts = decode(ours, [prompt], GenerateConfig(max_new_tokens=40, eos_ids=(), lookup=count))
    assert found[0].ids == plain[0].ids
    torch.testing.assert_close(found[0].logprobs, plain[0].logprobs, rtol=0, atol=1e-4)
    assert counts.accepted <= counts.guessed and counts.steps <= plain_counts.steps
    assert counts.steps + counts.accepted in (plain_counts.steps, plain_counts.steps + 1)


def tiny_with_adapter(family, dtype, quantize):
    """A model whose widths the kernels take, all of its linear layers with LoRA, in 4 bit if wanted."""
    torch.manual_seed(0)
    sizes = SIZES | {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4}
    model = build({"model_type": family, **sizes, **FAMILIES[family][1]})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.1 if parameter.ndim == 1 else 0.2)
    model.to({"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    for name, layer in list(model.named_modules()):
        if quantize != "none" and isinstance(layer, torch.nn.Linear) and name != "lm_head":
            parent, _, leaf = name.rpartition(".")
            quantized = NF4Linear.from_weight(layer.weight.detach(), layer.bias, None, quantize == "nf4-dq")
            setattr(model.get_submodule(parent), leaf, quantized)
    lora.inject(model, r=4, alpha=8)
    for layer in lora.lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B.weight, std=0.2)
    return model.eval()


def guesses(ids, at_most, room=99):
    return Lookup(at_most).guess(ids, room)


def test_lookup_finds_what_followed_the_last_ngram():
    assert guesses([1, 2, 3, 9, 9, 1, 2, 3], 3) == [9, 9, 1]
    assert guesses([1, 2, 3, 9, 1, 2, 3, 8, 1, 2, 3], 2) == [8, 1], "the most recent one"
    assert guesses([5, 2, 3, 9, 9, 1, 2, 3], 1) == [9], "two tokens where three were never there"
    assert guesses([7, 7, 7, 7], 3) == [7], "what follows ends with the history"
    assert guesses([1, 2, 3, 9, 9, 1, 2, 3], 3, room=0) == guesses([1, 2, 3], 3) == guesses([1], 3) == []


def test_lookup_guesses_more_where_it_was_right_and_waits_where_it_was_wrong():
    lookup, ids = Lookup(8), [1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2]
    assert lookup.guess(ids, 99) == [3, 4, 5]
    lookup.learn(3, 3)
    assert lookup.guess(ids, 99) == [3, 4, 5, 6, 7]
    lookup.learn(5, 1)
    assert lookup.guess(ids, 99) == [3]
    lengths = []
    for _ in range(9):
        guess = lookup.guess(ids, 99)
        lookup.learn(len(guess), 0)
        lengths.append(len(guess))
    assert lengths == [1, 0, 3, 0, 0, 3, 0, 0, 0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype, quantize", [("fp32", "none"), ("bf16", "none"), ("bf16", "nf4"), ("bf16", "nf4-dq")])
def test_several_tokens_in_one_step_change_no_bit(family, dtype, quantize):
    """Why guesses are free: with an adapter too, every row of a step is what it would be alone."""
    model = tiny_with_adapter(family, dtype, quantize)
    rows = steady_rows(model)
    if rows == 1:
        pytest.skip("torch's own products are used here")
    rows = min(rows, 8)
    tokens = torch.randint(3, 60, (1, rows), generator=torch.Generator().manual_seed(1))

    def step_logits(parts):
        cache = Cache(
            model.config.num_hidden_layers,
            [5],
            max_new_tokens=20,
            window=getattr(model.config, "sliding_window", None),
            draft=8,
        )
        cache.read([(0, 0, 5)])
        with torch.no_grad():
            model.model(torch.tensor([[3, 4, 5, 6, 7]]), cache=cache)
            return torch.cat([model.lm_head(model.model(part, cache=cache)) for part in parts], dim=1)

    assert torch.equal(step_logits([tokens]), step_logits(tokens.split(1, dim=1)))


def test_guesses_are_made_where_they_are_free_and_the_answer_is_the_same():
    model = tiny_with_adapter("llama", "bf16", "none")
    if steady_rows(model) == 1:
        pytest.skip("torch's own products are used here")
    for seed in range(4):
        prompt = torch.randint(3, 60, (12,), generator=torch.Generator().manual_seed(seed)).tolist() * 2
        plain, _ = decode(model, [prompt], GenerateConfig(max_new_tokens=60, eos_ids=(), lookup=0))
        found, counts = decode(model, [prompt], GenerateConfig(max_new_tokens=60, eos_ids=()))
        assert found[0].ids == plain[0].ids and found[0].logprobs == plain[0].logprobs
        assert counts.accepted and counts.steps == 59 - counts.accepted
    for options in ({"num_beams": 2}, {"do_sample": True}):
        assert not decode(model, [prompt], GenerateConfig(max_new_tokens=9, eos_ids=(), **options))[1].guessed
    assert not decode(model, [prompt, prompt], GenerateConfig(max_new_tokens=9, eos_ids=()))[1].guessed


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
    "stop is given, but no tokenizer": lambda: generate(MODEL(), [[1]], GenerateConfig(stop=("x",))),
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


@pytest.mark.parametrize("family", FAMILIES)
def test_a_remembered_conversation_is_not_read_again_and_changes_nothing(family, monkeypatch):
    model = tiny_with_adapter(family, "fp32", "none")
    options = GenerateConfig(max_new_tokens=5, eos_ids=())
    memory, ids, read = Memory(), [4, 9, 3], []
    forward = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda ids, **more: read.append(ids.shape[1]) or forward(ids, **more))
    window = getattr(model.config, "sliding_window", None)
    for turn in range(3):
        alone = decode(model, [ids], options)[0][0]
        read.clear()
        answer = decode(model, [ids], options, memory=memory)[0][0]
        assert answer.ids == alone.ids
        assert answer.logprobs == pytest.approx(alone.logprobs, abs=1e-5)
        assert read[0] == (len(ids) if turn == 0 or window else 4)  # the last token of the answer was never read
        ids = [*ids, *answer.ids, 7, 8 + turn, 9]
    decode(model, [[4, 9, 5, 6]], options, memory=memory)  # another conversation with the same beginning
    assert memory.ids[:4] == [4, 9, 5, 6] or window
    with pytest.raises(ValueError, match="memory is of a single answer"):
        decode(model, [[4], [5]], options, memory=memory)


def test_what_was_read_before_an_answer_was_stopped_is_remembered():
    model, memory = tiny_with_adapter("llama", "fp32", "none"), Memory()

    def stop(token):
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(token)

    seen = []
    with pytest.raises(KeyboardInterrupt):
        decode(model, [[4, 9, 3]], GenerateConfig(max_new_tokens=9, eos_ids=()), on_token=stop, memory=memory)
    assert memory.ids == [4, 9, 3, *seen] and memory.layers[0][0].shape[1] == 6


def test_an_answer_that_is_interrupted_at_any_line_leaves_a_memory_that_is_right(monkeypatch):
    """At the first, the second and the last time that each line of the cache runs."""
    monkeypatch.setattr("minitune.models.cache.FIRST_CAPACITY", 2)
    model, whole, prompt = tiny_with_adapter("llama", "fp32", "none"), Memory(), [4, 9, 3, 30, 2]
    options = GenerateConfig(max_new_tokens=4, eos_ids=(), lookup=0)

    def lines_of(memory, stop_before=None):
        """Decode, and the lines that ran; with stop_before, Ctrl-C comes before the line of this index."""
        lines = []

        def trace(frame, event, argument):
            if not frame.f_code.co_filename.endswith("models/cache.py") or "keep" in frame.f_code.co_name:
                return None
            if event == "line":
                if len(lines) == stop_before:
                    raise KeyboardInterrupt
                lines.append(frame.f_lineno)
            return trace

        sys.settrace(trace)
        try:
            decode(model, [prompt], options, memory=memory)
        finally:
            sys.settrace(None)
        return lines

    places = {}
    for index, line in enumerate(lines_of(whole)):
        places.setdefault(line, []).append(index)
    assert len(places) > 60
    for index in sorted({index for found in places.values() for index in (*found[:2], found[-1])}):
        memory = Memory()
        with pytest.raises(KeyboardInterrupt):
            lines_of(memory, index)
        assert memory.ids == whole.ids[: len(memory.ids)]
        for found, expected in zip(memory.layers, whole.layers, strict=True) if memory.ids else ():
            assert all(torch.equal(a, b[:, : len(memory.ids)]) for a, b in zip(found, expected, strict=True)), index


@pytest.mark.parametrize(
    "options", [{}, {"do_sample": True, "seed": 3}, {"num_beams": 3}], ids=["greedy", "drawn", "beams"]
)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype, quantize", [("fp32", "none"), ("bf16", "none"), ("bf16", "nf4")])
def test_an_answer_is_the_same_alone_and_in_a_batch_whose_longest_prompt_leaves_first(family, dtype, quantize, options):
    model = tiny_with_adapter(family, dtype, quantize)
    lengths = (90, 40, 3, 17, 1, 66, 8)
    prompts = [torch.randint(3, 60, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in lengths]
    first = decode(model, prompts[:1], GenerateConfig(max_new_tokens=2, eos_ids=(), **options))[0][0].ids[0]
    config = GenerateConfig(max_new_tokens=12, eos_ids=(first,), **options)
    together = decode(model, prompts, config)[0]
    exact = steady_rows(model) >= len(prompts) * config.num_beams
    for prompt, answer in zip(prompts, together, strict=True):
        alone = decode(model, [prompt], config)[0][0]
        if exact or dtype == "fp32":
            assert answer.ids == alone.ids
        if exact:
            assert answer.logprobs == alone.logprobs and answer.score == alone.score


def test_rows_of_a_dynamic_rope_beyond_its_context_stretch_by_themselves():
    torch.manual_seed(0)
    scaling = {"rope_type": "dynamic", "factor": 2.0}
    model = build({"model_type": "llama", **SIZES, "max_position_embeddings": 64, "rope_scaling": scaling}).eval()
    assert steady_rows(model) == 1, "a guess would stretch the tokens before it"
    config = GenerateConfig(max_new_tokens=20, eos_ids=())
    prompts = [[5, 7, 9] * 20, [4, 8]]
    together = decode(model, prompts, config)[0]
    for prompt, answer in zip(prompts, together, strict=True):
        alone = decode(model, [prompt], config)[0][0]
        assert answer.ids == alone.ids and answer.logprobs == pytest.approx(alone.logprobs, abs=1e-5)


def test_an_answer_may_be_longer_than_the_room_that_is_made_at_first(monkeypatch):
    monkeypatch.setattr("minitune.models.cache.FIRST_CAPACITY", 16)
    model = build({"model_type": "llama", **SIZES, "max_position_embeddings": 4096}).eval()
    for options in ({}, {"num_beams": 3}, {"lookup": 0}):
        long = decode(model, [[4, 9, 3]], GenerateConfig(max_new_tokens=100, eos_ids=(), **options))[0][0]
        assert len(long.ids) == 100
    whole = torch.tensor([[4, 9, 3, *long.ids[:-1]]])
    with torch.no_grad():
        logprobs = model(whole)[0, 2:].log_softmax(-1).gather(1, torch.tensor(long.ids)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(long.logprobs), logprobs, rtol=0, atol=1e-4)
    GenerateConfig(max_new_tokens=10**12)
    decode(model, [[4]], GenerateConfig(max_new_tokens=10**12, eos_ids=tuple(range(61))))


def test_autocast_and_cast_adapters_go_through_torch_and_give_numbers():
    model = tiny_with_adapter("llama", "fp32", "none")
    prompt = [torch.randint(3, 60, (100,), generator=torch.Generator().manual_seed(0)).tolist()]
    with torch.autocast("cpu", torch.bfloat16):
        assert len(decode(model, prompt, GenerateConfig(max_new_tokens=8, eos_ids=()))[0][0].ids) == 8
    for dtype in (torch.bfloat16, torch.float64):
        found = decode(tiny_with_adapter("llama", "fp32", "none").to(dtype), prompt, GenerateConfig(max_new_tokens=4))
        assert torch.tensor(found[0][0].logprobs).isfinite().all()


def test_modules_are_left_in_the_mode_in_which_they_were():
    model = build({"model_type": "llama", **SIZES}).train()
    model.model.layers[0].eval()
    generate(model, [[4]], GenerateConfig(max_new_tokens=2))
    assert model.training and model.model.layers[1].training and not model.model.layers[0].mlp.training


def test_scores_beyond_every_number_do_not_stop_the_search():
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
        theirs = transformers.LlamaForCausalLM(config).eval()
        for parameter in theirs.parameters():
            torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.1 if parameter.ndim == 1 else 0.3)
        ours = build(json.loads(config.to_json_string())).eval()
        ours.load_state_dict(theirs.state_dict())
        options = {"num_beams": 3, "no_repeat_ngram_size": 1, "early_stopping": early_stopping}
        [answer], _ = decode(ours, [[1, 2, 3]], GenerateConfig(max_new_tokens=14, eos_ids=(1, 5), **options))
        if answer.score > -1e8:  # else none ended before the tokens were used up
            assert [answer.ids] == theirs_of(theirs, [1, 2, 3], eos=(1, 5), **options)
            compared += 1
    assert compared >= 4


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}])
def test_the_memory_of_a_decoding_goes_with_it_and_waits_for_no_garbage_collector(pair, options, monkeypatch):
    _, ours = pair
    made, own = [], Cache.__init__
    monkeypatch.setattr(Cache, "__init__", lambda self, *rest: own(self, *rest) or made.append(weakref.ref(self)))
    gc.collect()
    gc.disable()
    try:
        decode(ours, PROMPTS, GenerateConfig(max_new_tokens=12, eos_ids=ENDS, **options))
        assert len(made) == 1 and made[0]() is None
    finally:
        gc.enable()
