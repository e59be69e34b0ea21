"""References beside candidates: one text each, or several references for a candidate. Checked here, scored elsewhere."""


def as_list(reference):
    """The references of one candidate as a list."""
    return [reference] if isinstance(reference, str) else reference


def check_pairs(references, candidates):
    """Raises ValueError unless there is a reference (str, or list of str) for each candidate, and at least one pair."""
    if isinstance(references, str) or isinstance(candidates, str):
        raise ValueError("references and candidates must be lists of texts, got one text; wrap it in a list")
    if len(references) != len(candidates) or not len(candidates):
        raise ValueError(
            f"got {len(references)} references and {len(candidates)} candidates, expected as many, at least one"
        )
    for row, (reference, candidate) in enumerate(zip(references, candidates, strict=True)):
        if not isinstance(candidate, str):
            raise ValueError(f"row {row}: the candidate is {candidate!r}, expected a text")
        texts = as_list(reference)
        if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"row {row}: the reference is {reference!r}, expected a text or a list of texts")


def number_of_references(references):
    """How many references each candidate has, as a signature says it: a number, or var."""
    numbers = {len(as_list(r)) for r in references}
    return numbers.pop() if len(numbers) == 1 else "var"
