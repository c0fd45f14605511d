"""Keras' backend; what it shares with TensorFlow's is in `tensorflow/runtime.py`."""

from __future__ import annotations

import dataclasses
import time

import keras
import numpy as np
import tensorflow as tf

from ptbench.backends.base import PARAMETER
from ptbench.backends.keras import model, tuned
from ptbench.backends.tensorflow.runtime import (
    PerReplica,
    Tensor,
    TensorFlowRuntimeBackend,
    Tensors,
    Variable,
)
from ptbench.errors import PtbenchError
from ptbench.model.parameters import Layout
from ptbench.model.recipe import Recipe


class KerasBackend(TensorFlowRuntimeBackend):
    """The contract in Keras.

    The training step is written as Keras' guide "Writing a training loop from scratch in
    TensorFlow" does. Keras reads [batch, time], so batches are turned over.
    """

    name = "keras"
    package = "keras"
    transposed = ("softmax.weight",)  # the kernel of a Dense layer

    def layout(self, name: str) -> Layout:
        layout = super().layout(name)
        if layout.packed:
            layout = dataclasses.replace(layout, transposed=True)  # column by column
        if self.recipe.rnn == "gru" and name.startswith("rnn."):
            # update, reset, candidate
            layout = dataclasses.replace(layout, gate_order=(1, 0, 2))
        return layout

    def build(self) -> None:
        means = tuned if self.recipe.implementation == "tuned" else model
        self.model = model.LanguageModel(
            self.recipe,
            self.shapes,
            self.kept,
            self.setup.accelerator,
            means.recurrent_layer,
            means.nll,
        )
        parameters = [self.model.by_name[name] for name in self.shapes]
        self.optimizer = model.optimizer_of(self.recipe)
        self.optimizer.build(parameters)
        self._variables = {PARAMETER: dict(zip(self.shapes, parameters, strict=True))}
        for slot in self.slots:
            variables = getattr(self.optimizer, f"{slot}s")
            self._variables[slot] = dict(zip(self.shapes, variables, strict=True))

    def variables(self, kind: str) -> dict[str, Variable]:
        return self._variables[kind]

    def objective(
        self, inputs: Tensor, targets: Tensor, mask: Tensor, state: Tensors, step: Tensor
    ) -> tuple[Tensor, Tensor, Tensors]:
        inputs, targets, mask = (tf.transpose(array) for array in (inputs, targets, mask))
        with keras.StatelessScope(self._seeds(step)):
            return self.model.objective(inputs, targets, mask, state)

    def _seeds(self, step: Tensor) -> list[tuple[Variable, Tensor]]:
        """Return a value for each random generator, for a replica's next step."""
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        alike = {id(state) for state in self.model.dropout.alike_on_all_replicas}
        generators = self.model.non_trainable_variables  # nothing else is
        seeds = []
        for index, generator in enumerate(generators):
            draw = (step * len(generators) + index) * self.devices
            if id(generator) not in alike:
                draw += tf.cast(replica, tf.int64)
            seeds.append((generator, tf.stack([tf.constant(self.setup.seed, tf.int64), draw])))
        return seeds

    def nll(
        self, inputs: Tensor, targets: Tensor, mask: Tensor, state: Tensors
    ) -> tuple[Tensor, Tensors]:
        inputs, targets, mask = (tf.transpose(array) for array in (inputs, targets, mask))
        with keras.StatelessScope():  # nothing is drawn, and nothing is to be noted as drawn
            return self.model.nll(inputs, targets, mask, state)

    def log_probabilities(self, inputs: Tensor, state: Tensors) -> tuple[Tensor, Tensors]:
        with keras.StatelessScope():
            log_p, state = self.model.log_probabilities(tf.transpose(inputs), state)
        return tf.transpose(log_p, (1, 0, 2)), state

    def update(
        self,
        gradients: list[PerReplica],
        norm: Tensor,  # noqa: ARG002 - Keras' optimizers take their own
        numbers: Tensors,
        step: Tensor,
    ) -> None:
        # Outside the replicas, so that Keras clips the sum over them. Inside, it would clip each
        # replica's gradient and add up afterwards.
        optimizer = self.optimizer
        optimizer.learning_rate = numbers["learning_rate"]
        optimizer.iterations.assign(step)
        if isinstance(optimizer, model.AveragedSGD):
            optimizer.share.assign(numbers["share"])
        first = [self.local(gradient)[0] for gradient in gradients]
        optimizer.apply(first, list(self.variables(PARAMETER).values()))


class KerasFit:
    """Keras' own `fit` of the same model, the yardstick that a Keras user would start from.

    It has stateless windows, Keras' layers, losses, optimizer and training loop, and nothing of
    ours. Batches are of words whose frequencies fall as 1 / rank.
    """

    STEPS = 8  # in a call of `fit`, after which the clock is looked at

    def __init__(self, recipe: Recipe, vocabulary_size: int, threads: int) -> None:
        if recipe.mixtures or recipe.rnn != "lstm":
            raise PtbenchError("Keras has no layer for a mixture of softmaxes: fit is for the LSTM")
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(threads)
        layers = [keras.layers.Embedding(vocabulary_size, recipe.embedding_size)]
        layers.append(keras.layers.Dropout(recipe.unit_dropout[0]))
        for width, rate in zip(recipe.widths, recipe.unit_dropout[1:], strict=True):
            layers.append(keras.layers.LSTM(width, return_sequences=True))
            layers.append(keras.layers.Dropout(rate))
        layers.append(keras.layers.Dense(vocabulary_size))
        self.model = keras.Sequential(layers)
        self.model.compile(
            optimizer=keras.optimizers.SGD(0.1, global_clipnorm=recipe.clip_norm),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        frequencies = 1 / np.arange(1, vocabulary_size + 1)
        shape = (2, self.STEPS * recipe.batch_size, recipe.sequence_length)
        words = np.random.default_rng(0).choice(
            vocabulary_size, shape, p=frequencies / frequencies.sum()
        )
        self.inputs, self.targets = words.astype(np.int32)
        self.batch_size = recipe.batch_size

    def train(self, seconds: float) -> dict[str, float]:
        """Call `fit` for at least that long: tokens, seconds, and the last nll per token."""
        tokens, start = 0, time.perf_counter()
        while True:
            history = self.model.fit(
                self.inputs, self.targets, batch_size=self.batch_size, shuffle=False, verbose=0
            )
            tokens += self.inputs.size
            spent = time.perf_counter() - start
            if spent >= seconds:
                return {"tokens": tokens, "seconds": spent, "nll": history.history["loss"][-1]}
