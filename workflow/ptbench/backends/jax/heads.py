"""What follows the recurrent layers: the plain softmax and the mixture of softmaxes.

All losses are formed in log space. `weighted_nll` is differentiated by JAX; `chunked_nll` is the
same with bounded memory, for `implementation: tuned`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Array = Any  # jax.Array, or a tracer of one

# Most logits that `chunked_nll` holds at once [numbers]; 32 MB, and as much again for gradients.
CHUNK = 2**23
# A mixture is always cut up, so that small ones are tested by the code that large ones run.
LEAST_CHUNKS_OF_MIXTURE = 3


class Output(NamedTuple):
    """The output layer's weights."""

    matrix: Array  # [vocabulary, features]
    bias: Array | None  # [vocabulary]


class Features(NamedTuple):
    """What the output layer is applied to, for each token; without a mixture K is 1."""

    components: Array  # [tokens, K, features]
    log_prior: Array | None  # [tokens, K]; None without a mixture


def log_components(output: Output, features: Features) -> Array:
    """Logits [tokens, K, vocabulary]."""
    tokens, mixtures, width = features.components.shape
    # One matrix, because XLA's products of three-dimensional arrays are a tenth slower.
    logits = features.components.reshape(-1, width) @ output.matrix.T
    if output.bias is not None:
        logits = logits + output.bias
    return logits.reshape(tokens, mixtures, -1)


def weighted_nll(output: Output, features: Features, targets: Array, weights: Array) -> Array:
    """Sum of weights times each target's negative log-likelihood [nats].

    Of a mixture, only the target's column of the components' softmaxes is formed.

    Args:
        targets: [tokens].
        weights: [tokens].
    """
    logits = log_components(output, features)
    at_target = jnp.take_along_axis(logits, targets[:, None, None], axis=-1)[..., 0]
    log_p = at_target - jax.nn.logsumexp(logits, axis=-1)
    if features.log_prior is None:
        return -jnp.vdot(log_p[:, 0], weights)
    return -jnp.vdot(jax.nn.logsumexp(features.log_prior + log_p, axis=-1), weights)


def log_probabilities(output: Output, features: Features) -> Array:
    """Of every word, [tokens, vocabulary]."""
    log_p = jax.nn.log_softmax(log_components(output, features))
    if features.log_prior is None:
        return log_p[:, 0]
    return jax.nn.logsumexp(features.log_prior[..., None] + log_p, axis=1)


@jax.custom_vjp
def chunked_nll(output: Output, features: Features, targets: Array, weights: Array) -> Array:
    """`weighted_nll`, with the logits of a few tokens in memory at a time.

    The gradients are formed together with the loss, chunk by chunk, so that no logits are kept for
    later or formed twice.
    """
    chunks = in_chunks((features, targets, weights), output)

    def add(total: Array, chunk: tuple[Features, Array, Array]) -> tuple[Array, None]:
        return total + weighted_nll(output, *chunk), None

    return jax.lax.scan(add, jnp.zeros(()), chunks)[0]


def chunked_forward(
    output: Output, features: Features, targets: Array, weights: Array
) -> tuple[Array, tuple[Any, ...]]:
    """The loss, and its derivatives with respect to `output` and `features`."""
    chunks = in_chunks((features, targets, weights), output)
    value_and_gradients = jax.value_and_grad(weighted_nll, argnums=(0, 1))

    def add(total: Any, chunk: tuple[Features, Array, Array]) -> tuple[Any, Features]:
        value, (d_output, d_features) = value_and_gradients(output, *chunk)
        return jax.tree.map(jnp.add, total, (value, d_output)), d_features

    nothing = jax.tree.map(jnp.zeros_like, (jnp.zeros(()), output))
    (total, d_output), d_features = jax.lax.scan(add, nothing, chunks)
    tokens = len(targets)
    d_features = jax.tree.map(lambda d: d.reshape(-1, *d.shape[2:])[:tokens], d_features)
    return total, (d_output, d_features)


def chunked_backward(
    gradients: tuple[Output, Features], d_total: Array
) -> tuple[Output, Features, None, None]:
    return *jax.tree.map(lambda d: d_total * d, gradients), None, None


chunked_nll.defvjp(chunked_forward, chunked_backward)


def in_chunks(of_tokens: Any, output: Output) -> Any:
    """Arrays [tokens, ...] as [chunks, tokens of a chunk, ...], the last one padded with zeros.

    Tokens of padding have a weight of zero, and so neither a loss nor a gradient.
    """
    features, *_ = of_tokens
    tokens, mixtures, _ = features.components.shape
    count = math.ceil(tokens * mixtures * len(output.matrix) / CHUNK)
    if features.log_prior is not None:
        count = max(count, min(LEAST_CHUNKS_OF_MIXTURE, tokens))
    size = math.ceil(tokens / count)

    def cut(array: Array) -> Array:
        padding = [(0, count * size - tokens)] + [(0, 0)] * (array.ndim - 1)
        return jnp.pad(array, padding).reshape(count, size, *array.shape[1:])

    return jax.tree.map(cut, of_tokens)
