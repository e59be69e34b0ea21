"""Exact match: the share of answers that equal the reference, after stripping white space at both ends."""

from minitune.metrics.pairs import as_list, check_pairs


def exact_match(references, candidates):
    """The share of candidates that equal a reference, 0 to 1.

    references: for each candidate a str, or a list of str of which any may match. Raises ValueError if the lists do not fit
    together."""
    check_pairs(references, candidates)
    hits = sum(is_exact(r, c) for r, c in zip(references, candidates, strict=True))
    return hits / len(candidates)


def is_exact(reference, candidate):
    """Whether an answer equals its reference, or one of them, after stripping white space at both ends."""
    return candidate.strip() in [text.strip() for text in as_list(reference)]
