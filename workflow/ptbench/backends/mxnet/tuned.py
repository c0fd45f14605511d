"""What is faster than the stock model: the loss by chunks, and settings of MXNet.

Layers are those of `model.py`: Gluon's fused LSTM is the fastest that there is.
"""

from __future__ import annotations

import mxnet as mx
from mxnet import autograd
from mxnet.gluon import nn

from ptbench.backends.mxnet import model

Array = mx.nd.NDArray

CHUNK_ROWS = 1024  # rows of logits that exist at a time
# Parameters that one kernel of SGD updates. MXNet's kernel for several, which it uses by default,
# takes three times as long as a kernel for each (0).
AGGREGATED_PARAMETERS = 0
# Buffers and plan of execution are made once; only what a call returns is allocated anew.
GRAPH = {"static_alloc": True, "static_shape": True}


def nll(output: nn.Dense, targets: Array, mask: Array, *heads: Array) -> Array:
    """Return what `model.nll` does, with no more than `CHUNK_ROWS` rows of logits at once."""
    parts = [model.nll(output, *chunk) for chunk in chunks([targets, mask, *heads])]
    return mx.nd.add_n(*parts)


def nll_with_gradients(
    output: nn.Dense, targets: Array, mask: Array, heads: list[Array], divisor: float
) -> tuple[Array, list[Array]]:
    """Return the nll, and the gradient of nll / divisor for each array of the head.

    The gradients of a chunk are formed before the next one's logits. Those of the output layer are
    added to its `grad`.
    """
    gradients = [mx.nd.empty(a.shape, ctx=a.context) for a in heads]
    heads = [a.detach() for a in heads]
    parts = []
    for y, real, *leaves_and_gradients in chunks([targets, mask, *heads, *gradients]):
        leaves = leaves_and_gradients[: len(heads)]
        autograd.mark_variables(leaves, leaves_and_gradients[len(heads) :])
        with autograd.record():
            part = model.nll(output, y, real, *leaves)
            objective = part / divisor
        objective.backward()
        parts.append(part.detach())
    return mx.nd.add_n(*parts), gradients


def chunks(arrays: list[Array]) -> list[list[Array]]:
    """Return views of equal parts of all arrays; the first has one row for each token.

    Parts have one size, so that MXNet makes one plan of execution.
    """
    tokens, most = len(arrays[0]), max(len(a) for a in arrays)
    count = next(
        n
        for n in range(1, tokens + 1)
        if tokens % n == 0 and (most <= n * CHUNK_ROWS or n == tokens)
    )
    sizes = [len(a) // count for a in arrays]
    return [
        [a[n * size : (n + 1) * size] for a, size in zip(arrays, sizes, strict=True)]
        for n in range(count)
    ]
