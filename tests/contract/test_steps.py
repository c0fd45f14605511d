"""Training steps: reproducible, resumable, and without effect on what the caller holds."""

from __future__ import annotations

import math

import numpy as np
import pytest
from tests.support import probes
from tests.support.problems import (
    ADAM_DROPOUT,
    ASGD_DROPOUT,
    BATCH,
    DROPOUT,
    IMPLEMENTATIONS,
    MEAN,
    RMSPROP_DROPOUT,
    SUM,
    TIME,
    VOCABULARY,
    random_batch,
    random_parameters,
    same,
    train,
)
from tests.support.remote import Backends, probe

from ptbench.corpus.batching import Batch
from ptbench.model.recipe import Recipe

BATCHES = [random_batch(seed) for seed in range(20)]
RATES = [0.5] * len(BATCHES)
both_device_counts = pytest.mark.parametrize("devices", [1, 2])


@both_device_counts
def test_the_same_seed_gives_the_same_twenty_steps_bit_for_bit(
    backends: Backends, framework: str, devices: int
) -> None:
    one = backends.get(framework, DROPOUT, devices)
    other = backends.get(framework, DROPOUT, devices, number=1)
    nll, norms, _ = train(one, BATCHES, RATES)
    assert (nll, norms) == train(other, BATCHES, RATES)[:2]
    assert same(one.parameters(), other.parameters())


def test_another_seed_gives_another_run_from_the_same_parameters(
    backends: Backends, framework: str
) -> None:
    nll = []
    for seed in (0, 1):
        backend = backends.get(framework, DROPOUT, seed=seed)
        backend.load_parameters(random_parameters(DROPOUT, seed=1))
        nll.append(train(backend, BATCHES[:3], RATES[:3])[0])
    assert all(a != b for a, b in zip(*nll, strict=True))


def test_two_backends_in_one_process_do_not_disturb_each_other(
    backends: Backends, framework: str
) -> None:
    alone = train(backends.get(framework, DROPOUT), BATCHES[:5], RATES[:5])[0]
    one = backends.get(framework, DROPOUT)
    other = backends.get(framework, DROPOUT, seed=1)
    state, other_state, together = None, None, []
    for batch in BATCHES[:5]:
        nll, _, state = train(one, [batch], RATES[:1], state)
        _, _, other_state = train(other, [batch], RATES[:1], other_state)
        together += nll
    assert together == alone


@pytest.mark.parametrize(
    ("recipe", "devices"),
    [(DROPOUT, 1), (DROPOUT, 2), (ADAM_DROPOUT, 1), (RMSPROP_DROPOUT, 1), (ASGD_DROPOUT, 2)],
    ids=lambda value: value.optimizer if isinstance(value, Recipe) else str(value),
)
def test_a_new_backend_continues_from_a_snapshot_bit_for_bit(
    backends: Backends, framework: str, devices: int, recipe: Recipe
) -> None:
    rates = [recipe.learning_rate / 2] * len(BATCHES)
    backend = backends.get(framework, recipe, devices)
    _, _, state = train(backend, BATCHES[:3], rates[:3])
    snapshot = backend.snapshot(state)
    expected = train(backend, BATCHES[3:8], rates[3:8], state)[:2]
    parameters = backend.parameters()

    resumed = backends.get(framework, recipe, devices, number=1)  # as after a restart
    for candidate in (backend, resumed):
        state = candidate.restore(snapshot)
        assert candidate.step == 3
        assert train(candidate, BATCHES[3:8], rates[3:8], state)[:2] == expected
        assert same(candidate.parameters(), parameters)


@pytest.mark.parametrize("recipe", [DROPOUT, ADAM_DROPOUT], ids=lambda recipe: recipe.optimizer)
def test_training_from_a_restored_snapshot_does_not_change_the_snapshot(
    backends: Backends, framework: str, recipe: Recipe
) -> None:
    backend = backends.get(framework, recipe)
    rate = recipe.learning_rate / 2
    before, after, nll = probe(probes.snapshot_after_use, backend, BATCHES[:2], rate)
    assert same(after, before)
    assert nll[0] == nll[1]


def test_a_state_that_the_caller_keeps_is_not_changed_by_later_steps(
    backends: Backends, framework: str
) -> None:
    backend = backends.get(framework, SUM)
    _, _, kept = train(backend, BATCHES[:1], [0.0])
    before = backend.gradients(BATCHES[1], kept)
    train(backend, BATCHES[1:4], [0.0] * 3, kept)
    assert same(backend.gradients(BATCHES[1], kept), before)

    start = backend.initial_state(BATCH, training=False)
    kept = backend.evaluate_step(BATCHES[0], start).state
    first = backend.evaluate_step(BATCHES[1], kept)
    backend.evaluate_step(BATCHES[2], first.state)
    assert float(backend.evaluate_step(BATCHES[1], kept).nll) == float(first.nll)


def test_gradients_change_nothing(backends: Backends, framework: str) -> None:
    backend = backends.get(framework, DROPOUT)
    expected = train(backend, BATCHES[:2], RATES[:2])[0]
    backend = backends.get(framework, DROPOUT)
    before = backend.parameters()
    state = backend.initial_state(BATCH, training=True)
    first = backend.gradients(BATCHES[1], state)
    assert same(backend.gradients(BATCHES[1], state), first)
    assert same(backend.parameters(), before)
    assert backend.step == 0
    assert train(backend, BATCHES[:2], RATES[:2], state)[0] == expected


def test_each_training_step_is_counted(backends: Backends, framework: str) -> None:
    backend = backends.get(framework, SUM)
    train(backend, BATCHES[:3], RATES[:3])
    assert backend.step == 3


def test_a_learning_rate_of_zero_changes_no_parameter(backends: Backends, framework: str) -> None:
    backend = backends.get(framework, DROPOUT)
    before = backend.parameters()
    train(backend, BATCHES[:2], [0.0, 0.0])
    assert same(backend.parameters(), before)


@pytest.mark.parametrize("recipe", [SUM, MEAN], ids=lambda recipe: recipe.objective)
def test_a_batch_of_nothing_but_padding_changes_no_parameter(
    backends: Backends, framework: str, recipe: Recipe
) -> None:
    backend = backends.get(framework, recipe)
    before = backend.parameters()
    inputs, targets, mask = random_batch(1)
    state = backend.initial_state(BATCH, training=True)
    step = backend.train_step(Batch(inputs, targets, np.zeros_like(mask)), state, 1.0)
    assert (float(step.nll), float(step.gradient_norm)) == (0, 0)
    assert same(backend.parameters(), before)


@both_device_counts
def test_the_caller_may_overwrite_a_batch_once_its_step_has_returned(
    backends: Backends, framework: str, devices: int
) -> None:
    expected = train(backends.get(framework, DROPOUT, devices), BATCHES[:5], RATES[:5])[0]
    backend = backends.get(framework, DROPOUT, devices)
    assert probe(probes.train_from_one_buffer, backend, BATCHES[:5], RATES[0]) == expected


def test_a_model_of_zeros_loses_log_vocabulary_nats_for_each_token(
    backends: Backends, framework: str
) -> None:
    backend = backends.get(framework, SUM)
    zeros = {name: np.zeros_like(array) for name, array in backend.parameters().items()}
    backend.load_parameters(zeros)
    batch = random_batch(1)
    nll, _, _ = train(backend, [batch], [0.0])
    assert nll[0] == pytest.approx(batch.mask.sum() * math.log(VOCABULARY), rel=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("mixtures", [0, 2])
def test_a_word_of_probability_exp_minus_300_costs_300_nats_and_has_a_gradient(
    backends: Backends, framework: str, mixtures: int, implementation: str
) -> None:
    """exp(-300) is zero in float32: only log-sum-exp gets this right.

    Parameters of zero make a mixture's softmaxes equal, and so the mixture one of them.
    """
    head = {"mixtures": mixtures, "implementation": implementation}
    backend = backends.get(framework, SUM.model_copy(update=head))
    parameters = {name: np.zeros_like(array) for name, array in backend.parameters().items()}
    parameters["softmax.bias"][0] = 300
    backend.load_parameters(parameters)
    inputs, _, _ = random_batch(1)
    targets, mask = np.ones_like(inputs), np.ones(inputs.shape, np.float32)
    state = backend.initial_state(BATCH, training=True)
    gradient = backend.gradients(Batch(inputs, targets, mask), state)["softmax.bias"]
    # d nll / d logits = softmax(logits) - one_hot(target), summed over time, averaged over batch
    np.testing.assert_allclose(gradient[:3], [TIME, -TIME, 0], atol=1e-5)
    step = backend.train_step(Batch(inputs, targets, mask), state, 0.0)
    assert float(step.nll) == pytest.approx(300 * TIME * BATCH, rel=1e-6)
    state = backend.initial_state(BATCH, training=False)
    step = backend.evaluate_step(Batch(inputs, targets, mask), state)
    assert float(step.nll) == pytest.approx(300 * TIME * BATCH, rel=1e-6)
