"""Dynamic evaluation: a trained model that goes on learning from the text it is scored on.

Krause et al. 2018, arXiv:1709.07432, with their update that is normalised by the gradients' root
mean square on the training text, and with their decay towards the trained parameters. It needs
nothing of a backend but its contract, so every framework has it.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from ptbench.backends.base import Backend
from ptbench.corpus.batching import Feed
from ptbench.corpus.definitions import Split
from ptbench.corpus.store import Corpus
from ptbench.errors import PtbenchError
from ptbench.model.parameters import Parameters
from ptbench.model.recipe import Recipe
from ptbench.training.cell import feed_split
from ptbench.training.records import Score, score

STREAMS = 100  # of the training text, for its gradients, as in the authors' program
EPSILON = 0.001  # added to the root mean square, as there

# What a model is built with instead, so that its gradients are those of the mean loss per token,
# and a training step with a rate of 0 changes nothing.
PLAIN: dict[str, Any] = {
    "dropout": 0.0,
    "input_dropout": None,
    "hidden_dropout": None,
    "output_dropout": None,
    "latent_dropout": 0.0,
    "word_dropout": 0.0,
    "recurrent_dropout": 0.0,
    "weight_dropout": 0.0,
    "activation_regularization": 0.0,
    "temporal_activation_regularization": 0.0,
    "objective": "mean_per_token",
    "optimizer": "sgd",
    "clip_norm": None,
    "weight_decay": 0.0,
}


class Dynamics(NamedTuple):
    """How a model learns while it is scored; the defaults are those of the authors' program."""

    learning_rate: float = 0.002
    decay: float = 0.02  # share of the way back to the trained parameters, at each segment
    segment: int = 5  # tokens that are scored before the next update
    statistics_batches: int | None = None  # of the training text; None: all


def evaluate_dynamically(
    backend: Backend, corpus: Corpus, split: Split, how: Dynamics | None = None
) -> Score:
    """Return the score of a split, read as one stream, with an update after every segment.

    A segment is scored with the parameters that the segments before it have left:

        p += decay' (trained - p) - rate g / (r + 0.001)

    with g the gradient of the segment's mean loss, r its root mean square on the training text, and
    decay' = min(decay r / mean of r over all weights, 1), elementwise. A model that was trained on
    windows or sentences is updated after each of these. The backend has its trained parameters
    again in the end.

    Args:
        backend: built with `PLAIN`.
        corpus: in its vocabulary.
        split: of the corpus.
        how: rate, decay, and length of a segment.

    Raises:
        PtbenchError: if the loss is not finite, as the rate is too high.
    """
    how = how or Dynamics()
    trained = backend.parameters()
    rms = gradient_rms(backend, feed(corpus, backend.recipe, "train", STREAMS, how), how)
    mean = sum(float(r.sum()) for r in rms.values()) / sum(r.size for r in rms.values())
    scale = how.decay / mean if mean else 0.0
    back = {name: np.minimum(scale * r, 1.0) for name, r in rms.items()}
    rates = {name: how.learning_rate / (r + EPSILON) for name, r in rms.items()}
    now = {name: array.copy() for name, array in trained.items()}
    text = feed(corpus, backend.recipe, split, 1, how)
    nll, tokens = 0.0, 0
    for gradients, batch_nll, batch_tokens in gradients_of(backend, text):
        nll, tokens = nll + batch_nll, tokens + batch_tokens
        if not np.isfinite(nll):
            raise PtbenchError(
                f"the loss is not finite after {tokens} tokens; lower --learning-rate, which is "
                f"{how.learning_rate:g}"
            )
        for name, array in now.items():
            array += back[name] * (trained[name] - array) - rates[name] * gradients[name]
        backend.load_parameters(now)
    backend.load_parameters(trained)
    if tokens != text.predicted_tokens:
        raise AssertionError(f"evaluated {tokens} of {text.predicted_tokens} tokens")
    return score(nll, tokens)


def feed(corpus: Corpus, recipe: Recipe, split: Split, batch_size: int, how: Dynamics) -> Feed:
    """Return a split in segments, or in what the model was trained on where those are separate."""
    if recipe.feeding == "parallel_streams":
        recipe = recipe.model_copy(update={"sequence_length": how.segment})
    return feed_split(corpus, recipe, split, batch_size)


def gradient_rms(backend: Backend, text: Feed, how: Dynamics) -> Parameters:
    """Return the root mean square over batches of each weight's gradient."""
    squares = {name: np.zeros(shape, np.float32) for name, shape in backend.shapes.items()}
    count = 0
    for gradients, _, _ in itertools.islice(gradients_of(backend, text), how.statistics_batches):
        for name, gradient in gradients.items():
            squares[name] += gradient**2
        count += 1
    return {name: np.sqrt(square / count) for name, square in squares.items()}


def gradients_of(backend: Backend, text: Feed) -> Iterator[tuple[Parameters, float, int]]:
    """Yield each batch's gradients, its summed nll [nats] and its tokens; no parameter changes."""
    with contextlib.closing(text.epoch(1)) as batches:
        zero_state = state = backend.initial_state(text.batch_size, training=True)
        for batch in batches:
            gradients = backend.gradients(batch, state)
            step = backend.train_step(batch, state, 0.0)  # for the loss and the next state
            state = step.state if text.carries_state else zero_state
            yield gradients, float(step.nll), int(batch.mask.sum())
