"""Plain and mixed softmax: losses and log-probabilities from features and output matrix.

A plain softmax is a mixture of one, whose prior is certain. N is the number of tokens, K of
mixtures, F of features, V of words.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import tensorflow as tf

Tensor = Any  # tf.Tensor

# Logits formed at a time by `chunked_nll` [bytes]: past the caches anyway, and less than the
# parameters of any model that needs chunks.
CHUNK_BYTES = 64 * 2**20


class Output(NamedTuple):
    """What a head makes probabilities of: sum_k prior_k softmax(matrix features_k + bias)."""

    features: Tensor  # [N, K, F]
    log_prior: Tensor | None  # [N, K]; None for the plain softmax, where K is 1
    matrix: Tensor  # [V, F]
    bias: Tensor | None  # [V]


def logits_of(output: Output, rows: Tensor) -> Tensor:
    """[rows, V]. Args: rows: [rows, F]."""
    logits = tf.matmul(rows, output.matrix, transpose_b=True)
    return logits if output.bias is None else tf.nn.bias_add(logits, output.bias)


def all_rows(features: Tensor) -> Tensor:
    """[N x K, F], the mixtures of a token one after the other."""
    return tf.reshape(features, (-1, features.shape[-1]))


def log_probabilities(output: Output) -> Tensor:
    """[N, V]."""
    tokens, mixtures, _ = output.features.shape
    log_p = tf.nn.log_softmax(logits_of(output, all_rows(output.features)))
    if output.log_prior is None:
        return log_p
    log_p = tf.reshape(log_p, (tokens, mixtures, -1))
    return tf.reduce_logsumexp(output.log_prior[..., None] + log_p, axis=1)


def token_nll(output: Output, targets: Tensor) -> Tensor:
    """Negative log-likelihood of every token, [N], for TensorFlow's own derivative [nats]."""
    tokens, mixtures, _ = output.features.shape
    logits = logits_of(output, all_rows(output.features))
    nll = tf.nn.sparse_softmax_cross_entropy_with_logits(tf.repeat(targets, mixtures), logits)
    if output.log_prior is None:
        return nll
    log_joint = output.log_prior - tf.reshape(nll, (tokens, mixtures))
    return -tf.reduce_logsumexp(log_joint, axis=1)


def summed_nll(output: Output, targets: Tensor, weights: Tensor) -> Tensor:
    """Negative log-likelihoods [nats] times weights [N], summed."""
    return tf.reduce_sum(token_nll(output, targets) * weights)


def chunks(tokens: int, logits_per_token: int) -> list[slice]:
    """Slices of the tokens, as even as can be, of `CHUNK_BYTES` or one token at most."""
    count = min(math.ceil(tokens * logits_per_token * 4 / CHUNK_BYTES), tokens)
    bounds = [tokens * index // count for index in range(count + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(bounds)]


def chunked_summed_nll(output: Output, targets: Tensor, weights: Tensor) -> Tensor:
    """The same without derivative, in bounded memory."""
    tokens, mixtures, _ = output.features.shape
    total = tf.constant(0.0)
    for chunk in chunks(tokens, mixtures * output.matrix.shape[0]):
        with tf.control_dependencies([total]):  # one chunk after the other
            part = output._replace(
                features=tf.identity(output.features[chunk]),
                log_prior=None if output.log_prior is None else output.log_prior[chunk],
            )
            total += summed_nll(part, targets[chunk], weights[chunk])
    return total


def chunked_nll(output: Output, targets: Tensor, weights: Tensor) -> Tensor:
    """`summed_nll` with derivatives formed on the way forward, in bounded memory.

    With the posterior of mixture k its share of the target's probability, the derivative with
    respect to logits_k is weight posterior_k (softmax_k - one_hot(target)), and to the prior's
    logits, which are log_prior but for a constant, -weight posterior (the softmax that made
    log_prior adds the rest). The factors weight posterior_k, one for each row of logits, go to the
    narrow side of every product, so that nothing passes over the logits a second time.
    """
    mixed, biased = output.log_prior is not None, output.bias is not None
    given = [t for t in output if t is not None]

    @tf.custom_gradient
    def loss(*given: Tensor) -> Any:
        tensors = iter(given)
        features, log_prior = next(tensors), next(tensors) if mixed else None
        matrix, bias = next(tensors), next(tensors) if biased else None
        whole = Output(features, log_prior, matrix, bias)
        tokens, mixtures, width = features.shape
        total, d_matrix, d_bias = tf.constant(0.0), None, None
        d_features, d_log_prior = [], []
        for chunk in chunks(tokens, mixtures * matrix.shape[0]):
            with tf.control_dependencies([] if d_matrix is None else [d_matrix, d_features[-1]]):
                rows = all_rows(tf.identity(features[chunk]))
            nll, d_logits = tf.raw_ops.SparseSoftmaxCrossEntropyWithLogits(
                features=logits_of(whole, rows), labels=tf.repeat(targets[chunk], mixtures)
            )
            share = weights[chunk][:, None]
            if log_prior is None:
                total += tf.tensordot(nll, weights[chunk], 1)
            else:
                log_joint = log_prior[chunk] - tf.reshape(nll, (-1, mixtures))
                log_p = tf.reduce_logsumexp(log_joint, axis=1, keepdims=True)
                total -= tf.reduce_sum(log_p * share)
                share *= tf.exp(log_joint - log_p)
                d_log_prior.append(-share)
            factor = tf.reshape(share, (-1, 1))
            d_rows = factor * tf.matmul(d_logits, matrix)
            d_features.append(tf.reshape(d_rows, (-1, mixtures, width)))
            more = tf.matmul(d_logits, factor * rows, transpose_a=True)
            d_matrix = more if d_matrix is None else d_matrix + more
            if biased:
                more = tf.matmul(factor, d_logits, transpose_a=True)[0]
                d_bias = more if d_bias is None else d_bias + more

        def derivative(d_loss: Tensor) -> list[Tensor]:
            d = [tf.concat(d_features, 0)]
            d += [tf.concat(d_log_prior, 0)] if mixed else []
            d += [d_matrix, d_bias] if biased else [d_matrix]
            return [d_loss * each for each in d]

        return total, derivative

    return loss(*given)
