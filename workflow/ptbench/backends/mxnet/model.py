"""The network from words to losses, its initial parameters, and their canonical form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mxnet as mx
import numpy as np
import numpy.typing as npt
from mxnet import gluon
from mxnet.gluon import nn

from ptbench.backends.mxnet.heads import MixtureHead, MixtureLoss, PlainHead, PlainLoss
from ptbench.backends.mxnet.layers import (
    Array,
    Initializers,
    States,
    drop,
    gate_parameters,
    recurrent_layer,
)
from ptbench.model.initialization import KERAS_EMBEDDING_SCALE
from ptbench.model.parameters import parameter_shapes
from ptbench.model.recipe import Recipe

Kept = dict[str, npt.NDArray[np.bool_]]


class LanguageModel(gluon.HybridBlock):
    """Embedding, recurrent layers and head, with dropout between them; the loss is apart."""

    def __init__(self, recipe: Recipe, vocabulary_size: int, kept: Kept) -> None:
        super().__init__()
        self.recipe = recipe
        self.locked = recipe.dropout_kind == "locked"
        shapes = parameter_shapes(recipe, vocabulary_size)
        start = Start.of(recipe)
        with self.name_scope():
            self.embedding = nn.Embedding(
                vocabulary_size, recipe.embedding_size, weight_initializer=start.embedding
            )
            self.layers = nn.HybridSequential()
            inputs = recipe.embedding_size
            for index, width in enumerate(recipe.widths):
                of_layer = {
                    kind: kept[name]
                    for kind in ("input", "recurrent")
                    if (name := f"rnn.{index}.{kind}") in kept
                }
                self.layers.add(recurrent_layer(recipe, inputs, width, start.layer, of_layer))
                inputs = width
            rank = shapes.get("softmax.projection", (None, None))[1]
            head = MixtureHead if recipe.mixtures else PlainHead
            self.head = head(recipe, rank, start.layer.weight)
        if not recipe.recurrent_bias:  # Gluon always has one: it stays zero
            for layer in self.layers:
                gate_parameters(layer)["recurrent_bias"].grad_req = "null"

    def hybrid_forward(
        self,
        F: Any,  # noqa: N803 - Gluon's name
        inputs: Array,
        states: list[States],
        words: Array = None,
    ) -> tuple[list[Array], list[States], list[Array]]:
        """The head's outputs, each layer's final states, and what is penalized of the last layer:
        its output and that output dropped, each [time, batch, width], or nothing.

        Args:
            inputs: [time, batch]; words: [vocabulary, 1], what dropout multiplies each row by.
        """
        recipe = self.recipe
        x = self.embedding(inputs)
        if words is not None:
            x = F.broadcast_mul(x, F.take(words, inputs))
        x = drop(F, x, recipe.unit_dropout[0], self.locked)
        final = []
        for layer, state, rate in zip(self.layers, states, recipe.unit_dropout[1:], strict=True):
            h, state = layer(x, state)
            x = drop(F, h, rate, self.locked)
            final.append(state)
        return self.head(x), final, [h, x] if recipe.penalizes else []


def output_loss(
    recipe: Recipe, vocabulary_size: int, model: LanguageModel
) -> PlainLoss | MixtureLoss:
    """The output layer, whose weights may be the model's embedding, and the loss behind it."""
    shapes, start = parameter_shapes(recipe, vocabulary_size), Start.of(recipe)
    output = nn.Dense(
        vocabulary_size,
        use_bias=recipe.softmax_bias,
        flatten=False,
        in_units=shapes.get("softmax.weight", shapes["embedding"])[1],
        weight_initializer=start.embedding if recipe.tie_weights else start.layer.weight,
        bias_initializer=start.softmax_bias,
        params=model.embedding.params if recipe.tie_weights else None,
    )
    return MixtureLoss(output, recipe.mixtures) if recipe.mixtures else PlainLoss(output)


class NegativeLogLikelihood(gluon.HybridBlock):
    """The model with its loss, in one graph."""

    def __init__(self, model: LanguageModel, loss: PlainLoss | MixtureLoss) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def hybrid_forward(
        self,
        F: Any,  # noqa: ARG002, N803
        inputs: Array,
        targets: Array,
        mask: Array,
        states: list[States],
        words: Array = None,
    ) -> tuple[Array, list[States], list[Array]]:
        """Summed negative log-likelihood [1] of the real tokens in nats, and beside it what the
        model gives.
        """
        outputs, states, penalized = self.model(inputs, states, words)
        nll = self.loss(*outputs, targets.reshape(-1), mask.reshape(-1))
        return nll, states, penalized


@dataclass(frozen=True)
class Start:
    """Gluon's initializers, as `initialization_scheme` has them."""

    embedding: Any
    layer: Initializers
    softmax_bias: Any

    @classmethod
    def of(cls, recipe: Recipe) -> Start:
        bias = mx.init.LSTMBias(recipe.forget_bias) if recipe.rnn == "lstm" else "zeros"
        if recipe.initialization_scheme == "framework_defaults":
            return cls(None, Initializers(None, None, bias), "zeros")
        if recipe.initialization_scheme == "keras_defaults":
            recurrent = mx.init.Orthogonal(scale=1, rand_type="normal")
            kernels = Initializers(mx.init.Xavier(), recurrent, bias)
            return cls(mx.init.Uniform(KERAS_EMBEDDING_SCALE), kernels, "zeros")
        uniform = mx.init.Uniform(recipe.initialization_scale)
        return cls(uniform, Initializers(uniform, uniform, bias), uniform)


@dataclass(frozen=True)
class Stored:
    """How Gluon holds a parameter, its gradient and its slots, and how the contract has them."""

    parameter: gluon.Parameter
    kept: npt.NDArray[np.bool_] | None  # of a sparse model's matrix, in its canonical shape
    transposed: bool  # Gluon has [outputs, inputs]
    packed: bool  # the kept weights alone, as `SparseLSTM` has them

    def canonical(self, array: mx.nd.NDArray) -> npt.NDArray[np.float32]:
        value = array.asnumpy()
        if self.packed:
            assert self.kept is not None
            whole = np.zeros(self.kept.T.shape, np.float32)
            whole[self.kept.T] = value
            value = whole
        return np.ascontiguousarray(value.T) if self.transposed else value

    def stored(self, value: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        value = np.asarray(value, np.float32)
        if self.packed:
            assert self.kept is not None
            return value.T[self.kept.T]
        if self.kept is not None:
            value = value * self.kept
        return value.T if self.transposed else value


def stored_parameters(
    model: LanguageModel,
    loss: PlainLoss | MixtureLoss,
    recipe: Recipe,
    vocabulary_size: int,
    kept: Kept,
) -> dict[str, Stored]:
    """The trained parameters by canonical name, in canonical order."""
    parameters = {"embedding": model.embedding.weight}
    for index, layer in enumerate(model.layers):
        for kind, parameter in gate_parameters(layer).items():
            parameters[f"rnn.{index}.{kind}"] = parameter
    if recipe.mixtures:
        parameters["latent.weight"] = model.head.latent.weight
        parameters["latent.bias"] = model.head.latent.bias
        parameters["prior.weight"] = model.head.prior.weight
    if model.head.projection is not None:
        parameters["softmax.projection"] = model.head.projection.weight
    parameters["softmax.weight"] = loss.output.weight
    parameters["softmax.bias"] = loss.output.bias
    transposed = (".input", ".recurrent", "latent.weight", "prior.weight", "softmax.projection")
    return {
        name: Stored(
            parameters[name],
            kept.get(name),
            transposed=name.endswith(transposed),
            packed=recipe.kernel == "sparse" and name in kept,
        )
        for name in parameter_shapes(recipe, vocabulary_size)
    }
