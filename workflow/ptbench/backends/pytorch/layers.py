"""Recurrent layers: PyTorch's own, explicit time steps by its cells, products with the kept weights
alone, and a derivative of our own.

A layer takes x [time, batch, inputs], a state, and the mask [batch, width] of the previous output
or None, and returns the outputs [time, batch, width] and the last state, which it detaches. It
knows no dropped weights: `call_layer` puts them in the place of its parameter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from ptbench.backends.pytorch.steps import DenseProduct, KeptProduct, Steps
from ptbench.model.parameters import GATES
from ptbench.model.recipe import Accelerator, Recipe

LayerState = tuple[Tensor, ...]  # (h, c) of an LSTM, (h,) of any other cell; each [batch, width]
KeptWeights = Mapping[str, npt.NDArray[np.bool_]]  # input, recurrent: [inputs, gates x width]

FUSED: dict[str, Callable[[int, int], Any]] = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "rnn_tanh": lambda inputs, width: nn.RNN(inputs, width, nonlinearity="tanh"),
    "rnn_relu": lambda inputs, width: nn.RNN(inputs, width, nonlinearity="relu"),
}
CELLS: dict[str, Callable[[int, int], Any]] = {
    "lstm": nn.LSTMCell,
    "gru": nn.GRUCell,
    "rnn_tanh": lambda inputs, width: nn.RNNCell(inputs, width, nonlinearity="tanh"),
    "rnn_relu": lambda inputs, width: nn.RNNCell(inputs, width, nonlinearity="relu"),
}


class Stored(NamedTuple):
    """A trained parameter, and how it and all that has its shape relate to the canonical array."""

    parameter: nn.Parameter
    transposed: bool = False
    kept: tuple[Tensor, Tensor] | None = None  # canonical indices of what is stored; None: all

    def canonical(self, tensor: Tensor, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
        """A copy of a tensor of the parameter's shape, as the contract shapes it."""
        tensor = tensor.detach().cpu()
        if self.kept is not None:
            return torch.zeros(shape).index_put_(self.kept, tensor).numpy()
        return (tensor.T if self.transposed else tensor).contiguous().numpy().copy()

    def stored(self, array: npt.NDArray[Any]) -> Tensor:
        """A tensor of the parameter's shape from an array of the canonical one."""
        tensor = torch.from_numpy(np.array(array, np.float32))
        if self.kept is not None:
            return tensor[self.kept]
        return tensor.T.contiguous() if self.transposed else tensor


class DenseLayer(nn.Module):
    """Base of the layers whose weights are matrices; weights left out are held at zero."""

    def __init__(self, rnn: Any, suffix: str, recipe: Recipe, kept: KeptWeights) -> None:
        """Args: rnn: the module of PyTorch that has the weights, whose names end in suffix."""
        super().__init__()
        self.rnn = rnn
        self.cell = recipe.rnn
        self.recurrent_name = f"rnn.weight_hh{suffix}"
        self.w_input, self.w_recurrent = f"weight_ih{suffix}", f"weight_hh{suffix}"
        self.b_input, self.b_recurrent = f"bias_ih{suffix}", f"bias_hh{suffix}"
        if not recipe.recurrent_bias:  # PyTorch always has two; one is enough
            nn.init.zeros_(getattr(rnn, self.b_recurrent)).requires_grad_(False)
        for kind, name in (("input", self.w_input), ("recurrent", self.w_recurrent)):
            if kind in kept:
                mask = torch.from_numpy(np.ascontiguousarray(kept[kind].T, np.float32))
                self.register_buffer(f"kept_{kind}", mask, persistent=False)
                # without gradient, what starts at zero stays there, whatever the optimizer
                getattr(rnn, name).register_hook(lambda g, kind=kind: g * self.kept(kind))

    def kept(self, kind: str) -> Tensor:
        return getattr(self, f"kept_{kind}")

    def canonical(self) -> dict[str, Stored]:
        names = {
            "input": Stored(getattr(self.rnn, self.w_input), transposed=True),
            "recurrent": Stored(getattr(self.rnn, self.w_recurrent), transposed=True),
            "bias": Stored(getattr(self.rnn, self.b_input)),
        }
        if (recurrent_bias := getattr(self.rnn, self.b_recurrent)).requires_grad:
            names["recurrent_bias"] = Stored(recurrent_bias)
        return names


class FusedLayer(DenseLayer):
    """nn.LSTM, nn.GRU or nn.RNN of one layer; they cannot mask the previous output."""

    def __init__(self, inputs: int, width: int, recipe: Recipe, kept: KeptWeights) -> None:
        super().__init__(FUSED[recipe.rnn](inputs, width), "_l0", recipe, kept)

    def forward(
        self, x: Tensor, state: LayerState, mask: Tensor | None
    ) -> tuple[Tensor, LayerState]:
        assert mask is None
        before = tuple(s[None] for s in state)
        if self.cell == "lstm":
            output, after = self.rnn(x, before)
        else:
            output, *after = self.rnn(x, *before)
        return output, tuple(s[0].detach() for s in after)


class CellLayer(DenseLayer):
    """nn.LSTMCell, nn.GRUCell or nn.RNNCell at each time step."""

    def __init__(self, inputs: int, width: int, recipe: Recipe, kept: KeptWeights) -> None:
        super().__init__(CELLS[recipe.rnn](inputs, width), "", recipe, kept)

    def forward(
        self, x: Tensor, state: LayerState, mask: Tensor | None
    ) -> tuple[Tensor, LayerState]:
        outputs = []
        for x_t in x:
            state = self.step(x_t, state, mask)
            outputs.append(state[0])
        return torch.stack(outputs), tuple(s.detach() for s in state)

    def step(self, x: Tensor, state: LayerState, mask: Tensor | None) -> LayerState:
        h = state[0] if mask is None else state[0] * mask
        if self.cell == "lstm":
            return self.rnn(x, (h, state[1]))
        if self.cell == "gru" and mask is not None:  # nn.GRUCell would carry the masked h, too
            x_r, x_z, x_n = functional.linear(x, self.rnn.weight_ih, self.rnn.bias_ih).chunk(3, -1)
            u_r, u_z, u_n = functional.linear(h, self.rnn.weight_hh, self.rnn.bias_hh).chunk(3, -1)
            r, z = torch.sigmoid(x_r + u_r), torch.sigmoid(x_z + u_z)
            return ((1 - z) * torch.tanh(x_n + r * u_n) + z * state[0],)
        return (self.rnn(x, h),)


class TunedLayer(CellLayer):
    """The same, with one input product for all time steps and the derivative of `Steps`."""

    def forward(
        self, x: Tensor, state: LayerState, mask: Tensor | None
    ) -> tuple[Tensor, LayerState]:
        rnn = self.rnn
        output, *after = Steps.apply(
            self.cell, DenseProduct, DenseProduct, x, state, mask,
            rnn.weight_ih, rnn.weight_hh, rnn.bias_ih, rnn.bias_hh,
        )  # fmt: skip
        return output, tuple(after)


class SparseLayer(nn.Module):
    """An LSTM that has the kept weights alone, in torch.sparse's CSR format."""

    recurrent_name = "w_recurrent"

    def __init__(
        self,
        inputs: int,  # noqa: ARG002 - every layer takes it
        width: int,
        recipe: Recipe,
        kept: KeptWeights,
    ) -> None:
        super().__init__()
        gates = len(GATES[recipe.rnn]) * width
        self.input = KeptProduct(kept["input"])
        self.recurrent = KeptProduct(kept["recurrent"])
        limit = 1 / math.sqrt(width)  # as nn.LSTM starts
        self.w_input, self.w_recurrent, self.bias, self.recurrent_bias = (
            nn.Parameter(torch.empty(size).uniform_(-limit, limit))
            for size in (self.input.count, self.recurrent.count, gates, gates)
        )
        if not recipe.recurrent_bias:
            nn.init.zeros_(self.recurrent_bias).requires_grad_(False)

    def canonical(self) -> dict[str, Stored]:
        names = {
            "input": Stored(self.w_input, kept=self.input.kept),
            "recurrent": Stored(self.w_recurrent, kept=self.recurrent.kept),
            "bias": Stored(self.bias),
        }
        if self.recurrent_bias.requires_grad:
            names["recurrent_bias"] = Stored(self.recurrent_bias)
        return names

    def forward(
        self, x: Tensor, state: LayerState, mask: Tensor | None
    ) -> tuple[Tensor, LayerState]:
        w, u = self.input.matrix(self.w_input), self.recurrent.matrix(self.w_recurrent)
        bias = (self.bias + self.recurrent_bias)[:, None]
        h, c = (s.T for s in state)  # a sparse matrix multiplies columns
        outputs = []
        for x_t in x:
            dropped = h if mask is None else h * mask.T
            gates = torch.sparse.mm(w, x_t.T) + torch.sparse.mm(u, dropped) + bias
            i, f, g, o = gates.chunk(4)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            outputs.append(h.T)
        return torch.stack(outputs), (h.T.detach(), c.T.detach())


class TunedSparseLayer(SparseLayer):
    """The same, with one input product for all time steps and the derivative of `Steps`."""

    def forward(
        self, x: Tensor, state: LayerState, mask: Tensor | None
    ) -> tuple[Tensor, LayerState]:
        output, *after = Steps.apply(
            "lstm", self.input, self.recurrent, x, state, mask,
            self.w_input, self.w_recurrent, self.bias, self.recurrent_bias,
        )  # fmt: skip
        return output, tuple(after)


def call_layer(
    layer: Any, x: Tensor, state: LayerState, mask: Tensor | None, weight_mask: Tensor | None
) -> tuple[Tensor, LayerState]:
    """A layer's outputs and last state; see the module.

    Args:
        weight_mask: what multiplies its recurrent weights, of their parameter's shape; None: 1.
    """
    if weight_mask is None:
        return layer(x, state, mask)
    dropped = layer.get_parameter(layer.recurrent_name) * weight_mask
    return functional_call(layer, {layer.recurrent_name: dropped}, (x, state, mask))


def layer_class(recipe: Recipe, accelerator: Accelerator) -> type[nn.Module]:
    """The layer that computes the recipe's kernel as its implementation has it.

    nn.LSTM is oneDNN's on the CPU, and all fused layers are cuDNN's on a GPU: nothing here beats
    them. nn.GRU and nn.RNN on the CPU are time steps differentiated one by one.
    """
    tuned = recipe.implementation == "tuned"
    if recipe.kernel == "sparse":
        return TunedSparseLayer if tuned else SparseLayer
    if recipe.kernel == "fused" and not recipe.recurrent_dropout:
        beaten = recipe.rnn != "lstm" and accelerator == "cpu"
        return TunedLayer if tuned and beaten else FusedLayer
    return TunedLayer if tuned else CellLayer
