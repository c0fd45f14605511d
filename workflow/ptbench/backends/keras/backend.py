"""The contract in Keras.

The training step is written as Keras' guide "Writing a training loop from scratch in TensorFlow"
does, with `tf.distribute` for more than one device.

Keras' layers read [batch, time]; the contract's [time, batch] is turned over where data enter and
leave, unless the model has time first too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from ptbench.backends.base import Backend, EvaluateStep, State, TrainStep
from ptbench.backends.contract__LEFT import Feature, Mask, Tokens, device_columns, objective_divisor
from ptbench.backends.keras import devices as process
from ptbench.backends.keras.model import LanguageModel
from ptbench.backends.keras.optimizer import AveragedSGD, clips_by_rate, optimizer_of
from ptbench.model.optimizers import OPTIMIZER_SLOTS
from ptbench.model.parameters import Parameters, check_parameters, parameter_shapes, state_widths
from ptbench.model.recipe import Accelerator, Recipe


class KerasBackend(Backend):
    """The contract in Keras."""

    name = "keras"
    package = "keras"
    features = (
        Feature("embedding", True, "keras.layers.Embedding"),
        Feature("LSTM layer", True, "keras.layers.LSTM"),
        Feature(
            "GRU and simple recurrent layers",
            True,
            "keras.layers.GRU, SimpleRNN; a second bias for LSTM and SimpleRNN is ours",
        ),
        Feature("explicit time steps", True, "keras.layers.RNN with LSTMCell, GRUCell, ..."),
        Feature(
            "sparse LSTM",
            False,
            "keras.layers.RNN with a cell of gathers and keras.ops.segment_sum",
        ),
        Feature("mixture of softmaxes", False, "layers of keras.layers.Dense and keras.ops"),
        Feature(
            "weight tying and factorised output",
            True,
            "keras.layers.ReversibleEmbedding; two keras.layers.Dense",
        ),
        Feature("dropout", True, "keras.layers.Dropout"),
        Feature("locked dropout", True, "keras.layers.Dropout(noise_shape)"),
        Feature("word dropout", False, "a layer of keras.layers.Dropout and keras.ops.take"),
        Feature(
            "recurrent dropout",
            False,
            "recurrent_dropout of Keras' cells, overridden to draw one mask for all gates; "
            "kernel fused falls back to explicit time steps",
        ),
        Feature(
            "weight dropout",
            False,
            "a keras.layers.Wrapper of keras.layers.Dropout and the layer's stateless_call",
        ),
        Feature(
            "activation regularisation",
            False,
            "keras.ops; the activity_regularizer of Keras' layers knows of no padding and no time",
        ),
        Feature("softmax cross-entropy", True, "keras.losses.SparseCategoricalCrossentropy"),
        Feature("SGD", True, "keras.optimizers.SGD"),
        Feature("Adam", False, "Adam, a keras.optimizers.Optimizer"),
        Feature("RMSProp", False, "RMSProp, a keras.optimizers.Optimizer"),
        Feature(
            "averaged SGD",
            False,
            "AveragedSGD, a keras.optimizers.SGD; Keras' use_ema is an exponential average",
        ),
        Feature("weight decay", False, "keras.optimizers.SGD(weight_decay), but Adam and RMSProp"),
        Feature("gradient clipping by global norm", True, "keras.optimizers(global_clipnorm)"),
        Feature("uniform initialisation", True, "keras.initializers.RandomUniform"),
        Feature(
            "Keras' default initialisation",
            True,
            "keras.initializers.GlorotUniform, Orthogonal, RandomUniform",
        ),
        Feature("learning-rate change", True, "optimizer.learning_rate"),
        Feature("data parallel", True, "tf.distribute.MirroredStrategy"),
        Feature(
            "truncated back-propagation with carried state",
            True,
            "keras.layers.LSTM(initial_state, return_state)",
        ),
        Feature(
            "deterministic per-step randomness", True, "keras.StatelessScope with values for seeds"
        ),
        Feature("saving parameters", True, "keras.Variable.numpy, assign"),
    )

    def __init__(
        self,
        recipe: Recipe,
        vocabulary_size: int,
        devices: int = 1,
        seed: int = 0,
        accelerator: Accelerator = "cpu",
        threads: int = 1,
    ) -> None:
        super().__init__(recipe, vocabulary_size, devices, seed, accelerator, threads)
        self.tf_devices = process.configure_tensorflow(devices, accelerator, threads)
        self.strategy = process.strategy_for(self.tf_devices)
        with self.strategy.scope():
            self.model = LanguageModel(recipe, vocabulary_size, seed, accelerator)
            self.variables = [stored.variable for stored in self.model.stored]
            self.optimizer = optimizer_of(recipe)
            self.optimizer.build(self.variables)
        self.global_gradients = tf.function(self._global_gradients, autograph=False)
        self.update = tf.function(self._update, autograph=False)
        self.evaluate = tf.function(self._evaluate, autograph=False)
        self.predict = tf.function(self._predict, autograph=False)

    # Training step: each replica's gradients, their sum over the replicas, one update.

    def _replica_gradients(
        self, tokens: Any, targets: Any, mask: Any, state: Any, seeds: Any, divisor: Any
    ) -> tuple[Any, list[Any], list[Any]]:
        """Summed nll of a replica's share, its part of the objective's gradient, and its state."""
        generators = self.model.non_trainable_variables
        # In a scope the seeds of dropout are values that the step is given.
        with (
            tf.GradientTape() as tape,
            keras.StatelessScope(zip(generators, tf.unstack(seeds), strict=True)),
        ):
            objective, nll, state = self.model.objective(tokens, targets, mask, state)
            objective = objective / divisor
        # The embedding's gradient is sparse, with a row for each occurrence of a word. Those must
        # be added up before its norm is taken and before replicas are summed.
        gradients = tape.gradient(objective, self.variables)
        return nll, [tf.convert_to_tensor(gradient) for gradient in gradients], state

    def _global_gradients(self, *batch: Any) -> tuple[Any, list[Any], Any]:
        """The same of the global batch: nll and gradient on the first device."""
        nll, gradients, state = self.strategy.run(self._replica_gradients, batch)
        with tf.device(self.tf_devices[0]):
            nll, gradients = self.strategy.reduce("SUM", (nll, gradients), axis=None)
            gradients = [
                gradient if mask is None else gradient * mask
                for gradient, mask in zip(gradients, self.model.masks, strict=True)
            ]
        return nll, gradients, state

    def _update(self, learning_rate: Any, *batch: Any) -> tuple[Any, Any, Any]:
        nll, gradients, state = self.global_gradients(*batch)
        norm = tf.linalg.global_norm(gradients)
        if clips_by_rate(self.recipe):
            learning_rate *= self.recipe.clip_norm / tf.maximum(norm, self.recipe.clip_norm)
        # Outside strategy.run, so that Keras clips the sum over the replicas. Inside, it would
        # clip each replica's gradient and add up afterwards.
        self.optimizer.learning_rate = learning_rate
        self.optimizer.apply(gradients, self.variables)
        return nll, norm, state

    def _batch(self, inputs: Tokens, targets: Tokens, mask: Mask, state: State) -> tuple[Any, ...]:
        """The arguments of `_replica_gradients` for the next step, spread over the devices."""
        columns = device_columns(inputs.shape[1], self.devices)

        def share(array: npt.NDArray[Any]) -> Any:
            return self._spread(lambda replica: self._arranged(array[:, columns[replica]]))

        divisor = tf.constant(objective_divisor(self.recipe, mask), tf.float32)
        return (*map(share, (inputs, targets, mask)), state, self._spread(self._seeds), divisor)

    def _seeds(self, replica: int) -> npt.NDArray[np.int64]:
        """Of each generator of random numbers, for the next step on a replica."""
        generators = self.model.non_trainable_variables  # nothing else is
        shared = {id(generator) for generator in self.model.shared_generators()}
        seeds = []
        for index, generator in enumerate(generators):
            draw = (self.step * len(generators) + index) * self.devices
            seeds.append((self.seed, draw if id(generator) in shared else draw + replica))
        return np.array(seeds, np.int64).reshape(-1, 2)

    def _arranged(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """A copy of an array [time, batch] as the model reads it; its own inverse."""
        return (array if self.model.time_first else array.T).copy()

    def _spread(self, value: Callable[[int], npt.NDArray[Any]]) -> Any:
        """`value(replica)` of each replica on its device."""

        def on_device(context: Any) -> Any:
            replica = context.replica_id_in_sync_group
            with tf.device(self.tf_devices[replica]):
                return tf.constant(value(replica))

        return self.strategy.experimental_distribute_values_from_function(on_device)

    def train_step(
        self,
        inputs: Tokens,
        targets: Tokens,
        mask: Mask,
        state: State,
        learning_rate: float,
        averaged: int = 1,
    ) -> TrainStep:
        batch = self._batch(inputs, targets, mask, state)
        if isinstance(self.optimizer, AveragedSGD):
            self.optimizer.share.assign(1 / averaged)
        result = self.update(tf.constant(learning_rate, tf.float32), *batch)
        self.step += 1
        return TrainStep(*result)

    def gradients(self, inputs: Tokens, targets: Tokens, mask: Mask, state: State) -> Parameters:
        _, gradients, _ = self.global_gradients(*self._batch(inputs, targets, mask, state))
        return self._canonical([gradient.numpy() for gradient in gradients])

    # Evaluation, on the first device.

    def _evaluate(self, tokens: Any, targets: Any, mask: Any, state: Any) -> tuple[Any, list[Any]]:
        with keras.StatelessScope():  # nothing is drawn, and nothing is to be noted as drawn
            return self.model.nll(tokens, targets, mask, state)

    def _predict(self, tokens: Any, state: Any) -> tuple[Any, list[Any]]:
        with keras.StatelessScope():
            return self.model.log_probabilities(tokens, state)

    def evaluate_step(
        self, inputs: Tokens, targets: Tokens, mask: Mask, state: State
    ) -> EvaluateStep:
        with tf.device(self.tf_devices[0]):
            batch = [tf.constant(self._arranged(array)) for array in (inputs, targets, mask)]
            return EvaluateStep(*self.evaluate(*batch, state))

    def next_token_log_probabilities(
        self, inputs: Tokens, state: State
    ) -> tuple[npt.NDArray[np.float32], State]:
        with tf.device(self.tf_devices[0]):
            log_p, state = self.predict(tf.constant(self._arranged(inputs)), state)
        return (log_p.numpy() if self.model.time_first else np.swapaxes(log_p, 0, 1)), state

    # Parameters and states.

    def _canonical(self, values: list[npt.NDArray[Any]]) -> Parameters:
        """Copies, by canonical name, of what has the layout of the variables."""
        found: Parameters = {}
        for stored, value in zip(self.model.stored, values, strict=True):
            found |= stored.unpack(value)
        names = parameter_shapes(self.recipe, self.vocabulary_size)
        return {name: np.array(found[name], np.float32, order="C") for name in names}

    def _assign(
        self, variables: list[keras.Variable], parameters: Mapping[str, npt.NDArray[Any]]
    ) -> None:
        masks = self.model.masks
        for stored, variable, mask in zip(self.model.stored, variables, masks, strict=True):
            value = np.array(stored.pack(parameters), np.float32, order="C")  # not the caller's
            variable.assign(value if mask is None else value * mask.numpy())

    def parameters(self) -> Parameters:
        return self._canonical([variable.numpy() for variable in self.variables])

    def load_parameters(self, parameters: Mapping[str, npt.NDArray[Any]]) -> None:
        check_parameters(parameters, self.recipe, self.vocabulary_size)
        self._assign(self.variables, parameters)

    def initial_state(self, batch_size: int, training: bool) -> State:
        zeros = [np.zeros((batch_size, n), np.float32) for n in state_widths(self.recipe).values()]
        return self._to_state(zeros, training)

    def _to_state(self, values: list[npt.NDArray[np.float32]], training: bool) -> State:
        """The arrays [batch, width] of `state_widths` on their devices."""
        if not training:
            with tf.device(self.tf_devices[0]):
                return [tf.constant(value) for value in values]
        columns = device_columns(values[0].shape[0], self.devices)

        def share(value: npt.NDArray[np.float32]) -> Any:
            return self._spread(lambda replica: value[columns[replica]])

        return [share(value) for value in values]

    def slots(self) -> dict[str, list[keras.Variable]]:
        """The optimizer's variables of each slot."""
        names = OPTIMIZER_SLOTS[self.recipe.optimizer]
        return {slot: getattr(self.optimizer, f"{slot}s") for slot in names}

    def snapshot(self, state: State) -> dict[str, npt.NDArray[Any]]:
        saved: dict[str, npt.NDArray[Any]] = {"step": np.array(self.step)}
        saved |= {f"parameter.{name}": value for name, value in self.parameters().items()}
        for slot, variables in self.slots().items():
            values = self._canonical([variable.numpy() for variable in variables])
            saved |= {f"optimizer.{slot}.{name}": value for name, value in values.items()}
        for name, shares in zip(state_widths(self.recipe), state, strict=True):
            saved[name] = np.concatenate(self.strategy.experimental_local_results(shares))
        return saved

    def restore(self, snapshot: Mapping[str, npt.NDArray[Any]]) -> State:
        names = parameter_shapes(self.recipe, self.vocabulary_size)
        self._assign(self.variables, {name: snapshot[f"parameter.{name}"] for name in names})
        for slot, variables in self.slots().items():
            values = {name: snapshot[f"optimizer.{slot}.{name}"] for name in names}
            self._assign(variables, values)
        self.step = int(snapshot["step"])
        self.optimizer.iterations.assign(self.step)
        return self._to_state([snapshot[n] for n in state_widths(self.recipe)], training=True)

    # Devices and provenance.

    def synchronize(self) -> None:
        tf.test.experimental.sync_devices()

    def device_names(self) -> list[str]:
        return process.device_names(self.accelerator, self.devices)

    def peak_device_memory(self) -> int | None:
        return process.peak_memory(self.accelerator, self.devices)

    def settings(self) -> dict[str, str]:
        return process.settings(self.accelerator) | {"implementation": self.recipe.implementation}
