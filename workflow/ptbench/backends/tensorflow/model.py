"""The language model in TensorFlow as its documentation would have it written.

What it computes is in `Backend`'s docstring. N is the number of tokens, K of mixtures, F of
features, V of words.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from ptbench.model.parameters import state_widths
from ptbench.model.recipe import Recipe

Tensor = Any  # tf.Tensor
Tensors = dict[str, Any]  # by canonical name
Kept = dict[str, npt.NDArray[np.bool_]]  # of a sparse model's `input` and `recurrent`

RANDOM_GENERATOR = "philox"  # named, because the default depends on the kind of device


def lowered(recipe: Recipe, tensors: Any) -> Any:
    """Return nested tensors, or None, in the precision that products and layers compute in."""

    def cast(tensor: Tensor) -> Tensor:
        return None if tensor is None else tf.cast(tensor, recipe.precision)

    return tf.nest.map_structure(cast, tensors)


def raised(tensors: Any) -> Any:
    """Return what was computed from them as float32."""
    return tf.nest.map_structure(lambda tensor: tf.cast(tensor, tf.float32), tensors)


def product(x: Tensor, w: Tensor, transpose_b: bool = False) -> Tensor:
    """Return x [rows, inputs], float32, times w [inputs, outputs], in the precision of w."""
    return raised(tf.matmul(tf.cast(x, w.dtype), w, transpose_b=transpose_b))


class Dropout:
    """What one replica drops in one training step: a function of (seed, step, replica)."""

    # Numbers of what all replicas drop alike, where the others have a replica's number.
    WORDS = 2**31 - 1
    WEIGHTS = WORDS - 1  # of the first layer; the next one's is one less

    def __init__(
        self, recipe: Recipe, seed: int = 0, step: Tensor | None = None, replica: Any = 0
    ) -> None:
        """Args: step: int64; None: nothing is dropped, as in evaluation."""
        self.recipe, self.trains = recipe, step is not None
        self.locked = recipe.dropout_kind == "locked"
        self.seed = tf.stack([tf.constant(seed, tf.int64), step if self.trains else 0])
        self.replica_seed = folded(self.seed, replica)

    def words(self, x: Tensor, inputs: Tensor, vocabulary_size: int) -> Tensor:
        """Drop all rows [time, batch, embedding] of some words."""
        ones = tf.ones((vocabulary_size, 1))
        rows = self._drop(ones, self.recipe.word_dropout, folded(self.seed, self.WORDS))
        return x if rows is ones else x * tf.gather(rows, inputs)

    def units(self, x: Tensor, place: int) -> Tensor:
        """Drop units [time, batch, width] of the embedding's output (0) or a layer's (1, ...)."""
        return self._drop_in_window(x, self.recipe.unit_dropout[place], place)

    def latents(self, x: Tensor) -> Tensor:
        """Drop units of latents [time, batch, mixtures, width]."""
        return self._drop_in_window(x, self.recipe.latent_dropout, 2 * self.recipe.layers + 1)

    def recurrent(self, batch_size: int, width: int, layer: int) -> Tensor | None:
        """Return what multiplies a layer's previous output [batch, width]; None for nothing."""
        ones = tf.ones((batch_size, width))
        seed = folded(self.replica_seed, self.recipe.layers + 1 + layer)
        mask = self._drop(ones, self.recipe.recurrent_dropout, seed)
        return None if mask is ones else mask

    def weights(self, u: Tensor, layer: int) -> Tensor:
        """Drop some of a layer's recurrent weights."""
        return self._drop(u, self.recipe.weight_dropout, folded(self.seed, self.WEIGHTS - layer))

    def _drop_in_window(self, x: Tensor, rate: float, place: int) -> Tensor:
        noise_shape = (1, *x.shape[1:]) if self.locked else None
        return self._drop(x, rate, folded(self.replica_seed, place), noise_shape)

    def _drop(self, x: Tensor, rate: float, seed: Tensor, noise_shape: Any = None) -> Tensor:
        """Return x itself if nothing is to be dropped."""
        if not self.trains or not rate:
            return x
        return tf.nn.experimental.stateless_dropout(
            x, rate, seed=seed, rng_alg=RANDOM_GENERATOR, noise_shape=noise_shape
        )


def folded(seed: Tensor, number: Any) -> Tensor:
    """Return a seed that is a function of another and a number."""
    return tf.random.fold_in(seed, number, alg=RANDOM_GENERATOR)


class Weights(NamedTuple):
    """What a layer computes with in one window."""

    input: Tensor  # [inputs, gates x width], or [kept] of the sparse kernel
    recurrent: Tensor  # [width, gates x width], some of them dropped, or [kept]
    bias: Tensor  # [gates x width]
    recurrent_bias: Tensor | None  # [gates x width]
    mask: Tensor | None  # of the previous output in the recurrent product, [batch, width]

    @property
    def both_biases(self) -> Tensor:
        """The biases together, for layers that add them."""
        return self.bias if self.recurrent_bias is None else self.bias + self.recurrent_bias


class Layer(tf.Module):
    """A recurrent layer.

    It is called with its input [time, batch, inputs], the state it starts from (h, and in an LSTM
    c, each [batch, width]) and its weights. It returns its output [time, batch, width] and the
    state after it. `own_variables` are parameters that it holds itself, by the ends of their names.
    """

    def __init__(self) -> None:
        super().__init__()
        self.own_variables: Tensors = {}


class KerasLayer(Layer):
    """`tf.keras.layers.LSTM`, `GRU` or `SimpleRNN`, which use cuDNN on GPUs."""

    def __init__(self, recipe: Recipe, inputs: int, width: int) -> None:
        super().__init__()
        layers = tf.keras.layers
        settings: dict[str, Any] = {"return_sequences": True, "return_state": True}
        settings["recurrent_initializer"] = "zeros"  # by default orthogonal, which takes seconds
        if recipe.precision == "bfloat16":
            settings["dtype"] = "mixed_bfloat16"
        if recipe.rnn == "rnn_relu":
            settings["activation"] = "relu"
        kinds = {"lstm": layers.LSTM, "gru": layers.GRU}
        self.layer = kinds.get(recipe.rnn, layers.SimpleRNN)(width, **settings)
        self.layer.build((None, None, inputs))
        cell = self.layer.cell
        self.own_variables = {"input": cell.kernel.value, "recurrent": cell.recurrent_kernel.value}
        self.has_two_biases = recipe.rnn == "gru"

    def __call__(self, x: Tensor, state: list[Tensor], w: Weights) -> tuple[Tensor, list[Tensor]]:
        bias = w.both_biases
        if self.has_two_biases:
            zero = tf.zeros_like(w.bias)
            bias = tf.stack([w.bias, zero if w.recurrent_bias is None else w.recurrent_bias])
        cell = self.layer.cell
        weights = [(cell.kernel, w.input), (cell.recurrent_kernel, w.recurrent), (cell.bias, bias)]
        with tf.keras.StatelessScope(weights):
            y, *state = self.layer(tf.transpose(x, (1, 0, 2)), initial_state=state)
        return tf.transpose(y, (1, 0, 2)), state


class BlockLayer(Layer):
    """The fused LSTM loop that is behind TensorFlow 1's LSTMBlockFusedCell."""

    def __call__(self, x: Tensor, state: list[Tensor], w: Weights) -> tuple[Tensor, list[Tensor]]:
        h0, c0 = state
        no_peephole = tf.zeros(h0.shape[-1])
        same = {
            "seq_len_max": tf.constant(x.shape[0], tf.int64),
            "wci": no_peephole,
            "wcf": no_peephole,
            "wco": no_peephole,
            "use_peephole": False,
            "h_prev": h0,
            "cs_prev": c0,
        }

        @tf.custom_gradient
        def block(x: Tensor, w: Tensor, b: Tensor) -> Any:
            # Its gates are in our order; and it adds no forget bias, as BlockLSTM does.
            r = tf.raw_ops.BlockLSTMV2(x=x, w=w, b=b, cell_clip=0, **same)  # 0: no clipping

            def derivative(d_h: Tensor, d_c: Tensor) -> tuple[Tensor, ...]:
                # The gradient that TensorFlow 2.21 has registered for BlockLSTMV2 is that of
                # BlockLSTM, whose gates are in another order.
                d = tf.raw_ops.BlockLSTMGradV2(
                    x=x, w=w, b=b, cs_grad=d_c, h_grad=d_h, i=r.i, cs=r.cs, f=r.f, o=r.o, ci=r.ci,
                    co=r.co, h=r.h, **same,
                )  # fmt: skip
                return d.x_grad, d.w_grad, d.b_grad

            return (r.h, r.cs), derivative

        h, c = block(x, tf.concat([w.input, w.recurrent], axis=0), w.both_biases)
        return h, [h[-1], c[-1]]


def lstm_step(z_input: Tensor, z_recurrent: Tensor, state: list[Tensor]) -> list[Tensor]:
    """Return h and c after one time step, given the two parts of the gates [batch, 4 x width]."""
    i, f, g, o = tf.split(z_input + z_recurrent, 4, axis=1)
    c = tf.sigmoid(f) * state[1] + tf.sigmoid(i) * tf.tanh(g)
    return [tf.sigmoid(o) * tf.tanh(c), c]


def gru_step(z_input: Tensor, z_recurrent: Tensor, state: list[Tensor]) -> list[Tensor]:
    """Return h after one time step; the gates are in Keras' order: update, reset, candidate."""
    x_z, x_r, x_n = tf.split(z_input, 3, axis=1)
    u_z, u_r, u_n = tf.split(z_recurrent, 3, axis=1)
    z = tf.sigmoid(x_z + u_z)
    n = tf.tanh(x_n + tf.sigmoid(x_r + u_r) * u_n)
    return [(1 - z) * n + z * state[0]]


def tanh_step(z_input: Tensor, z_recurrent: Tensor, _: list[Tensor]) -> list[Tensor]:
    """Return h of a simple recurrent layer (Elman 1990) after one time step."""
    return [tf.tanh(z_input + z_recurrent)]


def relu_step(z_input: Tensor, z_recurrent: Tensor, _: list[Tensor]) -> list[Tensor]:
    """Return the same with rectified units."""
    return [tf.nn.relu(z_input + z_recurrent)]


STEPS = {"lstm": lstm_step, "gru": gru_step, "rnn_tanh": tanh_step, "rnn_relu": relu_step}


class StepwiseLayer(Layer):
    """The equations, time step by time step."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.step = STEPS[recipe.rnn]

    def product(self, kind: str, x: Tensor, w: Tensor) -> Tensor:  # noqa: ARG002
        """Return x [batch, rows] times the `input` or `recurrent` matrix."""
        return x @ w

    def __call__(self, x: Tensor, state: list[Tensor], w: Weights) -> tuple[Tensor, list[Tensor]]:
        # Biases by `bias_add`, whose gradient has memory of its own. That of a broadcast `+` is,
        # with a batch of one, the gates' gradient itself, and AddN then adds the time steps up in
        # an order that depends on which threads are done with it: two runs differ by rounding.
        outputs = []
        for x_t in tf.unstack(x):
            h = state[0] if w.mask is None else state[0] * w.mask
            z_input = tf.nn.bias_add(self.product("input", x_t, w.input), w.bias)
            z_recurrent = self.product("recurrent", h, w.recurrent)
            if w.recurrent_bias is not None:
                z_recurrent = tf.nn.bias_add(z_recurrent, w.recurrent_bias)
            state = self.step(z_input, z_recurrent, state)
            outputs.append(state[0])
        return tf.stack(outputs), state


class SparseLayer(StepwiseLayer):
    """The same with matrices of which only the kept weights are stored, row after row."""

    def __init__(self, recipe: Recipe, kept: Kept) -> None:
        super().__init__(recipe)
        self.shapes = {kind: mask.shape for kind, mask in kept.items()}
        self.indices = {kind: tf.constant(np.argwhere(mask)) for kind, mask in kept.items()}

    def product(self, kind: str, x: Tensor, w: Tensor) -> Tensor:
        matrix = tf.SparseTensor(self.indices[kind], w, self.shapes[kind])
        product = tf.sparse.sparse_dense_matmul(matrix, x, adjoint_a=True, adjoint_b=True)
        return tf.transpose(product)


def recurrent_layer(recipe: Recipe, inputs: int, width: int, kept: Kept) -> Layer:
    """Return the layer that the recipe's kernel says.

    Neither Keras' layers nor BlockLSTM can drop previous outputs by a mask that is the same for
    all gates and time steps, so with `recurrent_dropout` explicit time steps take their place.
    """
    if recipe.kernel == "sparse":
        return SparseLayer(recipe, kept)
    if recipe.kernel == "stepwise" or recipe.recurrent_dropout:
        return StepwiseLayer(recipe)
    return BlockLayer() if recipe.kernel == "block" else KerasLayer(recipe, inputs, width)


class Head(NamedTuple):
    """What gives the next words: sum_k prior_k softmax(matrix features_k + bias).

    The plain softmax is a mixture of one, whose prior is certain.
    """

    features: Tensor  # [N, K, F], behind the projection
    log_prior: Tensor | None  # [N, K]; None for the plain softmax, where K is 1
    matrix: Tensor  # [V, F]
    bias: Tensor | None  # [V]
    transposed: bool = False  # whether the matrix is [F, V], as Keras' Dense layers have it

    @classmethod
    def of(cls, v: Tensor, p: Tensors, dropout: Dropout) -> Head:
        """Args: v: the last layer's output, [time, batch, width]; p: all parameters, lowered."""
        rows, log_prior, mixtures = tf.reshape(v, (-1, v.shape[-1])), None, 1
        if "prior.weight" in p:
            log_prior = tf.nn.log_softmax(product(rows, p["prior.weight"]))
            mixtures = log_prior.shape[-1]
            latents = product(rows, p["latent.weight"])
            latents = tf.tanh(tf.nn.bias_add(latents, raised(p["latent.bias"])))
            latents = dropout.latents(tf.reshape(latents, (*v.shape[:2], mixtures, -1)))
            rows = tf.reshape(latents, (-1, latents.shape[-1]))
        if "softmax.projection" in p:
            rows = product(rows, p["softmax.projection"])
        features = tf.reshape(rows, (-1, mixtures, rows.shape[-1]))
        matrix = p.get("softmax.weight", p["embedding"])
        return cls(features, log_prior, matrix, p.get("softmax.bias"))

    @property
    def rows(self) -> Tensor:
        """The features [N x K, F], a token's mixtures one after the other."""
        return tf.reshape(self.features, (-1, self.features.shape[-1]))

    def logits(self, rows: Tensor) -> Tensor:
        """Return logits [rows, V] of features [rows, F]."""
        logits = product(rows, self.matrix, transpose_b=not self.transposed)
        return logits if self.bias is None else tf.nn.bias_add(logits, raised(self.bias))


def nll(head: Head, targets: Tensor, weights: Tensor, training: bool) -> Tensor:  # noqa: ARG001
    """Return negative log-likelihoods times weights, summed [nats].

    Args:
        targets, weights: [N].
        training: whether it is to be differentiated.
    """
    tokens, mixtures, _ = head.features.shape
    labels = tf.repeat(targets, mixtures)
    nll = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, head.logits(head.rows))
    if head.log_prior is not None:
        log_joint = head.log_prior - tf.reshape(nll, (tokens, mixtures))
        nll = -tf.reduce_logsumexp(log_joint, axis=1)
    return tf.reduce_sum(nll * weights)


def log_probabilities(head: Head) -> Tensor:
    """Return log-probabilities [N, V] of each next word."""
    tokens, mixtures, _ = head.features.shape
    log_p = tf.nn.log_softmax(head.logits(head.rows))
    if head.log_prior is None:
        return log_p
    log_p = tf.reshape(log_p, (tokens, mixtures, -1))
    return tf.reduce_logsumexp(head.log_prior[..., None] + log_p, axis=1)


def penalty(recipe: Recipe, top: Tensor, dropped_top: Tensor, mask: Tensor) -> Tensor:
    """Return both activation regularisations, summed over the real tokens.

    Args:
        top, dropped_top: the last layer's output before and after dropout, [time, batch, width].
        mask: [time, batch].
    """

    def summed(units: Tensor, weights: Tensor) -> Tensor:
        return tf.reduce_sum(tf.reduce_mean(tf.square(units), axis=-1) * weights)

    size = recipe.activation_regularization * summed(dropped_top, mask)
    both_real = tf.minimum(mask[1:], mask[:-1])
    change = summed(top[1:] - top[:-1], both_real)
    return size + recipe.temporal_activation_regularization * change


class LanguageModel(tf.Module):
    """The whole model; its parameters start at zero."""

    def __init__(
        self,
        recipe: Recipe,
        shapes: dict[str, tuple[int, ...]],
        kept: Kept,
        make_layer: Callable[..., Layer] = recurrent_layer,
        nll: Callable[..., Tensor] = nll,
    ) -> None:
        """Args: shapes: of the parameters as stored, in canonical order."""
        super().__init__()
        self.recipe, self._nll = recipe, nll
        self.layers: list[Layer] = []
        own: dict[str, tf.Variable] = {}
        inputs = recipe.embedding_size
        for index, width in enumerate(recipe.widths):
            prefix = f"rnn.{index}."
            in_layer = {n.removeprefix(prefix): k for n, k in kept.items() if n.startswith(prefix)}
            layer = make_layer(recipe, inputs, width, in_layer)
            own |= {prefix + kind: variable for kind, variable in layer.own_variables.items()}
            self.layers.append(layer)
            inputs = width
        self.parameters = {
            name: own[name] if name in own else tf.Variable(tf.zeros(shape), name=name)
            for name, shape in shapes.items()
        }

    def __call__(
        self, inputs: Tensor, state: Tensors, dropout: Dropout
    ) -> tuple[Head, Tensor, Tensor, Tensors]:
        """Return the head, the last layer's output before and after dropout, and the new state.

        Args:
            inputs: [time, batch].
            state: arrays [batch, width], named as in `state_widths`.
        """
        p = {name: tf.convert_to_tensor(variable) for name, variable in self.parameters.items()}
        after: Tensors = {}
        names = list(state_widths(self.recipe))
        each = len(names) // self.recipe.layers  # h, or h and c
        x = dropout.words(tf.gather(p["embedding"], inputs), inputs, p["embedding"].shape[0])
        x = dropout.units(x, 0)
        for index, (layer, width) in enumerate(zip(self.layers, self.recipe.widths, strict=True)):
            weights = Weights(
                p[f"rnn.{index}.input"],
                dropout.weights(p[f"rnn.{index}.recurrent"], index),
                p[f"rnn.{index}.bias"],
                p.get(f"rnn.{index}.recurrent_bias"),
                dropout.recurrent(inputs.shape[1], width, index),
            )
            of_layer = names[index * each : (index + 1) * each]
            given = lowered(self.recipe, (x, [state[name] for name in of_layer], weights))
            top, last = raised(layer(*given))
            after |= zip(of_layer, last, strict=True)
            x = dropout.units(top, index + 1)
        return Head.of(x, lowered(self.recipe, p), dropout), top, x, after

    def objective(
        self, inputs: Tensor, targets: Tensor, mask: Tensor, state: Tensors, dropout: Dropout
    ) -> tuple[Tensor, Tensor, Tensors]:
        """Return what training differentiates, not yet divided; the nll; and the new state."""
        head, top, dropped_top, state = self(inputs, state, dropout)
        nll = self._nll(head, tf.reshape(targets, [-1]), tf.reshape(mask, [-1]), training=True)
        if not self.recipe.penalizes:
            return nll, nll, state
        return nll + penalty(self.recipe, top, dropped_top, mask), nll, state

    def nll(
        self, inputs: Tensor, targets: Tensor, mask: Tensor, state: Tensors
    ) -> tuple[Tensor, Tensors]:
        """Return the summed nll without dropout, and the new state."""
        head, _, _, state = self(inputs, state, Dropout(self.recipe))
        nll = self._nll(head, tf.reshape(targets, [-1]), tf.reshape(mask, [-1]), training=False)
        return nll, state

    def log_probabilities(self, inputs: Tensor, state: Tensors) -> tuple[Tensor, Tensors]:
        """Return log-probabilities [time, batch, V] without dropout, and the new state."""
        head, _, _, state = self(inputs, state, Dropout(self.recipe))
        return tf.reshape(log_probabilities(head), (*inputs.shape, -1)), state


def update(
    recipe: Recipe, p: tf.Variable, g: Tensor, numbers: Tensors, *slots: tf.Variable
) -> None:
    """Update one parameter on one device, as `Backend.train_step` says.

    All but SGD by hand, because TensorFlow's own RMSProp adds epsilon under the root.

    Args:
        g: its gradient.
        numbers: `rate` and `epsilon` as `rate_and_epsilon` gives them, asgd's `share`, and the
            `norm` of all gradients.
        slots: in the order of `OPTIMIZER_SLOTS`.
    """
    rate, epsilon = numbers["rate"], numbers["epsilon"]
    if recipe.clip_norm is not None:
        g = tf.clip_by_global_norm([g], recipe.clip_norm, numbers["norm"])[0][0]
    if recipe.weight_decay:
        g += recipe.weight_decay * p
    if recipe.optimizer == "adam":
        m, v = slots
        new_m = m.assign(recipe.adam_beta1 * m + (1 - recipe.adam_beta1) * g)
        new_v = v.assign(recipe.adam_beta2 * v + (1 - recipe.adam_beta2) * g**2)
        p.assign_sub(rate * new_m / (tf.sqrt(new_v) + epsilon))
    elif recipe.optimizer == "rmsprop":
        (s,) = slots
        new_s = s.assign(recipe.rmsprop_decay * s + (1 - recipe.rmsprop_decay) * g**2)
        p.assign_sub(rate * g / (tf.sqrt(new_s) + epsilon))
    else:
        # What tf.compat.v1.train.GradientDescentOptimizer applies: one pass over memory.
        tf.raw_ops.ResourceApplyGradientDescent(var=p.handle, alpha=rate, delta=g)
        for a in slots:  # asgd's mean
            now = tf.convert_to_tensor(p)
            a.assign(now + (1 - numbers["share"]) * (a - now))  # p exactly, if its share is 1
