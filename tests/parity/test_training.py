"""Training from the shared draw is the same in every framework."""

from __future__ import annotations

import numpy as np
import pytest
from tests.support import probes
from tests.support.problems import (
    BATCH,
    MEAN,
    SUM,
    SUM_ONE_LAYER,
    TIME,
    VOCABULARY,
    largest_error,
    moved,
    new_oracle,
    same,
    train,
)
from tests.support.remote import Backends, probe

from ptbench.corpus.batching import ParallelStreams
from ptbench.model.initialization import initial_parameters
from ptbench.model.recipe import Recipe

STEPS = 10
# Each step moves the parameters by 0.5 or so at first: the clip norm times the rate.
RATES = {SUM: 1.0, MEAN: 5.0, SUM_ONE_LAYER: 0.1}


def test_the_shared_draw_is_the_same_in_every_environment(
    backends: Backends, framework: str
) -> None:
    backend = backends.get(framework, SUM)
    expected = initial_parameters(SUM, VOCABULARY, seed=7)
    assert same(probe(probes.shared_parameters, backend, 7), expected)


@pytest.mark.parametrize(
    "recipe",
    [SUM, MEAN, SUM_ONE_LAYER],
    ids=lambda recipe: f"{recipe.objective}-clip-{recipe.clip_norm}",
)
def test_ten_steps_of_sgd_with_a_changing_rate_are_the_oracle_s(
    backends: Backends, framework: str, recipe: Recipe
) -> None:
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, STEPS * TIME * BATCH - TIME)
    batches = list(ParallelStreams(tokens, BATCH, TIME).epoch())
    assert len(batches) == STEPS
    assert not batches[-1].mask.all()
    rates = [RATES[recipe] * 0.9**step for step in range(STEPS)]
    backend, oracle = backends.get(framework, recipe), new_oracle(recipe)
    initial = initial_parameters(recipe, VOCABULARY, seed=1)
    backend.load_parameters(initial)
    oracle.load_parameters(initial)
    nll, norms, _ = train(backend, batches, rates)
    expected_nll, expected_norms, _ = train(oracle, batches, rates)

    if recipe.clip_norm is None:
        assert expected_norms[0] > Recipe().clip_norm
    else:
        assert min(expected_norms) > recipe.clip_norm
    assert nll == pytest.approx(expected_nll, rel=1e-4)
    assert norms == pytest.approx(expected_norms, rel=1e-4)
    error, name = largest_error(
        moved(backend.parameters(), initial), moved(oracle.parameters(), initial)
    )
    assert error < 1e-4, name
