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
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ptbench.errors import PtbenchError
from ptbench.model.recipe import Accelerator

Method = TypeVar("Method", bound=Callable[..., Any])
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

    def __reduce__(self) -> tuple[Any, ...]:
        """Be sent as the number, by which the receiver finds its own; see pickle."""
        return _counterpart, (self.number,)


def _counterpart(number: int) -> Replicated:
    return Replicated.counterparts[number]


class Replicas:
    """Replicas 1 to N - 1 of this process, which is replica 0."""

    def __init__(self, devices: int, accelerator: Accelerator) -> None:
        """Start them.

        Raises:
            PtbenchError: if one of them ends before it can take part.
        """
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
        with self.watched():
            for connection in self.connections:
                connection.send((function, arguments, keywords, gone))

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Raise PtbenchError in place of errors that come of a replica's end, broken connections.

        It names those that ended and their exit status.
        """
        try:
            yield
        except (EOFError, OSError, RuntimeError):
            ended = []
            for rank, process in enumerate(self.processes, start=1):
                process.join(1)  # it may be about to end
                if process.exitcode is not None:
                    ended.append(f"replica {rank} ended with exit status {process.exitcode}")
            if not ended:
                raise
            self.stop(seconds=0)
            message = f"pytorch: {' and '.join(ended)}; the reason is in what it printed"
            raise PtbenchError(message) from None

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


@functools.cache
def other_replicas(devices: int, accelerator: Accelerator) -> Replicas | None:
    """Return the others, started when first asked for; None if this process is one of them."""
    return Replicas(devices, accelerator) if _to_first is None else None


def on_every_replica(method: Method) -> Method:
    """Have a method of a backend called on all its replicas; return what it does on this one."""

    @functools.wraps(method)
    def replicated(self: Any, *arguments: Any, **keywords: Any) -> Any:
        if self.replicas is None:
            return method(self, *arguments, **keywords)
        self.replicas.call(replicated, self, *arguments, **keywords)
        with self.replicas.watched():
            return method(self, *arguments, **keywords)

    return replicated  # type: ignore[return-value]


def gathered(part: Tensor) -> Tensor:
    """Return every replica's part, one after the other along the first axis."""
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, part)
    return torch.cat(parts)


def join_group(rendezvous: Path, rank: int, devices: int, accelerator: Accelerator) -> None:
    """Meet the other replicas, all on this machine."""
    dist.init_process_group(
        "nccl" if accelerator == "cuda" else "gloo", f"file://{rendezvous}",
        timedelta(minutes=10), devices, rank,
    )  # fmt: skip


_to_first: Connection | None = None  # set in replicas 1 to N - 1


def meet(others: Replicas | None) -> None:
    """Return on replica 0 when all others have come as far, too; each replica calls it.

    It goes before operations that would wait for minutes for a replica that has ended.

    Args:
        others: the other replicas; None if this is one of them.

    Raises:
        PtbenchError: if one of them has ended instead.
    """
    if others is None:
        assert _to_first is not None
        _to_first.send(None)
    else:
        with others.watched():
            for connection in others.connections:
                connection.recv()


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
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # to destroy what PyTorch has loaded would take a second more


def end_with_parent() -> None:
    """Be killed when replica 0 dies, which would else be waited for, for minutes (prctl(2))."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is None or not parent.is_alive():  # it died before
        os._exit(1)
