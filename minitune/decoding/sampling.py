"""Penalties, bans and warpers on the scores of the next token, and drawing from them.

Pure functions on scores (R, V) fp32, logits or log-probabilities, one row for each sequence. They return new scores. The
options mean what they mean in transformers."""

import torch


def penalise_repetition(scores, seen, penalty):
    """Divide positive scores of seen tokens by `penalty` and multiply negative ones by it (CTRL, arXiv 1909.05858).

    seen: (R, V) bool, True for the tokens in a row's history."""
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def ban_repeated_ngrams(scores, histories, size):
    """-inf for each token that would repeat an n-gram of `size` tokens. histories: lists of ids, one for each row."""
    scores = scores.clone()
    for row, ids in enumerate(histories):
        if len(ids) >= size:
            prefix = ids[len(ids) - size + 1 :]
            banned = {ids[i + size - 1] for i in range(len(ids) - size + 1) if ids[i : i + size - 1] == prefix}
            scores[row, [i for i in banned if i < scores.shape[1]]] = -torch.inf
    return scores


def ban(scores, ids, rows=None):
    """-inf for the tokens `ids`, in the rows `rows` (indices), or in all rows for None."""
    scores = scores.clone()
    rows = torch.tensor(list(range(len(scores)) if rows is None else rows), dtype=torch.long)
    scores[rows[:, None], [i for i in ids if i < scores.shape[1]]] = -torch.inf
    return scores


def ban_words(scores, histories, words):
    """-inf for each token that would complete one of `words`, lists of ids. histories: lists of ids, one for each row."""
    scores = scores.clone()
    for row, ids in enumerate(histories):
        for *start, last in words:
            if last < scores.shape[1] and (not start or ids[-len(start) :] == start):
                scores[row, last] = -torch.inf
    return scores


def force(scores, ids, rows):
    """In the rows `rows` (indices): 0 for the tokens `ids`, -inf for all others."""
    scores = scores.clone()
    for row in rows:
        scores[row] = -torch.inf
        scores[row, [i for i in ids if i < scores.shape[1]]] = 0.0
    return scores


def warp(scores, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, keep=1, typical_p=None):
    """Divide by the temperature, then set to -inf all tokens but those that pass each of these filters, in this order.

    top_k: the k best; 0: all. top_p: the nucleus of this probability mass (arXiv 1904.09751). min_p: probability of at least
    min_p times the largest (arXiv 2407.01082). typical_p: the most typical tokens of this mass (arXiv 2202.00666). keep: each
    filter leaves at least this many tokens."""
    if temperature != 1.0:
        scores = scores / temperature
    if top_k:
        worst = scores.topk(min(max(top_k, keep), scores.shape[1])).values[:, -1:]
        scores = scores.masked_fill(scores < worst, -torch.inf)
    if top_p < 1.0:
        rising, order = scores.sort()
        outside = rising.softmax(-1).cumsum(-1) <= 1 - top_p
        outside[:, -keep:] = False
        scores = scores.masked_fill(outside.scatter(1, order, outside), -torch.inf)
    if min_p:
        probabilities = scores.softmax(-1)
        outside = probabilities < min_p * probabilities.amax(-1, keepdim=True)
        outside.scatter_(1, probabilities.topk(min(keep, scores.shape[1])).indices, False)
        scores = scores.masked_fill(outside, -torch.inf)
    if typical_p is not None and typical_p < 1.0:
        logprobs = scores.log_softmax(-1)
        entropy = -(logprobs * logprobs.exp()).nansum(-1, keepdim=True)
        distance, order = (-logprobs - entropy).abs().sort()
        mass = scores.gather(1, order).softmax(-1).cumsum(-1)
        last = (mass < typical_p).sum(1, keepdim=True).clamp(max=scores.shape[1] - 1)
        outside = distance > distance.gather(1, last)
        outside[:, :keep] = False
        scores = scores.masked_fill(outside.scatter(1, order, outside), -torch.inf)
    return scores


def draw_several(scores, numbers, count):
    """Draw `count` indices of scores (N,) without replacement, with the Gumbel top-k trick (arXiv 1903.06059).

    numbers: (N,) uniform in [0, 1), on the CPU. Returns (count,) int64 in the order drawn. Indices with score -inf come last, if
    fewer than `count` others exist."""
    noise = -(-numbers.double().clamp(min=1e-300).log()).log()
    return (scores.double().cpu() + noise).topk(count).indices


def draw(scores, numbers):
    """Draw one token for each row by inverting the cumulative probabilities. Returns (R,) int64.

    numbers: (R,) fp64 uniform in [0, 1), drawn on the CPU, so that a seed gives the same tokens on every device. The sums are
    fp64. Raises FloatingPointError if a row has NaN, or only -inf."""
    cumulated = scores.double().softmax(-1).cumsum(-1)
    reached = cumulated > numbers.to(cumulated)[:, None] * cumulated[:, -1:]
    if not reached[:, -1].all():
        if (scores == -torch.inf).all(1).any():
            raise FloatingPointError(
                "every token is banned, so none can be drawn; raise no_repeat_ngram_size, or lower max_new_tokens"
            )
        raise FloatingPointError("the probabilities of the next token are NaN: scores or temperature are out of range")
    return reached.int().argmax(-1)  # the first token whose cumulative probability exceeds the number
