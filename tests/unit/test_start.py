"""What is done at the start of a run for Snakemake."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from ptbench.errors import InterruptionError

# Signals are of a process, and other tests have handlers in this one: each is tried in its own.
HOLDER = """
import os, signal, threading
from ptbench.configuration.start import take_sigterm
lock, handled = threading.Lock(), threading.Event()
def handler(*_):
    with lock:
        handled.set()
signal.signal(signal.SIGTERM, handler)
take_sigterm()
with lock:
    os.kill(os.getpid(), signal.SIGTERM)
    assert not handled.wait(0.1)
assert handled.wait(30)
"""


def test_sigterm_that_interrupts_the_holder_of_a_lock_does_not_stop_the_run() -> None:
    subprocess.run([sys.executable, "-c", HOLDER], check=True, timeout=60)


SNAKEMAKE = """
import signal, subprocess, sys
from ptbench.configuration.start import pass_on_signals
pass_on_signals()
signal.signal(signal.SIGTERM, lambda *_: None)
print("passing on", flush=True)
sys.exit(subprocess.call([sys.executable, "-c", sys.argv[1]]))
"""
TRAINER = """
import sys, time
{first}
from ptbench.training.signals import ProcessSignals
signals = ProcessSignals()
signals.losable = {ready}
signals.say = lambda _: None
print("training", flush=True)
while not ({ready} and signals.interrupted()):
    time.sleep(0.01)
sys.exit(signals.received.name)
"""
NOT_READY = 'print("starting", flush=True); sys.stdin.readline()'


@contextlib.contextmanager
def started(trainer: str) -> Iterator[subprocess.Popen[str]]:
    """A stand-in for Snakemake that has started a trainer; killed with it at the end."""
    process = subprocess.Popen(
        [sys.executable, "-c", SNAKEMAKE, trainer], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "passing on\n"
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.parametrize("sent", ["SIGUSR1", "SIGTERM"])
def test_a_signal_to_snakemake_in_a_job_reaches_its_trainer(sent: str) -> None:
    with started(TRAINER.format(first="", ready=True)) as snakemake:
        assert snakemake.stdout.readline() == "training\n"
        snakemake.send_signal(signal.Signals[sent])
        _, said = snakemake.communicate(timeout=60)
    assert (said, snakemake.returncode) == (f"{sent}\n", 1)


@pytest.mark.parametrize("all_of_the_step", [True, False])
def test_a_warning_before_the_trainer_is_ready_is_not_lost(all_of_the_step: bool) -> None:
    with started(TRAINER.format(first=NOT_READY, ready=False)) as snakemake:
        assert snakemake.stdout.readline() == "starting\n"
        if all_of_the_step:
            os.killpg(snakemake.pid, signal.SIGUSR1)
        else:
            snakemake.send_signal(signal.SIGUSR1)
        snakemake.communicate("go on\n", timeout=60)
    assert snakemake.returncode == InterruptionError.status
