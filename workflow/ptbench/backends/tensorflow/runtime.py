"""What TensorFlow's and Keras' backends share: the process' settings, replicas, compiled steps."""

from __future__ import annotations

import abc
import os
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # errors, no start-up notes

import numpy as np
import numpy.typing as npt
import tensorflow as tf
from tensorflow.tsl.profiler.protobuf import xplane_pb2

from ptbench.backends import base
from ptbench.corpus.batching import Batch
from ptbench.model.optimizers import rate_and_epsilon
from ptbench.model.parameters import Parameters

tf.get_logger().setLevel("ERROR")

Tensor = Any  # tf.Tensor
Variable = Any  # tf.Variable, or keras.Variable
PerReplica = Any  # a tensor for each replica, on its device
Tensors = dict[str, Any]  # by canonical name

# Logical CPUs cannot be added once TensorFlow is in use, and idle ones cost nothing.
LOGICAL_CPUS = 8

KERNEL = re.compile(r"[\w./-]+:_?[A-Z]\w*")  # how a profile calls what the executor runs
CONTAINERS = (  # operators that have others in them
    "If", "PartitionedCall", "StatefulPartitionedCall", "StatelessIf", "StatelessWhile", "While",
)  # fmt: skip


def start_tensorflow(setup: base.Setup) -> None:
    """Set up the process. Repeating the same settings is harmless; others come too late."""
    tf.config.threading.set_intra_op_parallelism_threads(setup.threads)
    tf.config.threading.set_inter_op_parallelism_threads(setup.threads)
    tf.config.experimental.enable_tensor_float_32_execution(False)
    gpus = tf.config.list_physical_devices("GPU")
    if setup.accelerator == "cuda":
        # GPUs alone need this; on a CPU it replaces one cross-entropy kernel by several slow ones.
        tf.config.experimental.enable_op_determinism()
        for gpu in gpus:
            tf.config.experimental.set_memory_growth(gpu, True)  # or all memory counts as used
        return
    if gpus:
        tf.config.set_visible_devices([], "GPU")
    cpu = tf.config.list_physical_devices("CPU")[0]
    if tf.config.get_logical_device_configuration(cpu) is None:
        one = tf.config.LogicalDeviceConfiguration()
        tf.config.set_logical_device_configuration(cpu, [one] * max(setup.devices, LOGICAL_CPUS))


class TensorFlowRuntimeBackend(base.Backend):
    """A model on `tf.distribute`: every replica's gradients, their sum, one update on each device.

    A framework makes its variables in the strategy's scope and provides the methods that follow.
    """

    gru_gates = (1, 0, 2)  # Keras' order, update, reset, candidate, in explicit time steps too
    model: Any  # the framework's `LanguageModel`
    # parameters and the optimizer's slots, by kind and canonical name, in canonical order
    variables: dict[str, dict[str, Variable]]

    def __init__(self, setup: base.Setup) -> None:
        super().__init__(setup)
        start_tensorflow(setup)
        on_cpu = setup.accelerator == "cpu"
        found = tf.config.list_logical_devices("CPU" if on_cpu else "GPU")
        self.check_devices(len(found), self.devices)
        self.strategy = tf.distribute.MirroredStrategy(
            [device.name for device in found[: self.devices]],
            tf.distribute.ReductionToOneDevice() if on_cpu else None,  # None: NCCL
        )
        self.worker_devices = self.strategy.extended.worker_devices
        with self.strategy.scope():
            self.build()
        # Arguments are tensors, so that each is compiled once for each shape.
        compiled = partial(tf.function, autograph=False)
        self._compiled_forward = compiled(partial(self.strategy.run, self._replica_forward))
        self._compiled_gradients = compiled(partial(self.strategy.run, self._replica_gradients))
        self._compiled_update = compiled(self._update)
        self._compiled_nll = compiled(self.model.nll)
        self._compiled_prediction = compiled(self.model.log_probabilities)

    @abc.abstractmethod
    def build(self) -> None:
        """Make the model and the optimizer, and set `model` and `variables`."""

    @abc.abstractmethod
    def objective(
        self, inputs: Tensor, targets: Tensor, mask: Tensor, state: Tensors, step: Tensor
    ) -> tuple[Tensor, Tensor, Tensors]:
        """Return a replica's objective before its division, its nll, and its new state.

        Args:
            inputs, targets, mask: the replica's columns, [time, batch].
            step: training steps taken, int64; with the replica it decides what is dropped.
        """

    @abc.abstractmethod
    def update(self, gradients: list[PerReplica], numbers: Tensors) -> None:
        """Clip and take one step on every device; called outside the replicas.

        Args:
            gradients: of the parameters in their order, the same on every replica.
            numbers: those of `_update_numbers`; `norm`, the gradients' global norm; and `step`,
                the training steps taken before this one, int64.
        """

    def _replica_gradients(
        self, divisor: Tensor, *arguments: Any
    ) -> tuple[Tensor, list[Tensor], Tensors]:
        """Return the global nll and gradient and the replica's own state; see `_arguments`."""
        parameters = self.variables[base.PARAMETER]
        with tf.GradientTape() as tape:
            objective, nll, state = self.objective(*arguments)
            objective = objective / divisor
        gradients = tape.gradient(objective, list(parameters.values()))
        # Dense, because the embedding's sparse gradient has a row for every token: the global norm
        # would take a word's rows apart.
        found = dict(zip(parameters, map(tf.convert_to_tensor, gradients), strict=True))
        for name, kept in self.gradient_masks().items():
            found[name] *= kept
        replica = tf.distribute.get_replica_context()
        nll, *sums = replica.all_reduce(tf.distribute.ReduceOp.SUM, [nll, *found.values()])
        return nll, sums, state

    def _replica_forward(self, _: Tensor, *arguments: Any) -> Tensor:
        """Return the global nll, which is not divided."""
        _, nll, _ = self.objective(*arguments)
        replica = tf.distribute.get_replica_context()
        return replica.all_reduce(tf.distribute.ReduceOp.SUM, nll)

    def _update(self, numbers: Tensors, arguments: tuple[Any, ...]) -> base.TrainStep:
        nll, gradients, state = self.strategy.run(self._replica_gradients, arguments)
        with tf.device(self.worker_devices[0]):
            norm = tf.linalg.global_norm([self.local(gradient)[0] for gradient in gradients])
        self.update(gradients, numbers | {"norm": norm, "step": arguments[-1]})
        return base.TrainStep(self.local(nll)[0], norm, state)

    def _update_numbers(self, learning_rate: float) -> dict[str, Tensor]:
        """Return what the next update has of its own, as tensors.

        Rate and epsilon are those of `rate_and_epsilon`.
        """
        rate, epsilon = rate_and_epsilon(self.recipe, learning_rate, self.step)
        numbers = {"learning_rate": learning_rate, "rate": rate, "epsilon": epsilon}
        if self.recipe.optimizer == "asgd":
            numbers["share"] = 1 / self.averaged  # of the new parameters in the mean
        return {name: tf.constant(number, tf.float32) for name, number in numbers.items()}

    def local(self, value: PerReplica) -> list[Tensor]:
        """Return each replica's own tensor."""
        return list(self.strategy.experimental_local_results(value))

    def _distribute(self, array: npt.NDArray[Any], axis: int) -> PerReplica:
        """Return each device's share of an array, on the device."""
        shares = self.shares(array, axis)

        def share(context: Any) -> Tensor:
            replica = context.replica_id_in_sync_group
            with tf.device(self.worker_devices[replica]):
                return tf.constant(shares[replica])

        return self.strategy.experimental_distribute_values_from_function(share)

    def _arguments(self, batch: Batch, state: base.State) -> tuple[Any, ...]:
        """Return what the next step's objective is divided by, and its arguments."""
        divisor = tf.constant(self.objective_divisor(batch), tf.float32)
        step = tf.constant(self.step, tf.int64)
        return divisor, *(self._distribute(array, 1) for array in batch), state, step

    def read(self, kind: str) -> base.Arrays:
        return {name: variable.numpy() for name, variable in self.variables[kind].items()}

    def write(self, kind: str, arrays: Parameters) -> None:
        for name, variable in self.variables[kind].items():
            variable.assign(arrays[name])

    def read_state(self, state: base.State) -> base.Arrays:
        return {name: np.concatenate(self.local(value)) for name, value in state.items()}

    def make_state(self, arrays: Parameters, training: bool) -> base.State:
        if training:
            return {name: self._distribute(array, 0) for name, array in arrays.items()}
        with tf.device(self.worker_devices[0]):
            return {name: tf.constant(array) for name, array in arrays.items()}

    def read_gradients(self, batch: Batch, state: base.State) -> base.Arrays:
        _, gradients, _ = self._compiled_gradients(self._arguments(batch, state))
        found = [self.local(gradient)[0].numpy() for gradient in gradients]
        return dict(zip(self.shapes, found, strict=True))

    def train_step(self, batch: Batch, state: base.State, learning_rate: float) -> base.TrainStep:
        numbers = self._update_numbers(learning_rate)
        result = self._compiled_update(numbers, self._arguments(batch, state))
        self.step += 1
        return result

    def forward_pass(self, batch: Batch, state: base.State) -> base.Scalar:
        return self.local(self._compiled_forward(self._arguments(batch, state)))[0]

    def forward_and_backward_pass(self, batch: Batch, state: base.State) -> base.Scalar:
        nll, _, _ = self._compiled_gradients(self._arguments(batch, state))
        return self.local(nll)[0]

    def evaluate_step(self, batch: Batch, state: base.State) -> base.EvaluateStep:
        with tf.device(self.worker_devices[0]):
            tensors = [tf.constant(array) for array in batch]
            return base.EvaluateStep(*self._compiled_nll(*tensors, state))

    def next_token_log_probabilities(
        self, inputs: npt.NDArray[np.int32], state: base.State
    ) -> tuple[npt.NDArray[np.float32], base.State]:
        with tf.device(self.worker_devices[0]):
            log_p, state = self._compiled_prediction(tf.constant(inputs), state)
        return log_p.numpy(), state

    def synchronize(self) -> None:
        tf.test.experimental.sync_devices()

    def device_names(self) -> list[str]:
        if self.setup.accelerator == "cpu":
            return [f"cpu:{r}" for r in range(self.devices)]
        gpus = tf.config.list_physical_devices("GPU")[: self.devices]
        return [tf.config.experimental.get_device_details(gpu)["device_name"] for gpu in gpus]

    def peak_device_memory(self) -> int | None:
        if self.setup.accelerator == "cpu":
            return None
        information = tf.config.experimental.get_memory_info
        return max(int(information(f"GPU:{r}")["peak"]) for r in range(self.devices))

    def operators(self, work: Callable[[], None]) -> list[base.Operator]:
        """Return the kernels that ran, by tf.profiler, those of one kind together."""
        found: dict[str, list[float]] = defaultdict(list)
        with tempfile.TemporaryDirectory(prefix="ptbench-") as folder:
            with tf.profiler.experimental.Profile(folder):
                work()
            (trace,) = Path(folder).rglob("*.xplane.pb")
            planes = xplane_pb2.XSpace.FromString(trace.read_bytes()).planes
        devices = [plane for plane in planes if plane.name.startswith("/device:")]
        for plane in devices or planes:
            for event in (event for line in plane.lines for event in line.events):
                name = plane.event_metadata[event.metadata_id].name
                # the executor calls a kernel node:operator
                kind = name if devices else name.rpartition(":")[2]
                if devices or (KERNEL.fullmatch(name) and kind not in CONTAINERS):
                    found[kind].append(event.duration_ps / 1e12)
        return [base.Operator(name, len(each), sum(each)) for name, each in found.items()]

    def settings(self) -> dict[str, str]:
        on_gpu = self.setup.accelerator == "cuda"
        return {
            "tensorflow": tf.__version__,
            "intra_op_threads": str(tf.config.threading.get_intra_op_parallelism_threads()),
            "inter_op_threads": str(tf.config.threading.get_inter_op_parallelism_threads()),
            "matmul_precision": "bfloat16"
            if self.recipe.precision == "bfloat16"
            else "float32 (TF32 off)",
            "op_determinism": "on" if on_gpu else "off: a CPU's kernels are deterministic anyway",
        }
