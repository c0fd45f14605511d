"""Statistics of a few seeds: intervals, tests, effect sizes and verdicts, as functions of numbers.

One number per seed enters: its mean negative log-likelihood [nats per token]. Tests and intervals
are made on that scale, where the noise between seeds is closest to normal, and shown as
perplexities. Reading cells and writing tables live elsewhere.

A number that the data cannot give is None, never nan: an interval from one seed, a test between
samples without any spread.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field
from scipy import special, stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import CompareMeans, DescrStatsW

from ptbench.model.recipe import Model
from ptbench.training.records import perplexity

CONFIDENCE = 0.95  # of every interval
SIGNIFICANCE = 0.05  # of every test
PERMUTATION_SEEDS = 5  # fewer per side cannot reach p < 0.01: 2 / C(8, 4) = 0.029
MAXIMUM_PERMUTATIONS = 200_000  # C(20, 10) = 184,756: exact up to ten seeds a side
DEFAULT_MARGIN = 0.02  # nats per token, 2 % of perplexity: about the spread between two seeds

Verdict = Literal["equivalent", "different", "inconclusive"]
Sample = NDArray[np.float64]


class PerplexitySummary(Model):
    """What the seeds of one row say about one split."""

    n: int = Field(ge=1, description="Seeds.")
    nll: float = Field(description="Mean over seeds [nats per token].")
    nll_std: float | None = Field(description="Sample standard deviation over seeds [nats].")
    perplexity: float = Field(description="exp(nll): the geometric mean of the perplexities.")
    perplexity_std: float | None = Field(
        description="Sample standard deviation of the seeds' perplexities."
    )
    low: float | None = Field(description="Lower end of the 95 % interval of the perplexity.")
    high: float | None = Field(description="Upper end of the 95 % interval of the perplexity.")


class Quartiles(Model):
    """The middle of a set of times or rates, whose outliers are all on one side."""

    n: int = Field(ge=1, description="Values.")
    low: float = Field(description="Lower quartile.")
    median: float = Field(description="Median.")
    high: float = Field(description="Upper quartile.")


class Welch(Model):
    """Welch's t test of two means, and the interval of their difference."""

    difference: float = Field(description="mean(a) - mean(b).")
    low: float = Field(description="Lower end of the 95 % interval of the difference.")
    high: float = Field(description="Upper end of the 95 % interval of the difference.")
    t: float = Field(description="Test statistic.")
    degrees_of_freedom: float = Field(description="After Welch and Satterthwaite.")
    p: float = Field(description="Two-sided p value, not adjusted.")


class Difference(Model):
    """How far apart two samples of mean nll are, and what that allows one to say."""

    n_a: int = Field(description="Seeds of a.")
    n_b: int = Field(description="Seeds of b.")
    difference: float | None = Field(description="mean(a) - mean(b) [nats per token].")
    welch: Welch | None = Field(description="Welch's t test, where one can be made.")
    p_holm: float | None = Field(description="p of Welch's test after Holm's correction.")
    hedges_g: float | None = Field(description="Standardised difference, small-sample corrected.")
    p_permutation: float | None = Field(description="Permutation test, from five seeds a side.")
    p_equivalence: float | None = Field(description="TOST against the margin.")
    verdict: Verdict = Field(description="equivalent, different or inconclusive.")
    reason: str = Field(description="The verdict's ground, in a few words.")


def as_sample(values: ArrayLike) -> Sample:
    """The values as a one-dimensional float64 array."""
    return np.asarray(values, dtype=np.float64).reshape(-1)


def has_spread(sample: Sample) -> bool:
    """Whether at least two values differ by more than rounding."""
    return len(sample) > 1 and float(np.ptp(sample)) > 1e-12 * float(np.max(np.abs(sample)))


def t_interval(values: ArrayLike, confidence: float = CONFIDENCE) -> tuple[float, float] | None:
    """Interval of the mean of a normal sample with unknown variance.

    mean ± t(n - 1) · s / √n with s of n - 1 degrees of freedom: Student (1908), "The probable
    error of a mean", Biometrika 6, 1-25.

    Returns:
        The two ends; None from fewer than two values, or from values without any spread.
    """
    sample = as_sample(values)
    if not has_spread(sample):
        return None
    half = float(
        stats.t.ppf((1 + confidence) / 2, len(sample) - 1) * sample.std(ddof=1) / len(sample) ** 0.5
    )
    return float(sample.mean()) - half, float(sample.mean()) + half


def summarise_perplexity(nlls: ArrayLike) -> PerplexitySummary:
    """Summary of one row from the mean nll of each seed [nats per token].

    The perplexity shown is exp of the mean nll, and the ends of its interval are the exponentiated
    ends of the `t_interval` of the nll, so the interval contains it and is not symmetric. The
    standard deviation is that of the seeds' own perplexities (n - 1 degrees of freedom), because
    it is what other papers print after ±.

    Raises:
        ValueError: without any value.
    """
    sample = as_sample(nlls)
    if not len(sample):
        raise ValueError("a summary needs at least one seed")
    interval = t_interval(sample)
    perplexities = [perplexity(nll) for nll in sample.tolist()]
    several = len(sample) > 1
    return PerplexitySummary(
        n=len(sample),
        nll=float(sample.mean()),
        nll_std=float(sample.std(ddof=1)) if several else None,
        perplexity=perplexity(float(sample.mean())),
        perplexity_std=float(np.std(perplexities, ddof=1)) if several else None,
        low=perplexity(interval[0]) if interval else None,
        high=perplexity(interval[1]) if interval else None,
    )


def quartiles(values: ArrayLike) -> Quartiles | None:
    """Median and quartiles, by linear interpolation; None without any value.

    Definition 7 of Hyndman and Fan (1996), "Sample quantiles in statistical packages", The American
    Statistician 50, 361-365.
    """
    sample = as_sample(values)
    if not len(sample):
        return None
    low, median, high = np.percentile(sample, [25, 50, 75])
    return Quartiles(n=len(sample), low=float(low), median=float(median), high=float(high))


def welch(a: ArrayLike, b: ArrayLike) -> Welch | None:
    """Welch's t test of equal means, which does not assume equal variances.

    Welch (1947), "The generalization of 'Student's' problem when several different population
    variances are involved", Biometrika 34, 28-35.

    Returns:
        None where either side has fewer than two values or neither side has any spread.
    """
    first, second = as_sample(a), as_sample(b)
    means = _compare_means(first, second)
    if means is None:
        return None
    t, p, degrees_of_freedom = means.ttest_ind(usevar="unequal")
    low, high = means.tconfint_diff(alpha=1 - CONFIDENCE, usevar="unequal")
    return Welch(
        difference=float(first.mean() - second.mean()),
        low=float(low),
        high=float(high),
        t=float(t),
        degrees_of_freedom=float(degrees_of_freedom),
        p=float(p),
    )


def equivalence_p(a: ArrayLike, b: ArrayLike, margin: float) -> float | None:
    """p value of the hypothesis that the means differ by `margin` or more: two one-sided tests.

    The larger of the p values of two one-sided Welch tests, of mean(a) - mean(b) <= -margin and
    >= +margin: Schuirmann (1987), "A comparison of the two one-sided tests procedure and the power
    approach", Journal of Pharmacokinetics and Biopharmaceutics 15, 657-680. Below 0.05 exactly
    when the 90 % interval of the difference lies within ± margin.

    Returns:
        None where Welch's test cannot be made.
    """
    means = _compare_means(as_sample(a), as_sample(b))
    return None if means is None else float(means.ttost_ind(-margin, margin, usevar="unequal")[0])


def _compare_means(a: Sample, b: Sample) -> CompareMeans | None:
    if min(len(a), len(b)) < 2 or not (has_spread(a) or has_spread(b)):
        return None
    return CompareMeans(DescrStatsW(a), DescrStatsW(b))


def hedges_g(a: ArrayLike, b: ArrayLike) -> float | None:
    """Difference of the means in pooled standard deviations, corrected for small samples.

    d · J(m) with m = n_a + n_b - 2 and J(m) = Γ(m/2) / (√(m/2) · Γ((m-1)/2)), which makes it
    unbiased: Hedges (1981), "Distribution theory for Glass's estimator of effect size and related
    estimators", Journal of Educational Statistics 6, 107-128, equations 6d and 6e.

    Returns:
        None where either side has fewer than two values or neither side has any spread.
    """
    first, second = as_sample(a), as_sample(b)
    if min(len(first), len(second)) < 2 or not (has_spread(first) or has_spread(second)):
        return None
    m = len(first) + len(second) - 2
    squares = first.var(ddof=1) * (len(first) - 1) + second.var(ddof=1) * (len(second) - 1)
    correction = math.exp(special.gammaln(m / 2) - special.gammaln((m - 1) / 2)) / math.sqrt(m / 2)
    return float((first.mean() - second.mean()) / math.sqrt(squares / m) * correction)


def permutation_p(a: ArrayLike, b: ArrayLike) -> float | None:
    """Two-sided exact permutation test of the difference of the means.

    The share of all C(n_a + n_b, n_a) ways of dealing the values to the two sides whose means are
    at least as far apart: Fisher (1935), "The Design of Experiments", section 21; Pitman (1937),
    Supplement to the Journal of the Royal Statistical Society 4, 119-130. Above ten seeds a side,
    a fixed random set of 200,000 of them.

    Returns:
        None with fewer than five values on either side, or without any spread.
    """
    first, second = as_sample(a), as_sample(b)
    if min(len(first), len(second)) < PERMUTATION_SEEDS:
        return None
    if not has_spread(np.concatenate([first, second])):
        return None

    def distance(x: Sample, y: Sample, axis: int) -> Sample:
        return np.abs(x.mean(axis=axis) - y.mean(axis=axis))

    result = stats.permutation_test(
        (first, second),
        distance,
        n_resamples=MAXIMUM_PERMUTATIONS,
        alternative="greater",
        vectorized=True,
        batch=10_000,
        rng=np.random.default_rng(0),
    )
    return float(result.pvalue)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """p values adjusted so that any false rejection among them has probability 0.05 at most.

    Holm (1979), "A simple sequentially rejective multiple test procedure", Scandinavian Journal of
    Statistics 6, 65-70. Tests that could not be made are None and not part of the family.
    """
    made = [p for p in p_values if p is not None]
    if not made:
        return list(p_values)
    adjusted = iter(multipletests(made, alpha=SIGNIFICANCE, method="holm")[1].tolist())
    return [None if p is None else next(adjusted) for p in p_values]


def verdict(p_holm: float | None, p_equivalence: float | None) -> Verdict:
    """What may be said of two means; the first of these that holds.

    1. `equivalent`: TOST rejects a difference as large as the margin (p < 0.05). That Welch's test
       may at once detect some difference does not matter: it is smaller than what was declared,
       before looking, to be of interest (Lakens 2017, "Equivalence tests", Social Psychological
       and Personality Science 8, 355-362, figure 1).
    2. `different`: Welch's test rejects equality after Holm's correction (p < 0.05).
    3. `inconclusive`: neither, or no test could be made. The seeds are too few to tell.

    TOST is not corrected: the claim of interest, that all pairs are equivalent, is then an
    intersection-union test, whose level is that of its parts (Berger 1982, Technometrics 24, 295).
    """
    if p_equivalence is not None and p_equivalence < SIGNIFICANCE:
        return "equivalent"
    if p_holm is not None and p_holm < SIGNIFICANCE:
        return "different"
    return "inconclusive"


def compare_pairs(
    pairs: Sequence[tuple[ArrayLike, ArrayLike]], margin: float = DEFAULT_MARGIN
) -> list[Difference]:
    """Compare the two samples of each pair; all of them are one family for Holm's correction.

    Args:
        pairs: mean nll of each seed, on either side [nats per token]; a side may be empty.
        margin: largest difference that does not matter [nats per token].
    """
    samples = [(as_sample(a), as_sample(b)) for a, b in pairs]
    tests = [welch(a, b) for a, b in samples]
    adjusted = holm([None if test is None else test.p for test in tests])
    differences = []
    for (a, b), test, p_holm in zip(samples, tests, adjusted, strict=True):
        p_equivalence = equivalence_p(a, b, margin)
        differences.append(
            Difference(
                n_a=len(a),
                n_b=len(b),
                difference=float(a.mean() - b.mean()) if len(a) and len(b) else None,
                welch=test,
                p_holm=p_holm,
                hedges_g=hedges_g(a, b),
                p_permutation=permutation_p(a, b),
                p_equivalence=p_equivalence,
                verdict=verdict(p_holm, p_equivalence),
                reason=_reason(a, b, p_holm, p_equivalence),
            )
        )
    return differences


def _reason(a: Sample, b: Sample, p_holm: float | None, p_equivalence: float | None) -> str:
    fewest = min(len(a), len(b))
    if fewest == 0:
        return "no valid result on one side"
    if fewest == 1:
        return "one seed on one side: no test is possible"
    if p_holm is None or p_equivalence is None:
        return "the seeds do not differ at all: no test is possible"
    detected = p_holm < SIGNIFICANCE
    if p_equivalence < SIGNIFICANCE:
        return "a difference, smaller than the margin" if detected else "within the margin"
    return "a difference is detected" if detected else "too few seeds to tell"
