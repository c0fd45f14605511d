"""Two replicas are one device on the whole batch, in the same framework."""

from __future__ import annotations

import pytest
from tests.support.problems import (
    BATCH,
    MEAN,
    SUM,
    largest_error,
    random_parameters,
    train,
    uneven_batches,
)
from tests.support.remote import Backends

from ptbench.model.recipe import Recipe

both_objectives = pytest.mark.parametrize(
    "recipe", [SUM, MEAN], ids=lambda recipe: recipe.objective
)


@both_objectives
def test_loss_and_gradients_are_those_of_the_whole_batch_whatever_each_replica_s_padding(
    backends: Backends, framework: str, recipe: Recipe
) -> None:
    results = []
    for devices in (1, 2):
        backend = backends.get(framework, recipe, devices)
        backend.load_parameters(random_parameters(recipe, seed=1))
        state = backend.initial_state(BATCH, training=True)
        for batch in uneven_batches(3):
            gradients = backend.gradients(batch, state)
            step = backend.train_step(batch, state, 0.0)
            state = step.state
            results.append((float(step.nll), float(step.gradient_norm), gradients))
    for expected, actual in zip(results[:3], results[3:], strict=True):
        assert actual[:2] == pytest.approx(expected[:2], rel=1e-5)
        error, name = largest_error(actual[2], expected[2])
        assert error < 1e-5, name


@both_objectives
def test_ten_steps_of_two_replicas_are_ten_steps_of_one(
    backends: Backends, framework: str, recipe: Recipe
) -> None:
    batches = uneven_batches(10)
    rates = [0.5 / recipe.clip_norm] * len(batches)  # each step moves the parameters by 0.5
    results = []
    for devices in (1, 2):
        backend = backends.get(framework, recipe, devices)
        backend.load_parameters(random_parameters(recipe, seed=1))
        nll, norms, _ = train(backend, batches, rates)
        results.append((nll, norms, backend.parameters()))
    expected, actual = results
    assert min(expected[1]) > recipe.clip_norm
    assert actual[0] == pytest.approx(expected[0], rel=1e-5)
    assert actual[1] == pytest.approx(expected[1], rel=1e-5)
    error, name = largest_error(actual[2], expected[2])
    assert error < 1e-5, name
