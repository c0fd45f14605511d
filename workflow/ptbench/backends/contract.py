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
    "dropout",
    "softmax cross-entropy",
    "SGD",
    "Adam",
    "RMSProp",
    "weight decay",
    "gradient clipping by global norm",
    "uniform initialisation",
    "learning-rate change",
    "data parallel",
    "truncated back-propagation with carried state",
    "deterministic per-step randomness",
    "saving parameters",
)

# optimizer: the arrays it keeps for each parameter, of the parameter's shape; zero at first
OPTIMIZER_SLOTS = {
    "sgd": (),
    "adam": ("first_moment", "second_moment"),
    "rmsprop": ("mean_square",),
}


class Backend(abc.ABC):
    """One language model in one framework, with its optimizer, on `devices` replicas.

    The model (Zaremba, Sutskever and Vinyals 2014, arXiv:1409.2329, section 3): embedding, L
    recurrent layers, softmax; dropout on the embedding's and every layer's output, never on the
    recurrent connections. Parameters have canonical names and shapes, whatever the framework
    stores; see `parameter_shapes`.

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
        self, inputs: Tokens, targets: Tokens, mask: Mask, state: State, learning_rate: float
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
        `OPTIMIZER_SLOTS`) in the parameter's canonical shape, `step` and `state`.
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

    def settings(self) -> dict[str, str]:
        """Settings that change speed or rounding (threads, product kernels), for provenance."""
        return {}

    def close(self) -> None:  # noqa: B027 - most frameworks have nothing to release
        """Release processes and devices. The backend is unusable afterwards."""


def parameter_shapes(recipe: Recipe, vocabulary_size: int) -> dict[str, tuple[int, ...]]:
    """Canonical names and shapes, in canonical order.

    `embedding` [vocabulary, embedding]; for each layer l from 0, `rnn.{l}.input`
    [inputs, 4 hidden], `rnn.{l}.recurrent` [hidden, 4 hidden] and `rnn.{l}.bias` [4 hidden], with
    the gates in the order input, forget, candidate, output; `softmax.weight` [vocabulary, hidden]
    and `softmax.bias` [vocabulary].
    """
    shapes: dict[str, tuple[int, ...]] = {"embedding": (vocabulary_size, recipe.embedding_size)}
    inputs = recipe.embedding_size
    for layer in range(recipe.layers):
        shapes[f"rnn.{layer}.input"] = (inputs, 4 * recipe.hidden_size)
        shapes[f"rnn.{layer}.recurrent"] = (recipe.hidden_size, 4 * recipe.hidden_size)
        shapes[f"rnn.{layer}.bias"] = (4 * recipe.hidden_size,)
        inputs = recipe.hidden_size
    shapes["softmax.weight"] = (vocabulary_size, recipe.hidden_size)
    shapes["softmax.bias"] = (vocabulary_size,)
    return shapes


def parameter_count(recipe: Recipe, vocabulary_size: int) -> int:
    """Number of trainable numbers in the model."""
    return sum(int(np.prod(s)) for s in parameter_shapes(recipe, vocabulary_size).values())


def check_parameters(
    parameters: Mapping[str, npt.NDArray[Any]], recipe: Recipe, vocabulary_size: int
) -> None:
    """Raise ValueError unless `parameters` has exactly the canonical names and shapes."""
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
