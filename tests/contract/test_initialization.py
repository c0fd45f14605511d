"""The framework's own initial draw (`initialization: native`)."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from tests.support.problems import SUM, VOCABULARY, random_batch, recipe, same, train
from tests.support.remote import Backends

from ptbench.backends.contract import Parameters
from ptbench.backends.numpy_oracle import NumpyOracle

SCALE = SUM.initialization_scale


def drawn(parameters: Parameters) -> Parameters:
    """The parameters that are drawn at random."""
    return {
        name: array
        for name, array in parameters.items()
        if not (name.startswith("rnn.") and name.endswith(".bias"))
    }


def test_weights_and_softmax_bias_are_uniform_within_the_scale(
    backends: Backends, framework: str
) -> None:
    weights = drawn(backends.get(framework, SUM).parameters())
    for name, array in weights.items():
        assert np.abs(array).max() <= SCALE, name
        # By Kolmogorov and Smirnov; a right draw fails in one of 10^4 cases, and then always.
        uniform = stats.uniform(-SCALE, 2 * SCALE)
        assert stats.kstest(array.ravel().astype(np.float64), uniform.cdf).pvalue > 1e-4, name
    together = np.concatenate([array.ravel() for array in weights.values()]).astype(np.float64)
    deviation = SCALE / np.sqrt(3)  # of a uniform number in ±scale
    assert abs(together.mean()) < 4 * deviation / np.sqrt(together.size)
    # The variance of a uniform sample's variance is (4/45) scale^4 / n.
    assert together.var() == pytest.approx(
        deviation**2, abs=4 * np.sqrt(4 / 45 / together.size) * SCALE**2
    )
    assert np.abs(together).max() > 0.99 * SCALE


def test_no_two_weights_are_drawn_from_the_same_numbers(backends: Backends, framework: str) -> None:
    weights = drawn(backends.get(framework, SUM).parameters())
    together = np.concatenate([array.ravel() for array in weights.values()])
    # Of n numbers among 2^23 or more, about n^2 / 2^24 coincide by chance.
    assert len(np.unique(together)) > 0.99 * together.size


def test_recurrent_biases_are_zero_save_the_forget_gates(
    backends: Backends, framework: str
) -> None:
    parameters = backends.get(framework, SUM).parameters()
    for layer in range(SUM.layers):
        gates = parameters[f"rnn.{layer}.bias"].reshape(4, SUM.hidden_size)
        expected = np.array([0, SUM.forget_bias, 0, 0])[:, None]  # input, forget, candidate, output
        np.testing.assert_array_equal(gates, np.broadcast_to(expected, gates.shape))


def test_the_seed_decides_the_draw(backends: Backends, framework: str) -> None:
    parameters = backends.new(framework, SUM, seed=5).parameters()
    assert same(backends.new(framework, SUM, seed=5).parameters(), parameters)
    other = backends.new(framework, SUM, seed=6).parameters()
    for name in drawn(parameters):
        assert not np.array_equal(other[name], parameters[name])


def test_every_replica_starts_from_the_parameters_that_are_reported(
    backends: Backends, framework: str
) -> None:
    backend = backends.get(framework, SUM, devices=2)
    oracle = NumpyOracle(SUM, VOCABULARY)
    oracle.load_parameters(backend.parameters())
    batch = random_batch(1)
    nll, _, _ = train(backend, [batch], [0.0])
    assert nll == pytest.approx(train(oracle, [batch], [0.0])[0], rel=1e-5)


KERAS = recipe(initialization_scheme="keras_defaults", forget_bias=1, mixtures=2)
OWN = recipe(initialization_scheme="framework_defaults", forget_bias=0)


def test_keras_defaults_are_what_keras_documents(backends: Backends, framework: str) -> None:
    parameters = backends.get(framework, KERAS).parameters()
    limits = {"embedding": 0.05}
    for name in ("rnn.0.input", "rnn.1.input", "latent.weight", "softmax.weight"):
        limits[name] = np.sqrt(6 / sum(parameters[name].shape))
    for name, limit in limits.items():
        drawn = parameters[name].ravel().astype(np.float64)
        uniform = stats.uniform(-limit, 2 * limit)
        assert stats.kstest(drawn, uniform.cdf).pvalue > 1e-4, name
    for layer in range(KERAS.layers):
        recurrent = parameters[f"rnn.{layer}.recurrent"].astype(np.float64)
        np.testing.assert_allclose(recurrent @ recurrent.T, np.eye(KERAS.hidden_size), atol=1e-5)
        gates = parameters[f"rnn.{layer}.bias"].reshape(4, KERAS.hidden_size)
        assert [set(gate) for gate in gates] == [{0.0}, {1.0}, {0.0}, {0.0}]
    assert not parameters["softmax.bias"].any()
    assert not parameters["latent.bias"].any()


def test_a_framework_s_own_defaults_depend_on_the_seed_and_train(
    backends: Backends, framework: str
) -> None:
    if framework == "numpy":
        pytest.skip("NumPy has no layers")
    backend = backends.new(framework, OWN, seed=5)
    parameters = backend.parameters()
    assert same(backends.new(framework, OWN, seed=5).parameters(), parameters)
    other = backends.new(framework, OWN, seed=6).parameters()
    for name in ("embedding", "rnn.0.input", "rnn.0.recurrent", "softmax.weight"):
        assert parameters[name].std() > 0
        assert not np.array_equal(other[name], parameters[name]), name
    nll, _, _ = train(backend, [random_batch(0, padding=0.0)] * 5, [1.0] * 5)
    assert nll[-1] < nll[0]
