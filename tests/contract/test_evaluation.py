"""Evaluation leaves the model and its training alone, and its probabilities are probabilities."""

from __future__ import annotations

import numpy as np
import pytest
from tests.support import probes
from tests.support.problems import (
    BATCH,
    DROPOUT,
    SUM,
    TIME,
    VOCABULARY,
    random_batch,
    same,
    train,
)
from tests.support.remote import Backends, probe

from ptbench.corpus.batching import Batch

BATCHES = [random_batch(seed) for seed in range(6)]
RATES = [0.5] * len(BATCHES)


def test_evaluation_changes_no_parameter_no_step_count_and_no_later_training_step(
    backends: Backends, framework: str
) -> None:
    expected = train(backends.get(framework, DROPOUT), BATCHES, RATES)[0]
    backend = backends.get(framework, DROPOUT)
    nll, _, training_state = train(backend, BATCHES[:3], RATES[:3])
    before = backend.parameters()
    state = backend.initial_state(BATCH, training=False)
    for batch in BATCHES:
        state = backend.evaluate_step(batch, state).state
        backend.next_token_log_probabilities(batch.inputs, state)
    assert same(backend.parameters(), before)
    assert backend.step == 3
    assert nll + train(backend, BATCHES[3:], RATES[3:], training_state)[0] == expected


def test_probabilities_of_the_next_word_sum_to_one(backends: Backends, framework: str) -> None:
    backend = backends.get(framework, SUM)
    state = backend.initial_state(BATCH, training=False)
    log_p, _ = backend.next_token_log_probabilities(BATCHES[0].inputs, state)
    assert log_p.shape == (TIME, BATCH, VOCABULARY)
    np.testing.assert_allclose(np.exp(log_p.astype(np.float64)).sum(axis=-1), 1, rtol=1e-5)


def test_log_probabilities_and_evaluation_agree_and_carry_the_same_state(
    backends: Backends, framework: str
) -> None:
    backend = backends.get(framework, DROPOUT)
    state = other_state = backend.initial_state(BATCH, training=False)
    for inputs, targets, mask in BATCHES[:3]:
        log_p, state = backend.next_token_log_probabilities(inputs, state)
        step = backend.evaluate_step(Batch(inputs, targets, mask), other_state)
        other_state = step.state
        target_log_p = np.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
        assert float(step.nll) == pytest.approx(-(target_log_p * mask).sum(), rel=1e-5)


def test_masked_targets_do_not_count(backends: Backends, framework: str) -> None:
    backend = backends.get(framework, SUM)
    inputs, targets, mask = BATCHES[0]
    others = np.where(mask > 0, targets, (targets + 1) % VOCABULARY).astype(np.int32)
    state = backend.initial_state(BATCH, training=False)
    first = backend.evaluate_step(Batch(inputs, targets, mask), state)
    assert float(first.nll) == float(backend.evaluate_step(Batch(inputs, others, mask), state).nll)


def test_the_caller_may_overwrite_a_batch_once_its_evaluation_has_returned(
    backends: Backends, framework: str
) -> None:
    backend = backends.get(framework, SUM)
    state, expected = backend.initial_state(BATCH, training=False), []
    for batch in BATCHES:
        step = backend.evaluate_step(batch, state)
        state = step.state
        expected.append(float(step.nll))
    assert probe(probes.evaluate_from_one_buffer, backend, BATCHES) == expected
