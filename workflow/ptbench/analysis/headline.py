"""What a whole study says about the frameworks: which is faster and by what factor, whether their
perplexities differ, and how much memory they take.

Values in, values out: it reads the `Analysis` of each experiment. A run that experiments share
counts once.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, permutations
from typing import Literal, NamedTuple

import numpy as np

from ptbench.analysis.collect import comparable
from ptbench.analysis.experiment import Analysis, PairResult, RowResult
from ptbench.analysis.statistics import SIGNIFICANCE, joint_equivalence_p, t_interval
from ptbench.backends import FRAMEWORKS
from ptbench.configuration.specification import is_smoke

Groups = Mapping[tuple[str, int], Mapping[str, RowResult]]  # rows by (variant, devices)


class Ratio(NamedTuple):
    """By what factor a framework's numbers are those of a reference: a geometric mean."""

    framework: str
    value: float
    low: float | None  # ends of the 95 % interval, where there are two recipes or two seeds
    high: float | None
    n: int  # what the interval is over
    over: Literal["recipes", "seeds"]


class Comparison(NamedTuple):
    """The frameworks by one metric, each against the one with the lowest numbers."""

    metric: str
    reference: str
    ratios: dict[str, Ratio]  # by framework, highest first, the reference too
    pairs: dict[tuple[str, str], Ratio]  # of the first framework to the second
    apart: tuple[str, ...] = ()  # frameworks whose numbers do not compare with the reference's

    def leaders(self) -> list[str]:
        """Return the framework with the highest numbers, and those that it is not proven above."""
        first, *others = self.ratios
        leads = ((name, self.pairs.get((first, name))) for name in others)
        return [first, *(name for name, lead in leads if lead is None or not (lead.low or 0) > 1)]


def groups_of(analyses: Iterable[Analysis]) -> Groups:
    """Return the usable rows by variant and number of devices, then by framework.

    Of a row that several experiments have, the one with most seeds is taken. Runs of the budget
    `smoke` are left out: nothing is concluded from them.
    """
    groups: dict[tuple[str, int], dict[str, RowResult]] = defaultdict(dict)
    for analysis in analyses:
        for row in analysis.rows:
            own = groups[row.variant, row.devices]
            if is_smoke(row.variant) or not row.usable:
                continue
            if row.framework not in own or row.n_ok > own[row.framework].n_ok:
                own[row.framework] = row
    return groups


def compare_speeds(groups: Groups) -> Comparison | None:
    """Compare training speeds, by the rows whose runs had their machine to themselves.

    Returns:
        None if no two frameworks have such a speed of the same variant and number of devices.
    """
    return compare(groups, "tokens_per_second")


def compare(groups: Groups, metric: str) -> Comparison | None:
    """Compare frameworks by a positive metric, where their rows are `comparable`.

    Of a variant, the number of devices counts on which most frameworks can be compared, and of
    several the least: what more devices bring is another question. The ratio of two frameworks is
    the geometric mean, over recipes, of the ratios of the numbers that stand for their rows
    (medians of speeds), after the geometric mean over the variants of a recipe. Its interval is the
    t interval of the mean logarithm over recipes: fourteen learning rates of one recipe are no
    fourteen models. Where there is one recipe alone, ratio and interval are over the seeds that all
    of its rows have.

    Where not all frameworks can be compared with the reference, the others are `apart`.

    Args:
        groups: as `groups_of` returns them.
        metric: its name.

    Returns:
        None if no two frameworks can be compared.
    """
    rows: dict[tuple[str, str], list[tuple[RowResult, RowResult]]] = defaultdict(list)
    names: set[str] = set()
    chosen: dict[str, list[tuple[RowResult, RowResult]]] = {}
    for (variant, _), own in sorted(groups.items()):
        having = [own[name] for name in FRAMEWORKS if name in own and own[name].value(metric)]
        names |= {row.framework for row in having}
        couples = [both for both in permutations(having, 2) if comparable(metric, both)]
        if len(couples) > len(chosen.get(variant, [])):
            chosen[variant] = couples
    for a, b in chain(*chosen.values()):
        rows[a.framework, b.framework].append((a, b))
    if not rows:
        return None
    together = _largest_group(rows)
    pairs = {
        couple: _ratio(couple[0], both, metric)
        for couple, both in rows.items()
        if couple[0] in together
    }
    standing: dict[str, list[float]] = defaultdict(list)
    for (name, _), ratio in pairs.items():
        standing[name].append(math.log(ratio.value))
    reference = min(standing, key=lambda framework: float(np.mean(standing[framework])))
    ratios = [pairs[name, reference] for name in standing if (name, reference) in pairs]
    ratios.append(Ratio(reference, 1.0, None, None, 0, "recipes"))
    ratios.sort(key=lambda ratio: -ratio.value)
    by_name = {ratio.framework: ratio for ratio in ratios}
    apart = tuple(name for name in FRAMEWORKS if name in names - by_name.keys())
    return Comparison(metric, reference, by_name, pairs, apart=apart)


def _largest_group(couples: Iterable[tuple[str, str]]) -> set[str]:
    """Return the largest set of frameworks that couples connect; the first of equal ones."""
    groups: list[set[str]] = []
    for couple in couples:
        touched = [group for group in groups if group & set(couple)]
        groups = [group for group in groups if group not in touched]
        groups.append(set(couple).union(*touched))
    return max(groups, key=len)


def _ratio(framework: str, rows: Sequence[tuple[RowResult, RowResult]], metric: str) -> Ratio:
    logs, over = _logs(rows, metric)
    low, high = t_interval(logs) or (None, None)
    return Ratio(
        framework,
        math.exp(np.mean(logs)),
        None if low is None else math.exp(low),
        None if high is None else math.exp(high),
        len(logs),
        over,
    )


def _logs(
    rows: Sequence[tuple[RowResult, RowResult]], metric: str
) -> tuple[list[float], Literal["recipes", "seeds"]]:
    """Return the log ratios of a to b: one for each recipe, or for each seed of the only one."""
    recipes: dict[str, list[float]] = defaultdict(list)
    seeds: dict[int, list[float]] = defaultdict(list)
    for a, b in rows:
        first, second = a.value(metric), b.value(metric)
        assert first
        assert second
        recipes[a.variant.partition("+")[0]].append(math.log(first / second))
        own = [row.good_seeds(metric) for row in (a, b)]
        for seed in own[0].keys() & own[1].keys():
            seeds[seed].append(math.log(own[0][seed] / own[1][seed]))
    shared = [logs for _, logs in sorted(seeds.items()) if len(logs) == len(rows)]
    if len(recipes) == 1 and shared:
        return [float(np.mean(logs)) for logs in shared], "seeds"
    return [float(np.mean(logs)) for logs in recipes.values()], "recipes"


class Couple(NamedTuple):
    """Two frameworks over all variants and numbers of devices."""

    a: str
    b: str
    verdicts: Counter[str]
    difference: float | None  # mean over them of nll(a) - nll(b) [nats]
    largest: float | None  # the one that is furthest from zero


class Perplexities(NamedTuple):
    """Whether perplexity depends on the framework."""

    verdicts: Counter[str]  # of all pairs
    couples: dict[tuple[str, str], Couple]  # in the order of the frameworks
    different: list[tuple[Analysis, PairResult]]
    p: float | None  # that some pair is not equivalent; None: cannot be told
    margins: list[float]  # of equivalence [nats]
    missing: int = 0  # pairs of which a side has no perplexity: not run, or too many seeds failed

    @property
    def all_equivalent(self) -> bool:
        """Return whether the one claim holds that every pair is equivalent."""
        return self.p is not None and self.p < SIGNIFICANCE


def compare_perplexities(analyses: Iterable[Analysis]) -> Perplexities:
    """Gather the verdicts of all experiments on pairs of frameworks, each pair of rows once."""
    pairs: dict[tuple[str, int, str, str], tuple[Analysis, PairResult]] = {}
    missing = set()
    for analysis in analyses:
        for pair in analysis.pairs:
            key = (pair.variant, pair.devices, pair.a, pair.b)
            if pair.outcome.difference is None:
                missing.add(key)
            else:
                pairs.setdefault(key, (analysis, pair))
    missing -= pairs.keys()
    couples: dict[tuple[str, str], list[PairResult]] = defaultdict(list)
    for _, pair in pairs.values():
        couples[pair.a, pair.b].append(pair)
    return Perplexities(
        verdicts=Counter(pair.outcome.verdict for _, pair in pairs.values()),
        couples={key: _couple(*key, own) for key, own in couples.items()},
        different=[
            (analysis, pair)
            for analysis, pair in pairs.values()
            if pair.outcome.verdict == "different"
        ],
        p=None
        if missing
        else joint_equivalence_p([pair.outcome.p_equivalence for _, pair in pairs.values()]),
        margins=sorted({analysis.equivalence_margin for analysis, _ in pairs.values()}),
        missing=len(missing),
    )


def _couple(a: str, b: str, pairs: Sequence[PairResult]) -> Couple:
    found = [p.outcome.difference for p in pairs if p.outcome.difference is not None]
    return Couple(
        a,
        b,
        Counter(pair.outcome.verdict for pair in pairs),
        float(np.mean(found)) if found else None,
        max(found, key=abs, default=None),
    )
