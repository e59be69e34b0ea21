"""ROUGE-N, ROUGE-L and ROUGE-Lsum (Lin 2004), with rouge_score's numbers: (precision, recall, fmeasure), each 0 to 1.

Words are runs of a-z and 0-9 after lowercasing, so text in another script has no words and scores 0. With tokenize="characters"
every character except white space is a word. Of several references (a list of str) the one with the best fmeasure counts, as in
rouge_score's score_multi. The longest common subsequence uses bit vectors (Hyyro 2004): a row of the table is one integer, and
the next row needs one addition."""

import functools
import itertools
import re
from collections import Counter

from minitune.metrics.ngrams import ngrams
from minitune.metrics.pairs import as_list
from minitune.screen import short

TOKENIZERS = ("words", "characters")


def rouge_n(reference, candidate, n, use_stemmer=True, tokenize="words"):
    """ROUGE-N of two texts: shared n-grams of words, n from 1 up. Returns (precision, recall, fmeasure).

    use_stemmer, tokenize: as in words()."""
    if n < 1:
        raise ValueError(f"n is {n}, expected 1 or more")
    ours = ngrams(words(candidate, use_stemmer, tokenize), n)

    def against(text):
        theirs = ngrams(words(text, use_stemmer, tokenize), n)
        shared = sum(min(ours[gram], theirs[gram]) for gram in ours.keys() & theirs.keys())
        return scores(shared, sum(ours.values()), sum(theirs.values()))

    return best(against, reference)


def rouge_l(reference, candidate, use_stemmer=True, tokenize="words"):
    """ROUGE-L of two texts: longest common subsequence of words. Returns (precision, recall, fmeasure).

    use_stemmer, tokenize: as in words()."""
    ours = words(candidate, use_stemmer, tokenize)

    def against(text):
        theirs = words(text, use_stemmer, tokenize)
        return scores(lcs_length(theirs, ours), len(ours), len(theirs))

    return best(against, reference)


def rouge_lsum(reference, candidate, use_stemmer=True, tokenize="words"):
    """ROUGE-L of summaries with one sentence per line: each line of the reference is compared with all lines of the candidate.

    Returns (precision, recall, fmeasure). A word counts at most as often as it occurs in either text. use_stemmer, tokenize: as
    in words()."""
    lines = lambda text: [words(line, use_stemmer, tokenize) for line in text.split("\n") if line]
    ours = lines(candidate)
    return best(lambda text: summary_scores(lines(text), ours), reference)


def summary_scores(theirs, ours):
    """(precision, recall, fmeasure) of ROUGE-Lsum. theirs, ours: lines of reference and candidate, each a list of words."""
    left_ours, left_theirs = (Counter(itertools.chain.from_iterable(lines)) for lines in (ours, theirs))
    hits = 0
    for line in theirs:
        union = set().union(*(lcs_places(line, other) for other in ours))
        for place in sorted(union):
            word = line[place]
            if left_ours[word] > 0 and left_theirs[word] > 0:
                hits += 1
                left_ours[word] -= 1
                left_theirs[word] -= 1
    return scores(hits, sum(map(len, ours)), sum(map(len, theirs)))


def best(against, reference):
    """against(reference), or for a list the result with the highest fmeasure; the first one of equal results."""
    return max(map(against, as_list(reference)), key=lambda found: found[2])


def scores(shared, ours, theirs):
    precision, recall = shared / max(ours, 1), shared / max(theirs, 1)
    return precision, recall, 2 * precision * recall / (precision + recall) if shared else 0.0


# words


def words(text, use_stemmer=True, tokenize="words"):
    """The words of a text for ROUGE, a list of str.

    use_stemmer: replace words longer than three letters by their Porter stem. tokenize: "words", or "characters" for each
    character except white space, in lowercase."""
    if tokenize == "characters":
        return list("".join(text.lower().split()))
    if tokenize != "words":
        raise ValueError(f"tokenize is {short(tokenize)}, expected one of {', '.join(TOKENIZERS)}")
    return list(itertools.chain.from_iterable(map(words_of_piece, text.lower().split(), itertools.repeat(use_stemmer))))


@functools.lru_cache(maxsize=2**18)
def words_of_piece(piece, use_stemmer):
    found = re.findall(r"[a-z0-9]+", piece)
    if use_stemmer:
        found = [stemmer().stem(word) if len(word) > 3 else word for word in found]
    return tuple(filter(None, found))


@functools.cache
def stemmer():
    from nltk.stem.porter import PorterStemmer  # importing nltk takes about a second

    return PorterStemmer()


# longest common subsequences


def lcs_rows(reference, candidate):
    """Yields, for each word of the reference, a row of the table of lengths as one integer. Bit j is 0 if the length increases
    from column j to j + 1. Bits from len(candidate) on are to be ignored."""
    places = {}
    for j, word in enumerate(candidate):
        places[word] = places.get(word, 0) | 1 << j
    full = (1 << len(candidate)) - 1
    row = full
    for word in reference:
        if here := places.get(word):
            shared = row & here
            row = (row + shared | row - shared) & full
        yield row


def lcs_length(reference, candidate):
    """Length of the longest common subsequence of two lists of words."""
    row = (1 << len(candidate)) - 1
    for row in lcs_rows(reference, candidate):  # noqa: B007  the last one
        pass
    return len(candidate) - row.bit_count()


def lcs_places(reference, candidate):
    """Indices of the words of the reference in one longest common subsequence, the one that rouge_score finds: it goes back from
    the end of the table."""
    length = lambda i, j: j - (rows[i] & (1 << j) - 1).bit_count()  # LCS of the first i and the first j words
    rows = [(1 << len(candidate)) - 1, *lcs_rows(reference, candidate)]
    i, j, found = len(reference), len(candidate), []
    while i and j:
        if reference[i - 1] == candidate[j - 1]:
            i, j = i - 1, j - 1
            found.append(i)
        elif length(i, j - 1) > length(i - 1, j):
            j -= 1
        else:
            i -= 1
    return found
