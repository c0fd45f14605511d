"""What is faster than Keras' own, of the functions that TensorFlow's tuned model is made of."""

from __future__ import annotations

import keras
from keras import ops

from ptbench.backends.keras import model
from ptbench.backends.keras.model import Kept, Tensor
from ptbench.backends.tensorflow import model as tensorflow_model
from ptbench.backends.tensorflow import tuned
from ptbench.model.recipe import Recipe


def recurrent_layer(recipe: Recipe, width: int, kept: Kept) -> keras.layers.Layer:
    """Return the tuned layer for the fused LSTM, otherwise the stock one."""
    layer = model.recurrent_layer(recipe, width, kept)
    if recipe.rnn == "lstm" and recipe.kernel == "fused" and not recipe.recurrent_dropout:
        return HoistedLSTM(layer.layer, recipe.recurrent_bias)
    return layer


class HoistedLSTM(model.RecurrentLayer):
    """Keras' LSTM computed by `tuned.lstm`, which has time first."""

    def call(
        self,
        x: Tensor,
        initial_state: list[Tensor],
        dropout: keras.layers.Dropout,
        training: bool = False,
    ) -> list[Tensor]:
        p = {kind: variable.value for kind, variable in self.parameters.items()}
        bias = p["bias"] + p["recurrent_bias"] if self.has_recurrent_bias else p["bias"]
        u = dropout(p["recurrent"], training=training)
        x = ops.transpose(x, (1, 0, 2))
        h, last_c = tuned.lstm(x, p["input"], u, bias, *initial_state)
        return [ops.transpose(h, (1, 0, 2)), h[-1], last_c]


def nll(head: model.Head, v: Tensor, targets: Tensor, mask: Tensor, training: bool) -> Tensor:
    """Return what `model.nll` does, by `tuned.nll`."""
    features, log_prior, mixtures = head.features(v, training), None, 1
    if head.mixtures:
        mixtures = head.mixtures
        log_prior = ops.reshape(head.log_prior(v), (-1, mixtures))
    own = head.output_layer is not None
    matrix = head.output_layer.kernel if own else head.embedding.embeddings
    plain = tensorflow_model.Head(
        ops.reshape(features, (-1, mixtures, features.shape[-1])),
        log_prior,
        ops.convert_to_tensor(matrix),
        None if head.bias is None else ops.convert_to_tensor(head.bias),
        transposed=own,
    )
    return tuned.nll(plain, ops.reshape(targets, (-1,)), ops.reshape(mask, (-1,)), training)
