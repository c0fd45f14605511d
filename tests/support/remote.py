"""Backends that live in another process, in their framework's own environment.

`RemoteBackend` has the methods of `Backend`, so a test is written once and runs on backends here
and there. `Backends` starts what a session needs once, and ends it.
"""

from __future__ import annotations

import builtins
import contextlib
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.support import probes, wire
from tests.support.problems import VOCABULARY, new_oracle

from ptbench import environments
from ptbench import errors as ptbench_errors
from ptbench.backends import ORACLE
from ptbench.backends.base import Backend, EvaluateStep, State, TrainStep
from ptbench.backends.oracle import Masks
from ptbench.corpus.batching import Batch
from ptbench.model.parameters import Parameters
from ptbench.model.recipe import Accelerator, Recipe

ROOT = Path(__file__).parents[2]
THREADS = 2
MOST_MEMORY = 3 * 2**30  # of the session's workers: what a framework has compiled stays [bytes]
SECONDS_TO_END = 30  # for a worker that was asked to end; frameworks take a few to clean up


class WorkerError(Exception):
    """Report an error in a worker whose type does not exist here, or the death of a worker."""


class Worker:
    """Start and talk to one process in one environment; see `worker.py`."""

    def __init__(self, python: str | Path, log: Path) -> None:
        self.log = log
        with log.open("wb") as stderr:
            self.process = subprocess.Popen(
                [python, "-m", "tests.support.worker"],
                cwd=ROOT,
                env=os.environ
                | {
                    "PYTHONPATH": "workflow",
                    # Waiting threads sleep: nothing is timed here, and spinning hinders others.
                    "OMP_WAIT_POLICY": "passive",
                    # Backends that are alike, and workers that follow each other, compile once.
                    "JAX_COMPILATION_CACHE_DIR": str(log.parent / "compiled"),
                    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
                    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
                },
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
            )

    def ask(self, action: str, *arguments: Any) -> Any:
        """Return what the worker answers; an error there is raised here."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            wire.send(self.process.stdin, [action, *arguments])
            answer = wire.receive(self.process.stdout)
        except (EOFError, BrokenPipeError):
            status = self.process.wait()
            said = self.log.read_text(errors="replace")[-4000:]
            raise WorkerError(f"the worker ended with status {status}:\n{said}") from None
        if "result" in answer:
            return answer["result"]
        known = vars(builtins) | vars(ptbench_errors)
        name = next(name for name in answer["errors"] if name in known)
        kind = WorkerError if name in ("Exception", "BaseException") else known[name]
        error = kind(answer["text"])
        error.add_note(f"In the worker:\n{answer['traceback']}")
        raise error

    def memory(self) -> int:
        """Return the resident memory of the process [bytes]; 0 if it has ended."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self.process.pid).memory_info().rss
        return 0

    def close(self) -> None:
        """Ask the process to end, and make sure that it does."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it has died with a message on its way
            self.process.stdin.close()
        try:
            self.process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            self.process.terminate()
            try:
                self.process.wait(SECONDS_TO_END)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.process.stdout.close()


class RemoteBackend(Backend):
    """Use a backend in a worker. Its states are handles, its scalars finished numbers."""

    def __init__(
        self,
        worker: Worker,
        framework: str,
        recipe: Recipe,
        devices: int = 1,
        seed: int = 0,
        accelerator: Accelerator = "cpu",
    ) -> None:
        # without the base's __init__, whose attributes are the worker's
        self.worker = worker
        arguments = recipe.model_dump_json(), VOCABULARY, devices, seed, accelerator, THREADS
        self.handle = worker.ask("create", framework, *arguments)

    def _ask(self, method: str, *arguments: Any) -> Any:
        return self.worker.ask(method, self.handle, *arguments)

    @property
    def step(self) -> int:  # type: ignore[override]
        return self._ask("attribute", "step")

    @property
    def average_from(self) -> int | None:  # type: ignore[override]
        return self._ask("attribute", "average_from")

    @average_from.setter
    def average_from(self, step: int | None) -> None:
        self._ask("set", "average_from", step)

    def parameters(self) -> Parameters:
        return self._ask("parameters")

    def load_parameters(self, parameters: Mapping[str, Any]) -> None:
        self._ask("load_parameters", parameters)

    def initial_state(self, batch_size: int, training: bool) -> State:
        return self._ask("initial_state", batch_size, training)

    def gradients(self, batch: Batch, state: State) -> Parameters:
        return self._ask("gradients", batch, state)

    def train_step(self, batch: Batch, state: State, learning_rate: float) -> TrainStep:
        return TrainStep(*self._ask("train_step", batch, state, learning_rate))

    def forward_pass(self, batch: Batch, state: State) -> float:
        return self._ask("forward_pass", batch, state)

    def forward_and_backward_pass(self, batch: Batch, state: State) -> float:
        return self._ask("forward_and_backward_pass", batch, state)

    def evaluate_step(self, batch: Batch, state: State) -> EvaluateStep:
        return EvaluateStep(*self._ask("evaluate_step", batch, state))

    read = write = read_state = make_state = read_gradients = None  # type: ignore[assignment]

    def next_token_log_probabilities(self, inputs: Any, state: State) -> tuple[Any, State]:
        log_probabilities, state = self._ask("next_token_log_probabilities", inputs, state)
        return log_probabilities, state

    def snapshot(self, state: State) -> dict[str, Any]:
        return self._ask("snapshot", state)

    def restore(self, snapshot: Mapping[str, Any]) -> State:
        return self._ask("restore", snapshot)

    def synchronize(self) -> None:
        self._ask("synchronize")

    def device_names(self) -> list[str]:
        return self._ask("device_names")

    def peak_device_memory(self) -> int | None:
        return self._ask("peak_device_memory")

    def settings(self) -> dict[str, str]:
        return self._ask("settings")

    def close(self) -> None:
        self._ask("close")


def probe(function: Callable[..., Any], backend: Backend, *arguments: Any) -> Any:
    """Return what a function of `probes.py` finds out in the process of the backend."""
    assert function is getattr(probes, function.__name__)
    if isinstance(backend, RemoteBackend):
        return backend._ask("probe", function.__name__, *arguments)
    return function(backend, *arguments)


class Backends:
    """Start the session's workers, and share backends between tests.

    Some frameworks compile a model for seconds, so `get` returns the same backend again, restored
    to what it was when it was new.
    """

    def __init__(
        self,
        logs: Path,
        accelerator: Accelerator = "cpu",
        gpus: int | None = None,
        python: Path | None = None,
    ) -> None:
        """Start nothing yet.

        Args:
            logs: folder of the workers' output.
            accelerator: what the frameworks compute on.
            gpus: a test that needs more is skipped; None: there is no limit.
            python: has the frameworks; None: each one's environment.
        """
        # what cuDNN's approximate tanh adds shows in the smallest gradients
        self.tolerance = 1e-5 if accelerator == "cpu" else 3e-5
        self.logs, self.accelerator, self.gpus, self.python = logs, accelerator, gpus, python
        self.workers: dict[tuple[str, int], Worker] = {}
        self.made: dict[tuple[Any, ...], tuple[Backend, dict[str, Any]]] = {}
        self.masks: dict[Any, list[Masks]] = {}  # see `masks.observed_masks`
        self.number = itertools.count()

    def start(self, framework: str, accelerator: Accelerator | None = None) -> Worker:
        """Start a worker in the framework's environment, which is built where there is none."""
        accelerator = accelerator or self.accelerator
        log = self.logs / f"{framework}-{next(self.number)}.log"
        if framework == "oracle":
            return Worker(sys.executable, log)
        if self.python:
            return Worker(self.python, log)
        folder = ROOT / "results" / "environments" / f"{framework}-{accelerator}"  # as in runs
        environments.build(framework, accelerator, folder)
        return Worker(folder / environments.PYTHON, log)

    def new(self, framework: str, recipe: Recipe, devices: int = 1, seed: int = 0) -> Backend:
        """Return a new backend."""
        if framework == ORACLE:
            return new_oracle(recipe, devices, seed)
        if self.gpus is not None and devices > self.gpus:
            pytest.skip(f"needs more than {self.gpus} GPUs")
        if (framework, devices) not in self.workers:
            self.workers[framework, devices] = self.start(framework)
        worker = self.workers[framework, devices]
        return RemoteBackend(worker, framework, recipe, devices, seed, self.accelerator)

    def get(
        self, framework: str, recipe: Recipe, devices: int = 1, seed: int = 0, number: int = 0
    ) -> Backend:
        """Return the same as `new`, by restoring the snapshot of one that was new.

        Args:
            number: tells apart several backends that are alike.
        """
        key = (framework, recipe.model_dump_json(), devices, seed, number)
        if key not in self.made:
            backend = self.new(framework, recipe, devices, seed)
            state = backend.initial_state(recipe.batch_size, training=True)
            self.made[key] = backend, backend.snapshot(state)
        backend, snapshot = self.made[key]
        backend.restore(snapshot)
        backend.average_from = None  # a test that was skipped half-way may have set it
        return backend

    def renew(self) -> None:
        """End the largest workers while all need too much memory; no test may be using one."""
        memory = {key: worker.memory() for key, worker in self.workers.items()}
        while sum(memory.values()) > MOST_MEMORY:
            largest = max(memory, key=lambda key: memory[key])
            del memory[largest]
            self.workers.pop(largest).close()
            self.made = {k: v for k, v in self.made.items() if (k[0], k[2]) != largest}

    def close(self) -> None:
        for worker in self.workers.values():
            worker.close()
