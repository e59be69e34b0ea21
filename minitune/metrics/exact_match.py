"""Exact match: the share of answers that are the reference, but for space at both ends."""

from minitune.metrics.pairs import as_list, check_pairs


def exact_match(references, candidates):
    """references: for each candidate a str, or a list of str of which any counts. Returns a share from 0 to 1. Raises ValueError
    where the lists do not fit together."""
    check_pairs(references, candidates)
    hits = sum(is_exact(r, c) for r, c in zip(references, candidates, strict=True))
    return hits / len(candidates)


def is_exact(reference, candidate):
    """Whether one answer is its reference, or one of them, but for space at both ends."""
    return candidate.strip() in [text.strip() for text in as_list(reference)]
