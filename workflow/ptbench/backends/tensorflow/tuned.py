"""What is faster than the stock model; Keras' tuned layer and loss are made of it too."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from ptbench.backends.tensorflow import model
from ptbench.backends.tensorflow.model import Head, Kept, Layer, Tensor, Weights
from ptbench.model.recipe import Recipe

# Logits formed at a time by `nll`: as many as a window of Zaremba's medium model has, so that only
# mixtures and large batches are taken in chunks.
CHUNK_LOGITS = 7_000_000


def recurrent_layer(recipe: Recipe, inputs: int, width: int, kept: Kept) -> Layer:
    """Return the tuned layer for the fused LSTM, otherwise the stock one."""
    if recipe.rnn == "lstm" and recipe.kernel == "fused" and not recipe.recurrent_dropout:
        return HoistedLstm()
    return model.recurrent_layer(recipe, inputs, width, kept)


class HoistedLstm(Layer):
    """An LSTM with the function `lstm`."""

    def __call__(self, x: Tensor, state: list[Tensor], w: Weights) -> tuple[Tensor, list[Tensor]]:
        h, last_c = lstm(x, w.input, w.recurrent, w.both_biases, *state)
        return h, [h[-1], last_c]


@tf.custom_gradient
def lstm(x: Tensor, w: Tensor, u: Tensor, b: Tensor, h0: Tensor, c0: Tensor) -> Any:
    """Return an LSTM's outputs [time, batch, width] and its last c, with a derivative by hand.

    What needs no recurrence is kept out of the time steps: the inputs' product and, going back, the
    derivatives of the non-linearities and the products that give the weights' gradients, which
    TensorFlow's own derivative forms step by step. Nothing flows back into the states.

    Args:
        x: [time, batch, inputs].
        w, u, b: [inputs, 4 x width], [width, 4 x width], [4 x width].
        h0, c0: [batch, width].
    """
    steps, batch_size, inputs = x.shape
    width = u.shape[0]

    def flat(series: Tensor) -> Tensor:  # [time, batch, units] as [time x batch, units]
        return tf.reshape(series, (steps * batch_size, series.shape[-1]))

    z_inputs = tf.reshape(tf.nn.bias_add(flat(x) @ w, b), (steps, batch_size, 4 * width))
    h, c = h0, c0
    hs, saved = [], []
    for z_input in tf.unstack(z_inputs):
        i, f, g, o = tf.split(z_input + h @ u, 4, axis=1)
        i, f, g, o = tf.sigmoid(i), tf.sigmoid(f), tf.tanh(g), tf.sigmoid(o)
        c_before, c = c, f * c + i * g
        tanh_c = tf.tanh(c)
        h = o * tanh_c
        hs.append(h)
        saved.append((i, f, g, o, c_before, tanh_c))

    def derivative(d_outputs: Tensor, _: Tensor) -> tuple[Tensor, ...]:
        i, f, g, o, c_before, tanh_c = (tf.stack(each) for each in zip(*saved, strict=True))
        # d_c is d_h times the first; the gates' derivative is (d_c, d_c, d_c, d_h) times the second
        c_by_h = tf.unstack(o * (1 - tanh_c**2))
        z_factors = tf.unstack(
            tf.concat(
                [g * i * (1 - i), c_before * f * (1 - f), i * (1 - g**2), tanh_c * o * (1 - o)], -1
            )
        )
        # Products of a few rows with a matrix that is transposed on the fly are two to three times
        # slower, so it is transposed once. TensorFlow's graph optimiser would put that back into
        # the products, were it not a transposition of a three-dimensional array.
        by_gate = tf.transpose(tf.reshape(u, (width, 4, width)), (1, 2, 0))
        u_transposed = tf.reshape(by_gate, (4 * width, width))
        f_by_time, d_hs, d_zs = tf.unstack(f), tf.unstack(d_outputs), []
        d_h, d_c = d_hs[-1], tf.zeros((batch_size, width))
        for t in reversed(range(steps)):
            d_c += d_h * c_by_h[t]
            d_z = tf.concat([d_c, d_c, d_c, d_h], 1) * z_factors[t]
            d_c *= f_by_time[t]
            d_zs.append(d_z)
            if t:
                d_h = d_hs[t - 1] + d_z @ u_transposed
        d_z = flat(tf.stack(d_zs[::-1]))
        h_before = flat(tf.stack([h0, *hs[:-1]]))
        return (
            tf.reshape(tf.matmul(d_z, w, transpose_b=True), (steps, batch_size, inputs)),
            tf.matmul(flat(x), d_z, transpose_a=True),
            tf.matmul(h_before, d_z, transpose_a=True),
            tf.reduce_sum(d_z, axis=0),
            tf.zeros_like(h0),
            tf.zeros_like(c0),
        )

    return (tf.stack(hs), c), derivative


def cross_entropy_and_derivative(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return nlls [n] and their derivative softmax - one_hot, in the logits' memory.

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


def nll(head: Head, targets: Tensor, weights: Tensor, training: bool) -> Tensor:
    """Return what `model.nll` does, in bounded memory, with the derivative formed on the way.

    With the posterior of mixture k its share of the target's probability, the derivative with
    respect to logits_k is weight posterior_k (softmax_k - one_hot(target)), and with respect to the
    prior's logits, which are log_prior up to a constant, -weight posterior (the softmax that made
    log_prior adds the rest). The factors weight posterior_k, one for each row of logits, go to the
    narrow side of every product, so that nothing passes over the logits a second time.
    """
    tensors = {"features": head.features, "log_prior": head.log_prior}
    tensors |= {"matrix": head.matrix, "bias": head.bias}
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    tokens, mixtures, width = head.features.shape
    vocabulary_size = head.matrix.shape[1 if head.transposed else 0]
    size = max(CHUNK_LOGITS // (mixtures * vocabulary_size), 1)

    @tf.custom_gradient
    def loss(*tensors: Tensor) -> Any:
        whole = head._replace(**dict(zip(given, tensors, strict=True)))
        total = tf.constant(0.0)
        after: list[Tensor] = []
        parts: dict[str, list[Tensor]] = {name: [] for name in given}
        for start in range(0, tokens, size):
            chunk = slice(start, min(start + size, tokens))
            with tf.control_dependencies(after):  # one chunk after the other
                rows = tf.reshape(tf.identity(whole.features[chunk]), (-1, width))
            labels, share = tf.repeat(targets[chunk], mixtures), weights[chunk][:, None]
            nll, d_logits = cross_entropy_and_derivative(whole.logits(rows), labels)
            if whole.log_prior is None:
                total += tf.tensordot(nll, weights[chunk], 1)
            else:
                log_joint = whole.log_prior[chunk] - tf.reshape(nll, (-1, mixtures))
                log_p = tf.reduce_logsumexp(log_joint, axis=1, keepdims=True)
                total -= tf.reduce_sum(log_p * share)
                share *= tf.exp(log_joint - log_p)
                parts["log_prior"].append(-share)
            factor = tf.reshape(share, (-1, 1))
            d_rows = factor * tf.matmul(d_logits, whole.matrix, transpose_b=whole.transposed)
            parts["features"].append(tf.reshape(d_rows, (-1, mixtures, width)))
            both = (d_logits, factor * rows)
            d = {"matrix": tf.matmul(*(both[::-1] if whole.transposed else both), transpose_a=True)}
            if whole.bias is not None:
                d["bias"] = tf.matmul(factor, d_logits, transpose_a=True)[0]
            for name, part in d.items():
                parts[name] = [part + parts[name][0] if parts[name] else part]
            after = [total, parts["matrix"][0], d_rows] if training else [total]

        def derivative(d_loss: Tensor) -> list[Tensor]:
            return [d_loss * tf.concat(each, 0) for each in parts.values()]

        return total, derivative

    return loss(*given.values())
