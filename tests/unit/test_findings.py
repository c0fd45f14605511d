"""Tests of findings have the error rates that they promise, and see what is there."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from ptbench.analysis import findings
from ptbench.analysis.findings import Evidence

MARGIN = 0.02
DRAWS = 600
# Of 600 tests at 5 %, 30 reject by chance; more than 52 only with a probability of 5e-5.
MOST = 52 / DRAWS


def rate(
    test: Callable[..., Evidence],
    means: list[float],
    which: str,
    deviation: float = 0.01,
    n: int = 5,
    draws: int = DRAWS,
) -> float:
    """How often a test's p is below 0.05 on samples with these means."""
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(draws):
        evidence = test(*(rng.normal(mean, deviation, n) for mean in means))
        p = getattr(evidence, which)
        hits += p is not None and p < 0.05
    return hits / draws


def lower(a: object, b: object) -> Evidence:
    return findings.lower(a, b, MARGIN)  # type: ignore[arg-type]


def equal(a: object, b: object) -> Evidence:
    return findings.equal(a, b, MARGIN)  # type: ignore[arg-type]


def falls(*groups: object) -> Evidence:
    return findings.trend(groups, "falls")  # type: ignore[arg-type]


def flat_after_second(*groups: object) -> Evidence:
    return findings.saturates(groups, 1, MARGIN)  # type: ignore[arg-type]


def stronger(a: object, b: object, c: object, d: object) -> Evidence:
    return findings.interaction(a, b, c, d, MARGIN)  # type: ignore[arg-type]


def test_diverged_seeds_are_ranked_exactly() -> None:
    """Three seeds against three can be shared out in 20 ways, however many are tied."""
    diverged = [math.inf] * 3
    assert lower([4.4, 4.5, 4.6], diverged).p == pytest.approx(1 / 20)
    assert lower(diverged, [4.4, 4.5, 4.6]).p_opposite == pytest.approx(1 / 20)


@pytest.mark.parametrize(
    ("test", "means", "which"),
    [
        (lower, [4.5, 4.5], "p"),  # no difference is no "lower"
        (lower, [4.5 - MARGIN, 4.5], "p_opposite"),  # lower by the margin is not the opposite
        (equal, [4.5 + MARGIN, 4.5], "p"),  # a difference of the margin is not equal
        (equal, [4.5 + MARGIN, 4.5], "p_opposite"),  # and not more than it either
        (falls, [4.5, 4.5, 4.5, 4.5], "p"),
        (falls, [4.5, 4.5, 4.5, 4.5], "p_opposite"),
        (flat_after_second, [4.6, 4.5, 4.5 - MARGIN, 4.5], "p"),
        (flat_after_second, [4.6, 4.5, 4.5 - MARGIN, 4.5 - MARGIN], "p_opposite"),
        (stronger, [4.4, 4.5, 4.4, 4.5], "p"),
        (stronger, [4.4 - MARGIN, 4.5, 4.4, 4.5], "p_opposite"),
    ],
)  # fmt: skip
def test_a_test_is_wrong_no_more_often_than_it_says(
    test: Callable[..., Evidence], means: list[float], which: str
) -> None:
    assert rate(test, means, which) <= MOST


@pytest.mark.parametrize(
    ("test", "means", "which"),
    [
        (lower, [4.44, 4.5], "p"),
        (lower, [4.56, 4.5], "p_opposite"),
        (lower, [4.5, 4.5], "p_opposite"),  # equal within the margin contradicts "lower"
        (equal, [4.5, 4.5], "p"),
        (equal, [4.56, 4.5], "p_opposite"),
        (falls, [4.56, 4.54, 4.52, 4.5], "p"),
        (falls, [4.5, 4.52, 4.54, 4.56], "p_opposite"),
        (flat_after_second, [4.6, 4.5, 4.52, 4.51], "p"),
        (flat_after_second, [4.6, 4.5, 4.44, 4.5], "p_opposite"),
        (stronger, [4.38, 4.5, 4.45, 4.5], "p"),
        (stronger, [4.5, 4.5, 4.4, 4.5], "p_opposite"),
    ],
)
def test_a_test_sees_an_effect_of_several_deviations(
    test: Callable[..., Evidence], means: list[float], which: str
) -> None:
    assert rate(test, means, which, deviation=0.005, draws=100) > 0.8


def test_a_side_that_diverged_is_higher_than_one_that_did_not() -> None:
    fine, diverged = [4.5, 4.51, 4.49, 4.5, 4.52], [math.inf] * 5
    assert findings.lower(fine, diverged, MARGIN).p == pytest.approx(1 / math.comb(10, 5), abs=1e-3)
    opposite = findings.lower(diverged, fine, MARGIN).p_opposite
    assert opposite == pytest.approx(1 / math.comb(10, 5), abs=1e-3)


def test_what_is_shown_equal_is_the_part_that_contradicts() -> None:
    """The second step has least to spare, and cannot tell; the first is equal without doubt."""
    same = findings.lower([4.5, 4.5001, 4.4999], [4.501, 4.5011, 4.5009], MARGIN)
    unsure = findings.lower([4.5, 4.6, 4.4], [4.4, 4.5, 4.3], MARGIN)
    found = findings.all_of([same, unsure])
    assert found.effect == unsure.effect
    assert found.equal == same.equal == (pytest.approx(0.001), MARGIN)
    worse = findings.lower([4.6, 4.61, 4.59], [4.5, 4.51, 4.49], MARGIN)
    assert findings.all_of([same, worse._replace(p_opposite=1e-9)]).equal is None


def test_one_seed_a_side_allows_no_test() -> None:
    assert findings.lower([4.5], [4.6], MARGIN) == findings.NOTHING
    assert findings.equal([4.5], [4.6], MARGIN) == findings.NOTHING


def test_the_best_value_s_probability_is_shared_among_equals_and_sums_to_one() -> None:
    rng = np.random.default_rng(0)
    shares = findings.best_probabilities([rng.normal(4.5, 0.01, 5), rng.normal(4.7, 0.01, 5)])
    assert shares == [1.0, 0.0]
    shares = findings.best_probabilities([[4.5, 4.5], [4.5, 4.5], [math.inf, math.inf]])
    assert shares == [0.5, 0.5, 0.0]


def test_an_exponent_s_interval_has_rows_as_units() -> None:
    """Three rows off their line by -1, 2 and -1 hundredths leave one degree of freedom.

    At positions 1, e and e^2 the slope's error is sqrt(6e-4 / 1) / sqrt(2), and Student's t of one
    degree has the quantile tan(0.475 pi) = 12.7062.
    """
    positions = [1.0, math.e, math.e**2]
    means = [5 + x + off for x, off in zip((0, 1, 2), (-0.01, 0.02, -0.01), strict=True)]
    half = 12.7062 * math.sqrt(6e-4) / math.sqrt(2)  # 0.22
    for spread in (1e-6, 1e-3):  # of the seeds, many as there are, which shrinks nothing
        groups = [mean + spread * np.linspace(-1, 1, 101) for mean in means]
        assert findings.slope_holds(positions, groups, 1 + 0.99 * half) == "upheld"
        assert findings.slope_holds(positions, groups, 1 + 1.01 * half) == "contradicted"
    wider = [5 + 2 * (mean - 5) for mean in means]  # as above, twice: wider than it may be
    assert findings.slope_holds(positions, [[m] for m in wider], 2.0) == "cannot tell"


def test_two_positions_show_no_power_law() -> None:
    seeds = np.array([4.50, 4.51, 4.49])
    positions = [1.0, 2.0, 2.0]
    assert findings.slope_holds(positions, [seeds, seeds + 1, seeds + 1], 1.4) == "cannot tell"


def test_a_bound_is_upheld_where_every_seed_is_above_it_or_diverged() -> None:
    assert findings.beyond([8.1, math.inf], 8.0) == "upheld"
    assert findings.beyond([4.5, 4.6], 8.0) == "contradicted"
    assert findings.beyond([4.5, 9.0], 8.0) == "cannot tell"


def jonckheere(groups: Sequence[Sequence[float]]) -> int:
    return sum(
        x < y for a, b in itertools.combinations(groups, 2) for x, y in itertools.product(a, b)
    )


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 2, 2), (1, 3, 2), (4, 3)])
def test_the_law_of_a_trend_counts_every_order_of_the_values(sizes: tuple[int, ...]) -> None:
    def deal(order: Sequence[float]) -> list[Sequence[float]]:
        ends = list(itertools.accumulate(sizes))
        return [order[end - size : end] for size, end in zip(sizes, ends, strict=True)]

    orders = list(itertools.permutations(range(sum(sizes))))
    counts = [jonckheere(deal(order)) for order in orders]
    for order in orders[:: len(orders) // 20]:
        seen, groups = jonckheere(deal(order)), deal(order)
        above = sum(count >= seen for count in counts) / len(counts)
        below = sum(count <= seen for count in counts) / len(counts)
        for direction, p, opposite in (("rises", above, below), ("falls", below, above)):
            found = findings.trend(groups, direction)  # type: ignore[arg-type]
            assert (found.p, found.p_opposite) == pytest.approx((p, opposite))


def test_the_law_of_a_trend_of_thirty_values_is_exact() -> None:
    """Of 30! / 5!^6 ways to share them out, one is in order."""
    law = findings.trend_law((5,) * 6)
    ways = math.factorial(30) / math.factorial(5) ** 6
    assert law[-1] == pytest.approx(1 / ways)
    assert law[0] == 1
    mean = (30**2 - 6 * 5**2) / 4
    assert sum(law) - 1 == pytest.approx(mean)  # of whole numbers, the sum of P(at least 1, 2 ...)


def test_tied_values_have_jonckheere_s_normal_approximation() -> None:
    """Lehmann 1975, section 5.7, by hand: six values, of which two are alike."""
    groups = [[1.0, 4.0], [2.0, 6.0], [5.0, 6.0]]
    count = 3 + 4 + 2.5  # pairs of groups (1, 2), (1, 3), (2, 3); a tie counts half
    mean = (36 - 12) / 4
    variance = (6 * 5 * 17 - 3 * 2 * 1 * 9 - 2 * 1 * 9) / 72 + 3 * 2 * 2 / (8 * 6 * 5)
    z = (count - mean) / math.sqrt(variance)
    evidence = findings.trend(groups, "rises")
    assert evidence.p == pytest.approx(0.5 * math.erfc(z / math.sqrt(2)))


def with_deviation(mean: float, deviation: float) -> np.ndarray:
    """Two values of this mean and sample deviation."""
    return mean + deviation * np.array([-1, 1]) / math.sqrt(2)


def test_seeds_to_settle_are_those_of_a_power_calculation() -> None:
    """With s = 0.01 and 0.01 to the margin, n = 2 (1.645 + 0.842)^2 + 1 = 13.4."""
    # At the last, saturation is shown already: t = 0.05 / 0.01 with two degrees of freedom.
    for effect, saturates in ((MARGIN + 0.01, 14), (MARGIN - 0.01, 14), (-MARGIN - 0.01, None)):
        a, b = with_deviation(4.5 - effect, 0.01), with_deviation(4.5, 0.01)
        assert findings.lower(a, b, MARGIN).seeds == 14
        assert findings.equal(a, b, MARGIN).seeds == 14
        assert findings.saturates([b, a], 0, MARGIN).seeds == saturates
    four = [with_deviation(mean, 0.01) for mean in (4.5 - MARGIN - 0.01, 4.5, 4.5, 4.5)]
    assert findings.interaction(*four, MARGIN).seeds == 26  # 4 (1.645 + 0.842)^2 + 1 = 25.7


def test_no_fewer_seeds_are_advised_than_there_are() -> None:
    a, b = np.linspace(4.40, 4.41, 9), np.linspace(4.50, 4.51, 9)
    assert findings.lower(a, b, MARGIN).seeds == 10


def test_seeds_to_settle_are_named_only_where_they_settle_every_open_part() -> None:
    shown = Evidence(0.1, 0.001, 1.0, 5, MARGIN)
    unclear, hopeless = Evidence(0.01, 0.3, 0.7, 30, MARGIN), Evidence(0.02, 0.3, 0.7, None, MARGIN)
    assert findings.all_of([shown, unclear]).seeds == 30
    assert findings.all_of([shown._replace(seeds=None), unclear]).seeds == 30
    assert findings.all_of([shown, unclear, hopeless]).seeds is None
