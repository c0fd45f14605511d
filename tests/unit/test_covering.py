"""The covering design of the cases: any two levels that can meet do, in few cases."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from tests.support.cases import FACTORS, allowed, case_of, covering_cases, levels_of
from tests.support.covering import covering_design, pairs

from ptbench.backends import FRAMEWORKS

PLAINEST = {factor: next(iter(levels)) for factor, levels in FACTORS.items()}
# The factors that `allowed` looks at.
CONSTRAINED = ("kernel", "rnn", "weights", "output", "softmax bias", "dropout")


def combinations(factors: Mapping[str, list[str]]) -> list[dict[str, str]]:
    """Return the whole product of the constrained factors' levels."""
    products = itertools.product(*(factors[factor] for factor in CONSTRAINED))
    return [dict(zip(CONSTRAINED, levels, strict=True)) for levels in products]


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_any_two_levels_meet_in_a_case_or_cannot_meet_at_all(framework: str) -> None:
    factors = levels_of(framework)
    design = covering_design(factors, allowed)
    met = set().union(*map(pairs, design))
    possible = [levels.items() for levels in combinations(factors) if allowed(levels)]
    for one, other in itertools.combinations(factors, 2):
        for a, b in itertools.product(factors[one], factors[other]):
            pair = {(one, a), (other, b)}
            constrained = {(factor, level) for factor, level in pair if factor in CONSTRAINED}
            can_meet = any(constrained <= levels for levels in possible)
            assert (pair in met) == can_meet, pair
    assert all(allowed(levels) for levels in design)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_design_is_small_and_always_the_same_and_has_no_case_twice(framework: str) -> None:
    factors = levels_of(framework)
    design = covering_design(factors, allowed)
    assert len(design) <= 32  # at least 20: five kinds of dropout times four optimizers
    assert design == covering_design(factors, allowed)
    names = [case.name for case in covering_cases(framework)]
    assert len(set(names)) == len(names)


def test_what_is_not_allowed_is_what_a_recipe_refuses_or_what_hides_the_masks() -> None:
    for levels in combinations({factor: list(FACTORS[factor]) for factor in FACTORS}):
        tied = levels["output"].startswith("tied")
        hidden = tied and levels["softmax bias"] == "no softmax bias"
        if hidden and levels["dropout"] != "no dropout":
            assert not allowed(levels)
            continue
        try:
            case_of(PLAINEST | levels)
        except ValidationError:
            assert not allowed(levels)
        else:
            assert allowed(levels)


@given(
    sizes=st.lists(st.integers(2, 4), min_size=2, max_size=6),
    together=st.tuples(st.integers(0, 1), st.integers(0, 1)),
)
def test_a_design_of_any_factors_has_every_pair_but_the_forbidden_one(
    sizes: list[int], together: tuple[int, int]
) -> None:
    factors = {f"factor {number}": range(size) for number, size in enumerate(sizes)}
    forbidden = {("factor 0", together[0]), ("factor 1", together[1])}
    design = covering_design(factors, lambda levels: not forbidden <= levels.items())
    met = set().union(*map(pairs, design))
    for one, other in itertools.combinations(factors, 2):
        for a, b in itertools.product(factors[one], factors[other]):
            pair = {(one, a), (other, b)}
            assert (pair in met) == (pair != forbidden)
