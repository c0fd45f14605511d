"""Whether a published number and ours agree: would one more run have given the number?

The 95 % confidence interval of our mean is the wrong question: it shrinks to nothing as seeds are
added, and then rejects every number. The question is whether the published value, the mean of a few
runs, could be another draw from what our seeds are drawn from: a prediction interval (Spence and
Stanley 2016, PLOS ONE 11(9), e0162874; Patil, Peng and Leek 2016, Perspectives on Psychological
Science 11(4), 539-544).

Perplexities are compared as their logarithms [nats], times and rates as logarithms too. A number
that the data cannot give is None, never nan. Bounds, ratios and runs that diverge have rules of
their own: `judge_published`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import scipy  # its stats are imported where they are used, which takes a second

from ptbench.analysis.metrics import METRICS
from ptbench.analysis.published import PublishedValue
from ptbench.analysis.statistics import (
    CONFIDENCE,
    MAXIMUM_SEEDS,
    Sample,
    as_sample,
    has_spread,
    t_quantile,
    welch,
)

TOLERANCE = 0.05  # nats: an interval wider than ± this can hold a number and prove nothing

Agreement = Literal["reproduced", "close", "not reproduced", "cannot tell", "other hardware"]
# Of a number that was judged, and of one that could not be.
PublishedVerdict = Agreement | Literal["reduced budget", "not run"]
FITS: tuple[PublishedVerdict, ...] = (  # from the reading that fits best to the one that fits worst
    "reproduced", "close", "cannot tell", "not reproduced", "other hardware", "reduced budget",
    "not run",
)  # fmt: skip


class Published(NamedTuple):
    """A published number on the scale on which ours is judged."""

    value: float  # log of the perplexity, time or rate
    std: float | None = None  # of the runs it is the mean of, on the same scale
    runs: int = 1  # how many runs it is the mean of


class Judgement(NamedTuple):
    """What came of comparing a published number with ours."""

    verdict: Agreement
    low: float | None = None  # ends of the interval in which the number was to be expected
    high: float | None = None
    seeds: int | None = None  # that would settle it, if it could not be told
    cv: float | None = None  # CV* of {published, ours} [%]
    reason: str | None = None  # why it could not be told, where the numbers do not show it


def judge_published(
    published: PublishedValue, ours: Sequence[float], over: Sequence[float], margin: float
) -> Judgement:
    """Judge a row of `published.csv` by the seeds of our row.

    - A bound: reproduced if all seeds are beyond it, not reproduced if none is.
    - `diverges`: reproduced if all seeds diverged, not reproduced if none did.
    - A ratio: as a number, by the logarithms of the ratios of two runs with one seed.
    - A time, speed or size is `other hardware`, unless it is a ratio.
    - A count that all seeds have alike (`Metric.is_certain`): reproduced if it rounds to the
      printed digits, not reproduced otherwise.
    - Anything else: see `judge_seeds`.

    Args:
        ours: the metric of each seed, in its own unit; infinite if the seed diverged.
        over: that of the row that ours is divided by, in the same order; empty if there is none.
        margin: difference that does not matter [nats, or log ratio].
    """
    if METRICS[published.metric].depends_on_machine and published.over is None:
        return Judgement("other hardware")
    if published.over is not None:
        ours = [a / b if math.isfinite(b) else math.nan for a, b in zip(ours, over, strict=True)]
    if published.kind != "number":
        return _all_or_none([_is_beyond(published, value) for value in ours])
    if published.over is None and METRICS[published.metric].is_certain(ours):
        is_printed = abs(ours[0] - published.value) <= published.rounding
        cv = coefficient_of_variation([math.log(published.value), math.log(ours[0])])
        return Judgement("reproduced" if is_printed else "not reproduced", cv=cv)
    std = None if published.std is None else published.std / published.value  # of the logarithm
    return judge_seeds(
        [math.log(value) for value in ours],
        Published(math.log(published.value), std, published.runs or 1),
        margin,
    )


def _is_beyond(published: PublishedValue, value: float) -> bool:
    if published.kind == "below":
        return value < published.value
    return value == math.inf if published.kind == "diverges" else value > published.value


def _all_or_none(beyond: Sequence[bool]) -> Judgement:
    verdict: Agreement = "cannot tell"
    if beyond and len(set(beyond)) == 1:
        verdict = "reproduced" if beyond[0] else "not reproduced"
    return Judgement(verdict)


def best_reading(verdicts: Sequence[PublishedVerdict]) -> int:
    """Return which of several readings of one printed number fits best; the first if several do."""
    return min(range(len(verdicts)), key=lambda i: FITS.index(verdicts[i]))


def judge_seeds(
    ours: Sequence[float], published: Published, margin: float, confidence: float = CONFIDENCE
) -> Judgement:
    """Judge a number by all seeds that finished; see `judge`.

    A seed that diverged is no such number, so it counts against it: the number is not reproduced
    where all did, and cannot be told where some did.

    Args:
        ours: one value for each seed, on the scale of `published`; not finite if it diverged.
        published: the number.
        margin: difference that does not matter [nats].
        confidence: of the prediction interval.
    """
    finite = sum(map(math.isfinite, ours))
    if ours and not finite:
        return Judgement("not reproduced")
    if finite < len(ours):
        return Judgement("cannot tell", reason="some seeds diverged")
    return judge(ours, published, margin, confidence)


def judge(
    ours: Sequence[float], published: Published, margin: float, confidence: float = CONFIDENCE
) -> Judgement:
    """Judge whether a published number is reproduced.

    - `reproduced`: inside the prediction interval, which is narrower than ± `TOLERANCE`.
    - `close`: outside it, or inside a wide one, but no further from our mean than `margin`.
    - `not reproduced`: outside, and further than `margin`.
    - `cannot tell`: inside, but only because the interval is wide; or there is no interval, from
      one seed or from seeds without any spread, whatever the distance.

    Args:
        ours: one value for each seed, on the scale of `published`.
        published: the number.
        margin: difference that does not matter [nats].
        confidence: of the prediction interval.
    """
    sample = as_sample(ours)
    if not len(sample):
        return Judgement("cannot tell", reason="no seed has its number")
    mean = float(sample.mean())
    difference = abs(published.value - mean)
    cv = coefficient_of_variation([published.value, mean])
    interval = prediction_interval(sample, published, confidence)
    if interval is None:
        why = "one seed gives no interval" if len(sample) == 1 else "seeds without any spread"
        return Judgement("cannot tell", cv=cv, reason=why)
    low, high = interval
    inside = low <= published.value <= high
    if inside and (high - low) / 2 <= TOLERANCE:
        return Judgement("reproduced", low, high, None, cv)
    if difference <= margin:
        return Judgement("close", low, high, None, cv)
    if not inside:
        return Judgement("not reproduced", low, high, None, cv)
    return Judgement("cannot tell", low, high, seeds_to_settle(sample, published, confidence), cv)


def prediction_interval(
    sample: Sample, published: Published, confidence: float = CONFIDENCE
) -> tuple[float, float] | None:
    """Return the interval in which the mean of `published.runs` more runs falls.

    mean ± t(n - 1) s sqrt(1/n + 1/r), with our deviation s for both. Where the document prints a
    deviation, the runs have their own variance: Welch's interval of the difference of two means
    about ours, with the degrees of freedom of Welch and Satterthwaite.

    Returns:
        The two ends; None from fewer than two seeds, or from seeds without any spread.
    """
    if not has_spread(sample):
        return None
    mean, variance = float(sample.mean()), float(sample.var(ddof=1))
    half = half_width(len(sample), variance, published, confidence)
    return mean - half, mean + half


def half_width(
    n: int, variance: float, published: Published, confidence: float = CONFIDENCE
) -> float:
    """Return half the width of the interval from n seeds with that sample variance."""
    if published.std is not None and published.runs > 1:
        error, freedom = welch([(variance, n), (published.std**2, published.runs)])
    else:
        freedom = float(n - 1)
        error = math.sqrt(variance * (1 / n + 1 / published.runs))
    return t_quantile((1 + confidence) / 2, freedom) * error


def seeds_to_settle(
    sample: Sample, published: Published, confidence: float = CONFIDENCE
) -> int | None:
    """Return how many seeds make the interval narrow, or put the number outside it.

    Mean and deviation are taken to stay as they are. None if `MAXIMUM_SEEDS` are not enough.
    """
    variance = float(sample.var(ddof=1))
    difference = abs(published.value - float(sample.mean()))
    for n in range(len(sample) + 1, MAXIMUM_SEEDS + 1):
        half = half_width(n, variance, published, confidence)
        if half <= TOLERANCE or half < difference:
            return n
    return None


def coefficient_of_variation(logarithms: Sequence[float]) -> float | None:
    """Return CV* of repeated measurements [%], from their logarithms.

    The unbiased coefficient of variation of Belz, Popović and Mille (2022, "Quantified
    reproducibility assessment of NLP results", ACL, section 3):
    (1 + 1/(4n)) s* / |mean| x 100, s* being the sample deviation over c4(n), which makes it
    unbiased for normal numbers. It is taken of the measurements, not of their logarithms.
    """
    n = len(logarithms)
    if n < 2:
        return None
    values = np.exp(np.asarray(logarithms, np.float64))
    if not np.isfinite(values).all():
        return None
    c4 = math.sqrt(2 / (n - 1)) * math.exp(math.lgamma(n / 2) - math.lgamma((n - 1) / 2))
    deviation = float(values.std(ddof=1)) / c4
    return (1 + 1 / (4 * n)) * deviation / abs(float(values.mean())) * 100


class Correlation(NamedTuple):
    """How a published table or curve and ours go together."""

    n: int  # numbers that both have
    pearson: float | None
    spearman: float | None


def correlate(published: Sequence[float], ours: Sequence[float]) -> Correlation:
    """Return Pearson's r and Spearman's rho between published numbers and ours.

    These are the type II results of QRA++ (Belz 2025). None from fewer than three pairs, or where
    one side does not vary.
    """
    a, b = np.asarray(published, np.float64), np.asarray(ours, np.float64)
    if len(a) < 3 or not np.ptp(a) or not np.ptp(b):
        return Correlation(len(a), None, None)
    pearson, spearman = scipy.stats.pearsonr(a, b), scipy.stats.spearmanr(a, b)
    return Correlation(len(a), float(pearson.statistic), float(spearman.statistic))
