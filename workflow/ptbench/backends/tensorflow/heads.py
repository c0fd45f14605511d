"""Plain and mixed softmax: losses and log-probabilities from features and output matrix.

A plain softmax is a mixture of one, whose prior is certain. N is the number of tokens, K of
mixtures, F of features, V of words.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

Tensor = Any  # tf.Tensor

# Logits formed at a time by the chunked losses: as many as a window of Zaremba's medium model has,
# so that only mixtures and large batches are taken in chunks.
CHUNK_LOGITS = 7_000_000


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


def token_nll(
    output: Output, targets: Tensor, cross_entropy: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Negative log-likelihood of every token, [N] [nats].

    Args:
        cross_entropy: of logits [n, V] and labels [n].
    """
    tokens, mixtures, _ = output.features.shape
    logits = logits_of(output, all_rows(output.features))
    nll = cross_entropy(logits, tf.repeat(targets, mixtures))
    if output.log_prior is None:
        return nll
    log_joint = output.log_prior - tf.reshape(nll, (tokens, mixtures))
    return -tf.reduce_logsumexp(log_joint, axis=1)


def summed_nll(output: Output, targets: Tensor, weights: Tensor) -> Tensor:
    """Negative log-likelihoods times weights [N], summed, to be differentiated [nats]."""

    def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
        return tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)

    return tf.reduce_sum(token_nll(output, targets, cross_entropy) * weights)


def chunks(tokens: int, logits_per_token: int) -> list[slice]:
    """Slices of the tokens with `CHUNK_LOGITS` each, or one token's if those are more."""
    size = max(CHUNK_LOGITS // logits_per_token, 1)
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def cross_entropy_and_derivative(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihoods [n] and their derivative softmax - one_hot, in the logits' memory.

    TensorFlow's own kernel takes three times as long on a CPU, and GPUs have no deterministic one.
    The largest probability is never rounded to 0, so log sum exp(logits) comes from it.
    """
    at_label = tf.gather(logits, labels, batch_dims=1)
    largest = tf.reduce_max(logits, axis=1)
    with tf.control_dependencies([at_label, largest]):  # the last use of the logits is the softmax
        p = tf.nn.softmax(logits)
    nll = (largest - at_label) - tf.math.log(tf.reduce_max(p, axis=1))
    where = tf.stack([tf.range(tf.shape(labels)[0]), labels], axis=1)
    with tf.control_dependencies([nll]):
        return nll, tf.tensor_scatter_nd_sub(p, where, tf.ones_like(at_label))


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
            nll = token_nll(
                part, targets[chunk], lambda *row: cross_entropy_and_derivative(*row)[0]
            )
            total += tf.reduce_sum(nll * weights[chunk])
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
            labels = tf.repeat(targets[chunk], mixtures)
            nll, d_logits = cross_entropy_and_derivative(logits_of(whole, rows), labels)
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
