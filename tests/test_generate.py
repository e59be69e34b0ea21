"""Greedy decoding: equal to recomputing everything at each token, and the same alone as in a batch."""

import pytest
import torch

from minitune.generate import GenerateConfig, generate
from minitune.models import build

BASE = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS = [
    {"model_type": "llama"},
    {"model_type": "mistral", "sliding_window": 6, "num_key_value_heads": 2},
    {"model_type": "phi"},
]
PROMPTS = [[5, 9, 3, 7, 7, 1, 30], [4], [8, 8, 2]]


@pytest.fixture(params=MODELS, ids=lambda change: change["model_type"])
def model(request):
    torch.manual_seed(0)
    net = build(BASE | request.param).eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return net


@torch.no_grad()
def without_cache(model, prompt, count):
    ids = list(prompt)
    for _ in range(count):
        ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
    return ids[len(prompt) :]


def test_a_batch_of_unequal_prompts_equals_each_alone_without_a_cache(model):
    expected = [without_cache(model, prompt, 12) for prompt in PROMPTS]
    assert len(set(map(tuple, expected))) > 1, "the prompts must lead to different answers"
    assert generate(model, PROMPTS, GenerateConfig(max_new_tokens=12)) == expected


def test_an_answer_ends_at_any_of_the_end_ids_and_leaves_it_out(model):
    free = [without_cache(model, prompt, 12) for prompt in PROMPTS]
    ends = (free[0][4], free[1][7])
    cut = [answer[: min([answer.index(e) for e in ends if e in answer], default=12)] for answer in free]
    assert generate(model, PROMPTS, GenerateConfig(max_new_tokens=12, eos_ids=ends)) == cut


def test_an_empty_prompt_is_named(model):
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        generate(model, [[1], []], GenerateConfig())


def test_no_prompts_give_no_answers(model):
    assert generate(model, [], GenerateConfig()) == []


def test_an_answer_of_no_tokens_is_refused():
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        GenerateConfig(max_new_tokens=0)
