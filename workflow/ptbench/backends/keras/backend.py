"""Keras' backend; what it shares with TensorFlow's is in `tensorflow/runtime.py`."""

from __future__ import annotations

import dataclasses

import keras
import tensorflow as tf

from ptbench.backends.base import PARAMETER
from ptbench.backends.keras import model, tuned
from ptbench.backends.tensorflow import runtime
from ptbench.backends.tensorflow.model import Tensor, Tensors
from ptbench.model.parameters import Layout


class KerasBackend(runtime.TensorFlowRuntimeBackend):
    """The contract in Keras.

    The training step is written as Keras' guide "Writing a training loop from scratch in
    TensorFlow" does.
    """

    name = "keras"
    package = "keras"
    transposed = ("softmax.weight",)  # the kernel of a Dense layer

    def layout(self, name: str) -> Layout:
        layout = super().layout(name)
        if layout.packed:
            layout = dataclasses.replace(layout, transposed=True)  # column by column
        return layout

    def build(self) -> None:
        means = tuned if self.recipe.implementation == "tuned" else model
        # On GPUs Keras' LSTM is cuDNN's, which nothing in `tuned` beats.
        layers = means if self.setup.accelerator == "cpu" else model
        # that of the layers made from now on
        keras.config.set_dtype_policy(model.POLICIES[self.recipe.precision])
        self.model = model.LanguageModel(
            self.recipe, self.shapes, self.kept, layers.recurrent_layer, means.nll
        )
        parameters = [self.model.by_name[name] for name in self.shapes]
        self.optimizer = model.optimizer_of(self.recipe)
        self.optimizer.build(parameters)
        self.variables = {PARAMETER: dict(zip(self.shapes, parameters, strict=True))}
        for slot in self.slots:
            variables = getattr(self.optimizer, f"{slot}s")
            self.variables[slot] = dict(zip(self.shapes, variables, strict=True))

    def objective(
        self, inputs: Tensor, targets: Tensor, mask: Tensor, state: Tensors, step: Tensor
    ) -> tuple[Tensor, Tensor, Tensors]:
        with keras.StatelessScope(self._seeds(step)):
            return self.model.objective(inputs, targets, mask, state)

    def _seeds(self, step: Tensor) -> list[tuple[keras.Variable, Tensor]]:
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

    def update(self, gradients: list[runtime.PerReplica], numbers: Tensors) -> None:
        # Outside the replicas, so that Keras clips the sum over them. Inside, it would clip each
        # replica's gradient and add up afterwards.
        optimizer = self.optimizer
        optimizer.learning_rate = numbers["learning_rate"]
        optimizer.iterations.assign(numbers["step"])
        if isinstance(optimizer, model.AveragedSGD):
            optimizer.share.assign(numbers["share"])
        first = [self.local(gradient)[0] for gradient in gradients]
        optimizer.apply(first, list(self.variables[PARAMETER].values()))
