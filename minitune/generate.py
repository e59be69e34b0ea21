"""Decoding: a model and prompts in, new tokens out. Greedy, over a key-value cache. It never loads a model."""

from dataclasses import dataclass

import torch

from minitune.config import arg, positive
from minitune.models.layers import Cache


@dataclass(frozen=True)
class GenerateConfig:
    """How an answer is decoded."""

    max_new_tokens: int = arg(64, "longest answer, in tokens")
    eos_ids: tuple[int, ...] = arg((), "ids that end an answer")

    def __post_init__(self):
        positive(self, "max_new_tokens")


@torch.no_grad()
def generate(model, prompts, config):
    """The most likely continuation, token by token (greedy).

    prompts: lists of token ids, of unequal length. Returns a list of new ids for each, without the one that ended it.
    Raises ValueError on an empty prompt."""
    if empty := [i for i, prompt in enumerate(prompts) if not prompt]:
        raise ValueError(f"prompt {empty[0]} has no tokens; give at least one, such as BOS")
    if not prompts:
        return []
    device = next(model.parameters()).device
    longest = max(map(len, prompts))
    padded = [[0] * (longest - len(p)) + list(p) for p in prompts]
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    unequal = any(len(p) < longest for p in prompts)
    ids = torch.tensor(padded, device=device)  # (B, T), padded on the left
    cache = Cache(model.config.num_hidden_layers, longest + config.max_new_tokens)
    answers, running = [[] for _ in prompts], set(range(len(prompts)))
    for _ in range(config.max_new_tokens):
        hidden = model.model(ids, attention_mask=mask if unequal else None, cache=cache)[:, -1:]
        ids = model.lm_head(hidden).argmax(-1)  # (B, 1)
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
        for i, token in enumerate(ids[:, 0].tolist()):
            if i in running and token in config.eos_ids:
                running.remove(i)
            elif i in running:
                answers[i].append(token)
        if not running:
            break
    return answers
