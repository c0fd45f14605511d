"""The language model in MXNet 1.9's Gluon, from words to loss, and its update rules.

Blocks run on arrays and on symbols of a graph alike; `F` is `mx.nd` or `mx.sym`. Arrays are
[time, batch, ...]; T below is the number of tokens, time x batch.
"""

from __future__ import annotations

from typing import Any

import mxnet as mx
import numpy as np
import numpy.typing as npt
from mxnet import autograd, gluon
from mxnet.gluon import nn, rnn

from ptbench.model.recipe import Recipe

Array = Any  # NDArray; in blocks also Symbol, while a graph is made
Kept = npt.NDArray[np.bool_]
Shapes = dict[str, tuple[int, ...]]


class Dropout(gluon.HybridBlock):
    """Sets a share of what it is given to 0 and scales up the rest, while training.

    It drops units and latents where they are, and makes masks of ones for words, recurrent units
    and recurrent weights.
    """

    def __init__(self, rate: float, locked: bool = False) -> None:
        super().__init__()
        self.rate = rate
        self.axes = (0,) if locked else ()  # locked: the same for all indices of the first axis

    def hybrid_forward(self, F: Any, x: Array) -> Array:
        if not self.rate:
            return x
        # cuDNN's generator ignores the seed
        return F.Dropout(x, p=self.rate, axes=self.axes, cudnn_off=True)


class GRUCell(rnn.GRUCell):
    """Gluon's GRU cell, where the output that is carried is not the one that is multiplied."""

    def hybrid_forward(
        self, F: Any, x: Array, states: list[Array], **p: Array
    ) -> tuple[Array, list[Array]]:
        """Return the new output, twice; `states` is the dropped and the whole old one."""
        dropped, h = states
        size = 3 * self._hidden_size
        from_x = F.FullyConnected(x, p["i2h_weight"], p["i2h_bias"], num_hidden=size)
        from_h = F.FullyConnected(dropped, p["h2h_weight"], p["h2h_bias"], num_hidden=size)
        x_r, x_z, x_n = F.split(from_x, num_outputs=3)
        h_r, h_z, h_n = F.split(from_h, num_outputs=3)
        n = F.tanh(x_n + F.sigmoid(x_r + h_r) * h_n)
        h = n + F.sigmoid(x_z + h_z) * (h - n)
        return h, [h]


class StepwiseLayer(gluon.HybridBlock):
    """Gluon's cell in a loop over time steps, with recurrent dropout."""

    def __init__(self, kind: str, inputs: int, width: int, rate: float) -> None:
        super().__init__()
        self.rate, self.mask = rate, Dropout(rate)
        with self.name_scope():
            if kind == "lstm":
                self.cell = rnn.LSTMCell(width, input_size=inputs)
            elif kind == "gru":
                self.cell = (GRUCell if rate else rnn.GRUCell)(width, input_size=inputs)
            else:
                activation = kind.removeprefix("rnn_")
                self.cell = rnn.RNNCell(width, activation=activation, input_size=inputs)
        self.carries_whole = kind == "gru"

    def state_info(self, batch_size: int) -> list[dict[str, Any]]:
        return self.cell.state_info(batch_size)

    def hybrid_forward(self, F: Any, x: Array, states: list[Array]) -> tuple[Array, list[Array]]:
        if not self.rate:
            return F.contrib.foreach(self.cell, x, states)
        mask = self.mask(F.ones_like(states[0]))

        def step(x: Array, states: list[Array]) -> tuple[Array, list[Array]]:
            others = states if self.carries_whole else states[1:]
            return self.cell(x, [states[0] * mask, *others])

        return F.contrib.foreach(step, x, states)


class SparseLayer(gluon.HybridBlock):
    """An LSTM that stores the kept weights of a matrix alone, as the vector of a CSR matrix.

    It cannot be hybridized: an `autograd.Function` runs as it is called, outside any graph.
    """

    def __init__(self, kept_input: Kept, kept_recurrent: Kept, rate: float) -> None:
        super().__init__()
        self.kept = (kept_input, kept_recurrent)
        self.width = kept_recurrent.shape[0]
        self.mask = Dropout(rate)
        self.positions: dict[mx.Context, list[CsrPositions]] = {}
        with self.name_scope():
            self.i2h_weight = self.params.get("i2h_weight", shape=(int(kept_input.sum()),))
            self.h2h_weight = self.params.get("h2h_weight", shape=(int(kept_recurrent.sum()),))
            self.i2h_bias = self.params.get("i2h_bias", shape=(4 * self.width,))
            self.h2h_bias = self.params.get("h2h_bias", shape=(4 * self.width,))

    def state_info(self, batch_size: int) -> list[dict[str, Any]]:
        return [{"shape": (batch_size, self.width)}] * 2

    def forward(self, x: Array, states: list[Array]) -> tuple[Array, list[Array]]:
        context = x.context
        if context not in self.positions:
            self.positions[context] = [CsrPositions(kept, context) for kept in self.kept]
        of_input, of_recurrent = self.positions[context]
        w, u = self.i2h_weight.data(context), self.h2h_weight.data(context)
        w_matrix, u_matrix = of_input.matrix(w), of_recurrent.matrix(u)
        bias = (self.i2h_bias.data(context) + self.h2h_bias.data(context)).expand_dims(1)
        h, c = (state.T for state in states)  # [width, batch]
        mask, outputs = self.mask(mx.nd.ones_like(h)), []
        for step in x:
            z_input = SparseProduct(w_matrix, of_input)(w, step.T)
            z = z_input + SparseProduct(u_matrix, of_recurrent)(u, h * mask) + bias
            i, f, g, o = mx.nd.split(z, 4, axis=0)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            outputs.append(h.T)
        return mx.nd.stack(*outputs), [h.T, c.T]


class CsrPositions:
    """Where the values of a sparse matrix [gates x width, inputs] are, row after row."""

    def __init__(self, kept: Kept, context: mx.Context) -> None:
        def index(array: npt.NDArray[Any]) -> Array:
            return mx.nd.array(array, ctx=context, dtype="int64")

        rows, columns = np.nonzero(kept.T)
        self.shape = kept.T.shape
        self.rows, self.columns = index(rows), index(columns)
        self.starts = index(np.concatenate([[0], np.cumsum(kept.sum(axis=0))]))

    def matrix(self, values: Array) -> Array:
        definition = (values.detach(), self.columns, self.starts)
        return mx.nd.sparse.csr_matrix(definition, shape=self.shape, ctx=values.context)


class SparseProduct(autograd.Function):
    """A sparse matrix times x [columns, batch]; nd.sparse.dot has no gradient for the matrix."""

    def __init__(self, matrix: Array, positions: CsrPositions) -> None:
        super().__init__()
        self.matrix, self.positions = matrix, positions

    def forward(self, values: Array, x: Array) -> Array:  # noqa: ARG002 - those of the matrix
        self.x = x
        return mx.nd.sparse.dot(self.matrix, x)

    def backward(self, d_out: Array) -> tuple[Array, Array]:
        """Return the gradients of the matrix' values and of x."""
        rows, columns = self.positions.rows, self.positions.columns
        products = mx.nd.take(d_out, rows) * mx.nd.take(self.x, columns)
        d_values = mx.nd.dot(products, mx.nd.ones((d_out.shape[1],), ctx=d_out.context))
        d_x = mx.nd.sparse.dot(self.matrix, d_out, transpose_a=True, forward_stype="default")
        return d_values, d_x


def recurrent_layer(
    recipe: Recipe, inputs: int, width: int, kept: dict[str, Kept]
) -> gluon.HybridBlock:
    """Return the layer that the recipe asks for, with Gluon's names of parameters.

    It takes x [time, batch, inputs] and its states, and returns its output and its new states.
    Gluon's fused layers have no recurrent dropout, so explicit time steps take their place. Each
    has one layer: the dropout of a stack leaves out its last layer's output.

    Args:
        kept: which weights a sparse layer has, of `input` and `recurrent`.
    """
    if recipe.kernel == "sparse":
        return SparseLayer(kept["input"], kept["recurrent"], recipe.recurrent_dropout)
    if recipe.kernel == "stepwise" or recipe.recurrent_dropout:
        return StepwiseLayer(recipe.rnn, inputs, width, recipe.recurrent_dropout)
    if recipe.rnn == "lstm":
        return rnn.LSTM(width, input_size=inputs)
    if recipe.rnn == "gru":
        return rnn.GRU(width, input_size=inputs)
    return rnn.RNN(width, activation=recipe.rnn.removeprefix("rnn_"), input_size=inputs)


class Head(gluon.HybridBlock):
    """From the last layer's output v [time, batch, width] to what the output layer takes.

    Features are v itself, or with mixtures the latents of each token in turn, behind the projection
    if there is one. The output layer is not in this graph: the tuned loss calls it by chunks.
    """

    def __init__(self, recipe: Recipe, shapes: Shapes) -> None:
        super().__init__()
        self.drop_latents = Dropout(recipe.latent_dropout, recipe.dropout_kind == "locked")
        self.latent: Any = None
        self.prior: Any = None
        self.projection: Any = None
        with self.name_scope():
            if recipe.mixtures:
                width, latents = shapes["latent.weight"]
                self.latent_size = latents // recipe.mixtures
                self.latent = dense(latents, width, activation="tanh")
                self.prior = dense(recipe.mixtures, width, use_bias=False)
            if "softmax.projection" in shapes:
                features, rank = shapes["softmax.projection"]
                self.projection = dense(rank, features, use_bias=False)

    def hybrid_forward(self, F: Any, v: Array) -> list[Array]:
        """Return features [T or T x mixtures, features], and if mixed log-prior [T, mixtures]."""
        features, log_prior = v.reshape((-3, 0)), []
        if self.latent is not None:
            features = self.drop_latents(self.latent(v)).reshape((-1, self.latent_size))
            prior = self.prior(v).reshape((-3, 0))
            log_prior = [F.broadcast_sub(prior, log_sum_exp(F, prior).expand_dims(1))]
        if self.projection is not None:
            features = self.projection(features)
        return [features, *log_prior]


def dense(outputs: int, inputs: int, **keywords: Any) -> nn.Dense:
    """Return a layer that takes [..., inputs]."""
    return nn.Dense(outputs, in_units=inputs, flatten=False, **keywords)


def output_layer(recipe: Recipe, shapes: Shapes, embedding: nn.Embedding) -> nn.Dense:
    """Return the layer from features to logits; its matrix is the embedding if they are tied."""
    vocabulary_size, features = shapes.get("softmax.weight", shapes["embedding"])
    tied = embedding.params if recipe.tie_weights else None
    return dense(vocabulary_size, features, use_bias=recipe.softmax_bias, params=tied)


def nll(
    output: nn.Dense,
    targets: Array,
    mask: Array,
    divisor: float | None,
    features: Array,
    log_prior: Array = None,
) -> tuple[Array, list[Array], list[Array]]:
    """Return the summed negative log-likelihood of the real tokens and its gradients.

    Gluon's SoftmaxCrossEntropyLoss calls nd.log_softmax, and its value and gradient have the errors
    of that (see `accurate_log`). So the gradient is written out here: for the logits of a row it is
    the row's share in the token's probability times softmax - one_hot(target).

    Args:
        output: the output layer.
        targets: [T].
        mask: [T].
        divisor: what the nll is divided by to give the objective; None: no gradient is wanted.
        features: as `Head` returns them, like log_prior.

    Returns:
        The nll [1] in nats; the arrays from which autograd goes on backwards, logits and log_prior;
        the gradient of the objective for each of them.
    """
    with autograd.record():
        logits = output(features)
    mixtures = 1 if log_prior is None else log_prior.shape[1]
    targets = targets.repeat(mixtures)
    p = logits.detach()
    far = mx.nd.pick(mx.nd.log_softmax(p), targets)
    mx.nd.softmax(p, out=p)  # in the memory of the logits, as is their gradient below
    p_target = mx.nd.pick(p, targets)
    log_p = accurate_log(p_target, far)
    if log_prior is not None:
        log_joint = log_prior.detach() + log_p.reshape((-1, mixtures))
        log_p = log_sum_exp(mx.nd, log_joint)
    summed = -(log_p * mask).sum()
    if divisor is None:
        return summed, [], []
    share = mask / divisor
    if log_prior is not None:
        share = share.expand_dims(1) * mx.nd.exp(log_joint - log_p.expand_dims(1))
    d_logits = mx.nd.broadcast_mul(p, share.reshape((-1, 1)), out=p)
    rows = mx.nd.arange(len(targets), dtype="int32", ctx=targets.context)
    d_logits[rows, targets] = (p_target - 1) * share.reshape(-1)
    if log_prior is None:
        return summed, [logits], [d_logits]
    return summed, [logits, log_prior], [d_logits, -share]


def accurate_log(p: Array, log_p: Array) -> Array:
    """Return the logarithm of what nd.softmax gives; `log_p` is what nd.log_softmax gives.

    oneDNN 2.4's log_softmax is wrong by up to 4.5e-6, and equally for all words of a row. Its
    softmax is right, but can underflow; log_p is taken there, where one unit in the last place of
    the logarithm is as large as that error.
    """
    smallest = 1e-30  # float32 has no normal number below 1e-38
    return mx.nd.where(p > smallest, mx.nd.log(mx.nd.maximum(p, smallest)), log_p)


def log_probabilities(logits: Array, log_prior: Array = None) -> Array:
    """Return log-probabilities of every word [T, vocabulary]."""
    log_p = accurate_log(mx.nd.softmax(logits), mx.nd.log_softmax(logits))
    if log_prior is None:
        return log_p
    log_p = log_p.reshape((*log_prior.shape, -1))
    return log_sum_exp(mx.nd, mx.nd.broadcast_add(log_prior.expand_dims(-1), log_p))


def log_sum_exp(F: Any, x: Array) -> Array:
    """Return log sum exp over the second axis."""
    largest = F.BlockGrad(F.max(x, axis=1))
    return largest + F.log(F.sum(F.exp(F.broadcast_sub(x, largest.expand_dims(1))), axis=1))


class Penalty(gluon.HybridBlock):
    """What activation regularisation adds to the summed nll."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.of_outputs = recipe.activation_regularization
        self.of_changes = recipe.temporal_activation_regularization

    def hybrid_forward(self, F: Any, h: Array, v: Array, mask: Array) -> Array:
        """Return the penalty [1] of the real tokens.

        Args:
            h: [time, batch, width], the last layer's output.
            v: the same, dropped.
            mask: [time, batch].
        """
        change = F.square(h - previous(F, h)).mean(axis=-1)
        both_real = F.minimum(mask, previous(F, mask))
        of_changes = self.of_changes * (change * both_real).sum()
        return self.of_outputs * (F.square(v).mean(axis=-1) * mask).sum() + of_changes


def previous(F: Any, x: Array) -> Array:
    """Return x one time step before; at the first step x itself."""
    first = F.slice_axis(x, axis=0, begin=0, end=1)
    return F.slice_axis(F.concat(first, x, dim=0), axis=0, begin=0, end=-1)


class LanguageModel(gluon.HybridBlock):
    """Embedding, recurrent layers and head, with dropout between them; `nll` comes after it."""

    def __init__(self, recipe: Recipe, shapes: Shapes, kept: dict[str, Kept]) -> None:
        super().__init__()
        self.penalizes = recipe.penalizes
        locked = recipe.dropout_kind == "locked"
        vocabulary_size, inputs = shapes["embedding"]
        with self.name_scope():
            self.embedding = nn.Embedding(vocabulary_size, inputs)
            self.layers = nn.HybridSequential()
            self.drops = nn.HybridSequential()
            self.drops.add(*[Dropout(rate, locked) for rate in recipe.unit_dropout])
            for index, width in enumerate(recipe.widths):
                prefix = f"rnn.{index}."
                of_layer = {n.removeprefix(prefix): k for n, k in kept.items() if prefix in n}
                self.layers.add(recurrent_layer(recipe, inputs, width, of_layer))
                inputs = width
            self.head = Head(recipe, shapes)

    def hybrid_forward(
        self, F: Any, inputs: Array, states: list[Array], words: Array = None
    ) -> tuple[list[Array], list[Array], list[Array]]:
        """Return what the head returns, the final states, and what `Penalty` takes, if anything.

        Args:
            inputs: [time, batch].
            states: those of all layers, one after another.
            words: [vocabulary, 1], what dropout multiplies the embedding's rows by.
        """
        x = self.embedding(inputs)
        if words is not None:
            x = F.broadcast_mul(x, F.take(words, inputs))
        x = self.drops[0](x)
        final = []
        each = len(states) // len(self.layers)
        for index, layer in enumerate(self.layers):
            h, new = layer(x, states[index * each : (index + 1) * each])
            x = self.drops[index + 1](h)
            final += new
        return self.head(x), final, [h, x] if self.penalizes else []


class SlotOptimizer(mx.optimizer.Optimizer):
    """An optimizer whose slots the backend makes, saves and restores.

    Attributes:
        slots: the arrays of the index-th parameter on a context.
        epsilon: set before each step, as the learning rate is.
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(wd=recipe.weight_decay)
        self.recipe = recipe
        self.slots: dict[tuple[int, mx.Context], list[Array]] = {}
        self.epsilon = recipe.optimizer_epsilon

    def create_state(self, index: int, weight: Array) -> list[Array]:
        return self.slots[index, weight.context]


class Adam(SlotOptimizer):
    """MXNet's kernel, with the rate and epsilon that `rate_and_epsilon` gives.

    mx.optimizer.Adam adds epsilon to the uncorrected moment's root, and the count of steps by which
    it corrects can be restored by unpickling alone.
    """

    def update(self, index: int, weight: Any, grad: Any, state: list[Any]) -> None:  # noqa: ARG002
        mx.nd.adam_update(
            weight,
            grad,
            *state,
            out=weight,
            lr=self.learning_rate,
            beta1=self.recipe.adam_beta1,
            beta2=self.recipe.adam_beta2,
            epsilon=self.epsilon,
            wd=self.wd,
        )


class RMSProp(SlotOptimizer):
    """RMSProp with epsilon added to the root; mx.optimizer.RMSProp adds it under the root."""

    def update(self, index: int, weight: Any, grad: Any, state: list[Any]) -> None:  # noqa: ARG002
        (s,) = state
        g = grad + self.wd * weight
        s[:] = self.recipe.rmsprop_decay * s + (1 - self.recipe.rmsprop_decay) * g**2
        weight -= self.learning_rate * g / (s.sqrt() + self.epsilon)


class AveragedSGD(SlotOptimizer):
    """MXNet's kernel of SGD, and after it the mean of the last `averaged` steps' parameters."""

    averaged = 1  # set before each step

    def update(self, index: int, weight: Any, grad: Any, state: list[Any]) -> None:  # noqa: ARG002
        mx.nd.sgd_update(weight, grad, out=weight, lr=self.learning_rate, wd=self.wd)
        (average,) = state
        if self.averaged == 1:
            weight.copyto(average)
        else:
            average *= 1 - 1 / self.averaged
            average += weight / self.averaged


def optimizer(recipe: Recipe) -> mx.optimizer.Optimizer:
    """Return the recipe's optimizer."""
    if recipe.optimizer == "sgd":
        return mx.optimizer.SGD(wd=recipe.weight_decay)
    kinds = {"adam": Adam, "rmsprop": RMSProp, "asgd": AveragedSGD}
    return kinds[recipe.optimizer](recipe)
