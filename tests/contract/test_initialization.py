"""Every framework starts from the parameters that are drawn in NumPy, on every replica.

The oracle is left out: it draws in this environment and has no replicas. Its draw is in
`tests/unit/test_initialization.py`.
"""

from __future__ import annotations

import numpy as np
import pytest
from tests.support import probes
from tests.support.problems import SUM, VOCABULARY, new_oracle, random_batch, recipe, same, train
from tests.support.remote import Backends, probe

from ptbench.backends import FRAMEWORKS
from ptbench.model.initialization import initial_parameters
from ptbench.model.recipe import Recipe

RECIPES = {
    "uniform": SUM,
    "keras": recipe(initialization="keras", mixtures=2),
    "pytorch": recipe(initialization="pytorch", forget_bias=0, recurrent_bias=True),
    "sparse": recipe(kept_weights=0.3),
}


@pytest.mark.frameworks(*FRAMEWORKS)
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


@pytest.mark.frameworks(*FRAMEWORKS)
def test_the_shared_draw_is_the_same_in_every_environment(
    backends: Backends, framework: str
) -> None:
    backend = backends.get(framework, SUM)
    expected = initial_parameters(SUM, VOCABULARY, seed=7)
    assert same(probe(probes.shared_parameters, backend, 7), expected)


@pytest.mark.frameworks(*FRAMEWORKS)
def test_every_replica_starts_from_the_parameters_that_are_reported(
    backends: Backends, framework: str
) -> None:
    backend = backends.get(framework, SUM, devices=2)
    oracle = new_oracle(SUM)
    oracle.load_parameters(backend.parameters())
    batch = random_batch(1)
    nll, _, _ = train(backend, [batch], [0.0])
    assert nll == pytest.approx(train(oracle, [batch], [0.0])[0], rel=1e-5)


@pytest.mark.frameworks("pytorch")  # torch is in its environment alone
@pytest.mark.parametrize("rnn", ["lstm", "gru"])
def test_the_pytorch_scheme_has_the_ranges_of_torch_s_own_layers(
    backends: Backends, framework: str, rnn: str
) -> None:
    inputs, width, outputs = 32, 64, 256
    drawn = recipe(
        initialization="pytorch", forget_bias=0, rnn=rnn, recurrent_bias=True, layers=1,
        embedding_size=inputs, hidden_size=width, mixtures=4, latent_size=outputs // 4,
    )  # fmt: skip
    ours = initial_parameters(drawn, VOCABULARY, seed=5)
    arguments = rnn, inputs, width, outputs
    theirs = probe(
        probes.largest_values_in_new_torch_layers, backends.get(framework, SUM), *arguments
    )
    names = {
        "weight_ih_l0": "rnn.0.input", "weight_hh_l0": "rnn.0.recurrent",
        "bias_ih_l0": "rnn.0.bias", "bias_hh_l0": "rnn.0.recurrent_bias",
        "weight": "latent.weight", "bias": "latent.bias",
    }  # fmt: skip
    assert theirs.keys() == names.keys()
    bound = width**-0.5
    for theirs_name, name in names.items():
        # The largest of 192 or more draws in ±bound is below 0.9 bound once in 600 million times.
        assert 0.9 * bound < theirs[theirs_name] <= bound, theirs_name
        assert 0.9 * bound < np.abs(ours[name]).max() <= bound, name
