"""The contract in JAX: the process's settings, devices, compiled steps, and arrays in and out."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jax
import numpy as np
import numpy.typing as npt
from jax.experimental.multihost_utils import process_allgather
from jax.extend.backend import clear_backends
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ptbench.backends import base
from ptbench.backends.allocator import keep_memory
from ptbench.backends.jax import model, tuned
from ptbench.backends.jax.model import DATA, Array, Dropout, LanguageModel, Tree
from ptbench.backends.replicas import Group, Replicated, ReplicatedBackend, meet, on_every_replica
from ptbench.corpus.batching import Batch
from ptbench.model.optimizers import rate_and_epsilon
from ptbench.model.parameters import Parameters
from ptbench.model.recipe import Accelerator, Precision

# JAX's configuration, as far as it could change numbers. `isolation.py` removes the environment
# variables that JAX would take it from; `find_devices` sets what depends on the setup.
CONFIGURATION: dict[str, Any] = {
    "jax_enable_x64": False,
    "jax_default_matmul_precision": "highest",  # float32 on GPUs, not TF32
    "jax_numpy_dtype_promotion": "standard",
    "jax_default_prng_impl": model.RANDOM_GENERATOR,
    "jax_threefry_partitionable": True,
    "jax_random_seed_offset": 0,
    "jax_disable_jit": False,
    "jax_disable_most_optimizations": False,
    "jax_debug_nans": False,
    "jax_debug_infs": False,
    "jax_cpu_collectives_implementation": "gloo",  # between nodes
    "jax_enable_preemption_service": False,  # it would take SIGTERM, which is the trainer's
    "jax_enable_recoverability": True,  # or the end of one process would abort the first
}

CONTAINERS = ("while", "call", "conditional")  # XLA's operators that have others in them


def configure(accelerator: Accelerator) -> None:
    """Set what JAX would read from the environment."""
    platforms = "cpu" if accelerator == "cpu" else "cuda,cpu"
    for name, value in (CONFIGURATION | {"jax_platforms": platforms}).items():
        if jax.config.values[name] != value:
            jax.config.update(name, value)


def join_processes(rendezvous: str, rank: int, group: Group) -> None:
    """Meet the other nodes' processes; `jax.devices` then has the devices of all."""
    configure(group.accelerator)
    jax.distributed.initialize(
        urlsplit(rendezvous).netloc,
        group.size,
        rank,
        cluster_detection_method="deactivate",
        heartbeat_timeout_seconds=24 * 3600,  # as in `compiler_options`; `Replicas` sees who ends
    )


def find_devices(setup: base.Setup) -> list[Any]:
    """Set what JAX and XLA would read from the environment; return all devices of the kind.

    JAX makes as many devices of the CPU as were asked for before its first use. They share one
    pool of threads.
    """
    os.environ["NPROC"] = str(pool_threads(setup))
    on_cpu = setup.accelerator == "cpu"
    configure(setup.accelerator)
    if on_cpu and jax.config.jax_num_cpu_devices < setup.devices_here:
        clear_backends()  # JAX may be in use already, with fewer devices
        jax.config.update("jax_num_cpu_devices", setup.devices_here)
    return jax.devices("cpu") if on_cpu else gpus()


@cache
def gpus() -> list[Any]:
    """Return the GPUs that JAX found when it was first asked."""
    try:
        return jax.devices("cuda")
    except RuntimeError as error:
        warnings.warn(f"JAX has no GPU: {error}", stacklevel=2)
        return []


def pool_threads(setup: base.Setup) -> int:
    """Return the size of XLA's pool of threads.

    A replica that waits for the others' gradients holds a thread. With no thread to spare beside
    those of the replicas, two replicas waited for each other for ever.
    """
    threads = setup.threads // setup.nodes
    return threads if setup.devices == 1 else threads + 2 * setup.devices_here


def compiler_options(accelerator: Accelerator, precision: Precision) -> dict[str, Any]:
    """Return the options of XLA that differ from its defaults."""
    options: dict[str, Any] = {}
    if precision == "bfloat16":
        # XLA would leave out what rounds to bfloat16 where it computes in float32 afterwards.
        options["xla_allow_excess_precision"] = False
    if accelerator == "cuda":
        # gradients are scattered in a fixed order
        return options | {"xla_gpu_deterministic_ops": True}
    # Replicas wait for one another however busy the machine is; by default XLA aborts after 40 s.
    return options | {"xla_cpu_collective_call_terminate_timeout_seconds": 24 * 3600}


class TrainingState(Replicated, dict[str, Array]):
    """A training state whose arrays are spread over several nodes."""


class JAXBackend(ReplicatedBackend):
    """The contract in JAX. One process has all devices of a node."""

    name = "jax"
    package = "jax"

    def __init__(self, setup: base.Setup) -> None:
        super().__init__(setup)
        recipe, self.accelerator = setup.recipe, setup.accelerator
        is_tuned = recipe.implementation == "tuned"
        means = tuned if is_tuned else model
        self._memory_is_kept = is_tuned and self.accelerator == "cpu" and keep_memory(arenas=1)
        self._generator = means.RANDOM_GENERATOR
        on_gpu = self.accelerator == "cuda"
        layer = tuned.gpu_layer if is_tuned and on_gpu else means.recurrent_layer
        nll = model.nll if on_gpu else means.nll  # in chunks, it is slower on GPUs
        self._model = LanguageModel(recipe, layer, nll)

        if setup.nodes > 1:
            self.take_part(1, join_processes, jax.distributed.shutdown)
        found = find_devices(setup)
        self.check_devices(len(found), self.devices)
        self._first = found[0]
        mesh = Mesh(np.array(found[: self.devices]), (DATA,), axis_types=(AxisType.Auto,))
        self._everywhere = NamedSharding(mesh, PartitionSpec())
        self._of_batch = NamedSharding(mesh, PartitionSpec(None, DATA))  # [time, batch]
        self._of_state = NamedSharding(mesh, PartitionSpec(DATA))  # [batch, width]
        shardings = self._everywhere, self._of_batch, self._of_state
        everywhere, of_batch, of_state = (sharding.spec for sharding in shardings)

        self._options = compiler_options(self.accelerator, recipe.precision)
        compile_ = partial(jax.jit, compiler_options=self._options)
        on_replicas = partial(
            jax.shard_map,
            mesh=mesh,
            in_specs=(*[everywhere] * 4, of_batch, of_state, everywhere),
            check_vma=False,
        )
        self._gradients = compile_(
            on_replicas(self._objective_gradients, out_specs=(everywhere, everywhere, of_state))
        )
        self._forward = compile_(on_replicas(self._objective_nll, out_specs=everywhere))
        # Compiled apart from the gradients, because XLA would otherwise compute those twice.
        # Parameters and slots are donated: the updated ones take their memory.
        self._update = compile_(partial(model.update, recipe), donate_argnums=0)
        self._evaluate = compile_(self._nll)
        self._predict = compile_(self._model.predict)

        places = {
            f"{name}.places": np.argwhere(kept).astype(np.int32)
            for name, kept in self.kept.items()
            if self.layouts[name].packed
        }
        self._places = self._put(places, self._everywhere)
        self._masks = self._put(self.gradient_masks(), self._everywhere)
        self._arrays: dict[str, Tree] = {}  # by kind
        zeros = {name: np.zeros(shape) for name, shape in self.shapes.items()}
        for kind in (base.PARAMETER, *self.slots):
            self._arrays[kind] = self._put(self._stored(zeros), self._everywhere)
        if setup.nodes > 1:
            meet(self.replicas)

    def _objective(
        self, divisor: Array, parameters: Tree, places: Tree, batch: Batch, state: Tree, step: Array
    ) -> tuple[Array, tuple[Array, Tree]]:
        """Return a replica's share of the objective, and beside it of the nll, and its state."""
        key = jax.random.key(self.setup.seed, impl=self._generator)
        dropout = Dropout(self.recipe, jax.random.fold_in(key, step))
        weighted = batch._replace(mask=batch.mask / divisor)
        return self._model.objective(parameters | places, weighted, state, dropout)

    def _objective_nll(self, _: Tree, divisor: Array, *others: Any) -> Array:
        """Return the global batch's summed nll; see `_objective_gradients`."""
        _, (nll, _) = self._objective(divisor, *others)
        return jax.lax.psum(nll, DATA) * divisor

    def _objective_gradients(
        self, masks: Tree, divisor: Array, *others: Any
    ) -> tuple[Tree, Array, Tree]:
        """Return the global batch's gradient and summed nll, and the replica's own final state.

        It runs on every replica at once, each with its columns of the batch.

        Args:
            masks: those of `gradient_masks`.
            divisor, others: the arguments of `_objective`.
        """
        differentiated = jax.grad(self._objective, argnums=1, has_aux=True)
        gradients, (nll, final) = differentiated(divisor, *others)
        gradients |= {name: gradients[name] * mask for name, mask in masks.items()}
        gradients, nll = jax.lax.psum((gradients, nll), DATA)
        return gradients, nll * divisor, final

    def _nll(self, parameters: Tree, batch: Batch, state: Tree) -> base.EvaluateStep:
        """Return the summed nll without dropout, and the final state."""
        _, (nll, final) = self._model.objective(parameters, batch, state, Dropout(self.recipe))
        return base.EvaluateStep(nll, final)

    def read(self, kind: str) -> base.Arrays:
        return {name: np.asarray(array) for name, array in self._arrays[kind].items()}

    def _put(self, tree: Any, place: Any) -> Any:
        """Return NumPy arrays as arrays on one device, or on all as a sharding has it."""
        if self.setup.nodes == 1 or place is self._first:
            return jax.device_put(tree, place)
        # `device_put` would make all processes compare their arrays
        return jax.tree.map(
            lambda array: jax.make_array_from_callback(array.shape, place, array.__getitem__), tree
        )

    @on_every_replica
    def write(self, kind: str, arrays: Parameters) -> None:
        # JAX may share the memory of a NumPy array, which a step would then donate. That is fine
        # here and in `make_state`, because nobody else has these arrays.
        self._arrays[kind] = self._put(arrays, self._everywhere)

    @on_every_replica
    def read_state(self, state: base.State) -> base.Arrays:
        whole = state if self.setup.nodes == 1 else process_allgather(dict(state), tiled=True)
        return {name: np.asarray(array) for name, array in whole.items()}

    def make_state(self, arrays: Parameters, training: bool) -> base.State:
        return self._make_training_state(arrays) if training else self._put(arrays, self._first)

    @on_every_replica
    def _make_training_state(self, arrays: Parameters) -> base.State:
        return self._training_state(self._put(arrays, self._of_state))

    def _training_state(self, arrays: Tree) -> base.State:
        if self.setup.nodes == 1:
            return arrays
        state = TrainingState(arrays)
        state.replicate()
        return state

    def _arguments(self, batch: Batch, state: base.State) -> tuple[Any, ...]:
        """Return the arguments of `_objective_gradients` for the next step."""
        divisor = np.float32(self.objective_divisor(batch))
        batch = self._on_devices(batch, self._of_batch)
        own = self._arrays[base.PARAMETER], self._places
        return self._masks, divisor, *own, batch, dict(state), np.uint32(self.step)

    def _on_devices(self, batch: Batch, place: Any) -> Batch:
        # copies, because JAX reads NumPy arrays after the call, or even shares their memory
        return self._put(jax.tree.map(np.copy, batch), place)

    @on_every_replica
    def read_gradients(self, batch: Batch, state: base.State) -> base.Arrays:
        gradients, _, _ = self._gradients(*self._arguments(batch, state))
        return {name: np.asarray(array) for name, array in gradients.items()}

    @on_every_replica
    def train_step(self, batch: Batch, state: base.State, learning_rate: float) -> base.TrainStep:
        gradients, nll, final = self._gradients(*self._arguments(batch, state))
        rates = rate_and_epsilon(self.recipe, learning_rate, self.step)
        numbers = np.array((*rates, self.averaged), np.float32)
        self._arrays, norm = self._update(self._arrays, gradients, *numbers)
        self.step += 1
        if self.setup.nodes > 1:
            jax.block_until_ready(nll)  # so that the end of another node's process shows here
        return base.TrainStep(nll, norm, self._training_state(final))

    @on_every_replica
    def forward_pass(self, batch: Batch, state: base.State) -> base.Scalar:
        return self._forward(*self._arguments(batch, state))

    @on_every_replica
    def forward_and_backward_pass(self, batch: Batch, state: base.State) -> base.Scalar:
        return self._gradients(*self._arguments(batch, state))[1]

    def _parameters_on_first_device(self) -> Tree:
        parameters = self._arrays[base.PARAMETER] | self._places
        return {name: array.addressable_data(0) for name, array in parameters.items()}

    def evaluate_step(self, batch: Batch, state: base.State) -> base.EvaluateStep:
        batch = self._on_devices(batch, self._first)
        return self._evaluate(self._parameters_on_first_device(), batch, state)

    def next_token_log_probabilities(
        self, inputs: npt.NDArray[np.int32], state: base.State
    ) -> tuple[npt.NDArray[np.float32], base.State]:
        log_p, final = self._predict(self._parameters_on_first_device(), inputs.copy(), state)
        return np.array(log_p), final

    def synchronize(self) -> None:
        jax.block_until_ready((self._arrays, jax.live_arrays()))

    def device_names(self) -> list[str]:
        if self.accelerator == "cpu":
            return [f"cpu:{r}" for r in range(self.devices)]
        return [device.device_kind for device in self._everywhere.mesh.devices.flat]

    def peak_device_memory(self) -> int | None:
        counts = [device.memory_stats() for device in self._everywhere.mesh.local_devices]
        return max((c["peak_bytes_in_use"] for c in counts if c), default=None)  # CPUs have none

    def operators(self, work: Callable[[], None]) -> list[base.Operator]:
        """Return XLA's, by jax.profiler; loops and calls are left out, what is in them is not."""
        found: dict[str, list[float]] = defaultdict(list)
        with tempfile.TemporaryDirectory(prefix="ptbench-") as folder:
            with jax.profiler.trace(folder):
                work()
            (trace,) = Path(folder).rglob("*.xplane.pb")
            for plane in jax.profiler.ProfileData.from_file(str(trace)).planes:
                for event in (event for line in plane.lines for event in line.events):
                    # its end has an event of its own, without this
                    operator = dict(event.stats).get("hlo_op")
                    if operator and not str(operator).startswith(CONTAINERS):
                        found[str(operator)].append(event.duration_ns / 1e9)
        return [base.Operator(name, len(each), sum(each)) for name, each in found.items()]

    def settings(self) -> dict[str, str]:
        allocator = "glibc" if self.accelerator == "cpu" else "JAX's for CUDA"
        if self._memory_is_kept:
            allocator += ", memory kept between steps"
        return {
            "threads": str(pool_threads(self.setup)),
            "matmul_precision": "bfloat16"
            if self.recipe.precision == "bfloat16"
            else "highest (float32; no TF32)",
            "random_generator": self._generator,
            "allocator": allocator,
            **{name: str(value) for name, value in self._options.items()},
        }
