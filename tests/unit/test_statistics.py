"""Statistics against worked examples of the literature, closed forms and simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from ptbench.analysis.statistics import (
    compare_pairs,
    equivalence_p,
    has_spread,
    hedges_g,
    holm,
    permutation_p,
    quartiles,
    summarise_perplexity,
    t_interval,
    verdict,
    welch,
)

pytestmark = pytest.mark.filterwarnings("error")

# Student (1908), "The probable error of a mean": extra hours of sleep under two drugs. The results
# below are those that R's documentation of t.test prints for its data set `sleep`.
DRUG_1 = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
DRUG_2 = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]


def with_moments(mean: float, std: float, n: int) -> np.ndarray:
    """n values of exactly this mean and sample standard deviation."""
    values = stats.norm.ppf((np.arange(n) + 0.5) / n)
    return mean + std * (values - values.mean()) / values.std(ddof=1)


def test_the_interval_of_students_sleep_data_is_as_printed() -> None:
    differences = np.subtract(DRUG_2, DRUG_1)
    assert t_interval(differences) == pytest.approx((0.7001142, 2.4598858), abs=1e-6)


def test_two_values_give_the_interval_of_the_cauchy_law() -> None:
    # Student's law of one degree of freedom is Cauchy's, with quantile tan(pi (q - 1/2)).
    half = math.tan(math.pi * 0.475) * 1.0  # s / sqrt(n) = sqrt(2) / sqrt(2)
    assert t_interval([4.0, 6.0]) == pytest.approx((5 - half, 5 + half))


@pytest.mark.parametrize("seeds", [3, 5])
def test_the_interval_covers_the_mean_in_95_of_100_experiments(seeds: int) -> None:
    random = np.random.default_rng(1)
    experiments = random.normal(4.7, 0.01, size=(4000, seeds))
    intervals = [t_interval(experiment) for experiment in experiments]
    covered = np.mean([low <= 4.7 <= high for low, high in filter(None, intervals)])
    assert covered == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / 4000))


def test_a_perplexity_is_the_geometric_mean_and_its_std_that_of_the_seeds() -> None:
    summary = summarise_perplexity(np.log([100.0, 110.0, 121.0]))
    assert summary.n == 3
    assert summary.perplexity == pytest.approx(110.0)
    # mean 331/3; squared deviations 961/9 + 1/9 + 1024/9 = 1986/9; over two degrees of freedom
    assert summary.perplexity_std == pytest.approx(math.sqrt(1986 / 18))
    assert summary.nll_std == pytest.approx(math.log(1.1))
    # t(0.975, 2) = 0.95 sqrt(2 / (1 - 0.95^2)), the closed form of two degrees of freedom
    half = 0.95 * math.sqrt(2 / (1 - 0.95**2)) * math.log(1.1) / math.sqrt(3)
    assert summary.low == pytest.approx(110 * math.exp(-half))
    assert summary.high == pytest.approx(110 * math.exp(half))


def test_one_seed_has_neither_spread_nor_interval() -> None:
    summary = summarise_perplexity([math.log(120)])
    assert summary.perplexity == pytest.approx(120)
    assert (summary.n, summary.nll_std, summary.perplexity_std) == (1, None, None)
    assert (summary.low, summary.high) == (None, None)


def test_seeds_that_agree_exactly_claim_no_certainty() -> None:
    summary = summarise_perplexity([0.1 + 0.2, 0.3, 0.3])  # equal but for rounding
    assert (summary.low, summary.high) == (None, None)
    assert not has_spread(np.array([0.1 + 0.2, 0.3]))


def test_a_hopeless_model_has_an_infinite_perplexity_and_no_overflow() -> None:
    summary = summarise_perplexity([800.0])
    assert summary.perplexity == math.inf


def test_no_seed_cannot_be_summarised() -> None:
    with pytest.raises(ValueError, match="at least one seed"):
        summarise_perplexity([])


def test_quartiles_interpolate() -> None:
    # Hyndman and Fan (1996), definition 7: the quartiles lie at 1 + q (n - 1).
    middle = quartiles([4, 1, 3, 2])
    assert middle is not None
    assert (middle.low, middle.median, middle.high, middle.n) == (1.75, 2.5, 3.25, 4)
    assert quartiles([]) is None


def test_welch_of_students_sleep_data_is_as_printed() -> None:
    test = welch(DRUG_1, DRUG_2)
    assert test is not None
    assert test.t == pytest.approx(-1.8608, abs=5e-5)
    assert test.degrees_of_freedom == pytest.approx(17.776, abs=5e-4)
    assert test.p == pytest.approx(0.07939, abs=5e-6)
    assert (test.low, test.high) == pytest.approx((-3.3654832, 0.2054832), abs=1e-6)
    assert test.difference == pytest.approx(0.75 - 2.33)


def test_welch_of_two_seeds_a_side_has_a_closed_form() -> None:
    # Equal variances and n = 2: two degrees of freedom, of which p = 1 - |t| / sqrt(2 + t^2).
    test = welch([0.0, 2.0], [3.0, 5.0])
    assert test is not None
    assert test.degrees_of_freedom == pytest.approx(2)
    assert test.t == pytest.approx(-3 / math.sqrt(2))
    assert test.p == pytest.approx(1 - math.sqrt(4.5 / 6.5))


def test_welch_allows_one_side_without_spread() -> None:
    test = welch([4.7, 4.7, 4.7], [4.8, 4.9, 5.0])
    assert test is not None
    assert test.degrees_of_freedom == pytest.approx(2)  # all noise is of the other side
    assert test.t == pytest.approx(-0.2 / (0.1 / math.sqrt(3)))


@pytest.mark.parametrize(
    ("a", "b"),
    [([], [1.0, 2.0]), ([1.0], [1.0, 2.0]), ([1.0] * 3, [1.0] * 3), ([1.0] * 3, [2.0] * 3)],
)
def test_no_test_is_made_up_where_none_is_possible(a: list[float], b: list[float]) -> None:
    assert welch(a, b) is None
    assert equivalence_p(a, b, 0.02) is None
    assert hedges_g(a, b) is None
    (difference,) = compare_pairs([(a, b)])
    assert difference.verdict == "inconclusive"
    assert "no" in difference.reason


def test_holm_adjusts_step_by_step() -> None:
    # By hand: 0.005 * 4, 0.01 * 3, 0.03 * 2, and 0.04 * 1 raised to the one before it.
    assert holm([0.01, 0.04, None, 0.03, 0.005]) == pytest.approx([0.03, 0.06, None, 0.06, 0.02])
    assert holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])
    assert holm([None]) == [None]
    assert holm([]) == []


def test_hedges_g_of_borensteins_example() -> None:
    # Borenstein et al. (2009), "Introduction to Meta-Analysis", chapter 4: g = 0.5924, with the
    # approximate correction, which for 98 degrees of freedom agrees with Hedges' to four decimals.
    g = hedges_g(with_moments(103, 5.5, 50), with_moments(100, 4.5, 50))
    assert g == pytest.approx(0.5924, abs=1e-4)


def test_hedges_g_is_unbiased_with_three_seeds_a_side() -> None:
    random = np.random.default_rng(2)
    draws = random.normal([[1.0], [0.0]], 1.0, size=(6000, 2, 3))
    values = [hedges_g(a, b) for a, b in draws]
    spread = np.std(values) / math.sqrt(len(values))  # type: ignore[arg-type]
    assert np.mean(values) == pytest.approx(1.0, abs=4 * spread)  # type: ignore[arg-type]


def test_five_seeds_wholly_apart_have_permutation_p_of_two_in_252() -> None:
    assert permutation_p([1, 2, 3, 4, 5], [6, 7, 8, 9, 10]) == pytest.approx(2 / 252)


def test_the_permutation_test_counts_every_way_of_dealing() -> None:
    a, b = [14, 3, 9, 11, 12], [5, 2, 8, 7, 1, 10]
    pooled = a + b
    observed = abs(sum(a) * len(b) - sum(b) * len(a))  # whole numbers: no rounding
    counted = [
        abs(sum(side) * len(b) - (sum(pooled) - sum(side)) * len(a)) >= observed
        for side in itertools.combinations(pooled, len(a))
    ]
    assert permutation_p(a, b) == pytest.approx(sum(counted) / len(counted))


def test_four_seeds_are_too_few_to_permute() -> None:
    assert permutation_p([1, 2, 3, 4], [5, 6, 7, 8, 9]) is None
    assert permutation_p([1.0] * 5, [1.0] * 5) is None


def test_equivalence_of_two_seeds_a_side_has_a_closed_form() -> None:
    # Standard error sqrt(2) and two degrees of freedom: P(T > t) = (1 - t / sqrt(2 + t^2)) / 2.
    t = (10 - 1) / math.sqrt(2)  # the nearer bound, 10, is 9 from the difference of 1
    expected = (1 - t / math.sqrt(2 + t * t)) / 2
    assert equivalence_p([1.0, 3.0], [0.0, 2.0], margin=10) == pytest.approx(expected)


@given(
    st.lists(st.floats(4.6, 4.8), min_size=2, max_size=6),
    st.lists(st.floats(4.6, 4.8), min_size=2, max_size=6),
    st.floats(0.001, 0.3),
)
def test_equivalence_is_the_90_percent_interval_within_the_margin(
    a: list[float], b: list[float], margin: float
) -> None:
    test = welch(a, b)
    p = equivalence_p(a, b, margin)
    if test is None or p is None:
        assert test is None
        assert p is None
        return
    error = abs(test.difference / test.t) if test.t else None
    if error is None or abs(p - 0.05) < 1e-6:
        return
    half = stats.t.ppf(0.95, test.degrees_of_freedom) * error
    inside = -margin < test.difference - half and test.difference + half < margin
    assert (p < 0.05) == inside


def test_frameworks_a_margin_apart_are_called_equivalent_in_5_of_100_studies_at_most() -> None:
    random = np.random.default_rng(3)
    a = random.normal(4.72, 0.004, size=(2000, 3))
    b = random.normal(4.70, 0.004, size=(2000, 3))
    wrong = np.mean([(equivalence_p(x, y, 0.02) or 1.0) < 0.05 for x, y in zip(a, b, strict=True)])
    assert wrong <= 0.05 + 4 * math.sqrt(0.05 * 0.95 / 2000)


@pytest.mark.parametrize(
    ("p_holm", "p_equivalence", "expected"),
    [
        (0.5, 0.01, "equivalent"),
        (0.01, 0.01, "equivalent"),  # a real difference, but smaller than matters
        (0.01, 0.5, "different"),
        (0.5, 0.5, "inconclusive"),
        (0.05, 0.05, "inconclusive"),  # significance is below 0.05
        (None, None, "inconclusive"),
    ],
)
def test_verdicts(p_holm: float | None, p_equivalence: float | None, expected: str) -> None:
    assert verdict(p_holm, p_equivalence) == expected


def test_a_detected_difference_within_the_margin_is_equivalent_and_says_so() -> None:
    a, b = with_moments(4.700, 0.0005, 5), with_moments(4.705, 0.0005, 5)
    (difference,) = compare_pairs([(a, b)], margin=0.02)
    assert difference.p_holm is not None
    assert difference.p_holm < 0.05
    assert difference.verdict == "equivalent"
    assert difference.reason == "a difference, smaller than the margin"


def test_a_difference_beyond_the_margin_is_different() -> None:
    a, b = with_moments(4.70, 0.002, 3), with_moments(4.80, 0.002, 3)
    (difference,) = compare_pairs([(a, b)], margin=0.02)
    assert difference.verdict == "different"
    assert difference.difference == pytest.approx(-0.1)


def test_scattered_seeds_are_inconclusive() -> None:
    a, b = with_moments(4.70, 0.1, 3), with_moments(4.71, 0.1, 3)
    (difference,) = compare_pairs([(a, b)], margin=0.02)
    assert difference.verdict == "inconclusive"
    assert difference.reason == "too few seeds to tell"


def test_all_pairs_of_a_table_are_one_family() -> None:
    near, far = with_moments(4.7, 0.01, 3), with_moments(4.73, 0.01, 3)
    alone = compare_pairs([(near, far)])[0]
    family = compare_pairs([(near, far)] + [(near, near)] * 9 + [([], near)])
    assert alone.p_holm is not None
    assert family[0].p_holm == pytest.approx(
        min(1.0, 10 * alone.p_holm)
    )  # the untested is not in it
    assert family[-1].reason == "no valid result on one side"
