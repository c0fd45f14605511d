"""A batch whose logits are more than tuned implementations hold at once is still the oracle's."""

from __future__ import annotations

import numpy as np
import pytest
from tests.support.problems import VOCABULARY, largest_error, new_oracle, random_parameters, recipe
from tests.support.remote import Backends

from ptbench.corpus.batching import Batch
from ptbench.model.recipe import Recipe

TIME, BATCH, MIXTURES = 8, 256, 128  # ten million logits, in chunks of unequal size
PLAIN = recipe(batch_size=BATCH, sequence_length=TIME, implementation="tuned", layers=1)
MIXTURE = PLAIN.model_copy(update={"mixtures": MIXTURES, "latent_size": 2})
TIED = PLAIN.model_copy(update={"tie_weights": True})


@pytest.mark.parametrize(
    ("model", "devices"),
    [(PLAIN, 1), (MIXTURE, 1), (TIED, 2)],
    ids=["softmax", "mixture", "tied, two replicas"],
)
def test_loss_and_gradients_of_a_large_batch_are_the_oracle_s(
    backends: Backends, framework: str, model: Recipe, devices: int
) -> None:
    rng = np.random.default_rng(0)
    inputs, targets = rng.integers(0, VOCABULARY, (2, TIME, BATCH), np.int32)
    mask = (rng.random((TIME, BATCH)) < 0.9).astype(np.float32)
    parameters = random_parameters(model, seed=1)
    backend, oracle = backends.get(framework, model, devices), new_oracle(model)
    backend.load_parameters(parameters)
    oracle.load_parameters(parameters)
    state = backend.initial_state(BATCH, training=True)
    oracle_state = oracle.initial_state(BATCH, training=True)
    gradients = backend.gradients(Batch(inputs, targets, mask), state)
    error, name = largest_error(
        gradients, oracle.gradients(Batch(inputs, targets, mask), oracle_state)
    )
    assert error < 1e-5, name
    step = backend.train_step(Batch(inputs, targets, mask), state, 0.0)
    expected = oracle.train_step(Batch(inputs, targets, mask), oracle_state, 0.0)
    assert float(step.nll) == pytest.approx(expected.nll, rel=1e-5)
    assert float(step.gradient_norm) == pytest.approx(expected.gradient_norm, rel=1e-5)
