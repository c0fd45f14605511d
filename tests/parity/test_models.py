"""Every kind of model, by every means that a framework has, does what the float64 oracle does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tests.support.problems import (
    BATCH,
    IMPLEMENTATIONS,
    KERNEL_MODELS,
    MODELS,
    TUNED_KERNEL_MODELS,
    VOCABULARY,
    largest_error,
    new_oracle,
    random_batch,
    random_parameters,
    recipe,
    relative_error,
    same,
    train,
    uneven_batches,
)
from tests.support.remote import Backends

from ptbench.backends import FRAMEWORKS
from ptbench.backends.base import Backend
from ptbench.backends.oracle import Oracle
from ptbench.model.parameters import kept_weights, parameter_shapes, state_widths
from ptbench.model.recipe import Recipe

CASES: dict[str, dict[str, Any]] = {
    f"{name}, {implementation}": {**changes, "implementation": implementation}
    for name, changes in MODELS.items()
    for implementation in IMPLEMENTATIONS
} | {
    f"{name}, {implementation}": {**changes, "kernel": kernel, "implementation": implementation}
    for name, (kernel, changes) in KERNEL_MODELS.items()
    for implementation in IMPLEMENTATIONS
    if implementation == "stock" or name in TUNED_KERNEL_MODELS
}

SPARSE_CASES = {name: changes for name, changes in CASES.items() if "kept_weights" in changes}


def in_framework(changes: dict[str, Any], framework: str) -> Recipe:
    result = recipe(**changes)
    if result.kernel not in FRAMEWORKS[framework].kernels:
        pytest.skip(f"{framework} has no {result.kernel} kernel")
    return result


@pytest.fixture(scope="session", params=CASES.values(), ids=CASES.keys())
def model(request: pytest.FixtureRequest, framework: str) -> Recipe:
    return in_framework(request.param, framework)


def pair(backends: Backends, framework: str, model: Recipe) -> tuple[Backend, Oracle]:
    """The framework's backend and the oracle, with the same parameters."""
    backend, oracle = backends.get(framework, model), new_oracle(model)
    parameters = random_parameters(model, seed=1)
    backend.load_parameters(parameters)
    oracle.load_parameters(parameters)
    return backend, oracle


def test_loss_and_every_gradient_are_the_oracle_s(
    backends: Backends, framework: str, model: Recipe
) -> None:
    backend, oracle = pair(backends, framework, model)
    state = backend.initial_state(BATCH, training=True)
    oracle_state = oracle.initial_state(BATCH, training=True)
    for seed in range(2):  # from a zero and from a carried state
        batch = random_batch(seed)
        gradients = backend.gradients(batch, state)
        error, name = largest_error(gradients, oracle.gradients(batch, oracle_state))
        assert error < 1e-5, name
        step = backend.train_step(batch, state, 0.0)
        expected = oracle.train_step(batch, oracle_state, 0.0)
        assert float(step.nll) == pytest.approx(expected.nll, rel=1e-5)
        assert float(step.gradient_norm) == pytest.approx(expected.gradient_norm, rel=1e-5)
        state, oracle_state = step.state, expected.state


def test_ten_steps_and_the_state_after_them_are_the_oracle_s(
    backends: Backends, framework: str, model: Recipe
) -> None:
    backend, oracle = pair(backends, framework, model)
    batches = uneven_batches(10)
    rates = [model.learning_rate / 2 * 0.9**step for step in range(len(batches))]
    nll, norms, state = train(backend, batches, rates)
    expected_nll, expected_norms, expected_state = train(oracle, batches, rates)
    assert min(expected_norms) > (model.clip_norm or 0)
    assert nll == pytest.approx(expected_nll, rel=1e-4)
    assert norms == pytest.approx(expected_norms, rel=1e-4)
    error, name = largest_error(backend.parameters(), oracle.parameters())
    assert error < 1e-4, name
    actual, expected = backend.snapshot(state), oracle.snapshot(expected_state)
    assert actual.keys() == expected.keys()
    for name, width in state_widths(model).items():
        assert actual[name].shape == (BATCH, width)
        assert relative_error(actual[name], expected[name]) < 1e-4, name


def test_a_restored_snapshot_continues_bit_for_bit(
    backends: Backends, framework: str, model: Recipe
) -> None:
    backend, _ = pair(backends, framework, model)
    batches = uneven_batches(4)
    rates = [model.learning_rate / 2] * 2
    _, _, state = train(backend, batches[:2], rates)
    snapshot = backend.snapshot(state)
    expected = train(backend, batches[2:], rates, state)[:2]
    after = backend.parameters()
    assert train(backend, batches[2:], rates, backend.restore(snapshot))[:2] == expected
    assert same(backend.parameters(), after)


def test_evaluation_and_the_probabilities_of_next_words_are_the_oracle_s(
    backends: Backends, framework: str, model: Recipe
) -> None:
    backend, oracle = pair(backends, framework, model)
    batch = random_batch(3)
    state = backend.initial_state(BATCH, training=False)
    oracle_state = oracle.initial_state(BATCH, training=False)
    for _ in range(2):
        step = backend.evaluate_step(batch, state)
        expected = oracle.evaluate_step(batch, oracle_state)
        assert float(step.nll) == pytest.approx(expected.nll, rel=1e-5)
        log_p, after = backend.next_token_log_probabilities(batch.inputs, state)
        expected_log_p, _ = oracle.next_token_log_probabilities(batch.inputs, oracle_state)
        np.testing.assert_allclose(log_p, expected_log_p, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(np.exp(log_p).sum(axis=-1), 1, rtol=1e-5)
        state, oracle_state = after, expected.state


@pytest.mark.parametrize("changes", SPARSE_CASES.values(), ids=SPARSE_CASES.keys())
def test_weights_that_are_left_out_stay_zero(
    backends: Backends, framework: str, changes: dict[str, Any]
) -> None:
    model = in_framework(changes, framework)
    kept = kept_weights(model, VOCABULARY, seed=0)
    assert kept
    backend, _ = pair(backends, framework, model)
    state = backend.initial_state(BATCH, training=True)
    gradients = backend.gradients(random_batch(0), state)
    train(backend, uneven_batches(3), [model.learning_rate] * 3)
    trained = backend.parameters()
    for name, mask in kept.items():
        assert not gradients[name][~mask].any(), name
        assert not trained[name][~mask].any(), name
        assert (trained[name][mask] != 0).mean() > 0.99, name


def test_parameters_have_their_canonical_names_and_shapes(
    backends: Backends, framework: str, model: Recipe
) -> None:
    drawn = backends.get(framework, model).parameters()
    shapes = {name: array.shape for name, array in drawn.items()}
    assert shapes == parameter_shapes(model, VOCABULARY)
