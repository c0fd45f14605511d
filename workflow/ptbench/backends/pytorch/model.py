"""The language model: embedding, recurrent layers, head, dropout between them, and their start."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ptbench.backends.pytorch.heads import IGNORED, Dropout, Head
from ptbench.backends.pytorch.layers import LayerState, Stored, call_layer, layer_class
from ptbench.model.initialization import KERAS_EMBEDDING_SCALE
from ptbench.model.parameters import GATES, Parameters, kept_weights, parameter_shapes
from ptbench.model.recipe import Accelerator, Recipe
from ptbench.training.initialization__LEFT import is_zero_at_first

# What a training step multiplies parameters by, by canonical name: `embedding` [vocabulary, 1],
# `rnn.{l}.recurrent` of the parameter's shape; 1 for those that are not there.
ParameterMasks = Mapping[str, Tensor]


class Outputs(NamedTuple):
    """What the recurrent layers have made of a window."""

    top: Tensor  # the last layer's outputs, dropped, [time, batch, width]
    undropped: Tensor  # the same before dropout
    state: list[LayerState]  # the last


class LanguageModel(nn.Module):
    """See the contract. Starts by `initialization: native`."""

    def __init__(
        self, recipe: Recipe, vocabulary_size: int, seed: int, accelerator: Accelerator
    ) -> None:
        super().__init__()
        self.recipe = recipe
        self.shapes = parameter_shapes(recipe, vocabulary_size)
        self.kept = kept_weights(recipe, vocabulary_size, seed)
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(vocabulary_size, recipe.embedding_size)
        self.layers = nn.ModuleList()
        layer = layer_class(recipe, accelerator)
        inputs = recipe.embedding_size
        for index, width in enumerate(recipe.widths):
            prefix = f"rnn.{index}."
            kept = {n.removeprefix(prefix): m for n, m in self.kept.items() if n.startswith(prefix)}
            self.layers.append(layer(inputs, width, recipe, kept))
            inputs = width
        self.head = Head(recipe, vocabulary_size, self.embedding.weight)
        self.dropout = nn.ModuleList(Dropout(p, recipe.dropout_kind) for p in recipe.unit_dropout)
        self.recurrent_dropout = nn.Dropout(recipe.recurrent_dropout)
        if recipe.initialization_scheme != "framework_defaults":
            torch.manual_seed(seed)
            self.initialize()
        self.load(self.arrays(self.canonical_parameters()))  # without the weights left out

    def forward(
        self, inputs: Tensor, targets: Tensor, state: list[LayerState], scale: float,
        masks: ParameterMasks,
    ) -> tuple[Tensor, Tensor | None, list[LayerState]]:  # fmt: skip
        """`scale` times the summed nll of the targets that are not IGNORED, `scale` times what
        training adds to it, if anything, and the last state; see `run`.
        """
        outputs = self.run(inputs, state, masks)
        penalty = None
        if self.training and self.recipe.penalizes:
            penalty = scale * activation_penalty(self.recipe, outputs, targets != IGNORED)
        return self.head.loss(outputs.top, targets, scale), penalty, outputs.state

    def log_probabilities(
        self, inputs: Tensor, state: list[LayerState]
    ) -> tuple[Tensor, list[LayerState]]:
        """[time, batch, vocabulary] of each next word, and the last state."""
        outputs = self.run(inputs, state, {})
        return self.head.log_probabilities(outputs.top), outputs.state

    def run(self, inputs: Tensor, state: list[LayerState], masks: ParameterMasks) -> Outputs:
        """All but the head.

        Args:
            inputs: [time, batch].
            state: of every layer.
            masks: of words and recurrent weights.
        """
        x = self.embedding(inputs)
        words = masks.get("embedding")
        x = self.dropout[0](x if words is None else x * words[inputs])
        last = []
        undropped = x
        for index, (layer, before) in enumerate(zip(self.layers, state, strict=True)):
            mask = None
            if self.training and self.recipe.recurrent_dropout:
                # not ones_like, whose strides are the state's: then masks would depend on them
                mask = self.recurrent_dropout(before[0].new_ones(before[0].shape))
            weight_mask = masks.get(f"rnn.{index}.recurrent")
            undropped, after = call_layer(layer, x, before, mask, weight_mask)
            last.append(after)
            x = self.dropout[index + 1](undropped)
        return Outputs(x, undropped, last)

    def canonical(self) -> dict[str, Stored]:
        """Each trained parameter by its canonical name, in canonical order."""
        names = {"embedding": Stored(self.embedding.weight)}
        for index, layer in enumerate(self.layers):
            names |= {f"rnn.{index}.{kind}": p for kind, p in layer.canonical().items()}
        return names | self.head.canonical()

    def canonical_parameters(self) -> dict[str, Tensor]:
        return {name: stored.parameter for name, stored in self.canonical().items()}

    def arrays(self, tensors: Mapping[str, Tensor]) -> Parameters:
        """Copies, as the contract shapes them, of tensors of their parameters' shapes."""
        stored = self.canonical()
        return {n: stored[n].canonical(t, self.shapes[n]) for n, t in tensors.items()}

    @torch.no_grad()
    def load(self, parameters: Mapping[str, npt.NDArray[Any]]) -> None:
        """Replace all parameters; weights that the recipe leaves out become zero."""
        for name, stored in self.canonical().items():
            array = parameters[name] * self.kept.get(name, np.float32(1))
            stored.parameter.copy_(stored.stored(array))

    @torch.no_grad()
    def initialize(self) -> None:
        """`uniform` or `keras_defaults`, by PyTorch's own draws."""
        for name, stored in self.canonical().items():
            parameter = stored.parameter
            if is_zero_at_first(self.recipe, name):
                nn.init.zeros_(parameter)
                if self.recipe.rnn == "lstm" and name.startswith("rnn.") and name.endswith(".bias"):
                    forget = GATES["lstm"].index("forget")
                    parameter.unflatten(0, (4, -1))[forget] = self.recipe.forget_bias
            elif self.recipe.initialization_scheme == "uniform":
                scale = self.recipe.initialization_scale
                nn.init.uniform_(parameter, -scale, scale)
            elif name == "embedding":
                nn.init.uniform_(parameter, -KERAS_EMBEDDING_SCALE, KERAS_EMBEDDING_SCALE)
            else:
                recurrent = name.endswith(".recurrent")
                draw = nn.init.orthogonal_ if recurrent else nn.init.xavier_uniform_
                parameter.copy_(stored.stored(draw(torch.empty(self.shapes[name])).numpy()))


def activation_penalty(recipe: Recipe, outputs: Outputs, real: Tensor) -> Tensor:
    """Both activation regularisations, summed over the tokens that are real, [time, batch]."""
    penalty = outputs.top.new_zeros(())
    if recipe.activation_regularization:
        squares = outputs.top.square().mean(-1)
        penalty = penalty + recipe.activation_regularization * (squares * real).sum()
    if recipe.temporal_activation_regularization:
        squares = outputs.undropped.diff(dim=0).square().mean(-1)
        both_real = real[1:] & real[:-1]
        penalty = penalty + recipe.temporal_activation_regularization * (squares * both_real).sum()
    return penalty
