"""chrF (Popovic 2015) and chrF++ (Popovic 2017), with sacrebleu's numbers, 0 to 100.

F score of character n-grams of orders 1 to 6, in which recall is beta times as important as precision. chrF++ adds n-grams of
words (word_order=2). The rows of chrf_statistics() can be summed over any selection of answers, as those of BLEU."""

import numpy as np

from minitune.metrics.ngrams import overlaps
from minitune.metrics.pairs import as_list, check_pairs, number_of_references

PUNCTUATION = frozenset("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")
SACREBLEU = "2.6.0+minitune"  # version in signatures: the sacrebleu release with the same numbers, and the program
NEARLY_ZERO = 1e-16


def corpus_chrf(references, candidates, char_order=6, word_order=0, beta=2, lowercase=False, whitespace=False,
                eps_smoothing=False):  # fmt: skip
    """chrF of many answers, 0 to 100.

    references: for each candidate a str, or a list of str of which the best one counts. char_order, word_order: longest n-grams
    of characters and of words. whitespace: count white space as characters. eps_smoothing: the mean of the F scores of all
    orders, as in chrF++.py and Moses; otherwise the F score of mean precision and mean recall over the orders that both texts
    have. Raises ValueError if the lists do not fit together."""
    options = (char_order, word_order, beta, lowercase, whitespace, eps_smoothing)
    return chrf_score(chrf_statistics(references, candidates, *options).sum(0), beta, eps_smoothing)


def segment_chrf(reference, candidate, **options):
    """chrF of one answer, 0 to 100. Takes the options of corpus_chrf()."""
    return corpus_chrf([reference], [candidate], **options)


def chrf_statistics(references, candidates, char_order=6, word_order=0, beta=2, lowercase=False, whitespace=False,
                    eps_smoothing=False):  # fmt: skip
    """The counts from which chrF is computed: int64 (answers, 3 * (char_order + word_order)).

    For each order there are three columns: n-grams of the candidate, of the reference, and matching ones. Arguments and errors as
    in corpus_chrf()."""
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
    """int64 (pairs, 3 * max_order), as in chrf_statistics(). If a reference has no n-gram of an order, the candidate's are
    counted as 0, as in sacrebleu."""
    orders = np.arange(max_order)
    ours, theirs = (
        np.maximum(np.array([len(s) for s in side])[:, None] - orders, 0) for side in (candidates, references)
    )
    counts = np.stack([np.where(theirs > 0, ours, 0), theirs, overlaps(references, candidates, max_order)], axis=-1)
    return counts.reshape(len(candidates), 3 * max_order)


def split_words(text):
    """The words of a text. One punctuation mark of a word is split off: its last character, or else its first."""
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
    """chrF, 0 to 100, of a row, or of a sum of rows, of chrf_statistics()."""
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
    """sacrebleu's signature of a score: nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:2.6.0+minitune."""
    case, effective = "lc" if lowercase else "mixed", "no" if eps_smoothing else "yes"
    space = "yes" if whitespace else "no"
    number = number_of_references(references)
    return (
        f"nrefs:{number}|case:{case}|eff:{effective}|nc:{char_order}|nw:{word_order}|space:{space}|version:{SACREBLEU}"
    )
