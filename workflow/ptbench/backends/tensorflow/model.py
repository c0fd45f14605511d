"""The language model: embedding, recurrent layers and head, their dropout and initial draw."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from ptbench.backends.tensorflow import heads
from ptbench.backends.tensorflow.devices import RANDOM_GENERATOR
from ptbench.backends.tensorflow.layers import recurrent_layer
from ptbench.model.initialization import KERAS_EMBEDDING_SCALE
from ptbench.model.parameters import GATES, kept_weights, parameter_shapes, state_widths
from ptbench.model.recipe import Accelerator, Recipe
from ptbench.training.initialization__LEFT import is_zero_at_first

Tensor = Any  # tf.Tensor
States = dict[str, Any]  # by name, as `state_widths` has it, each [batch, width]

# Where a replica's number stands for other dropout: what every replica drops alike.
WORDS = 2**31 - 1
WEIGHTS = WORDS - 1  # of the first layer; the next one's is one less


class Dropout:
    """What one replica drops in one training step: a function of (seed, step, replica)."""

    def __init__(self, recipe: Recipe, seed: int, step: Tensor, replica: Tensor) -> None:
        """Args: step: int64."""
        self.recipe = recipe
        self._step = tf.stack([tf.constant(seed, tf.int64), step])
        self._replica = tf.random.fold_in(self._step, replica, alg=RANDOM_GENERATOR)
        # every place where units are dropped has a number of its own
        first = range(recipe.layers + 1)
        self.places = {f"units.{n}": n for n in first}
        self.places |= {f"recurrent.{n}": len(first) + n for n in range(recipe.layers)}
        self.places["latents"] = len(self.places)

    def __call__(self, x: Tensor, rate: float, place: str) -> Tensor:
        """Args: x: [time, batch, ...]."""
        locked = self.recipe.dropout_kind == "locked"
        noise_shape = (1, *x.shape[1:]) if locked else None
        seed = tf.random.fold_in(self._replica, self.places[place], alg=RANDOM_GENERATOR)
        return self._drop(x, rate, seed, noise_shape)

    def recurrent(self, batch_size: int, width: int, layer: int) -> Tensor | None:
        """What multiplies the layer's previous output [batch, width]; None for nothing."""
        if not self.recipe.recurrent_dropout:
            return None
        ones = tf.ones((1, batch_size, width))
        return self(ones, self.recipe.recurrent_dropout, f"recurrent.{layer}")[0]

    def weights(self, u: Tensor, layer: int) -> Tensor | None:
        """A layer's recurrent weights, some dropped, the same by every replica.

        None if none are to be dropped.
        """
        if not self.recipe.weight_dropout:
            return None
        seed = tf.random.fold_in(self._step, WEIGHTS - layer, alg=RANDOM_GENERATOR)
        return self._drop(u, self.recipe.weight_dropout, seed)

    def words(self, x: Tensor, inputs: Tensor, vocabulary_size: int) -> Tensor:
        """Rows [time, batch, embedding] of whole words dropped, the same by every replica."""
        if not self.recipe.word_dropout:
            return x
        seed = tf.random.fold_in(self._step, WORDS, alg=RANDOM_GENERATOR)
        mask = self._drop(tf.ones((vocabulary_size, 1)), self.recipe.word_dropout, seed)
        return x * tf.gather(mask, inputs)

    def _drop(self, x: Tensor, rate: float, seed: Tensor, noise_shape: Any = None) -> Tensor:
        if not rate:
            return x
        return tf.nn.experimental.stateless_dropout(
            x, rate, seed=seed, rng_alg=RANDOM_GENERATOR, noise_shape=noise_shape
        )


class Forward(NamedTuple):
    """What comes of a window."""

    output: heads.Output  # what the head makes probabilities of
    state: States  # after the last step
    top: Tensor  # the last layer's output, [time, batch, width]
    dropped_top: Tensor  # the same after dropout


class LanguageModel(tf.Module):
    """The model of `Backend`'s docstring."""

    def __init__(
        self, recipe: Recipe, vocabulary_size: int, seed: int, accelerator: Accelerator
    ) -> None:
        super().__init__()
        self.recipe, self.vocabulary_size = recipe, vocabulary_size
        self.kept = kept_weights(recipe, vocabulary_size, seed)
        shapes = parameter_shapes(recipe, vocabulary_size)
        self.layers = []
        in_layers: dict[str, tf.Variable] = {}
        for index, width in enumerate(recipe.widths):
            inputs, _ = shapes[f"rnn.{index}.input"]
            prefix = f"rnn.{index}."
            kept = {n.removeprefix(prefix): k for n, k in self.kept.items() if n.startswith(prefix)}
            self.layers.append(recurrent_layer(recipe, inputs, width, kept, accelerator))
            in_layers |= {prefix + k: v for k, v in self.layers[-1].variables_of.items()}
        # by canonical name, in canonical order; a sparse kernel stores kept weights alone
        self.parameters: dict[str, tf.Variable] = {
            name: in_layers[name] if name in in_layers else tf.Variable(tf.zeros(shape), name=name)
            for name, shape in shapes.items()
        }
        for index, (name, shape) in enumerate(shapes.items()):
            drawn = initial_value(recipe, name, shape, seed, index)
            self.parameters[name].assign(self.stored(name, np.array(drawn)))
        # what gradients are multiplied by where weights that are left out are stored
        self.gradient_masks = {
            name: tf.constant(kept, tf.float32)
            for name, kept in self.kept.items()
            if recipe.kernel != "sparse"
        }

    def stored(self, name: str, array: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """A parameter, or a slot of it, as its variable has it."""
        if name not in self.kept:
            return array.astype(np.float32)
        if self.recipe.kernel == "sparse":
            return array[self.kept[name]].astype(np.float32)
        return (array * self.kept[name]).astype(np.float32)

    def canonical(self, name: str, array: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """The same the other way, a new array."""
        if name not in self.kept or self.recipe.kernel != "sparse":
            return array.copy()
        dense = np.zeros(self.kept[name].shape, np.float32)
        dense[self.kept[name]] = array
        return dense

    def __call__(
        self, inputs: Tensor, state: Mapping[str, Tensor], dropout: Dropout | None = None
    ) -> Forward:
        """Probabilities and state, with the dropout of a training step or without.

        Args:
            inputs: [time, batch].
            dropout: None to drop nothing.
        """
        recipe = self.recipe
        p = {name: tf.convert_to_tensor(variable) for name, variable in self.parameters.items()}

        def drop(x: Tensor, rate: float, place: str) -> Tensor:
            return x if dropout is None or not rate else dropout(x, rate, place)

        x = tf.gather(p["embedding"], inputs)
        if dropout is not None:
            x = dropout.words(x, inputs, self.vocabulary_size)
        x = drop(x, recipe.unit_dropout[0], "units.0")
        states: States = {}
        for index, layer in enumerate(self.layers):
            names = [name for name in state_widths(recipe) if name.startswith(f"state.{index}.")]
            mask = weights = None
            if dropout is not None:
                mask = dropout.recurrent(inputs.shape[1], layer.width, index)
                weights = dropout.weights(p[f"rnn.{index}.recurrent"], index)
            top, after = layer(x, tuple(state[name] for name in names), mask, weights)
            states |= zip(names, after, strict=True)
            x = drop(top, recipe.unit_dropout[index + 1], f"units.{index + 1}")

        width = x.shape[-1]
        features, log_prior = tf.reshape(x, (-1, 1, width)), None
        if recipe.mixtures:
            rows = tf.reshape(x, (-1, width))
            log_prior = tf.nn.log_softmax(rows @ p["prior.weight"])
            latents = tf.tanh(tf.nn.bias_add(rows @ p["latent.weight"], p["latent.bias"]))
            latents = tf.reshape(latents, (*inputs.shape, recipe.mixtures, -1))
            latents = drop(latents, recipe.latent_dropout, "latents")
            features = tf.reshape(latents, (-1, *latents.shape[2:]))
        if "softmax.projection" in p:
            projected = heads.all_rows(features) @ p["softmax.projection"]
            features = tf.reshape(projected, (*features.shape[:2], -1))
        matrix = p["embedding" if recipe.tie_weights else "softmax.weight"]
        output = heads.Output(features, log_prior, matrix, p.get("softmax.bias"))
        return Forward(output, states, top, x)

    def loss(self, output: heads.Output, targets: Tensor, weights: Tensor) -> Tensor:
        """Negative log-likelihoods [nats] times weights, summed, to be differentiated.

        Args:
            targets, weights: [time, batch].
        """
        tuned = self.recipe.implementation == "tuned"
        function = heads.chunked_nll if tuned else heads.summed_nll
        return function(output, tf.reshape(targets, [-1]), tf.reshape(weights, [-1]))

    def penalty(self, forward: Forward, weights: Tensor) -> Tensor:
        """Both activation regularisations of every token times weights [time, batch], summed."""

        def summed(units: Tensor, weights: Tensor) -> Tensor:
            return tf.reduce_sum(tf.reduce_mean(tf.square(units), axis=-1) * weights)

        change = forward.top[1:] - forward.top[:-1]
        both_real = tf.minimum(weights[1:], weights[:-1])
        size = self.recipe.activation_regularization * summed(forward.dropped_top, weights)
        return size + self.recipe.temporal_activation_regularization * summed(change, both_real)

    def evaluate(self, output: heads.Output, targets: Tensor, weights: Tensor) -> Tensor:
        """The same not to be differentiated."""
        tuned = self.recipe.implementation == "tuned"
        function = heads.chunked_summed_nll if tuned else heads.summed_nll
        return function(output, tf.reshape(targets, [-1]), tf.reshape(weights, [-1]))


def initial_value(
    recipe: Recipe, name: str, shape: tuple[int, ...], seed: int, index: int
) -> Tensor:
    """The native draw of the canonical parameter that has that index, by TensorFlow's means.

    The framework's defaults are those of the layers in tf.keras: Keras' defaults, with a forget
    bias of 1.
    """
    if is_zero_at_first(recipe, name):
        forget_bias = recipe.forget_bias
        if recipe.initialization_scheme == "framework_defaults":
            forget_bias = 1.0
        value = np.zeros(shape, np.float32)
        if recipe.rnn == "lstm" and name.startswith("rnn.") and name.endswith(".bias"):
            value.reshape(4, -1)[GATES["lstm"].index("forget")] = forget_bias
        return value
    # two parameters of one shape must not start alike
    if recipe.initialization_scheme == "uniform":
        scale = recipe.initialization_scale
        return tf.random.stateless_uniform(
            shape, (seed, index), -scale, scale, alg=RANDOM_GENERATOR
        )
    own_seed = int(np.random.default_rng([seed, index]).integers(2**31))
    initializers = tf.keras.initializers
    if name == "embedding":
        scale = KERAS_EMBEDDING_SCALE
        return initializers.RandomUniform(-scale, scale, seed=own_seed)(shape)
    if name.endswith(".recurrent"):
        return initializers.Orthogonal(seed=own_seed)(shape)
    return initializers.GlorotUniform(seed=own_seed)(shape)
