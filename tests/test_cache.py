"""Decoding with a cache gives what decoding without one gives: alone and in a batch, one token and several at a time, and over
the turns of a conversation."""

import gc
import sys
import weakref

import pytest
import torch
from small import FAMILIES
from small_decoding import ENDS, PROMPTS, SIZES, tiny_with_adapter

from minitune.decoding.lookup import Lookup
from minitune.decoding.options import GenerateConfig
from minitune.generate import decode, generate, steady_rows
from minitune.models import build
from minitune.models.cache import Cache, Memory

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
    """Prompts of unequal length are read in pieces. Two sequences of each then get new tokens, one or several at a time."""
    _, ours = pair
    new = torch.randint(0, 61, (len(PROMPTS) * 2, 9), generator=torch.Generator().manual_seed(2))
    window = getattr(ours.config, "sliding_window", None)
    cache = Cache(2, [len(p) for p in PROMPTS], sequences=2, max_new_tokens=9, window=window, draft=2)
    cache.read([(0, 0, 4)])
    ours.model(torch.tensor([PROMPTS[0][:4]]), cache=cache)
    cache.read([(0, 4, 9), (1, 0, 1), (2, 0, 4)])
    ours.model(torch.tensor([PROMPTS[0][4:] + PROMPTS[1] + PROMPTS[2]]), cache=cache)
    steps = [ours.model(new[:, a:b], cache=cache) for a, b in ((0, 1), (1, 4), (4, 5))]
    ours.model(new[:, 7:9], cache=cache)  # two guesses, which are dropped again
    cache.drop(2)
    steps += [ours.model(new[:, a:b], cache=cache) for a, b in ((5, 6), (6, 9))]
    found = torch.cat(steps, dim=1)
    for row, tokens in enumerate(new.tolist()):
        whole = ours.model(torch.tensor([PROMPTS[row // 2] + tokens]))[0, -9:]
        torch.testing.assert_close(found[row], whole, rtol=0, atol=1e-5)


def test_beams_share_the_cache_of_their_prompt():
    """With ten times as many beams the cache grows by their new tokens only: the prompt is not copied."""
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
    """What makes guesses exact: each row of a step has the bits that it has alone, with an adapter too."""
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
    with pytest.raises(ValueError, match="memory works for a single answer"):
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
    """At the first and the last time that each line of the cache runs."""
    monkeypatch.setattr("minitune.models.cache.FIRST_CAPACITY", 2)
    model, whole, prompt = tiny_with_adapter("llama", "fp32", "none"), Memory(), [4, 9, 3, 30, 2]
    options = GenerateConfig(max_new_tokens=4, eos_ids=(), lookup=0)

    def lines_of(memory, stop_before=None):
        """Decode. Returns the lines that ran. stop_before: Ctrl-C comes before the line with this index."""
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
    for index in sorted({index for found in places.values() for index in (found[0], found[-1])}):
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
    lengths = (90, 3, 17, 1, 66)
    prompts = [torch.randint(3, 60, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in lengths]
    first = decode(model, prompts[:1], GenerateConfig(max_new_tokens=2, eos_ids=(), **options))[0][0].ids[0]
    config = GenerateConfig(max_new_tokens=8, eos_ids=(first,), **options)
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


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}])
def test_the_cache_is_freed_when_decoding_ends_without_the_garbage_collector(pair, options, monkeypatch):
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
