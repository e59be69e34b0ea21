"""From the scores of the next token to a choice: penalties, bans, and the warpers of sampling.

Pure functions on scores (R, V) in fp32, one row a sequence; they return new scores. Every option means what it means in
transformers."""

import torch


def penalise_repetition(scores, seen, penalty):
    """Scores of tokens that were seen (R, V) bool are divided by `penalty` where positive and multiplied where negative
    (CTRL, arXiv 1909.05858)."""
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def ban_repeated_ngrams(scores, histories, size):
    """-inf for each token that would repeat an n-gram of `size` tokens of its row's history, a list of ids."""
    scores = scores.clone()
    for row, ids in enumerate(histories):
        if len(ids) >= size:
            prefix = ids[len(ids) - size + 1 :]
            banned = {ids[i + size - 1] for i in range(len(ids) - size + 1) if ids[i : i + size - 1] == prefix}
            scores[row, [i for i in banned if i < scores.shape[1]]] = -torch.inf
    return scores


def ban(scores, ids, rows=None):
    """-inf for the tokens `ids` in every row, or in these."""
    scores = scores.clone()
    rows = torch.tensor(list(range(len(scores)) if rows is None else rows), dtype=torch.long)
    scores[rows[:, None], [i for i in ids if i < scores.shape[1]]] = -torch.inf
    return scores


def ban_words(scores, histories, words):
    """-inf for each token that would end one of `words`, lists of ids, after a row's history."""
    scores = scores.clone()
    for row, ids in enumerate(histories):
        for *start, last in words:
            if last < scores.shape[1] and (not start or ids[-len(start) :] == start):
                scores[row, last] = -torch.inf
    return scores


def force(scores, ids, rows):
    """In these rows 0 for the tokens `ids` and -inf for all others."""
    scores = scores.clone()
    for row in rows:
        scores[row] = -torch.inf
        scores[row, [i for i in ids if i < scores.shape[1]]] = 0.0
    return scores


def warp(scores, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, keep=1, typical_p=None):
    """Temperature, then the k best, then the nucleus of mass top_p (arXiv 1904.09751), then those above min_p times the best
    probability (arXiv 2407.01082), then the most typical ones of mass typical_p (arXiv 2202.00666). The others become -inf;
    at least `keep` tokens stay."""
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
    """`count` different places of scores (N,), drawn one after the other without putting back, by Gumbel noise made of
    numbers (N,) in [0, 1) (arXiv 1903.06059). Impossible ones come last, where there are not enough."""
    noise = -(-numbers.double().clamp(min=1e-300).log()).log()
    return (scores.double().cpu() + noise).topk(count).indices


def draw(scores, numbers):
    """The token (R,) whose part of the cumulated probabilities holds the row's number (R,) in [0, 1).

    In fp64 and on the CPU's numbers, so that a seed means the same on every device. Raises FloatingPointError where a row has
    NaN, or nothing to draw."""
    cumulated = scores.double().softmax(-1).cumsum(-1)
    reached = cumulated > numbers.to(cumulated)[:, None] * cumulated[:, -1:]
    if not reached[:, -1].all():
        if (scores == -torch.inf).all(1).any():
            raise FloatingPointError(
                "every token is banned, and none can be drawn; raise no_repeat_ngram_size, or lower max_new_tokens"
            )
        raise FloatingPointError("the probabilities of the next token are NaN: scores or temperature are out of range")
    return reached.int().argmax(-1)  # the first that passes the number
