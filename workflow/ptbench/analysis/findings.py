"""The tests by which findings of a document are judged, as functions of numbers.

One value for each seed enters: the logarithm of a perplexity, time or rate, so that differences are
ratios. A diverged seed is infinite. `claims.py` reads the findings and gives them their rows; a
finding's p values are adjusted there (Holm), over all findings of a document.

Each test gives a p value for what the finding says, one for its opposite, and whether the observed
effect is larger than the margin. `verdict` makes of them what may be said.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import scipy  # its stats are imported where they are used, which takes a second
from numpy.typing import NDArray
from scipy import special

from ptbench.analysis.statistics import (
    MAXIMUM_SEEDS,
    SIGNIFICANCE,
    Sample,
    as_sample,
    has_spread,
    t_quantile,
    t_upper,
    welch,
    welch_difference,
)

DRAWS = 10_000
PERMUTATIONS = 20_000  # above so many ways to share out the seeds, as many are drawn
EXPONENT_TOLERANCE = 0.25  # an interval wider than ± this proves no power law's exponent
ROUNDING = 1e-9  # of an exponent, where rows lie on a line but for rounding
LEAST_POSITIONS = 3  # of a power law: two leave no freedom to tell whether there is one
MOST_RANKED = 30  # values whose ranks' exact law is computed; of more, the normal approximation
POWER = 0.8  # with which that many seeds would show the difference that was seen

Verdict = Literal["upheld", "contradicted", "cannot tell", "not run"]


class Equal(NamedTuple):
    """Two rows that differ by less than the margin, where a finding says that they differ."""

    difference: float  # in the finding's direction [nats, or log ratio]
    margin: float


class Evidence(NamedTuple):
    """What the seeds say about one comparison."""

    effect: float | None  # in the finding's direction [nats, or log ratio]; None: no number
    p: float | None  # of the hypothesis that the finding is wrong; small: it is right
    p_opposite: float | None  # of the hypothesis that its opposite is wrong; small: the opposite is
    seeds: int | None = None  # a side that would settle it
    least: float = 0.0  # the smallest effect that counts, on the scale of `effect`
    equal: Equal | None = None  # where the opposite is that two rows are equal
    is_room: bool = False  # whether `effect` is what is left to the margin


NOTHING = Evidence(None, None, None)


def lower(a: Sequence[float], b: Sequence[float], margin: float) -> Evidence:
    """Test that a is lower than b (T1).

    One-sided Welch tests in both directions. Where a side has diverged seeds, which have no mean,
    it is the exact one-sided test of Mann and Whitney (1947). The opposite of the finding is that
    a is higher, or that the two differ by less than the margin (two one-sided tests): either
    contradicts it.
    """
    first, second = as_sample(a), as_sample(b)
    if min(len(first), len(second)) < 2:
        return NOTHING
    if not np.isfinite(np.concatenate([first, second])).all():
        return Evidence(
            None, _mann_whitney(first, second, "less"), _mann_whitney(first, second, "greater")
        )
    if not (has_spread(first) or has_spread(second)):
        return Evidence(float(second.mean() - first.mean()), None, None, least=margin)
    effect, error, freedom = welch_difference(second, first)
    seeds = _seeds((first, second), abs(effect) - margin)
    return _of_difference(effect, error, freedom, seeds, margin)


def equal(a: Sequence[float], b: Sequence[float], margin: float) -> Evidence:
    """Test that a and b differ by less than the margin (T2): two one-sided Welch tests.

    The opposite is that they differ by more than the margin, in either direction.
    """
    first, second = as_sample(a), as_sample(b)
    if min(len(first), len(second)) < 2:
        return NOTHING
    if not np.isfinite(np.concatenate([first, second])).all():
        p = min(_mann_whitney(first, second, "less"), _mann_whitney(first, second, "greater"))
        return Evidence(None, None, min(1.0, 2 * p))
    if not (has_spread(first) or has_spread(second)):
        room = margin - abs(float(first.mean() - second.mean()))
        return Evidence(room, None, None, is_room=True)
    difference, error, freedom = welch_difference(first, second)
    effect = margin - abs(difference)
    return Evidence(
        effect,
        t_upper(effect / error, freedom),
        min(1.0, 2 * t_upper(-effect / error, freedom)),
        _seeds((first, second), effect),
        is_room=True,
    )


def _of_difference(
    effect: float, error: float, freedom: float, seeds: int | None, margin: float
) -> Evidence:
    """Return the evidence of a difference, whose opposite is the other direction or equality."""
    other_way = t_upper(-effect / error, freedom)
    within = t_upper((margin - abs(effect)) / error, freedom)
    return Evidence(
        effect,
        t_upper(effect / error, freedom),
        min(other_way, within),
        seeds,
        margin,
        Equal(effect, margin) if within < other_way else None,
    )


def all_of(parts: Sequence[Evidence]) -> Evidence:
    """Combine comparisons that must all hold: intersection-union (Berger 1982).

    The finding's p is the largest of its parts'. Any part whose opposite holds contradicts the
    whole, so that p is the smallest, times the number of parts (Bonferroni). The effect is that of
    the part which has least to spare. The seeds settle every part that is open, so there is no
    number where one of these has none.
    """
    if not parts:
        return NOTHING
    ps = [part.p for part in parts]
    opposites = [(part.p_opposite, part.equal) for part in parts if part.p_opposite is not None]
    p_opposite, equal_rows = min(opposites, key=lambda each: each[0], default=(None, None))
    effects = [(p.effect, p.least, p.is_room) for p in parts if p.effect is not None]
    effect, least, is_room = min(
        effects, key=lambda each: each[0] - each[1], default=(None, 0.0, False)
    )
    still_open = [
        part.seeds for part in parts if verdict(part, part.p, part.p_opposite) == "cannot tell"
    ]
    seeds = [each for each in still_open if each is not None]
    return Evidence(
        effect,
        None if None in ps else max(p for p in ps if p is not None),
        None if p_opposite is None else min(1.0, p_opposite * len(parts)),
        max(seeds, default=None) if len(seeds) == len(still_open) else None,
        least,
        equal_rows,
        is_room,
    )


def trend(groups: Sequence[Sequence[float]], direction: Literal["rises", "falls"]) -> Evidence:
    """Test that values rise, or fall, from group to group (T3).

    Jonckheere (1954) and Terpstra (1952): the sum of Mann-Whitney counts over all pairs of groups.
    Its exact law, where no two of at most `MOST_RANKED` values are equal; otherwise the normal
    approximation with the correction for ties of Lehmann (1975, section 5.7). The effect is the
    mean of the last group less that of the first.
    """
    samples = [as_sample(group) for group in groups]
    if len(samples) < 2 or min(map(len, samples)) < 1 or sum(map(len, samples)) < 4:
        return NOTHING
    count = 0.0
    for i, first in enumerate(samples):
        for second in samples[i + 1 :]:
            behind, ahead = second[None, :] < first[:, None], second[None, :] > first[:, None]
            count += float(np.sum(ahead.astype(np.float64) - behind + 1) / 2)
    ends = samples[0].mean(), samples[-1].mean()
    effect = float(ends[1] - ends[0]) if np.isfinite(ends).all() else None
    _, ties = np.unique(np.concatenate(samples), return_counts=True)
    if ties.sum() <= MOST_RANKED and ties.max() == 1:
        at_least = trend_law(tuple(sorted(map(len, samples))))
        rises, falls = at_least[round(count)], at_least[len(at_least) - 1 - round(count)]
    else:
        z = _trend_z(count, np.array([len(sample) for sample in samples], np.float64), ties)
        if z is None:
            return NOTHING
        rises, falls = float(special.ndtr(-z)), float(special.ndtr(z))
    if direction == "rises":
        return Evidence(effect, rises, falls)
    return Evidence(None if effect is None else -effect, falls, rises)


@lru_cache(maxsize=256)
def trend_law(sizes: tuple[int, ...]) -> list[float]:
    """Return the probability that Jonckheere's count is at least 0, 1, 2 ... if there is no trend.

    All orders of the values are equally likely. The number of those that have a count is a
    coefficient of the Gaussian multinomial, the product of (1 - q^j) for j up to the number of
    values over the same products for each group (Andrews 1976, "The theory of partitions",
    theorem 3.6). The law is symmetric, so the same are the probabilities of at most the largest
    count, one less, two less ...

    Args:
        sizes: of the groups, in any order.
    """
    orders, total = [1], 0
    for size in sizes:
        for place in range(1, size + 1):
            total += 1
            # Times (1 - q^total), and over (1 - q^place), which leaves a polynomial.
            orders = [
                a - b for a, b in zip(orders + [0] * total, [0] * total + orders, strict=True)
            ]
            for power in range(place, len(orders)):
                orders[power] += orders[power - place]
            del orders[len(orders) - place :]
    above, every = [0], sum(orders)
    for count in reversed(orders):
        above.append(above[-1] + count)
    return [each / every for each in reversed(above[1:])]


def _trend_z(count: float, sizes: Sample, ties: NDArray[np.intp]) -> float | None:
    """Return how many standard deviations Jonckheere's count is above its mean."""
    n, t = sizes.sum(), ties.astype(np.float64)
    mean = (n**2 - (sizes**2).sum()) / 4
    variance = (
        n * (n - 1) * (2 * n + 5)
        - (sizes * (sizes - 1) * (2 * sizes + 5)).sum()
        - (t * (t - 1) * (2 * t + 5)).sum()
    ) / 72
    if n > 2:
        variance += (
            (sizes * (sizes - 1) * (sizes - 2)).sum()
            * (t * (t - 1) * (t - 2)).sum()
            / (36 * n * (n - 1) * (n - 2))
        )
        variance += (sizes * (sizes - 1)).sum() * (t * (t - 1)).sum() / (8 * n * (n - 1))
    return (count - mean) / math.sqrt(variance) if variance > 0 else None


def saturates(groups: Sequence[Sequence[float]], at: int, margin: float) -> Evidence:
    """Test that no group after number `at` is lower than that one by the margin or more (T3).

    One-sided Welch tests of non-inferiority, all of which must reject; the opposite is that some
    later group is lower by more than the margin.
    """
    parts = []
    reference = as_sample(groups[at])
    for group in groups[at + 1 :]:
        later = as_sample(group)
        if min(len(later), len(reference)) < 2:
            return NOTHING
        if not np.isfinite(np.concatenate([later, reference])).all():
            p = _mann_whitney(later, reference, "greater")
            parts.append(Evidence(None, p, _mann_whitney(later, reference, "less")))
            continue
        if not (has_spread(later) or has_spread(reference)):
            room = margin - float(reference.mean() - later.mean())
            parts.append(Evidence(room, None, None, is_room=True))
            continue
        gain, error, freedom = welch_difference(reference, later)
        effect = margin - gain
        parts.append(
            Evidence(
                effect,
                t_upper(effect / error, freedom),
                t_upper(-effect / error, freedom),
                _seeds((reference, later), effect),
                is_room=True,
            )
        )
    return all_of(parts)


def best_probabilities(groups: Sequence[Sequence[float]]) -> list[float]:
    """Return the probability of each group to have the lowest mean (T4).

    A mean is drawn 10,000 times as sample mean + t(n - 1) s / sqrt(n), what n normal seeds say of
    it (Box and Tiao 1973, "Bayesian Inference in Statistical Analysis", section 2.4). Seeds drawn
    with replacement would vary too little: they call one of two equal groups of five seeds the best
    in 18 studies of 100, and this in 6, where 10 are allowed. A group with diverged seeds has a
    finite mean as often as that many draws with replacement miss all of these.
    """
    rng = np.random.default_rng(0)
    means = np.stack([_means(as_sample(group), rng) for group in groups])
    lowest = means.min(axis=0)
    winners = (means == lowest) & np.isfinite(lowest)
    shared = winners / np.maximum(winners.sum(axis=0), 1)
    return [float(share) for share in shared.mean(axis=1)]


def _means(sample: Sample, rng: np.random.Generator) -> Sample:
    finite = sample[np.isfinite(sample)]
    n = len(finite)
    if not n:
        return np.full(DRAWS, np.inf)
    means = np.full(DRAWS, finite.mean())
    if n > 1:
        means += rng.standard_t(n - 1, DRAWS) * finite.std(ddof=1) / math.sqrt(n)
    means[rng.random(DRAWS) >= (n / len(sample)) ** len(sample)] = np.inf
    return means


def slope_holds(
    positions: Sequence[float],
    groups: Sequence[Sequence[float]],
    slope: float,
    error: float = SIGNIFICANCE,
) -> Verdict:
    """Judge whether the interval of a power law's exponent holds a number (T5).

    The exponent is the slope of a straight line, by least squares, of the rows' mean logarithms on
    those of their positions. What a row is off the line by is common to all of its seeds, so rows
    are the units: with k of them the interval has k - 2 degrees of freedom. One wider than
    ± `EXPONENT_TOLERANCE` that holds the number cannot tell: it holds many others too.

    Args:
        positions: of the rows.
        groups: the logarithms of each row's seeds.
        slope: of the document.
        error: probability that the interval misses the exponent.
    """
    x = np.log(as_sample(positions))
    if len(set(x.tolist())) < LEAST_POSITIONS or not all(len(group) for group in groups):
        return "cannot tell"
    y = np.array([as_sample(group).mean() for group in groups])
    if not np.isfinite(y).all():
        return "cannot tell"
    line = scipy.stats.linregress(x, y)
    half = t_quantile(1 - error / 2, len(y) - 2) * float(line.stderr)
    if abs(float(line.slope) - slope) > half + ROUNDING:
        return "contradicted"
    return "upheld" if half <= EXPONENT_TOLERANCE else "cannot tell"


def beyond(values: Sequence[float], bound: float) -> Verdict:
    """Judge whether every seed is above a bound or diverged; that none is contradicts it."""
    sample = as_sample(values)
    if not len(sample):
        return "not run"
    above = int((sample > bound).sum())
    if above == len(sample):
        return "upheld"
    return "contradicted" if above == 0 else "cannot tell"


def interaction(
    a: Sequence[float], b: Sequence[float], c: Sequence[float], d: Sequence[float], margin: float
) -> Evidence:
    """Test that a - b is lower than c - d (T7): Welch's test of a linear contrast.

    Degrees of freedom are those of Welch (1947) and Satterthwaite (1946) for four samples.
    """
    samples = [as_sample(values) for values in (a, b, c, d)]
    if min(map(len, samples)) < 2 or not all(np.isfinite(s).all() for s in samples):
        return NOTHING
    means = [float(sample.mean()) for sample in samples]
    effect = (means[2] - means[3]) - (means[0] - means[1])
    parts = [(float(s.var(ddof=1)), len(s)) for s in samples]
    if not any(variance for variance, _ in parts):
        return Evidence(effect, None, None, least=margin)
    error, freedom = welch(parts)
    seeds = _seeds(samples, abs(effect) - margin)
    return _of_difference(effect, error, freedom, seeds, margin)


def verdict(evidence: Evidence, p: float | None, p_opposite: float | None) -> Verdict:
    """Return what may be said, from the evidence's p values after Holm's correction."""
    counts = evidence.effect is None or evidence.effect > evidence.least
    if p is not None and p < SIGNIFICANCE and counts:
        return "upheld"
    if p_opposite is not None and p_opposite < SIGNIFICANCE:
        return "contradicted"
    return "cannot tell"


def _mann_whitney(a: Sample, b: Sample, alternative: Literal["less", "greater"]) -> float:
    # Diverged seeds are alike: all larger than any number, none larger than another.
    largest = np.concatenate([a, b])
    largest = largest[np.isfinite(largest)].max(initial=0.0) + 1.0
    first, second = np.minimum(a, largest), np.minimum(b, largest)
    # By default SciPy takes a normal approximation where there are ties.
    exact = scipy.stats.PermutationMethod(n_resamples=PERMUTATIONS, rng=0)
    return float(
        scipy.stats.mannwhitneyu(first, second, alternative=alternative, method=exact).pvalue
    )


def _seeds(samples: Sequence[Sample], distance: float) -> int | None:
    """Return how many seeds of each sample would show with a power of 0.8 what is left open.

    n = (z_0.95 + z_0.8)^2 times the sum of the variances over the square of the distance, the
    variances taken as they are. It is more than there are; None above `MAXIMUM_SEEDS`.

    Args:
        samples: of the means that are added or subtracted.
        distance: from the effect that was seen to the margin.
    """
    if not distance:
        return None
    variance = sum(float(sample.var(ddof=1)) for sample in samples)
    z = float(special.ndtri(1 - SIGNIFICANCE) + special.ndtri(POWER))
    n = math.ceil(z**2 * variance / distance**2) + 1  # one more, for t instead of z
    n = max(n, *(len(sample) + 1 for sample in samples))
    return n if n <= MAXIMUM_SEEDS else None
