"""Processes that make up one backend and all call the same methods in the same order.

The process that makes the backend is the first one and starts the others: for PyTorch one for each
further replica, for JAX one for each further node. Whatever it calls `on_every_replica` is sent to
them: the function and its arguments. Each calls it on objects of its own, and they meet in the
framework's collective operations. `nodes.py` starts those on other nodes.
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
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from ptbench.backends import nodes
from ptbench.backends.base import Backend
from ptbench.errors import PtbenchError
from ptbench.model.recipe import Accelerator

Method = TypeVar("Method", bound=Callable[..., Any])
# Called in each process, with the address of a meeting point, its rank, and its group.
Join = Callable[[str, int, "Group"], None]
PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class Group:
    """The processes of a backend."""

    framework: str
    accelerator: Accelerator
    nodes: int
    each: int  # processes on each node
    join: Join
    leave: Callable[[], None]  # called in the first process when the others have ended

    @property
    def size(self) -> int:
        """Return the number of processes."""
        return self.nodes * self.each


class Replicated:
    """Base of what every process has one of. Sent to another process, it is that one's own.

    All make such objects in the same order, so their numbers agree. Those of the first process
    live as long as something there refers to them, and their counterparts a little longer.
    """

    numbers = itertools.count()
    counterparts: ClassVar[dict[int, Replicated]] = {}  # in all processes but the first
    gone: ClassVar[list[int]] = []  # in the first: what nothing refers to any more

    def replicate(self) -> None:
        """Give the object its number; call it once in each process."""
        self.number = next(Replicated.numbers)
        if _to_first is None:
            weakref.finalize(self, Replicated.gone.append, self.number)
        else:
            Replicated.counterparts[self.number] = self

    def __reduce__(self) -> tuple[Any, ...]:
        """Be sent as the number, by which the receiver finds its own; see pickle."""
        return _counterpart, (self.number,)


def _counterpart(number: int) -> Replicated:
    return Replicated.counterparts[number]


class ReplicatedBackend(Backend, Replicated):
    """A backend that may have a part in several processes; `replicas` are the others."""

    replicas: Replicas | None = None

    def take_part(self, each: int, join: Join, leave: Callable[[], None]) -> None:
        """Start the other processes, each with its part of the backend, or be one of them."""
        setup = self.setup
        group = Group(self.name, setup.accelerator, setup.nodes, each, join, leave)
        self.replicas = other_replicas(group)
        if self.replicas is not None:
            self.replicas.call(type(self), setup)
        self.replicate()

    def __reduce__(self) -> tuple[Any, ...]:
        """Have what the first process alone is told take effect in the one this is sent to."""
        return *super().__reduce__(), {"step": self.step, "average_from": self.average_from}


class Replicas:
    """All processes but this one, which is the first."""

    def __init__(self, group: Group) -> None:
        """Start them, and join them.

        Raises:
            PtbenchError: if one of them ends before it can take part.
        """
        context = multiprocessing.get_context("spawn")
        self.group = group
        self.processes: list[Any] = []
        # The tracker unblocks signals, and the replicas must inherit what is blocked here: they
        # would die of a signal that the first process takes to finish its step.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        self.elsewhere = nodes.start(group.nodes, group.each) if group.nodes > 1 else []
        if self.elsewhere:
            rendezvous = f"tcp://{self.elsewhere[0].address}:{nodes.free_port()}"
        else:
            self.folder = tempfile.TemporaryDirectory(prefix="ptbench-")
            rendezvous = f"file://{Path(self.folder.name) / 'rendezvous'}"
        self.connections: list[Connection] = []
        for rank in range(1, group.each):
            ours, theirs = context.Pipe()
            arguments = theirs, rendezvous, rank, group
            process = context.Process(target=follow, args=arguments, daemon=True)
            process.start()
            theirs.close()  # so that the connection breaks when the replica ends
            self.connections.append(ours)
            self.processes.append(process)
        for rank, other in enumerate(self.elsewhere, start=group.each):
            other.connection.send((follow, (rendezvous, rank, group)))
            self.connections.append(other.connection)
        atexit.register(self.stop)
        meet(self)
        group.join(rendezvous, 0, group)

    def call(self, function: Callable[..., Any], *arguments: Any, **keywords: Any) -> None:
        """Have every other process call a function; nothing is returned, nor waited for."""
        gone = Replicated.gone[:]
        del Replicated.gone[: len(gone)]
        with self.watched():
            for connection in self.connections:
                connection.send((function, arguments, keywords, gone))

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Raise PtbenchError in place of errors that come of a process's end, broken connections.

        It names those that ended, and the exit status of those on this machine.
        """
        try:
            yield
        except (EOFError, OSError, RuntimeError):
            ended = []
            for rank, process in enumerate(self.processes, start=1):
                process.join(1)  # it may be about to end
                if process.exitcode is not None:
                    ended.append(f"replica {rank} ended with exit status {process.exitcode}")
            for rank, other in enumerate(self.elsewhere, start=1 + len(self.processes)):
                if other.ended():
                    ended.append(f"replica {rank} ended on {other.node}")
            if not ended:
                raise
            self.stop(seconds=0)
            said = f"{' and '.join(ended)}; the reason is in what it printed"
            raise PtbenchError(f"{self.group.framework}: {said}") from None

    def stop(self, seconds: float = 10) -> None:
        """End the others; those here that do not by themselves in that time are killed."""
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            process.join(seconds)
            process.kill()
            process.join()
        self.group.leave()


@functools.cache
def other_replicas(group: Group) -> Replicas | None:
    """Return the others, started when first asked for; None if this process is one of them."""
    return Replicas(group) if _to_first is None else None


def on_every_replica(method: Method) -> Method:
    """Have a method of a backend called in all its processes; return what it does in this one."""

    @functools.wraps(method)
    def replicated(self: Any, *arguments: Any, **keywords: Any) -> Any:
        if self.replicas is None:
            return method(self, *arguments, **keywords)
        self.replicas.call(replicated, self, *arguments, **keywords)
        with self.replicas.watched():
            return method(self, *arguments, **keywords)

    return replicated  # type: ignore[return-value]


_to_first: Connection | None = None  # set in all processes but the first


def meet(others: Replicas | None) -> None:
    """Return in the first process when all others have come as far, too; each process calls it.

    It goes before operations that would wait for minutes for a process that has ended.

    Args:
        others: the other processes; None if this is one of them.

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


def follow(connection: Connection, rendezvous: str, rank: int, group: Group) -> None:
    """Be another process: call what the first one calls, until it closes the connection or dies."""
    global _to_first
    _to_first = connection
    if (parent := multiprocessing.parent_process()) is not None:  # on the first one's machine
        die_with(parent)
    meet(None)
    group.join(rendezvous, rank, group)
    with contextlib.suppress(EOFError):
        while True:
            function, arguments, keywords, gone = connection.recv()
            for number in gone:
                del Replicated.counterparts[number]
            function(*arguments, **keywords)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # to destroy what PyTorch has loaded would take a second more


def die_with(parent: Any) -> None:
    """Be killed when the first process dies, which would else be waited for (prctl(2))."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if not parent.is_alive():  # it died before
        os._exit(1)
