"""The language model in TensorFlow: a `tf.Module`, compiled steps, and `tf.distribute`.

Top to bottom: the LSTM layer, the model, the devices, and the `Backend` that trains it on them.
Keras' layers and optimizers are not used: Keras is a framework of its own here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # no start-up notes, only errors

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
    parameter_shapes,
    rate_and_epsilon,
)
from ptbench.configuration.models import Accelerator, Recipe
from ptbench.errors import PtbenchError

Tensor = Any  # tf.Tensor

# Of random numbers: named, because the default depends on the kind of device.
RANDOM_GENERATOR = "philox"

# Logical CPUs cannot be added once TensorFlow is in use, and idle ones cost nothing.
LOGICAL_CPUS = 8


# ---------------------------------------------------------------------------------------- model


@tf.custom_gradient
def lstm_layer(x: Tensor, w: Tensor, u: Tensor, b: Tensor, h0: Tensor, c0: Tensor) -> Any:
    """One LSTM layer (Zaremba et al. 2014, equation 3): gates z_t = x_t w + h_(t-1) u + b.

    What needs no recurrence is kept out of the loops over time: the inputs' product and, going
    back, the derivatives of the non-linearities and the products that give the weights' gradients.
    TensorFlow's own derivative of the loop would form the latter step by step.

    d_a is the derivative of the objective with respect to a.

    Args:
        x: [time, batch, inputs].
        w: [inputs, 4 hidden].
        u: [hidden, 4 hidden].
        b: [4 hidden].
        h0: [batch, hidden].
        c0: [batch, hidden].

    Returns:
        Outputs [time, batch, hidden], the final h and the final c, and the derivative's function.
    """
    steps, batch_size, inputs = x.shape
    hidden = u.shape[0]

    def time_series(width: int) -> tf.TensorArray:
        return tf.TensorArray(tf.float32, steps, element_shape=(batch_size, width))

    def flat(series: Tensor) -> Tensor:  # [time, batch, units] as [time x batch, units]
        return tf.reshape(series, (steps * batch_size, series.shape[-1]))

    from_input = tf.reshape(flat(x) @ w + b, (steps, batch_size, 4 * hidden))

    def forward_step(t: Tensor, h: Tensor, c: Tensor, hs: Any, cs: Any, gates: Any) -> Any:
        i, f, g, o = tf.split(from_input[t] + h @ u, 4, axis=1)
        i, f, g, o = tf.sigmoid(i), tf.sigmoid(f), tf.tanh(g), tf.sigmoid(o)
        c = f * c + i * g
        h = o * tf.tanh(c)
        hs, cs, gates = hs.write(t, h), cs.write(t, c), gates.write(t, tf.concat([i, f, g, o], 1))
        return t + 1, h, c, hs, cs, gates

    _, h_final, c_final, hs, cs, gates = tf.while_loop(
        lambda t, *_: t < steps,
        forward_step,
        (0, h0, c0, time_series(hidden), time_series(hidden), time_series(4 * hidden)),
    )
    h, c, gates = hs.stack(), cs.stack(), gates.stack()

    def derivative(d_h_all: Tensor, d_h_final: Tensor, d_c_final: Tensor) -> tuple[Tensor, ...]:
        h_before = tf.concat([h0[None], h[:-1]], axis=0)
        c_before = tf.concat([c0[None], c[:-1]], axis=0)
        i, f, g, o = tf.split(gates, 4, axis=-1)
        tanh_c = tf.tanh(c)
        c_by_h = o * (1 - tanh_c**2)  # d_c is d_h times this; d_z is (d_c, d_c, d_c, d_h) times:
        z_factors = tf.concat(
            [g * i * (1 - i), c_before * f * (1 - f), i * (1 - g**2), tanh_c * o * (1 - o)], -1
        )

        def backward_step(t: Tensor, d_h: Tensor, d_c: Tensor, d_zs: Any) -> Any:
            d_h += d_h_all[t]
            d_c += d_h * c_by_h[t]
            d_z = tf.concat([d_c, d_c, d_c, d_h], axis=1) * z_factors[t]
            return t - 1, tf.matmul(d_z, u, transpose_b=True), d_c * f[t], d_zs.write(t, d_z)

        _, d_h, d_c, d_zs = tf.while_loop(
            lambda t, *_: t >= 0,
            backward_step,
            (steps - 1, d_h_final, d_c_final, time_series(4 * hidden)),
        )
        d_z = d_zs.concat()  # [time x batch, 4 hidden]
        d_x = tf.reshape(tf.matmul(d_z, w, transpose_b=True), (steps, batch_size, inputs))
        d_w = tf.matmul(flat(x), d_z, transpose_a=True)
        d_u = tf.matmul(flat(h_before), d_z, transpose_a=True)
        return d_x, d_w, d_u, tf.reduce_sum(d_z, axis=0), d_h, d_c

    return (h, h_final, c_final), derivative


class LanguageModel(tf.Module):
    """Embedding, LSTM layers and output layer, with dropout on the output of all but the last."""

    def __init__(self, recipe: Recipe, vocabulary_size: int, seed: int) -> None:
        """Weights and softmax bias are uniform; recurrent biases zero but for `forget_bias`."""
        super().__init__()
        self.recipe = recipe
        scale, hidden = recipe.initialization_scale, recipe.hidden_size
        shapes = parameter_shapes(recipe, vocabulary_size)
        self.parameters: dict[str, tf.Variable] = {}
        for index, (name, shape) in enumerate(shapes.items()):
            if name.startswith("rnn.") and name.endswith(".bias"):
                value = tf.repeat([0.0, recipe.forget_bias, 0.0, 0.0], hidden)  # i, f, g, o
            else:
                # two parameters of one shape must not start alike
                value = tf.random.stateless_uniform(
                    shape, (seed, index), -scale, scale, alg=RANDOM_GENERATOR
                )
            self.parameters[name] = tf.Variable(value, name=name)

    def __call__(
        self, inputs: Tensor, state: Tensor, dropout_seed: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits [time, batch, vocabulary], and the state after the last step.

        Args:
            inputs: [time, batch].
            state: [layer, (h, c), batch, hidden].
            dropout_seed: [2]; None for no dropout.
        """
        p = {name: tf.convert_to_tensor(variable) for name, variable in self.parameters.items()}

        def dropout(x: Tensor, place: int) -> Tensor:
            if dropout_seed is None or not self.recipe.dropout:
                return x
            return tf.nn.experimental.stateless_dropout(
                x,
                self.recipe.dropout,
                seed=tf.random.fold_in(dropout_seed, place, alg=RANDOM_GENERATOR),
                rng_alg=RANDOM_GENERATOR,
            )

        x = dropout(tf.gather(p["embedding"], inputs), 0)
        states = []
        for layer in range(self.recipe.layers):
            weights = [p[f"rnn.{layer}.{kind}"] for kind in ("input", "recurrent", "bias")]
            x, h, c = lstm_layer(x, *weights, state[layer, 0], state[layer, 1])
            states.append(tf.stack([h, c]))
            x = dropout(x, layer + 1)
        logits = tf.matmul(tf.reshape(x, (-1, x.shape[-1])), p["softmax.weight"], transpose_b=True)
        logits = tf.reshape(logits + p["softmax.bias"], (*inputs.shape, -1))
        return logits, tf.stack(states)


def summed_nll(logits: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """Negative log-likelihood summed over the real tokens [nats]."""
    nll = tf.nn.sparse_softmax_cross_entropy_with_logits(targets, logits)
    return tf.reduce_sum(nll * mask)


# ------------------------------------------------------------------------------------ optimizer


def update_variable(
    recipe: Recipe, rate: Tensor, epsilon: Tensor, p: tf.Variable, g: Tensor, *slots: tf.Variable
) -> None:
    """One parameter's update on one device; see `Backend.train_step`.

    By hand, because TensorFlow's own RMSProp adds epsilon under the root.

    Args:
        rate, epsilon: as `rate_and_epsilon` gives them.
        g: the clipped gradient.
        slots: in the order of `OPTIMIZER_SLOTS`.
    """
    if recipe.weight_decay:
        g += recipe.weight_decay * p
    if recipe.optimizer == "sgd":
        p.assign_sub(rate * g)
    elif recipe.optimizer == "adam":
        m, v = slots
        new_m = m.assign(recipe.adam_beta1 * m + (1 - recipe.adam_beta1) * g)
        new_v = v.assign(recipe.adam_beta2 * v + (1 - recipe.adam_beta2) * g**2)
        p.assign_sub(rate * new_m / (tf.sqrt(new_v) + epsilon))
    else:
        (s,) = slots
        new_s = s.assign(recipe.rmsprop_decay * s + (1 - recipe.rmsprop_decay) * g**2)
        p.assign_sub(rate * g / (tf.sqrt(new_s) + epsilon))


# -------------------------------------------------------------------------------------- devices


def start_tensorflow(accelerator: Accelerator, devices: int, threads: int) -> None:
    """Settings of the process. Repeating them is harmless; other ones come too late."""
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(threads)
    tf.config.experimental.enable_tensor_float_32_execution(False)
    tf.config.experimental.enable_op_determinism()
    gpus = tf.config.list_physical_devices("GPU")
    if accelerator == "cuda":
        for gpu in gpus:
            tf.config.experimental.set_memory_growth(gpu, True)  # or all memory counts as used
        return
    if gpus:
        tf.config.set_visible_devices([], "GPU")
    cpu = tf.config.list_physical_devices("CPU")[0]
    if tf.config.get_logical_device_configuration(cpu) is None:
        one = tf.config.LogicalDeviceConfiguration()
        tf.config.set_logical_device_configuration(cpu, [one] * max(devices, LOGICAL_CPUS))


def mirrored_strategy(accelerator: Accelerator, devices: int) -> tf.distribute.Strategy:
    """Data parallelism over the first `devices` devices of that kind.

    Raises:
        PtbenchError: if there are fewer.
    """
    found = tf.config.list_logical_devices("CPU" if accelerator == "cpu" else "GPU")
    if len(found) < devices:
        remedy = (
            "start a new process for more"
            if accelerator == "cpu"
            else "ask for fewer, or make more visible (CUDA_VISIBLE_DEVICES)"
        )
        raise PtbenchError(
            f"devices={devices} on {accelerator}, but TensorFlow has {len(found)}; {remedy}"
        )
    strategy = tf.distribute.MirroredStrategy(
        [device.name for device in found[:devices]],
        tf.distribute.ReductionToOneDevice() if accelerator == "cpu" else None,  # None: NCCL
    )
    assert strategy.num_replicas_in_sync == devices
    return strategy


# -------------------------------------------------------------------------------------- backend


class TensorFlowBackend(Backend):
    """The contract in TensorFlow."""

    name = "tensorflow"
    package = "tensorflow"
    features = (
        Feature("embedding", True, "tf.gather"),
        Feature("LSTM layer", False, "lstm_layer, over tf.while_loop and tf.custom_gradient"),
        Feature("dropout", True, "tf.nn.experimental.stateless_dropout"),
        Feature("softmax cross-entropy", True, "tf.nn.sparse_softmax_cross_entropy_with_logits"),
        Feature("SGD", False, "update_variable, over tf.Variable.assign_sub"),
        Feature("Adam", False, "update_variable"),
        Feature("RMSProp", False, "update_variable"),
        Feature("weight decay", False, "update_variable"),
        Feature("gradient clipping by global norm", True, "tf.clip_by_global_norm"),
        Feature("uniform initialisation", True, "tf.random.stateless_uniform"),
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
        start_tensorflow(accelerator, devices, threads)
        self._strategy = mirrored_strategy(accelerator, devices)
        with self._strategy.scope():
            self._model = LanguageModel(recipe, vocabulary_size, seed)
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
        state: Tensor,
        divisor: Tensor,
        step: Tensor,
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        """Run by every replica with its columns: the global nll and gradient, its own state."""
        replica = tf.distribute.get_replica_context()
        seed = tf.random.fold_in(
            tf.stack([tf.constant(self.seed, tf.int64), step]),
            replica.replica_id_in_sync_group,
            alg=RANDOM_GENERATOR,
        )
        variables = list(self._model.parameters.values())
        with tf.GradientTape() as tape:
            logits, state = self._model(inputs, state, seed)
            nll = summed_nll(logits, targets, mask)
            objective = nll / divisor
        # Dense, because the embedding's sparse gradient has a row for every token: the global norm
        # would take a word's rows apart.
        gradients = [tf.convert_to_tensor(g) for g in tape.gradient(objective, variables)]
        nll, *gradients = replica.all_reduce(tf.distribute.ReduceOp.SUM, [nll, *gradients])
        return nll, gradients, state

    @tf.function
    def _gradients(self, *arguments: Tensor) -> list[Tensor]:
        return self._strategy.run(self._replica_gradients, arguments)[1]

    @tf.function
    def _train(
        self, rate: Tensor, epsilon: Tensor, *arguments: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        parameters = self._model.parameters

        def update(strategy: Any, gradients: list[Tensor]) -> None:
            one = partial(update_variable, self.recipe, rate, epsilon)
            for (name, variable), gradient in zip(parameters.items(), gradients, strict=True):
                slots = [variables[name] for variables in self._slots.values()]
                strategy.extended.update(variable, one, (gradient, *slots))

        def replica_step(*arguments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            nll, gradients, state = self._replica_gradients(*arguments)
            norm = tf.linalg.global_norm(gradients)
            if self.recipe.clip_norm is not None:
                gradients, _ = tf.clip_by_global_norm(gradients, self.recipe.clip_norm, norm)
            tf.distribute.get_replica_context().merge_call(update, (gradients,))
            return nll, norm, state

        return self._strategy.run(replica_step, arguments)

    @tf.function
    def _evaluate(
        self, inputs: Tensor, targets: Tensor, mask: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        logits, state = self._model(inputs, state)
        return summed_nll(logits, targets, mask), state

    @tf.function
    def _predict(self, inputs: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        logits, state = self._model(inputs, state)
        return tf.nn.log_softmax(logits), state

    def parameters(self) -> Parameters:
        return {name: p.numpy().copy() for name, p in self._model.parameters.items()}

    def load_parameters(self, parameters: Mapping[str, npt.NDArray[Any]]) -> None:
        check_parameters(parameters, self.recipe, self.vocabulary_size)
        for name, variable in self._model.parameters.items():
            variable.assign(parameters[name].astype(np.float32))

    def initial_state(self, batch_size: int, training: bool) -> State:
        # [layer, (h, c), batch, hidden]
        shape = (self.recipe.layers, 2, batch_size, self.recipe.hidden_size)
        if training:
            return self._distribute(np.zeros(shape, np.float32), batch_axis=2)
        with tf.device(self._first_device):
            return tf.zeros(shape)

    def _distribute(self, array: npt.NDArray[Any], batch_axis: int) -> State:
        """Each device's columns of an array, copied to it."""
        columns = device_columns(array.shape[batch_axis], self.devices)
        blocks = [array[(slice(None),) * batch_axis + (block,)] for block in columns]
        return self._strategy.experimental_distribute_values_from_function(
            lambda context: tf.constant(blocks[context.replica_id_in_sync_group])
        )

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
            name: self._local(gradient)[0].numpy()
            for name, gradient in zip(self._model.parameters, gradients, strict=True)
        }

    def train_step(
        self, inputs: Tokens, targets: Tokens, mask: Mask, state: State, learning_rate: float
    ) -> TrainStep:
        arguments = self._step_arguments(inputs, targets, mask, state)
        rates = rate_and_epsilon(self.recipe, learning_rate, self.step)
        nll, norm, state = self._train(*(tf.constant(r, tf.float32) for r in rates), *arguments)
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
        saved = {f"parameter.{name}": p for name, p in self.parameters().items()}
        for slot, variables in self._slots.items():
            saved |= {f"optimizer.{slot}.{n}": v.numpy().copy() for n, v in variables.items()}
        whole = np.concatenate([s.numpy() for s in self._local(state)], axis=2)
        return {**saved, "step": np.array(self.step), "state": whole}

    def restore(self, snapshot: Mapping[str, npt.NDArray[Any]]) -> State:
        self.load_parameters({n: snapshot[f"parameter.{n}"] for n in self._model.parameters})
        for slot, variables in self._slots.items():
            for name, variable in variables.items():
                variable.assign(snapshot[f"optimizer.{slot}.{name}"].astype(np.float32))
        self.step = int(snapshot["step"])
        return self._distribute(snapshot["state"], batch_axis=2)

    def synchronize(self) -> None:
        tf.test.experimental.sync_devices()

    def device_names(self) -> list[str]:
        if self.accelerator == "cpu":
            return [f"cpu:{r}" for r in range(self.devices)]
        gpus = tf.config.list_physical_devices("GPU")[: self.devices]
        return [tf.config.experimental.get_device_details(gpu)["device_name"] for gpu in gpus]

    def settings(self) -> dict[str, str]:
        return {
            "intra_op_threads": str(tf.config.threading.get_intra_op_parallelism_threads()),
            "inter_op_threads": str(tf.config.threading.get_inter_op_parallelism_threads()),
            "matmul_precision": "float32 (TF32 off)",
            "op_determinism": "on",
            "random_generator": RANDOM_GENERATOR,
        }
