"""Pairwise covering designs: few cases in which any two levels of any two factors meet.

Most faults show with one level of one factor, or with two levels together, so a test of all pairs
finds almost what a test of the whole product finds (Kuhn, Wallace and Gallo 2004, "Software fault
interactions and implications for software testing", IEEE TSE 30(6)).
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Case = dict[str, Any]  # factor: level
Pair = frozenset[tuple[str, Any]]

CANDIDATES = 3  # from which each case is chosen; more hardly make the design smaller


def pairs(case: Mapping[str, Any]) -> set[Pair]:
    """Return every pair of two factors' levels in a case."""
    return {frozenset(two) for two in itertools.combinations(case.items(), 2)}


def covering_design(
    factors: Mapping[str, Sequence[Any]], allowed: Callable[[Case], bool]
) -> list[Case]:
    """Return cases that together contain every pair of levels which a case can have.

    Greedy, as AETG (Cohen, Dalal, Fredman and Patton 1997, IEEE TSE 23(7)): each case starts from a
    pair that is missing, and each other factor gets the level that adds most missing pairs. The
    same arguments always give the same cases.

    Args:
        factors: the levels of each factor.
        allowed: whether levels may meet. It is asked of incomplete cases too, and must then say
            whether the case can still be completed.
    """
    meetings = (
        zip((one, other), levels, strict=True)
        for one, other in itertools.combinations(factors, 2)
        for levels in itertools.product(factors[one], factors[other])
    )
    # a dictionary, because the order of a set is not the same in every process
    missing = {pair: None for pair in map(frozenset, meetings) if allowed(dict(pair))}
    choose, cases = random.Random(1), []
    while missing:
        start = dict(next(iter(missing)))
        candidates = [
            _completed(start, factors, allowed, missing, choose) for _ in range(CANDIDATES)
        ]
        case = max(candidates, key=lambda candidate: len(pairs(candidate) & missing.keys()))
        cases.append({factor: case[factor] for factor in factors})
        for pair in pairs(case):
            missing.pop(pair, None)
    return cases


def _completed(
    start: Case,
    factors: Mapping[str, Sequence[Any]],
    allowed: Callable[[Case], bool],
    missing: Mapping[Pair, None],
    choose: random.Random,
) -> Case:
    """Return a complete case that contains the start, by factors in random order."""
    case = dict(start)
    for factor in choose.sample(list(factors), len(factors)):
        if factor in case:
            continue
        levels = choose.sample(list(factors[factor]), len(factors[factor]))

        def gain(level: Any, factor: str = factor) -> int:
            return sum(frozenset([(factor, level), other]) in missing for other in case.items())

        possible = [level for level in levels if allowed(case | {factor: level})]
        case[factor] = max(possible, key=gain)
    return case
