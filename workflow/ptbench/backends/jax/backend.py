"""The contract in JAX: steps compiled for all replicas, and arrays in and out."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import numpy.typing as npt
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ptbench.backends.allocator import keep_memory
from ptbench.backends.base import Backend, EvaluateStep, State, TrainStep
from ptbench.backends.contract__LEFT import Feature, Mask, Tokens, device_columns, objective_divisor
from ptbench.backends.jax.devices import (
    DATA,
    claim_devices,
    compiler_options,
    settings,
)
from ptbench.backends.jax.model import (
    Tree,
    dropout_keys,
    loss,
    native_parameters,
    network,
    next_word_log_probabilities,
    penalties,
)
from ptbench.backends.jax.optimizer import update
from ptbench.model.optimizers import OPTIMIZER_SLOTS, rate_and_epsilon
from ptbench.model.parameters import (
    Parameters,
    check_parameters,
    kept_weights,
    parameter_shapes,
    state_widths,
)
from ptbench.model.recipe import Accelerator, Recipe

Array = Any  # jax.Array, or a tracer of one


class Batch(NamedTuple):
    """A window of the streams, each array [time, batch]."""

    inputs: Array
    targets: Array
    mask: Array


# `kept` says which weights a sparse model has; see `JaxBackend`.


def objective_gradients(
    recipe: Recipe,
    seed: int,
    parameters: Tree,
    kept: Tree,
    batch: Batch,
    state: Tree,
    divisor: Array,
    step: Array,
) -> tuple[Tree, Array, Tree]:
    """The global batch's gradient and summed nll, and the replica's own final state.

    Runs on every replica at once, each with its columns of the batch; `psum` adds over replicas.
    """
    keys = dropout_keys(recipe, seed, step)

    def objective(parameters: Tree) -> tuple[Array, tuple[Array, Tree]]:
        h, v, final = network(recipe, parameters, kept, batch.inputs, state, keys)
        weights = batch.mask / divisor
        nll = loss(recipe, parameters, v, batch.targets, weights, keys)
        value = nll + penalties(recipe, h, v, weights) if recipe.penalizes else nll
        return value, (nll, final)

    gradients, (nll, final) = jax.grad(objective, has_aux=True)(parameters)
    if recipe.kernel != "sparse":
        gradients |= {name: gradients[name] * mask for name, mask in kept.items()}
    gradients, nll = jax.lax.psum((gradients, nll), DATA)
    return gradients, nll * divisor, final


def evaluate(
    recipe: Recipe, parameters: Tree, kept: Tree, batch: Batch, state: Tree
) -> EvaluateStep:
    """Summed nll without dropout."""
    _, v, final = network(recipe, parameters, kept, batch.inputs, state, None)
    return EvaluateStep(loss(recipe, parameters, v, batch.targets, batch.mask, None), final)


def predict(
    recipe: Recipe, parameters: Tree, kept: Tree, inputs: Array, state: Tree
) -> tuple[Array, Tree]:
    """Log-probabilities [time, batch, vocabulary] without dropout, and the final state."""
    _, v, final = network(recipe, parameters, kept, inputs, state, None)
    return next_word_log_probabilities(recipe, parameters, v), final


class JaxBackend(Backend):
    """The contract in JAX."""

    name = "jax"
    package = "jax"
    features = (
        Feature("embedding", False, "array indexing, in model.py"),
        Feature(
            "LSTM layer",
            False,
            "layers.py, over jax.lax.scan; jax.experimental.rnn has cuDNN's for GPUs, not used",
        ),
        Feature("GRU and simple recurrent layers", False, "layers.py, over jax.lax.scan"),
        Feature("explicit time steps", False, "layers.py, over jax.lax.scan"),
        Feature("sparse LSTM", False, "layers.py, with the products of jax.experimental.sparse"),
        Feature("mixture of softmaxes", False, "heads.py, over jax.nn.logsumexp"),
        Feature("weight tying and factorised output", False, "model.py"),
        Feature("dropout", False, "model.py, over jax.random.bernoulli"),
        Feature("locked dropout", False, "model.py, over jax.random.bernoulli"),
        Feature("word dropout", False, "model.py, over jax.random.bernoulli"),
        Feature("recurrent dropout", False, "model.py, over jax.random.bernoulli"),
        Feature("weight dropout", False, "model.py, over jax.random.bernoulli"),
        Feature("activation regularisation", False, "model.py, in what jax.grad differentiates"),
        Feature("softmax cross-entropy", False, "heads.py, over jax.nn.logsumexp"),
        Feature("SGD", False, "optimizer.py"),
        Feature("Adam", False, "optimizer.py"),
        Feature("RMSProp", False, "optimizer.py"),
        Feature("averaged SGD", False, "optimizer.py"),
        Feature("weight decay", False, "optimizer.py"),
        Feature("gradient clipping by global norm", False, "optimizer.py"),
        Feature("uniform initialisation", True, "jax.random.uniform"),
        Feature("Keras' default initialisation", True, "jax.nn.initializers"),
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
        tuned = recipe.implementation == "tuned"
        self._memory_is_kept = tuned and accelerator == "cpu" and keep_memory(arenas=1)
        claimed = claim_devices(accelerator, devices, threads)
        mesh = Mesh(np.array(claimed), (DATA,), axis_types=(AxisType.Auto,))
        everywhere = PartitionSpec()
        of_batch = PartitionSpec(None, DATA)  # [time, batch]
        of_state = PartitionSpec(DATA)  # [batch, width]
        self._everywhere = NamedSharding(mesh, everywhere)
        self._of_batch = NamedSharding(mesh, of_batch)
        self._of_state = NamedSharding(mesh, of_state)
        self._first = claimed[0]

        compile_ = partial(jax.jit, compiler_options=compiler_options(accelerator))
        self._gradients = compile_(
            jax.shard_map(
                partial(objective_gradients, recipe, seed),
                mesh=mesh,
                in_specs=(
                    *(everywhere, everywhere, of_batch, of_state),
                    *(everywhere, everywhere),  # divisor, step
                ),
                out_specs=(everywhere, everywhere, of_state),
                check_vma=False,
            )
        )
        # Apart from the gradients, because XLA would compile those again. Parameters and slots are
        # donated: their memory takes the updated ones.
        self._update = compile_(partial(update, recipe), donate_argnums=(0, 1))
        self._evaluate = compile_(partial(evaluate, recipe))
        self._predict = compile_(partial(predict, recipe))

        self._shapes = parameter_shapes(recipe, vocabulary_size)
        # Which weights of a sparse model's matrices there are. With `kernel: sparse` their values
        # alone are stored, in the order of their indices; else whole matrices, with zeros.
        self._masks = kept_weights(recipe, vocabulary_size, seed)
        self._kept: Tree = jax.device_put(
            {
                name: np.argwhere(mask).astype(np.int32) if self._stores_values else mask
                for name, mask in self._masks.items()
            },
            self._everywhere,
        )
        self.load_parameters(native_parameters(recipe, vocabulary_size, seed))
        zeros = {name: np.zeros(shape, np.float32) for name, shape in self._shapes.items()}
        self._slots = {slot: self._stored(zeros) for slot in OPTIMIZER_SLOTS[recipe.optimizer]}

    @property
    def _stores_values(self) -> bool:
        return self.recipe.kernel == "sparse"

    def _stored(self, canonical: Mapping[str, npt.NDArray[Any]]) -> Tree:
        """An array for each parameter as the devices have it."""

        def stored(name: str) -> npt.NDArray[Any]:
            # a copy, because JAX may share a NumPy array's memory, which a step would then donate
            array = np.array(canonical[name], np.float32)
            if name not in self._masks:
                return array
            mask = self._masks[name]
            return array[mask] if self._stores_values else array * mask

        return jax.device_put({name: stored(name) for name in self._shapes}, self._everywhere)

    def _canonical(self, tree: Tree) -> Parameters:
        """The reverse of `_stored`."""

        def canonical(name: str) -> npt.NDArray[np.float32]:
            # A copy, because a view of a CPU array would change with the next, donating step.
            array = np.array(tree[name])
            if self._stores_values and name in self._masks:
                values, array = array, np.zeros(self._shapes[name], np.float32)
                array[self._masks[name]] = values
            return array

        return {name: canonical(name) for name in self._shapes}

    def parameters(self) -> Parameters:
        return self._canonical(self._parameters)

    def load_parameters(self, parameters: Mapping[str, npt.NDArray[Any]]) -> None:
        check_parameters(parameters, self.recipe, self.vocabulary_size)
        self._parameters = self._stored(parameters)

    def initial_state(self, batch_size: int, training: bool) -> State:
        if training:
            device_columns(batch_size, self.devices)  # raises if it does not divide
        zeros = {
            name: np.zeros((batch_size, width), np.float32)
            for name, width in state_widths(self.recipe).items()
        }
        return jax.device_put(zeros, self._of_state if training else self._first)

    def _batch(self, place: Any, inputs: Tokens, targets: Tokens, mask: Mask) -> Batch:
        # copies, because JAX reads NumPy arrays after the call, or even shares their memory
        return jax.device_put(Batch(inputs.copy(), targets.copy(), mask.copy()), place)

    def _step_arguments(
        self, inputs: Tokens, targets: Tokens, mask: Mask, state: State
    ) -> tuple[Any, ...]:
        batch = self._batch(self._of_batch, inputs, targets, mask)
        divisor = np.float32(objective_divisor(self.recipe, mask))
        return self._kept, batch, state, divisor, np.uint32(self.step)

    def gradients(self, inputs: Tokens, targets: Tokens, mask: Mask, state: State) -> Parameters:
        arguments = self._step_arguments(inputs, targets, mask, state)
        gradients, _, _ = self._gradients(self._parameters, *arguments)
        return self._canonical(gradients)

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
        gradients, nll, final = self._gradients(self._parameters, *arguments)
        rates = rate_and_epsilon(self.recipe, learning_rate, self.step)
        self._parameters, self._slots, norm = self._update(
            self._parameters, self._slots, gradients, *np.array((*rates, averaged), np.float32)
        )
        self.step += 1
        return TrainStep(nll, norm, final)

    def _model_on_first_device(self) -> tuple[Tree, Tree]:
        """The parameters, and which weights are kept."""
        return jax.tree.map(lambda a: a.addressable_data(0), (self._parameters, self._kept))

    def evaluate_step(
        self, inputs: Tokens, targets: Tokens, mask: Mask, state: State
    ) -> EvaluateStep:
        batch = self._batch(self._first, inputs, targets, mask)
        return self._evaluate(*self._model_on_first_device(), batch, state)

    def next_token_log_probabilities(
        self, inputs: Tokens, state: State
    ) -> tuple[npt.NDArray[np.float32], State]:
        log_p, final = self._predict(*self._model_on_first_device(), inputs.copy(), state)
        return np.array(log_p), final

    def snapshot(self, state: State) -> dict[str, npt.NDArray[Any]]:
        saved = {f"parameter.{name}": p for name, p in self.parameters().items()}
        for slot, tree in self._slots.items():
            saved |= {f"optimizer.{slot}.{name}": a for name, a in self._canonical(tree).items()}
        saved |= {name: np.array(state[name]) for name in state_widths(self.recipe)}
        return {**saved, "step": np.array(self.step)}

    def restore(self, snapshot: Mapping[str, npt.NDArray[Any]]) -> State:
        self.load_parameters({name: snapshot[f"parameter.{name}"] for name in self._shapes})
        self._slots = {
            slot: self._stored({n: snapshot[f"optimizer.{slot}.{n}"] for n in self._shapes})
            for slot in self._slots
        }
        self.step = int(snapshot["step"])
        state = {name: np.array(snapshot[name]) for name in state_widths(self.recipe)}
        return jax.device_put(state, self._of_state)

    def synchronize(self) -> None:
        jax.block_until_ready((self._parameters, self._slots, jax.live_arrays()))

    def device_names(self) -> list[str]:
        if self.accelerator == "cpu":
            return [f"cpu:{r}" for r in range(self.devices)]
        return [device.device_kind for device in self._everywhere.mesh.devices.flat]

    def peak_device_memory(self) -> int | None:
        counts = [device.memory_stats() for device in self._everywhere.mesh.devices.flat]
        return max((c["peak_bytes_in_use"] for c in counts if c), default=None)  # CPUs have none

    def settings(self) -> dict[str, str]:
        return settings(
            self.recipe, self.accelerator, self.devices, self.threads, self._memory_is_kept
        )
