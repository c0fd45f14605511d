"""What a framework must provide to be compared: the `Backend` class.

Names, shapes, storage and optimizer slots are in `ptbench.model`; the training loop that calls a
backend is `training/loop.py`; `tests/contract` and `tests/parity` check every backend.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from ptbench.corpus.batching import Batch
from ptbench.errors import PtbenchError
from ptbench.model.optimizers import OPTIMIZER_SLOTS
from ptbench.model.parameters import Layout, Parameters, check_parameters, kept_weights
from ptbench.model.recipe import Accelerator, Recipe
from ptbench.model.shapes import parameter_shapes, state_widths

Array = npt.NDArray[Any]
Arrays = Mapping[str, Array]  # by canonical name
# Recurrent state, opaque to the loop. A step never writes into the state that it is given: the loop
# may keep one.
State = Any
# A number that may still be on its way from the device; float() of it waits for it.
Scalar = Any

PARAMETER = "parameter"  # what `read` and `write` call the parameters, beside the optimizer's slots


@dataclass(frozen=True)
class Setup:
    """What a backend is made for."""

    recipe: Recipe
    vocabulary_size: int
    devices: int = 1  # data-parallel replicas; on the CPU they share the threads
    seed: int = 0  # of initial values, kept weights and dropout
    accelerator: Accelerator = "cpu"
    threads: int = 1  # CPU threads for all replicas together
    nodes: int = 1  # of a Slurm job, which the devices are shared out to

    @property
    def devices_here(self) -> int:
        """Return the devices on each node."""
        return self.devices // self.nodes


class TrainStep(NamedTuple):
    """What one training step returns; the scalars are fetched rarely, never per step."""

    nll: Scalar  # summed negative log-likelihood of the batch's real tokens [nats]
    gradient_norm: Scalar  # global norm of the objective's gradient before clipping
    state: State


class EvaluateStep(NamedTuple):
    """What one evaluation step returns."""

    nll: Scalar  # summed negative log-likelihood of the batch's real tokens [nats]
    state: State


class Operator(NamedTuple):
    """An operator of a framework, by its own profiler and under its own name."""

    name: str
    calls: int
    seconds: float  # of all calls together


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

    With `precision: bfloat16`, recurrent layers and products compute with operands that are rounded
    to it. Parameters, slots, states that are read, gradients and losses are float32 all the same.

    Weights that `kept_weights` leaves out are zero from the start and stay so: their gradients
    are zero, and are no part of any norm.

    Parameters have canonical names and shapes (`parameter_shapes`), whatever the framework stores.
    A framework declares how it stores each of them (`transposed`, or `layout`) and reads and writes
    them in that form (`read`, `write`); this class converts, and from these two makes snapshots.

    Everything random after the initial draw is a function of (seed, `self.step`) alone, so that a
    run restored from a snapshot repeats the uninterrupted one.

    A batch's arrays are C-contiguous, [time, global batch]; the caller may overwrite them once a
    step has returned. Device r of N gets the r-th contiguous block of columns. Evaluation runs on
    the first device alone.
    """

    name: ClassVar[str]  # as in `FRAMEWORKS`
    package: ClassVar[str]  # what the framework is imported as, such as "torch"
    # Endings of the names of parameters that the framework stores as [outputs, inputs].
    transposed: ClassVar[tuple[str, ...]] = ()
    # The canonical gate that comes first, second, ... in the framework's GRU; empty: as in `GATES`.
    gru_gates: ClassVar[tuple[int, ...]] = ()
    dtype: ClassVar[npt.DTypeLike] = np.float32

    step: int  # training steps taken
    # The step with which asgd's mean of parameters begins; None: the mean is the newest parameters.
    # The training loop sets it.
    average_from: int | None

    def __init__(self, setup: Setup) -> None:
        """Build the model on its devices; `create` then loads its initial parameters.

        Raises:
            PtbenchError: if there are not exactly `setup.devices` devices of that kind to use.
        """
        self.setup = setup
        self.recipe = setup.recipe
        self.devices = setup.devices
        self.shapes = parameter_shapes(setup.recipe, setup.vocabulary_size)
        # which weights a sparse model has; empty for a dense one
        self.kept = kept_weights(setup.recipe, setup.vocabulary_size, setup.seed)
        self.layouts = {name: self.layout(name) for name in self.shapes}
        self.state_widths = state_widths(setup.recipe)
        self.slots = OPTIMIZER_SLOTS[setup.recipe.optimizer]
        self.step = 0
        self.average_from = None

    # ------------------------------------------------------------------- what a framework provides

    def layout(self, name: str) -> Layout:
        """Return how the framework stores the parameter of that canonical name."""
        kept = self.kept.get(name)
        packed = kept is not None and self.recipe.kernel == "sparse"
        gates = self.gru_gates if self.recipe.rnn == "gru" and name.startswith("rnn.") else ()
        return Layout(name.endswith(self.transposed), gates, kept, packed)

    @abc.abstractmethod
    def read(self, kind: str) -> Arrays:
        """Return every parameter, or every array of one of the optimizer's slots, as stored.

        Args:
            kind: `PARAMETER`, or the name of a slot.

        Returns:
            Arrays on the CPU, by canonical name; they may be views that later steps change.
        """

    @abc.abstractmethod
    def write(self, kind: str, arrays: Parameters) -> None:
        """Replace what `read` returns, on every device. The arrays are new and nobody else's."""

    @abc.abstractmethod
    def read_state(self, state: State) -> Arrays:
        """Return a training state as arrays [global batch, width], named as in `state_widths`."""

    @abc.abstractmethod
    def make_state(self, arrays: Parameters, training: bool) -> State:
        """Return the state that has these arrays; the reverse of `read_state`.

        A training state is given to `train_step` and `gradients` and may be spread over the
        devices. Any other is given to `evaluate_step` and `next_token_log_probabilities` and is on
        the first device.
        """

    @abc.abstractmethod
    def read_gradients(self, batch: Batch, state: State) -> Arrays:
        """Return what `gradients` does, as stored."""

    @abc.abstractmethod
    def train_step(self, batch: Batch, state: State, learning_rate: float) -> TrainStep:
        """Update the parameters once on the global batch, clipped once over all parameters.

        With g the clipped gradient plus `weight_decay` times the parameter p, t the steps taken
        with this one, and everything elementwise:

        - sgd: p -= rate g
        - adam (Kingma and Ba 2015, arXiv:1412.6980, algorithm 1): m = beta1 m + (1 - beta1) g;
          v = beta2 v + (1 - beta2) g^2;
          p -= rate m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + epsilon)
        - rmsprop (Hinton 2012, lecture 6e; epsilon placed as in Keras 2.1.3 and torch.optim):
          s = decay s + (1 - decay) g^2; p -= rate g / (sqrt(s) + epsilon)
        - asgd (Polyak and Juditsky 1992): p -= rate g; then a = (1 - 1 / n) a + p / n, where n is
          `self.averaged`; with n = 1 a is p exactly. Only the snapshot shows a.
        """

    @abc.abstractmethod
    def forward_pass(self, batch: Batch, state: State) -> Scalar:
        """Return the nll that `train_step` would, without gradients; nothing changes.

        It drops what the next step drops, and is called to be timed, as is the next method.
        """

    @abc.abstractmethod
    def forward_and_backward_pass(self, batch: Batch, state: State) -> Scalar:
        """Do what `train_step` does before it clips and updates: return the nll.

        The gradient over all replicas is then on the devices; nothing else changes.
        """

    @abc.abstractmethod
    def evaluate_step(self, batch: Batch, state: State) -> EvaluateStep:
        """Return the negative log-likelihood without dropout; no parameter changes."""

    @abc.abstractmethod
    def next_token_log_probabilities(
        self, inputs: npt.NDArray[np.int32], state: State
    ) -> tuple[npt.NDArray[np.float32], State]:
        """Return log-probabilities [time, batch, vocabulary] of each next word, without dropout."""

    @abc.abstractmethod
    def synchronize(self) -> None:
        """Return when every device has finished all it was given; clocks stop after this."""

    @abc.abstractmethod
    def device_names(self) -> list[str]:
        """Return one name for each replica's device, such as `cpu:0` or `NVIDIA H200`."""

    def peak_device_memory(self) -> int | None:
        """Return the largest memory that any device gave to this process so far [bytes].

        It is the framework's own count; None where there is none, as on CPUs.
        """
        return None

    def operators(self, work: Callable[[], None]) -> list[Operator]:
        """Do some work under the framework's own profiler; return the operators that it was.

        Operators that call others are without them, or left out.
        """
        work()
        return []

    def settings(self) -> dict[str, str]:
        """Return settings that change speed or rounding (threads, product kernels)."""
        return {}

    def close(self) -> None:  # noqa: B027 - most frameworks have nothing to release
        """Release processes and devices. The backend is unusable afterwards."""

    # ------------------------------------------------------------------- what all have in common

    @property
    def averaged(self) -> int:
        """How many steps' parameters asgd's mean is of, once the next step is taken."""
        return 1 if self.average_from is None else self.step + 1 - self.average_from

    def check_devices(self, found: int, needed: int) -> None:
        """Make sure that the framework finds as many devices as it needs.

        Raises:
            PtbenchError: if it does not.
        """
        if found < needed:
            raise PtbenchError(
                f"{self.name} finds {found} of the {needed} {self.setup.accelerator} devices that "
                "the run needs; ask for fewer, or make more visible (CUDA_VISIBLE_DEVICES)"
            )

    def parameters(self) -> Parameters:
        """Return a copy of all parameters under their canonical names and shapes."""
        return _float32(self._canonical(self.read(PARAMETER)))

    def load_parameters(self, parameters: Arrays) -> None:
        """Replace all parameters on every device; names and shapes must be the canonical ones.

        Weights that a sparse model does not have may have any value: they become zero.
        """
        check_parameters(parameters, self.shapes)
        self.write(PARAMETER, self._stored(parameters))

    def gradients(self, batch: Batch, state: State) -> Parameters:
        """Return the gradient of the objective on the global batch, before clipping.

        It is computed by the very code that `train_step` differentiates, dropout of the next step
        included; nothing changes.
        """
        return _float32(self._canonical(self.read_gradients(batch, state)))

    def initial_state(self, batch_size: int, training: bool) -> State:
        """Return the zero recurrent state for `batch_size` streams; see `make_state`."""
        zeros = {n: np.zeros((batch_size, w), self.dtype) for n, w in self.state_widths.items()}
        return self.make_state(zeros, training)

    def snapshot(self, state: State) -> dict[str, Array]:
        """Return all that a resumed run needs, as new arrays.

        These are each `parameter.{name}`, each `optimizer.{slot}.{name}` in the parameter's
        canonical shape, `step`, and the recurrent state of all devices together.
        """
        saved: dict[str, Array] = {}
        for kind in (PARAMETER, *self.slots):
            arrays = self._canonical(self.read(kind))
            saved |= {f"{self._prefix(kind)}.{name}": array for name, array in arrays.items()}
        saved |= {name: np.array(array) for name, array in self.read_state(state).items()}
        return {**saved, "step": np.array(self.step)}

    def restore(self, snapshot: Arrays) -> State:
        """Return to where the snapshot was taken; returns the recurrent state saved with it."""
        for kind in (PARAMETER, *self.slots):
            prefix = self._prefix(kind)
            self.write(kind, self._stored({n: snapshot[f"{prefix}.{n}"] for n in self.shapes}))
        self.step = int(snapshot["step"])
        state = {name: np.array(snapshot[name], self.dtype) for name in self.state_widths}
        return self.make_state(state, training=True)

    @staticmethod
    def _prefix(kind: str) -> str:
        """Return what the names of a kind of arrays begin with in a snapshot."""
        return kind if kind == PARAMETER else f"optimizer.{kind}"

    def _canonical(self, stored: Arrays) -> Parameters:
        return {name: layout.canonical(stored[name]) for name, layout in self.layouts.items()}

    def _stored(self, canonical: Arrays) -> Parameters:
        return {
            name: layout.stored(np.asarray(canonical[name], self.dtype))
            for name, layout in self.layouts.items()
        }

    def gradient_masks(self) -> Parameters:
        """Return what gradients of a sparse model are multiplied by, as stored: 1 or 0.

        Parameters whose kept weights alone are stored are not among them.
        """
        return {
            name: np.ascontiguousarray(layout.arranged(layout.kept), np.float32)
            for name, layout in self.layouts.items()
            if layout.kept is not None and not layout.packed
        }

    def objective_divisor(self, batch: Batch) -> float:
        """Return what the summed nll of a global batch is divided by to give the objective.

        `sum_over_time` divides by the batch size alone, so the loss is summed over the window's
        steps; `mean_per_token` divides by the number of real tokens.
        """
        if self.recipe.objective == "sum_over_time":
            return float(batch.mask.shape[1])
        return max(float(batch.mask.sum()), 1.0)

    def shares(self, array: Array, axis: int) -> list[Array]:
        """Return a copy of each device's contiguous share of an array.

        Args:
            axis: the axis of the batch: 0 of a state, 1 of a batch's arrays.

        Raises:
            ValueError: if the batch does not divide by the number of devices.
        """
        if array.shape[axis] % self.devices:
            raise ValueError(
                f"a batch of {array.shape[axis]} does not divide by {self.devices} devices"
            )
        return [np.array(part, order="C") for part in np.split(array, self.devices, axis)]


def _float32(arrays: Arrays) -> Parameters:
    return {name: array.astype(np.float32, copy=False) for name, array in arrays.items()}
