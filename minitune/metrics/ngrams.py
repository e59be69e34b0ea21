"""Clipped n-gram matches of pairs of sequences: what BLEU, ROUGE-N and chrF count. No score is made here.

A sequence is a str (its n-grams are of characters) or a list of str (of words). `overlap` is the definition; `overlaps`
gives the same integers for many pairs, about ten times as fast: it numbers the elements, packs an n-gram of the
highest order into one 64-bit word behind the number of its pair, and sorts these words once for all orders, because an
n-gram of a lower order is a prefix."""

import itertools
from collections import Counter, defaultdict

import numpy as np

CHUNK = 256  # pairs that are packed at once: about 2 MB of words for answers of 60 words


def ngrams(sequence, order):
    """Counter of the n-grams of one order: str for a str, tuples for a list."""
    if isinstance(sequence, str):
        return Counter(sequence[i : i + order] for i in range(len(sequence) - order + 1))
    return Counter(zip(*(sequence[k:] for k in range(order)), strict=False))


def overlap(reference, candidate, max_order):
    """How many n-grams of a candidate are in its reference, each no more often than there: a list over orders 1 .. max_order."""
    found = []
    for order in range(1, max_order + 1):
        ours, theirs = ngrams(candidate, order), ngrams(reference, order)
        found.append(sum(min(ours[gram], theirs[gram]) for gram in ours.keys() & theirs.keys()))
    return found


def overlaps(references, candidates, max_order):
    """`overlap` of many pairs. Returns int64 (pairs, max_order)."""
    found = np.zeros((len(candidates), max_order), np.int64)
    for start in range(0, len(candidates), CHUNK):
        part = slice(start, start + CHUNK)
        fill(found[part], references[part], candidates[part])
    return found


def fill(found, references, candidates):
    """Writes the matches of some pairs into found: packed, or in halves where the words would be too long."""
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
    """The elements of all sequences, one after another, as numbers from 1 up: uint64 (elements,), and the highest."""
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
    """The sequences are those of the candidates, then of the references. A word holds, from the highest bit down: pair, max_order
    elements of `bits` each (0 behind the end of a sequence), and 1 bit that says candidate."""
    found = np.zeros((pairs, max_order), np.int64)
    if not len(codes):
        return found
    owner = np.repeat(np.arange(2 * pairs), lengths)
    place = np.arange(len(codes)) + owner * (max_order - 1)  # leaves max_order - 1 zeros behind each sequence
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
        whole = grams & np.uint64((1 << bits) - 1) != 0  # its last element is not behind the end
        grams, ours = grams[whole], is_candidate[whole]
        if not len(grams):
            break
        starts = np.flatnonzero(np.concatenate(([True], grams[1:] != grams[:-1])))
        of_candidate = np.add.reduceat(ours, starts)
        of_reference = np.diff(starts, append=len(grams)) - of_candidate
        pair = (grams[starts] >> np.uint64(bits * order)).astype(np.int64)
        found[:, order - 1] = np.bincount(pair, np.minimum(of_candidate, of_reference), pairs)
    return found
