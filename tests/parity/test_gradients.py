"""Loss and gradients are those of the float64 oracle."""

from __future__ import annotations

import pytest
from tests.support.problems import (
    BATCH,
    MEAN,
    MEAN_ONE_LAYER,
    SUM,
    SUM_ONE_LAYER,
    largest_error,
    new_oracle,
    random_batch,
    random_parameters,
)
from tests.support.remote import Backends

from ptbench.model.recipe import Recipe


@pytest.mark.parametrize(
    "recipe",
    [SUM, MEAN, SUM_ONE_LAYER, MEAN_ONE_LAYER],
    ids=lambda recipe: f"{recipe.objective}-{recipe.layers}",
)
def test_loss_and_every_gradient_are_the_oracle_s_from_a_zero_and_from_a_carried_state(
    backends: Backends, framework: str, recipe: Recipe
) -> None:
    backend, oracle = backends.get(framework, recipe), new_oracle(recipe)
    parameters = random_parameters(recipe, seed=1)
    backend.load_parameters(parameters)
    oracle.load_parameters(parameters)
    state = backend.initial_state(BATCH, training=True)
    oracle_state = oracle.initial_state(BATCH, training=True)
    for seed in range(3):
        batch = random_batch(seed)
        gradients = backend.gradients(batch, state)
        expected_gradients = oracle.gradients(batch, oracle_state)
        step = backend.train_step(batch, state, 0.0)
        expected = oracle.train_step(batch, oracle_state, 0.0)
        error, name = largest_error(gradients, expected_gradients)
        assert error < 1e-5, name
        assert float(step.nll) == pytest.approx(expected.nll, rel=1e-5)
        assert float(step.gradient_norm) == pytest.approx(expected.gradient_norm, rel=1e-5)
        state, oracle_state = step.state, expected.state
    for array in oracle_state.values():
        assert abs(array).mean() > 0.1  # what is carried is not close to zero
