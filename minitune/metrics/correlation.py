"""Rank correlation of a metric with human grades: Spearman's rho and Kendall's tau-b, with intervals that also work for few
grades with ties."""

import itertools
import math
from typing import NamedTuple

import numpy as np
from scipy import stats

BOOTSTRAP_LIMIT = (
    1000  # most examples for the bootstrap; above, both intervals agree and Kendall's needs (n, n) numbers
)
EXACT_LIMIT = 8  # most examples for the exact p-value, which tries every order
FISHER_VARIANCE = {  # variance of atanh(value): Bonett and Wright 2000; Fieller, Hartley and Pearson 1957
    "spearman": lambda value, n: (1 + value**2 / 2) / (n - 3),
    "kendall": lambda value, n: 0.437 / (n - 4),
}


class Correlation(NamedTuple):
    """A rank correlation with its interval and p-value."""

    value: float | None  # -1 to 1; None if it is not defined, and `note` says why
    low: float | None
    high: float | None
    p_value: float | None  # two-sided, of no correlation
    n: int
    note: str


def correlate(metric, human, method="spearman", interval=None, level=0.95, resamples=5000, seed=0):
    """Rank correlation of a metric with human grades over the same n examples. Returns a Correlation.

    method: spearman or kendall (tau-b). interval: bootstrap (percentiles), fisher (normal distribution of atanh), or None for
    bootstrap up to 1000 examples and fisher above. level: of the interval. Raises ValueError on lists of different lengths and on
    NaN."""
    x, y = np.asarray(metric, np.float64), np.asarray(human, np.float64)
    if x.shape != y.shape or x.ndim != 1:
        raise ValueError(f"got {x.shape} metric values and {y.shape} grades, expected two lists of the same length")
    for name, values in (("metric", x), ("human", y)):
        if not np.isfinite(values).all():
            row = int(np.argmin(np.isfinite(values)))
            raise ValueError(f"{name}: row {row} is {values[row]}, expected finite numbers")
    if method not in FISHER_VARIANCE or interval not in (None, "bootstrap", "fisher"):
        raise ValueError(
            f"got method={method!r}, interval={interval!r}, expected spearman or kendall, bootstrap or fisher"
        )
    n = len(x)
    if n < 3:
        return Correlation(None, None, None, None, n, f"{n} examples are too few for a correlation; 3 are needed")
    constant = [name for name, values in (("the metric", x), ("the grade", y)) if np.ptp(values) == 0]
    if constant:
        return Correlation(None, None, None, None, n, f"{' and '.join(constant)} is the same in all {n} examples")
    found = (stats.spearmanr if method == "spearman" else stats.kendalltau)(x, y)
    value, p_value = float(found.statistic), float(found.pvalue)
    if n <= EXACT_LIMIT:
        p_value = exact_p_value(x, y, value, method)
    if interval is None:
        interval = "bootstrap" if n <= BOOTSTRAP_LIMIT else "fisher"
    between = bootstrap if interval == "bootstrap" else fisher
    low, high, note = between(x, y, value, method, level, resamples, seed)
    return Correlation(value, low, high, p_value, n, note)


def exact_p_value(x, y, value, method):
    """Two-sided p-value: the share of all orders of y that give a correlation at least as large. For few examples, where
    approximations fail."""
    orders = np.array(list(itertools.permutations(range(len(y)))))
    if method == "spearman":
        x, y = (stats.rankdata(v) - (len(v) + 1) / 2 for v in (x, y))
        above, below = y[orders] @ x, math.sqrt((x @ x) * (y @ y))
    else:
        x, y = (np.sign(v[:, None] - v) for v in (x, y))
        above = np.einsum("ij,oij->o", x, y[orders[:, :, None], orders[:, None, :]])
        below = math.sqrt((x**2).sum() * (y**2).sum())
    return float((np.abs(above / below) >= abs(value) - 1e-12).mean())


def fisher(x, y, value, method, level, resamples, seed):
    """(low, high, note) of the interval by Fisher's transformation. Takes the arguments of bootstrap()."""
    n = len(x)
    if n < 5 or abs(value) > 1 - 1e-12:
        why = f"{n} examples are too few" if n < 5 else "the correlation is perfect"
        return None, None, f"no Fisher interval: {why}"
    width = stats.norm.ppf((1 + level) / 2) * math.sqrt(FISHER_VARIANCE[method](value, n))
    return math.tanh(math.atanh(value) - width), math.tanh(math.atanh(value) + width), ""


def bootstrap(x, y, value, method, level, resamples, seed):
    """(low, high, note) of the percentile bootstrap interval."""
    n, rng = len(x), np.random.default_rng(seed)
    replicates = []
    signs = [np.sign(v[:, None] - v) for v in (x, y)] if method == "kendall" else None
    for start in range(0, resamples, step := max(1, 2**20 // n)):
        draws = rng.integers(0, n, (min(step, resamples - start), n))
        replicates.append(spearman_of(x[draws], y[draws]) if method == "spearman" else kendall_of(draws, *signs))
    replicates = np.concatenate(replicates)
    usable = replicates[np.isfinite(replicates)]
    notes = [f"only {n} examples"] if n < 10 else []
    if len(usable) < resamples:
        notes.append(f"{resamples - len(usable)} of {resamples} draws have only one value and are left out")
    if len(usable) < resamples / 2 or np.ptp(usable) < 1e-12:
        return None, None, "; ".join([*notes, "no interval: too few different values"])
    low, high = np.quantile(usable, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high), "; ".join(notes)


def spearman_of(x, y):
    """Spearman's rho of each row of x and y, (draws, n). Returns (draws,), with NaN for a row with only one value."""
    x, y = (stats.rankdata(v, axis=1) - (v.shape[1] + 1) / 2 for v in (x, y))
    return ratio((x * y).sum(1), (x * x).sum(1) * (y * y).sum(1))


def kendall_of(draws, x_signs, y_signs):
    """Kendall's tau-b of each draw. draws: (draws, n) indices of examples. x_signs, y_signs: (n, n), signs of the differences of
    two values. Returns (draws,).

    A pair of examples counts (times the first was drawn) x (times the second was drawn)."""
    count, n = draws.shape
    places = (draws + n * np.arange(count)[:, None]).ravel()
    times = np.bincount(places, minlength=count * n).reshape(count, n).astype(np.float64)
    pairs = lambda weights: ((times @ weights) * times).sum(1)
    return ratio(pairs(x_signs * y_signs), pairs(abs(x_signs)) * pairs(abs(y_signs)))


def ratio(above, below_squared):
    """above / sqrt(below_squared), NaN where it is 0 / 0."""
    below = np.sqrt(below_squared)
    return np.divide(above, below, out=np.full_like(above, np.nan), where=below > 0)
