"""The language model in Keras 3, on its TensorFlow backend.

Read from top to bottom: the model, a functional `keras.Model` of Keras' own layers; then the
backend, whose steps are written as Keras' guide "Writing a training loop from scratch in
TensorFlow" does, with `tf.distribute` for more than one device.

Keras reads [batch, time]; the contract's [time, batch] is turned over where data enter and leave.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # no start-up notes, only errors

import keras
import tensorflow as tf

from ptbench.backends.contract import (
    OPTIMIZER_SLOTS,
    Backend,
    EvaluateStep,
    Feature,
    Mask,
    Parameters,
    State,
    Tokens,
    TrainStep,
    check_parameters,
    device_columns,
    objective_divisor,
)
from ptbench.configuration.models import Accelerator, Recipe
from ptbench.errors import PtbenchError


def language_model(recipe: Recipe, vocabulary_size: int, seed: int) -> keras.Model:
    """The model: (tokens, states) to (logits, states).

    `tokens` is [batch, time], `logits` [batch, time, vocabulary], and the states are h and c of
    each layer in turn, [batch, hidden] each.
    """
    draw, scale = np.random.default_rng(seed), recipe.initialization_scale

    def uniform() -> keras.initializers.Initializer:
        # each weight has its own seed: two of one shape must not start alike
        return keras.initializers.RandomUniform(-scale, scale, seed=int(draw.integers(2**31)))

    def lstm_bias(shape: tuple[int], dtype: str) -> Any:
        gate = [0.0, recipe.forget_bias, 0.0, 0.0]  # input, forget, candidate, output
        return keras.ops.repeat(keras.ops.convert_to_tensor(gate, dtype), shape[0] // 4)

    tokens = keras.Input((None,), dtype="int32", name="tokens")
    states = [
        keras.Input((recipe.hidden_size,), name=f"{kind}_{layer}")
        for layer in range(recipe.layers)
        for kind in "hc"
    ]
    x = keras.layers.Embedding(vocabulary_size, recipe.embedding_size, uniform(), name="embedding")(
        tokens
    )
    # The rate is per time step and unit: the `dropout` of keras.layers.LSTM, whose one mask serves
    # all time steps, is something else.
    x = keras.layers.Dropout(recipe.dropout)(x)
    final_states = []
    for layer in range(recipe.layers):
        x, *final = keras.layers.LSTM(
            recipe.hidden_size,
            kernel_initializer=uniform(),
            recurrent_initializer=uniform(),
            bias_initializer=lstm_bias,
            unit_forget_bias=False,  # would be 1, whatever the recipe says
            return_sequences=True,
            return_state=True,
            name=f"rnn_{layer}",
        )(x, initial_state=states[2 * layer : 2 * layer + 2])
        x = keras.layers.Dropout(recipe.dropout)(x)
        final_states += final
    logits = keras.layers.Dense(
        vocabulary_size, kernel_initializer=uniform(), bias_initializer=uniform(), name="softmax"
    )(x)
    return keras.Model([tokens, *states], [logits, *final_states], name="language_model")


def canonical_variables(model: keras.Model) -> dict[str, keras.Variable]:
    """The trainable variables by canonical name; `softmax.weight` is transposed in Keras."""
    variables = {"embedding": model.get_layer("embedding").embeddings}
    for layer in model.layers:
        if isinstance(layer, keras.layers.LSTM):
            prefix = layer.name.replace("_", ".")
            variables[f"{prefix}.input"] = layer.cell.kernel
            variables[f"{prefix}.recurrent"] = layer.cell.recurrent_kernel
            variables[f"{prefix}.bias"] = layer.cell.bias
    softmax = model.get_layer("softmax")
    return {**variables, "softmax.weight": softmax.kernel, "softmax.bias": softmax.bias}


def to_canonical(name: str, value: Any) -> npt.NDArray[np.float32]:
    """A parameter's or gradient's value in the contract's layout, as a copy; its own inverse."""
    array = np.array(value, np.float32)
    return np.ascontiguousarray(array.T) if name == "softmax.weight" else array


class Adam(keras.optimizers.Optimizer):
    """Kingma and Ba's algorithm 1, with an L2 penalty.

    keras.optimizers.Adam adds epsilon to the root of the moment that is not corrected yet, forms
    1 - beta^t in float32, where it loses five digits, and decouples weight decay (AdamW).
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe.learning_rate, global_clipnorm=recipe.clip_norm)
        self.beta_1, self.beta_2 = recipe.adam_beta1, recipe.adam_beta2
        self.epsilon, self.penalty = recipe.optimizer_epsilon, recipe.weight_decay

    def build(self, variables: list[keras.Variable]) -> None:
        if not self.built:
            super().build(variables)
            self.first_moments = self.add_optimizer_variables(variables, "first_moment")
            self.second_moments = self.add_optimizer_variables(variables, "second_moment")

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        index = self._get_variable_index(variable)
        m, v = self.first_moments[index], self.second_moments[index]
        gradient = gradient + self.penalty * variable
        self.assign(m, self.beta_1 * m + (1 - self.beta_1) * gradient)
        self.assign(v, self.beta_2 * v + (1 - self.beta_2) * keras.ops.square(gradient))
        steps = keras.ops.cast(self.iterations + 1, "float32")
        m_hat = m / -keras.ops.expm1(steps * math.log(self.beta_1))  # 1 - beta_1^steps
        v_hat = v / -keras.ops.expm1(steps * math.log(self.beta_2))
        self.assign_sub(variable, learning_rate * m_hat / (keras.ops.sqrt(v_hat) + self.epsilon))


class RMSProp(keras.optimizers.Optimizer):
    """RMSProp as Keras 2.1.3 had it, epsilon added to the root, with an L2 penalty.

    keras.optimizers.RMSprop adds epsilon under the root, and decouples weight decay.
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe.learning_rate, global_clipnorm=recipe.clip_norm)
        self.decay = recipe.rmsprop_decay
        self.epsilon, self.penalty = recipe.optimizer_epsilon, recipe.weight_decay

    def build(self, variables: list[keras.Variable]) -> None:
        if not self.built:
            super().build(variables)
            self.mean_squares = self.add_optimizer_variables(variables, "mean_square")

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        s = self.mean_squares[self._get_variable_index(variable)]
        gradient = gradient + self.penalty * variable
        self.assign(s, self.decay * s + (1 - self.decay) * keras.ops.square(gradient))
        self.assign_sub(variable, learning_rate * gradient / (keras.ops.sqrt(s) + self.epsilon))


def optimizer_of(recipe: Recipe) -> keras.optimizers.Optimizer:
    """The recipe's optimizer. Without moments, Keras' decoupled weight decay is an L2 penalty."""
    if recipe.optimizer == "sgd":
        return keras.optimizers.SGD(
            recipe.learning_rate,
            weight_decay=recipe.weight_decay or None,
            global_clipnorm=recipe.clip_norm,
        )
    return Adam(recipe) if recipe.optimizer == "adam" else RMSProp(recipe)


def configure_tensorflow(devices: int, accelerator: Accelerator, threads: int) -> list[str]:
    """Set TensorFlow up for this process, and name the devices to use.

    The runtime takes its settings once: a second backend in a process gets the first one's, and
    asks for the same.

    Raises:
        PtbenchError: if there are fewer devices.
    """
    kind = "GPU" if accelerator == "cuda" else "CPU"
    physical = tf.config.list_physical_devices(kind)
    try:
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(threads)
        if kind == "GPU":
            tf.config.set_visible_devices(physical[:devices], "GPU")
            for gpu in physical[:devices]:
                tf.config.experimental.set_memory_growth(gpu, True)
        else:
            tf.config.set_visible_devices([], "GPU")
            tf.config.set_logical_device_configuration(
                physical[0], [tf.config.LogicalDeviceConfiguration()] * devices
            )
    except RuntimeError:  # TensorFlow has started
        pass
    tf.config.experimental.enable_tensor_float_32_execution(False)
    tf.config.experimental.enable_op_determinism()
    names = [device.name for device in tf.config.list_logical_devices(kind)]
    if len(names) < devices:
        raise PtbenchError(
            f"keras sees {len(names)} {kind} devices in this process; devices={devices} needs that "
            "many"
        )
    return names[:devices]


class KerasBackend(Backend):
    """The contract in Keras."""

    name = "keras"
    package = "keras"
    features = (
        Feature("embedding", True, "keras.layers.Embedding"),
        Feature("LSTM layer", True, "keras.layers.LSTM"),
        Feature("dropout", True, "keras.layers.Dropout"),
        Feature("softmax cross-entropy", True, "keras.losses.SparseCategoricalCrossentropy"),
        Feature("SGD", True, "keras.optimizers.SGD"),
        Feature("Adam", False, "Adam, a keras.optimizers.Optimizer"),
        Feature("RMSProp", False, "RMSProp, a keras.optimizers.Optimizer"),
        Feature("weight decay", False, "keras.optimizers.SGD(weight_decay), but Adam and RMSProp"),
        Feature("gradient clipping by global norm", True, "keras.optimizers(global_clipnorm)"),
        Feature("uniform initialisation", True, "keras.initializers.RandomUniform"),
        Feature("learning-rate change", True, "optimizer.learning_rate"),
        Feature("data parallel", True, "tf.distribute.MirroredStrategy"),
        Feature(
            "truncated back-propagation with carried state",
            True,
            "keras.layers.LSTM(initial_state, return_state)",
        ),
        Feature("deterministic per-step randomness", True, "keras.Model.stateless_call with seeds"),
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
        self.tf_devices = configure_tensorflow(devices, accelerator, threads)
        self.strategy = (
            tf.distribute.MirroredStrategy(self.tf_devices)
            if devices > 1
            else tf.distribute.OneDeviceStrategy(self.tf_devices[0])
        )
        with self.strategy.scope():
            self.model = language_model(recipe, vocabulary_size, seed)
            self.loss = keras.losses.SparseCategoricalCrossentropy(
                from_logits=True, reduction="sum"
            )
            self.variables = canonical_variables(self.model)
            self.optimizer = optimizer_of(recipe)
            self.optimizer.build(list(self.variables.values()))
        # Not compiled by XLA: no faster here on a CPU, slower to start, unable to use a second
        # logical CPU, and without cuDNN's LSTM on a GPU.
        self.global_gradients = tf.function(self._global_gradients)
        self.update = tf.function(self._update)
        self.evaluate = tf.function(self._evaluate)

    # Training step: each replica's gradients, their sum over the replicas, one update.

    def _replica_gradients(
        self, tokens: Any, targets: Any, mask: Any, state: Any, seeds: Any, divisor: Any
    ) -> tuple[Any, list[Any], list[Any]]:
        """Summed nll of a replica's share, its part of the objective's gradient, and its state."""
        weights = self.model.trainable_variables
        with tf.GradientTape() as tape:
            # Stateless, for the seeds of dropout are then a value that the step is given.
            (logits, *state), _ = self.model.stateless_call(
                weights, tf.unstack(seeds), [tokens, *state], training=True
            )
            nll = self.loss(targets, logits, sample_weight=mask)
            objective = nll / divisor
        # The embedding's gradient is sparse, with a row for each occurrence of a word. Those must
        # be added up before its norm is taken and before replicas are summed.
        gradients = [tf.convert_to_tensor(g) for g in tape.gradient(objective, weights)]
        return nll, gradients, state

    def _global_gradients(self, *batch: Any) -> tuple[Any, list[Any], Any]:
        """The same of the global batch: nll and gradient on the first device."""
        nll, gradients, state = self.strategy.run(self._replica_gradients, batch)
        with tf.device(self.tf_devices[0]):
            nll, gradients = self.strategy.reduce("SUM", (nll, gradients), axis=None)
        return nll, gradients, state

    def _update(self, learning_rate: Any, *batch: Any) -> tuple[Any, Any, Any]:
        nll, gradients, state = self._global_gradients(*batch)
        # Outside strategy.run, so that Keras clips the sum over the replicas. Inside, it would
        # clip each replica's gradient and add up afterwards.
        self.optimizer.learning_rate = learning_rate
        self.optimizer.apply(gradients, self.model.trainable_variables)
        return nll, tf.linalg.global_norm(gradients), state

    def _batch(self, inputs: Tokens, targets: Tokens, mask: Mask, state: State) -> tuple[Any, ...]:
        """The arguments of `_replica_gradients` for the next step, spread over the devices."""
        columns = device_columns(inputs.shape[1], self.devices)
        generators = len(self.model.non_trainable_variables)  # of random numbers, nothing else

        def seeds(replica: int) -> npt.NDArray[np.int64]:
            first = (self.step * self.devices + replica) * generators
            return np.array([(self.seed, first + k) for k in range(generators)])

        def share(array: npt.NDArray[Any]) -> Any:
            return self._spread(lambda replica: array[:, columns[replica]].T.copy())

        divisor = tf.constant(objective_divisor(self.recipe, mask), tf.float32)
        return (*map(share, (inputs, targets, mask)), state, self._spread(seeds), divisor)

    def _spread(self, value: Callable[[int], npt.NDArray[Any]]) -> Any:
        """`value(replica)` of each replica on its device."""

        def on_device(context: Any) -> Any:
            replica = context.replica_id_in_sync_group
            with tf.device(self.tf_devices[replica]):
                return tf.constant(value(replica))

        return self.strategy.experimental_distribute_values_from_function(on_device)

    def train_step(
        self, inputs: Tokens, targets: Tokens, mask: Mask, state: State, learning_rate: float
    ) -> TrainStep:
        batch = self._batch(inputs, targets, mask, state)
        result = self.update(tf.constant(learning_rate, tf.float32), *batch)
        self.step += 1
        return TrainStep(*result)

    def gradients(self, inputs: Tokens, targets: Tokens, mask: Mask, state: State) -> Parameters:
        _, gradients, _ = self.global_gradients(*self._batch(inputs, targets, mask, state))
        by_variable = {
            v.path: g for v, g in zip(self.model.trainable_variables, gradients, strict=True)
        }
        return {n: to_canonical(n, by_variable[v.path]) for n, v in self.variables.items()}

    # Evaluation, on the first device.

    def _evaluate(self, tokens: Any, targets: Any, mask: Any, state: Any) -> tuple[Any, list[Any]]:
        logits, *state = self.model([tokens, *state], training=False)
        return self.loss(targets, logits, sample_weight=mask), state

    def evaluate_step(
        self, inputs: Tokens, targets: Tokens, mask: Mask, state: State
    ) -> EvaluateStep:
        with tf.device(self.tf_devices[0]):
            batch = [tf.constant(array.T.copy()) for array in (inputs, targets, mask)]
            return EvaluateStep(*self.evaluate(*batch, state))

    def next_token_log_probabilities(
        self, inputs: Tokens, state: State
    ) -> tuple[npt.NDArray[np.float32], State]:
        with tf.device(self.tf_devices[0]):
            logits, *state = self.model([tf.constant(inputs.T.copy()), *state], training=False)
            return np.swapaxes(keras.ops.log_softmax(logits).numpy(), 0, 1), state

    # Parameters and states.

    def parameters(self) -> Parameters:
        return {n: to_canonical(n, v.numpy()) for n, v in self.variables.items()}

    def load_parameters(self, parameters: Mapping[str, npt.NDArray[Any]]) -> None:
        check_parameters(parameters, self.recipe, self.vocabulary_size)
        for name, variable in self.variables.items():
            variable.assign(to_canonical(name, parameters[name]))

    def initial_state(self, batch_size: int, training: bool) -> State:
        zeros = np.zeros((2 * self.recipe.layers, batch_size, self.recipe.hidden_size), np.float32)
        return self._to_state(zeros, training)

    def _to_state(self, values: npt.NDArray[np.float32], training: bool) -> State:
        """h and c of each layer on their devices, from an array [2 layers, batch, hidden]."""
        if not training:
            with tf.device(self.tf_devices[0]):
                return [tf.constant(value) for value in values]
        columns = device_columns(values.shape[1], self.devices)

        def share(value: npt.NDArray[np.float32]) -> Any:
            return self._spread(lambda replica: value[columns[replica]])

        return [share(value) for value in values]

    def slots(self) -> dict[str, tuple[str, keras.Variable]]:
        """The optimizer's variables by `{slot}.{parameter}`, and the parameter's name."""
        return {
            f"{slot}.{name}": (name, variable)
            for slot in OPTIMIZER_SLOTS[self.recipe.optimizer]
            for name, variable in zip(
                self.variables, getattr(self.optimizer, f"{slot}s"), strict=True
            )
        }

    def snapshot(self, state: State) -> dict[str, npt.NDArray[Any]]:
        shares = [self.strategy.experimental_local_results(values) for values in state]
        return {
            **{f"parameter.{name}": value for name, value in self.parameters().items()},
            **{f"optimizer.{k}": to_canonical(n, v.numpy()) for k, (n, v) in self.slots().items()},
            "step": np.array(self.step),
            "state": np.stack([np.concatenate(values) for values in shares]),
        }

    def restore(self, snapshot: Mapping[str, npt.NDArray[Any]]) -> State:
        self.load_parameters({name: snapshot[f"parameter.{name}"] for name in self.variables})
        for key, (name, variable) in self.slots().items():
            variable.assign(to_canonical(name, snapshot[f"optimizer.{key}"]))
        self.step = int(snapshot["step"])
        self.optimizer.iterations.assign(self.step)
        return self._to_state(snapshot["state"], training=True)

    # Devices and provenance.

    def synchronize(self) -> None:
        tf.test.experimental.sync_devices()

    def device_names(self) -> list[str]:
        if self.accelerator == "cpu":
            return [f"cpu:{r}" for r in range(self.devices)]
        gpus = tf.config.get_visible_devices("GPU")
        return [tf.config.experimental.get_device_details(gpu)["device_name"] for gpu in gpus]

    def settings(self) -> dict[str, str]:
        return {
            "keras_backend": f"tensorflow {tf.__version__}",
            "intra_op_threads": str(tf.config.threading.get_intra_op_parallelism_threads()),
            "inter_op_threads": str(tf.config.threading.get_inter_op_parallelism_threads()),
            "jit_compile": "False",
            "op_determinism": "on",
            "tf32": "off",
        }
