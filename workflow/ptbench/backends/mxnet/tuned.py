"""What is faster than the stock model: the loss by chunks, and settings of MXNet.

The layers are those of `model.py`: nothing in MXNet is faster than Gluon's fused LSTM.
"""

from __future__ import annotations

import mxnet as mx
from mxnet import autograd
from mxnet.gluon import nn

from ptbench.backends.mxnet import model
from ptbench.backends.mxnet.model import Array

CHUNK_ROWS = 1024  # rows of logits that exist at a time
# Parameters that one kernel of SGD updates. MXNet's kernel for several, which it uses by default,
# takes three times as long as a kernel for each (0).
AGGREGATED_PARAMETERS = 0
# Memory and plan of execution are made once; only what a call returns is allocated anew.
GRAPH = {"static_alloc": True, "static_shape": True}


def nll(
    output: nn.Dense,
    targets: Array,
    mask: Array,
    divisor: float | None,
    features: Array,
    log_prior: Array = None,
) -> tuple[Array, list[Array], list[Array]]:
    """Return what `model.nll` does, with no more than `CHUNK_ROWS` rows of logits at once.

    The gradients of a chunk are computed before the logits of the next. Those of the output layer
    are added to its `grad`; autograd goes on from features and log_prior.
    """
    d_features = mx.nd.empty(features.shape, ctx=features.context)
    prior = [] if log_prior is None else [log_prior]
    summed, d_prior = [], []
    for y, real, x, d_x, *own in chunks([targets, mask, features, d_features, *prior]):
        leaf = x.detach()
        autograd.mark_variables([leaf], [d_x])
        part, ends, gradients = model.nll(output, y, real, divisor, leaf, *own)
        if divisor is not None:
            ends[0].backward(gradients[0])
            d_prior += gradients[1:]
        summed.append(part)
    gradients = [d_features, *([mx.nd.concat(*d_prior, dim=0)] if d_prior else [])]
    return mx.nd.add_n(*summed), [features, *prior], gradients


def chunks(arrays: list[Array]) -> list[list[Array]]:
    """Split arrays into equal parts, as views; the first array has one row for each token.

    Parts have one size, so that MXNet plans its execution once.
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
