"""Exact match: the share of answers that are the reference, but for space at both ends."""


def exact_match(references, candidates):
    """references, candidates: lists of str of equal length. Returns a share from 0 to 1. Raises ValueError otherwise."""
    if len(references) != len(candidates) or not references:
        raise ValueError(
            f"got {len(references)} references and {len(candidates)} candidates, expected as many, at least one"
        )
    hits = sum(r.strip() == c.strip() for r, c in zip(references, candidates, strict=True))
    return hits / len(references)
