"""Token F1 as in SQuAD 2.0: F1 of the words that two texts share, ignoring case, punctuation and articles."""

import re
import string
from collections import Counter

WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalized_words(text):
    """The lowercase words of a text without ASCII punctuation and without a, an, the: a list of str."""
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(WITHOUT_PUNCTUATION)).split()


def token_f1(reference, candidate):
    """F1 of two texts, 0 to 1. reference: str, or a list of str of which the best one counts.

    If a text has no word left, the score is 1 if the other has none either, else 0."""
    if not isinstance(reference, str):
        return max(token_f1(text, candidate) for text in reference)
    ours, theirs = normalized_words(candidate), normalized_words(reference)
    if not ours or not theirs:
        return float(ours == theirs)
    shared = (Counter(ours) & Counter(theirs)).total()
    precision, recall = shared / len(ours), shared / len(theirs)
    return 2 * precision * recall / (precision + recall) if shared else 0.0
