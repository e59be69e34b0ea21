"""Clipped n-gram matches of pairs of sequences, the counts of BLEU, ROUGE-N and chrF. No score is computed here.

A sequence is a str (n-grams of characters) or a list of str (n-grams of words). overlap() is the definition. overlaps() gives
the same integers for many pairs, about ten times as fast: it numbers the elements, packs the number of a pair and an n-gram of
the highest order into one 64-bit integer, and sorts these integers. One sort serves all orders, because an n-gram of a lower
order is a prefix."""

import itertools
from collections import Counter, defaultdict

import numpy as np

CHUNK = 256  # pairs that are packed at once: about 2 MB of 64-bit integers for answers of 60 words


def ngrams(sequence, order):
    """Counter of the n-grams of one order; the keys are str for a str, and tuples for a list."""
    if isinstance(sequence, str):
        return Counter(sequence[i : i + order] for i in range(len(sequence) - order + 1))
    return Counter(zip(*(sequence[k:] for k in range(order)), strict=False))


def overlap(reference, candidate, max_order):
    """Number of the candidate's n-grams that are in the reference, each counted at most as often as there. A list for orders 1 to
    max_order."""
    found = []
    for order in range(1, max_order + 1):
        ours, theirs = ngrams(candidate, order), ngrams(reference, order)
        found.append(sum(min(ours[gram], theirs[gram]) for gram in ours.keys() & theirs.keys()))
    return found


def overlaps(references, candidates, max_order):
    """overlap() of many pairs: int64 (pairs, max_order)."""
    found = np.zeros((len(candidates), max_order), np.int64)
    for start in range(0, len(candidates), CHUNK):
        part = slice(start, start + CHUNK)
        fill(found[part], references[part], candidates[part])
    return found


def fill(found, references, candidates):
    """Write the matches of some pairs into `found`, (pairs, max_order). If a packed n-gram would exceed 64 bits, the pairs are
    processed in halves, and a single pair by overlap()."""
    pairs, max_order = found.shape
    sequences = [*candidates, *references]
    codes, highest = number(sequences)
    bits = int(highest).bit_length()
    if (pairs - 1).bit_length() + max_order * bits + 1 <= 64:
        found[:] = packed_overlaps(codes, [len(s) for s in sequences], pairs, max_order, bits)
    elif pairs > 1:
        half = pairs // 2
        fill(found[:half], references[:half], candidates[:half])
        fill(found[half:], references[half:], candidates[half:])
    else:
        found[0] = overlap(references[0], candidates[0], max_order)


def number(sequences):
    """(the elements of all sequences, concatenated, as numbers from 1 up: uint64 (elements,); the highest number)."""
    if sequences and isinstance(sequences[0], str):
        points = np.frombuffer("".join(sequences).encode("utf-32-le", "surrogatepass"), np.uint32)
        if not len(points):
            return points.astype(np.uint64), 0
        present = np.zeros(points.max() + 1, bool)
        present[points] = True
        numbers = np.cumsum(present, dtype=np.uint64)
        return numbers[points], numbers[-1]
    numbers = defaultdict(itertools.count(1).__next__)
    codes = [numbers[word] for sequence in sequences for word in sequence]
    return np.array(codes, np.uint64), len(numbers)


def packed_overlaps(codes, lengths, pairs, max_order, bits):
    """The matches of some pairs: int64 (pairs, max_order).

    codes: the numbers of the elements of all candidates, then of all references. lengths: elements of each sequence. bits: bits
    of one element. A packed integer holds, from the highest bit down: the number of the pair, max_order elements (0 after the end
    of a sequence), and one bit that is 1 for a candidate."""
    found = np.zeros((pairs, max_order), np.int64)
    if not len(codes):
        return found
    owner = np.repeat(np.arange(2 * pairs), lengths)
    place = np.arange(len(codes)) + owner * (max_order - 1)  # leaves max_order - 1 zeros after each sequence
    spread = np.zeros(len(codes) + 2 * pairs * (max_order - 1), np.uint64)
    spread[place] = codes
    words = (owner % pairs).astype(np.uint64)
    for k in range(max_order):
        words = words << np.uint64(bits) | spread[place + k]
    words = words << np.uint64(1) | (owner < pairs).astype(np.uint64)
    words.sort()
    is_candidate = (words & np.uint64(1)).astype(np.int64)
    for order in range(1, max_order + 1):
        grams = words >> np.uint64(1 + bits * (max_order - order))
        whole = grams & np.uint64((1 << bits) - 1) != 0  # the last element is not 0, so the n-gram is complete
        grams, ours = grams[whole], is_candidate[whole]
        if not len(grams):
            break
        starts = np.flatnonzero(np.concatenate(([True], grams[1:] != grams[:-1])))
        of_candidate = np.add.reduceat(ours, starts)
        of_reference = np.diff(starts, append=len(grams)) - of_candidate
        pair = (grams[starts] >> np.uint64(bits * order)).astype(np.int64)
        found[:, order - 1] = np.bincount(pair, np.minimum(of_candidate, of_reference), pairs)
    return found
