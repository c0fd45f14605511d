"""Dropout drops what the recipe names, at its rates, anew for each step.

That it multiplies what is kept by 1 / keep, in the right place, is tested in
`parity/test_cases.py`. The masks cannot be seen from outside, but in gradients: see `masks_of`.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from scipy import stats
from tests.support.cases import DROPPING, Case
from tests.support.masks import masks_of, observed_masks
from tests.support.problems import BATCH, TIME, VOCABULARY, new_oracle, random_batch, recipe
from tests.support.remote import Backends

from ptbench.backends.oracle import Masks
from ptbench.model.parameters import kept_weights

LOCKED = recipe(**DROPPING["locked"])

pytestmark = pytest.mark.cases(where=lambda recipe: recipe.drops)


@pytest.fixture
def masks(backends: Backends, framework: str, case: Case) -> list[Masks]:
    """Return the case's masks in its first steps."""
    return observed_masks(backends, framework, case)


def draws(case: Case, masks: Masks) -> list[tuple[float, Any]]:
    """Return rate and kept units of each independent draw of a step: [time or 1, batch, ...].

    The units of a dropped word cannot be seen, so with `word_dropout` those of the embedding's
    output are left out.
    """
    recipe, first = case.recipe, 1 if case.recipe.word_dropout else 0
    units = list(zip(recipe.unit_dropout, masks.units, strict=True))[first:]
    if recipe.mixtures:
        units.append((recipe.latent_dropout, masks.latents))
    if recipe.dropout_kind == "locked":
        units = [(rate, mask[:1]) for rate, mask in units]
    if recipe.recurrent_dropout:
        units += [(recipe.recurrent_dropout, mask[:1]) for mask in masks.recurrent]
    return [(rate, mask > 0) for rate, mask in units if rate]


def assert_share(kept: Any, keep: float) -> None:
    """Fail unless that many of these are kept as independent draws would keep."""
    low, high = stats.binom.interval(1 - 1e-6, kept.size, keep)
    assert low <= kept.sum() <= high


def assert_unrelated(one: Any, one_keep: float, other: Any, other_keep: float) -> None:
    """Fail unless two masks agree as often as independent draws do."""
    chance = one_keep * other_keep + (1 - one_keep) * (1 - other_keep)
    count = min(len(one), len(other))
    agreement = np.mean(one[:count] == other[:count])
    assert abs(agreement - chance) < 6 * math.sqrt(chance * (1 - chance) / count)


def test_units_are_kept_with_the_keep_probability(case: Case, masks: list[Masks]) -> None:
    for place in zip(*(draws(case, each) for each in masks), strict=True):
        assert_share(np.concatenate([mask.ravel() for _, mask in place]), 1 - place[0][0])


@pytest.mark.cases(where=lambda recipe: recipe.weight_dropout > 0)
def test_weights_are_kept_with_the_keep_probability_anew_for_each_step_and_layer(
    case: Case, masks: list[Masks]
) -> None:
    there = kept_weights(case.recipe, VOCABULARY, seed=0)
    drawn = []
    for each in masks:
        for layer, mask in enumerate(each.weights):
            places = there.get(f"rnn.{layer}.recurrent", np.ones(mask.shape, bool))
            assert not mask[~places].any()
            drawn.append(mask[places] > 0)
    keep = 1 - case.recipe.weight_dropout
    assert_share(np.concatenate(drawn), keep)
    for one, other in itertools.combinations(drawn, 2):
        assert_unrelated(one, keep, other, keep)


def test_words_are_kept_with_the_keep_probability(case: Case, masks: list[Masks]) -> None:
    assert_share(np.array([each.words > 0 for each in masks]), 1 - case.recipe.word_dropout)


def test_masks_differ_between_batch_elements_and_between_time_steps_unless_locked(
    case: Case, masks: list[Masks]
) -> None:
    recipe = case.recipe
    for each in masks:
        units = each.units[1:] if recipe.word_dropout else list(each.units)
        if recipe.mixtures:
            units.append(each.latents.reshape(*each.units[0].shape[:2], -1))
        steps = []
        if any(recipe.unit_dropout):
            steps.append((np.concatenate(units, axis=-1), recipe.dropout_kind == "locked"))
        if recipe.recurrent_dropout:
            steps.append((np.concatenate(each.recurrent, axis=-1), True))
        for mask, locked in steps:
            if locked:
                assert (mask == mask[:1]).all()
                mask = mask[:1]
            positions = mask.reshape(-1, mask.shape[-1])
            assert len(np.unique(positions, axis=0)) == len(positions)


def test_masks_of_any_two_steps_places_and_replicas_are_unrelated(
    case: Case, masks: list[Masks]
) -> None:
    drawn = [
        (part.ravel(), 1 - rate)
        for each in masks
        for rate, mask in draws(case, each)
        for part in np.split(mask, case.devices, axis=1)
    ]
    for one, other in itertools.combinations(drawn, 2):
        assert_unrelated(*one, *other)


def test_masks_depend_on_the_seed(backends: Backends, framework: str) -> None:
    one, other = (
        masks_of(backends.get(framework, LOCKED, seed=seed), LOCKED, TIME) for seed in (0, 1)
    )
    for first, second in zip(
        [*one.units, *one.recurrent, one.latents],
        [*other.units, *other.recurrent, other.latents],
        strict=True,
    ):
        assert not np.array_equal(first, second)


def test_evaluation_drops_nothing(backends: Backends, framework: str, case: Case) -> None:
    backend, oracle = backends.get(framework, case.recipe, case.devices), new_oracle(case.recipe)
    oracle.load_parameters(backend.parameters())
    batch = random_batch(1)
    step = backend.evaluate_step(batch, backend.initial_state(BATCH, training=False))
    expected = oracle.evaluate_step(batch, oracle.initial_state(BATCH, training=False))
    assert float(step.nll) == pytest.approx(expected.nll, rel=1e-5)
