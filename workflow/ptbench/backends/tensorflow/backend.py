"""TensorFlow's backend; what it shares with Keras' is in `runtime.py`."""

from __future__ import annotations

from functools import partial

import numpy as np
import tensorflow as tf

from ptbench.backends.base import PARAMETER
from ptbench.backends.tensorflow import model, runtime, tuned
from ptbench.backends.tensorflow.model import Tensor, Tensors


class TensorFlowBackend(runtime.TensorFlowRuntimeBackend):
    """The contract in TensorFlow."""

    name = "tensorflow"
    package = "tensorflow"

    def build(self) -> None:
        means = tuned if self.recipe.implementation == "tuned" else model
        # On GPUs Keras' LSTM is cuDNN's, which nothing in `tuned` beats.
        layers = means if self.setup.accelerator == "cpu" else model
        zeros = {name: np.zeros(shape) for name, shape in self.shapes.items()}
        shapes = {name: array.shape for name, array in self._stored(zeros).items()}
        self.model = model.LanguageModel(
            self.recipe, shapes, self.kept, layers.recurrent_layer, means.nll
        )
        self.variables = {
            slot: {name: tf.Variable(tf.zeros(shape)) for name, shape in shapes.items()}
            for slot in self.slots
        }
        self.variables[PARAMETER] = self.model.parameters

    def objective(
        self, inputs: Tensor, targets: Tensor, mask: Tensor, state: Tensors, step: Tensor
    ) -> tuple[Tensor, Tensor, Tensors]:
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        dropout = model.Dropout(self.recipe, self.setup.seed, step, replica)
        return self.model.objective(inputs, targets, mask, state, dropout)

    def update(self, gradients: list[runtime.PerReplica], numbers: Tensors) -> None:
        one = partial(model.update, self.recipe)
        parameters = self.variables[PARAMETER].items()
        for (name, parameter), gradient in zip(parameters, gradients, strict=True):
            slots = [self.variables[slot][name] for slot in self.slots]
            self.strategy.extended.update(parameter, one, (gradient, numbers, *slots), group=False)
