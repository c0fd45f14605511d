"""The language model in Keras as its documentation would have it written.

What it computes is in `Backend`'s docstring. Keras' layers read [batch, time, ...], and so do all
functions here. `LanguageModel` turns over what the backend gives it, which is [time, batch].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
from keras import ops

from ptbench.model.parameters import state_widths
from ptbench.model.recipe import Recipe

Tensor = Any  # of Keras' backend
Kept = dict[str, npt.NDArray[np.bool_]]  # of a sparse model's `input` and `recurrent`

# Keras' dtype policy for each precision. With the mixed one, a layer that is called rounds what it
# is given and its variables to bfloat16, and returns bfloat16.
POLICIES = {"float32": "float32", "bfloat16": "mixed_bfloat16"}


def float32(tensors: Any) -> Any:
    """Return nested tensors as float32."""
    return keras.tree.map_structure(lambda tensor: ops.cast(tensor, "float32"), tensors)


class Dropout(keras.layers.Layer):
    """All that training drops, except what recurrent layers drop of their previous output."""

    def __init__(self, recipe: Recipe, vocabulary_size: int) -> None:
        super().__init__()
        self.vocabulary_size = vocabulary_size
        time = 1 if recipe.dropout_kind == "locked" else None
        # bfloat16 would round the rate, because random numbers of it are multiples of 1/128.
        layer = partial(keras.layers.Dropout, dtype="float32")
        # The rate of keras.layers.Dropout is per time step and unit. The `dropout` of
        # keras.layers.LSTM, whose one mask serves all time steps, would drop its input alone.
        self.of_units = [
            layer(rate, noise_shape=(None, time, None)) for rate in recipe.unit_dropout
        ]
        rate = recipe.latent_dropout if recipe.mixtures else 0.0
        self.of_latents = layer(rate, noise_shape=(None, time, None, None))
        self.of_words = layer(recipe.word_dropout)
        self.of_weights = [layer(recipe.weight_dropout) for _ in recipe.widths]

    def words(self, x: Tensor, tokens: Tensor, training: bool) -> Tensor:
        """Drop all rows [batch, time, embedding] of some words."""
        if not training or not self.of_words.rate:
            return x
        rows = self.of_words(ops.ones((self.vocabulary_size, 1)), training=True)
        return float32(x) * ops.take(rows, tokens, axis=0)

    @property
    def alike_on_all_replicas(self) -> list[keras.Variable]:
        """The random generators' states of what every replica drops alike: words and weights."""
        layers = [self.of_words, *self.of_weights]
        return [layer.seed_generator.state for layer in layers if layer.rate]


class OneMask:
    """Recurrent dropout with one mask for all gates, where Keras draws one for each.

    It is drawn in float32, as `Dropout` draws.
    """

    def get_recurrent_dropout_mask(self, step_input: Tensor) -> Any:
        masks = super().get_recurrent_dropout_mask(float32(step_input))  # type: ignore[misc]
        if masks is None:
            return None
        several = isinstance(masks, list)
        one = ops.cast(masks[0] if several else masks, step_input.dtype)
        return [one] * len(masks) if several else one


class LSTMCell(OneMask, keras.layers.LSTMCell):
    """Keras' cell with that dropout."""


class GRUCell(OneMask, keras.layers.GRUCell):
    """Keras' cell with that dropout."""


class SimpleRNNCell(OneMask, keras.layers.SimpleRNNCell):
    """Keras' cell with that dropout."""


class SparseLSTMCell(LSTMCell):
    """An LSTM of which only the kept weights exist, in vectors, column by column."""

    def __init__(self, kept: Kept, **options: Any) -> None:
        super().__init__(**options)
        # the rows and the columns of kept weights, in the order of the vectors
        self.places: dict[str, Places] = {}
        for kind, mask in kept.items():
            columns, rows = np.nonzero(mask.T)
            self.places[kind] = rows.astype(np.int32), columns.astype(np.int32)

    def build(self, _: Any) -> None:
        def vector(kind: str) -> keras.Variable:
            return self.add_weight(shape=self.places[kind][0].shape, initializer="zeros", name=kind)

        self.kernel, self.recurrent_kernel = vector("input"), vector("recurrent")
        self.bias = self.add_weight(shape=(4 * self.units,), initializer="zeros", name="bias")
        self.built = True

    def call(self, inputs: Tensor, states: list[Tensor], training: bool = False) -> Any:
        h, c = states
        dropped = h
        if training and (masks := self.get_recurrent_dropout_mask(h)) is not None:
            dropped = h * masks[0]
        width = 4 * self.units
        z = sparse_product(inputs, self.kernel, self.places["input"], width) + self.bias
        z += sparse_product(dropped, self.recurrent_kernel, self.places["recurrent"], width)
        i, f, g, o = ops.split(z, 4, axis=-1)
        c = ops.sigmoid(f) * c + ops.sigmoid(i) * ops.tanh(g)
        h = ops.sigmoid(o) * ops.tanh(c)
        return h, [h, c]


Places = tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]  # rows and columns


def sparse_product(x: Tensor, values: Tensor, places: Places, width: int) -> Tensor:
    """Return x [batch, inputs] times the matrix [inputs, width] of these values at these places.

    The work is that of the values alone, forwards and backwards, and nothing but x is kept for the
    way back.
    """
    rows, columns = places

    @ops.custom_gradient
    def product(x: Tensor, values: Tensor) -> Any:
        x = ops.transpose(x)
        y = ops.segment_sum(ops.take(x, rows, axis=0) * values[:, None], columns, width)

        def gradient(*arguments: Tensor, upstream: Tensor = None) -> tuple[Tensor, Tensor]:
            d_y = arguments[0] if upstream is None else upstream
            at_values = ops.take(ops.transpose(d_y), columns, axis=0)
            d_x = ops.segment_sum(at_values * values[:, None], rows, x.shape[0])
            return ops.transpose(d_x), ops.sum(at_values * ops.take(x, rows, axis=0), axis=1)

        return ops.transpose(y), gradient

    return product(x, ops.convert_to_tensor(values))


LAYERS: dict[str, Any] = {
    "lstm": (keras.layers.LSTM, LSTMCell),
    "gru": (keras.layers.GRU, GRUCell),
    "rnn_tanh": (keras.layers.SimpleRNN, SimpleRNNCell),
    "rnn_relu": (keras.layers.SimpleRNN, SimpleRNNCell),
}


class RecurrentLayer(keras.layers.Wrapper):
    """One of Keras' layers with what they leave out: dropped weights, and one bias or two.

    Keras' LSTM and SimpleRNN have one bias, its GRU two. In both cases the parameters are here, and
    the layer is called with values in the place of its weights; so it keeps cuDNN's kernel on a
    GPU.
    """

    def __init__(self, layer: keras.layers.Layer, recurrent_bias: bool) -> None:
        """Args: recurrent_bias: whether there is a second bias."""
        super().__init__(layer)
        self.has_recurrent_bias = recurrent_bias

    def build(self, input_shape: Any) -> None:
        super().build(input_shape)
        cell = self.layer.cell
        self.bias_rows = len(cell.bias.shape)  # a GRU's is [2, gates x width]
        self.parameters = {"input": cell.kernel, "recurrent": cell.recurrent_kernel}
        self.parameters["bias"] = self._new_bias("bias") if self.bias_rows == 2 else cell.bias
        if self.has_recurrent_bias:
            self.parameters["recurrent_bias"] = self._new_bias("recurrent_bias")

    def _new_bias(self, name: str) -> keras.Variable:
        return self.add_weight(
            shape=self.layer.cell.bias.shape[-1:], initializer="zeros", name=name
        )

    def call(
        self,
        x: Tensor,
        initial_state: list[Tensor],
        dropout: keras.layers.Dropout,
        training: bool = False,
    ) -> list[Tensor]:
        """Return the output [batch, time, width] and the last states [batch, width].

        Args:
            dropout: of recurrent weights.
        """
        cell = self.layer.cell
        p = {kind: variable.value for kind, variable in self.parameters.items()}
        values = {}  # by the identity of the variable in whose place they are
        if self.bias_rows == 2:
            second = p.get("recurrent_bias", ops.zeros_like(p["bias"]))
            values[id(cell.bias)] = ops.stack([p["bias"], second])
        elif self.has_recurrent_bias:
            values[id(cell.bias)] = p["bias"] + p["recurrent_bias"]
        if training and dropout.rate:
            values[id(cell.recurrent_kernel)] = dropout(p["recurrent"], training=True)
        if not values:
            return self.layer(x, initial_state=initial_state, training=training)
        outputs, _ = self.layer.stateless_call(
            [values.get(id(variable), variable) for variable in self.layer.trainable_variables],
            self.layer.non_trainable_variables,
            x,
            initial_state=initial_state,
            training=training,
        )
        return outputs


def recurrent_layer(recipe: Recipe, width: int, kept: Kept) -> keras.layers.Layer:
    """Return the layer that the recipe's kernel says, not yet built.

    Keras' fused layers draw a recurrent mask for each gate, so with `recurrent_dropout` explicit
    time steps take their place.
    """
    kind, cell = LAYERS[recipe.rnn]
    options: dict[str, Any] = {"units": width}
    options["recurrent_initializer"] = "zeros"  # by default orthogonal, which takes seconds
    if recipe.rnn == "rnn_relu":
        options["activation"] = "relu"
    whole = {"return_sequences": True, "return_state": True}
    if recipe.kernel == "fused" and not recipe.recurrent_dropout:
        return RecurrentLayer(kind(**options, **whole), recipe.recurrent_bias)
    options["recurrent_dropout"] = recipe.recurrent_dropout
    own = SparseLSTMCell(kept, **options) if recipe.kernel == "sparse" else cell(**options)
    return RecurrentLayer(keras.layers.RNN(own, **whole), recipe.recurrent_bias)


class Head(keras.layers.Layer):
    """From the last layer's output to logits: one softmax, or several mixed by a prior.

    The output matrix is a Dense layer of its own, or the embedding in reverse.
    """

    def __init__(
        self,
        shapes: dict[str, tuple[int, ...]],
        embedding: keras.layers.Embedding,
        dropout: keras.layers.Dropout,
    ) -> None:
        """Args: shapes: of all parameters the model has; dropout: of latents."""
        super().__init__()
        self.embedding, self.dropout = embedding, dropout
        self.parameters: dict[str, keras.Variable] = {}
        self.latent = self._dense("latent.weight", "latent.bias", shapes, activation="tanh")
        self.prior = self._dense("prior.weight", "", shapes)
        self.mixtures = 0 if self.prior is None else self.prior.units
        self.projection = self._dense("softmax.projection", "", shapes)
        # None: the embedding in reverse
        self.output_layer = self._dense("softmax.weight", "softmax.bias", shapes, transposed=True)
        if self.output_layer is None and "softmax.bias" in shapes:
            self.parameters["softmax.bias"] = self.add_weight(
                shape=shapes["softmax.bias"], initializer="zeros", name="bias"
            )
        self.built = True

    def _dense(
        self,
        weight: str,
        bias: str,
        shapes: dict[str, tuple[int, ...]],
        transposed: bool = False,
        **options: Any,
    ) -> Any:
        """Return the layer that has the parameters of these names, if the model has them."""
        if weight not in shapes:
            return None
        inputs, units = reversed(shapes[weight]) if transposed else shapes[weight]
        layer = keras.layers.Dense(units, use_bias=bias in shapes, **options)
        layer.build((None, inputs))
        self.parameters[weight] = layer.kernel
        if layer.use_bias:
            self.parameters[bias] = layer.bias
        return layer

    @property
    def bias(self) -> keras.Variable | None:
        """The output's bias."""
        return self.parameters.get("softmax.bias")

    def features(self, v: Tensor, training: bool) -> Tensor:
        """Return what logits are made of: [batch, time, features], or [.., mixtures, features]."""
        if self.latent is not None:
            v = ops.reshape(self.latent(v), (*v.shape[:-1], self.mixtures, -1))
            v = self.dropout(v, training=training)
        return v if self.projection is None else self.projection(v)

    def log_prior(self, v: Tensor) -> Tensor:
        """Return the mixtures' log-probabilities [batch, time, mixtures]."""
        return ops.log_softmax(float32(self.prior(v)))

    def logits(self, features: Tensor) -> Tensor:
        """Return the logits [..., vocabulary] of features [..., features], float32."""
        if self.output_layer is not None:
            return float32(self.output_layer(features))
        logits = float32(self.embedding(features, reverse=True))
        return logits if self.bias is None else logits + self.bias


def nll(head: Head, v: Tensor, targets: Tensor, mask: Tensor, training: bool) -> Tensor:
    """Return the summed negative log-likelihood of the targets where the mask is 1 [nats].

    Args:
        v: the last layer's output, [batch, time, width].
        targets, mask: [batch, time].
    """
    logits = head.logits(head.features(v, training))
    if not head.mixtures:
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="sum")
        return loss(targets, logits, sample_weight=mask)
    targets = ops.broadcast_to(targets[..., None], logits.shape[:-1])
    nll = ops.sparse_categorical_crossentropy(targets, logits, from_logits=True)
    return -ops.sum(mask * ops.logsumexp(head.log_prior(v) - nll, axis=-1))


def log_probabilities(head: Head, v: Tensor) -> Tensor:
    """Return log-probabilities [batch, time, vocabulary] of each next word."""
    log_p = ops.log_softmax(head.logits(head.features(v, training=False)))
    if not head.mixtures:
        return log_p
    return ops.logsumexp(head.log_prior(v)[..., None] + log_p, axis=-2)


def penalty(recipe: Recipe, h: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Return both activation regularisations, summed over the real tokens.

    Args:
        h, v: the last layer's output before and after dropout, [batch, time, width].
        mask: [batch, time].
    """
    size = ops.sum(mask * ops.mean(ops.square(v), axis=-1))
    both_real = ops.minimum(mask[:, 1:], mask[:, :-1])
    change = ops.sum(both_real * ops.mean(ops.square(ops.diff(h, axis=1)), axis=-1))
    by_change = recipe.temporal_activation_regularization
    return recipe.activation_regularization * size + by_change * change


class LanguageModel(keras.Model):
    """The whole model."""

    def __init__(
        self,
        recipe: Recipe,
        shapes: dict[str, tuple[int, ...]],
        kept: Kept,
        make_layer: Callable[..., keras.layers.Layer] = recurrent_layer,
        nll: Callable[..., Tensor] = nll,
    ) -> None:
        """Args: shapes: of the parameters, by canonical name."""
        super().__init__()
        self.recipe, self._nll = recipe, nll
        self.dropout = Dropout(recipe, shapes["embedding"][0])
        if recipe.tie_weights:
            # without a dtype, its product in reverse would take features as they are, in float32
            self.embedding = keras.layers.ReversibleEmbedding(
                *shapes["embedding"], reverse_dtype=self.compute_dtype
            )
        else:
            self.embedding = keras.layers.Embedding(*shapes["embedding"])
        self.embedding.build()
        by_name = {"embedding": self.embedding.embeddings}
        self.recurrent_layers = []
        inputs = recipe.embedding_size
        for index, width in enumerate(recipe.widths):
            prefix = f"rnn.{index}."
            in_layer = {n.removeprefix(prefix): k for n, k in kept.items() if n.startswith(prefix)}
            layer = make_layer(recipe, width, in_layer)
            layer.build((None, None, inputs))
            layer.built = True
            self.recurrent_layers.append(layer)
            by_name |= {prefix + kind: variable for kind, variable in layer.parameters.items()}
            inputs = width
        self.head = Head(shapes, self.embedding, self.dropout.of_latents)
        by_name |= self.head.parameters
        self.by_name = by_name
        self.built = True

    def call(
        self, tokens: Tensor, states: dict[str, Tensor], training: bool = False
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the last layer's output before and after dropout, and the new states.

        Args:
            tokens: [batch, time].
            states: arrays [batch, width], named as in `state_widths`.
        """
        x = self.dropout.words(self.embedding(tokens), tokens, training)
        x = self.dropout.of_units[0](x, training=training)
        names = list(state_widths(self.recipe))
        each = len(names) // self.recipe.layers  # h, or h and c
        final: dict[str, Tensor] = {}
        for index, layer in enumerate(self.recurrent_layers):
            of_layer = names[index * each : (index + 1) * each]
            weights = self.dropout.of_weights[index]
            state = [states[name] for name in of_layer]
            h, *state = layer(x, initial_state=state, dropout=weights, training=training)
            final |= zip(of_layer, state, strict=True)
            x = self.dropout.of_units[index + 1](h, training=training)
        return float32((h, x, final))

    def objective(
        self, tokens: Tensor, targets: Tensor, mask: Tensor, states: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return what training differentiates, not yet divided; the nll; and the new states.

        Args:
            tokens, targets, mask: [time, batch].
            states: as `call` takes them.
        """
        tokens, targets, mask = (ops.transpose(each) for each in (tokens, targets, mask))
        h, v, states = self(tokens, states, training=True)
        nll = self._nll(self.head, v, targets, mask, training=True)
        if not self.recipe.penalizes:
            return nll, nll, states
        return nll + penalty(self.recipe, h, v, mask), nll, states

    def nll(
        self, tokens: Tensor, targets: Tensor, mask: Tensor, states: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the summed nll without dropout, and the new states; see `objective`."""
        tokens, targets, mask = (ops.transpose(each) for each in (tokens, targets, mask))
        with keras.StatelessScope():  # nothing is drawn, and nothing is to be noted as drawn
            _, v, states = self(tokens, states)
            return self._nll(self.head, v, targets, mask, training=False), states

    def log_probabilities(
        self, tokens: Tensor, states: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return log-probabilities [time, batch, vocabulary] of next words, and the new states."""
        with keras.StatelessScope():
            _, v, states = self(ops.transpose(tokens), states)
            log_p = log_probabilities(self.head, v)
        return ops.transpose(log_p, (1, 0, 2)), states


class Adam(keras.optimizers.Optimizer):
    """Kingma and Ba's algorithm 1, with an L2 penalty.

    keras.optimizers.Adam adds epsilon to the root of the moment that is not corrected yet, forms
    1 - beta^t in float32, where it loses five digits, and decouples weight decay (AdamW).
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe.learning_rate, global_clipnorm=recipe.clip_norm)
        self.beta_1, self.beta_2 = recipe.adam_beta1, recipe.adam_beta2
        self.epsilon, self.penalty = recipe.optimizer_epsilon, recipe.weight_decay

    def build(self, variables: list[keras.Variable]) -> None:
        super().build(variables)
        self.first_moments = self.add_optimizer_variables(variables, "first_moment")
        self.second_moments = self.add_optimizer_variables(variables, "second_moment")

    def update_step(self, gradient: Tensor, variable: Any, learning_rate: Tensor) -> None:
        index = self._get_variable_index(variable)
        m, v = self.first_moments[index], self.second_moments[index]
        gradient = gradient + self.penalty * variable
        self.assign(m, self.beta_1 * m + (1 - self.beta_1) * gradient)
        self.assign(v, self.beta_2 * v + (1 - self.beta_2) * ops.square(gradient))
        steps = ops.cast(self.iterations + 1, "float32")
        m_hat = m / -ops.expm1(steps * math.log(self.beta_1))  # 1 - beta_1^steps
        v_hat = v / -ops.expm1(steps * math.log(self.beta_2))
        self.assign_sub(variable, learning_rate * m_hat / (ops.sqrt(v_hat) + self.epsilon))


class RMSProp(keras.optimizers.Optimizer):
    """RMSProp as Keras 2.1.3 had it, epsilon added to the root, with an L2 penalty.

    keras.optimizers.RMSprop adds epsilon under the root, and decouples weight decay.
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe.learning_rate, global_clipnorm=recipe.clip_norm)
        self.decay = recipe.rmsprop_decay
        self.epsilon, self.penalty = recipe.optimizer_epsilon, recipe.weight_decay

    def build(self, variables: list[keras.Variable]) -> None:
        super().build(variables)
        self.mean_squares = self.add_optimizer_variables(variables, "mean_square")

    def update_step(self, gradient: Tensor, variable: Any, learning_rate: Tensor) -> None:
        s = self.mean_squares[self._get_variable_index(variable)]
        gradient = gradient + self.penalty * variable
        self.assign(s, self.decay * s + (1 - self.decay) * ops.square(gradient))
        self.assign_sub(variable, learning_rate * gradient / (ops.sqrt(s) + self.epsilon))


class AveragedSGD(keras.optimizers.SGD):
    """SGD that keeps the mean of its last parameters (Polyak and Juditsky 1992).

    `share` is that of the next step's parameters in the mean: one over how many it is of.
    """

    def build(self, variables: list[keras.Variable]) -> None:
        super().build(variables)
        self.averages = self.add_optimizer_variables(variables, "average")
        self.share = self.add_variable((), initializer="ones", name="share")

    def update_step(self, gradient: Tensor, variable: Any, learning_rate: Tensor) -> None:
        super().update_step(gradient, variable, learning_rate)
        average = self.averages[self._get_variable_index(variable)]
        self.assign(average, (1 - self.share) * average + self.share * variable)


def optimizer_of(recipe: Recipe) -> keras.optimizers.Optimizer:
    """Return the recipe's optimizer."""
    if recipe.optimizer == "adam":
        return Adam(recipe)
    if recipe.optimizer == "rmsprop":
        return RMSProp(recipe)
    kind = keras.optimizers.SGD if recipe.optimizer == "sgd" else AveragedSGD
    # Keras' decoupled weight decay is an L2 penalty where there are no moments.
    decay = recipe.weight_decay or None
    return kind(recipe.learning_rate, weight_decay=decay, global_clipnorm=recipe.clip_norm)
