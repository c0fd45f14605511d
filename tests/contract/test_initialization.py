"""Every framework starts from the parameters that are drawn in NumPy, on every replica."""

from __future__ import annotations

import pytest
from tests.support import probes
from tests.support.problems import SUM, VOCABULARY, new_oracle, random_batch, recipe, same, train
from tests.support.remote import Backends, probe

from ptbench.model.initialization import initial_parameters
from ptbench.model.recipe import Recipe

RECIPES = {
    "uniform": SUM,
    "keras": recipe(initialization="keras", mixtures=2),
    "pytorch": recipe(initialization="pytorch", forget_bias=0, recurrent_bias=True),
    "sparse": recipe(kept_weights=0.3),
}


@pytest.mark.parametrize("drawn", RECIPES.values(), ids=RECIPES.keys())
def test_a_new_backend_has_the_drawn_parameters(
    backends: Backends, framework: str, drawn: Recipe
) -> None:
    parameters = backends.new(framework, drawn, seed=5).parameters()
    # Orthogonal weights come from a QR decomposition, which other NumPy versions round otherwise.
    expected = initial_parameters(drawn, VOCABULARY, seed=5)
    if drawn.initialization == "keras":
        for name, array in expected.items():
            assert parameters[name] == pytest.approx(array, abs=1e-6), name
    else:
        assert same(parameters, expected)


def test_the_shared_draw_is_the_same_in_every_environment(
    backends: Backends, framework: str
) -> None:
    backend = backends.get(framework, SUM)
    expected = initial_parameters(SUM, VOCABULARY, seed=7)
    assert same(probe(probes.shared_parameters, backend, 7), expected)


def test_every_replica_starts_from_the_parameters_that_are_reported(
    backends: Backends, framework: str
) -> None:
    backend = backends.get(framework, SUM, devices=2)
    oracle = new_oracle(SUM)
    oracle.load_parameters(backend.parameters())
    batch = random_batch(1)
    nll, _, _ = train(backend, [batch], [0.0])
    assert nll == pytest.approx(train(oracle, [batch], [0.0])[0], rel=1e-5)
