"""The small models and batches that the suites test with.

There are few of them, and most batches have one shape, because some frameworks compile for each
recipe and each shape.
"""

from __future__ import annotations

import itertools
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
    """Return a recipe of two layers, with changes.

    Embedding and layers have different widths, and weights are large enough for the model not to
    be nearly linear.
    """
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
# A rate other than one half, to tell what is kept from what is dropped. Nothing is clipped.
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
RMSPROP_DROPOUT = recipe(optimizer="rmsprop", learning_rate=0.01, dropout=0.35, clip_norm=0.5)
ASGD_DROPOUT = recipe(**AWD, learning_rate=0.5, dropout=0.35, clip_norm=0.5)

IMPLEMENTATIONS = ("stock", "tuned")


AnOracle = TypeVar("AnOracle", bound=Oracle)


def new_oracle(
    recipe: Recipe,
    devices: int = 1,
    seed: int = 0,
    vocabulary_size: int = VOCABULARY,
    kind: type[AnOracle] = Oracle,  # type: ignore[assignment]
) -> AnOracle:
    """Return an oracle, or a subclass of it, with the recipe's initial parameters."""
    made = kind(Setup(recipe, vocabulary_size, devices, seed))
    made.load_parameters(initial_parameters(recipe, vocabulary_size, seed))
    return made


def random_batch(seed: int, padding: float = 0.3) -> Batch:
    """Return random words, some of them more than once, a share of them masked."""
    rng = np.random.default_rng(seed)
    inputs, targets = rng.integers(0, VOCABULARY, (2, TIME, BATCH), np.int32)
    mask = (rng.random((TIME, BATCH)) >= padding).astype(np.float32)
    assert 0 < mask.mean() < 1 or padding == 0
    assert len(np.unique(inputs)) < inputs.size  # a word's gradients must be added up
    return Batch(inputs, targets, mask)


def uneven_batches(count: int, times: Sequence[int] = (TIME,)) -> list[Batch]:
    """Return batches in which the second half of the columns has fewer tokens than the first.

    In the last one it has none, as at the end of a split, when a replica has only padding.

    Args:
        count: how many.
        times: time steps of successive batches, again and again.
    """
    batches = []
    for index, time in zip(range(count), itertools.cycle(times)):
        inputs, targets, mask = (array[:time].copy() for array in random_batch(index, padding=0.2))
        mask[1 + index % (TIME - 1) :, BATCH // 2 :] = 0
        batches.append(Batch(inputs, targets, mask))
    batches[-1].mask[:, BATCH // 2 :] = 0
    return batches


def relative_error(actual: Any, expected: Any) -> float:
    """Return |actual - expected| / |expected|, by the Euclidean norm over all elements."""
    expected = np.asarray(expected, np.float64)
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def largest_error(actual: Parameters, expected: Parameters) -> tuple[float, str]:
    """Return the largest relative error of any parameter, nan before all, and its name."""
    assert actual.keys() == expected.keys()
    names = list(expected)
    errors = [relative_error(actual[name], expected[name]) for name in names]
    worst = int(np.argmax(errors))
    return errors[worst], names[worst]


def moved(parameters: Parameters, initial: Parameters) -> Parameters:
    """Return how far training has moved each parameter."""
    return {name: parameters[name] - initial[name] for name in initial}


def train(
    backend: Backend,
    batches: Sequence[Batch],
    rates: Sequence[float],
    state: State = None,
    carried: bool = True,
) -> tuple[list[float], list[float], State]:
    """Take one step for each batch and rate; return each nll, each norm, and the last state.

    asgd's mean begins with the third step.

    Args:
        backend: what to train.
        batches: one for each step.
        rates: learning rate of each step.
        state: of the first step; None: zero.
        carried: whether other steps start from the state after the one before, or from zero.
    """
    start = backend.initial_state(BATCH, training=True)
    if state is None:
        state = start
    backend.average_from = None
    nll, norms = [], []
    for index, (batch, rate) in enumerate(zip(batches, rates, strict=True)):
        if index == 2:
            backend.average_from = backend.step
        step = backend.train_step(batch, state if carried else start, rate)
        state = step.state
        nll.append(float(step.nll))
        norms.append(float(step.gradient_norm))
    return nll, norms, state


def random_parameters(recipe: Recipe, seed: int) -> Parameters:
    """Draw all parameters, biases too, from ±0.5, so that no two are alike."""
    rng = np.random.default_rng(seed)
    return {
        name: rng.uniform(-0.5, 0.5, shape).astype(np.float32)
        for name, shape in parameter_shapes(recipe, VOCABULARY).items()
    }


def same(actual: Mapping[str, Any], expected: Mapping[str, Any]) -> bool:
    """Return whether two sets of arrays are equal bit for bit."""
    return actual.keys() == expected.keys() and all(
        np.array_equal(actual[name], expected[name]) for name in expected
    )
