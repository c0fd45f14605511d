"""Recurrent layers: the four cells, and how they are run over time by `jax.lax.scan`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Array = Any  # jax.Array, or a tracer of one
LayerState = tuple[Array, ...]  # (h, c) of an LSTM, (h,) of the others, each [batch, width]
# From the gates' parts that come from the layer's input and from its previous output, both
# [batch, gates x width], and the state before a time step: the state after it.
Cell = Callable[..., LayerState]


def lstm(z_input: Array, z_recurrent: Array, _h: Array, c: Array) -> LayerState:
    i, f, g, o = jnp.split(z_input + z_recurrent, 4, axis=-1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c


def gru(z_input: Array, z_recurrent: Array, h: Array) -> LayerState:
    x_r, x_z, x_n = jnp.split(z_input, 3, axis=-1)
    u_r, u_z, u_n = jnp.split(z_recurrent, 3, axis=-1)
    z = jax.nn.sigmoid(x_z + u_z)
    n = jnp.tanh(x_n + jax.nn.sigmoid(x_r + u_r) * u_n)
    return ((1 - z) * n + z * h,)


def rnn_tanh(z_input: Array, z_recurrent: Array, _h: Array) -> LayerState:
    return (jnp.tanh(z_input + z_recurrent),)


def rnn_relu(z_input: Array, z_recurrent: Array, _h: Array) -> LayerState:
    return (jax.nn.relu(z_input + z_recurrent),)


CELLS: dict[str, Cell] = {"lstm": lstm, "gru": gru, "rnn_tanh": rnn_tanh, "rnn_relu": rnn_relu}


class Weights(NamedTuple):
    """Of one layer. The matrices are arrays, or JAX's sparse ones."""

    input: Any  # [inputs, gates x width]
    recurrent: Any  # [width, gates x width]
    bias: Array  # [gates x width]
    recurrent_bias: Array | None  # the same, where the recipe has one


def masked(h: Array, mask: Array | None) -> Array:
    return h if mask is None else h * mask


def plus(z: Array, bias: Array | None) -> Array:
    return z if bias is None else z + bias


def cell_layer(
    cell: Cell, x: Array, weights: Weights, state: LayerState, mask: Array | None
) -> tuple[Array, LayerState]:
    """A layer in explicit time steps: all that a cell does, at every one of them.

    Args:
        x: [time, batch, inputs].
        state: before the first step.
        mask: of the previous output in the recurrent product, [batch, width].

    Returns:
        Outputs [time, batch, width], and the state after the last step.
    """

    def step(state: LayerState, x: Array) -> tuple[LayerState, Array]:
        z_recurrent = plus(masked(state[0], mask) @ weights.recurrent, weights.recurrent_bias)
        state = cell(x @ weights.input + weights.bias, z_recurrent, *state)
        return state, state[0]

    final, outputs = jax.lax.scan(step, state, x)
    return outputs, final


def fused_layer(
    cell: Cell,
    x: Array,
    weights: Weights,
    state: LayerState,
    mask: Array | None,
    tuned: bool,
) -> tuple[Array, LayerState]:
    """The same, with one product for the inputs of all time steps, as it needs no recurrence.

    Args:
        tuned: whether the recurrence has a derivative of its own.
    """
    z_input = x @ weights.input + weights.bias
    run = tuned_recurrence if tuned else recurrence
    return run(cell, z_input, weights.recurrent, weights.recurrent_bias, mask, state)


def recurrence(
    cell: Cell,
    z_input: Array,
    u: Array,
    bias: Array | None,
    mask: Array | None,
    state: LayerState,
) -> tuple[Array, LayerState]:
    """A layer but for its inputs' product.

    Args:
        z_input: the gates' part that comes from the layer's input, [time, batch, gates x width].
        u: [width, gates x width].
        bias: [gates x width].
        mask: [batch, width].
        state: before the first step.

    Returns:
        Outputs [time, batch, width], and the state after the last step.
    """

    def step(state: LayerState, z_input: Array) -> tuple[LayerState, Array]:
        state = cell(z_input, plus(masked(state[0], mask) @ u, bias), *state)
        return state, state[0]

    final, outputs = jax.lax.scan(step, state, z_input)
    return outputs, final


# JAX differentiates `recurrence` well but for one thing: it adds up the recurrent weights' gradient
# step by step, a small product each. The derivative below forms it in one product.
tuned_recurrence = jax.custom_vjp(recurrence, nondiff_argnums=(0,))


def recurrence_forward(
    cell: Cell, z_input: Array, u: Array, bias: Array | None, mask: Array | None, state: LayerState
) -> tuple[tuple[Array, LayerState], tuple[Any, ...]]:
    """The results of `recurrence`, and what its derivative needs: above all, each step's own."""

    def step(state: LayerState, z_input: Array) -> tuple[LayerState, tuple[Array, Any]]:
        z_recurrent = plus(masked(state[0], mask) @ u, bias)
        state, derivative = jax.vjp(cell, z_input, z_recurrent, *state)
        return state, (state[0], derivative)

    final, (outputs, derivatives) = jax.lax.scan(step, state, z_input)
    return (outputs, final), (derivatives, outputs, u, bias, mask, state)


def recurrence_backward(
    _cell: Cell, trace: tuple[Any, ...], d_results: tuple[Array, LayerState]
) -> tuple[Any, ...]:
    """Derivatives with respect to the arguments, given those of the results.

    d_a is the derivative of the objective with respect to a.
    """
    derivatives, outputs, u, bias, mask, state = trace
    d_outputs, d_final = d_results

    def step(d_state: LayerState, at_t: tuple[Array, Any]) -> tuple[LayerState, Any]:
        d_output, derivative = at_t
        d_z_input, d_z_recurrent, d_h, *d_rest = derivative((d_state[0] + d_output, *d_state[1:]))
        d_h = d_h + masked(d_z_recurrent @ u.T, mask)
        return (d_h, *d_rest), (d_z_input, d_z_recurrent)

    d_state, (d_z_input, d_z_recurrent) = jax.lax.scan(
        step, d_final, (d_outputs, derivatives), reverse=True
    )
    h_before = jnp.concatenate([state[0][None], outputs[:-1]])
    d_u = jnp.einsum("tbi,tbj->ij", masked(h_before, mask), d_z_recurrent)
    d_bias = None if bias is None else d_z_recurrent.sum((0, 1))
    d_mask = None if mask is None else jnp.zeros_like(mask)  # it is drawn, not trained
    return d_z_input, d_u, d_bias, d_mask, d_state


tuned_recurrence.defvjp(recurrence_forward, recurrence_backward)
