"""Every pass over a batch of one sequence gives the same bits.

With one sequence a sum over the batch is a copy, which a framework may leave in the memory of what
it is of. TensorFlow then added the time steps' bias gradients up in the order in which its threads
finished, and rounded them differently each time.
"""

from __future__ import annotations

import numpy as np
import pytest
from tests.support import probes
from tests.support.problems import VOCABULARY, recipe
from tests.support.remote import Backends, probe

from ptbench.corpus.batching import Batch
from ptbench.model.recipe import Recipe

TIME = 30
CALLS = 40  # where threads decided, between 5 and 85 % of TensorFlow's calls differed
FEWER_CALLS = 10  # of what does not run on TensorFlow
WIDE = {"batch_size": 1, "sequence_length": TIME, "hidden_size": 64, "recurrent_bias": True}
RECIPES = {
    "stepwise lstm": recipe(**WIDE, kernel="stepwise"),
    "stepwise gru": recipe(**WIDE, kernel="stepwise", rnn="gru"),
    "stepwise rnn_relu": recipe(**WIDE, kernel="stepwise", rnn="rnn_relu"),
    "sparse": recipe(**WIDE, kernel="sparse", kept_weights=0.3),
    "tuned lstm": recipe(**WIDE, implementation="tuned"),
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_batch_of_one_sequence_has_the_same_gradients_every_time(
    backends: Backends, framework: str, recipe: Recipe
) -> None:
    inputs, targets = np.random.default_rng(0).integers(0, VOCABULARY, (2, TIME, 1), np.int32)
    batch = Batch(inputs, targets, np.ones((TIME, 1), np.float32))
    backend = backends.get(framework, recipe)
    calls = CALLS if framework in ("tensorflow", "keras") else FEWER_CALLS
    assert probe(probes.gradients_that_differ, backend, batch, calls) == []
