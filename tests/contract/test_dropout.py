"""Dropout multiplies the embedding's and each layer's output by 0 or 1 / keep, anew each time.

The masks are not visible from outside, but they can be read off gradients: see `masks_of`.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from scipy import stats
from tests.support.problems import (
    BATCH,
    DROPOUT,
    TIME,
    VOCABULARY,
    distinct_batch,
    largest_error,
    random_batch,
    train,
)
from tests.support.remote import Backends

from ptbench.backends.contract import Backend
from ptbench.backends.numpy_oracle import NumpyOracle

KEEP = 1 - DROPOUT.dropout
PLACES = 1 + DROPOUT.layers  # the embedding's output and each layer's
STEPS = 5
Masks = list[np.ndarray[Any, Any]]  # for each place, [time, batch, units]: whether it is kept


class OracleWithMasks(NumpyOracle):
    """The oracle, dropping what it is told to."""

    masks: Masks

    def dropout_masks(self, steps: int, batch_size: int) -> Masks:
        assert self.masks[0].shape[:2] == (steps, batch_size)
        return [mask / KEEP for mask in self.masks]


def masks_of(backend: Backend) -> Masks:
    """What the backend would drop in its next step.

    With recurrent weights of zero and forget gates shut, nothing passes from one time step to
    another. If the mask then lets one position alone into the loss, a dropped unit there has no
    gradient: in the embedding's row, in its row of the next layer's input weights, or in its column
    of the softmax. As `gradients` changes nothing, all positions can be asked for in turn.
    """
    parameters = backend.parameters()
    hidden = DROPOUT.hidden_size
    shut = {name: array.copy() for name, array in parameters.items()}
    for layer in range(DROPOUT.layers):
        shut[f"rnn.{layer}.recurrent"][:] = 0
        shut[f"rnn.{layer}.bias"][hidden : 2 * hidden] = -200  # the sigmoid of which is 0
    backend.load_parameters(shut)
    state = backend.initial_state(BATCH, training=True)
    inputs, targets, everything = distinct_batch()
    rows: dict[int, list[Any]] = {place: [] for place in range(PLACES)}
    for position in np.ndindex(TIME, BATCH):
        mask = np.zeros_like(everything)
        mask[position] = 1
        gradient = backend.gradients(inputs, targets, mask, state)
        rows[0].append(gradient["embedding"][inputs[position]])
        for layer in range(1, DROPOUT.layers):
            rows[layer].append(np.abs(gradient[f"rnn.{layer}.input"]).sum(axis=1))
        rows[DROPOUT.layers].append(np.abs(gradient["softmax.weight"]).sum(axis=0))
    backend.load_parameters(parameters)
    return [
        np.array([np.abs(row) > 1e-6 * np.abs(row).max() for row in place]).reshape(TIME, BATCH, -1)
        for place in rows.values()
    ]


@pytest.fixture(scope="session", params=[1, 2], ids=lambda count: f"devices-{count}")
def devices(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(scope="session")
def observed(backends: Backends, framework: str, devices: int) -> list[Masks]:
    """The masks of successive steps."""
    backend = backends.get(framework, DROPOUT, devices)
    masks = []
    for _ in range(STEPS):
        masks.append(masks_of(backend))
        train(backend, [random_batch(0)], [1.0])
    return masks


def test_a_step_is_that_of_the_oracle_which_drops_the_same_units_and_scales_by_1_over_keep(
    backends: Backends, framework: str, devices: int, observed: list[Masks]
) -> None:
    backend = backends.get(framework, DROPOUT, devices)
    oracle = OracleWithMasks(DROPOUT, VOCABULARY)
    oracle.load_parameters(backend.parameters())
    state = backend.initial_state(BATCH, training=True)
    oracle_state = oracle.initial_state(BATCH, training=True)
    for index, masks in enumerate(observed[:3]):
        oracle.masks = masks
        batch = random_batch(index)
        error, name = largest_error(
            backend.gradients(*batch, state), oracle.gradients(*batch, oracle_state)
        )
        assert error < 1e-5, name
        step = backend.train_step(*batch, state, 0.1)
        expected = oracle.train_step(*batch, oracle_state, 0.1)
        assert float(step.nll) == pytest.approx(expected.nll, rel=1e-5)
        assert float(step.gradient_norm) == pytest.approx(expected.gradient_norm, rel=1e-5)
        state, oracle_state = step.state, expected.state


@pytest.mark.parametrize("place", range(PLACES))
def test_units_are_kept_with_the_keep_probability(observed: list[Masks], place: int) -> None:
    kept = np.array([masks[place] for masks in observed])
    low, high = stats.binom.interval(1 - 1e-6, kept.size, KEEP)
    assert low <= kept.sum() <= high


def test_masks_differ_between_time_steps_and_batch_elements(observed: list[Masks]) -> None:
    for masks in observed:
        positions = np.concatenate(masks, axis=-1).reshape(TIME * BATCH, -1)
        assert len(np.unique(positions, axis=0)) == TIME * BATCH


def test_masks_of_any_two_steps_places_and_replicas_are_unrelated(
    observed: list[Masks], devices: int
) -> None:
    draws = [
        mask.ravel()
        for masks in observed
        for place in masks
        for mask in np.split(place, devices, axis=1)
    ]
    chance = KEEP**2 + (1 - KEEP) ** 2  # that two independent draws agree
    for one, other in itertools.combinations(draws, 2):
        count = min(len(one), len(other))
        agreement = np.mean(one[:count] == other[:count])
        assert abs(agreement - chance) < 6 * math.sqrt(chance * (1 - chance) / count)


def test_masks_depend_on_the_seed(backends: Backends, framework: str) -> None:
    masks = masks_of(backends.get(framework, DROPOUT, seed=0))
    other = masks_of(backends.get(framework, DROPOUT, seed=1))
    for place in range(PLACES):
        assert not np.array_equal(other[place], masks[place])


def test_evaluation_drops_nothing(backends: Backends, framework: str) -> None:
    backend = backends.get(framework, DROPOUT)
    oracle = NumpyOracle(DROPOUT, VOCABULARY)
    oracle.load_parameters(backend.parameters())
    batch = random_batch(1)
    step = backend.evaluate_step(*batch, backend.initial_state(BATCH, training=False))
    expected = oracle.evaluate_step(*batch, oracle.initial_state(BATCH, training=False))
    assert float(step.nll) == pytest.approx(expected.nll, rel=1e-5)
