"""Intervals of a score and tests of the difference between two systems, by resampling the examples.

All functions take rows: one value for each example (the score is their mean), or the counts that a corpus metric sums, such as
rows of bleu_statistics() (the score is a function of the sum). A resampled corpus is then a matrix product, and no text is read
again. Only the choice of examples is random here, not decoding or training."""

from typing import NamedTuple

import numpy as np
from scipy.special import ndtr, ndtri
from scipy.stats import t as student

FEW = 10  # with fewer examples an interval has a warning
BLOCK = 2**21  # drawn examples in memory at once


class Interval(NamedTuple):
    """A score with its interval over n examples."""

    value: float
    low: float | None  # None if all examples are equal, or there is only one; `note` says which
    high: float | None
    n: int
    note: str


class Comparison(NamedTuple):
    """The difference between the scores of two systems over n examples."""

    difference: float  # score of a minus score of b
    low: float | None
    high: float | None
    p_value: float  # two-sided test of no difference
    n: int
    note: str


def bootstrap_interval(rows, score=None, of_rows=False, level=0.95, resamples=5000, seed=0, method="bca", widen=True):
    """The bootstrap Interval of a score over examples.

    rows: (n,), or (n, k) with `score`. score: function from the sum of the rows, a float or (k,), to a float; None: the mean.
    of_rows: `score` gets the drawn rows, (n,) or (n, k), instead of their sum, so it can be any function. level: of the interval.
    method: bca (bias-corrected and accelerated, Efron 1987) or percentile. widen: use the quantiles of Student's distribution
    with n - 1 degrees of freedom, times sqrt(n / (n - 1)), instead of the normal ones (Hesterberg 2015, section 4.1). Without it,
    as in scipy, a 95 % interval of 27 examples holds the true value only 92-94 % of the time.
    Raises ValueError on an empty list, and on a value that is not finite, with its row."""
    rows = checked(rows, "rows")
    value, replicates, left_out = resample(rows, score, of_rows, resamples, seed)
    return Interval(value, *limits(value, replicates, left_out, len(rows), level, method, widen))


def paired_bootstrap(rows_a, rows_b, score=None, level=0.95, resamples=5000, seed=0, method="bca", widen=True):
    """The Comparison of two systems on the same examples: the interval of score(a) - score(b), and a two-sided p-value.

    The p-value is the share of draws whose difference is at least as far from the measured one, to either side, as that one is
    from zero (Koehn 2004, two-sided). rows_a, rows_b, score and the options: as in bootstrap_interval().

    sacrebleu's paired bootstrap computes another number. It takes the absolute value of each drawn difference, subtracts their
    mean over all draws, and counts the draws above the absolute measured difference. If all drawn differences have the same sign,
    this is the upper side of our test; otherwise there is no simple relation. sacrebleu's permutation test is the same as
    ours."""
    both, difference_of = side_by_side(rows_a, rows_b, score)
    difference, replicates, left_out = resample(both, difference_of, False, resamples, seed)
    extreme = np.abs(replicates - difference) >= abs(difference) - rounding(replicates, difference)
    low, high, n, note = limits(difference, replicates, left_out, len(both), level, method, widen)
    p_value = (int(extreme.sum()) + 1) / (len(replicates) + 1) if n > 1 else 1.0
    if low is None and n > 1 and difference:
        p_value = None  # the difference is the same in every example, so resampling shows no variation
    return Comparison(difference, low, high, p_value, n, note)


def paired_permutation(rows_a, rows_b, score=None, resamples=9999, seed=0):
    """The Comparison, without an interval, of two systems on the same examples by a permutation test.

    The p-value is the share of draws with a difference at least as large, where each draw swaps the two answers of each example
    at random. If there are at most `resamples` ways to swap, 2**n, all are tried, and the test is exact."""
    both, difference_of = side_by_side(rows_a, rows_b, score)
    n, width = both.shape
    turned = np.roll(both, width // 2, axis=1) - both  # change of the sums if an example is swapped
    total, difference = both.sum(0), float(difference_of(both.sum(0)))
    exact = 2**n <= resamples
    draws = 2**n if exact else resamples
    rng = np.random.default_rng(seed)
    found = []
    for start in range(0, draws, step := max(1, BLOCK // n)):
        size = min(step, draws - start)
        if exact:
            sides = np.arange(start, start + size)[:, None] >> np.arange(n) & 1
        else:
            sides = rng.integers(0, 2, (size, n))
        found += [difference_of(sums) for sums in total + sides @ turned]
    extreme = int((np.abs(found) >= abs(difference) - rounding(found, difference)).sum())
    p_value = extreme / draws if exact else (extreme + 1) / (draws + 1)
    note = "one example is too few for a test" if n == 1 else ""
    if not turned.any():
        note = "both systems have the same score in every example"
    return Comparison(difference, None, None, p_value, n, note)


def checked(rows, name):
    """`rows` as float64, (n,) or (n, k). Raises ValueError if there are none, or one is not finite."""
    rows = np.asarray(rows, np.float64)
    if rows.ndim not in (1, 2) or not rows.size:
        raise ValueError(
            f"{name} has the shape {rows.shape}, expected (examples,) or (examples, numbers) with at least one example"
        )
    if not np.isfinite(rows).all():
        row = int(np.argwhere(~np.isfinite(rows))[0][0])
        raise ValueError(f"{name}: row {row} is {rows[row]}, expected finite numbers")
    return rows


def side_by_side(rows_a, rows_b, score):
    """(rows of both systems in one array (n, 2k), function from their sum (2k,) to the difference of the scores)."""
    a, b = checked(rows_a, "rows_a"), checked(rows_b, "rows_b")
    if a.shape != b.shape:
        raise ValueError(f"rows_a has the shape {a.shape} and rows_b {b.shape}, expected the same examples in both")
    n, width = len(a), a[0].size
    both = np.concatenate([a.reshape(n, width), b.reshape(n, width)], axis=1)
    if score is None:
        if a.ndim != 1:
            raise ValueError(f"rows_a has the shape {a.shape}; give `score`, or one value for each example")
        return both, lambda sums: (sums[0] - sums[1]) / n
    part = lambda sums: sums[0] if a.ndim == 1 else sums
    return both, lambda sums: score(part(sums[:width])) - score(part(sums[width:]))


def rounding(found, value):
    """Tolerance for equal differences, since sums of floats depend on their order."""
    return 1e-12 * max(np.abs(found).max(initial=0), abs(value))


def resample(rows, score, of_rows, resamples, seed):
    """(score of all rows, scores of n rows drawn with replacement (resamples,), scores of all rows but one (n,))."""
    n = len(rows)
    if score is None:
        if rows.ndim != 1:
            raise ValueError(f"rows has the shape {rows.shape}; give `score`, or one value for each example")
        score = (lambda drawn: drawn.sum() / n) if of_rows else lambda total: total / n
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}, expected 1 or more")
    rng, replicates = np.random.default_rng(seed), []
    for start in range(0, resamples, step := max(1, BLOCK // n)):
        size = min(step, resamples - start)
        draws = rng.integers(0, n, (size, n))
        if of_rows:
            replicates += [score(rows[draw]) for draw in draws]
        else:
            places = (draws + n * np.arange(size)[:, None]).ravel()
            times = np.bincount(places, minlength=size * n).reshape(size, n).astype(np.float64)
            replicates += [score(sums) for sums in times @ rows]
    total = rows.sum(0)
    left_out = [score(np.delete(rows, i, 0) if of_rows else total - rows[i]) for i in range(n)] if n > 1 else []
    value = score(rows if of_rows else total)
    replicates, left_out = np.array(replicates, np.float64), np.array(left_out, np.float64)
    if undefined := int((~np.isfinite([value, *replicates, *left_out])).sum()):
        raise ValueError(
            f"the score is not finite for {undefined} choices of examples out of {1 + len(replicates) + len(left_out)}; "
            "give a `score` that is defined for every choice"
        )
    return float(value), replicates, left_out


def limits(value, replicates, left_out, n, level, method, widen):
    """(low, high, n, note) of an interval, from the results of resample()."""
    if not 0 < level < 1:
        raise ValueError(f"level is {level}, expected a share between 0 and 1, such as 0.95")
    if method not in ("bca", "percentile"):
        raise ValueError(f"method is {method!r}, expected bca or percentile")
    if n == 1:
        return None, None, n, "one example has no interval"
    if np.ptp(replicates) <= rounding(replicates, value):
        return None, None, n, "every example has the same score, so there is no interval"
    notes = [f"{n} examples are few: the interval may be too narrow"] if n < FEW else []
    tails = np.array([(1 - level) / 2, (1 + level) / 2])
    if widen:
        tails = ndtr(np.sqrt(n / (n - 1)) * student.ppf(tails, n - 1))
    if method == "bca":
        below = ((replicates < value).mean() + (replicates <= value).mean()) / 2
        if 0 < below < 1:
            pull = left_out.mean() - left_out
            spread = (pull**2).sum()
            acceleration = (pull**3).sum() / (6 * spread**1.5) if spread else 0.0
            bias = ndtri(below)
            moved = bias + ndtri(tails).clip(-8, 8)
            room = 1 - acceleration * moved  # if it is not positive, the limit is the lowest or highest drawn score
            tails = ndtr(np.where(room > 0, bias + moved / np.where(room > 0, room, 1), np.sign(moved) * np.inf))
        else:
            notes.append("the score is outside of the range of the drawn scores, so this is a percentile interval")
    low, high = np.quantile(replicates, tails)
    return float(low), float(high), n, "; ".join(notes)
