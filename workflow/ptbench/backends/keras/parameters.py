"""How Keras' variables hold the contract's parameters, and the initialisers they start from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import keras
import numpy as np
import numpy.typing as npt

from ptbench.model.parameters import GATES
from ptbench.model.recipe import Recipe

Array = npt.NDArray[Any]
Initializer = Callable[..., Any]


class Stored(NamedTuple):
    """A variable, the parameters it holds, and the way from one's layout to the other's."""

    variable: keras.Variable
    unpack: Callable[[Array], dict[str, Array]]  # the variable's value to parameters by name
    pack: Callable[[Mapping[str, Array]], Array]  # back, with zeros for what is no parameter


def as_it_is(name: str, variable: keras.Variable) -> Stored:
    return Stored(variable, lambda value: {name: value}, lambda parameters: parameters[name])


def transposed(name: str, variable: keras.Variable) -> Stored:
    return Stored(variable, lambda value: {name: value.T}, lambda parameters: parameters[name].T)


def gru_gates(array: Array) -> Array:
    """From the contract's order of gates (reset, update, candidate) to Keras', or back."""
    reset, update, candidate = np.split(array, 3, axis=-1)
    return np.concatenate([update, reset, candidate], axis=-1)


def gru_weight(name: str, variable: keras.Variable) -> Stored:
    return Stored(
        variable,
        lambda value: {name: gru_gates(value)},
        lambda parameters: gru_gates(parameters[name]),
    )


def gru_biases(prefix: str, variable: keras.Variable, recurrent_bias: bool) -> Stored:
    """Keras' GRU has both biases in one variable, whether or not the recipe has the second."""
    names = [f"{prefix}.bias"] + [f"{prefix}.recurrent_bias"] * recurrent_bias

    def unpack(value: Array) -> dict[str, Array]:
        return {name: gru_gates(row) for name, row in zip(names, value, strict=False)}

    def pack(parameters: Mapping[str, Array]) -> Array:
        rows = np.zeros(variable.shape, np.float32)
        for row, name in zip(rows, names, strict=False):
            row[:] = gru_gates(parameters[name])
        return rows

    return Stored(variable, unpack, pack)


def kept_only(name: str, variable: keras.Variable, kept: npt.NDArray[np.bool_]) -> Stored:
    """A vector of the weights that are kept, column by column."""

    def unpack(value: Array) -> dict[str, Array]:
        dense = np.zeros(kept.T.shape, value.dtype)
        dense[kept.T] = value
        return {name: dense.T}

    return Stored(variable, unpack, lambda parameters: parameters[name].T[kept.T])


class Initializers:
    """The recipe's scheme in Keras' own initialisers, each with a seed of its own.

    `framework_defaults` is what Keras' layers start from if they are told nothing; they are told
    the same, so that the seed decides.
    """

    def __init__(self, recipe: Recipe, seed: int) -> None:
        self.recipe = recipe
        self.seeds = np.random.default_rng(seed)
        self.uniform = recipe.initialization_scheme == "uniform"

    def _seed(self) -> int:
        return int(self.seeds.integers(2**31))  # two weights of one shape must not start alike

    def _within(self, scale: float) -> Initializer:
        return keras.initializers.RandomUniform(-scale, scale, seed=self._seed())

    def embedding(self) -> Initializer:
        return self._within(self.recipe.initialization_scale if self.uniform else 0.05)

    def kernel(self) -> Initializer:
        if self.uniform:
            return self._within(self.recipe.initialization_scale)
        return keras.initializers.GlorotUniform(seed=self._seed())

    def recurrent_kernel(self) -> Initializer:
        if self.uniform:
            return self._within(self.recipe.initialization_scale)
        return keras.initializers.Orthogonal(seed=self._seed())

    def recurrent_layer_bias(self) -> Initializer:
        """Zero, save an LSTM's forget gates."""
        if self.recipe.rnn != "lstm":
            return keras.initializers.Zeros()
        # keras.layers.LSTM has unit_forget_bias=True
        defaults = self.recipe.initialization_scheme == "framework_defaults"
        forget = 1.0 if defaults else self.recipe.forget_bias
        gates = [forget if gate == "forget" else 0.0 for gate in GATES["lstm"]]

        def bias(shape: tuple[int], dtype: Any = None) -> Any:
            return keras.ops.repeat(keras.ops.convert_to_tensor(gates, dtype), shape[0] // 4)

        return bias

    def softmax_bias(self) -> Initializer:
        if self.uniform:
            return self._within(self.recipe.initialization_scale)
        return keras.initializers.Zeros()
