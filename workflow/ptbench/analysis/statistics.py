"""Statistics of a few seeds: intervals, tests, effect sizes and verdicts, as functions of numbers.

One number for each seed enters: its mean negative log-likelihood [nats per token]. Tests are made
on that scale, where the noise between seeds is closest to normal. Numbers that the data cannot give
are None, never nan.

Two frameworks whose runs of one seed share initial values and batches, and draw no dropout masks,
are compared seed by seed (paired). Where dropout draws differ by framework, the samples are
independent (Welch).

Student's distribution is that of `scipy.special`: the import of `scipy.stats` would
take longer than all tests of an experiment.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from functools import lru_cache
from math import comb, sqrt
from typing import Literal, NamedTuple

import numpy as np
import scipy  # its stats are imported where they are used, which takes a second
from numpy.typing import ArrayLike, NDArray
from pydantic import Field
from scipy import special

from ptbench.model.recipe import Model

CONFIDENCE = 0.95  # of every interval
SIGNIFICANCE = 0.05  # of every test
MAXIMUM_SEEDS = 100  # the most seeds that it is worth asking for
PERMUTATION_P = 0.01  # a permutation test is made only if its smallest possible p is below this
EXACT_PERMUTATIONS = 5_000  # as many ways are counted at once; more are left to SciPy
MAXIMUM_PERMUTATIONS = 200_000  # exact up to C(20, 10) = 184,756: ten seeds on each side

Verdict = Literal["equivalent", "different", "inconclusive"]
Sample = NDArray[np.float64]


class MeanTest(Model):
    """A t test of two means, the interval of their difference, and the test of equivalence."""

    kind: Literal["paired", "Welch"] = Field(description="Paired t test, or Welch's.")
    difference: float = Field(description="mean(a) - mean(b).")
    low: float = Field(description="Lower end of the 95 % interval of the difference.")
    high: float = Field(description="Upper end of the 95 % interval of the difference.")
    t: float = Field(description="Test statistic.")
    degrees_of_freedom: float = Field(description="Pairs less one; or after Welch.")
    p: float = Field(description="Two-sided p value of equal means, not adjusted.")
    p_equivalence: float = Field(description="p value of TOST against the margin, not adjusted.")


class Difference(Model):
    """How far apart two samples of mean nll are, and what may be said about it."""

    n_a: int = Field(description="Seeds of a; in a paired test, those that b has too.")
    n_b: int = Field(description="Seeds of b.")
    difference: float | None = Field(description="mean(a) - mean(b) [nats per token].")
    test: MeanTest | None = Field(description="The t test, where one can be made.")
    p_holm: float | None = Field(description="p of equal means after Holm's correction.")
    p_equivalence: float | None = Field(description="p of TOST; None if a seed failed.")
    p_equivalence_holm: float | None = Field(description="The same after Holm's correction.")
    p_permutation: float | None = Field(description="Exact test, where seeds are enough.")
    hedges_g: float | None = Field(description="Standardised difference, small-sample corrected.")
    verdict: Verdict = Field(description="equivalent, different or inconclusive.")
    reason: str = Field(description="The reason for the verdict, in a few words.")


class Pair(NamedTuple):
    """Two samples to compare."""

    a: Mapping[int, float]  # mean nll of each seed [nats per token]; may be empty
    b: Mapping[int, float]
    paired: bool = False  # whether equal seeds belong together
    complete: bool = True  # whether every planned seed of both ended well

    def samples(self) -> tuple[Sample, Sample]:
        """Return the values of both sides; of a paired comparison, of the seeds both have."""
        if not self.paired:
            return as_sample(list(self.a.values())), as_sample(list(self.b.values()))
        seeds = sorted(self.a.keys() & self.b.keys())
        return as_sample([self.a[s] for s in seeds]), as_sample([self.b[s] for s in seeds])


def as_sample(values: ArrayLike) -> Sample:
    """Return the values as a one-dimensional float64 array."""
    return np.asarray(values, dtype=np.float64).reshape(-1)


def has_spread(sample: Sample, scale: float | None = None) -> bool:
    """Return whether two values differ by more than rounding.

    Args:
        sample: the values.
        scale: size of the numbers that they were computed from; None: their own.
    """
    if len(sample) < 2:
        return False
    size = float(np.max(np.abs(sample))) if scale is None else scale
    return float(np.ptp(sample)) > 1e-12 * size


def is_constant(a: Sample, b: Sample) -> bool:
    """Return whether the differences of pairs are alike but for rounding."""
    return not has_spread(a - b, float(np.max(np.abs([a, b]))))


def t_interval(values: ArrayLike, confidence: float = CONFIDENCE) -> tuple[float, float] | None:
    """Return the interval of the mean of a normal sample with unknown variance.

    mean ± t(n - 1) · s / √n: Student (1908), "The probable error of a mean", Biometrika 6, 1-25.

    Returns:
        The two ends; None from fewer than two values, or from values without any spread.
    """
    sample = as_sample(values)
    if not has_spread(sample):
        return None
    mean, error = float(sample.mean()), float(sample.std(ddof=1)) / sqrt(len(sample))
    half = t_quantile((1 + confidence) / 2, len(sample) - 1) * error
    return mean - half, mean + half


def t_quantile(probability: float, degrees_of_freedom: float) -> float:
    """Return the quantile of Student's distribution."""
    return float(special.stdtrit(degrees_of_freedom, probability))


def t_upper(t: float, degrees_of_freedom: float) -> float:
    """Return the probability that Student's t is larger."""
    return float(special.stdtr(degrees_of_freedom, -t))


def welch(parts: Sequence[tuple[float, int]]) -> tuple[float, float]:
    """Return the standard error of a sum or difference of means, and its degrees of freedom.

    Welch (1947) and Satterthwaite (1946).

    Args:
        parts: the sample variance and the size of each sample; not all variances are zero.
    """
    errors = [variance / n for variance, n in parts]
    total = sum(errors)
    freedom = total**2 / sum(e**2 / (n - 1) for e, (_, n) in zip(errors, parts, strict=True))
    return sqrt(total), freedom


def welch_difference(a: Sample, b: Sample) -> tuple[float, float, float]:
    """Return mean(a) - mean(b), its standard error and its degrees of freedom, after Welch.

    SciPy's ttest_ind takes a hundred times as long; a study needs thousands of these.

    Args:
        a: at least two values.
        b: at least two values; either side has a spread.
    """
    error, freedom = welch([(float(s.var(ddof=1)), len(s)) for s in (a, b)])
    return float(a.mean() - b.mean()), error, freedom


def t_test(a: ArrayLike, b: ArrayLike, margin: float, paired: bool = False) -> MeanTest | None:
    """Test whether two means are equal, and whether they are equivalent.

    Paired, the t test of the differences of a[i] and b[i]. Otherwise Welch's, which does not assume
    equal variances: Welch (1947), "The generalization of 'Student's' problem when several different
    population variances are involved", Biometrika 34, 28-35.

    Equivalence is two one-sided tests (TOST) of a difference of -margin and of +margin: Schuirmann
    (1987), "A comparison of the two one-sided tests procedure and the power approach", Journal of
    Pharmacokinetics and Biopharmaceutics 15, 657-680. Its p is the larger of the two, below 0.05
    exactly when the 90 % interval of the difference lies within ± margin.

    Returns:
        None with fewer than two values on a side or no spread to judge the difference by.
    """
    first, second = as_sample(a), as_sample(b)
    if min(len(first), len(second)) < 2:
        return None
    if paired:
        if is_constant(first, second):
            return None
        differences = first - second
        difference = float(differences.mean())
        error = float(differences.std(ddof=1)) / sqrt(len(differences))
        freedom = float(len(differences) - 1)
    else:
        if not (has_spread(first) or has_spread(second)):
            return None
        difference, error, freedom = welch_difference(first, second)
    half = t_quantile((1 + CONFIDENCE) / 2, freedom) * error
    return MeanTest(
        kind="paired" if paired else "Welch",
        difference=difference,
        low=difference - half,
        high=difference + half,
        t=difference / error,
        degrees_of_freedom=freedom,
        p=2 * t_upper(abs(difference) / error, freedom),
        p_equivalence=t_upper((margin - abs(difference)) / error, freedom),
    )


def hedges_g(a: ArrayLike, b: ArrayLike) -> float | None:
    """Return the difference of the means in pooled standard deviations, for small samples.

    Hedges (1981), "Distribution theory for Glass's estimator of effect size and related
    estimators", Journal of Educational Statistics 6, 107-128, with his approximate correction.

    Returns:
        None where either side has fewer than two values or neither side has any spread.
    """
    first, second = as_sample(a), as_sample(b)
    if min(len(first), len(second)) < 2 or not (has_spread(first) or has_spread(second)):
        return None
    freedom = len(first) + len(second) - 2
    squares = sum(float(s.var(ddof=1)) * (len(s) - 1) for s in (first, second))
    difference = float(first.mean() - second.mean())
    return (1 - 3 / (4 * freedom - 1)) * difference / sqrt(squares / freedom)


def permutation_p(a: ArrayLike, b: ArrayLike, paired: bool = False) -> float | None:
    """Return the two-sided p value of an exact permutation test of the difference of the means.

    The share of all ways of dealing the values to the two sides, or of exchanging the two values of
    a pair (sign flips), whose means are at least as far apart: Fisher (1935), "The Design of
    Experiments", section 21. Above 200,000 ways, a fixed random set of so many.

    Returns:
        None without any spread, and with so few seeds that no p below 0.01 is possible: fewer than
        five on each side, or eight pairs.
    """
    first, second = as_sample(a), as_sample(b)
    ways = 2 ** len(first) if paired else comb(len(first) + len(second), len(first))
    if 2 / ways >= PERMUTATION_P or not has_spread(np.concatenate([first, second])):
        return None

    if ways <= EXACT_PERMUTATIONS:
        if paired:
            distances = np.abs(_signs(len(first)) @ (first - second)) / len(first)
        else:
            values = np.concatenate([first, second])
            chosen = values[_ways(len(values), len(first))].mean(axis=1)
            others = (values.sum() - chosen * len(first)) / len(second)
            distances = np.abs(chosen - others)
        seen = abs(float(first.mean() - second.mean()))
        rounding = 1e-12 * float(np.max(np.abs([*first, *second])))
        return float(np.mean(distances >= seen - rounding))

    def distance(x: Sample, y: Sample, axis: int) -> Sample:
        return np.abs(x.mean(axis=axis) - y.mean(axis=axis))

    result = scipy.stats.permutation_test(
        (first, second),
        distance,
        permutation_type="samples" if paired else "independent",
        n_resamples=MAXIMUM_PERMUTATIONS,
        alternative="greater",
        vectorized=True,
        batch=10_000,
        rng=np.random.default_rng(0),
    )
    return float(result.pvalue)


@lru_cache
def _ways(total: int, first: int) -> NDArray[np.intp]:
    """Return every way to choose the first side's places among all [ways, first]."""
    return np.array(list(itertools.combinations(range(total), first)))


@lru_cache
def _signs(pairs: int) -> Sample:
    """Return every way to exchange the values of pairs, as signs of their differences."""
    return np.array(list(itertools.product((1.0, -1.0), repeat=pairs)))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjust p values so that any false rejection among them has probability 0.05 at most.

    Holm (1979), "A simple sequentially rejective multiple test procedure", Scandinavian Journal of
    Statistics 6, 65-70. Tests that could not be made are None and not part of the family.
    """
    made = as_sample([p for p in p_values if p is not None])
    order = np.argsort(made)
    steps = (len(made) - np.arange(len(made))) * made[order]
    adjusted = np.empty_like(made)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    found = iter(adjusted.tolist())
    return [None if p is None else next(found) for p in p_values]


def verdict(p_different: float | None, p_equivalent: float | None) -> Verdict:
    """Return what may be said of two means; the first of these that holds.

    1. `equivalent`: a difference as large as the margin is rejected (p < 0.05). The t test may
       detect some difference at once: it is smaller than what was declared, before looking, to
       matter (Lakens 2017, "Equivalence tests", Social Psychological and Personality Science 8,
       355-362, figure 1).
    2. `different`: equality is rejected (p < 0.05).
    3. `inconclusive`: neither, or no test could be made.
    """
    if p_equivalent is not None and p_equivalent < SIGNIFICANCE:
        return "equivalent"
    if p_different is not None and p_different < SIGNIFICANCE:
        return "different"
    return "inconclusive"


def joint_equivalence_p(p_values: Sequence[float | None]) -> float | None:
    """Return the p value of the one claim that all pairs are equivalent: the largest of them.

    An intersection-union test needs no correction: Berger (1982), "Multiparameter hypothesis
    testing and acceptance sampling", Technometrics 24, 295-300.

    Returns:
        None if there is no pair, or any of them could not be tested.
    """
    made = [p for p in p_values if p is not None]
    return max(made) if made and len(made) == len(p_values) else None


def compare_pairs(pairs: Sequence[Pair], margin: float) -> list[Difference]:
    """Compare the two samples of each pair; all pairs together are one family of tests.

    Both questions are corrected. Equal means are rejected after Holm. That all pairs are equivalent
    is one claim (`joint_equivalence_p`); if it fails, single pairs are equivalent after Holm. A
    pair with a failed seed is never equivalent, because the seeds that are left were selected by
    their outcome. Pairs of seeds that all differ by the same amount allow no t test; within the
    margin they are equivalent without doubt.

    Args:
        pairs: what to compare.
        margin: largest difference that does not matter [nats per token].
    """
    samples = [pair.samples() for pair in pairs]
    tests = [t_test(*s, margin, pair.paired) for s, pair in zip(samples, pairs, strict=True)]
    p_holm = holm([test.p if test else None for test in tests])
    p_equivalence = [
        _p_equivalence(test, pair, *of, margin) if pair.complete else None
        for test, pair, of in zip(tests, pairs, samples, strict=True)
    ]
    p_equivalence_holm = holm(p_equivalence)
    joint = joint_equivalence_p(p_equivalence)
    together = joint is not None and joint < SIGNIFICANCE
    differences = []
    for i, (pair, (a, b), test) in enumerate(zip(pairs, samples, tests, strict=True)):
        found = verdict(p_holm[i], (p_equivalence if together else p_equivalence_holm)[i])
        differences.append(
            Difference(
                n_a=len(a),
                n_b=len(b),
                difference=float(a.mean() - b.mean()) if len(a) and len(b) else None,
                test=test,
                p_holm=p_holm[i],
                p_equivalence=p_equivalence[i],
                p_equivalence_holm=p_equivalence_holm[i],
                p_permutation=permutation_p(a, b, pair.paired),
                hedges_g=hedges_g(a, b),
                verdict=found,
                reason=_reason(found, min(len(a), len(b)), test, p_holm[i], pair),
            )
        )
    return differences


def _p_equivalence(
    test: MeanTest | None, pair: Pair, a: Sample, b: Sample, margin: float
) -> float | None:
    if test:
        return test.p_equivalence
    constant = pair.paired and len(a) > 1 and is_constant(a, b)
    return 0.0 if constant and abs(float(a.mean() - b.mean())) < margin else None


def _reason(
    found: Verdict, fewest: int, test: MeanTest | None, p_holm: float | None, pair: Pair
) -> str:
    if fewest == 0:
        return "no valid result on one side"
    if fewest == 1:
        return "one seed on one side: no test is possible"
    if found == "equivalent" and test is None:
        return "every seed differs by the same amount, within the margin"
    if test is None or p_holm is None:
        return "the seeds do not differ at all: no test is possible"
    detected = p_holm < SIGNIFICANCE
    if found == "equivalent":
        return "a difference, smaller than the margin" if detected else "within the margin"
    why = "" if pair.complete else "; a seed has no result, so equivalence is not tested"
    return ("a difference is detected" if detected else "too few seeds to tell") + why
