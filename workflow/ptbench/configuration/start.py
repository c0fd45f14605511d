"""What is checked before Snakemake's own start, because its words for it would name no file.

Snakemake reads every `--configfile` and makes a folder in the user's home before it reads the
Snakefile. Before both it reads `profiles/default/config.yaml`, which calls `check`. When the run
begins, the Snakefile calls `take_sigterm`, and `pass_on_signals` inside a job.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import psutil
from snakemake.common import get_appdirs

from ptbench.errors import PtbenchError, or_exit
from ptbench.yaml import read_mapping

EMPTY = "profiles/empty.yaml"  # a mapping without keys


def check() -> None:
    """Exit with a sentence if this Snakemake cannot start."""
    words = or_exit(filled_in, sys.argv[1:])
    or_exit(check_home, Path(get_appdirs().user_cache_dir))
    if words != sys.argv[1:]:
        python = sys.orig_argv[: -len(words)]
        os.execv(sys.executable, [sys.executable, *python[1:], *words])


def filled_in(words: Sequence[str]) -> list[str]:
    """Read what follows `--configfile`, and return the command line without files that are empty.

    Snakemake refuses a file that holds nothing. One that holds `{}` takes its place.

    Raises:
        ConfigurationError: if a file cannot be read.
    """
    filled, follows = [], False
    for word in words:
        option, equals, name = word.partition("=")
        if word.startswith("-"):
            follows = option in ("--configfile", "--configfiles")
            if follows and equals and not read_mapping(Path(name)):
                word = f"{option}={EMPTY}"
        elif follows and not read_mapping(Path(word)):
            word = EMPTY
        filled.append(word)
    return filled


def check_home(cache: Path) -> None:
    """Make the folder where Snakemake keeps sources.

    Raises:
        PtbenchError: if that is not possible; it says what to set.
    """
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PtbenchError(
            f"{cache} cannot be made: {error.strerror}. Snakemake keeps files there: set HOME to a "
            "folder that is there, or XDG_CACHE_HOME to one that you can write to"
        ) from error


def take_sigterm() -> None:
    """Call the present handler of SIGTERM in a thread of its own from now on.

    Snakemake's handler waits for a lock. Handlers run in the main thread: where that has the lock,
    the run would stand still for ever (docs/slurm-upstream.md).
    """
    handler = signal.getsignal(signal.SIGTERM)
    if callable(handler):
        signal.signal(
            signal.SIGTERM, lambda *what: threading.Thread(target=handler, args=what).start()
        )


def pass_on_signals() -> None:
    """Pass SIGTERM and SIGUSR1 on to the processes that this one has started, from now on.

    A Slurm that follows processes by cgroups signals the first process of a job's step alone. That
    is Snakemake; the trainer is a child of it. SIGUSR1 does nothing else, and waits in a process
    that is not ready for it: what this process starts inherits that it is blocked.
    """
    received, written = os.pipe()
    os.set_blocking(written, False)
    signal.set_wakeup_fd(written)  # gets the number of each signal, whichever thread takes it
    signal.signal(signal.SIGUSR1, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    threading.Thread(target=_pass_on, args=(received,), name="signals", daemon=True).start()


def _pass_on(received: int) -> None:
    passed_on = {signal.SIGTERM, signal.SIGUSR1}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, passed_on)
    while True:
        [number] = os.read(received, 1)
        if number in passed_on:
            for child in psutil.Process().children():
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.send_signal(number)
