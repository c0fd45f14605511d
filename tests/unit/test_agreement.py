"""A published number is judged as one more observation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ptbench.analysis.agreement import (
    Published,
    best_reading,
    coefficient_of_variation,
    correlate,
    judge,
    judge_published,
    prediction_interval,
)
from ptbench.analysis.published import PublishedValue
from ptbench.configuration.papers import parse_row

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


@pytest.mark.parametrize("value", [4.5, 4.51, 4.6])
def test_one_seed_has_no_interval_and_tells_nothing(value: float) -> None:
    assert judge([4.5], Published(value), MARGIN).verdict == "cannot tell"
    assert judge([4.5] * 3, Published(value), MARGIN).verdict == "cannot tell"


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


def published(value: float, **given: object) -> PublishedValue:
    content = {
        "experiment": "e", "variant": "v", "framework": None, "devices": 1,
        "metric": "valid_perplexity", "source": "s", "locator": "Table 1", "note": "",
    }  # fmt: skip
    return PublishedValue.model_validate({**content, "value": value, **given})


def verdict(given: PublishedValue, ours: list[float], over: list[float] | None = None) -> str:
    return judge_published(given, ours, over or [], MARGIN).verdict


@pytest.mark.parametrize(
    ("kind", "bound", "ours", "expected"),
    [
        ("above", 3000, [4000, math.inf, 3001], "reproduced"),
        ("above", 3000, [140, 141, 139], "not reproduced"),
        ("above", 3000, [140, 4000, 139], "cannot tell"),
        ("below", 130, [100, 110, 120], "reproduced"),
        ("below", 130, [math.inf, 140, 150], "not reproduced"),
        ("diverges", math.inf, [math.inf, math.inf], "reproduced"),
        ("diverges", math.inf, [100, 1e5], "not reproduced"),
        ("diverges", math.inf, [100, math.inf], "cannot tell"),
        ("diverges", math.inf, [], "cannot tell"),
    ],
)
def test_a_bound_or_divergence_holds_if_it_does_for_all_seeds(
    kind: str, bound: float, ours: list[float], expected: str
) -> None:
    assert verdict(published(bound, kind=kind), ours) == expected


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [(2.0, "reproduced"), (2.2, "not reproduced")],
)
def test_a_ratio_is_judged_by_the_runs_of_each_seed(ratio: float, expected: str) -> None:
    """Runs of 10, 20 and 40 s take twice as long as 5, 10 and 20 s, give or take one percent."""
    given = published(ratio, metric="total_seconds", over=parse_row("w"))
    assert verdict(given, [10.0, 20.2, 39.6], [5.0, 10.0, 20.0]) == expected


def test_times_of_other_hardware_are_judged_only_as_ratios() -> None:
    assert verdict(published(10, metric="total_seconds"), [10.0, 10.0]) == "other hardware"


def test_a_count_is_reproduced_if_it_rounds_to_the_printed_digits() -> None:
    millions = {"metric": "parameters", "rounding": 0.5e6}
    assert verdict(published(16e6, **millions), [16_395_200.0] * 3) == "reproduced"
    assert verdict(published(16e6, **millions), [17_395_200.0] * 3) == "not reproduced"
    assert verdict(published(16e6, **millions), [16_395_200.0]) == "reproduced"  # needs one seed


def test_one_seed_s_epochs_are_no_certain_count() -> None:
    epochs = {"metric": "epochs", "rounding": 0.5}
    assert verdict(published(39, **epochs), [39.0]) == "cannot tell"
    assert verdict(published(39, **epochs), [39.0, 39.0]) == "reproduced"
    assert verdict(published(41, **epochs), [39.0, 39.0]) == "not reproduced"


def test_seeds_that_diverged_reproduce_no_number() -> None:
    assert verdict(published(100), [math.inf, math.inf]) == "not reproduced"
    assert verdict(published(100), [100.0, math.inf]) == "cannot tell"


def test_a_number_counts_by_the_reading_that_fits_best() -> None:
    far, near = published(130), published(100)
    ours = [99.9, 100.0, 100.1]
    judged = [judge_published(each, ours, [], MARGIN) for each in (far, near)]
    assert best_reading([each.verdict for each in judged]) == 1


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
