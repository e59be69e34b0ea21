"""chrF (Popovic 2015) and chrF++ (Popovic 2017), sacrebleu's numbers from 0 to 100.

The F score, with recall beta times as important, of the character n-grams of orders 1 to 6; chrF++ adds words and pairs of words
(word_order=2). The rows of `chrf_statistics` can be summed over any choice of answers, as those of BLEU."""

import numpy as np

from minitune.metrics.ngrams import overlaps
from minitune.metrics.pairs import as_list, check_pairs, number_of_references

PUNCTUATION = frozenset("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")
SACREBLEU = "2.6.0+minitune"  # the release whose numbers these are, and who computed them
NEARLY_ZERO = 1e-16


def corpus_chrf(references, candidates, char_order=6, word_order=0, beta=2, lowercase=False, whitespace=False,
                eps_smoothing=False):  # fmt: skip
    """chrF of many answers, 0 to 100. references: for each candidate a str, or a list of str of which the best one counts.

    whitespace: it counts as characters do. eps_smoothing: the mean of the F scores of all orders, as chrF++.py and Moses have it;
    otherwise the F of the mean precision and recall of the orders that both texts have."""
    options = (char_order, word_order, beta, lowercase, whitespace, eps_smoothing)
    return chrf_score(chrf_statistics(references, candidates, *options).sum(0), beta, eps_smoothing)


def segment_chrf(reference, candidate, **options):
    """chrF of one answer, 0 to 100. Takes the options of `corpus_chrf`."""
    return corpus_chrf([reference], [candidate], **options)


def chrf_statistics(references, candidates, char_order=6, word_order=0, beta=2, lowercase=False, whitespace=False,
                    eps_smoothing=False):  # fmt: skip
    """What chrF needs of each answer: int64 (answers, 3 * (char_order + word_order)); for each order the n-grams of the candidate
    and of the reference, and the matching ones. Raises ValueError where the lists do not fit together."""
    check_pairs(references, candidates)
    several = [as_list(r) for r in references]
    theirs = [text.lower() if lowercase else text for texts in several for text in texts]
    ours = [text.lower() if lowercase else text for text in candidates]
    ours = [text for text, texts in zip(ours, several, strict=True) for _ in texts]
    squeeze = (lambda text: text) if whitespace else (lambda text: "".join(text.split()))
    rows = counts_of_orders([squeeze(t) for t in theirs], [squeeze(t) for t in ours], char_order)
    if word_order:
        words = counts_of_orders([split_words(t) for t in theirs], [split_words(t) for t in ours], word_order)
        rows = np.concatenate([rows, words], axis=1)
    if len(rows) == len(candidates):
        return rows
    starts = np.cumsum([0] + [len(texts) for texts in several])
    scores = [chrf_score(row, beta, eps_smoothing) for row in rows]
    best = [max(range(a, b), key=scores.__getitem__) for a, b in zip(starts[:-1], starts[1:], strict=True)]
    return rows[best]


def counts_of_orders(references, candidates, max_order):
    """int64 (pairs, 3 * max_order). Where a reference has no n-gram of an order, sacrebleu counts none of the candidate's."""
    orders = np.arange(max_order)
    ours, theirs = (
        np.maximum(np.array([len(s) for s in side])[:, None] - orders, 0) for side in (candidates, references)
    )
    counts = np.stack([np.where(theirs > 0, ours, 0), theirs, overlaps(references, candidates, max_order)], axis=-1)
    return counts.reshape(len(candidates), 3 * max_order)


def split_words(text):
    """Words, with one punctuation mark cut off: the last character, or else the first."""
    words = []
    for word in text.split():
        if len(word) > 1 and word[-1] in PUNCTUATION:
            words += [word[:-1], word[-1]]
        elif len(word) > 1 and word[0] in PUNCTUATION:
            words += [word[0], word[1:]]
        else:
            words.append(word)
    return words


def chrf_score(statistics, beta=2, eps_smoothing=False):
    """chrF of one row, or of a sum of rows, of `chrf_statistics`. Returns 0 to 100."""
    counts = statistics.tolist() if isinstance(statistics, np.ndarray) else statistics
    factor, scores, precisions, recalls = beta**2, 0.0, 0.0, 0.0
    orders = len(counts) // 3
    effective = 0
    for ours, theirs, matches in zip(counts[::3], counts[1::3], counts[2::3], strict=True):
        precision = matches / ours if ours else NEARLY_ZERO
        recall = matches / theirs if theirs else NEARLY_ZERO
        weighed = factor * precision + recall
        scores += (1 + factor) * precision * recall / weighed if weighed else NEARLY_ZERO
        if ours and theirs:
            precisions, recalls, effective = precisions + precision, recalls + recall, effective + 1
    if eps_smoothing:
        return 100 * scores / orders
    if not precisions + recalls:
        return 0.0
    precision, recall = precisions / effective, recalls / effective
    return 100 * ((1 + factor) * precision * recall / (factor * precision + recall))


def chrf_signature(references, char_order=6, word_order=0, lowercase=False, whitespace=False, eps_smoothing=False):
    """How a score was made, in sacrebleu's words: nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:2.6.0+minitune."""
    case, effective = "lc" if lowercase else "mixed", "no" if eps_smoothing else "yes"
    space = "yes" if whitespace else "no"
    number = number_of_references(references)
    return (
        f"nrefs:{number}|case:{case}|eff:{effective}|nc:{char_order}|nw:{word_order}|space:{space}|version:{SACREBLEU}"
    )
