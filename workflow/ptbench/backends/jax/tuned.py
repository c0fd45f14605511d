"""The same model, faster: a derivative of the LSTM's own, cuDNN's LSTM, and XLA's draws.

On CPUs the loss has bounded memory, too; on GPUs that is slower, and the loss is stock's. What is
not here is in `model.py`. In CPU time on one thread, the recipes that ask for it train 1.3
(Zaremba's small model) and 1.2 times (medium, and with a mixture of softmaxes) as fast as in stock.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import rnn

from ptbench.backends.jax import model
from ptbench.backends.jax.model import Array, Head, LayerState, Weights
from ptbench.model.recipe import Recipe

RANDOM_GENERATOR = "rbg"  # XLA's own, which is faster than JAX's default

# Most logits that `nll` holds at once [numbers]; 32 MB, and as much again for gradients.
CHUNK = 2**23
# A mixture is always cut up, so that small ones are tested by the code that large ones run.
LEAST_CHUNKS_OF_MIXTURE = 3


# On an H100 cuDNN's LSTM trains faster than a scan at 1150 and 1500 units, and slower at 650.
LEAST_CUDNN_WIDTH = 1000


def recurrent_layer(
    recipe: Recipe, x: Array, weights: Weights, state: LayerState, mask: Array
) -> tuple[Array, LayerState]:
    """Run a fused LSTM with a derivative of its own, and any other layer as stock does."""
    if not is_plain_lstm(recipe):
        return model.recurrent_layer(recipe, x, weights, state, mask)
    z_input = x @ weights.input + (weights.bias + weights.recurrent_bias)
    return recurrence(z_input, weights.recurrent, state)


def gpu_layer(
    recipe: Recipe, x: Array, weights: Weights, state: LayerState, mask: Array
) -> tuple[Array, LayerState]:
    """Run a wide LSTM by cuDNN, which is for GPUs alone, and any other layer as above."""
    time, batch, inputs = x.shape
    if not is_plain_lstm(recipe) or state[0].shape[-1] < LEAST_CUDNN_WIDTH:
        return recurrent_layer(recipe, x, weights, state, mask)
    h, c = state
    recurrent_bias = jnp.broadcast_to(weights.recurrent_bias, weights.bias.shape)
    stored = weights.input.T, weights.recurrent.T, weights.bias, recurrent_bias
    outputs, h, c = rnn.lstm(
        x.transpose(1, 0, 2), h[None], c[None],
        jnp.concatenate([array.ravel() for array in stored]),
        jnp.full(batch, time, jnp.int32),  # of each sequence
        inputs, h.shape[-1], 1, 0.0, False, jax.lax.Precision.HIGHEST,
    )  # fmt: skip
    return outputs.transpose(1, 0, 2), (h[0], c[0])


def is_plain_lstm(recipe: Recipe) -> bool:
    """Return whether the layers are LSTMs that carry what they multiply."""
    return recipe.rnn == "lstm" and recipe.kernel == "fused" and not recipe.recurrent_dropout


@jax.custom_vjp
def recurrence(z_input: Array, u: Array, state: LayerState) -> tuple[Array, LayerState]:
    """Run an LSTM's recurrence.

    JAX differentiates a scan well with one exception: it adds up the gradient of the recurrent
    weights step by step, a small product each. The derivative below forms it in one product.

    Args:
        z_input: the part of the gates that comes from the input, biases included, [time, batch,
            4 x width].
        u: the recurrent weights, [width, 4 x width].
        state: before the first step.

    Returns:
        The outputs [time, batch, width], and the state after the last step.
    """
    results, _ = recurrence_forward(z_input, u, state)
    return results


def recurrence_forward(
    z_input: Array, u: Array, state: LayerState
) -> tuple[tuple[Array, LayerState], tuple[Any, ...]]:
    """Return the results of `recurrence` and what its derivative needs."""

    def step(state: LayerState, z_input: Array) -> tuple[LayerState, tuple[Array, Any]]:
        state, derivative = jax.vjp(model.lstm, z_input, state[0] @ u, *state)
        return state, (state[0], derivative)

    final, (outputs, derivatives) = jax.lax.scan(step, state, z_input)
    return (outputs, final), (derivatives, outputs, u, state)


def recurrence_backward(
    trace: tuple[Any, ...], d_results: tuple[Array, LayerState]
) -> tuple[Array, Array, LayerState]:
    """Return the derivatives with respect to the arguments; d_a is that with respect to a."""
    derivatives, outputs, u, state = trace
    d_outputs, d_final = d_results

    def step(d_state: LayerState, at_t: tuple[Array, Any]) -> tuple[LayerState, Array]:
        d_output, derivative = at_t
        d_h, d_c = d_state
        d_z, _, _, d_c = derivative((d_h + d_output, d_c))
        return (d_z @ u.T, d_c), d_z

    d_state, d_z = jax.lax.scan(step, d_final, (d_outputs, derivatives), reverse=True)
    h_before = jnp.concatenate([state[0][None], outputs[:-1]])
    return d_z, jnp.einsum("tbi,tbj->ij", h_before, d_z), d_state


recurrence.defvjp(recurrence_forward, recurrence_backward)


@jax.custom_vjp
def nll(head: Head, targets: Array, weights: Array) -> Array:
    """Return what `model.nll` does, with the logits of a few tokens in memory at a time.

    Its gradients are formed together with the loss, chunk by chunk, so that no logits are kept for
    later or formed twice.
    """

    def add(total: Array, chunk: tuple[Array, ...]) -> tuple[Array, None]:
        components, log_prior, *of_targets = chunk
        part = head._replace(components=components, log_prior=log_prior)
        return total + model.nll(part, *of_targets), None

    return jax.lax.scan(add, jnp.zeros(()), in_chunks(head, targets, weights))[0]


def nll_forward(head: Head, targets: Array, weights: Array) -> tuple[Array, Head]:
    """Return the loss and its derivative with respect to the head."""
    value_and_gradient = jax.value_and_grad(model.nll)

    def add(total: Any, chunk: tuple[Array, ...]) -> tuple[Any, tuple[Array, Array]]:
        components, log_prior, *of_targets = chunk
        part = head._replace(components=components, log_prior=log_prior)
        value, d = value_and_gradient(part, *of_targets)
        total = jax.tree.map(jnp.add, total, (value, d.matrix, d.bias))
        return total, (d.components, d.log_prior)

    nothing = jax.tree.map(jnp.zeros_like, (jnp.zeros(()), head.matrix, head.bias))
    chunks = in_chunks(head, targets, weights)
    (total, *d_output), d_features = jax.lax.scan(add, nothing, chunks)
    d_features = (d.reshape(-1, *d.shape[2:])[: len(targets)] for d in d_features)
    return total, Head(*d_features, *d_output)


def nll_backward(gradient: Head, d_total: Array) -> tuple[Head, None, None]:
    """Return the derivatives with respect to the arguments."""
    return jax.tree.map(lambda d: d_total * d, gradient), None, None


nll.defvjp(nll_forward, nll_backward)


def in_chunks(head: Head, targets: Array, weights: Array) -> tuple[Array, ...]:
    """Return components, log-priors, targets and weights as [chunks, tokens of a chunk, ...].

    The last chunk is padded with tokens whose weight is zero: they add neither loss nor gradient.
    """
    tokens, mixtures, _ = head.components.shape
    count = math.ceil(tokens * mixtures * len(head.matrix) / CHUNK)
    if mixtures > 1:
        count = max(count, min(LEAST_CHUNKS_OF_MIXTURE, tokens))
    size = math.ceil(tokens / count)

    def cut(array: Array) -> Array:
        padding = [(0, count * size - tokens)] + [(0, 0)] * (array.ndim - 1)
        return jnp.pad(array, padding).reshape(count, size, *array.shape[1:])

    return tuple(cut(array) for array in (head.components, head.log_prior, targets, weights))
