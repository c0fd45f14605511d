"""Signals that end a run.

These are SIGTERM (of schedulers), SIGUSR1 (of Slurm, before a time limit), SIGINT (of Ctrl-C) and
SIGHUP (of a terminal that is closed).

A thread of its own receives the signals, so that they are noticed while the main thread is deep in
a framework's code. They are blocked in every other thread and, because that is inherited, in every
process that the trainer starts: replicas do not end before the trainer.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

import psutil

from ptbench.errors import InterruptionError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
GRACE_SECONDS = 20.0  # Slurm kills 30 s after its SIGTERM (KillWait)


class Signals:
    """Whether this process has been told to end; this one takes no signals, so it never is."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.losable = False  # whether there is work to save; without it the process ends at once
        self.saving = False  # a write is under way, which must not be cut off

    def interrupted(self) -> bool:
        """Return whether the process has been told to end."""
        return self.received is not None

    @contextlib.contextmanager
    def written(self) -> Iterator[None]:
        """Protect a block that saves the work from a hard end."""
        self.saving = True
        try:
            yield
        finally:
            self.saving = False


class ProcessSignals(Signals):
    """Takes this process's signals and remembers the first.

    Make it before anything that starts threads or processes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.say: Callable[[str], None] = print  # called with a line when a signal comes
        self.abandon: Callable[[str], None] = lambda _: None  # called with the reason at a hard end
        self.signals = set(SIGNALS)
        for one in (signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(one) == signal.SIG_IGN:  # as `&` in a script, and nohup, have it
                self.signals.discard(one)
        # Libraries may unblock a signal in another thread: Python writes its number to this pipe
        # whichever thread gets it.
        self._pipe, written = os.pipe()
        os.set_blocking(written, False)
        signal.set_wakeup_fd(written, warn_on_full_buffer=False)
        for taken in self.signals:
            signal.signal(taken, lambda *_: None)
        signal.pthread_sigmask(signal.SIG_BLOCK, self.signals)
        threading.Thread(target=self._take, name="signals", daemon=True).start()

    def _take(self) -> None:
        """Wait for a signal, and end the process if it does not end by itself in time."""
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self.signals)
        received = signal.Signals(os.read(self._pipe, 1)[0])
        self.received = received
        if not self.losable:
            self._end(f"{received.name} came before the first step")
        self.say(f"{received.name}: saving, and ending")
        time.sleep(GRACE_SECONDS)
        while self.saving:
            time.sleep(0.1)
        self._end(f"{received.name}: the step under way did not end in {GRACE_SECONDS:.0f} s")

    def _end(self, reason: str) -> None:
        """End this process and those it started, whatever they are doing, and say why."""
        reason += "; the same command goes on from the last checkpoint"
        try:
            self.abandon(reason)
            self.say(f"ptbench: {reason}")
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            end_children()
            os._exit(InterruptionError.status)


def end_children() -> None:
    """Kill every process that this one started; SIGKILL is the one signal they do not block."""
    for child in psutil.Process().children(recursive=True):
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue
