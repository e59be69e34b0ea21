"""BLEU (Papineni et al. 2002) in its two dialects, without their libraries.

`sentence_bleu` gives nltk's numbers from 0 to 1 on str.split tokens, with the smoothing methods of Chen and Cherry (WMT 2014);
the study averages it over answers. `corpus_bleu` and `segment_bleu` give sacrebleu's numbers from 0 to 100, with its tokenisers.
The rows of `bleu_statistics` can be summed over any choice of answers: resampling a corpus needs no text."""

import functools
import itertools
import math
import re
import sys
from typing import NamedTuple

import numpy as np

from minitune.metrics.ngrams import ngrams, overlap, overlaps
from minitune.metrics.pairs import as_list, check_pairs, number_of_references

MAX_ORDER = 4
SACREBLEU = "2.6.0+minitune"  # the release whose numbers these are, and who computed them
SMOOTHING_VALUES = {"exp": None, "floor": 0.1, "add-k": 1, "none": None}
SMOOTHING_METHODS = tuple(f"method{k}" for k in range(8))
EPSILON, ALPHA, K = 0.1, 5, 5  # nltk's, of methods 1, 6 and 4


def sentence_bleu(reference, candidate, smoothing="method1"):
    """nltk's sentence BLEU of two texts, split at white space. Returns 0 to 1 (methods 5 and 7 can exceed 1, as nltk's do).

    reference: str, or a list of str of which each n-gram may match any. smoothing: method0 (none) to method7.
    Raises ValueError with method6 where no trigram matches, which it is not defined for."""
    if smoothing not in SMOOTHING_METHODS:
        raise ValueError(f"smoothing is {smoothing!r}, expected one of {', '.join(SMOOTHING_METHODS)}")
    references = [text.split() for text in as_list(reference)]
    words = candidate.split()
    orders = MAX_ORDER + (smoothing in ("method5", "method7"))
    matches = matches_in_any(references, words, orders)
    if not matches[0]:
        return 0.0
    totals = [max(1, len(words) - n) for n in range(orders)]
    precisions = smooth(matches, totals, len(words), smoothing)
    closest = closest_length(len(words), map(len, references))
    penalty = 1.0 if len(words) > closest else math.exp(1 - closest / len(words))
    return penalty * math.exp(math.fsum(math.log(p) / MAX_ORDER for p in precisions if p > 0))


def smooth(matches, totals, length, method):
    """Precisions of orders 1 to 4 from counts; methods 5 and 7 read the fifth as well. length: words of the candidate."""
    precisions = [m / t for m, t in zip(matches, totals, strict=True)]
    zeros = [n for n in range(MAX_ORDER) if not matches[n]]
    if method == "method0":
        return [p or sys.float_info.min for p in precisions]
    if method == "method1":
        for n in zeros:
            precisions[n] = EPSILON / totals[n]
    elif method == "method2":
        precisions[1:] = [(m + 1) / (t + 1) for m, t in zip(matches[1:], totals[1:], strict=True)]
    elif method == "method3":
        for k, n in enumerate(zeros, 1):
            precisions[n] = 1 / (2**k * totals[n])
    if method in ("method4", "method7") and length > 1:  # of one word, nltk leaves the zeros, and then leaves them out
        for k, n in enumerate(zeros, 1):
            precisions[n] = math.log(length) / (2**k * K) / totals[n]
    if method in ("method5", "method7"):
        before = precisions[0] + 1
        for n in range(MAX_ORDER):
            before = precisions[n] = (before + precisions[n] + precisions[n + 1]) / 3
    elif method == "method6":
        if not matches[2]:
            raise ValueError("smoothing method6 needs a matching trigram, and there is none; take method1 or method4")
        for n in (2, 3):
            prior = precisions[n - 1] ** 2 / precisions[n - 2] if precisions[n - 2] else 0
            precisions[n] = (matches[n] + ALPHA * prior) / (max(0, length - n) + ALPHA)
    return precisions[:MAX_ORDER]


class BleuScore(NamedTuple):
    score: float  # 0 to 100
    counts: tuple  # matching n-grams of orders 1 to 4, after add-k
    totals: tuple  # n-grams of the candidates, after add-k
    precisions: tuple  # 0 to 100, smoothed
    brevity_penalty: float
    candidate_length: int  # tokens
    reference_length: int  # tokens of the closest references


def corpus_bleu(references, candidates, tokenize="13a", smoothing="exp", smoothing_value=None, lowercase=False):
    """sacrebleu's corpus BLEU, 0 to 100.

    references: for each candidate a str, or a list of str. tokenize: 13a, intl, char or none. smoothing: exp, floor (value 0.1
    where not given), add-k (1) or none. Raises ValueError where the lists do not fit together."""
    statistics = bleu_statistics(references, candidates, tokenize, lowercase)
    return bleu_score(statistics.sum(0), smoothing, smoothing_value).score


def segment_bleu(reference, candidate, tokenize="13a", smoothing="exp", smoothing_value=None, lowercase=False,
                 effective_order=True):  # fmt: skip
    """sacrebleu's BLEU of one answer, 0 to 100. effective_order: leave out the orders that the answer is too short for."""
    row = segment_statistics(as_list(reference), candidate, tokenize, lowercase)
    return bleu_score(row, smoothing, smoothing_value, effective_order).score


def bleu_statistics(references, candidates, tokenize="13a", lowercase=False):
    """What BLEU needs of each answer: int64 (answers, 10), tokens of the candidate and of its closest reference, four counts of
    matching n-grams, four of n-grams of the candidate."""
    check_pairs(references, candidates)
    if any(not isinstance(r, str) and len(r) != 1 for r in references):
        rows = [segment_statistics(as_list(r), c, tokenize, lowercase)
                for r, c in zip(references, candidates, strict=True)]  # fmt: skip
        return np.array(rows, np.int64)
    ours = [tokens(text, tokenize, lowercase) for text in candidates]
    theirs = [tokens(as_list(text)[0], tokenize, lowercase) for text in references]
    lengths = np.array([[len(c), len(r)] for c, r in zip(ours, theirs, strict=True)])
    totals = np.maximum(lengths[:, :1] - np.arange(MAX_ORDER), 0)
    return np.concatenate([lengths, overlaps(theirs, ours, MAX_ORDER), totals], axis=1)


def segment_statistics(references, candidate, tokenize, lowercase):
    """One row of `bleu_statistics`, against any number of references."""
    ours, theirs = tokens(candidate, tokenize, lowercase), [tokens(text, tokenize, lowercase) for text in references]
    totals = [max(len(ours) - n, 0) for n in range(MAX_ORDER)]
    closest = closest_length(len(ours), map(len, theirs))
    return [len(ours), closest, *matches_in_any(theirs, ours, MAX_ORDER), *totals]


def bleu_score(statistics, smoothing="exp", smoothing_value=None, effective_order=False):
    """BLEU of one row, or of a sum of rows, of `bleu_statistics`. Returns a BleuScore."""
    if smoothing not in SMOOTHING_VALUES:
        raise ValueError(f"smoothing is {smoothing!r}, expected one of {', '.join(SMOOTHING_VALUES)}")
    added = SMOOTHING_VALUES[smoothing] if smoothing_value is None else smoothing_value
    ours, theirs, *rest = statistics.tolist() if isinstance(statistics, np.ndarray) else statistics
    counts, totals, precisions = rest[:MAX_ORDER], rest[MAX_ORDER:], [0.0] * MAX_ORDER
    penalty = 1.0 if ours >= theirs else math.exp(1 - theirs / ours) if ours else 0.0
    if not any(counts):
        return BleuScore(0.0, tuple(counts), tuple(totals), tuple(precisions), penalty, ours, theirs)
    if smoothing == "add-k":
        counts[1:], totals[1:] = [c + added for c in counts[1:]], [t + added for t in totals[1:]]
    orders, halvings = MAX_ORDER, 1
    for n in range(MAX_ORDER):
        if not totals[n]:
            break
        orders = n + 1 if effective_order else orders
        if counts[n]:
            precisions[n] = 100.0 * counts[n] / totals[n]
        elif smoothing == "exp":
            halvings *= 2
            precisions[n] = 100.0 / (halvings * totals[n])
        elif smoothing == "floor":
            precisions[n] = 100.0 * added / totals[n]
    # sacrebleu's logarithm of zero is -9999999999, so that the score is zero
    logs = [math.log(p) if p else -9999999999 for p in precisions[:orders]]
    score = penalty * math.exp(sum(logs) / orders)
    return BleuScore(score, tuple(counts), tuple(totals), tuple(precisions), penalty, ours, theirs)


def bleu_signature(references, tokenize="13a", smoothing="exp", smoothing_value=None, lowercase=False,
                   effective_order=False):  # fmt: skip
    """How a score was made, in sacrebleu's words: nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0+minitune."""
    value = SMOOTHING_VALUES[smoothing] if smoothing_value is None else smoothing_value
    shown = smoothing + (f"[{value:.2f}]" if SMOOTHING_VALUES[smoothing] is not None else "")
    case, effective = "lc" if lowercase else "mixed", "yes" if effective_order else "no"
    number = number_of_references(references)
    return f"nrefs:{number}|case:{case}|eff:{effective}|tok:{tokenize}|smooth:{shown}|version:{SACREBLEU}"


# tokenisers


def tokens(text, tokenize="13a", lowercase=False):
    """The tokens that sacrebleu's tokeniser of this name makes of a text: a list of str."""
    if tokenize not in TOKENIZERS:
        raise ValueError(f"tokenize is {tokenize!r}, expected one of {', '.join(TOKENIZERS)}")
    text = text.lower() if lowercase else text
    return TOKENIZERS[tokenize](text.rstrip())


def tokens_13a(text):
    """mteval-v13a's. Its rules never look past white space, so that a word's tokens are worked out once and kept."""
    text = text.replace("<skipped>", "").replace("-\n", "")
    if "&" in text:
        text = text.replace("&quot;", '"').replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">")
    return list(itertools.chain.from_iterable(map(tokens_of_word, text.split())))


@functools.lru_cache(maxsize=2**18)
def tokens_of_word(word):
    word = re.sub(r"([!-&(-+/:-@\[-`{-~])", r" \1 ", f" {word} ")  # ASCII symbols but ' , - .
    word = re.sub(r"([^0-9])([.,])", r"\1 \2 ", word)  # a point or comma, unless a digit stands before it
    word = re.sub(r"([.,])([^0-9])", r" \1 \2", word)  # or behind it
    word = re.sub(r"([0-9])(-)", r"\1 \2 ", word)  # a dash behind a digit
    return tuple(word.split())


@functools.cache
def intl_rules():
    import regex  # re has no Unicode classes, and unicodedata is of Python's Unicode version, not of sacrebleu's

    return [
        (regex.compile(r"(\P{N})(\p{P})"), r"\1 \2 "),
        (regex.compile(r"(\p{P})(\P{N})"), r" \1 \2"),
        (regex.compile(r"(\p{S})"), r" \1 "),
    ]


def tokens_intl(text):
    """mteval-v14's international: every punctuation mark and symbol of Unicode is a token, but for a mark between digits."""
    for pattern, replacement in intl_rules():
        text = pattern.sub(replacement, text)
    return text.split()


TOKENIZERS = {
    "13a": tokens_13a,
    "intl": tokens_intl,
    "char": lambda text: list("".join(text.split())),
    "none": str.split,
}


# several references


def closest_length(length, lengths):
    return min(lengths, key=lambda other: (abs(other - length), other))


def matches_in_any(references, candidate, max_order):
    """Matching n-grams a candidate has in the union of its references, orders 1 .. max_order. All are lists of words."""
    if len(references) == 1:
        return overlap(references[0], candidate, max_order)
    found = []
    for order in range(1, max_order + 1):
        ours, theirs = ngrams(candidate, order), ngrams(references[0], order)
        for reference in references[1:]:
            theirs |= ngrams(reference, order)
        found.append(sum(min(ours[gram], theirs[gram]) for gram in ours.keys() & theirs.keys()))
    return found
