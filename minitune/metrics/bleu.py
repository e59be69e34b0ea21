"""BLEU (Papineni et al. 2002) as in nltk and as in sacrebleu, without these libraries.

sentence_bleu() equals nltk's sentence BLEU, 0 to 1, on str.split tokens, with the smoothing methods of Chen and Cherry (WMT
2014); the study averages it over answers. corpus_bleu() and segment_bleu() equal sacrebleu's, 0 to 100, with its tokenisers
(bleu_tokens.py). The rows of bleu_statistics() can be summed over any selection of answers, so the bootstrap needs no texts."""

import math
import sys
from typing import NamedTuple

import numpy as np

from minitune.metrics.bleu_tokens import signature_of, tokens
from minitune.metrics.ngrams import ngrams, overlap, overlaps
from minitune.metrics.pairs import as_list, check_pairs, number_of_references

MAX_ORDER = 4  # default order of the longest n-grams
HIGHEST_ORDER = 20
SACREBLEU = "2.6.0+minitune"  # version in signatures: the sacrebleu release with the same numbers, and the program
SMOOTHING_VALUES = {"exp": None, "floor": 0.1, "add-k": 1, "none": None}
SMOOTHING_METHODS = tuple(f"method{k}" for k in range(8))
EPSILON, ALPHA, K = 0.1, 5, 5  # nltk's constants of methods 1, 6 and 4


def sentence_bleu(reference, candidate, smoothing="method1", weights=None, tokenize=None):
    """nltk's sentence BLEU of two texts, split at white space. Returns 0 to 1; methods 5 and 7 can exceed 1, as in nltk.

    reference: str, or a list of str; an n-gram may match any of them. smoothing: method0 (none) to method7. weights: weights of
    the n-grams of orders 1, 2, ...; None: four times 0.25. tokenize: name of a tokeniser of corpus_bleu(); None: str.split.
    Raises ValueError on bad options, and with method6 if no trigram matches, where it is not defined."""
    if smoothing not in SMOOTHING_METHODS:
        raise ValueError(f"smoothing is {smoothing!r}, expected one of {', '.join(SMOOTHING_METHODS)}")
    weights = check_weights(MAX_ORDER, weights)
    split = str.split if tokenize is None else lambda text: tokens(text, tokenize)
    references, words = [split(text) for text in as_list(reference)], split(candidate)
    return sentence_score(sentence_statistics(references, words, len(weights), smoothing), weights, smoothing)


def sentence_statistics(references, words, orders, smoothing="method1"):
    """[words of the candidate, words of the closest reference, matching n-grams of each order ...]. Texts are lists of words.

    orders: order of the longest n-grams; methods 5 and 7 need order 5 too."""
    matches = matches_in_any(references, words, max(orders, 5) if smoothing in ("method5", "method7") else orders)
    return [len(words), closest_length(len(words), map(len, references)), *matches]


def sentence_score(statistics, weights, smoothing="method1"):
    """Sentence BLEU, 0 to 1, from sentence_statistics()."""
    length, closest, *matches = statistics
    if not matches[0]:
        return 0.0
    totals = [max(1, length - n) for n in range(len(matches))]
    precisions = smooth(matches, totals, length, smoothing, len(weights))
    penalty = 1.0 if length > closest else math.exp(1 - closest / length)
    return penalty * math.exp(math.fsum(w * math.log(p) for w, p in zip(weights, precisions, strict=True) if p > 0))


def check_weights(orders, weights):
    """The weights of the n-grams of each order, a list of floats: `weights`, or 1 / orders each if it is None.

    Raises ValueError if there are none or too many, or one is not a number from 0 to 1."""
    if weights is None:
        weights = [1 / orders] * orders if isinstance(orders, int) and 1 <= orders <= HIGHEST_ORDER else []
    if not 1 <= len(weights) <= HIGHEST_ORDER:
        raise ValueError(
            f"BLEU with n-grams of {len(weights) or orders} orders is not possible, expected 1 to {HIGHEST_ORDER} orders"
        )
    if not all(isinstance(w, (int, float)) and 0 <= w <= 1 for w in weights) or not any(weights):
        raise ValueError(f"the weights of BLEU are {list(weights)}, expected numbers from 0 to 1, such as 0.5 0.5")
    return [float(w) for w in weights]


def smooth(matches, totals, length, method, orders=MAX_ORDER):
    """Smoothed precisions of orders 1 to `orders`, a list.

    matches, totals: matching n-grams and n-grams of the candidate, by order. length: words of the candidate."""
    precisions = [m / t for m, t in zip(matches, totals, strict=True)]
    zeros = [n for n in range(orders) if not matches[n]]
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
    if method in ("method4", "method7") and length > 1:  # for one word nltk keeps the zeros, and later skips them
        for k, n in enumerate(zeros, 1):
            precisions[n] = math.log(length) / (2**k * K) / totals[n]
    if method in ("method5", "method7"):
        after = [*precisions[1:orders], matches[4] / totals[4]]  # after the last order comes order 5, as in nltk
        before = precisions[0] + 1
        for n in range(orders):
            before = precisions[n] = (before + precisions[n] + after[n]) / 3
    elif method == "method6":
        if len(matches) < 3 or not matches[2]:
            raise ValueError("smoothing method6 needs a matching trigram, and there is none; use method1 or method4")
        for n in range(2, orders):
            prior = precisions[n - 1] ** 2 / precisions[n - 2] if precisions[n - 2] else 0
            precisions[n] = (matches[n] + ALPHA * prior) / (max(0, length - n) + ALPHA)
    return precisions[:orders]


class BleuScore(NamedTuple):
    """A sacrebleu score with its parts."""

    score: float  # 0 to 100
    counts: tuple  # matching n-grams of orders 1, 2, ..., after add-k smoothing
    totals: tuple  # n-grams of the candidates, after add-k smoothing
    precisions: tuple  # 0 to 100, smoothed
    brevity_penalty: float
    candidate_length: int  # tokens
    reference_length: int  # tokens of the closest references


def corpus_bleu(references, candidates, tokenize="13a", smoothing="exp", smoothing_value=None, lowercase=False,
                max_order=MAX_ORDER, weights=None):  # fmt: skip
    """sacrebleu's corpus BLEU, 0 to 100.

    references: for each candidate a str, or a list of str. tokenize: a name in bleu_tokens.TOKENIZERS. smoothing: exp, floor
    (default value 0.1), add-k (default value 1) or none. max_order: longest n-grams, sacrebleu's max_ngram_order. weights:
    weights of orders 1, 2, ..., in place of max_order (not in sacrebleu). Raises ValueError if the lists do not fit together."""
    orders = len(check_weights(max_order, weights))
    statistics = bleu_statistics(references, candidates, tokenize, lowercase, orders)
    return bleu_score(statistics.sum(0), smoothing, smoothing_value, weights=weights).score


def segment_bleu(reference, candidate, tokenize="13a", smoothing="exp", smoothing_value=None, lowercase=False,
                 effective_order=True, max_order=MAX_ORDER, weights=None):  # fmt: skip
    """sacrebleu's BLEU of one answer, 0 to 100. effective_order: leave out orders for which the answer is too short. Other
    arguments as in corpus_bleu()."""
    orders = len(check_weights(max_order, weights))
    row = segment_statistics(as_list(reference), candidate, tokenize, lowercase, orders)
    return bleu_score(row, smoothing, smoothing_value, effective_order, weights).score


def bleu_statistics(references, candidates, tokenize="13a", lowercase=False, max_order=MAX_ORDER):
    """The counts from which BLEU is computed: int64 (answers, 2 + 2 * max_order).

    The columns are: tokens of the candidate, tokens of its closest reference, matching n-grams of each order, n-grams of the
    candidate of each order."""
    check_pairs(references, candidates)
    check_weights(max_order, None)
    if any(not isinstance(r, str) and len(r) != 1 for r in references):
        rows = [segment_statistics(as_list(r), c, tokenize, lowercase, max_order)
                for r, c in zip(references, candidates, strict=True)]  # fmt: skip
        return np.array(rows, np.int64)
    ours = [tokens(text, tokenize, lowercase) for text in candidates]
    theirs = [tokens(as_list(text)[0], tokenize, lowercase) for text in references]
    lengths = np.array([[len(c), len(r)] for c, r in zip(ours, theirs, strict=True)])
    totals = np.maximum(lengths[:, :1] - np.arange(max_order), 0)
    return np.concatenate([lengths, overlaps(theirs, ours, max_order), totals], axis=1)


def segment_statistics(references, candidate, tokenize, lowercase, max_order=MAX_ORDER):
    """One row of bleu_statistics(), as a list, for any number of references."""
    ours, theirs = tokens(candidate, tokenize, lowercase), [tokens(text, tokenize, lowercase) for text in references]
    totals = [max(len(ours) - n, 0) for n in range(max_order)]
    closest = closest_length(len(ours), map(len, theirs))
    return [len(ours), closest, *matches_in_any(theirs, ours, max_order), *totals]


def bleu_score(statistics, smoothing="exp", smoothing_value=None, effective_order=False, weights=None):
    """The BleuScore of a row, or of a sum of rows, of bleu_statistics(). weights: weights of the orders; None: equal ones."""
    if smoothing not in SMOOTHING_VALUES:
        raise ValueError(f"smoothing is {smoothing!r}, expected one of {', '.join(SMOOTHING_VALUES)}")
    added = SMOOTHING_VALUES[smoothing] if smoothing_value is None else smoothing_value
    ours, theirs, *rest = statistics.tolist() if isinstance(statistics, np.ndarray) else statistics
    max_order = len(rest) // 2
    counts, totals, precisions = rest[:max_order], rest[max_order:], [0.0] * max_order
    penalty = 1.0 if ours >= theirs else math.exp(1 - theirs / ours) if ours else 0.0
    if not any(counts):
        return BleuScore(0.0, tuple(counts), tuple(totals), tuple(precisions), penalty, ours, theirs)
    if smoothing == "add-k":
        counts[1:], totals[1:] = [c + added for c in counts[1:]], [t + added for t in totals[1:]]
    orders, halvings = max_order, 1
    for n in range(max_order):
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
    # sacrebleu uses -9999999999 as the logarithm of zero, so that the score becomes zero.
    logs = [math.log(p) if p else -9999999999 for p in precisions[:orders]]
    if weights is None:
        mean = sum(logs) / orders
    else:
        used = check_weights(max_order, weights)[:orders]
        share = 1 if orders == max_order else sum(used) or 1  # sum of the remaining weights, if orders are left out
        mean = sum(w * log for w, log in zip(used, logs, strict=True)) / share
    score = penalty * math.exp(mean)
    return BleuScore(score, tuple(counts), tuple(totals), tuple(precisions), penalty, ours, theirs)


def bleu_signature(references, tokenize="13a", smoothing="exp", smoothing_value=None, lowercase=False,
                   effective_order=False, max_order=MAX_ORDER, weights=None):  # fmt: skip
    """sacrebleu's signature of a score: nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0+minitune.

    A max_order or weights other than the defaults are added, as order:2 or weights:0.7,0.3; sacrebleu leaves them out."""
    value = SMOOTHING_VALUES[smoothing] if smoothing_value is None else smoothing_value
    shown = smoothing + (f"[{value:.2f}]" if SMOOTHING_VALUES[smoothing] is not None else "")
    case, effective = "lc" if lowercase else "mixed", "yes" if effective_order else "no"
    number = number_of_references(references)
    other = f"|order:{max_order}" if weights is None and max_order != MAX_ORDER else ""
    other += "|weights:" + ",".join(f"{w:g}" for w in weights) if weights is not None else ""
    tok = signature_of(tokenize)
    return f"nrefs:{number}|case:{case}|eff:{effective}|tok:{tok}|smooth:{shown}{other}|version:{SACREBLEU}"


# several references


def closest_length(length, lengths):
    """The number in `lengths` that is closest to `length`; the smaller one of two."""
    return min(lengths, key=lambda other: (abs(other - length), other))


def matches_in_any(references, candidate, max_order):
    """Number of the candidate's n-grams that match any reference, a list for orders 1 to max_order. Texts are lists of words."""
    if len(references) == 1:
        return overlap(references[0], candidate, max_order)
    found = []
    for order in range(1, max_order + 1):
        ours, theirs = ngrams(candidate, order), ngrams(references[0], order)
        for reference in references[1:]:
            theirs |= ngrams(reference, order)
        found.append(sum(min(ours[gram], theirs[gram]) for gram in ours.keys() & theirs.keys()))
    return found
