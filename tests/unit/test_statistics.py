"""Statistics against worked examples of the literature, closed forms and simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import ArrayLike
from scipy import stats

from ptbench.analysis.metrics import summarise_median, summarise_perplexity
from ptbench.analysis.statistics import (
    Pair,
    compare_pairs,
    has_spread,
    hedges_g,
    holm,
    joint_equivalence_p,
    permutation_p,
    t_interval,
    t_test,
    verdict,
)

pytestmark = pytest.mark.filterwarnings("error")

# Student (1908), "The probable error of a mean": extra hours of sleep under two drugs. The results
# below are those that R's documentation of t.test prints for its data set `sleep`.
DRUG_1 = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
DRUG_2 = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]


MARGIN = 0.02


def pair(a: ArrayLike, b: ArrayLike, paired: bool = False, complete: bool = True) -> Pair:
    """A pair whose seeds are 1, 2, ... on both sides."""
    first, second = (dict(enumerate(np.asarray(x, float).tolist(), 1)) for x in (a, b))
    return Pair(first, second, paired, complete)


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
    assert summary.value == pytest.approx(110.0)
    # mean 331/3; squared deviations 961/9 + 1/9 + 1024/9 = 1986/9; over two degrees of freedom
    assert summary.std == pytest.approx(math.sqrt(1986 / 18))
    assert summary.nll_std == pytest.approx(math.log(1.1))
    # t(0.975, 2) = 0.95 sqrt(2 / (1 - 0.95^2)), the closed form of two degrees of freedom
    half = 0.95 * math.sqrt(2 / (1 - 0.95**2)) * math.log(1.1) / math.sqrt(3)
    assert summary.low == pytest.approx(110 * math.exp(-half))
    assert summary.high == pytest.approx(110 * math.exp(half))


def test_one_seed_has_neither_spread_nor_interval() -> None:
    summary = summarise_perplexity([math.log(120)])
    assert summary.value == pytest.approx(120)
    assert (summary.n, summary.nll_std, summary.std) == (1, None, None)
    assert (summary.low, summary.high) == (None, None)


def test_seeds_that_agree_exactly_claim_no_certainty() -> None:
    summary = summarise_perplexity([0.1 + 0.2, 0.3, 0.3])  # equal but for rounding
    assert (summary.low, summary.high) == (None, None)
    assert not has_spread(np.array([0.1 + 0.2, 0.3]))


def test_a_hopeless_model_has_an_infinite_perplexity_and_no_overflow() -> None:
    summary = summarise_perplexity([800.0])
    assert summary.value == math.inf


def test_quartiles_interpolate_and_of_few_values_are_the_range() -> None:
    # Hyndman and Fan (1996), definition 7: the quartiles lie at 1 + q (n - 1).
    middle = summarise_median([4, 1, 3, 2, 6, 5])
    assert (middle.low, middle.value, middle.high, middle.n) == (2.25, 3.5, 4.75, 6)
    few = summarise_median([4, 1, 3, 2])
    assert (few.low, few.value, few.high) == (1, 2.5, 4)


def test_welch_of_students_sleep_data_is_as_printed() -> None:
    test = t_test(DRUG_1, DRUG_2, 1.0)
    assert test is not None
    assert test.t == pytest.approx(-1.8608, abs=5e-5)
    assert test.degrees_of_freedom == pytest.approx(17.776, abs=5e-4)
    assert test.p == pytest.approx(0.07939, abs=5e-6)
    assert (test.low, test.high) == pytest.approx((-3.3654832, 0.2054832), abs=1e-6)
    assert test.difference == pytest.approx(0.75 - 2.33)


def test_paired_t_of_students_sleep_data_is_as_printed() -> None:
    test = t_test(DRUG_1, DRUG_2, 1.0, paired=True)
    assert test is not None
    assert test.t == pytest.approx(-4.0621, abs=5e-5)
    assert test.degrees_of_freedom == 9
    assert test.p == pytest.approx(0.002833, abs=5e-7)
    assert (test.low, test.high) == pytest.approx((-2.4598858, -0.7001142), abs=1e-6)
    assert test.difference == pytest.approx(-1.58)


def test_paired_equivalence_of_two_seeds_is_of_the_cauchy_law() -> None:
    # One degree of freedom: P(T > t) = 1/2 - arctan(t) / pi. Differences 0 and 2: mean 1, error 1.
    test = t_test([1.0, 4.0], [1.0, 2.0], 10.0, paired=True)
    assert test is not None
    assert test.p_equivalence == pytest.approx(0.5 - math.atan(10 - 1) / math.pi)


def test_pairs_are_seeds_that_both_sides_have() -> None:
    (difference,) = compare_pairs(
        [Pair({1: 4.70, 2: 4.72, 3: 4.76}, {3: 4.75, 4: 9.0, 1: 4.68}, paired=True)], MARGIN
    )
    assert (difference.n_a, difference.n_b) == (2, 2)
    assert difference.difference == pytest.approx((0.02 + 0.01) / 2)
    assert difference.test is not None
    assert difference.test.kind == "paired"


def test_seeds_that_move_together_are_told_apart_by_pairs_alone() -> None:
    seeds = np.array([4.60, 4.70, 4.80, 4.90])
    shifted = seeds + np.array([0.030, 0.031, 0.029, 0.030])
    paired, independent = (
        compare_pairs([pair(shifted, seeds, paired=paired)], MARGIN)[0] for paired in (True, False)
    )
    assert paired.verdict == "different"
    assert independent.verdict == "inconclusive"


def test_welch_of_two_seeds_a_side_has_a_closed_form() -> None:
    # Equal variances and n = 2: two degrees of freedom, of which p = 1 - |t| / sqrt(2 + t^2).
    test = t_test([0.0, 2.0], [3.0, 5.0], 1.0)
    assert test is not None
    assert test.degrees_of_freedom == pytest.approx(2)
    assert test.t == pytest.approx(-3 / math.sqrt(2))
    assert test.p == pytest.approx(1 - math.sqrt(4.5 / 6.5))


def test_welch_allows_one_side_without_spread() -> None:
    test = t_test([4.7, 4.7, 4.7], [4.8, 4.9, 5.0], 1.0)
    assert test is not None
    assert test.degrees_of_freedom == pytest.approx(2)  # all noise is of the other side
    assert test.t == pytest.approx(-0.2 / (0.1 / math.sqrt(3)))


@pytest.mark.parametrize(
    ("a", "b"),
    [([], [1.0, 2.0]), ([1.0], [1.0, 2.0]), ([1.0] * 3, [1.0] * 3), ([1.0] * 3, [2.0] * 3)],
)
def test_no_test_is_made_up_where_none_is_possible(a: list[float], b: list[float]) -> None:
    assert hedges_g(a, b) is None
    for paired in (False, True):
        (difference,) = compare_pairs([pair(a, b, paired)], MARGIN)
        assert difference.test is None
        same = paired and len(a) > 1 and a == b
        assert difference.verdict == ("equivalent" if same else "inconclusive")
        assert same or "no" in difference.reason


def test_pairs_that_differ_by_the_same_amount_claim_no_certainty() -> None:
    # Computed differences of 0.1 that differ by rounding alone.
    a, b = [4.3, 4.5, 4.8], [4.2, 4.4, 4.7]
    assert t_test(a, b, MARGIN, paired=True) is None
    assert compare_pairs([pair(a, b, True)], MARGIN)[0].verdict == "inconclusive"


def test_pairs_that_are_alike_are_equivalent_unless_a_seed_failed() -> None:
    a = [4.3, 4.5, 4.8]
    (same,), (failed,) = (
        compare_pairs([pair(a, a, True, complete)], MARGIN) for complete in (True, False)
    )
    assert (same.verdict, same.p_equivalence) == ("equivalent", 0.0)
    assert (failed.verdict, failed.p_equivalence) == ("inconclusive", None)


def test_holm_adjusts_step_by_step() -> None:
    # By hand: 0.005 * 4, 0.01 * 3, 0.03 * 2, and 0.04 * 1 raised to the one before it.
    assert holm([0.01, 0.04, None, 0.03, 0.005]) == pytest.approx([0.03, 0.06, None, 0.06, 0.02])
    assert holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])
    assert holm([None]) == [None]
    assert holm([]) == []


def test_hedges_g_of_borensteins_example() -> None:
    # Borenstein et al. (2009), "Introduction to Meta-Analysis", chapter 4: g = 0.5924, with the
    # approximate correction.
    g = hedges_g(with_moments(103, 5.5, 50), with_moments(100, 4.5, 50))
    assert g == pytest.approx(0.5924, abs=1e-4)


def test_hedges_g_is_unbiased_with_three_seeds_a_side() -> None:
    random = np.random.default_rng(2)
    draws = random.normal([[1.0], [0.0]], 1.0, size=(6000, 2, 3))
    values = [hedges_g(a, b) for a, b in draws]
    spread = np.std(values) / math.sqrt(len(values))  # type: ignore[arg-type]
    # The approximate correction is 0.3 % too large for four degrees of freedom.
    assert np.mean(values) == pytest.approx(1.003, abs=4 * spread)  # type: ignore[arg-type]


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


def test_the_permutation_test_of_pairs_counts_every_way_of_flipping_signs() -> None:
    a, b = [14, 3, 9, 11, 12, 6, 7, 8, 2], [5, 2, 8, 7, 13, 1, 10, 4, 0]
    differences = np.subtract(a, b)
    signs = itertools.product([-1, 1], repeat=len(a))
    counted = [abs(np.dot(sign, differences)) >= abs(differences.sum()) for sign in signs]
    assert permutation_p(a, b, paired=True) == pytest.approx(np.mean(counted))


def test_eight_pairs_are_needed_to_flip_signs() -> None:
    a = list(range(8))
    assert permutation_p(a, [x + 1 + x / 9 for x in a], paired=True) == pytest.approx(2 / 256)
    assert permutation_p(a[:7], [x + 1 + x / 9 for x in a[:7]], paired=True) is None


def test_four_seeds_are_too_few_to_permute() -> None:
    assert permutation_p([1, 2, 3, 4], [5, 6, 7, 8, 9]) is None
    assert permutation_p([1.0] * 5, [1.0] * 5) is None


def test_equivalence_of_two_seeds_a_side_has_a_closed_form() -> None:
    # Standard error sqrt(2) and two degrees of freedom: P(T > t) = (1 - t / sqrt(2 + t^2)) / 2.
    t = (10 - 1) / math.sqrt(2)  # the nearer bound, 10, is 9 from the difference of 1
    expected = (1 - t / math.sqrt(2 + t * t)) / 2
    test = t_test([1.0, 3.0], [0.0, 2.0], margin=10)
    assert test is not None
    assert test.p_equivalence == pytest.approx(expected)


@given(
    st.lists(st.tuples(st.floats(4.6, 4.8), st.floats(4.6, 4.8)), min_size=2, max_size=6),
    st.floats(0.001, 0.3),
    st.booleans(),
)
def test_equivalence_is_the_90_percent_interval_within_the_margin(
    seeds: list[tuple[float, float]], margin: float, paired: bool
) -> None:
    a, b = zip(*seeds, strict=True)
    test = t_test(a, b, margin, paired)
    if test is None or not test.t or abs(test.p_equivalence - 0.05) < 1e-6:
        return
    half = stats.t.ppf(0.95, test.degrees_of_freedom) * abs(test.difference / test.t)
    inside = -margin < test.difference - half and test.difference + half < margin
    assert (test.p_equivalence < 0.05) == inside


def test_frameworks_a_margin_apart_are_called_equivalent_in_5_of_100_studies_at_most() -> None:
    random = np.random.default_rng(3)
    a = random.normal(4.72, 0.004, size=(2000, 3))
    b = random.normal(4.70, 0.004, size=(2000, 3))
    verdicts = [compare_pairs([pair(x, y)], MARGIN)[0].verdict for x, y in zip(a, b, strict=True)]
    assert verdicts.count("equivalent") / 2000 <= 0.05 + 4 * math.sqrt(0.05 * 0.95 / 2000)


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize(
    "means", [(0, 0, MARGIN), (0, MARGIN, 2 * MARGIN), (0, 0, 0, MARGIN), (0, 0, MARGIN, MARGIN)]
)
def test_any_pair_a_margin_apart_is_called_equivalent_in_5_of_100_studies_at_most(
    means: tuple[float, ...], paired: bool
) -> None:
    """The two ways to an equivalent verdict, all pairs at once or Holm, together keep the level."""
    random = np.random.default_rng(4)
    wrong, studies = 0, 500
    couples = list(itertools.combinations(range(len(means)), 2))
    for _ in range(studies):
        rows = [random.normal(4.7 + mean, 0.004, 4) for mean in means]
        found = compare_pairs([pair(rows[i], rows[j], paired) for i, j in couples], MARGIN)
        wrong += any(
            difference.verdict == "equivalent" and abs(means[i] - means[j]) >= MARGIN
            for (i, j), difference in zip(couples, found, strict=True)
        )
    assert wrong / studies <= 0.05 + 4 * math.sqrt(0.05 * 0.95 / studies)


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
    (difference,) = compare_pairs([pair(a, b)], MARGIN)
    assert difference.p_holm is not None
    assert difference.p_holm < 0.05
    assert difference.verdict == "equivalent"
    assert difference.reason == "a difference, smaller than the margin"


def test_a_difference_beyond_the_margin_is_different() -> None:
    a, b = with_moments(4.70, 0.002, 3), with_moments(4.80, 0.002, 3)
    (difference,) = compare_pairs([pair(a, b)], MARGIN)
    assert difference.verdict == "different"
    assert difference.difference == pytest.approx(-0.1)


def test_scattered_seeds_are_inconclusive() -> None:
    a, b = with_moments(4.70, 0.1, 3), with_moments(4.71, 0.1, 3)
    (difference,) = compare_pairs([pair(a, b)], MARGIN)
    assert difference.verdict == "inconclusive"
    assert difference.reason == "too few seeds to tell"


def test_a_row_with_a_failed_seed_is_never_equivalent() -> None:
    near, far = with_moments(4.7, 0.001, 4), with_moments(4.8, 0.001, 4)
    equal, different = compare_pairs(
        [pair(near, near[::-1], complete=False), pair(near, far, complete=False)], MARGIN
    )
    assert equal.p_equivalence is None
    assert equal.verdict == "inconclusive"
    assert equal.reason.endswith("a seed has no result, so equivalence is not tested")
    assert different.verdict == "different"


def test_all_pairs_of_a_table_are_one_family() -> None:
    near, far = with_moments(4.7, 0.01, 3), with_moments(4.73, 0.01, 3)
    alone = compare_pairs([pair(near, far)], MARGIN)[0]
    family = compare_pairs([pair(near, far), *[pair(near, near)] * 9, pair([], near)], MARGIN)
    assert alone.p_holm is not None
    # the untested is not in it
    assert family[0].p_holm == pytest.approx(min(1.0, 10 * alone.p_holm))
    assert family[-1].reason == "no valid result on one side"


def test_all_pairs_are_equivalent_as_one_claim_without_correction() -> None:
    a, b = with_moments(4.7, 0.01, 4), with_moments(4.701, 0.01, 4)
    together = compare_pairs([pair(a, b)] * 6, MARGIN)
    p = together[0].p_equivalence
    assert p is not None
    assert p < 0.05 < 6 * p  # Holm's correction alone would leave some of them open
    assert {difference.verdict for difference in together} == {"equivalent"}
    far = with_moments(4.9, 0.01, 4)
    parted = compare_pairs([*[pair(a, b)] * 6, pair(a, far)], MARGIN)
    assert [difference.verdict for difference in parted] == ["inconclusive"] * 6 + ["different"]


def test_the_one_claim_is_as_sure_as_its_least_sure_pair() -> None:
    assert joint_equivalence_p([0.01, 0.04, 0.02]) == 0.04
    assert joint_equivalence_p([0.01, None]) is None  # a pair that could not be tested
    assert joint_equivalence_p([]) is None
