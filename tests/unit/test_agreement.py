"""A published number is judged as one more observation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ptbench.analysis.agreement import (
    Published,
    coefficient_of_variation,
    correlate,
    judge,
    prediction_interval,
)

MARGIN = 0.02


def test_another_run_of_the_same_law_is_outside_in_one_of_twenty() -> None:
    rng = np.random.default_rng(0)
    outside = 0
    for _ in range(4000):
        ours, theirs = rng.normal(4.5, 0.01, 5), float(rng.normal(4.5, 0.01, 3).mean())
        interval = prediction_interval(ours, Published(theirs, runs=3))
        assert interval is not None
        outside += not interval[0] <= theirs <= interval[1]
    assert outside / 4000 == pytest.approx(0.05, abs=0.015)


def test_more_seeds_do_not_reject_everything() -> None:
    """The confidence interval of the mean of 1000 seeds would be ± 0.0006."""
    ours = np.random.default_rng(0).normal(4.5, 0.01, 1000)
    assert judge(ours, Published(4.51), MARGIN).verdict == "reproduced"


@pytest.mark.parametrize(
    ("value", "deviation", "verdict"),
    [
        (4.500, 0.005, "reproduced"),
        (4.518, 0.002, "close"),  # outside, but nearer than the margin
        (4.600, 0.005, "not reproduced"),
        (4.700, 0.100, "cannot tell"),  # inside only because the interval is wide
    ],
)
def test_verdicts(value: float, deviation: float, verdict: str) -> None:
    ours = 4.5 + deviation * np.array([-1.2, -0.4, 0.0, 0.4, 1.2])
    judgement = judge(ours, Published(value), MARGIN)
    assert judgement.verdict == verdict
    assert (judgement.seeds is not None) == (verdict == "cannot tell")


def test_one_seed_has_no_interval() -> None:
    assert judge([4.5], Published(4.51), MARGIN).verdict == "close"
    assert judge([4.5], Published(4.6), MARGIN).verdict == "cannot tell"


def test_our_seeds_cannot_settle_what_the_document_s_own_runs_leave_open() -> None:
    """The mean of its three runs has an error of 0.1, however many seeds we add."""
    ours = 4.5 + 0.05 * np.array([-1.0, 0.0, 1.0])
    judgement = judge(ours, Published(4.6, std=0.1 * math.sqrt(3), runs=3), MARGIN)
    assert (judgement.verdict, judgement.seeds) == ("cannot tell", None)


def test_a_printed_deviation_is_used() -> None:
    ours = 4.5 + 0.001 * np.array([-1.0, 0.0, 1.0])
    narrow = prediction_interval(ours, Published(4.5, None, 5))
    wide = prediction_interval(ours, Published(4.5, 0.05, 5))
    assert narrow is not None
    assert wide is not None
    assert wide[1] - wide[0] > 5 * (narrow[1] - narrow[0])


def test_cv_of_two_numbers_is_belz_s() -> None:
    """Two numbers: c4 = sqrt(2/pi), s = |a - b| / sqrt(2), correction 1 + 1/8."""
    expected = 1.125 * (2 / math.sqrt(2)) / math.sqrt(2 / math.pi) / 101 * 100
    found = coefficient_of_variation([math.log(100), math.log(102)])
    assert found == pytest.approx(expected)


def test_correlations_need_three_pairs_that_vary() -> None:
    assert correlate([1, 2], [1, 2]).pearson is None
    assert correlate([1, 2, 3], [2, 2, 2]).spearman is None
    both = correlate([1, 2, 4], [1, 4, 16])
    assert both.spearman == pytest.approx(1)
    assert both.pearson is not None
    assert both.pearson < 1
