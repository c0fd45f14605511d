"""The small models and batches that the suites test with.

There are few, and all batches for training have one shape, because some frameworks compile anew
for each recipe and shape.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from ptbench.backends.base import Backend, Setup, State
from ptbench.backends.oracle import Oracle
from ptbench.corpus.batching import Batch
from ptbench.model.initialization import initial_parameters
from ptbench.model.parameters import Parameters, parameter_shapes
from ptbench.model.recipe import Recipe

VOCABULARY = 40  # more than TIME * BATCH, so that a batch can have every word once
TIME, BATCH = 5, 4


def recipe(**changes: Any) -> Recipe:
    """A two-layer model, embedding and layers of different width, away from linearity."""
    small = {
        "batch_size": BATCH,
        "sequence_length": TIME,
        "embedding_size": 12,
        "hidden_size": 16,
        "layers": 2,
        "forget_bias": 0.5,
        "initialization_scale": 0.5,
        "clip_norm": 0.5,  # below every norm that occurs with sum_over_time
    }
    return Recipe.model_validate(small | changes)


SUM = recipe(objective="sum_over_time")
MEAN = recipe(objective="mean_per_token", clip_norm=0.1)
MEAN_ONE_LAYER = recipe(objective="mean_per_token", layers=1, clip_norm=0.1)
# No clipping, where gradients are so large that the default would clip.
SUM_ONE_LAYER = recipe(
    objective="sum_over_time", layers=1, clip_norm=None, initialization_scale=2.0
)
# Not one half, to tell what is kept from what is dropped; a clip norm that is never reached.
DROPOUT = recipe(dropout=0.35, clip_norm=1000.0)
ADAM_DROPOUT = recipe(
    optimizer="adam", learning_rate=0.01, weight_decay=0.01, dropout=0.35, clip_norm=0.5
)
# What AWD-LSTM adds to a model: dropped weights, penalties of activations, averaged parameters.
AWD: dict[str, Any] = {
    "weight_dropout": 0.3,
    "activation_regularization": 2.0,
    "temporal_activation_regularization": 1.0,
    "optimizer": "asgd",
}
ASGD_DROPOUT = recipe(**AWD, learning_rate=0.5, dropout=0.35, clip_norm=0.5)
RMSPROP_DROPOUT = recipe(optimizer="rmsprop", learning_rate=0.01, dropout=0.35, clip_norm=None)

MOS: dict[str, Any] = {"mixtures": 3, "latent_size": 6}
# Changes to `recipe` that make every kind of model, without dropout.
MODELS: dict[str, dict[str, Any]] = {
    "lstm": {},
    "lstm, two biases": {"recurrent_bias": True},
    "lstm, last layer wider": {"last_hidden_size": 20},
    "gru": {"rnn": "gru"},
    "gru, two biases": {"rnn": "gru", "recurrent_bias": True, "last_hidden_size": 8},
    "lstm, penalties": {
        "activation_regularization": 2.0, "temporal_activation_regularization": 3.0,
    },
    "rnn_tanh": {"rnn": "rnn_tanh"},
    "rnn_relu, two biases": {"rnn": "rnn_relu", "recurrent_bias": True},
    "sparse lstm": {"kept_weights": 0.3, "weight_decay": 0.1},
    "sparse gru": {"kept_weights": 0.3, "rnn": "gru"},
    "tied": {"tie_weights": True, "last_hidden_size": 12, "softmax_bias": False, "clip_norm": 0.3},
    "tied behind a projection": {"tie_weights": True},
    "factorised": {"output_rank": 5},
    "mixture": {"mixtures": 3},
    "mixture, mean per token": MOS | {"objective": "mean_per_token", "clip_norm": 0.1},
    "mixture, tied": MOS | {"latent_size": 12, "tie_weights": True, "softmax_bias": False},
    "mixture, tied behind a projection": MOS | {"tie_weights": True},
    "mixture, factorised": MOS | {"output_rank": 5},
    "mixture over a gru, penalties, mean per token": MOS
    | {
        "rnn": "gru", "objective": "mean_per_token", "clip_norm": 0.1,
        "activation_regularization": 5.0, "temporal_activation_regularization": 3.0,
    },
}  # fmt: skip
# What a framework computes by other means than its usual ones, if it has them: (kernel, changes).
KERNEL_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "stepwise, lstm": ("stepwise", {"last_hidden_size": 20}),
    "stepwise, lstm, two biases": ("stepwise", {"recurrent_bias": True}),
    "stepwise, gru": ("stepwise", {"rnn": "gru"}),
    "stepwise, gru, two biases": ("stepwise", {"rnn": "gru", "recurrent_bias": True}),
    "stepwise, rnn_tanh": ("stepwise", {"rnn": "rnn_tanh"}),
    "stepwise, rnn_relu": ("stepwise", {"rnn": "rnn_relu"}),
    "stepwise, sparse": ("stepwise", {"kept_weights": 0.3}),
    "block, lstm": ("block", {"last_hidden_size": 20}),
    "block, lstm, two biases": ("block", {"recurrent_bias": True}),
    "block, sparse": ("block", {"kept_weights": 0.3}),
    "sparse, lstm": ("sparse", {"kept_weights": 0.3, "weight_decay": 0.1}),
    "sparse, lstm, adam": (
        "sparse", {"kept_weights": 0.1, "optimizer": "adam", "learning_rate": 0.01}
    ),
}  # fmt: skip
# Those whose tuned implementations are tested too: one of each path through the layers.
TUNED_KERNEL_MODELS = (
    "stepwise, lstm", "stepwise, gru, two biases", "stepwise, rnn_tanh", "stepwise, sparse",
    "block, lstm, two biases", "sparse, lstm",
)  # fmt: skip
IMPLEMENTATIONS = ("stock", "tuned")


AnOracle = TypeVar("AnOracle", bound=Oracle)


def new_oracle(
    recipe: Recipe,
    devices: int = 1,
    seed: int = 0,
    vocabulary_size: int = VOCABULARY,
    kind: type[AnOracle] = Oracle,  # type: ignore[assignment]
) -> AnOracle:
    """Return the oracle, or one of a kind of its own, with the usual initial parameters."""
    made = kind(Setup(recipe, vocabulary_size, devices, seed))
    made.load_parameters(initial_parameters(recipe, vocabulary_size, seed))
    return made


def random_batch(seed: int, padding: float = 0.3) -> Batch:
    """Random words, some of them more than once, a share of them masked."""
    rng = np.random.default_rng(seed)
    inputs, targets = rng.integers(0, VOCABULARY, (2, TIME, BATCH), np.int32)
    mask = (rng.random((TIME, BATCH)) >= padding).astype(np.float32)
    assert 0 < mask.mean() < 1 or padding == 0
    assert len(np.unique(inputs)) < inputs.size  # a word's gradients must be added up
    return Batch(inputs, targets, mask)


def distinct_batch() -> Batch:
    """Every position has a word of its own as input, and as target; nothing is masked."""
    words = np.arange(TIME * BATCH, dtype=np.int32).reshape(TIME, BATCH)
    return Batch(words, words[::-1].copy(), np.ones((TIME, BATCH), np.float32))


def uneven_batches(count: int) -> list[Batch]:
    """Batches of which the second half of the columns has fewer tokens than the first.

    In the last one it has none, as at the end of a split, when a replica has nothing but padding.
    """
    batches = [random_batch(seed, padding=0.2) for seed in range(count)]
    for index, batch in enumerate(batches):
        batch.mask[1 + index % (TIME - 1) :, BATCH // 2 :] = 0
    batches[-1].mask[:, BATCH // 2 :] = 0
    return batches


def relative_error(actual: Any, expected: Any) -> float:
    """|actual - expected| / |expected|, by the Euclidean norm over all elements."""
    expected = np.asarray(expected, np.float64)
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def largest_error(actual: Parameters, expected: Parameters) -> tuple[float, str]:
    """The relative error of the parameter that has the largest, and that parameter's name."""
    assert actual.keys() == expected.keys()
    return max((relative_error(actual[name], expected[name]), name) for name in expected)


def moved(parameters: Parameters, initial: Parameters) -> Parameters:
    """How far training has taken the parameters."""
    return {name: parameters[name] - initial[name] for name in initial}


def train(
    backend: Backend, batches: Sequence[Batch], rates: Sequence[float], state: State = None
) -> tuple[list[float], list[float], State]:
    """One step per batch and rate, the state carried: each nll, each norm, and the last state.

    asgd's mean begins with the third.
    """
    if state is None:
        state = backend.initial_state(BATCH, training=True)
    backend.average_from = None
    nll, norms = [], []
    for index, (batch, rate) in enumerate(zip(batches, rates, strict=True)):
        if index == 2:
            backend.average_from = backend.step
        step = backend.train_step(batch, state, rate)
        state = step.state
        nll.append(float(step.nll))
        norms.append(float(step.gradient_norm))
    return nll, norms, state


def random_parameters(recipe: Recipe, seed: int) -> Parameters:
    """Every parameter uniform in ±0.5, biases too, so that none can be mistaken for another."""
    rng = np.random.default_rng(seed)
    return {
        name: rng.uniform(-0.5, 0.5, shape).astype(np.float32)
        for name, shape in parameter_shapes(recipe, VOCABULARY).items()
    }


def same(actual: Mapping[str, Any], expected: Mapping[str, Any]) -> bool:
    """Whether two sets of arrays are equal, bit for bit."""
    return actual.keys() == expected.keys() and all(
        np.array_equal(actual[name], expected[name]) for name in expected
    )
