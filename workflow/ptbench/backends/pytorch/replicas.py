"""Data-parallel replicas: one process for each, which all call the same methods in the same order.

The process that makes a backend of N devices is replica 0 and starts the others. Whatever it calls
`on_every_replica` is sent to them: the function and its arguments. Each replica calls it on objects
of its own, and they meet in torch.distributed's collective operations.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import itertools
import multiprocessing
import os
import signal
import tempfile
import weakref
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, ClassVar, Concatenate, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ptbench.errors import PtbenchError
from ptbench.model.recipe import Accelerator

P = ParamSpec("P")
T = TypeVar("T")
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Replicated:
    """Base of what every replica has one of. Sent to another replica, it is that replica's own.

    All replicas make such objects in the same order, so their numbers agree. Those of replica 0
    live as long as something there refers to them, and their counterparts a little longer.
    """

    numbers = itertools.count()
    counterparts: ClassVar[dict[int, Replicated]] = {}  # on replicas 1 to N - 1
    gone: ClassVar[list[int]] = []  # on replica 0: what nothing refers to any more

    def replicate(self) -> None:
        """Give the object its number; call it once on each replica."""
        self.number = next(Replicated.numbers)
        if dist.get_rank() == 0:
            weakref.finalize(self, Replicated.gone.append, self.number)
        else:
            Replicated.counterparts[self.number] = self

    def shared(self) -> dict[str, Any]:
        """Return the attributes that replica 0 decides for all."""
        return {}

    def __reduce__(self) -> Any:
        """Pickle as the number and the shared attributes, which the counterpart is given."""
        return counterpart, (self.number,), self.shared() or None


def counterpart(number: int) -> Replicated:
    """Return this replica's object of that number."""
    return Replicated.counterparts[number]


class Replicas:
    """Replicas 1 to N - 1 of this process, which is replica 0."""

    _started: ClassVar[Replicas | None] = None

    @classmethod
    def of(cls, devices: int, accelerator: Accelerator) -> Replicas | None:
        """Return the other replicas, started when first asked for; None if this is one of them.

        Raises:
            PtbenchError: if one of them ends before it can take part.
        """
        if _to_first is not None:
            return None
        if cls._started is None:
            cls._started = cls(devices, accelerator)
        assert len(cls._started.processes) == devices - 1, "torch.distributed has one size"
        return cls._started

    def __init__(self, devices: int, accelerator: Accelerator) -> None:
        context = multiprocessing.get_context("spawn")
        self.connections: list[Connection] = []
        self.processes: list[Any] = []
        # The tracker unblocks signals, and the replicas must inherit what is blocked here: they
        # would die of a signal that replica 0 takes to finish its step.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        self.folder = tempfile.TemporaryDirectory(prefix="ptbench-")
        rendezvous = Path(self.folder.name) / "rendezvous"
        for rank in range(1, devices):
            ours, theirs = context.Pipe()
            arguments = theirs, rendezvous, rank, devices, accelerator
            process = context.Process(target=follow, args=arguments, daemon=True)
            process.start()
            theirs.close()  # so that the connection breaks when the replica ends
            self.connections.append(ours)
            self.processes.append(process)
        atexit.register(self.stop)
        meet(self)
        join_group(rendezvous, 0, devices, accelerator)

    def call(self, function: Callable[..., Any], *arguments: Any, **keywords: Any) -> None:
        """Have every other replica call a function; nothing is returned, nor waited for."""
        gone = Replicated.gone[:]
        del Replicated.gone[: len(gone)]
        try:
            for connection in self.connections:
                connection.send((function, arguments, keywords, gone))
        except BrokenPipeError:
            self.check()
            raise

    def check(self) -> None:
        """Raise PtbenchError if a replica has ended, or is about to."""
        ended = []
        for rank, process in enumerate(self.processes, start=1):
            process.join(1)
            if process.exitcode is not None:
                ended.append(f"replica {rank} ended with exit status {process.exitcode}")
        if ended:
            self.stop(seconds=0)
            raise PtbenchError(f"pytorch: {', '.join(ended)}; its own output says why")

    def stop(self, seconds: float = 10) -> None:
        """End the other replicas; those that do not by themselves in that time are killed."""
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            process.join(seconds)
            process.kill()
            process.join()
        if dist.is_initialized():
            dist.destroy_process_group()


def on_every_replica(
    method: Callable[Concatenate[Any, P], T],
) -> Callable[Concatenate[Any, P], T]:
    """Have a method of a backend called on all its replicas; returns what it does on this one."""

    @functools.wraps(method)
    def replicated(self: Any, *arguments: P.args, **keywords: P.kwargs) -> T:
        if self.replicas is None:
            return method(self, *arguments, **keywords)
        self.replicas.call(replicated, self, *arguments, **keywords)
        try:
            return method(self, *arguments, **keywords)
        except RuntimeError:  # such as a connection that broke
            self.replicas.check()
            raise

    return replicated


def gathered(part: Tensor) -> Tensor:
    """Return every replica's part, one after the other along the first axis."""
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, part)
    return torch.cat(parts)


def join_group(rendezvous: Path, rank: int, devices: int, accelerator: Accelerator) -> None:
    """Meet the other replicas, all on this machine."""
    dist.init_process_group(
        "nccl" if accelerator == "cuda" else "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=devices,
        timeout=timedelta(minutes=10),
    )


_to_first: Connection | None = None  # set in replicas 1 to N - 1


def meet(others: Replicas | None) -> None:
    """Return on replica 0 when all others have come as far; call it on each.

    A collective operation would wait for minutes for a replica that has ended.

    Args:
        others: the other replicas; None if this is one of them.

    Raises:
        PtbenchError: if one of them has ended instead.
    """
    if others is None:
        assert _to_first is not None
        _to_first.send(None)
        return
    try:
        for connection in others.connections:
            connection.recv()
    except (EOFError, ConnectionResetError):
        others.check()
        raise


def follow(
    connection: Connection, rendezvous: Path, rank: int, devices: int, accelerator: Accelerator
) -> None:
    """Be a replica other than 0: call what it calls, until it closes the connection or dies."""
    global _to_first
    _to_first = connection
    end_with_parent()
    meet(None)
    join_group(rendezvous, rank, devices, accelerator)
    with contextlib.suppress(EOFError):
        while True:
            function, arguments, keywords, gone = connection.recv()
            for number in gone:
                del Replicated.counterparts[number]
            function(*arguments, **keywords)


def end_with_parent() -> None:
    """Be killed when replica 0 dies, which would else be waited for, for minutes (prctl(2))."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is None or not parent.is_alive():  # it died before
        os._exit(1)
