"""Recurrent layers: Gluon's fused ones, explicit time steps, and products of kept weights alone.

A layer takes x [time, batch, inputs] and its states, and returns its output [time, batch, width]
and the states after it. Each has Gluon's four parameters (`gate_parameters`) and its `begin_state`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mxnet as mx
import numpy as np
import numpy.typing as npt
from mxnet import autograd, gluon
from mxnet.gluon import rnn

from ptbench.model.parameters import GATES
from ptbench.model.recipe import Recipe

Array = Any  # NDArray, or Symbol while a graph is made
States = list[Array]  # [h, c] of an LSTM, [h] of others


@dataclass(frozen=True)
class Initializers:
    """What starts a layer's parameters; None is what `Block.initialize` is given."""

    weight: Any
    recurrent: Any
    bias: Any

    def keywords(self) -> dict[str, Any]:
        """As Gluon's layers and cells name them."""
        return {
            "i2h_weight_initializer": self.weight,
            "h2h_weight_initializer": self.recurrent,
            "i2h_bias_initializer": self.bias,
        }


def recurrent_layer(
    recipe: Recipe,
    inputs: int,
    width: int,
    start: Initializers,
    kept: dict[str, npt.NDArray[np.bool_]],
) -> gluon.HybridBlock:
    """The layer that the recipe asks for.

    Gluon's layers are single ones because a stack's own dropout spares its last layer's output.

    Args:
        kept: which weights a sparse layer has, of `input` and `recurrent`, [inputs, gates x width].
    """
    if recipe.kernel == "sparse":
        return SparseLSTM(recipe, width, start, kept)
    if recipe.recurrent_dropout or (
        recipe.kernel == "stepwise" and recipe.implementation == "tuned"
    ):
        return TimeSteps(recipe, inputs, width, start)
    if recipe.kernel == "stepwise":
        return GluonCell(recipe, inputs, width, start)
    if recipe.rnn == "lstm":
        return rnn.LSTM(width, input_size=inputs, **start.keywords())
    if recipe.rnn == "gru":
        return rnn.GRU(width, input_size=inputs, **start.keywords())
    activation = recipe.rnn.removeprefix("rnn_")
    return rnn.RNN(width, activation=activation, input_size=inputs, **start.keywords())


def gate_parameters(layer: gluon.HybridBlock) -> dict[str, gluon.Parameter]:
    """A layer's parameters by the last part of their canonical names."""
    fused = isinstance(layer, rnn.LSTM | rnn.GRU | rnn.RNN)
    prefix = "l0_" if fused else ""
    owner = layer.cell if isinstance(layer, GluonCell) else layer
    kinds = {
        "input": "i2h_weight",
        "recurrent": "h2h_weight",
        "bias": "i2h_bias",
        "recurrent_bias": "h2h_bias",
    }
    return {kind: getattr(owner, prefix + name) for kind, name in kinds.items()}


class GluonCell(gluon.HybridBlock):
    """Gluon's cell in a loop that takes any number of time steps."""

    def __init__(self, recipe: Recipe, inputs: int, width: int, start: Initializers) -> None:
        super().__init__()
        with self.name_scope():
            if recipe.rnn == "lstm":
                self.cell = rnn.LSTMCell(width, input_size=inputs, **start.keywords())
            elif recipe.rnn == "gru":
                self.cell = rnn.GRUCell(width, input_size=inputs, **start.keywords())
            else:
                activation = recipe.rnn.removeprefix("rnn_")
                self.cell = rnn.RNNCell(
                    width, activation=activation, input_size=inputs, **start.keywords()
                )

    def begin_state(self, batch_size: int, ctx: mx.Context) -> States:
        return self.cell.begin_state(batch_size=batch_size, ctx=ctx)

    def hybrid_forward(self, F: Any, x: Array, states: States) -> tuple[Array, States]:  # noqa: N803 - Gluon's name
        return F.contrib.foreach(self.cell, x, states)


class OwnLayer(gluon.HybridBlock):
    """What the layers written here have in common: parameters as Gluon's, and dropout of h."""

    def __init__(
        self, recipe: Recipe, width: int, start: Initializers, shapes: dict[str, tuple[int, ...]]
    ) -> None:
        super().__init__()
        self.kind, self.rate, self.width = recipe.rnn, recipe.recurrent_dropout, width
        initializers = {
            "i2h_weight": start.weight,
            "h2h_weight": start.recurrent,
            "i2h_bias": start.bias,
            "h2h_bias": "zeros",
        }
        with self.name_scope():
            for name, shape in shapes.items():
                made = self.params.get(name, shape=shape, init=initializers[name])
                setattr(self, name, made)

    def begin_state(self, batch_size: int, ctx: mx.Context) -> States:
        count = 2 if self.kind == "lstm" else 1
        return [mx.nd.zeros((batch_size, self.width), ctx=ctx) for _ in range(count)]

    def recurrent_mask(self, F: Any, h: Array) -> Array | None:  # noqa: N803
        """What the previous output is multiplied by at all time steps; None: nothing is dropped."""
        return drop(F, F.ones_like(h), self.rate) if self.rate else None


class TimeSteps(OwnLayer):
    """Explicit time steps behind one product of all inputs, with recurrent dropout if asked for."""

    def __init__(self, recipe: Recipe, inputs: int, width: int, start: Initializers) -> None:
        gates = len(GATES[recipe.rnn]) * width
        shapes: dict[str, tuple[int, ...]] = {
            "i2h_weight": (gates, inputs),
            "h2h_weight": (gates, width),
            "i2h_bias": (gates,),
            "h2h_bias": (gates,),
        }
        super().__init__(recipe, width, start, shapes)
        self.gates = gates

    def hybrid_forward(
        self,
        F: Any,  # noqa: N803
        x: Array,
        states: States,
        i2h_weight: Array,
        h2h_weight: Array,
        i2h_bias: Array,
        h2h_bias: Array,
    ) -> tuple[Array, States]:
        z_input = F.FullyConnected(x, i2h_weight, i2h_bias, num_hidden=self.gates, flatten=False)
        mask = self.recurrent_mask(F, states[0])

        def step(z_input: Array, states: States) -> tuple[Array, States]:
            h = states[0] if mask is None else states[0] * mask
            z_recurrent = F.FullyConnected(h, h2h_weight, h2h_bias, num_hidden=self.gates)
            states = CELL_STEPS[self.kind](F, z_input, z_recurrent, *states)
            return states[0], states

        return F.contrib.foreach(step, z_input, states)


def lstm_step(F: Any, z_input: Array, z_recurrent: Array, h: Array, c: Array) -> States:  # noqa: ARG001, N803
    i, f, g, o = F.SliceChannel(z_input + z_recurrent, num_outputs=4)
    c = F.sigmoid(f) * c + F.sigmoid(i) * F.tanh(g)
    return [F.sigmoid(o) * F.tanh(c), c]


def gru_step(F: Any, z_input: Array, z_recurrent: Array, h: Array) -> States:  # noqa: N803
    x_r, x_z, x_n = F.SliceChannel(z_input, num_outputs=3)
    u_r, u_z, u_n = F.SliceChannel(z_recurrent, num_outputs=3)
    n = F.tanh(x_n + F.sigmoid(x_r + u_r) * u_n)
    return [n + F.sigmoid(x_z + u_z) * (h - n)]


def rnn_tanh_step(F: Any, z_input: Array, z_recurrent: Array, h: Array) -> States:  # noqa: ARG001, N803
    return [F.tanh(z_input + z_recurrent)]


def rnn_relu_step(F: Any, z_input: Array, z_recurrent: Array, h: Array) -> States:  # noqa: ARG001, N803
    return [F.relu(z_input + z_recurrent)]


CELL_STEPS: dict[str, Callable[..., States]] = {
    "lstm": lstm_step,
    "gru": gru_step,
    "rnn_tanh": rnn_tanh_step,
    "rnn_relu": rnn_relu_step,
}


class SparseLSTM(OwnLayer):
    """An LSTM whose weight matrices are vectors of the kept weights, in the order of a CSR matrix.

    Not for a graph: MXNet's sparse products have no gradient for a sparse operand, and what gives
    it, `autograd.Function`, runs as it is called.
    """

    def __init__(
        self,
        recipe: Recipe,
        width: int,
        start: Initializers,
        kept: dict[str, npt.NDArray[np.bool_]],
    ) -> None:
        shapes: dict[str, tuple[int, ...]] = {
            "i2h_weight": (int(kept["input"].sum()),),
            "h2h_weight": (int(kept["recurrent"].sum()),),
            "i2h_bias": (4 * width,),
            "h2h_bias": (4 * width,),
        }
        kept_only = Initializers(
            KeptWeights(start.weight, kept["input"]),
            KeptWeights(start.recurrent, kept["recurrent"]),
            start.bias,
        )
        super().__init__(recipe, width, kept_only, shapes)
        self.kept = kept
        self.positions: dict[mx.Context, tuple[CsrPositions, CsrPositions]] = {}

    def hybrid_forward(
        self,
        F: Any,  # noqa: N803
        x: Array,
        states: States,
        i2h_weight: Array,
        h2h_weight: Array,
        i2h_bias: Array,
        h2h_bias: Array,
    ) -> tuple[Array, States]:
        if x.context not in self.positions:
            self.positions[x.context] = (
                CsrPositions.of(self.kept["input"], x.context),
                CsrPositions.of(self.kept["recurrent"], x.context),
            )
        h, c = states
        steps = SparseLSTMSteps(*self.positions[x.context], h, c, self.recurrent_mask(F, h))
        out, h, c = steps(x, i2h_weight, h2h_weight, i2h_bias + h2h_bias)
        return out, [h, c]


class KeptWeights(mx.init.Initializer):
    """Draws a whole matrix by another initializer, and takes the kept weights of it."""

    def __init__(self, whole: Any, kept: npt.NDArray[np.bool_]) -> None:
        super().__init__()
        self.whole = mx.init.Uniform() if whole is None else whole  # Block.initialize's default
        self.kept = kept.T

    def _init_weight(self, name: Any, arr: mx.nd.NDArray) -> None:
        matrix = mx.nd.zeros(self.kept.shape)
        self.whole._init_weight(name, matrix)
        arr[:] = matrix.asnumpy()[self.kept]


@dataclass(frozen=True)
class CsrPositions:
    """Where the values of a sparse matrix [gates x width, inputs] are, row by row."""

    shape: tuple[int, int]
    starts: mx.nd.NDArray  # [rows + 1], each row's first value
    rows: mx.nd.NDArray  # [values]
    columns: mx.nd.NDArray  # [values]

    @classmethod
    def of(cls, kept: npt.NDArray[np.bool_], context: mx.Context) -> CsrPositions:
        rows, columns = np.nonzero(kept.T)
        starts = np.concatenate([[0], np.cumsum(kept.sum(axis=0))])
        arrays = (mx.nd.array(a, ctx=context, dtype="int64") for a in (starts, rows, columns))
        return cls(kept.T.shape, *arrays)

    def matrix(self, values: mx.nd.NDArray) -> mx.nd.sparse.CSRNDArray:
        definition = (values, self.columns, self.starts)
        return mx.nd.sparse.csr_matrix(definition, shape=self.shape, ctx=values.context)

    def gradient(self, d_out: list[mx.nd.NDArray], x: list[mx.nd.NDArray]) -> mx.nd.NDArray:
        """Of the values, when matrix times x gives out at each time step.

        Args:
            d_out: [rows, batch] of each step; x: [columns, batch].
        """
        products = mx.nd.zeros((len(self.rows), x[0].shape[1]), ctx=self.rows.context)
        for d, each in zip(d_out, x, strict=True):
            products += mx.nd.take(d, self.rows) * mx.nd.take(each, self.columns)
        return products.sum(axis=1)


class SparseLSTMSteps(autograd.Function):
    """All time steps of an LSTM, its gradient written out; arrays inside are [units, batch].

    Of what it is constructed with, no gradient is asked for.
    """

    def __init__(
        self,
        input_positions: CsrPositions,
        recurrent_positions: CsrPositions,
        h: mx.nd.NDArray,
        c: mx.nd.NDArray,
        mask: mx.nd.NDArray | None,
    ) -> None:
        super().__init__()
        self.input_positions, self.recurrent_positions = input_positions, recurrent_positions
        self.h0, self.c0 = h.T, c.T
        self.mask = mx.nd.ones_like(self.h0) if mask is None else mask.T

    def forward(
        self,
        x: mx.nd.NDArray,
        input_values: mx.nd.NDArray,
        recurrent_values: mx.nd.NDArray,
        bias: mx.nd.NDArray,
    ) -> tuple[mx.nd.NDArray, mx.nd.NDArray, mx.nd.NDArray]:
        """Outputs [time, batch, width], and the last h and c [batch, width]."""
        self.w = self.input_positions.matrix(input_values)
        self.u = self.recurrent_positions.matrix(recurrent_values)
        self.x = [step.T for step in x]
        bias = bias.expand_dims(1)
        h, c = self.h0, self.c0
        self.masked, self.gates, self.c, outputs = [], [], [c], []
        for step in self.x:
            masked = h * self.mask
            z = mx.nd.sparse.dot(self.w, step) + mx.nd.sparse.dot(self.u, masked) + bias
            i, f, g, o = mx.nd.split(z, 4, axis=0)
            i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
            c = f * c + i * g
            h = o * c.tanh()
            self.masked.append(masked)
            self.gates.append((i, f, g, o))
            self.c.append(c)
            outputs.append(h.T)
        return mx.nd.stack(*outputs), h.T, c.T

    def backward(
        self, d_out: mx.nd.NDArray, d_h: mx.nd.NDArray, d_c: mx.nd.NDArray
    ) -> tuple[mx.nd.NDArray, ...]:
        d_h, d_c, d_z = d_h.T, d_c.T, []
        for t in reversed(range(len(self.x))):
            i, f, g, o = self.gates[t]
            d_h = d_h + d_out[t].T
            tanh_c = self.c[t + 1].tanh()
            d_c = d_c + d_h * o * (1 - tanh_c**2)
            d_gates = mx.nd.concat(
                d_c * g * i * (1 - i),
                d_c * self.c[t] * f * (1 - f),
                d_c * i * (1 - g**2),
                d_h * tanh_c * o * (1 - o),
                dim=0,
            )
            d_c = d_c * f
            d_h = transposed_dot(self.u, d_gates) * self.mask
            d_z.append(d_gates)
        d_z.reverse()
        return (
            mx.nd.stack(*[transposed_dot(self.w, d).T for d in d_z]),
            self.input_positions.gradient(d_z, self.x),
            self.recurrent_positions.gradient(d_z, self.masked),
            mx.nd.add_n(*d_z).sum(axis=1),
        )


def transposed_dot(matrix: mx.nd.sparse.CSRNDArray, x: mx.nd.NDArray) -> mx.nd.NDArray:
    """The matrix' transpose times x."""
    return mx.nd.sparse.dot(matrix, x, transpose_a=True, forward_stype="default")


def drop(F: Any, x: Array, rate: float, locked: bool = False) -> Array:  # noqa: N803
    """Inverted dropout while training, by MXNet's own generator: cuDNN's ignores the seed.

    Args:
        locked: the same units at all indices of the first axis.
    """
    return F.Dropout(x, p=rate, axes=(0,) if locked else (), cudnn_off=True) if rate else x
