"""Every case in every framework computes what the float64 oracle computes.

`tests/support/cases.py` has the cases. The oracle takes any number of devices as one, so a case on
two devices is also compared with one device. Where a case drops units, words or weights, the oracle
drops those that the framework was seen to drop.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from tests.support.cases import Case
from tests.support.masks import STEPS, OracleWithMasks, observed_masks, words_batch
from tests.support.problems import (
    BATCH,
    VOCABULARY,
    largest_error,
    moved,
    new_oracle,
    random_batch,
    random_parameters,
    relative_error,
    same,
    train,
    uneven_batches,
)
from tests.support.remote import Backends

from ptbench.backends.base import Backend
from ptbench.backends.oracle import Oracle
from ptbench.corpus.batching import Batch
from ptbench.model.optimizers import OPTIMIZER_SLOTS
from ptbench.model.parameters import kept_weights, parameter_shapes, state_widths


def pair(backends: Backends, framework: str, case: Case) -> tuple[Backend, Oracle]:
    """Return the framework's backend and the oracle, with the same parameters and masks."""
    oracle: Oracle
    if case.recipe.drops:
        masks = observed_masks(backends, framework, case)
        oracle = new_oracle(case.recipe, kind=OracleWithMasks)
        oracle.masks = masks
    else:
        oracle = new_oracle(case.recipe)
    backend = backends.get(framework, case.recipe, case.devices)
    parameters = random_parameters(case.recipe, seed=1)
    backend.load_parameters(parameters)
    oracle.load_parameters(parameters)
    return backend, oracle


def batches_of(case: Case, count: int) -> list[Batch]:
    """Return batches for training steps; with dropout, all have the words of `words_batch`.

    Nothing is known about the other units of a dropped word.
    """
    batches = uneven_batches(count, case.times)
    if not case.recipe.drops:
        return batches
    return [words_batch(len(batch.mask))._replace(mask=batch.mask) for batch in batches]


def rates_of(case: Case, count: int) -> list[float]:
    """Return a learning rate for each step, all different."""
    return [case.recipe.learning_rate / 2 * 0.9**step for step in range(count)]


def test_loss_and_every_gradient_are_the_oracle_s(
    backends: Backends, framework: str, case: Case
) -> None:
    backend, oracle = pair(backends, framework, case)
    state = backend.initial_state(BATCH, training=True)
    oracle_state = oracle.initial_state(BATCH, training=True)
    for batch in batches_of(case, 2):  # from a zero and from a carried state
        gradients = backend.gradients(batch, state)
        error, name = largest_error(gradients, oracle.gradients(batch, oracle_state))
        assert error < backends.tolerance, name
        step = backend.train_step(batch, state, 0.0)
        expected = oracle.train_step(batch, oracle_state, 0.0)
        assert float(step.nll) == pytest.approx(expected.nll, rel=1e-5)
        assert float(step.gradient_norm) == pytest.approx(expected.gradient_norm, rel=1e-5)
        state, oracle_state = step.state, expected.state
        for name, array in oracle_state.items():
            assert np.abs(array).mean() > 0.05, f"{name} is close to the zero state"


def test_training_steps_and_all_that_they_leave_are_the_oracle_s(
    backends: Backends, framework: str, case: Case
) -> None:
    backend, oracle = pair(backends, framework, case)
    initial = backend.parameters()
    count = STEPS if case.recipe.drops else 10
    batches, rates = batches_of(case, count), rates_of(case, count)
    nll, norms, state = train(backend, batches, rates, carried=case.carried)
    expected_nll, expected_norms, expected_state = train(
        oracle, batches, rates, carried=case.carried
    )
    if case.recipe.clip_norm is not None:
        assert min(expected_norms) > case.recipe.clip_norm
    assert nll == pytest.approx(expected_nll, rel=1e-5)
    assert norms == pytest.approx(expected_norms, rel=1e-5)
    # Ten steps move some parameters by little, of which rounding is a larger share.
    error, name = largest_error(moved(backend.parameters(), initial), moved(oracle.p, initial))
    assert error < 1e-4, name
    actual, expected = backend.snapshot(state), oracle.snapshot(expected_state)
    assert actual.keys() == expected.keys()
    assert np.array_equal(actual["step"], count)
    slots = [f"optimizer.{s}.{n}" for s, n in itertools.product(oracle.slots, oracle.shapes)]
    limit = 1e-5
    if case.recipe.rnn == "rnn_relu":
        limit = 5e-5  # nothing bounds its outputs, so rounding grows from step to step: 2.3e-5
    elif framework == "mxnet" and case.recipe.optimizer == "adam":
        limit = 3e-5  # it forms 1 - 0.999 in float32, which is off by 1.3e-5
    for name in [*slots, *oracle.state_widths]:
        assert actual[name].shape == expected[name].shape
        assert relative_error(actual[name], expected[name]) < limit, name


def test_a_restored_snapshot_continues_bit_for_bit(
    backends: Backends, framework: str, case: Case
) -> None:
    backend, _ = pair(backends, framework, case)
    batches, rates = batches_of(case, 4), rates_of(case, 2)
    _, _, state = train(backend, batches[:2], rates, carried=case.carried)
    snapshot = backend.snapshot(state)
    expected = train(backend, batches[2:], rates, state, case.carried)[:2]
    after = backend.parameters()
    state = backend.restore(snapshot)
    nll, norms = train(backend, batches[2:], rates, state, case.carried)[:2]
    if backends.accelerator == "cuda" and case.recipe.kernel == "sparse":
        # cuSPARSE adds in the order of timing
        assert nll == pytest.approx(expected[0], rel=1e-5)
        assert largest_error(backend.parameters(), after)[0] < 1e-4
    else:
        assert (nll, norms) == expected
        assert same(backend.parameters(), after)


def test_evaluation_and_the_probabilities_of_next_words_are_the_oracle_s(
    backends: Backends, framework: str, case: Case
) -> None:
    backend, oracle = pair(backends, framework, case)
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


@pytest.mark.cases(where=lambda recipe: recipe.kept_weights < 1)
def test_weights_that_are_left_out_stay_zero(
    backends: Backends, framework: str, case: Case
) -> None:
    kept = kept_weights(case.recipe, VOCABULARY, seed=0)
    assert kept
    backend, _ = pair(backends, framework, case)
    state = backend.initial_state(BATCH, training=True)
    batches = batches_of(case, 3)
    gradients = backend.gradients(batches[0], state)
    train(backend, batches, rates_of(case, 3), carried=case.carried)
    trained = backend.parameters()
    for name, mask in kept.items():
        assert not gradients[name][~mask].any(), name
        assert not trained[name][~mask].any(), name
        assert (trained[name][mask] != 0).mean() > 0.99, name


def test_parameters_slots_and_state_have_their_canonical_names_and_shapes(
    backends: Backends, framework: str, case: Case
) -> None:
    backend = backends.get(framework, case.recipe, case.devices)
    shapes = {name: array.shape for name, array in backend.parameters().items()}
    assert shapes == parameter_shapes(case.recipe, VOCABULARY)
    snapshot = backend.snapshot(backend.initial_state(BATCH, training=True))
    states = {name: (BATCH, width) for name, width in state_widths(case.recipe).items()}
    slots = {
        f"optimizer.{slot}.{name}": shape
        for slot in OPTIMIZER_SLOTS[case.recipe.optimizer]
        for name, shape in shapes.items()
    }
    values = {f"parameter.{name}": shape for name, shape in shapes.items()}
    saved = {name: array.shape for name, array in snapshot.items()}
    assert saved == {**values, **slots, **states, "step": ()}
    assert not any(snapshot[name].any() for name in [*slots, *states])
