"""The passes of a step alone, which are timed to tell what of a step takes how long."""

from __future__ import annotations

import pytest
from tests.support import probes
from tests.support.problems import BATCH, DROPOUT, random_batch, recipe, train
from tests.support.remote import Backends, probe

from ptbench.backends import ORACLE
from ptbench.model.recipe import Recipe

AWD_MIXTURE = recipe(
    mixtures=2, dropout=0.35, weight_dropout=0.3, word_dropout=0.2, activation_regularization=0.1,
    temporal_activation_regularization=0.1, implementation="tuned",
)  # fmt: skip
BATCHES = [random_batch(seed) for seed in range(3)]


@pytest.mark.parametrize(
    ("model", "devices"), [(DROPOUT, 1), (AWD_MIXTURE, 2)], ids=["stock-1", "tuned-2"]
)
def test_passes_give_the_nll_of_the_step_and_change_nothing(
    backends: Backends, framework: str, model: Recipe, devices: int
) -> None:
    alone = train(backends.get(framework, model, devices), BATCHES, [0.5] * len(BATCHES))[0]
    backend = backends.get(framework, model, devices)
    state = backend.initial_state(BATCH, training=True)
    for batch, undisturbed in zip(BATCHES, alone, strict=True):
        passes = [
            one(batch, state)
            for one in (backend.forward_pass, backend.forward_and_backward_pass)
            for _ in range(2)  # the second would show what the first has changed
        ]
        step = backend.train_step(batch, state, 0.5)
        state = step.state
        assert step.nll == undisturbed
        assert passes == pytest.approx([step.nll] * 4, rel=1e-5)


def test_the_framework_s_own_profiler_names_operators_and_replaces_no_file(
    backends: Backends, framework: str
) -> None:
    """MXNet's writes a file in the place of the one that it is given, be it a device."""
    backend = backends.get(framework, DROPOUT)
    calls, device_is_there = probe(probes.operators_of_a_step, backend, BATCHES[0])
    assert framework == ORACLE or sum(calls.values()) >= 5  # the oracle has no profiler
    assert device_is_there
