"""The steps that the training loop calls, compiled, on every device."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from ptbench.backends.base import Backend, EvaluateStep, State, TrainStep
from ptbench.backends.contract__LEFT import Feature, Mask, Tokens, device_columns, objective_divisor
from ptbench.backends.tensorflow import devices as tensorflow_devices
from ptbench.backends.tensorflow import heads
from ptbench.backends.tensorflow.model import Dropout, LanguageModel
from ptbench.backends.tensorflow.optimizer import clip, step_numbers, update_variable
from ptbench.model.optimizers import OPTIMIZER_SLOTS
from ptbench.model.parameters import Parameters, check_parameters, state_widths
from ptbench.model.recipe import Accelerator, Recipe

Tensor = Any  # tf.Tensor


class TensorFlowBackend(Backend):
    """The contract in TensorFlow."""

    name = "tensorflow"
    package = "tensorflow"
    features = (
        Feature("embedding", True, "tf.gather"),
        Feature("LSTM layer", True, "tf.keras.layers.LSTM, tf.raw_ops.BlockLSTMV2"),
        Feature(
            "GRU and simple recurrent layers",
            True,
            "tf.keras.layers.GRU, tf.keras.layers.SimpleRNN",
        ),
        Feature("explicit time steps", False, "layers.py: the cells' equations over tf.unstack"),
        Feature("sparse LSTM", False, "layers.py, over tf.sparse.sparse_dense_matmul"),
        Feature("mixture of softmaxes", False, "heads.py, over tf.reduce_logsumexp"),
        Feature("weight tying and factorised output", True, "one tf.Variable used twice"),
        Feature("dropout", True, "tf.nn.experimental.stateless_dropout"),
        Feature("locked dropout", True, "noise_shape of tf.nn.experimental.stateless_dropout"),
        Feature("word dropout", False, "model.py, over tf.nn.experimental.stateless_dropout"),
        Feature(
            "recurrent dropout",
            False,
            "layers.py: explicit steps, as Keras' layers drop by a generator of their own and its "
            "GRU drops what it carries",
        ),
        Feature(
            "weight dropout",
            False,
            "model.py, over tf.nn.experimental.stateless_dropout; tf.keras.StatelessScope feeds it "
            "to Keras' layers",
        ),
        Feature(
            "activation regularisation",
            False,
            "model.py, as activity_regularizer of Keras' layers counts padding",
        ),
        Feature("softmax cross-entropy", True, "tf.nn.sparse_softmax_cross_entropy_with_logits"),
        Feature("SGD", True, "tf.raw_ops.ResourceApplyGradientDescent"),
        Feature("Adam", False, "optimizer.py"),
        Feature("RMSProp", False, "optimizer.py"),
        Feature(
            "averaged SGD",
            False,
            "optimizer.py, as the mean of tf.train.ExponentialMovingAverage forgets",
        ),
        Feature("weight decay", False, "optimizer.py"),
        Feature("gradient clipping by global norm", True, "tf.clip_by_global_norm"),
        Feature("uniform initialisation", True, "tf.random.stateless_uniform"),
        Feature("Keras' default initialisation", True, "tf.keras.initializers"),
        Feature("learning-rate change", True, "an argument of the tf.function"),
        Feature("data parallel", True, "tf.distribute.MirroredStrategy"),
        Feature(
            "truncated back-propagation with carried state", True, "an argument of the tf.function"
        ),
        Feature("deterministic per-step randomness", True, "tf.random.fold_in"),
        Feature("saving parameters", False, "a dictionary of variables, written by safetensors"),
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
        tensorflow_devices.start_tensorflow(accelerator, devices, threads)
        self._strategy = tensorflow_devices.mirrored_strategy(accelerator, devices)
        with self._strategy.scope():
            self._model = LanguageModel(recipe, vocabulary_size, seed, accelerator)
            self._slots = {
                slot: {n: tf.Variable(tf.zeros(p.shape)) for n, p in self._model.parameters.items()}
                for slot in OPTIMIZER_SLOTS[recipe.optimizer]
            }
        self._first_device = self._strategy.extended.worker_devices[0]

    # The compiled steps. Arguments are tensors, so that each is compiled once for each shape.

    def _replica_gradients(
        self,
        inputs: Tensor,
        targets: Tensor,
        mask: Tensor,
        state: State,
        divisor: Tensor,
        step: Tensor,
    ) -> tuple[Tensor, list[Tensor], State]:
        """Run by every replica with its columns: the global nll and gradient, its own state."""
        model, replica = self._model, tf.distribute.get_replica_context()
        dropout = Dropout(self.recipe, self.seed, step, replica.replica_id_in_sync_group)
        with tf.GradientTape() as tape:
            forward, weights = model(inputs, state, dropout), mask / divisor
            loss = model.loss(forward.output, targets, weights)
            objective = loss
            if self.recipe.penalizes:
                objective += model.penalty(forward, weights)
        # Dense, because the embedding's sparse gradient has a row for every token: the global norm
        # would take a word's rows apart.
        found = tape.gradient(objective, model.parameters)
        gradients = {name: tf.convert_to_tensor(gradient) for name, gradient in found.items()}
        for name, kept in model.gradient_masks.items():
            gradients[name] *= kept
        sums = replica.all_reduce(
            tf.distribute.ReduceOp.SUM,
            [loss * divisor, *(gradients[name] for name in model.parameters)],
        )
        return sums[0], sums[1:], forward.state

    @tf.function(autograph=False)
    def _gradients(self, *arguments: Tensor) -> list[Tensor]:
        return self._strategy.run(self._replica_gradients, arguments)[1]

    @tf.function(autograph=False)
    def _train(
        self, numbers: tuple[Tensor, ...], *arguments: Tensor
    ) -> tuple[Tensor, Tensor, State]:
        parameters = self._model.parameters
        one = partial(update_variable, self.recipe)

        def update(strategy: Any, gradients: list[Tensor], factor: Tensor) -> None:
            for (name, variable), gradient in zip(parameters.items(), gradients, strict=True):
                slots = [variables[name] for variables in self._slots.values()]
                strategy.extended.update(variable, one, (numbers, gradient, factor, *slots))

        def replica_step(*arguments: Tensor) -> tuple[Tensor, Tensor, State]:
            nll, gradients, state = self._replica_gradients(*arguments)
            norm = tf.linalg.global_norm(gradients)
            gradients, factor = clip(self.recipe, gradients, norm)
            tf.distribute.get_replica_context().merge_call(update, (gradients, factor))
            return nll, norm, state

        return self._strategy.run(replica_step, arguments)

    @tf.function(autograph=False)
    def _evaluate(
        self, inputs: Tensor, targets: Tensor, mask: Tensor, state: State
    ) -> tuple[Tensor, State]:
        forward = self._model(inputs, state)
        return self._model.evaluate(forward.output, targets, mask), forward.state

    @tf.function(autograph=False)
    def _predict(self, inputs: Tensor, state: State) -> tuple[Tensor, State]:
        forward = self._model(inputs, state)
        log_p = heads.log_probabilities(forward.output)
        return tf.reshape(log_p, (*inputs.shape, -1)), forward.state

    def parameters(self) -> Parameters:
        model = self._model
        return {name: model.canonical(name, p.numpy()) for name, p in model.parameters.items()}

    def load_parameters(self, parameters: Mapping[str, npt.NDArray[Any]]) -> None:
        check_parameters(parameters, self.recipe, self.vocabulary_size)
        for name, variable in self._model.parameters.items():
            variable.assign(self._model.stored(name, parameters[name]))

    def initial_state(self, batch_size: int, training: bool) -> State:
        """Arrays named as in `state_widths`, each [batch, width]."""
        zeros = {
            name: np.zeros((batch_size, width), np.float32)
            for name, width in state_widths(self.recipe).items()
        }
        if training:
            return self._distribute_state(zeros)
        with tf.device(self._first_device):
            return {name: tf.constant(array) for name, array in zeros.items()}

    def _distribute(self, array: npt.NDArray[Any], batch_axis: int) -> Any:
        """Each device's columns of an array, copied to it."""
        columns = device_columns(array.shape[batch_axis], self.devices)
        blocks = [array[(slice(None),) * batch_axis + (block,)] for block in columns]
        return self._strategy.experimental_distribute_values_from_function(
            lambda context: tf.constant(blocks[context.replica_id_in_sync_group])
        )

    def _distribute_state(self, arrays: Mapping[str, npt.NDArray[Any]]) -> State:
        return {name: self._distribute(arrays[name], 0) for name in state_widths(self.recipe)}

    def _local(self, value: Any) -> list[Any]:
        """Each device's own tensor."""
        return list(self._strategy.experimental_local_results(value))

    def _step_arguments(
        self, inputs: Tokens, targets: Tokens, mask: Mask, state: State
    ) -> tuple[Any, ...]:
        batch = [self._distribute(array, batch_axis=1) for array in (inputs, targets, mask)]
        divisor = tf.constant(objective_divisor(self.recipe, mask), tf.float32)
        return *batch, state, divisor, tf.constant(self.step, tf.int64)

    def gradients(self, inputs: Tokens, targets: Tokens, mask: Mask, state: State) -> Parameters:
        gradients = self._gradients(*self._step_arguments(inputs, targets, mask, state))
        return {
            name: self._model.canonical(name, self._local(gradient)[0].numpy())
            for name, gradient in zip(self._model.parameters, gradients, strict=True)
        }

    def train_step(
        self,
        inputs: Tokens,
        targets: Tokens,
        mask: Mask,
        state: State,
        learning_rate: float,
        averaged: int = 1,
    ) -> TrainStep:
        arguments = self._step_arguments(inputs, targets, mask, state)
        numbers = step_numbers(self.recipe, learning_rate, self.step, averaged)
        tensors = tuple(tf.constant(number, tf.float32) for number in numbers)
        nll, norm, state = self._train(tensors, *arguments)
        self.step += 1
        return TrainStep(self._local(nll)[0], self._local(norm)[0], state)

    def evaluate_step(
        self, inputs: Tokens, targets: Tokens, mask: Mask, state: State
    ) -> EvaluateStep:
        with tf.device(self._first_device):
            batch = [tf.constant(array) for array in (inputs, targets, mask)]
            return EvaluateStep(*self._evaluate(*batch, state))

    def next_token_log_probabilities(
        self, inputs: Tokens, state: State
    ) -> tuple[npt.NDArray[np.float32], State]:
        with tf.device(self._first_device):
            log_p, state = self._predict(tf.constant(inputs), state)
        return log_p.numpy(), state

    def snapshot(self, state: State) -> dict[str, npt.NDArray[Any]]:
        saved: dict[str, npt.NDArray[Any]] = {
            f"parameter.{name}": p for name, p in self.parameters().items()
        }
        for slot, variables in self._slots.items():
            for name, variable in variables.items():
                array = self._model.canonical(name, variable.numpy())
                saved[f"optimizer.{slot}.{name}"] = array
        for name, value in state.items():
            saved[name] = np.concatenate([part.numpy() for part in self._local(value)])
        return {**saved, "step": np.array(self.step)}

    def restore(self, snapshot: Mapping[str, npt.NDArray[Any]]) -> State:
        self.load_parameters({n: snapshot[f"parameter.{n}"] for n in self._model.parameters})
        for slot, variables in self._slots.items():
            for name, variable in variables.items():
                array = snapshot[f"optimizer.{slot}.{name}"]
                variable.assign(self._model.stored(name, array))
        self.step = int(snapshot["step"])
        return self._distribute_state(snapshot)

    def synchronize(self) -> None:
        tf.test.experimental.sync_devices()

    def device_names(self) -> list[str]:
        if self.accelerator == "cpu":
            return [f"cpu:{r}" for r in range(self.devices)]
        gpus = tf.config.list_physical_devices("GPU")[: self.devices]
        return [tf.config.experimental.get_device_details(gpu)["device_name"] for gpu in gpus]

    def peak_device_memory(self) -> int | None:
        return tensorflow_devices.peak_memory(self.accelerator, self.devices)

    def settings(self) -> dict[str, str]:
        own = {"implementation": self.recipe.implementation}
        return own | tensorflow_devices.settings(self.accelerator)
