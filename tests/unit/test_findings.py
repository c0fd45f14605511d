"""Tests of findings have the error rates that they promise, and see what is there."""

from __future__ import annotations

import math
from collections.abc import Callable

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


def test_one_seed_a_side_allows_no_test() -> None:
    assert findings.lower([4.5], [4.6], MARGIN) == findings.NOTHING
    assert findings.equal([4.5], [4.6], MARGIN) == findings.NOTHING


def test_the_best_value_s_probability_is_shared_among_equals_and_sums_to_one() -> None:
    rng = np.random.default_rng(0)
    shares = findings.best_probabilities([rng.normal(4.5, 0.01, 5), rng.normal(4.7, 0.01, 5)])
    assert shares == [1.0, 0.0]
    shares = findings.best_probabilities([[4.5, 4.5], [4.5, 4.5], [math.inf, math.inf]])
    assert shares == [0.5, 0.5, 0.0]


def test_a_magnitude_is_upheld_where_the_interval_holds_it() -> None:
    values = [1.0, 1.02, 0.98, 1.01, 0.99]
    assert findings.holds(values, 1.01) == "upheld"
    assert findings.holds(values, 1.1) == "contradicted"
    assert findings.holds([10 * value for value in values], 10.1) == "cannot tell"  # too wide
    assert findings.holds([1.0], 1.0) == "cannot tell"
    assert findings.holds([], 1.0) == "not run"


def test_a_bound_is_upheld_where_every_seed_is_above_it_or_diverged() -> None:
    assert findings.beyond([8.1, math.inf], 8.0) == "upheld"
    assert findings.beyond([4.5, 4.6], 8.0) == "contradicted"
    assert findings.beyond([4.5, 9.0], 8.0) == "cannot tell"


def test_jonckheere_s_statistic_is_that_of_a_worked_example() -> None:
    """Lehmann 1975, section 5.7, and its normal approximation by hand without ties."""
    groups = [[1.0, 4.0], [2.0, 6.0], [5.0, 7.0]]
    count = 3 + 4 + 3  # pairs of groups (1, 2), (1, 3), (2, 3)
    mean, variance = (36 - 12) / 4, (6 * 5 * 17 - 3 * 2 * 1 * 9) / 72
    z = (count - mean) / math.sqrt(variance)
    evidence = findings.trend(groups, "rises")
    assert evidence.p == pytest.approx(0.5 * math.erfc(z / math.sqrt(2)))


def test_seeds_to_settle_are_those_of_a_power_calculation() -> None:
    """With s = 0.01 and a difference of 0.01, n = 2 (1.645 + 0.842)^2 + 1 = 13.4."""
    a = np.array([4.49, 4.51]) / 1.0
    scaled = (a - a.mean()) / a.std(ddof=1) * 0.01
    evidence = findings.lower(scaled + 4.49, scaled + 4.50, MARGIN)
    assert evidence.seeds == 14
