"""Intervals, paired tests and correlations: the numbers of scipy, and the coverage that they promise, by simulation."""

import itertools
import random

import numpy as np
import pytest
from sacrebleu.metrics import BLEU
from sacrebleu.significance import PairedTest
from scipy import stats

from minitune.metrics import correlation, significance
from minitune.metrics.bleu import bleu_score, bleu_statistics, corpus_bleu
from minitune.metrics.correlation import correlate
from minitune.metrics.significance import (
    bootstrap_interval,
    paired_bootstrap,
    paired_permutation,
    resample,
    side_by_side,
)

WORDS = "the cat sat on a mat and saw one dog near two old trees in rain".split()


def corpus_score(total):
    return bleu_score(total).score


def answers(count, seed, change):
    """References and candidates with a share of their words changed."""
    rng = random.Random(seed)
    references = [[rng.choice(WORDS) for _ in range(rng.randrange(5, 15))] for _ in range(count)]
    candidates = [[rng.choice(WORDS) if rng.random() < change else word for word in r] for r in references]
    return [" ".join(r) for r in references], [" ".join(c) for c in candidates]


# intervals


@pytest.mark.parametrize("method", ["bca", "percentile"])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_without_widening_the_limits_are_those_of_scipy_on_the_same_draws(method, level):
    values = np.random.default_rng(0).beta(0.4, 2, 27)
    _, replicates, _ = significance.resample(values, None, False, 2000, 3)
    drawn = stats._resampling.BootstrapResult(None, replicates, 0.0)
    want = stats.bootstrap((values,), np.mean, n_resamples=0, bootstrap_result=drawn, confidence_level=level,
                           method=method if method == "percentile" else "BCa").confidence_interval  # fmt: skip
    got = bootstrap_interval(values, resamples=2000, seed=3, level=level, method=method, widen=False)
    assert (got.low, got.high) == pytest.approx((want.low, want.high), rel=1e-9)  # its sums run in another order
    assert got.value == pytest.approx(values.mean(), rel=1e-12) and got.n == 27 and not got.note


def test_95_percent_intervals_of_27_examples_contain_the_true_value_as_often_as_they_promise():
    rng, trials = np.random.default_rng(1), 1000
    share = {}
    for name, draw, truth in [
        ("normal", lambda: rng.normal(size=27), 0.0),
        ("skewed", lambda: rng.beta(0.4, 2, 27), 0.4 / 2.4),  # many near 0, like sentence BLEU
        ("yes or no", lambda: (rng.random(27) < 0.6).astype(float), 0.6),
    ]:
        found = [bootstrap_interval(draw(), resamples=1000, seed=trial) for trial in range(trials)]
        share[name] = np.mean([f.low <= truth <= f.high for f in found])
    # three standard errors of a share of 0.95 among 1000 are 0.021
    assert all(0.925 < held < 0.985 for held in share.values()), share


def test_the_interval_of_corpus_bleu_is_that_of_texts_drawn_again():
    references, candidates = answers(30, 0, 0.3)
    rows = bleu_statistics(references, candidates)
    got = bootstrap_interval(rows, corpus_score, resamples=200, seed=5, method="percentile", widen=False)
    draws = np.random.default_rng(5).integers(0, 30, (200, 30))
    scores = [corpus_bleu([references[i] for i in d], [candidates[i] for i in d]) for d in draws]
    assert got.value == corpus_bleu(references, candidates)
    assert (got.low, got.high) == pytest.approx(np.quantile(scores, [0.025, 0.975]), rel=1e-12)


def test_a_function_of_the_rows_themselves_gets_an_interval_too():
    values = np.random.default_rng(2).normal(size=40)
    assert bootstrap_interval(values, np.mean, of_rows=True)[:3] == pytest.approx(
        bootstrap_interval(values)[:3], rel=1e-9
    )
    rows = np.stack([values, values**2], axis=1)
    median = bootstrap_interval(rows, lambda drawn: np.median(drawn[:, 1]), of_rows=True, resamples=500)
    assert median.low < median.value == np.median(values**2) < median.high


def test_the_same_seed_gives_the_same_interval_and_another_seed_nearly():
    values = np.random.default_rng(3).random(200)
    first, again, other = (bootstrap_interval(values, seed=seed) for seed in (0, 0, 1))
    assert first == again != other
    assert other.low == pytest.approx(first.low, abs=0.004)  # an eighth of the half width


def test_few_or_equal_examples_are_not_given_more_certainty_than_they_have():
    one = bootstrap_interval([0.5])
    assert (one.value, one.low, one.high) == (0.5, None, None) and "one example" in one.note
    two = bootstrap_interval([0.0, 1.0])
    assert (two.low, two.high) == (0.0, 1.0) and "2 examples are few" in two.note
    equal = bootstrap_interval([1.0] * 27)
    assert equal.low is None and "every example has the same score" in equal.note
    for method, level in itertools.product(("bca", "percentile"), (0.5, 0.999)):
        for n in (2, 3, 4, 9):  # so skewed that the correction reaches its limit
            found = bootstrap_interval([0.0] * (n - 1) + [1.0], level=level, method=method)
            assert 0 <= found.low <= found.high <= 1 and f"{n} examples are few" in found.note


@pytest.mark.parametrize(
    "rows, options, message",
    [
        ([], {}, r"shape \(0,\)"),
        ([0.1, float("nan")], {}, "row 1 is nan"),
        ([[1, 2], [3, float("inf")]], {"score": sum}, "row 1 is"),
        ([[1, 2], [3, 4]], {}, "give `score`"),
        ([0.1, 0.2], {"score": lambda total: float("nan")}, "not finite for 5003 choices of examples"),
        ([0.1, 0.2], {"level": 95}, "level is 95"),
        ([0.1, 0.2], {"method": "basic"}, "bca or percentile"),
        ([0.1, 0.2], {"resamples": 0}, "resamples is 0"),
    ],
)
def test_what_has_no_interval_is_an_error_that_names_it(rows, options, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(rows, **options)


# two systems


@pytest.mark.parametrize("n", [2, 5, 8, 12])
def test_the_permutation_test_of_few_examples_is_exact_and_that_of_scipy(n):
    rng = np.random.default_rng(n)
    a, b = rng.integers(0, 4, (2, n)) / 3  # ties among the differences
    mean_difference = lambda x, y, axis: np.mean(x - y, axis=axis)
    want = stats.permutation_test(
        (a, b), mean_difference, permutation_type="samples", vectorized=True, n_resamples=np.inf
    )
    got = paired_permutation(a, b)
    assert got.p_value == want.pvalue and got.difference == pytest.approx(a.mean() - b.mean(), abs=1e-15)


def test_the_permutation_test_of_a_corpus_score_is_that_of_texts_that_change_sides():
    references, first = answers(7, 1, 0.2)
    _, second = answers(7, 1, 0.6)
    got = paired_permutation(bleu_statistics(references, first), bleu_statistics(references, second), corpus_score)
    found = []
    for sides in itertools.product([0, 1], repeat=7):
        x, y = zip(*[(b, a) if side else (a, b) for a, b, side in zip(first, second, sides, strict=True)], strict=True)
        found.append(corpus_bleu(references, list(x)) - corpus_bleu(references, list(y)))
    assert got.difference == found[0]
    assert got.p_value == np.mean([abs(f) >= abs(found[0]) - 1e-9 for f in found])


def test_many_examples_are_sampled_near_the_exact_value():
    a, b = np.random.default_rng(4).random((2, 13)) + [[0.15], [0]]
    exact, sampled = paired_permutation(a, b), paired_permutation(a, b, resamples=5000)
    assert 0.02 < exact.p_value < 0.9
    assert sampled.p_value == pytest.approx(exact.p_value, abs=0.03)  # four standard errors, at most


def test_tests_of_equal_systems_reject_as_seldom_as_they_promise():
    rng, trials = np.random.default_rng(5), 400
    found = {"permutation": 0, "bootstrap": 0}
    for trial in range(trials):
        shared = rng.random(27)
        a, b = shared + rng.exponential(0.2, 27), shared + rng.exponential(0.2, 27)
        found["permutation"] += paired_permutation(a, b, resamples=400, seed=trial).p_value <= 0.05
        found["bootstrap"] += paired_bootstrap(a, b, resamples=400, seed=trial).p_value <= 0.05
    # 0.05 of 400 is 20, and three standard errors are 13; the bootstrap of 27 examples is known to be a little bold
    assert 7 <= found["permutation"] <= 33 and found["bootstrap"] <= 40, found


def test_paired_tests_see_a_difference_that_separate_intervals_hide():
    rng = np.random.default_rng(6)
    b = rng.random(60)
    a = b + 0.02 + rng.normal(0, 0.02, 60)
    separate = [bootstrap_interval(values) for values in (a, b)]
    assert separate[0].low < separate[1].high
    drawn, turned = paired_bootstrap(a, b), paired_permutation(a, b)
    assert 0 < drawn.low < drawn.difference < drawn.high and drawn.difference == pytest.approx(turned.difference)
    assert drawn.p_value < 0.001 and turned.p_value < 0.001
    back = paired_permutation(b, a)
    assert (back.difference, back.p_value) == (pytest.approx(-turned.difference), turned.p_value)


def peer_p(kind, systems, references):
    """sacrebleu's p of a paired test: ar, approximate randomization, or bs, bootstrap."""
    named = list(zip("ab", systems, strict=True))
    _, results = PairedTest(named, {"BLEU": BLEU()}, [references], kind, n_samples=2000)()
    return next(r.p_value for r in results["BLEU"] if r.p_value is not None)


@pytest.mark.parametrize("share", [0.31, 0.36])
def test_paired_tests_of_bleu_are_those_of_sacrebleu_where_they_ask_the_same(share):
    references, first = answers(60, 2, 0.3)
    _, second = answers(60, 2, share)
    rows = [bleu_statistics(references, candidates) for candidates in (first, second)]
    turned = paired_permutation(*rows, corpus_score, resamples=2000)
    assert turned.difference == pytest.approx(corpus_bleu(references, first) - corpus_bleu(references, second))
    # other random numbers: four standard errors of either p are 0.045
    assert turned.p_value == pytest.approx(peer_p("ar", (first, second), references), abs=0.06)
    both, difference_of = side_by_side(*rows, corpus_score)
    measured, drawn, _ = resample(both, difference_of, False, 2000, 0)
    theirs = np.mean(np.abs(drawn) - np.abs(drawn).mean() > abs(measured))  # its bootstrap, as paired_bootstrap says
    assert theirs == pytest.approx(peer_p("bs", (first, second), references), abs=0.06)
    assert paired_bootstrap(*rows, corpus_score, resamples=2000).p_value > theirs + 0.02


def test_one_example_or_equal_answers_show_no_difference():
    for test in (paired_bootstrap, paired_permutation):
        assert test([0.9], [0.1]).p_value == 1.0
        same = test([0.3, 0.4, 0.5], [0.3, 0.4, 0.5])
        assert (same.difference, same.p_value) == (0.0, 1.0) and same.note
    with pytest.raises(ValueError, match="the same examples"):
        paired_bootstrap([0.1, 0.2], [0.1])
    with pytest.raises(ValueError, match="give `score`"):
        paired_permutation([[0.1, 0.2]], [[0.1, 0.3]])


# correlation with people

GRADES = np.random.default_rng(7).choice([0.0, 0.5, 1.0], 27, p=[0.2, 0.2, 0.6])
SCORES = np.round(0.2 * GRADES + np.random.default_rng(8).random(27), 1)  # ties on both sides


@pytest.mark.parametrize("method, peer", [("spearman", stats.spearmanr), ("kendall", stats.kendalltau)])
def test_correlation_and_its_draws_are_those_of_scipy(method, peer):
    got = correlate(SCORES, GRADES, method)
    assert (got.value, got.p_value) == (peer(SCORES, GRADES).statistic, peer(SCORES, GRADES).pvalue)
    assert -1 <= got.low < got.value < got.high <= 1
    draws = np.random.default_rng(0).integers(0, 27, (50, 27))
    if method == "spearman":
        found = correlation.spearman_of(SCORES[draws], GRADES[draws])
    else:
        signs = [np.sign(v[:, None] - v) for v in (SCORES, GRADES)]
        found = correlation.kendall_of(draws, *signs)
    assert found == pytest.approx([peer(SCORES[d], GRADES[d]).statistic for d in draws], abs=1e-12)


@pytest.mark.parametrize("interval", ["bootstrap", "fisher"])
@pytest.mark.parametrize("method", ["spearman", "kendall"])
def test_intervals_of_a_correlation_contain_the_true_value_as_often_as_they_promise(method, interval):
    rng, slope = np.random.default_rng(9), 0.5
    truth = (
        6 / np.pi * np.arcsin(slope / 2) if method == "spearman" else 2 / np.pi * np.arcsin(slope)
    )  # of normal pairs
    held = 0
    for trial in range(300):
        x = rng.normal(size=27)
        y = slope * x + np.sqrt(1 - slope**2) * rng.normal(size=27)
        found = correlate(x, y, method, interval, resamples=400, seed=trial)
        held += found.low <= truth <= found.high
    assert 0.91 < held / 300 < 0.99  # three standard errors are 0.038


def test_a_correlation_that_does_not_exist_says_why():
    constant = correlate(SCORES, np.ones(27))
    assert (
        constant.value is None and constant.low is None and constant.note == "the grade is the same in all 27 examples"
    )
    assert correlate(np.zeros(27), np.ones(27)).note.startswith("the metric and the grade")
    assert correlate([1, 2], [1, 2]).value is None and "3 are needed" in correlate([1, 2], [1, 2]).note
    rare = correlate(SCORES, [0.0] + [1.0] * 26)  # one grade differs: a third of all draws leave it out
    assert rare.value is not None and "draws have only one value" in rare.note
    perfect = correlate(np.arange(9), np.arange(9))
    assert perfect.value == pytest.approx(1) and perfect.low is None and "no interval" in perfect.note
    assert correlate(np.arange(9), np.arange(9), interval="fisher").low is None
    with pytest.raises(ValueError, match="row 2 is nan"):
        correlate([1, 2, 3], [1, 2, float("nan")])
    with pytest.raises(ValueError, match="same length"):
        correlate([1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match="spearman or kendall"):
        correlate(SCORES, GRADES, "pearson")


def test_above_a_thousand_examples_the_interval_is_fishers():
    x, y = np.random.default_rng(10).random((2, 1001))
    assert correlate(x, y) == correlate(x, y, interval="fisher")


def test_p_of_few_examples_counts_every_order():
    assert correlate([1, 2, 3], [1, 2, 3]).p_value == pytest.approx(1 / 3)
    x, y = [1, 5, 2, 4, 3, 9, 7], [2, 4, 1, 5, 3, 6, 7]
    found = stats.permutation_test((y,), lambda y: stats.spearmanr(x, y).statistic, permutation_type="pairings",
                                   n_resamples=np.inf, random_state=0)  # fmt: skip
    assert correlate(x, y).p_value == pytest.approx(found.pvalue)
    assert correlate(x, y, "kendall").p_value == pytest.approx(stats.kendalltau(x, y, method="exact").pvalue)


def test_one_difference_in_every_example_has_no_bootstrap_p():
    found = paired_bootstrap([1, 2], [2, 3])
    assert found.difference == -1 and found.p_value is None and found.low is None
    assert paired_permutation([1, 2], [2, 3]).p_value == 0.5
