"""What a framework must provide to be compared: the `Backend` class.

Shared by all backends and free of any framework: parameter names and shapes, the optimizers'
definition, the scale of the objective, and how a batch is shared among devices. The loop that
calls it is `training/loop.py`, the suites that check it are `tests/contract` and `tests/parity`.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from ptbench.configuration.models import Accelerator, Recipe

Tokens = npt.NDArray[np.int32]  # [time, batch], word identifiers
Mask = npt.NDArray[np.float32]  # [time, batch], 1 for a token that counts and 0 for padding
Parameters = dict[str, npt.NDArray[np.float32]]
# Recurrent state, opaque to the loop. Never written in place by a step: the loop may keep one.
State = Any
# A number that may still be on its way from the device; float() of it waits for it.
Scalar = Any


class TrainStep(NamedTuple):
    """What one training step returns; the scalars are fetched rarely, never per step."""

    nll: Scalar  # summed negative log-likelihood of the batch's real tokens [nats]
    gradient_norm: Scalar  # global norm of the objective's gradient before clipping
    state: State


class EvaluateStep(NamedTuple):
    """What one evaluation step returns."""

    nll: Scalar  # summed negative log-likelihood of the batch's real tokens [nats]
    state: State


class Feature(NamedTuple):
    """How a framework provides one capability, for the report's ease-of-use table."""

    name: str  # what is provided, such as "gradient clipping by global norm"
    built_in: bool  # the framework had it; otherwise we wrote it
    how: str  # the public name used, or where our code is


# What every framework says of itself, in this order, so that the table has no gaps.
FEATURES = (
    "embedding",
    "LSTM layer",
    "GRU and simple recurrent layers",
    "explicit time steps",
    "sparse LSTM",
    "mixture of softmaxes",
    "weight tying and factorised output",
    "dropout",
    "locked dropout",
    "word dropout",
    "recurrent dropout",
    "weight dropout",
    "activation regularisation",
    "softmax cross-entropy",
    "SGD",
    "Adam",
    "RMSProp",
    "averaged SGD",
    "weight decay",
    "gradient clipping by global norm",
    "uniform initialisation",
    "Keras' default initialisation",
    "learning-rate change",
    "data parallel",
    "truncated back-propagation with carried state",
    "deterministic per-step randomness",
    "saving parameters",
)

# cell: its gates, in the order in which parameters hold them
GATES = {
    "lstm": ("input", "forget", "candidate", "output"),
    "gru": ("reset", "update", "candidate"),
    "rnn_tanh": ("candidate",),
    "rnn_relu": ("candidate",),
}

KEPT_WEIGHTS_STREAM = 1  # tells the draw of kept weights from that of parameters with one seed

# optimizer: the arrays it keeps for each parameter, of the parameter's shape; zero at first
OPTIMIZER_SLOTS = {
    "sgd": (),
    "adam": ("first_moment", "second_moment"),
    "rmsprop": ("mean_square",),
    "asgd": ("average",),
}


class Backend(abc.ABC):
    """One language model in one framework, with its optimizer, on `devices` replicas.

    The model, with w_t the word at time t and every width as the recipe has it:

    1. x_t is row w_t of the embedding, dropped with `unit_dropout[0]`. With `word_dropout`, whole
       rows are dropped first: one draw for every word type and training step (Merity et al. 2017,
       arXiv:1708.02182, section 4.3).
    2. L recurrent layers, layer l's output dropped with `unit_dropout[l + 1]` (Zaremba, Sutskever
       and Vinyals 2014, arXiv:1409.2329, section 3). With U the recurrent weights, W the input
       weights, b the bias and r the recurrent bias (zero where the recipe has none):

       - lstm: i, f, g, o = W x + b + U h + r; c' = sigma(f) c + sigma(i) tanh(g);
         h' = sigma(o) tanh(c')
       - gru (cuDNN's: reset after the product): r, z, n with
         n = tanh(W_n x + b_n + sigma(r) (U_n h + r_n)); h' = (1 - sigma(z)) n + sigma(z) h
       - rnn_tanh, rnn_relu: h' = tanh or relu (W x + b + U h + r)

       With `recurrent_dropout`, U multiplies h after units of it are dropped, the same for all
       gates and all time steps of the window (Gal and Ghahramani 2016, arXiv:1512.05287); h itself
       is carried whole. With `weight_dropout`, weights of U are dropped, the same ones for all of
       the batch and window (Merity et al. 2017, section 2): one draw for every training step.
    3. v_t is the last layer's (dropped) output. With K = `mixtures` > 0 (Yang et al. 2018,
       arXiv:1711.03953): K latents tanh(W_k v_t + b_k), each dropped with `latent_dropout`, take
       its place, and the prior over them is softmax(P v_t), without bias.
    4. Behind `softmax.projection`, where there is one, logits are the output matrix times v_t, or
       times each latent, plus the bias; log-probabilities are log sum_k prior_k softmax_k, in log
       space throughout.

    The objective adds to the nll of each real token, before it is divided (`objective_divisor`),
    `activation_regularization` times the mean square of v_t, and
    `temporal_activation_regularization` times the mean square of h_t - h_{t-1} of the last layer
    before dropout, if the token before it in the window is real, too (Merity et al. 2017, section
    4.6; means are over units). A step's `nll` is without them.

    What is dropped becomes 0 and what is kept is divided by the probability of keeping it. Masks
    are drawn anew for every training step; with `dropout_kind: locked` those of units and latents
    are the same at all time steps of the window.

    Weights that `kept_weights` leaves out are zero from the start and stay so: their gradients
    are zero, and are no part of any norm.

    Parameters have canonical names and shapes, whatever the framework stores; see
    `parameter_shapes`.

    Everything random after the initial draw is a function of (seed, `self.step`) alone, so that a
    run restored from a snapshot repeats the uninterrupted one.

    Inputs, targets and masks are C-contiguous NumPy arrays [time, global batch] that the caller may
    overwrite once a step has returned. Device r of N gets the r-th contiguous block of columns.
    Evaluation runs on the first device alone.
    """

    name: ClassVar[str]  # as in the registry
    package: ClassVar[str]  # what the framework is imported as, such as "torch"
    features: ClassVar[tuple[Feature, ...]]  # named as in FEATURES

    step: int  # training steps taken

    def __init__(
        self,
        recipe: Recipe,
        vocabulary_size: int,
        devices: int = 1,
        seed: int = 0,
        accelerator: Accelerator = "cpu",
        threads: int = 1,
    ) -> None:
        """Build the model on its devices with `initialization: native` parameters.

        Parameters that are to be shared among frameworks are loaded by the caller.

        Args:
            recipe: model, objective and optimizer.
            vocabulary_size: number of word types.
            devices: data-parallel replicas; on the CPU they share its `threads`.
            seed: of the native initial draw and of dropout.
            accelerator: kind of device.
            threads: CPU threads for all replicas together.

        Raises:
            PtbenchError: if there are not exactly `devices` devices of that kind to use.
        """
        self.recipe = recipe
        self.vocabulary_size = vocabulary_size
        self.devices = devices
        self.seed = seed
        self.accelerator = accelerator
        self.threads = threads
        self.step = 0

    @abc.abstractmethod
    def parameters(self) -> Parameters:
        """A copy of all parameters under their canonical names and shapes."""

    @abc.abstractmethod
    def load_parameters(self, parameters: Mapping[str, npt.NDArray[Any]]) -> None:
        """Replace all parameters on every device; names and shapes must be the canonical ones."""

    @abc.abstractmethod
    def initial_state(self, batch_size: int, training: bool) -> State:
        """Zero recurrent state for `batch_size` streams.

        A state for training is given to `train_step` and `gradients` and may be spread over the
        devices; any other is given to `evaluate_step` and `next_token_log_probabilities` and lies
        on the first device.
        """

    @abc.abstractmethod
    def gradients(self, inputs: Tokens, targets: Tokens, mask: Mask, state: State) -> Parameters:
        """Gradient of the objective on the global batch, before clipping, by canonical name.

        Uses the very code that `train_step` differentiates, dropout of the next step included;
        changes nothing.
        """

    @abc.abstractmethod
    def train_step(
        self,
        inputs: Tokens,
        targets: Tokens,
        mask: Mask,
        state: State,
        learning_rate: float,
        averaged: int = 1,
    ) -> TrainStep:
        """One optimizer update on the global batch, clipped once over all parameters.

        With g the clipped gradient plus `weight_decay` times the parameter p, t the steps taken
        with this one, and everything elementwise:

        - sgd: p -= rate g
        - adam (Kingma and Ba 2015, arXiv:1412.6980, algorithm 1): m = beta1 m + (1 - beta1) g;
          v = beta2 v + (1 - beta2) g^2;
          p -= rate m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + epsilon)
        - rmsprop (Hinton 2012, lecture 6e; epsilon placed as in Keras 2.1.3 and torch.optim):
          s = decay s + (1 - decay) g^2; p -= rate g / (sqrt(s) + epsilon)
        - asgd (Polyak and Juditsky 1992): p -= rate g; then a = (1 - 1 / n) a + p / n, where n is
          `averaged`, the number of steps whose parameters the mean a is of, this one's included;
          with n = 1 a is p exactly. Nothing but the snapshot shows a.
        """

    @abc.abstractmethod
    def evaluate_step(
        self, inputs: Tokens, targets: Tokens, mask: Mask, state: State
    ) -> EvaluateStep:
        """Negative log-likelihood without dropout; changes no parameter."""

    @abc.abstractmethod
    def next_token_log_probabilities(
        self, inputs: Tokens, state: State
    ) -> tuple[npt.NDArray[np.float32], State]:
        """Log-probabilities [time, batch, vocabulary] of each next word, without dropout."""

    @abc.abstractmethod
    def snapshot(self, state: State) -> dict[str, npt.NDArray[Any]]:
        """All that a resumed run needs, as arrays of its own.

        Each `parameter.{name}`, each slot of the optimizer as `optimizer.{slot}.{name}` (see
        `OPTIMIZER_SLOTS`) in the parameter's canonical shape, `step`, and the recurrent state of
        all devices together as `state_names` has it, each [global batch, width].
        """

    @abc.abstractmethod
    def restore(self, snapshot: Mapping[str, npt.NDArray[Any]]) -> State:
        """Undo to `snapshot`; returns the recurrent state that was saved with it."""

    @abc.abstractmethod
    def synchronize(self) -> None:
        """Return when every device has finished all it was given; clocks stop after this."""

    @abc.abstractmethod
    def device_names(self) -> list[str]:
        """One name for each replica's device, such as `cpu:0` or `NVIDIA H200`."""

    def peak_device_memory(self) -> int | None:
        """Largest memory that any device gave to this process so far [bytes].

        By the framework's own count; None where there is none, as on CPUs.
        """
        return None

    def settings(self) -> dict[str, str]:
        """Settings that change speed or rounding (threads, product kernels), for provenance."""
        return {}

    def close(self) -> None:  # noqa: B027 - most frameworks have nothing to release
        """Release processes and devices. The backend is unusable afterwards."""


def parameter_shapes(recipe: Recipe, vocabulary_size: int) -> dict[str, tuple[int, ...]]:
    """Canonical names and shapes, in canonical order.

    - `embedding` [vocabulary, embedding]
    - for each layer l from 0, with its gates side by side in the order of `GATES`:
      `rnn.{l}.input` [inputs, gates x width], `rnn.{l}.recurrent` [width, gates x width],
      `rnn.{l}.bias` [gates x width], and with `recurrent_bias` `rnn.{l}.recurrent_bias`
    - with mixtures: `latent.weight` [width, mixtures x latent] and `latent.bias`, one mixture after
      the other, and `prior.weight` [width, mixtures]
    - `softmax.projection` [width or latent, rank], where the output matrix is factorised, or tied
      to an embedding of another width
    - `softmax.weight` [vocabulary, width, latent or rank], unless the embedding is in its place
    - `softmax.bias` [vocabulary], if the recipe has one
    """
    shapes: dict[str, tuple[int, ...]] = {"embedding": (vocabulary_size, recipe.embedding_size)}
    inputs = recipe.embedding_size
    for layer, width in enumerate(recipe.widths):
        gates = len(GATES[recipe.rnn]) * width
        shapes[f"rnn.{layer}.input"] = (inputs, gates)
        shapes[f"rnn.{layer}.recurrent"] = (width, gates)
        shapes[f"rnn.{layer}.bias"] = (gates,)
        if recipe.recurrent_bias:
            shapes[f"rnn.{layer}.recurrent_bias"] = (gates,)
        inputs = width
    features = inputs
    if recipe.mixtures:
        features = inputs if recipe.latent_size is None else recipe.latent_size
        shapes["latent.weight"] = (inputs, recipe.mixtures * features)
        shapes["latent.bias"] = (recipe.mixtures * features,)
        shapes["prior.weight"] = (inputs, recipe.mixtures)
    rank = recipe.embedding_size if recipe.tie_weights else recipe.output_rank
    if recipe.output_rank is not None or (recipe.tie_weights and rank != features):
        assert rank is not None
        shapes["softmax.projection"] = (features, rank)
        features = rank
    if not recipe.tie_weights:
        shapes["softmax.weight"] = (vocabulary_size, features)
    if recipe.softmax_bias:
        shapes["softmax.bias"] = (vocabulary_size,)
    return shapes


def state_names(recipe: Recipe) -> dict[str, int]:
    """The arrays of a snapshot's recurrent state and the width of each: `state.{layer}.h` of every
    layer, each followed by `state.{layer}.c` in an LSTM.
    """
    kinds = ("h", "c") if recipe.rnn == "lstm" else ("h",)
    return {f"state.{n}.{k}": width for n, width in enumerate(recipe.widths) for k in kinds}


def kept_count(recipe: Recipe, name: str, shape: tuple[int, ...]) -> int:
    """Trainable numbers in the parameter of that canonical name and shape."""
    count = math.prod(shape)
    if recipe.kept_weights == 1 or name.rpartition(".")[2] not in ("input", "recurrent"):
        return count
    gates = len(GATES[recipe.rnn])
    return gates * max(round(recipe.kept_weights * count / gates), 1)


def parameter_count(recipe: Recipe, vocabulary_size: int) -> int:
    """Number of trainable numbers in the model."""
    shapes = parameter_shapes(recipe, vocabulary_size)
    return sum(kept_count(recipe, name, shape) for name, shape in shapes.items())


def kept_weights(
    recipe: Recipe, vocabulary_size: int, seed: int
) -> dict[str, npt.NDArray[np.bool_]]:
    """Which weights a sparse model has, for every `rnn.{l}.input` and `rnn.{l}.recurrent`.

    Exactly `kept_count` of them, as many in each gate's matrix, a function of (recipe's shapes,
    seed) alone and so the same in every framework. Empty for a dense model.
    """
    masks: dict[str, npt.NDArray[np.bool_]] = {}
    if recipe.kept_weights == 1:
        return masks
    gates = len(GATES[recipe.rnn])
    rng = np.random.default_rng([seed, KEPT_WEIGHTS_STREAM])
    for name, shape in parameter_shapes(recipe, vocabulary_size).items():
        if name.rpartition(".")[2] not in ("input", "recurrent"):
            continue
        inputs, width = shape[0], shape[1] // gates
        masks[name] = np.zeros(shape, np.bool_)
        for gate in range(gates):
            drawn = smallest_draws(rng, inputs * width, kept_count(recipe, name, shape) // gates)
            rows, columns = np.divmod(drawn, width)
            masks[name][rows, gate * width + columns] = True
    return masks


def smallest_draws(
    rng: np.random.Generator, size: int, count: int, chunk: int = 1 << 20
) -> npt.NDArray[np.int64]:
    """Where the `count` smallest of `size` uniform numbers are, drawn one after another.

    A set of that many, any as likely as any other. Of equal numbers the first is smaller. Takes
    memory for `count` and for `chunk` numbers, not for `size`: a sparse model's matrix may be much
    larger than what it keeps.
    """
    places = np.zeros(0, np.int64)
    numbers = np.zeros(0)
    for start in range(0, size, chunk):
        # rng.random is the one draw that every NumPy version gives alike
        drawn = rng.random(min(chunk, size - start))
        below = (
            np.flatnonzero(drawn < numbers[-1]) if len(numbers) == count else np.arange(len(drawn))
        )
        numbers = np.concatenate([numbers, drawn[below]])
        places = np.concatenate([places, start + below])
        order = np.argsort(numbers, kind="stable")[:count]
        numbers, places = numbers[order], places[order]
    return places


def check_parameters(
    parameters: Mapping[str, npt.NDArray[Any]], recipe: Recipe, vocabulary_size: int
) -> None:
    """Raise ValueError unless `parameters` has exactly the canonical names and shapes.

    Weights that the recipe leaves out may be anything: a backend holds them at zero.
    """
    expected = parameter_shapes(recipe, vocabulary_size)
    if missing := sorted(expected.keys() - parameters.keys()):
        raise ValueError(f"parameters lack {', '.join(missing)}")
    if unknown := sorted(parameters.keys() - expected.keys()):
        raise ValueError(f"parameters have {', '.join(unknown)}, which the model does not")
    for name, shape in expected.items():
        if parameters[name].shape != shape:
            raise ValueError(f"{name} has shape {parameters[name].shape}; the model has {shape}")


def objective_divisor(recipe: Recipe, mask: Mask) -> float:
    """What the summed nll of a global batch is divided by to give the objective.

    `sum_over_time` divides by the batch size alone, so the loss is summed over the window's steps;
    `mean_per_token` divides by the number of real tokens.

    Args:
        mask: [time, global batch].
    """
    if recipe.objective == "sum_over_time":
        return float(mask.shape[1])
    return max(float(mask.sum()), 1.0)


def slot_names(recipe: Recipe, vocabulary_size: int) -> list[tuple[str, str]]:
    """Slot and parameter of each array that the optimizer keeps, in canonical order."""
    names = parameter_shapes(recipe, vocabulary_size)
    return [(slot, name) for slot in OPTIMIZER_SLOTS[recipe.optimizer] for name in names]


def rate_and_epsilon(recipe: Recipe, learning_rate: float, step: int) -> tuple[float, float]:
    """The rate and epsilon of an update p -= rate m / (sqrt(v) + epsilon), the step's own.

    For Adam both contain the corrections of the moments' bias (Kingma and Ba 2015, the end of
    section 2), so that the update is that of algorithm 1. Formed here in double precision, because
    1 - beta2^t loses five digits in single.

    Args:
        step: steps taken before this one.
    """
    if recipe.optimizer != "adam":
        return learning_rate, recipe.optimizer_epsilon
    first = 1 - recipe.adam_beta1 ** (step + 1)
    second = math.sqrt(1 - recipe.adam_beta2 ** (step + 1))
    return learning_rate * second / first, recipe.optimizer_epsilon * second


def device_columns(batch_size: int, devices: int) -> list[slice]:
    """The contiguous block of batch columns that each device gets."""
    if batch_size % devices:
        raise ValueError(f"a batch of {batch_size} does not divide by {devices} devices")
    share = batch_size // devices
    return [slice(r * share, (r + 1) * share) for r in range(devices)]
