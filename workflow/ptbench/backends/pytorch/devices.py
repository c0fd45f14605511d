"""The processes of replicas 1 to N - 1.

One process drives each replica. This process is replica 0; the others are started by the first
backend that needs them, repeat every call that trains on their own columns of the batch, and meet
this one in DistributedDataParallel's all-reduce.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable, Mapping
from datetime import timedelta
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, ClassVar

import numpy.typing as npt
import torch
import torch.distributed

from ptbench.backends.contract__LEFT import Mask, Tokens
from ptbench.backends.pytorch.layers import LayerState
from ptbench.backends.pytorch.replica import Replica
from ptbench.model.parameters import Parameters
from ptbench.model.recipe import Accelerator, Recipe

PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Followers:
    """The processes of replicas 1 to N - 1, which do what this one does, on their own device."""

    _started: ClassVar[dict[int, Followers]] = {}

    @classmethod
    def of(cls, devices: int, accelerator: Accelerator) -> Followers:
        """Those of this process, started when first asked for."""
        if devices not in cls._started:
            cls._started[devices] = cls(devices, accelerator)
        return cls._started[devices]

    def __init__(self, devices: int, accelerator: Accelerator) -> None:
        context = multiprocessing.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory(prefix="ptbench-")
        rendezvous = Path(self.folder.name) / "rendezvous"
        self.connections: list[Connection] = []
        self.processes = []
        # It unblocks signals, and the followers are to inherit what is blocked here.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        for rank in range(1, devices):
            ours, theirs = context.Pipe()
            arguments = (theirs, rendezvous, rank, devices, accelerator)
            process = context.Process(target=follow, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self.connections.append(ours)
            self.processes.append(process)
        join_group(rendezvous, 0, devices, accelerator)
        self.released: list[tuple[int, int]] = []  # states that nothing here refers to any more
        atexit.register(self.stop)

    def release(self, name: tuple[int, int]) -> None:
        """Have the followers drop a state with the next thing that they are told."""
        self.released.append(name)

    def tell(self, backend: int, method: str, *arguments: Any) -> None:
        """Have every follower do something; their answers are not waited for."""
        released, self.released = self.released, []
        for connection in self.connections:
            connection.send((backend, method, arguments, released))

    def ask(self, backend: int, method: str, *arguments: Any) -> list[Any]:
        """Have every follower do something and return its answer."""
        self.tell(backend, method, *arguments)
        return [connection.recv() for connection in self.connections]

    def stop(self) -> None:
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            process.join(10)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        self.folder.cleanup()


def join_group(rendezvous: Path, rank: int, devices: int, accelerator: Accelerator) -> None:
    """Meet the other replicas' processes, all on this machine."""
    if accelerator == "cpu":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group(
        "nccl" if accelerator == "cuda" else "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=devices,
        timeout=timedelta(minutes=10),
    )


def end_with_parent() -> None:
    """Be killed when replica 0 dies, which would else be waited for, for minutes (prctl(2))."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is None or not parent.is_alive():  # it died before
        os._exit(1)


def follow(
    connection: Connection, rendezvous: Path, rank: int, devices: int, accelerator: Accelerator
) -> None:
    """A follower's life: do as told until replica 0 closes the connection or dies."""
    end_with_parent()
    join_group(rendezvous, rank, devices, accelerator)
    replicas: dict[int, Replica] = {}
    states: dict[tuple[int, int], list[LayerState]] = {}  # by backend and handle

    def create(
        backend: int, recipe: Recipe, vocabulary_size: int, seed: int, accelerator: Accelerator,
        threads: int,
    ) -> None:  # fmt: skip
        replicas[backend] = Replica(
            recipe, vocabulary_size, seed, accelerator, threads, rank, devices
        )

    def load_parameters(backend: int, parameters: Parameters, step: int) -> None:
        replicas[backend].model.load(parameters)
        replicas[backend].step = step

    def load_slots(backend: int, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        replicas[backend].load_slots(arrays)

    def initial_state(backend: int, batch_size: int, handle: int) -> None:
        states[backend, handle] = replicas[backend].initial_state(batch_size)

    def load_state(backend: int, arrays: list[dict[str, npt.NDArray[Any]]], handle: int) -> None:
        states[backend, handle] = replicas[backend].load_state(arrays[rank])

    def send_state(backend: int, handle: int) -> None:
        connection.send(replicas[backend].state_arrays(states[backend, handle]))

    def send_peak_memory(backend: int) -> None:
        connection.send(replicas[backend].peak_memory())

    def train_step(
        backend: int, inputs: Tokens, targets: Tokens, mask: Mask, before: int, after: int,
        learning_rate: float, averaged: int,
    ) -> None:  # fmt: skip
        state = states[backend, before]
        step = replicas[backend].train_step(inputs, targets, mask, state, learning_rate, averaged)
        states[backend, after] = step.state

    def backward(backend: int, inputs: Tokens, targets: Tokens, mask: Mask, before: int) -> None:
        replicas[backend].backward(inputs, targets, mask, states[backend, before])

    def close(backend: int) -> None:
        del replicas[backend]

    methods: dict[str, Callable[..., None]] = {
        function.__name__: function
        for function in (
            create, load_parameters, load_slots, initial_state, load_state, send_state,
            send_peak_memory, train_step, backward, close,
        )
    }  # fmt: skip
    with contextlib.suppress(EOFError):
        while True:
            backend, method, arguments, released = connection.recv()
            for key in released:
                states.pop(key, None)
            methods[method](backend, *arguments)
