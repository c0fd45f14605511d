"""Keras' own `fit` of the same model: what a Keras user would write, to compare speeds with.

Stateless windows, and Keras' layers, losses, optimizer and training loop.
"""

from __future__ import annotations

import os
import time
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from ptbench.errors import PtbenchError
from ptbench.model.recipe import Recipe
from ptbench.training.provenance import peak_of

STEPS = 8  # in each call of `fit`; the clock is read between calls


class KerasFit:
    """A compiled Keras model and batches of words whose frequencies fall as 1 / rank."""

    def __init__(self, task: dict[str, Any]) -> None:
        """Compile the model that a task describes.

        Raises:
            PtbenchError: if Keras has no layers for the recipe's model.
        """
        recipe = Recipe.model_validate(task["recipe"])
        vocabulary_size, threads = task["vocabulary_size"], task["threads"]
        if recipe.mixtures or recipe.rnn != "lstm":
            raise PtbenchError("Keras has no layer for a mixture of softmaxes: fit is for the LSTM")
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(threads)
        rates = recipe.unit_dropout
        layers = [keras.layers.Embedding(vocabulary_size, recipe.embedding_size)]
        layers += [keras.layers.Dropout(rates[0])] if rates[0] else []
        for width, rate in zip(recipe.widths, rates[1:], strict=True):
            layers.append(keras.layers.LSTM(width, return_sequences=True))
            layers += [keras.layers.Dropout(rate)] if rate else []
        layers.append(keras.layers.Dense(vocabulary_size))
        self.model = keras.Sequential(layers)
        self.model.compile(
            optimizer=keras.optimizers.SGD(0.1, global_clipnorm=recipe.clip_norm),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        rng = np.random.default_rng(0)
        frequencies = 1 / np.arange(1, vocabulary_size + 1)
        shape = (2, STEPS * recipe.batch_size, recipe.sequence_length)
        words = rng.choice(vocabulary_size, shape, p=frequencies / frequencies.sum())
        self.inputs, self.targets = words.astype(np.int32)
        self.batch_size = recipe.batch_size

    def train(self, seconds: float) -> dict[str, float]:
        """Call `fit` for at least that long; return tokens, seconds, and nll per token."""
        tokens, start = 0, time.perf_counter()
        while True:
            history = self.model.fit(
                self.inputs, self.targets, batch_size=self.batch_size, shuffle=False, verbose=0
            )
            tokens += self.inputs.size
            spent = time.perf_counter() - start
            if spent >= seconds:
                return {"tokens": tokens, "seconds": spent, "nll": history.history["loss"][-1]}

    def peak_memory(self) -> int:
        """Return the largest memory of this process so far [bytes]."""
        return peak_of(os.getpid())
