"""Jobs of an earlier run that are still in Slurm's queue.

Snakemake forgets its jobs when it is killed, and they run on. Started again it would submit each a
second time, and a job begins with the removal of the cell's metrics.json, which the first job may
have written by then.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from ptbench.errors import PtbenchError

SQUEUE = ("squeue", "--noheader", "--format=%i %t %k %Z")  # id, state, comment, working directory


def queued(folder: Path, squeue: Callable[[], str]) -> dict[str, str]:
    """Jobs that a Snakemake submitted from a folder: by id, what they are to do.

    Args:
        folder: where it ran.
        squeue: gives a line for each job in the queue, as `SQUEUE` asks for them.
    """
    jobs = {}
    for line in squeue().splitlines():
        identifier, _, comment, directory = line.split(" ", 3)
        if comment.startswith("rule_") and os.path.realpath(directory) == os.path.realpath(folder):
            jobs[identifier] = comment
    return jobs


def ask_squeue() -> str:
    """The queue as Slurm tells it; empty where there is no Slurm, or none that answers."""
    if shutil.which(SQUEUE[0]) is None:
        return ""
    try:
        return subprocess.run(SQUEUE, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def refuse_duplicates(folder: Path, squeue: Callable[[], str] = ask_squeue) -> None:
    """Refuse to run while jobs of an earlier run are in the queue.

    Raises:
        PtbenchError: if there are; says which, and what to do.
    """
    jobs = queued(folder, squeue)
    if jobs:
        raise PtbenchError(
            f"{'1 job' if len(jobs) == 1 else f'{len(jobs)} jobs'} of an earlier run "
            f"{'is' if len(jobs) == 1 else 'are'} still in Slurm's queue, and would be submitted a "
            "second time. Wait until all are done, or cancel them; their cells save what they have "
            f"and go on from there: scancel {' '.join(jobs)}"
        )
