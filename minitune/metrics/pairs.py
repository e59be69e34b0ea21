"""Checks lists of references and candidates. A candidate has one reference, a str, or several, a list of str."""


def as_list(reference):
    """The references of one candidate as a list."""
    return [reference] if isinstance(reference, str) else reference


def check_pairs(references, candidates):
    """Raises ValueError unless there is a reference (str, or list of str) for each candidate, and at least one pair."""
    if isinstance(references, str) or isinstance(candidates, str):
        raise ValueError("references and candidates must be lists of texts, got one text; wrap it in a list")
    if len(references) != len(candidates) or not len(candidates):
        raise ValueError(
            f"got {len(references)} references and {len(candidates)} candidates, expected equal numbers above 0"
        )
    for row, (reference, candidate) in enumerate(zip(references, candidates, strict=True)):
        if not isinstance(candidate, str):
            raise ValueError(f"row {row}: the candidate is {candidate!r}, expected a text")
        texts = as_list(reference)
        if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"row {row}: the reference is {reference!r}, expected a text or a list of texts")


def number_of_references(references):
    """The number of references of each candidate for a signature: a number, or "var" if it varies."""
    numbers = {len(as_list(r)) for r in references}
    return numbers.pop() if len(numbers) == 1 else "var"
