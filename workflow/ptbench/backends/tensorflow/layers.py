"""Recurrent layers, by every kernel and implementation; `recurrent_layer` chooses.

Every layer holds its parameters as variables and is called with its input [time, batch, inputs],
the state it starts from, h and with an LSTM c, each [batch, width], the mask of what it drops of
its previous output [batch, width], or None, and its recurrent weights after some of them have been
dropped, in the shape in which they are stored, or None. It returns its output [time, batch, width]
and the state after it. What is computed is in `Backend`'s docstring; z is the gates before their
non-linearities, and d_a the derivative of the objective with respect to a.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from ptbench.model.parameters import GATES
from ptbench.model.recipe import Accelerator, Recipe

Tensor = Any  # tf.Tensor
LayerState = tuple[Any, ...]  # h, or h and c
KeptMasks = dict[str, npt.NDArray[np.bool_]]  # of `input` and `recurrent`; empty if dense

# Products of gathered rows formed at a time by `SparseMatrix` [numbers].
SPARSE_CHUNK = 2**22


# --------------------------------------------------------------------------------------- matrices


class DenseMatrix:
    """A weight matrix [rows, columns], stored as it is."""

    def times(self, x: Tensor, w: Tensor) -> Tensor:
        """x w, [n, columns]."""
        return x @ w

    def times_transposed(self, d_z: Tensor, w: Tensor) -> Tensor:
        """d_z w^T, [n, rows]."""
        return tf.matmul(d_z, w, transpose_b=True)

    def step_by_step(self, w: Tensor) -> Callable[[Tensor], Tensor]:
        """`times_transposed` with a recurrent matrix, to be called at each of many time steps.

        Products of a few rows with a matrix that is transposed on the fly are two to three times
        slower, so it is transposed once. TensorFlow's graph optimiser would put that back into the
        products, were it not a transposition of a three-dimensional array.
        """
        width = w.shape[0]
        gates = tf.transpose(tf.reshape(w, (width, -1, width)), (1, 2, 0))
        transposed = tf.reshape(gates, (-1, width))
        return lambda d_z: d_z @ transposed

    def derivative(self, x: Tensor, d_z: Tensor) -> Tensor:
        """x^T d_z: the derivative with respect to w of x w, given that with respect to it."""
        return tf.matmul(x, d_z, transpose_a=True)


class SparseMatrix:
    """The same of which only the kept weights are stored, [kept], in the order of rows."""

    def __init__(self, kept: npt.NDArray[np.bool_]) -> None:
        indices = np.argwhere(kept)
        self.shape = kept.shape
        self.indices = tf.constant(indices, tf.int64)
        self.rows = tf.constant(indices[:, 0], tf.int32)
        self.columns = tf.constant(indices[:, 1], tf.int32)

    def times(self, x: Tensor, w: Tensor) -> Tensor:
        return self._product(w, x, transposed=True)

    def times_transposed(self, d_z: Tensor, w: Tensor) -> Tensor:
        return self._product(w, d_z, transposed=False)

    def step_by_step(self, w: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda d_z: self.times_transposed(d_z, w)

    def _product(self, w: Tensor, x: Tensor, transposed: bool) -> Tensor:
        """x times the matrix's transpose, or times itself if that is to be `transposed`."""
        sparse = tf.SparseTensor(self.indices, w, self.shape)
        return tf.transpose(
            tf.sparse.sparse_dense_matmul(sparse, x, adjoint_a=transposed, adjoint_b=True)
        )

    def derivative(self, x: Tensor, d_z: Tensor) -> Tensor:
        """At the kept weights alone, a chunk of them at a time."""
        x, d_z = tf.transpose(x), tf.transpose(d_z)
        kept, n = self.rows.shape[0], x.shape[1]
        chunk = max(SPARSE_CHUNK // n, 1)
        parts: list[Tensor] = []
        for start in range(0, kept, chunk):
            with tf.control_dependencies(parts[-1:]):
                rows = tf.gather(x, self.rows[start : start + chunk])
                columns = tf.gather(d_z, self.columns[start : start + chunk])
                parts.append(tf.einsum("kn,kn->k", rows, columns))
        return tf.concat(parts, 0)


Matrix = DenseMatrix | SparseMatrix


# ------------------------------------------------------------------------------------------ cells


class CellStep(NamedTuple):
    """A cell after one time step."""

    state: LayerState
    saved: tuple[Tensor, ...]  # what `BackwardSteps` needs, each [batch, width]


class BackwardStep(NamedTuple):
    """Derivatives with respect to what a time step took."""

    z_recurrent: Tensor  # [batch, gates x width], through the recurrent weights
    past_weights: Tensor | None  # with respect to the previous output, [batch, width]
    c: Tensor | None  # [batch, width]


class Lstm:
    """Gates input, forget, candidate, output."""

    @staticmethod
    def step(z_input: Tensor, z_recurrent: Tensor, state: LayerState) -> CellStep:
        i, f, g, o = tf.split(z_input + z_recurrent, 4, axis=1)
        i, f, g, o = tf.sigmoid(i), tf.sigmoid(f), tf.tanh(g), tf.sigmoid(o)
        c = f * state[1] + i * g
        tanh_c = tf.tanh(c)
        return CellStep((o * tanh_c, c), (i, f, g, o, state[1], tanh_c))

    @staticmethod
    def factors(
        i: Tensor, f: Tensor, g: Tensor, o: Tensor, c_before: Tensor, tanh_c: Tensor
    ) -> tuple[Tensor, ...]:
        c_by_h = o * (1 - tanh_c**2)  # d_c is d_h times this; d_z is (d_c, d_c, d_c, d_h) times:
        z_factors = tf.concat(
            [g * i * (1 - i), c_before * f * (1 - f), i * (1 - g**2), tanh_c * o * (1 - o)], -1
        )
        return c_by_h, z_factors, f

    @staticmethod
    def backward(factors: tuple[Tensor, ...], d_h: Tensor, d_c: Tensor | None) -> BackwardStep:
        c_by_h, z_factors, f = factors
        d_c = d_h * c_by_h if d_c is None else d_c + d_h * c_by_h
        return BackwardStep(tf.concat([d_c, d_c, d_c, d_h], 1) * z_factors, None, d_c * f)

    @staticmethod
    def input_derivative(d_z_recurrent: Tensor, d_h: Tensor, factors: tuple[Tensor, ...]) -> Tensor:
        return d_z_recurrent


class Gru:
    """Gates reset, update, candidate; the candidate's recurrent part is reset after its product."""

    @staticmethod
    def step(z_input: Tensor, z_recurrent: Tensor, state: LayerState) -> CellStep:
        x_r, x_z, x_n = tf.split(z_input, 3, axis=1)
        u_r, u_z, u_n = tf.split(z_recurrent, 3, axis=1)
        r, z = tf.sigmoid(x_r + u_r), tf.sigmoid(x_z + u_z)
        n = tf.tanh(x_n + r * u_n)
        (h,) = state
        return CellStep(((1 - z) * n + z * h,), (r, z, n, u_n, h))

    @staticmethod
    def factors(
        r: Tensor, z: Tensor, n: Tensor, u_n: Tensor, h_before: Tensor
    ) -> tuple[Tensor, ...]:
        by_n = (1 - z) * (1 - n**2)  # all derivatives are d_h times a factor
        by_z = (h_before - n) * z * (1 - z)
        return tf.concat([by_n * u_n * r * (1 - r), by_z, by_n * r], -1), z, by_n

    @staticmethod
    def backward(factors: tuple[Tensor, ...], d_h: Tensor, d_c: Tensor | None) -> BackwardStep:
        z_factors, z, _ = factors
        return BackwardStep(tf.concat([d_h, d_h, d_h], 1) * z_factors, d_h * z, None)

    @staticmethod
    def input_derivative(d_z_recurrent: Tensor, d_h: Tensor, factors: tuple[Tensor, ...]) -> Tensor:
        reset_and_update = d_z_recurrent[..., : 2 * d_h.shape[-1]]
        return tf.concat([reset_and_update, d_h * factors[2]], -1)


class SimpleCell:
    """One gate: what comes out is what is carried."""

    @staticmethod
    def backward(factors: tuple[Tensor, ...], d_h: Tensor, d_c: Tensor | None) -> BackwardStep:
        return BackwardStep(d_h * factors[0], None, None)

    @staticmethod
    def input_derivative(d_z_recurrent: Tensor, d_h: Tensor, factors: tuple[Tensor, ...]) -> Tensor:
        return d_z_recurrent


class RnnTanh(SimpleCell):
    """The simple recurrent cell of Elman (1990)."""

    @staticmethod
    def step(z_input: Tensor, z_recurrent: Tensor, state: LayerState) -> CellStep:
        h = tf.tanh(z_input + z_recurrent)
        return CellStep((h,), (h,))

    @staticmethod
    def factors(h: Tensor) -> tuple[Tensor, ...]:
        return (1 - h**2,)


class RnnRelu(SimpleCell):
    """The same with rectified units."""

    @staticmethod
    def step(z_input: Tensor, z_recurrent: Tensor, state: LayerState) -> CellStep:
        h = tf.nn.relu(z_input + z_recurrent)
        return CellStep((h,), (h,))

    @staticmethod
    def factors(h: Tensor) -> tuple[Tensor, ...]:
        return (tf.cast(h > 0, h.dtype),)


CELLS: dict[str, Any] = {"lstm": Lstm, "gru": Gru, "rnn_tanh": RnnTanh, "rnn_relu": RnnRelu}


# ----------------------------------------------------------------------------------------- layers


class RecurrentLayer(tf.Module, abc.ABC):
    """One layer; see the module's docstring. Its variables start at zero."""

    variables_of: dict[str, tf.Variable]  # by what follows `rnn.{l}.` in the canonical names

    def __init__(self, recipe: Recipe, inputs: int, width: int) -> None:
        super().__init__()
        self.recipe, self.width = recipe, width
        gates = len(GATES[recipe.rnn]) * width
        self.shapes = {"input": (inputs, gates), "recurrent": (width, gates), "bias": (gates,)}
        if recipe.recurrent_bias:
            self.shapes["recurrent_bias"] = (gates,)

    def new_variables(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, tf.Variable]:
        return {kind: tf.Variable(tf.zeros(shape), name=kind) for kind, shape in shapes.items()}

    def recurrent_weights(self, dropped: Tensor | None) -> Tensor:
        """What multiplies the previous output: its variable if nothing of it is dropped."""
        if dropped is not None:
            return dropped
        return tf.convert_to_tensor(self.variables_of["recurrent"])

    @property
    def recurrent_bias(self) -> Tensor | None:
        return self.variables_of.get("recurrent_bias")

    @property
    def whole_bias(self) -> Tensor:
        """Both biases together, for cells that add them."""
        bias = self.variables_of["bias"]
        return bias if self.recurrent_bias is None else bias + self.recurrent_bias

    @abc.abstractmethod
    def __call__(
        self, x: Tensor, state: LayerState, recurrent_mask: Tensor | None, dropped: Tensor | None
    ) -> tuple[Tensor, LayerState]: ...


class KerasLayer(RecurrentLayer):
    """`tf.keras.layers.LSTM`, `GRU` or `SimpleRNN`, with its own weights where ours are like them.

    Keras' GRU has its gates in the order update, reset, candidate, and both biases in one array.
    """

    def __init__(self, recipe: Recipe, inputs: int, width: int) -> None:
        super().__init__(recipe, inputs, width)
        keras = tf.keras.layers
        kinds: dict[str, Any] = {
            "lstm": (keras.LSTM, {}),
            "gru": (keras.GRU, {}),
            "rnn_tanh": (keras.SimpleRNN, {}),
            "rnn_relu": (keras.SimpleRNN, {"activation": "relu"}),
        }
        kind, settings = kinds[recipe.rnn]
        zero = dict.fromkeys(("kernel_initializer", "recurrent_initializer"), "zeros")
        self.layer = kind(width, return_sequences=True, return_state=True, **zero, **settings)
        self.layer.build((None, None, inputs))
        cell = self.layer.cell
        self.variables_of = {"input": cell.kernel.value, "recurrent": cell.recurrent_kernel.value}
        if recipe.rnn == "gru":
            self.variables_of |= self.new_variables({"bias": self.shapes["bias"]})
        else:
            self.variables_of["bias"] = cell.bias.value
        if recipe.recurrent_bias:
            more = {"recurrent_bias": self.shapes["recurrent_bias"]}
            self.variables_of |= self.new_variables(more)

    def _values(self, dropped: Tensor | None) -> list[tuple[Any, Tensor]]:
        """What the layer is to compute with instead of its own weights."""
        cell = self.layer.cell
        if self.recipe.rnn != "gru":
            values = [] if dropped is None else [(cell.recurrent_kernel, dropped)]
            return values + ([(cell.bias, self.whole_bias)] if self.recipe.recurrent_bias else [])

        def keras_order(array: Tensor) -> Tensor:
            r, z, n = tf.split(array, 3, axis=-1)
            return tf.concat([z, r, n], axis=-1)

        bias = tf.convert_to_tensor(self.variables_of["bias"])
        recurrent = self.recurrent_bias
        recurrent = tf.zeros_like(bias) if recurrent is None else tf.convert_to_tensor(recurrent)
        return [
            (cell.kernel, keras_order(self.variables_of["input"])),
            (cell.recurrent_kernel, keras_order(self.recurrent_weights(dropped))),
            (cell.bias, keras_order(tf.stack([bias, recurrent]))),
        ]

    def __call__(
        self, x: Tensor, state: LayerState, recurrent_mask: Tensor | None, dropped: Tensor | None
    ) -> tuple[Tensor, LayerState]:
        assert recurrent_mask is None
        with tf.keras.StatelessScope(self._values(dropped)):
            y, *state = self.layer(tf.transpose(x, (1, 0, 2)), initial_state=list(state))
        return tf.transpose(y, (1, 0, 2)), tuple(state)


class BlockLstm(RecurrentLayer):
    """The fused time loop that is behind TensorFlow 1's LSTMBlockFusedCell."""

    def __init__(self, recipe: Recipe, inputs: int, width: int) -> None:
        super().__init__(recipe, inputs, width)
        self.variables_of = self.new_variables(self.shapes)

    def __call__(
        self, x: Tensor, state: LayerState, recurrent_mask: Tensor | None, dropped: Tensor | None
    ) -> tuple[Tensor, LayerState]:
        assert recurrent_mask is None
        w = tf.concat([self.variables_of["input"], self.recurrent_weights(dropped)], axis=0)
        return self._block(x, w, tf.convert_to_tensor(self.whole_bias), *state)

    def _block(
        self, x: Tensor, w: Tensor, b: Tensor, h0: Tensor, c0: Tensor
    ) -> tuple[Tensor, LayerState]:
        no_peephole = tf.zeros(self.width)
        same = {
            "seq_len_max": tf.constant(x.shape[0], tf.int64),
            "wci": no_peephole,
            "wcf": no_peephole,
            "wco": no_peephole,
            "use_peephole": False,
            "h_prev": h0,
            "cs_prev": c0,
        }

        @tf.custom_gradient
        def block(x: Tensor, w: Tensor, b: Tensor) -> Any:
            # Its gates are in our order; and it adds no forget bias, as BlockLSTM does.
            r = tf.raw_ops.BlockLSTMV2(x=x, w=w, b=b, cell_clip=0, **same)  # 0: no clipping

            def derivative(d_h: Tensor, d_c: Tensor) -> tuple[Tensor, ...]:
                # The gradient that TensorFlow 2.21 has registered for BlockLSTMV2 is that of
                # BlockLSTM, whose gates are in another order.
                d = tf.raw_ops.BlockLSTMGradV2(
                    x=x, w=w, b=b, cs_grad=d_c, h_grad=d_h, i=r.i, cs=r.cs, f=r.f, o=r.o, ci=r.ci,
                    co=r.co, h=r.h, **same,
                )  # fmt: skip
                return d.x_grad, d.w_grad, d.b_grad

            return (r.h, r.cs), derivative

        h, c = block(x, w, b)
        return h, (h[-1], c[-1])


class ExplicitSteps(RecurrentLayer):
    """The cell's equations, time step by time step, with TensorFlow's own derivative."""

    def __init__(self, recipe: Recipe, inputs: int, width: int, kept: KeptMasks) -> None:
        """Args: kept: of a sparse kernel, whose matrices have no other weights."""
        super().__init__(recipe, inputs, width)
        self.matrices: dict[str, Matrix] = {
            kind: SparseMatrix(kept[kind]) if kind in kept else DenseMatrix()
            for kind in ("input", "recurrent")
        }
        stored = {kind: (int(mask.sum()),) for kind, mask in kept.items()}
        self.variables_of = self.new_variables(self.shapes | stored)
        self.cell = CELLS[recipe.rnn]

    def weights(self, dropped: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Input and recurrent weights, bias and recurrent bias, as values."""
        w, b = (tf.convert_to_tensor(self.variables_of[kind]) for kind in ("input", "bias"))
        u, r = self.recurrent_weights(dropped), self.recurrent_bias
        return w, u, b, None if r is None else tf.convert_to_tensor(r)

    def __call__(
        self, x: Tensor, state: LayerState, recurrent_mask: Tensor | None, dropped: Tensor | None
    ) -> tuple[Tensor, LayerState]:
        w, u, b, r = self.weights(dropped)
        outputs = []
        for x_t in tf.unstack(x):
            h = state[0] if recurrent_mask is None else state[0] * recurrent_mask
            z_recurrent = self.matrices["recurrent"].times(h, u)
            if r is not None:
                z_recurrent += r
            state = self.cell.step(self.matrices["input"].times(x_t, w) + b, z_recurrent, state)[0]
            outputs.append(state[0])
        return tf.stack(outputs), state


class HandDerivedSteps(ExplicitSteps):
    """The same with the derivative by hand: what needs no recurrence is kept out of the time steps.

    That is the inputs' product and, going back, the derivatives of the non-linearities and the
    products that give the weights' gradients, which TensorFlow's own derivative forms step by step.
    """

    def __call__(
        self, x: Tensor, state: LayerState, recurrent_mask: Tensor | None, dropped: Tensor | None
    ) -> tuple[Tensor, LayerState]:
        @tf.custom_gradient
        def outputs_and_state(*given: Tensor) -> Any:
            return self._forward(recurrent_mask, state, *given)

        y, *after = outputs_and_state(x, *(t for t in self.weights(dropped) if t is not None))
        return y, tuple(after)

    def _forward(
        self,
        mask: Tensor | None,
        state: LayerState,
        x: Tensor,
        w: Tensor,
        u: Tensor,
        b: Tensor,
        r: Tensor | None = None,
    ) -> Any:
        """Outputs and final state, and their derivative's function."""
        cell, by_input, by_recurrent = self.cell, self.matrices["input"], self.matrices["recurrent"]
        steps, batch_size, inputs = x.shape
        h0 = state[0]

        def flat(series: Tensor) -> Tensor:  # [time, batch, units] as [time x batch, units]
            return tf.reshape(series, (steps * batch_size, series.shape[-1]))

        def masked(h: Tensor) -> Tensor:
            return h if mask is None else h * mask

        z_inputs = by_input.times(flat(x), w) + b
        hs, saved = [], []
        for z_input in tf.unstack(tf.reshape(z_inputs, (steps, batch_size, -1))):
            z_recurrent = by_recurrent.times(masked(state[0]), u)
            if r is not None:
                z_recurrent += r
            state, kept = cell.step(z_input, z_recurrent, state)
            hs.append(state[0])
            saved.append(kept)
        h = tf.stack(hs)

        def derivative(d_h_all: Tensor, *_: Tensor) -> list[Tensor]:
            # Truncated: the final state is carried on as a value, and the first one came as such.
            factors = cell.factors(*(tf.stack(each) for each in zip(*saved, strict=True)))
            by_time = list(zip(*(tf.unstack(each) for each in factors), strict=True))
            d_outputs = tf.unstack(d_h_all)
            through_weights = by_recurrent.step_by_step(u)
            d_h, d_c = d_outputs[-1], None
            d_hs, d_zs = [], []
            for t in reversed(range(steps)):
                d_z, past_weights, d_c = cell.backward(by_time[t], d_h, d_c)
                d_hs.append(d_h)
                d_zs.append(d_z)
                if t > 0:
                    d_h = d_outputs[t - 1] + masked(through_weights(d_z))
                    if past_weights is not None:
                        d_h += past_weights
            d_z_recurrent = tf.stack(d_zs[::-1])
            d_z_input = flat(cell.input_derivative(d_z_recurrent, tf.stack(d_hs[::-1]), factors))
            d_z_recurrent = flat(d_z_recurrent)
            h_before = masked(tf.stack([h0, *hs[:-1]]))
            d_x = tf.reshape(by_input.times_transposed(d_z_input, w), (steps, batch_size, inputs))
            d_w = by_input.derivative(flat(x), d_z_input)
            d_u = by_recurrent.derivative(flat(h_before), d_z_recurrent)
            d = [d_x, d_w, d_u, tf.reduce_sum(d_z_input, axis=0)]
            return d if r is None else [*d, tf.reduce_sum(d_z_recurrent, axis=0)]

        return (h, *state), derivative


def recurrent_layer(
    recipe: Recipe, inputs: int, width: int, kept: KeptMasks, accelerator: Accelerator
) -> RecurrentLayer:
    """The layer that kernel and implementation say.

    On GPUs Keras' LSTM and GRU are cuDNN's, whatever the implementation: nothing here beats those.

    Neither Keras' layers nor BlockLSTM can drop previous outputs by a mask of ours, so with
    `recurrent_dropout` explicit steps take their place.

    Args:
        kept: which weights of `input` and `recurrent` a sparse model has.
    """
    if recipe.kernel != "sparse":
        kept = {}  # all weights are stored, and those left out held at zero
    cudnn = accelerator == "cuda" and recipe.kernel == "fused" and recipe.rnn in ("lstm", "gru")
    if (
        recipe.implementation == "tuned"
        and recipe.kernel in ("fused", "sparse")
        and (recipe.recurrent_dropout or not cudnn)
    ):
        return HandDerivedSteps(recipe, inputs, width, kept)
    if recipe.kernel in ("stepwise", "sparse") or recipe.recurrent_dropout:
        return ExplicitSteps(recipe, inputs, width, kept)
    return (BlockLstm if recipe.kernel == "block" else KerasLayer)(recipe, inputs, width)
