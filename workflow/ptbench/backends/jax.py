"""The language model in JAX: pure functions over a dictionary of parameters, compiled by XLA.

Top to bottom: the model, its objective, one optimizer step, the devices, and the `Backend` that
puts them together. Flax and Optax are not used: the model and the update are a page without them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.extend.backend import clear_backends
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

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

Array = Any  # jax.Array, or a tracer of one
Tree = dict[str, Array]  # an array for each parameter

# The mesh's one axis: the replicas, among which the batch is shared.
DATA = "data"


class Batch(NamedTuple):
    """A window of the streams, each array [time, batch]."""

    inputs: Array
    targets: Array
    mask: Array


# ---------------------------------------------------------------------------------------- model


@jax.custom_vjp
def lstm_layer(x: Array, w: Array, u: Array, b: Array, state: Array) -> tuple[Array, Array]:
    """One LSTM layer (Zaremba et al. 2014, equation 3): gates x_t w + h_(t-1) u + b.

    `jax.lax.scan` is differentiated well but for one thing: it adds up the recurrent weights'
    gradient step by step, a small product each. The derivative below forms it in one product.

    Args:
        x: [time, batch, inputs].
        w: [inputs, 4 hidden].
        u: [hidden, 4 hidden].
        b: [4 hidden].
        state: [(h, c), batch, hidden].

    Returns:
        Outputs [time, batch, hidden], and the state after the last step.
    """
    return lstm_forward(x, w, u, b, state)[0]


def lstm_forward(
    x: Array, w: Array, u: Array, b: Array, state: Array
) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
    """The layer's results, and what its derivative needs of them."""

    def step(carry: tuple[Array, Array], from_input: Array) -> tuple[Any, Any]:
        h, c = carry
        i, f, g, o = jnp.split(from_input + h @ u, 4, axis=-1)
        i, f, g, o = jax.nn.sigmoid(i), jax.nn.sigmoid(f), jnp.tanh(g), jax.nn.sigmoid(o)
        c = f * c + i * g
        h = o * jnp.tanh(c)
        return (h, c), (h, c, jnp.concatenate([i, f, g, o], axis=-1))

    # The inputs' product needs no recurrence, so all time steps are one product.
    (h_final, c_final), (h, c, gates) = jax.lax.scan(step, (state[0], state[1]), x @ w + b)
    return (h, jnp.stack([h_final, c_final])), (x, w, u, state, h, c, gates)


def lstm_backward(
    trace: tuple[Array, ...], d_results: tuple[Array, Array]
) -> tuple[Array, Array, Array, Array, Array]:
    """Derivatives with respect to the layer's arguments, given those of its results.

    d_a is the derivative of the objective with respect to a; z is the gates before their
    non-linearities.
    """
    x, w, u, state, h, c, gates = trace
    d_h_all, d_state = d_results
    h_before = jnp.concatenate([state[:1], h[:-1]])
    c_before = jnp.concatenate([state[1:], c[:-1]])

    def step(carry: tuple[Array, Array], at_t: tuple[Array, ...]) -> tuple[Any, Any]:
        d_h, d_c = carry
        d_h_t, gates_t, c_t, c_before_t = at_t
        i, f, g, o = jnp.split(gates_t, 4, axis=-1)
        tanh_c = jnp.tanh(c_t)
        d_h = d_h + d_h_t
        d_c = d_c + d_h * o * (1 - tanh_c**2)
        d_z = jnp.concatenate(
            [
                d_c * g * i * (1 - i),
                d_c * c_before_t * f * (1 - f),
                d_c * i * (1 - g**2),
                d_h * tanh_c * o * (1 - o),
            ],
            axis=-1,
        )
        return (d_z @ u.T, d_c * f), d_z

    (d_h, d_c), d_z = jax.lax.scan(
        step, (d_state[0], d_state[1]), (d_h_all, gates, c, c_before), reverse=True
    )
    d_w = jnp.einsum("tbi,tbj->ij", x, d_z)
    d_u = jnp.einsum("tbi,tbj->ij", h_before, d_z)
    return d_z @ w.T, d_w, d_u, d_z.sum((0, 1)), jnp.stack([d_h, d_c])


lstm_layer.defvjp(lstm_forward, lstm_backward)


def native_parameters(recipe: Recipe, vocabulary_size: int, seed: int) -> dict[str, Array]:
    """Uniform by JAX's own draw; recurrent biases zero, and `forget_bias` at the forget gates."""
    scale, hidden = recipe.initialization_scale, recipe.hidden_size
    shapes = parameter_shapes(recipe, vocabulary_size)
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    parameters = {}
    for key, (name, shape) in zip(keys, shapes.items(), strict=True):
        if name.startswith("rnn.") and name.endswith(".bias"):
            bias = jnp.zeros(shape)
            parameters[name] = bias.at[hidden : 2 * hidden].set(recipe.forget_bias)
        else:
            parameters[name] = jax.random.uniform(key, shape, minval=-scale, maxval=scale)
    return parameters


def dropout(x: Array, rate: float, key: Array) -> Array:
    """Zero each number with probability `rate` and scale the others to keep the mean."""
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)


def logits_and_state(
    recipe: Recipe, parameters: dict[str, Array], inputs: Array, state: Array, key: Array | None
) -> tuple[Array, Array]:
    """The network: embedding, LSTM layers, output layer.

    Args:
        inputs: [time, batch].
        state: [layer, (h, c), batch, hidden].
        key: of the dropout masks; None for no dropout.

    Returns:
        Logits [time * batch, vocabulary], and the state after the last step.
    """
    keys = None if key is None else jax.random.split(key, recipe.layers + 1)
    x = parameters["embedding"][inputs]
    if keys is not None:
        x = dropout(x, recipe.dropout, keys[0])
    states = []
    for layer in range(recipe.layers):
        weights = [parameters[f"rnn.{layer}.{kind}"] for kind in ("input", "recurrent", "bias")]
        x, layer_state = lstm_layer(x, *weights, state[layer])
        states.append(layer_state)
        if keys is not None:
            x = dropout(x, recipe.dropout, keys[layer + 1])
    # One matrix, because XLA's products of three-dimensional arrays are a tenth slower.
    top = x.reshape(-1, recipe.hidden_size)
    logits = top @ parameters["softmax.weight"].T + parameters["softmax.bias"]
    return logits, jnp.stack(states)


def summed_nll(logits: Array, targets: Array, mask: Array) -> Array:
    """Negative log-likelihood summed over the real tokens [nats].

    Args:
        logits: [time * batch, vocabulary].
        targets: [time, batch].
        mask: [time, batch].
    """
    target_logits = jnp.take_along_axis(logits, targets.reshape(-1, 1), axis=-1)[:, 0]
    return ((jax.nn.logsumexp(logits, axis=-1) - target_logits) * mask.reshape(-1)).sum()


# ------------------------------------------------------------------------ objective and training
# These run on every replica at once, each with its columns of the batch; `psum` adds over replicas.


def replica_key(recipe: Recipe, seed: int, step: Array) -> Array | None:
    """Key of a replica's dropout masks, a function of (seed, step, replica) alone."""
    if not recipe.dropout:
        return None
    key = jax.random.key(seed)
    return jax.random.fold_in(jax.random.fold_in(key, step), jax.lax.axis_index(DATA))


def objective_gradients(
    recipe: Recipe,
    seed: int,
    parameters: dict[str, Array],
    batch: Batch,
    state: Array,
    divisor: Array,
    step: Array,
) -> tuple[dict[str, Array], Array, Array]:
    """The global batch's gradient and summed nll, and the replica's own final state."""

    def objective(parameters: dict[str, Array]) -> tuple[Array, tuple[Array, Array]]:
        key = replica_key(recipe, seed, step)
        logits, final = logits_and_state(recipe, parameters, batch.inputs, state, key)
        nll = summed_nll(logits, batch.targets, batch.mask)
        return nll / divisor, (nll, final)

    gradients, (nll, final) = jax.grad(objective, has_aux=True)(parameters)
    gradients, nll = jax.lax.psum((gradients, nll), DATA)
    return gradients, nll, final


# The optimizers: the direction in which gradients move the parameters, and the slots afterwards.


def sgd(
    recipe: Recipe,  # noqa: ARG001
    gradients: Tree,
    slots: dict[str, Tree],
    epsilon: Array,  # noqa: ARG001
) -> tuple[Tree, dict[str, Tree]]:
    """Stochastic gradient descent."""
    return gradients, slots


def adam(
    recipe: Recipe, gradients: Tree, slots: dict[str, Tree], epsilon: Array
) -> tuple[Tree, dict[str, Tree]]:
    """Adam; the corrections for bias are in `epsilon` and in the rate, see `rate_and_epsilon`."""
    beta1, beta2 = recipe.adam_beta1, recipe.adam_beta2
    m = jax.tree.map(lambda m, g: beta1 * m + (1 - beta1) * g, slots["first_moment"], gradients)
    v = jax.tree.map(lambda v, g: beta2 * v + (1 - beta2) * g**2, slots["second_moment"], gradients)
    direction = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + epsilon), m, v)
    return direction, {"first_moment": m, "second_moment": v}


def rmsprop(
    recipe: Recipe, gradients: Tree, slots: dict[str, Tree], epsilon: Array
) -> tuple[Tree, dict[str, Tree]]:
    """RMSProp, neither centred nor with momentum."""
    decay = recipe.rmsprop_decay
    s = jax.tree.map(lambda s, g: decay * s + (1 - decay) * g**2, slots["mean_square"], gradients)
    direction = jax.tree.map(lambda g, s: g / (jnp.sqrt(s) + epsilon), gradients, s)
    return direction, {"mean_square": s}


OPTIMIZERS = {"sgd": sgd, "adam": adam, "rmsprop": rmsprop}


def training_step(
    recipe: Recipe,
    seed: int,
    parameters: Tree,
    slots: dict[str, Tree],
    batch: Batch,
    state: Array,
    divisor: Array,
    step: Array,
    rate: Array,
    epsilon: Array,
) -> tuple[Tree, dict[str, Tree], TrainStep]:
    """One update by the recipe's optimizer, clipped by the norm of all gradients together."""
    gradients, nll, final = objective_gradients(
        recipe, seed, parameters, batch, state, divisor, step
    )
    norm = jnp.sqrt(sum(jnp.vdot(g, g) for g in gradients.values()))
    if recipe.clip_norm is not None:
        scale = jnp.where(norm > recipe.clip_norm, recipe.clip_norm / norm, 1)
        gradients = jax.tree.map(lambda g: scale * g, gradients)
    if recipe.weight_decay:
        gradients = jax.tree.map(lambda g, p: g + recipe.weight_decay * p, gradients, parameters)
    direction, slots = OPTIMIZERS[recipe.optimizer](recipe, gradients, slots, epsilon)
    parameters = jax.tree.map(lambda p, d: p - rate * d, parameters, direction)
    return parameters, slots, TrainStep(nll, norm, final)


# ----------------------------------------------------------------------------------- evaluation


def evaluate(
    recipe: Recipe, parameters: dict[str, Array], batch: Batch, state: Array
) -> EvaluateStep:
    """Summed nll without dropout."""
    logits, final = logits_and_state(recipe, parameters, batch.inputs, state, None)
    return EvaluateStep(summed_nll(logits, batch.targets, batch.mask), final)


def predict(
    recipe: Recipe, parameters: dict[str, Array], inputs: Array, state: Array
) -> tuple[Array, Array]:
    """Log-probabilities [time, batch, vocabulary] without dropout, and the final state."""
    logits, final = logits_and_state(recipe, parameters, inputs, state, None)
    return jax.nn.log_softmax(logits).reshape(*inputs.shape, -1), final


# -------------------------------------------------------------------------------------- devices


def claim_devices(accelerator: Accelerator, devices: int, threads: int) -> list[Any]:
    """The first `devices` devices of that kind.

    The CPU appears to JAX as as many devices as were asked for before its first use. They share
    one pool of threads, which has at least as many threads as there are devices.

    Raises:
        PtbenchError: if there are fewer.
    """
    if accelerator == "cpu":
        os.environ["NPROC"] = str(threads)  # XLA reads the size of its pool from it
        try:
            jax.config.update("jax_platforms", "cpu")
            jax.config.update("jax_num_cpu_devices", devices)
        except RuntimeError:  # JAX is in use already; whoever uses it keeps working
            if jax.device_count("cpu") < devices:
                clear_backends()
                jax.config.update("jax_num_cpu_devices", devices)
    try:
        found = jax.devices(accelerator)
    except RuntimeError:  # no such backend
        found = []
    if len(found) < devices:
        raise PtbenchError(
            f"devices={devices} on {accelerator}, but JAX finds {len(found)}; "
            "ask for fewer devices, or make more visible (CUDA_VISIBLE_DEVICES)"
        )
    return list(found[:devices])


def compiler_options(accelerator: Accelerator) -> dict[str, Any]:
    """What XLA is told that is not its default."""
    if accelerator == "cuda":
        return {"xla_gpu_deterministic_ops": True}  # gradients are scattered in a fixed order
    # Replicas wait for one another however busy the machine is; by default XLA aborts after 40 s.
    return {"xla_cpu_collective_call_terminate_timeout_seconds": 24 * 3600}


# -------------------------------------------------------------------------------------- backend


class JaxBackend(Backend):
    """The contract in JAX."""

    name = "jax"
    package = "jax"
    features = (
        Feature("embedding", False, "array indexing, in logits_and_state"),
        Feature("LSTM layer", False, "lstm_layer, over jax.lax.scan"),
        Feature("dropout", False, "dropout, over jax.random.bernoulli"),
        Feature("softmax cross-entropy", False, "summed_nll, over jax.nn.logsumexp"),
        Feature("SGD", False, "sgd"),
        Feature("Adam", False, "adam"),
        Feature("RMSProp", False, "rmsprop"),
        Feature("weight decay", False, "training_step"),
        Feature("gradient clipping by global norm", False, "training_step"),
        Feature("uniform initialisation", True, "jax.random.uniform"),
        Feature("learning-rate change", True, "an argument of the compiled step"),
        Feature("data parallel", True, "jax.shard_map and jax.lax.psum"),
        Feature(
            "truncated back-propagation with carried state",
            True,
            "an argument of the compiled step",
        ),
        Feature("deterministic per-step randomness", True, "jax.random.fold_in"),
        Feature("saving parameters", False, "a dictionary of arrays, written by safetensors"),
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
        jax.config.update("jax_default_matmul_precision", "highest")  # float32 on GPUs, not TF32
        claimed = claim_devices(accelerator, devices, threads)
        mesh = Mesh(np.array(claimed), (DATA,), axis_types=(AxisType.Auto,))
        everywhere = PartitionSpec()
        of_batch = PartitionSpec(None, DATA)  # [time, batch]
        of_state = PartitionSpec(None, None, DATA)  # [layer, (h, c), batch, hidden]
        self._everywhere = NamedSharding(mesh, everywhere)
        self._of_batch = NamedSharding(mesh, of_batch)
        self._of_state = NamedSharding(mesh, of_state)
        self._first = claimed[0]

        replicated = partial(jax.shard_map, mesh=mesh, check_vma=False)
        compile_ = partial(jax.jit, compiler_options=compiler_options(accelerator))
        scalars = (everywhere, everywhere)  # divisor, step
        # Parameters and slots are donated: their memory takes the updated ones. The state is not,
        # since the loop may keep it.
        self._training_step = compile_(
            replicated(
                partial(training_step, recipe, seed),
                in_specs=(
                    *(everywhere, everywhere, of_batch, of_state),
                    *(*scalars, everywhere, everywhere),  # rate, epsilon
                ),
                out_specs=(everywhere, everywhere, TrainStep(everywhere, everywhere, of_state)),
            ),
            donate_argnums=(0, 1),
        )
        self._gradients = compile_(
            replicated(
                partial(objective_gradients, recipe, seed),
                in_specs=(everywhere, of_batch, of_state, *scalars),
                out_specs=(everywhere, everywhere, of_state),
            )
        )
        self._evaluate = compile_(partial(evaluate, recipe))
        self._predict = compile_(partial(predict, recipe))
        draw = jax.jit(native_parameters, static_argnums=(0, 1, 2), out_shardings=self._everywhere)
        self._parameters = draw(recipe, vocabulary_size, seed)
        self._slots = self._to_devices(
            {
                slot: {name: np.zeros(p.shape, np.float32) for name, p in self._parameters.items()}
                for slot in OPTIMIZER_SLOTS[recipe.optimizer]
            }
        )

    def parameters(self) -> Parameters:
        return self._to_numpy(self._parameters)

    def _to_numpy(self, tree: dict[str, Array]) -> Parameters:
        # Copies, because a view of a CPU array would change with the next, donating step; in
        # canonical order, because JAX sorts a dictionary's keys.
        shapes = parameter_shapes(self.recipe, self.vocabulary_size)
        return {name: np.array(tree[name]) for name in shapes}

    def load_parameters(self, parameters: Mapping[str, npt.NDArray[Any]]) -> None:
        check_parameters(parameters, self.recipe, self.vocabulary_size)
        self._parameters = self._to_devices({n: parameters[n] for n in self._parameters})

    def _to_devices(self, tree: Any) -> Any:
        # copies, because JAX may share a NumPy array's memory, which a step would then donate
        return jax.device_put(
            jax.tree.map(lambda array: np.array(array, np.float32), tree), self._everywhere
        )

    def initial_state(self, batch_size: int, training: bool) -> State:
        shape = (self.recipe.layers, 2, batch_size, self.recipe.hidden_size)
        if training:
            device_columns(batch_size, self.devices)  # raises if it does not divide
        return jax.device_put(
            np.zeros(shape, np.float32), self._of_state if training else self._first
        )

    def _batch(self, place: Any, inputs: Tokens, targets: Tokens, mask: Mask) -> Batch:
        # copies, because JAX reads NumPy arrays after the call, or even shares their memory
        return jax.device_put(Batch(inputs.copy(), targets.copy(), mask.copy()), place)

    def _step_arguments(
        self, inputs: Tokens, targets: Tokens, mask: Mask, state: State
    ) -> tuple[Any, ...]:
        batch = self._batch(self._of_batch, inputs, targets, mask)
        divisor = np.float32(objective_divisor(self.recipe, mask))
        return batch, state, divisor, np.uint32(self.step)

    def gradients(self, inputs: Tokens, targets: Tokens, mask: Mask, state: State) -> Parameters:
        arguments = self._step_arguments(inputs, targets, mask, state)
        gradients, _, _ = self._gradients(self._parameters, *arguments)
        return self._to_numpy(gradients)

    def train_step(
        self, inputs: Tokens, targets: Tokens, mask: Mask, state: State, learning_rate: float
    ) -> TrainStep:
        arguments = self._step_arguments(inputs, targets, mask, state)
        rates = np.array(rate_and_epsilon(self.recipe, learning_rate, self.step), np.float32)
        self._parameters, self._slots, result = self._training_step(
            self._parameters, self._slots, *arguments, *rates
        )
        self.step += 1
        return result

    def _parameters_on_first_device(self) -> dict[str, Array]:
        return {name: p.addressable_data(0) for name, p in self._parameters.items()}

    def evaluate_step(
        self, inputs: Tokens, targets: Tokens, mask: Mask, state: State
    ) -> EvaluateStep:
        batch = self._batch(self._first, inputs, targets, mask)
        return self._evaluate(self._parameters_on_first_device(), batch, state)

    def next_token_log_probabilities(
        self, inputs: Tokens, state: State
    ) -> tuple[npt.NDArray[np.float32], State]:
        log_p, final = self._predict(self._parameters_on_first_device(), inputs.copy(), state)
        return np.array(log_p), final

    def snapshot(self, state: State) -> dict[str, npt.NDArray[Any]]:
        saved = {f"parameter.{name}": p for name, p in self.parameters().items()}
        for slot, tree in self._slots.items():
            saved |= {f"optimizer.{slot}.{name}": a for name, a in self._to_numpy(tree).items()}
        return {**saved, "step": np.array(self.step), "state": np.array(state)}

    def restore(self, snapshot: Mapping[str, npt.NDArray[Any]]) -> State:
        self.load_parameters({name: snapshot[f"parameter.{name}"] for name in self._parameters})
        self._slots = self._to_devices(
            {
                slot: {name: snapshot[f"optimizer.{slot}.{name}"] for name in self._parameters}
                for slot in self._slots
            }
        )
        self.step = int(snapshot["step"])
        return jax.device_put(np.array(snapshot["state"]), self._of_state)

    def synchronize(self) -> None:
        jax.block_until_ready((self._parameters, self._slots, jax.live_arrays()))

    def device_names(self) -> list[str]:
        if self.accelerator == "cpu":
            return [f"cpu:{r}" for r in range(self.devices)]
        return [device.device_kind for device in self._everywhere.mesh.devices.flat]

    def settings(self) -> dict[str, str]:
        return {
            "threads": str(max(self.threads, self.devices)),  # of XLA's pool, see claim_devices
            "matmul_precision": "highest (float32; no TF32)",
            "random_generator": str(jax.config.jax_default_prng_impl),
            **{k: str(v) for k, v in compiler_options(self.accelerator).items()},
        }
