"""Recurrent layers.

All are called as Keras' own: `layer(x, initial_state=[...], training=...)` gives the outputs and
the last states, h, or h and c of an LSTM. x and outputs are [batch, time, ...] but for
`HoistedRecurrent`, which has time first.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import numpy.typing as npt
from keras import ops

from ptbench.backends.keras.parameters import (
    Initializers,
    Stored,
    as_it_is,
    gru_biases,
    gru_weight,
    kept_only,
)
from ptbench.model.parameters import GATES
from ptbench.model.recipe import Recipe


def recurrent_layer(
    recipe: Recipe,
    width: int,
    initializers: Initializers,
    kept: tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]] | None,
    hoisted: bool,
) -> keras.layers.Layer:
    """One layer of the recipe.

    Args:
        kept: which input and recurrent weights there are, of a sparse model.
        hoisted: whether it is to be a `HoistedRecurrent`.
    """
    options: dict[str, Any] = {
        "units": width,
        "kernel_initializer": initializers.kernel(),
        "recurrent_initializer": initializers.recurrent_kernel(),
        "bias_initializer": initializers.recurrent_layer_bias(),
    }
    if hoisted:
        layer = HoistedRecurrent(
            recipe.rnn, recipe.recurrent_bias, recipe.recurrent_dropout, **options
        )
    else:
        layer = keras_layer(recipe, options, kept)
    return WeightDropout(layer, recipe.weight_dropout) if recipe.weight_dropout else layer


def keras_layer(
    recipe: Recipe,
    options: dict[str, Any],
    kept: tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]] | None,
) -> keras.layers.Layer:
    """One layer of the recipe, all of its time steps Keras'.

    Args:
        options: of the layer or its cell.
        kept: as `recurrent_layer` has it.
    """
    options = options | {"recurrent_dropout": recipe.recurrent_dropout}
    if recipe.rnn == "lstm":
        options["unit_forget_bias"] = False  # would be 1, whatever the recipe says
    elif recipe.rnn != "gru":
        options["activation"] = recipe.rnn.removeprefix("rnn_")
    whole = {"return_sequences": True, "return_state": True}
    if recipe.kernel == "sparse":
        assert kept is not None
        layer = keras.layers.RNN(SparseLSTMCell(*kept, **options), **whole)
    elif recipe.kernel == "stepwise" or recipe.recurrent_dropout:
        layer = keras.layers.RNN(CELLS[recipe.rnn](**options), **whole)
    else:
        layer = LAYERS[recipe.rnn](**options, **whole)
    # Keras' GRU has two biases already
    return TwoBiases(layer) if recipe.recurrent_bias and recipe.rnn != "gru" else layer


def stored_parameters(
    prefix: str,
    layer: keras.layers.Layer,
    recipe: Recipe,
    kept: tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]] | None,
) -> list[Stored]:
    """The parameters `{prefix}.input` and so on of a layer that `recurrent_layer` made."""
    if isinstance(layer, WeightDropout):
        layer = layer.layer
    weights = holder_of_weights(layer)
    kernels = {"input": weights.kernel, "recurrent": weights.recurrent_kernel}
    if isinstance(weights, keras.layers.GRUCell):
        return [
            *(gru_weight(f"{prefix}.{kind}", kernel) for kind, kernel in kernels.items()),
            gru_biases(prefix, weights.bias, recipe.recurrent_bias),
        ]
    stored = [as_it_is(f"{prefix}.{kind}", kernel) for kind, kernel in kernels.items()]
    if isinstance(weights, SparseLSTMCell):
        assert kept is not None
        stored = [
            kept_only(f"{prefix}.{kind}", kernel, mask)
            for (kind, kernel), mask in zip(kernels.items(), kept, strict=True)
        ]
    stored.append(as_it_is(f"{prefix}.bias", weights.bias))
    if recipe.recurrent_bias:
        stored.append(as_it_is(f"{prefix}.recurrent_bias", layer.recurrent_bias))
    return stored


def holder_of_weights(layer: keras.layers.Layer) -> keras.layers.Layer:
    """What has the kernels and the bias of a layer that `recurrent_layer` made."""
    while isinstance(layer, keras.layers.Wrapper):
        layer = layer.layer
    return layer if isinstance(layer, HoistedRecurrent) else layer.cell


# Layers called with another value in a weight's place, which so keep cuDNN's kernel on a GPU.


def call_with(
    layer: keras.layers.Layer,
    variable: keras.Variable,
    value: Any,
    x: Any,
    initial_state: Any,
    training: bool,
) -> Any:
    """What a recurrent layer gives if one of its variables has that value."""
    outputs, _ = layer.stateless_call(
        [value if v is variable else v for v in layer.trainable_variables],
        layer.non_trainable_variables,
        x,
        initial_state=initial_state,
        training=training,
    )
    return outputs


class WeightDropout(keras.layers.Wrapper):
    """A recurrent layer that drops recurrent weights: the same ones at all time steps."""

    def __init__(self, layer: keras.layers.Layer, rate: float) -> None:
        super().__init__(layer)
        self.dropout = keras.layers.Dropout(rate)

    def call(self, x: Any, initial_state: Any, training: bool = False) -> Any:
        if not training:
            return self.layer(x, initial_state=initial_state)
        kernel = holder_of_weights(self.layer).recurrent_kernel
        dropped = self.dropout(ops.convert_to_tensor(kernel), training=True)
        return call_with(self.layer, kernel, dropped, x, initial_state, training)


class TwoBiases(keras.layers.Wrapper):
    """A recurrent layer of one bias vector, given a second one."""

    def build(self, input_shape: Any) -> None:
        super().build(input_shape)
        self.recurrent_bias = self.add_weight(
            shape=self.layer.cell.bias.shape, initializer="zeros", name="recurrent_bias"
        )

    def call(self, x: Any, initial_state: Any, training: bool = False) -> Any:
        bias = self.layer.cell.bias
        both = bias + self.recurrent_bias
        return call_with(self.layer, bias, both, x, initial_state, training)


# Keras' layers, and what they leave out.


class OneMask:
    """Recurrent dropout with one mask for all gates, where Keras draws one for each."""

    def get_recurrent_dropout_mask(self, step_input: Any) -> Any:
        masks = super().get_recurrent_dropout_mask(step_input)  # type: ignore[misc]
        return None if masks is None else [masks[0]] * len(masks)


class LSTMCell(OneMask, keras.layers.LSTMCell):
    pass


class GRUCell(OneMask, keras.layers.GRUCell):
    pass


LAYERS = {
    "lstm": keras.layers.LSTM,
    "gru": keras.layers.GRU,
    "rnn_tanh": keras.layers.SimpleRNN,
    "rnn_relu": keras.layers.SimpleRNN,
}
CELLS = {
    "lstm": LSTMCell,
    "gru": GRUCell,
    "rnn_tanh": keras.layers.SimpleRNNCell,
    "rnn_relu": keras.layers.SimpleRNNCell,
}


class SparseLSTMCell(LSTMCell):
    """An LSTM of which only the kept weights exist, in vectors, gate by gate and unit by unit."""

    def __init__(
        self,
        kept_input: npt.NDArray[np.bool_],
        kept_recurrent: npt.NDArray[np.bool_],
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.kept = {"kernel": kept_input, "recurrent_kernel": kept_recurrent}
        # Of each kept weight its row and its column, in the order of the vector.
        self.places = {name: places_of(mask) for name, mask in self.kept.items()}

    def build(self, _: Any) -> None:
        def weight(name: str, initializer: Any) -> keras.Variable:
            mask = self.kept[name]

            def kept_of_dense(shape: tuple[int], dtype: Any = None) -> Any:  # noqa: ARG001
                dense = ops.transpose(initializer(mask.shape, dtype=dtype))
                return ops.take(ops.reshape(dense, (-1,)), np.flatnonzero(mask.T))

            return self.add_weight(shape=(int(mask.sum()),), initializer=kept_of_dense, name=name)

        self.kernel = weight("kernel", self.kernel_initializer)
        self.recurrent_kernel = weight("recurrent_kernel", self.recurrent_initializer)
        self.bias = self.add_weight(
            shape=(4 * self.units,), initializer=self.bias_initializer, name="bias"
        )
        self.built = True

    def call(self, inputs: Any, states: Any, training: bool = False) -> Any:
        h, c = states
        dropped = h
        if training and (masks := self.get_recurrent_dropout_mask(h)) is not None:
            dropped = h * masks[0]
        width = 4 * self.units
        z = (
            sparse_product(inputs, self.kernel, *self.places["kernel"], width)
            + sparse_product(
                dropped, self.recurrent_kernel, *self.places["recurrent_kernel"], width
            )
            + self.bias
        )
        i, f, g, o = ops.split(z, 4, axis=-1)
        c = ops.sigmoid(f) * c + ops.sigmoid(i) * ops.tanh(g)
        h = ops.sigmoid(o) * ops.tanh(c)
        return h, [h, c]


Places = npt.NDArray[np.int32]


def places_of(kept: npt.NDArray[np.bool_]) -> tuple[Places, Places]:
    """Rows and columns of what is kept, column by column."""
    columns, rows = np.nonzero(kept.T)
    return rows.astype(np.int32), columns.astype(np.int32)


def sparse_product(x: Any, values: Any, rows: Places, columns: Places, width: int) -> Any:
    """x [batch, inputs] times the matrix [inputs, width] of these values at these places.

    The work is that of the values alone, forwards and backwards, and nothing but x is kept for the
    way back.
    """

    @ops.custom_gradient
    def product(x: Any, values: Any) -> Any:
        x = ops.transpose(x)
        y = ops.segment_sum(ops.take(x, rows, axis=0) * values[:, None], columns, width)

        def gradient(*arguments: Any, upstream: Any = None) -> Any:
            d_y = arguments[0] if upstream is None else upstream
            at_values = ops.take(ops.transpose(d_y), columns, axis=0)
            d_x = ops.segment_sum(at_values * values[:, None], rows, x.shape[0])
            return ops.transpose(d_x), ops.sum(at_values * ops.take(x, rows, axis=0), axis=1)

        return ops.transpose(y), gradient

    return product(x, ops.convert_to_tensor(values))


# The tuned layer.


class HoistedRecurrent(keras.layers.Layer):
    """Any cell, with time first: x and outputs are [time, batch, ...].

    One product forms the input's part of all gates before the time steps, and the gradient, written
    out, forms that of each weight matrix in one product after them. Time steps are unrolled.
    Weights are laid out as in the contract.
    """

    def __init__(
        self,
        cell: str,
        recurrent_bias: bool,
        recurrent_dropout: float,
        units: int,
        kernel_initializer: Any,
        recurrent_initializer: Any,
        bias_initializer: Any,
    ) -> None:
        super().__init__()
        self.cell, self.units = HOISTED_CELLS[cell], units
        self.gates = len(GATES[cell]) * units
        self.has_recurrent_bias = recurrent_bias
        self.initializers = (kernel_initializer, recurrent_initializer, bias_initializer)
        # recurrent dropout is the dropout of ones [batch, units]
        self.dropout = keras.layers.Dropout(recurrent_dropout)

    def build(self, input_shape: Any) -> None:
        kernel, recurrent_kernel, bias = self.initializers
        self.kernel = self.add_weight(
            shape=(input_shape[-1], self.gates), initializer=kernel, name="kernel"
        )
        self.recurrent_kernel = self.add_weight(
            shape=(self.units, self.gates), initializer=recurrent_kernel, name="recurrent_kernel"
        )
        self.bias = self.add_weight(shape=(self.gates,), initializer=bias, name="bias")
        if self.has_recurrent_bias:
            self.recurrent_bias = self.add_weight(
                shape=(self.gates,), initializer="zeros", name="recurrent_bias"
            )

    def call(self, x: Any, initial_state: Any, training: bool = False) -> Any:
        time, batch, inputs = x.shape
        bias, own_biases = self.bias, []
        if self.has_recurrent_bias and self.cell.separate_biases:
            own_biases = [ops.convert_to_tensor(self.recurrent_bias)]
        elif self.has_recurrent_bias:
            bias = bias + self.recurrent_bias
        z = ops.matmul(ops.reshape(x, (time * batch, inputs)), self.kernel) + bias
        mask = None
        if training and self.dropout.rate:
            mask = self.dropout(ops.ones((batch, self.units)), training=True)
        return run_hoisted(
            self.cell,
            ops.reshape(z, (time, batch, self.gates)),
            ops.convert_to_tensor(self.recurrent_kernel),
            own_biases,
            initial_state,
            mask,
        )


def run_hoisted(
    cell: Any, z: Any, kernel: Any, biases: list[Any], initial_state: list[Any], mask: Any
) -> list[Any]:
    """The time steps of a layer: outputs [time, batch, units] and the last states [batch, units].

    Args:
        cell: one of HOISTED_CELLS.
        z: the gates' part that comes from the input, [time, batch, gates x units].
        kernel: recurrent weights, [units, gates x units].
        biases: the recurrent bias [gates x units], if the cell needs it apart from `z`.
        initial_state: h, or h and c; nothing flows back into it.
        mask: what h is multiplied with in the recurrent product, [batch, units], or None.
    """
    time, batch = z.shape[:2]
    units, gates = kernel.shape

    def dropped(h: Any) -> Any:
        return h if mask is None else h * mask

    @ops.custom_gradient
    def steps(z: Any, kernel: Any, *biases: Any) -> Any:
        states, saved = [initial_state], []
        for z_t in ops.unstack(z, time):
            recurrent = ops.matmul(dropped(states[-1][0]), kernel)
            for bias in biases:
                recurrent = recurrent + bias
            state, values = cell.forward(z_t, recurrent, states[-1])
            states.append(state)
            saved.append(values)

        def gradient(*arguments: Any, upstream: Any = None) -> Any:
            # Backends differ in how they give it. The outputs' is first; the last c has none.
            upstream = keras.tree.flatten(arguments if upstream is None else upstream)
            d_outputs = ops.unstack(upstream[0], time)
            previous = [ops.stack(each) for each in zip(*states[:-1], strict=True)]
            factors = cell.factors(previous, [ops.stack(each) for each in zip(*saved, strict=True)])
            by_time = list(zip(*(ops.unstack(f, time) for f in factors), strict=True))
            transposed = ops.transpose(kernel)
            d_h, d_gates = [None] * time, [None] * time
            later, carried = None, None
            for t in reversed(range(time)):
                d_h[t] = d_outputs[t] if later is None else d_outputs[t] + later
                d_gates[t], past, carried = cell.backward(d_h[t], carried, *by_time[t])
                later = dropped(ops.matmul(d_gates[t], transposed))
                if past is not None:
                    later = later + past
            d_recurrent = ops.stack(d_gates)
            flat = ops.reshape(d_recurrent, (time * batch, gates))
            inputs = ops.reshape(dropped(previous[0]), (time * batch, units))
            return (
                cell.input_gradient(d_recurrent, d_h, factors),
                ops.matmul(ops.transpose(inputs), flat),
                *(ops.sum(flat, axis=0) for _ in biases),
            )

        return [ops.stack([state[0] for state in states[1:]]), *states[-1][1:]], gradient

    outputs, *last_c = steps(z, kernel, *biases)
    return [outputs, outputs[-1], *last_c]


# The cells of `run_hoisted`. `forward` gives the new state and what the gradient needs; `factors`
# forms of that, for all times at once, what `backward` multiplies by at each time: from the
# derivatives of h and of what is carried back in time to those of the gates' recurrent part, of the
# previous h (None: nothing but through the weights), and of what is carried.


class HoistedLSTM:
    separate_biases = False  # whether the recurrent bias is more than another bias

    @staticmethod
    def forward(z: Any, recurrent: Any, state: list[Any]) -> tuple[list[Any], list[Any]]:
        i, f, g, o = ops.split(z + recurrent, 4, axis=-1)
        i, f, g, o = ops.sigmoid(i), ops.sigmoid(f), ops.tanh(g), ops.sigmoid(o)
        c = f * state[1] + i * g
        tanh_c = ops.tanh(c)
        return [o * tanh_c, c], [i, f, g, o, tanh_c]

    @staticmethod
    def factors(previous: list[Any], saved: list[Any]) -> list[Any]:
        _, c = previous
        i, f, g, o, tanh_c = saved
        gates = [g * i * (1 - i), c * f * (1 - f), i * (1 - g * g), tanh_c * o * (1 - o)]
        return [o * (1 - tanh_c * tanh_c), ops.concatenate(gates, axis=-1), f]

    @staticmethod
    def backward(d_h: Any, d_c: Any, to_c: Any, gates: Any, f: Any) -> tuple[Any, Any, Any]:
        d_c = d_h * to_c if d_c is None else d_h * to_c + d_c
        return ops.concatenate([d_c, d_c, d_c, d_h], axis=-1) * gates, None, d_c * f

    @staticmethod
    def input_gradient(d_recurrent: Any, d_h: list[Any], factors: list[Any]) -> Any:
        return d_recurrent


class HoistedGRU:
    separate_biases = True

    @staticmethod
    def forward(z: Any, recurrent: Any, state: list[Any]) -> tuple[list[Any], list[Any]]:
        (h,), units = state, state[0].shape[-1]
        z_gates, z_n = ops.split(z, [2 * units], axis=-1)
        recurrent_gates, recurrent_n = ops.split(recurrent, [2 * units], axis=-1)
        r, u = ops.split(ops.sigmoid(z_gates + recurrent_gates), 2, axis=-1)
        n = ops.tanh(z_n + r * recurrent_n)
        return [n + u * (h - n)], [r, u, n, recurrent_n]

    @staticmethod
    def factors(previous: list[Any], saved: list[Any]) -> list[Any]:
        (h,), (r, u, n, recurrent_n) = previous, saved
        to_n = (1 - u) * (1 - n * n)
        gates = [to_n * recurrent_n * r * (1 - r), (h - n) * u * (1 - u), to_n * r]
        return [ops.concatenate(gates, axis=-1), u, to_n]

    @staticmethod
    def backward(d_h: Any, _: None, gates: Any, u: Any, to_n: Any) -> tuple[Any, Any, Any]:
        return ops.concatenate([d_h, d_h, d_h], axis=-1) * gates, d_h * u, None

    @staticmethod
    def input_gradient(d_recurrent: Any, d_h: list[Any], factors: list[Any]) -> Any:
        to_n = factors[2]
        d_gates = d_recurrent[:, :, : 2 * to_n.shape[-1]]
        return ops.concatenate([d_gates, ops.stack(d_h) * to_n], axis=-1)


class HoistedTanh:
    separate_biases = False

    @staticmethod
    def forward(z: Any, recurrent: Any, state: list[Any]) -> tuple[list[Any], list[Any]]:
        h = ops.tanh(z + recurrent)
        return [h], [h]

    @staticmethod
    def factors(previous: list[Any], saved: list[Any]) -> list[Any]:
        return [1 - saved[0] * saved[0]]

    @staticmethod
    def backward(d_h: Any, _: None, slope: Any) -> tuple[Any, Any, Any]:
        return d_h * slope, None, None

    @staticmethod
    def input_gradient(d_recurrent: Any, d_h: list[Any], factors: list[Any]) -> Any:
        return d_recurrent


class HoistedRelu(HoistedTanh):
    @staticmethod
    def forward(z: Any, recurrent: Any, state: list[Any]) -> tuple[list[Any], list[Any]]:
        h = ops.relu(z + recurrent)
        return [h], [h]

    @staticmethod
    def factors(previous: list[Any], saved: list[Any]) -> list[Any]:
        return [ops.cast(saved[0] > 0, saved[0].dtype)]


HOISTED_CELLS: dict[str, Any] = {
    "lstm": HoistedLSTM,
    "gru": HoistedGRU,
    "rnn_tanh": HoistedTanh,
    "rnn_relu": HoistedRelu,
}
