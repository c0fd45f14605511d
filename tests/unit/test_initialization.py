"""The shared initial draw is what the TensorFlow PTB tutorial draws, and the seed's alone."""

from __future__ import annotations

import os
from unittest import mock

import numpy as np
import pytest
from scipy import stats
from tests.support.problems import same

from ptbench.backends import ORACLE, create
from ptbench.backends.base import Setup
from ptbench.model.initialization import initial_parameters
from ptbench.model.parameters import kept_weights, parameter_shapes
from ptbench.model.recipe import Recipe

RECIPE = Recipe(layers=2, embedding_size=12, hidden_size=16, forget_bias=1.5)
VOCABULARY = 50


def test_every_parameter_is_drawn_in_float32() -> None:
    parameters = initial_parameters(RECIPE, VOCABULARY, seed=1)
    shapes = {name: array.shape for name, array in parameters.items()}
    assert list(shapes.items()) == list(parameter_shapes(RECIPE, VOCABULARY).items())
    assert {array.dtype for array in parameters.values()} == {np.dtype(np.float32)}


def test_a_new_oracle_has_the_drawn_parameters() -> None:
    with mock.patch.dict(os.environ):  # from which `create` removes settings
        oracle = create(ORACLE, Setup(RECIPE, VOCABULARY, seed=5))
    assert same(oracle.parameters(), initial_parameters(RECIPE, VOCABULARY, seed=5))


@pytest.mark.parametrize("scale", [0.04, 0.1, 2.0])
def test_weights_and_softmax_bias_are_uniform_within_the_scale(scale: float) -> None:
    recipe = RECIPE.model_copy(update={"initialization_scale": scale})
    for name, array in initial_parameters(recipe, VOCABULARY, seed=1).items():
        if name.startswith("rnn.") and name.endswith(".bias"):
            continue
        assert np.abs(array).max() <= np.float32(scale), name
        uniform = stats.uniform(-scale, 2 * scale)
        assert stats.kstest(array.ravel().astype(np.float64), uniform.cdf).pvalue > 1e-4, name


def test_no_two_weights_are_drawn_from_the_same_numbers() -> None:
    parameters = initial_parameters(RECIPE, VOCABULARY, seed=1)
    drawn = np.concatenate([p.ravel() for p in parameters.values() if np.unique(p).size > 2])
    assert len(np.unique(drawn)) > 0.99 * drawn.size


def test_recurrent_biases_are_zero_save_the_forget_gates() -> None:
    parameters = initial_parameters(RECIPE, VOCABULARY, seed=1)
    for layer in range(2):
        gates = parameters[f"rnn.{layer}.bias"].reshape(4, 16)
        assert [set(gate) for gate in gates] == [{0.0}, {1.5}, {0.0}, {0.0}]


def test_the_seed_and_the_model_alone_decide_the_draw() -> None:
    parameters = initial_parameters(RECIPE, VOCABULARY, seed=1)
    np.random.default_rng().random()
    trained_otherwise = RECIPE.model_copy(update={"learning_rate": 0.5, "dropout": 0.5})
    again = initial_parameters(trained_otherwise, VOCABULARY, seed=1)
    other = initial_parameters(RECIPE, VOCABULARY, seed=2)
    for name, array in parameters.items():
        np.testing.assert_array_equal(again[name], array)
        if not (name.startswith("rnn.") and name.endswith(".bias")):
            assert not np.array_equal(other[name], array)


KERAS = Recipe(
    layers=2, embedding_size=12, hidden_size=16, forget_bias=1, mixtures=2,
    initialization="keras",
)  # fmt: skip


def test_keras_defaults_are_glorot_uniform_kernels_and_a_narrow_embedding() -> None:
    parameters = initial_parameters(KERAS, VOCABULARY, seed=1)
    limits = {"embedding": 0.05}
    for name in ("rnn.0.input", "rnn.1.input", "latent.weight", "softmax.weight"):
        limits[name] = np.sqrt(6 / sum(parameters[name].shape))
    for name, limit in limits.items():
        uniform = stats.uniform(-limit, 2 * limit)
        drawn = parameters[name].ravel().astype(np.float64)
        assert stats.kstest(drawn, uniform.cdf).pvalue > 1e-4, name
    assert not parameters["softmax.bias"].any()
    assert not parameters["latent.bias"].any()


def test_keras_defaults_have_orthogonal_recurrent_kernels_and_open_forget_gates() -> None:
    parameters = initial_parameters(KERAS, VOCABULARY, seed=1)
    for layer in range(2):
        recurrent = parameters[f"rnn.{layer}.recurrent"].astype(np.float64)
        np.testing.assert_allclose(recurrent @ recurrent.T, np.eye(16), atol=1e-6)
        assert abs(recurrent.mean()) < 4 / 8 / np.sqrt(recurrent.size)  # entries have variance 1/64
        gates = parameters[f"rnn.{layer}.bias"].reshape(4, 16)
        assert [set(gate) for gate in gates] == [{0.0}, {1.0}, {0.0}, {0.0}]


def test_weights_that_a_sparse_model_leaves_out_start_at_zero() -> None:
    recipe = RECIPE.model_copy(update={"kept_weights": 0.25})
    parameters = initial_parameters(recipe, VOCABULARY, seed=1)
    for name, kept in kept_weights(recipe, VOCABULARY, seed=1).items():
        np.testing.assert_array_equal(parameters[name] != 0, kept)


PYTORCH = Recipe(
    layers=2, embedding_size=12, hidden_size=16, last_hidden_size=9, recurrent_bias=True,
    mixtures=2, latent_size=5, initialization="pytorch", initialization_scale=0.1,
)  # fmt: skip


@pytest.mark.parametrize("rnn", ["lstm", "gru"])
def test_pytorch_s_scheme_draws_from_the_ranges_of_pytorch_s_layers(rnn: str) -> None:
    """torch.nn.RNNBase and torch.nn.Linear document ±1/sqrt(hidden_size) and ±1/sqrt(inputs)."""
    recipe = PYTORCH.model_copy(update={"rnn": rnn})
    parameters = initial_parameters(recipe, VOCABULARY, seed=1)
    limits = {"embedding": 0.1, "softmax.weight": 0.1}
    for layer, width in enumerate((16, 9)):
        for kind in ("input", "recurrent", "bias", "recurrent_bias"):
            limits[f"rnn.{layer}.{kind}"] = width**-0.5
    for name in ("latent.weight", "latent.bias", "prior.weight"):
        limits[name] = 9**-0.5
    assert not parameters.pop("softmax.bias").any()
    assert parameters.keys() == limits.keys()
    for name, array in parameters.items():
        limit = limits[name]
        uniform = stats.uniform(-limit, 2 * limit)
        assert stats.kstest(array.ravel().astype(np.float64), uniform.cdf).pvalue > 1e-4, name
