"""The language model: embedding, dropout, recurrent layers and head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
from keras import ops

from ptbench.backends.keras.heads import Mixture, Softmax, TunedMixture, TunedSoftmax
from ptbench.backends.keras.layers import WeightDropout, recurrent_layer, stored_parameters
from ptbench.backends.keras.parameters import Initializers, Stored, as_it_is
from ptbench.model.parameters import kept_weights, parameter_shapes
from ptbench.model.recipe import Accelerator, Recipe


class WordDropout(keras.layers.Layer):
    """Drops the embedding of all occurrences of a word: one draw for every word type."""

    def __init__(self, rate: float, vocabulary_size: int) -> None:
        super().__init__()
        self.vocabulary_size = vocabulary_size
        self.dropout = keras.layers.Dropout(rate)

    def call(self, x: Any, tokens: Any, training: bool = False) -> Any:
        if not training or not self.dropout.rate:
            return x
        rows = self.dropout(ops.ones((self.vocabulary_size, 1)), training=True)
        return x * ops.take(rows, tokens, axis=0)


class LanguageModel(keras.Model):
    """Tokens and states to the last layer's outputs, before and after dropout, and new states.

    Its head gives the loss.

    Tokens and outputs are [batch, time, ...], as Keras' layers want it, or [time, batch, ...] if
    `time_first`. States are arrays [batch, width] in the order of the contract's `state_widths`.
    """

    def __init__(
        self, recipe: Recipe, vocabulary_size: int, seed: int, accelerator: Accelerator
    ) -> None:
        super().__init__()
        self.recipe = recipe
        tuned = recipe.implementation == "tuned"
        # cuDNN's kernel, which Keras' own layers use on a GPU, is faster than any time steps
        cudnn = accelerator == "cuda" and recipe.kernel == "fused" and not recipe.recurrent_dropout
        hoisted = tuned and not cudnn and recipe.kernel != "sparse"
        self.time_first = hoisted
        initializers = Initializers(recipe, seed)

        kind = keras.layers.ReversibleEmbedding if recipe.tie_weights else keras.layers.Embedding
        self.embedding = kind(
            vocabulary_size,
            recipe.embedding_size,
            embeddings_initializer=initializers.embedding(),
        )
        self.embedding.build()
        self.word_dropout = WordDropout(recipe.word_dropout, vocabulary_size)
        # The rate of keras.layers.Dropout is per time step and unit. The `dropout` of
        # keras.layers.LSTM, whose one mask serves all time steps, would drop its input alone.
        self.dropouts = [self._dropout(rate, dimensions=3) for rate in recipe.unit_dropout]
        masks = kept_weights(recipe, vocabulary_size, seed)
        self.recurrent_layers = []
        self.stored = [as_it_is("embedding", self.embedding.embeddings)]
        inputs = recipe.embedding_size
        for index, width in enumerate(recipe.widths):
            kept = None
            if masks:
                kept = (masks[f"rnn.{index}.input"], masks[f"rnn.{index}.recurrent"])
            layer = recurrent_layer(recipe, width, initializers, kept, hoisted)
            layer.build((None, None, inputs))
            layer.built = True
            self.recurrent_layers.append(layer)
            self.stored += stored_parameters(f"rnn.{index}", layer, recipe, kept)
            inputs = width
        others = (recipe, vocabulary_size, self.embedding, initializers)
        if recipe.mixtures:
            mixture = TunedMixture if tuned else Mixture
            self.head = mixture(self._dropout(recipe.latent_dropout, dimensions=4), *others)
        else:
            self.head = (TunedSoftmax if tuned else Softmax)(*others)
        self.head.build(None)
        self.head.built = True
        self.built = True
        self.stored += self.head.stored()
        self.masks = gradient_masks(self.stored, masks, recipe, vocabulary_size)
        for stored, mask in zip(self.stored, self.masks, strict=True):
            if mask is not None:
                stored.variable.assign(stored.variable * mask)

    def _dropout(self, rate: float, dimensions: int) -> keras.layers.Dropout:
        """Of units, of an array whose first axes are batch and time."""
        shape: list[int | None] = [None] * dimensions
        if self.recipe.dropout_kind == "locked":
            shape[0 if self.time_first else 1] = 1
        return keras.layers.Dropout(rate, noise_shape=shape)

    def shared_generators(self) -> list[keras.Variable]:
        """The generators of what is dropped on all replicas or on none: words and weights."""
        dropouts = [self.word_dropout.dropout] if self.word_dropout.dropout.rate else []
        dropouts += [
            layer.dropout for layer in self.recurrent_layers if isinstance(layer, WeightDropout)
        ]
        return [dropout.seed_generator.state for dropout in dropouts]

    def call(
        self, tokens: Any, states: list[Any], training: bool = False
    ) -> tuple[Any, Any, list[Any]]:
        x = self.word_dropout(self.embedding(tokens), tokens, training=training)
        x = self.dropouts[0](x, training=training)
        kinds = len(states) // len(self.recurrent_layers)  # of states in a layer
        final: list[Any] = []
        for index, layer in enumerate(self.recurrent_layers):
            state = states[index * kinds : (index + 1) * kinds]
            h, *state = layer(x, initial_state=state, training=training)
            x = self.dropouts[index + 1](h, training=training)
            final += state
        return h, x, final

    def objective(
        self, tokens: Any, targets: Any, mask: Any, states: list[Any]
    ) -> tuple[Any, Any, list[Any]]:
        """What training differentiates, not yet divided; the nll that is in it; new states."""
        h, v, states = self(tokens, states, training=True)
        nll = self.head.nll(v, targets, mask, training=True)
        if not self.recipe.penalizes:
            return nll, nll, states
        return nll + self.penalties(h, v, mask), nll, states

    def penalties(self, h: Any, v: Any, mask: Any) -> Any:
        """Activation regularisations, summed over the tokens where the mask is 1.

        Args:
            h: the last layer's outputs.
            v: the same after dropout.
        """
        recipe = self.recipe
        terms = []
        if recipe.activation_regularization:
            squares = ops.mean(ops.square(v), axis=-1)
            terms.append(recipe.activation_regularization * ops.sum(mask * squares))
        if recipe.temporal_activation_regularization:
            change = ops.diff(h, axis=0 if self.time_first else 1)
            squares = ops.mean(ops.square(change), axis=-1)
            pairs = (mask[1:], mask[:-1]) if self.time_first else (mask[:, 1:], mask[:, :-1])
            both_real = ops.minimum(*pairs)
            terms.append(recipe.temporal_activation_regularization * ops.sum(both_real * squares))
        return sum(terms)

    def nll(self, tokens: Any, targets: Any, mask: Any, states: list[Any]) -> tuple[Any, list[Any]]:
        """Summed negative log-likelihood of the targets where the mask is 1, and new states."""
        _, v, states = self(tokens, states)
        return self.head.nll(v, targets, mask, training=False), states

    def log_probabilities(self, tokens: Any, states: list[Any]) -> tuple[Any, list[Any]]:
        """Of each next word, [..., vocabulary]; and new states."""
        _, v, states = self(tokens, states)
        return self.head.log_probabilities(v), states


def gradient_masks(
    stored: list[Stored],
    kept: Mapping[str, npt.NDArray[np.bool_]],
    recipe: Recipe,
    vocabulary_size: int,
) -> list[Any]:
    """What each variable's gradient is multiplied with, or None if all of it is parameters.

    It keeps at zero the weights that a sparse model leaves out, and the second bias of Keras' GRU
    where the recipe has none: an update of zero leaves zero, whatever the optimizer.
    """
    ones = {
        name: kept.get(name, np.ones(shape, np.bool_)).astype(np.float32)
        for name, shape in parameter_shapes(recipe, vocabulary_size).items()
    }
    masks = [np.ascontiguousarray(each.pack(ones)) for each in stored]
    return [None if mask.all() else ops.convert_to_tensor(mask) for mask in masks]
