"""The language model in PyTorch, of torch.nn's layers and torch.optim's optimizers.

`Backend` defines it. Tensors are [time, batch, ...]. Initial values are not drawn here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn import functional

from ptbench.model.parameters import parameter_shapes
from ptbench.model.recipe import Recipe

LayerState = tuple[Tensor, ...]  # (h, c) of an LSTM, (h,) of other layers; each [batch, width]
LayerOutputs = tuple[Tensor, LayerState]  # at all time steps, [time, batch, width]; the last state

FUSED: dict[str, Any] = {
    "lstm": nn.LSTM, "gru": nn.GRU, "rnn_tanh": nn.RNN, "rnn_relu": nn.RNN
}  # fmt: skip
STEPWISE: dict[str, Any] = {
    "lstm": nn.LSTMCell, "gru": nn.GRUCell, "rnn_tanh": nn.RNNCell, "rnn_relu": nn.RNNCell
}  # fmt: skip
OPTIONS = {"rnn_tanh": {"nonlinearity": "tanh"}, "rnn_relu": {"nonlinearity": "relu"}}


class Dropout(nn.Module):
    """Drop words, units, previous outputs, recurrent weights and latents, in training alone.

    Words and weights are the same on all replicas and have a generator of their own. Everything
    else differs between replicas and comes from PyTorch's default generator.
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.common = torch.Generator()

    def seed(self, seed: int, step: int, replica: int, device: torch.device) -> None:
        """Make the draws of the next forward pass a function of these numbers."""
        own = np.random.SeedSequence([seed, step, replica])
        torch.manual_seed(int(own.generate_state(1, np.uint64)[0]))
        common = np.random.SeedSequence([seed, step], spawn_key=(1,))
        self.common = torch.Generator(device)
        self.common.manual_seed(int(common.generate_state(1, np.uint64)[0]))

    def common_mask(self, shape: tuple[int, ...], rate: float) -> Tensor:
        """Draw a mask, 0 or 1 / (1 - rate), that is the same on all replicas."""
        mask = torch.empty(shape, device=self.common.device)
        return mask.bernoulli_(1 - rate, generator=self.common).div_(1 - rate)

    def words(self, rows: Tensor, inputs: Tensor, vocabulary_size: int) -> Tensor:
        """Drop the embedding's rows [time, batch, width] of dropped words."""
        rate = self.recipe.word_dropout
        if not (self.training and rate):
            return rows
        return rows * self.common_mask((vocabulary_size, 1), rate)[inputs]

    def units(self, x: Tensor, rate: float) -> Tensor:
        """Drop units of x [time, batch, ...], with `locked` the same at all time steps."""
        if not (self.training and rate):
            return x
        if self.recipe.dropout_kind == "locked":
            return x * functional.dropout(torch.ones_like(x[:1]), rate)
        return functional.dropout(x, rate)

    def recurrent(self, h: Tensor) -> Tensor | None:
        """Return the mask of a layer's previous output h [batch, width]; None: nothing drops."""
        rate = self.recipe.recurrent_dropout
        if not (self.training and rate):
            return None
        # ones_like would have the strides of h, and which units drop would depend on them
        return functional.dropout(h.new_ones(h.shape), rate)

    def weights(self, layer: Any) -> dict[str, Tensor]:
        """Return a layer's recurrent weights, some dropped, by parameter name; {}: none drop."""
        rate = self.recipe.weight_dropout
        if not (self.training and rate):
            return {}
        weights = layer.get_parameter(layer.recurrent_weights)
        return {layer.recurrent_weights: weights * self.common_mask(weights.shape, rate)}


class FusedLayer(nn.Module):
    """nn.LSTM, nn.GRU or nn.RNN: by cuDNN on a GPU, by oneDNN for an LSTM on the CPU.

    Every layer takes x [time, batch, inputs] and the mask [batch, width] of the previous output.
    """

    recurrent_weights = "rnn.weight_hh_l0"

    def __init__(self, recipe: Recipe, inputs: int, width: int) -> None:
        super().__init__()
        self.rnn = FUSED[recipe.rnn](inputs, width, **OPTIONS.get(recipe.rnn, {}))

    def forward(self, x: Tensor, state: LayerState, mask: Tensor | None) -> LayerOutputs:
        assert mask is None, "it cannot drop previous outputs"
        first = tuple(each[None] for each in state)  # for one layer and direction
        if len(first) == 2:
            outputs, last = self.rnn(x, first)
        else:
            outputs, *last = self.rnn(x, *first)
        return outputs, tuple(each[0] for each in last)


class StepwiseLayer(nn.Module):
    """nn.LSTMCell, nn.GRUCell or nn.RNNCell at each time step."""

    recurrent_weights = "rnn.weight_hh"

    def __init__(self, recipe: Recipe, inputs: int, width: int) -> None:
        super().__init__()
        self.rnn = STEPWISE[recipe.rnn](inputs, width, **OPTIONS.get(recipe.rnn, {}))

    def forward(self, x: Tensor, state: LayerState, mask: Tensor | None) -> LayerOutputs:
        outputs = []
        for x_t in x:
            h = state[0] if mask is None else state[0] * mask
            if len(state) == 2:
                state = self.rnn(x_t, (h, state[1]))
            elif mask is not None and isinstance(self.rnn, nn.GRUCell):
                state = (self.gru_step(x_t, h, state[0]),)
            else:
                state = (self.rnn(x_t, h),)
            outputs.append(state[0])
        return torch.stack(outputs), state

    def gru_step(self, x: Tensor, dropped: Tensor, carried: Tensor) -> Tensor:
        """Return the next output; nn.GRUCell cannot carry another h than it multiplies."""
        rnn = self.rnn
        x_r, x_z, x_n = functional.linear(x, rnn.weight_ih, rnn.bias_ih).chunk(3, -1)
        u_r, u_z, u_n = functional.linear(dropped, rnn.weight_hh, rnn.bias_hh).chunk(3, -1)
        r, z = torch.sigmoid(x_r + u_r), torch.sigmoid(x_z + u_z)
        return (1 - z) * torch.tanh(x_n + r * u_n) + z * carried


class SparseMatrix(nn.Module):
    """A matrix of which some weights exist, for torch.sparse's products."""

    def __init__(self, kept: npt.NDArray[np.bool_]) -> None:
        """Args: kept: which weights exist, [inputs, outputs]."""
        super().__init__()
        count = int(kept.sum())
        self.weight = nn.Parameter(torch.zeros(count))
        numbers = np.zeros(kept.T.shape, np.int32)  # of the weights, from 1
        numbers[kept.T] = np.arange(1, count + 1)
        self.pattern = Pattern(numbers)
        self.transposed = Pattern(numbers.T)

    def forward(self, x: Tensor) -> Tensor:
        """Return the product with x [inputs, batch]."""
        return SparseProduct.apply(self.weight, x, self.pattern, self.transposed)


class Pattern(nn.Module):
    """Which entries of a matrix exist, row by row (CSR)."""

    def __init__(self, numbers: npt.NDArray[np.int32]) -> None:
        """Args: numbers: which weight an entry is, from 1, and 0 where there is none."""
        super().__init__()
        csr = torch.from_numpy(np.ascontiguousarray(numbers)).to_sparse_csr()
        self.shape = csr.shape
        # MKL takes int32
        self.register_buffer("starts", csr.crow_indices().int(), persistent=False)
        self.register_buffer("columns", csr.col_indices().int(), persistent=False)
        self.register_buffer("order", csr.values().long() - 1, persistent=False)

    def filled(self, values: Tensor) -> Tensor:
        """Return the matrix with these values, row by row."""
        return torch.sparse_csr_tensor(
            self.starts, self.columns, values, self.shape, check_invariants=False
        )


class SparseProduct(torch.autograd.Function):
    """The product of a sparse matrix with a dense one.

    PyTorch's own derivative computes every entry of the matrix's gradient, also those that do not
    exist, which takes five times as long on a CPU and fails on GPUs (torch 2.11).
    """

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, x: Tensor, pattern: Pattern, transposed: Pattern
    ) -> Tensor:
        ctx.save_for_backward(weight, x)
        ctx.patterns = pattern, transposed
        return torch.sparse.mm(pattern.filled(weight), x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        weight, x = ctx.saved_tensors
        pattern, transposed = ctx.patterns
        d_y = d_y.contiguous()
        nothing = pattern.filled(torch.zeros_like(weight))
        d_matrix = torch.sparse.sampled_addmm(nothing, d_y, x.T, beta=0.0)
        d_x = torch.sparse.mm(transposed.filled(weight[transposed.order]), d_y)
        return d_matrix.values(), d_x, None, None


class SparseLayer(nn.Module):
    """An LSTM whose products are with the kept weights alone."""

    recurrent_weights = "recurrent.weight"

    def __init__(
        self, width: int, kept_input: npt.NDArray[np.bool_], kept_recurrent: npt.NDArray[np.bool_]
    ) -> None:
        super().__init__()
        self.input, self.recurrent = SparseMatrix(kept_input), SparseMatrix(kept_recurrent)
        self.bias = nn.Parameter(torch.zeros(4 * width))
        self.recurrent_bias = nn.Parameter(torch.zeros(4 * width))

    def forward(self, x: Tensor, state: LayerState, mask: Tensor | None) -> LayerOutputs:
        bias = (self.bias + self.recurrent_bias)[:, None]
        h, c = (each.T for each in state)  # a sparse matrix multiplies columns
        outputs = []
        for x_t in x:
            dropped = h if mask is None else h * mask.T
            i, f, g, o = (self.input(x_t.T) + self.recurrent(dropped) + bias).chunk(4)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            outputs.append(h.T)
        return torch.stack(outputs), (h.T, c.T)


def recurrent_layer(
    recipe: Recipe, index: int, inputs: int, kept: Mapping[str, npt.NDArray[np.bool_]]
) -> nn.Module:
    """Return the layer of that index, as the recipe's kernel computes it.

    nn.LSTM, nn.GRU and nn.RNN cannot drop previous outputs: with `recurrent_dropout`, `fused` is
    `stepwise`.
    """
    width = recipe.widths[index]
    layer: nn.Module
    if recipe.kernel == "sparse":
        layer = SparseLayer(width, kept[f"rnn.{index}.input"], kept[f"rnn.{index}.recurrent"])
    elif recipe.kernel == "fused" and not recipe.recurrent_dropout:
        layer = FusedLayer(recipe, inputs, width)
    else:
        layer = StepwiseLayer(recipe, inputs, width)
    if not recipe.recurrent_bias:  # PyTorch's layers always have a second bias
        for name, parameter in layer.named_parameters():
            if canonical_name(name) == "recurrent_bias":
                nn.init.zeros_(parameter).requires_grad_(False)
    return layer


def in_bfloat16(
    layer: nn.Module, weights: dict[str, Tensor], x: Tensor, state: LayerState, mask: Tensor | None
) -> LayerOutputs:
    """Call a recurrent layer on what is rounded to bfloat16; return its results as float32.

    Without torch.autocast, to which each kind of layer is another case: it rounds what nn.LSTM
    carries on a CPU, and not what nn.LSTMCell does.

    Args:
        weights: those that take the place of the layer's own, by name.
    """
    weights = dict(layer.named_parameters()) | weights
    given = {name: weight.bfloat16() for name, weight in weights.items()}
    first = tuple(each.bfloat16() for each in state)
    mask = None if mask is None else mask.bfloat16()
    outputs, last = functional_call(layer, given, (x.bfloat16(), first, mask))
    return outputs.float(), tuple(each.float() for each in last)


class Head(nn.Module):
    """From the last layer's output to features, log-prior and logits.

    Args:
        embedding: the matrix that is the output matrix, too, if the recipe ties them.
    """

    def __init__(self, recipe: Recipe, vocabulary_size: int, embedding: nn.Parameter) -> None:
        super().__init__()
        shapes = parameter_shapes(recipe, vocabulary_size)
        self.mixtures, self.latent_dropout = recipe.mixtures, recipe.latent_dropout
        if recipe.mixtures:
            self.latent = nn.Linear(*shapes["latent.weight"])
            self.prior = nn.Linear(*shapes["prior.weight"], bias=False)
        self.projection: nn.Module = nn.Identity()
        if "softmax.projection" in shapes:
            self.projection = nn.Linear(*shapes["softmax.projection"], bias=False)
        features = shapes.get("softmax.weight", shapes["embedding"])[1]
        self.softmax = nn.Linear(features, vocabulary_size, bias=recipe.softmax_bias)
        if recipe.tie_weights:
            self.softmax.weight = embedding

    def forward(self, v: Tensor, dropout: Dropout) -> tuple[Tensor, Tensor]:
        """Return what `softmax` turns into logits, [time, batch, mixtures or 1, features], and the
        logarithm of the prior, [time, batch, mixtures or 1].
        """
        if not self.mixtures:
            return self.projection(v)[:, :, None], v.new_zeros((*v.shape[:2], 1))
        latents = torch.tanh(self.latent(v).float()).unflatten(-1, (self.mixtures, -1))
        log_prior = functional.log_softmax(self.prior(v).float(), dim=-1)
        return self.projection(dropout.units(latents, self.latent_dropout)), log_prior


def nll(
    features: Tensor, log_prior: Tensor, softmax: nn.Linear, targets: Tensor, weights: Tensor
) -> Tensor:
    """Return the targets' negative log-likelihoods [nats], each times its weight, summed.

    Args:
        features: [time, batch, mixtures or 1, features].
        log_prior: [time, batch, mixtures or 1].
        softmax: turns features into logits.
        targets: [time, batch].
        weights: [time, batch].
    """
    logits = softmax(features).float()
    each = targets[..., None].expand(log_prior.shape)
    nll_of_components = functional.cross_entropy(
        logits.flatten(0, 2), each.flatten(), reduction="none"
    )
    log_p = torch.logsumexp(log_prior - nll_of_components.view(log_prior.shape), dim=-1)
    return -(log_p * weights).sum()


def log_probabilities(features: Tensor, log_prior: Tensor, softmax: nn.Linear) -> Tensor:
    """Return log-probabilities [time, batch, vocabulary], for arguments as in `nll`."""
    steps = []
    for x, log_prior_t in zip(features, log_prior, strict=True):  # all at once would be too large
        log_components = functional.log_softmax(softmax(x).float(), dim=-1)
        steps.append(torch.logsumexp(log_prior_t[..., None] + log_components, dim=1))
    return torch.stack(steps)


def penalty(recipe: Recipe, dropped: Tensor, undropped: Tensor, weights: Tensor) -> Tensor:
    """Return both activation regularisations, each token's times its weight, summed.

    Args:
        dropped: the last layer's outputs [time, batch, width] after dropout.
        undropped: the same before dropout.
        weights: [time, batch]; 0 where there is no token.
    """
    if not recipe.penalizes:
        return dropped.new_zeros(())
    squares = dropped.square().mean(-1)
    changes = undropped.diff(dim=0).square().mean(-1)
    both_real = torch.minimum(weights[1:], weights[:-1])
    activation, change = (squares * weights).sum(), (changes * both_real).sum()
    of_changes = recipe.temporal_activation_regularization
    return recipe.activation_regularization * activation + of_changes * change


class LanguageModel(nn.Module):
    """The model.

    Args:
        kept: which weights a sparse model has, by canonical name.
        nll: what computes the loss; see `nll`.
    """

    def __init__(
        self,
        recipe: Recipe,
        vocabulary_size: int,
        kept: Mapping[str, npt.NDArray[np.bool_]],
        nll: Callable[..., Tensor] = nll,
    ) -> None:
        super().__init__()
        self.recipe, self.nll = recipe, nll
        self.embedding = nn.Embedding(vocabulary_size, recipe.embedding_size)
        inputs = [recipe.embedding_size, *recipe.widths[:-1]]
        self.layers = nn.ModuleList(
            recurrent_layer(recipe, index, size, kept) for index, size in enumerate(inputs)
        )
        self.head = Head(recipe, vocabulary_size, self.embedding.weight)
        self.dropout = Dropout(recipe)

    def forward(
        self, inputs: Tensor, targets: Tensor, weights: Tensor, state: list[LayerState]
    ) -> tuple[Tensor, Tensor, list[LayerState]]:
        """Return the weighted nll, the weighted penalty, and the last state, cut off from them.

        Args:
            inputs, targets: [time, batch].
            weights: what each token's loss is multiplied by, [time, batch].
            state: of every layer.
        """
        dropped, undropped, last = self.outputs(inputs, state)
        with self.autocast(inputs.device):
            features, log_prior = self.head(dropped, self.dropout)
            loss = self.nll(features, log_prior, self.head.softmax, targets, weights)
        return loss, penalty(self.recipe, dropped, undropped, weights), last

    def log_probabilities(
        self, inputs: Tensor, state: list[LayerState]
    ) -> tuple[Tensor, list[LayerState]]:
        """Return log-probabilities [time, batch, vocabulary] of next words, and the last state."""
        dropped, _, last = self.outputs(inputs, state)
        with self.autocast(inputs.device):
            features, log_prior = self.head(dropped, self.dropout)
            return log_probabilities(features, log_prior, self.head.softmax), last

    def autocast(self, device: torch.device) -> torch.autocast:
        """Return the context in which linear layers compute in the recipe's precision."""
        return torch.autocast(device.type, torch.bfloat16, self.recipe.precision == "bfloat16")

    def outputs(
        self, inputs: Tensor, state: list[LayerState]
    ) -> tuple[Tensor, Tensor, list[LayerState]]:
        """Return the last layer's outputs, dropped and before dropout, and the last state."""
        rates = self.recipe.unit_dropout
        rows = self.dropout.words(self.embedding(inputs), inputs, self.embedding.num_embeddings)
        x = self.dropout.units(rows, rates[0])
        last = []
        for layer, before, rate in zip(self.layers, state, rates[1:], strict=True):
            weights, mask = self.dropout.weights(layer), self.dropout.recurrent(before[0])
            if self.recipe.precision == "bfloat16":
                outputs, after = in_bfloat16(layer, weights, x, before, mask)
            else:
                outputs, after = functional_call(layer, weights, (x, before, mask))
            last.append(tuple(each.detach() for each in after))
            x = self.dropout.units(outputs, rate)
        return x, outputs, last

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters by their canonical names."""
        return {canonical_name(n): p for n, p in self.named_parameters() if p.requires_grad}


def canonical_name(name: str) -> str:
    """Return the canonical name of a parameter that `named_parameters` calls `name`."""
    pytorch_names = {
        "embedding.weight": "embedding", "head.": "", "projection.weight": "softmax.projection",
        "layers.": "rnn.", "rnn.weight_": "weight_", "rnn.bias_": "bias_", "_l0": "",
        "weight_ih": "input", "weight_hh": "recurrent", "bias_ih": "bias",
        "bias_hh": "recurrent_bias", "input.weight": "input", "recurrent.weight": "recurrent",
    }  # fmt: skip
    for theirs, ours in pytorch_names.items():
        name = name.replace(theirs, ours)
    return name


# The contract's slots by torch.optim's names; `ax` is that of torch.optim.ASGD.
SLOTS = {
    "first_moment": "exp_avg",
    "second_moment": "exp_avg_sq",
    "mean_square": "square_avg",
    "average": "ax",
}


def optimizer(recipe: Recipe, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Return the recipe's optimizer; `average` does the rest of `asgd`.

    torch.optim.ASGD itself decides which steps its mean is of.
    """
    common: dict[str, Any] = {"lr": recipe.learning_rate, "weight_decay": recipe.weight_decay}
    epsilon = recipe.optimizer_epsilon
    if recipe.optimizer == "adam":
        betas = recipe.adam_beta1, recipe.adam_beta2
        return torch.optim.Adam(parameters, betas=betas, eps=epsilon, **common)
    if recipe.optimizer == "rmsprop":
        return torch.optim.RMSprop(parameters, alpha=recipe.rmsprop_decay, eps=epsilon, **common)
    return torch.optim.SGD(parameters, **common)


def clip(parameters: list[nn.Parameter], limit: float | None) -> Tensor:
    """Clip all gradients together and return their norm before.

    PyTorch divides by norm + 1e-6: at a limit of 0.1 the parameters are off by 2e-4 after ten steps
    of gradients of that size.
    """
    return nn.utils.clip_grad_norm_(parameters, math.inf if limit is None else limit)


@torch.no_grad()
def average(optimizer: torch.optim.Optimizer, averaged: int) -> None:
    """Bring asgd's mean up to date after a step, which makes it the mean of `averaged` steps."""
    for parameter, state in optimizer.state.items():
        if averaged == 1:
            state["ax"].copy_(parameter)  # lerp_ may give 0 for -0
        else:
            state["ax"].lerp_(parameter, 1 / averaged)
