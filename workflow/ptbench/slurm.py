"""Ask Slurm which jobs are in its queue, and which of them an earlier run submitted.

When Snakemake is killed it forgets its jobs, but they continue to run. A new Snakemake would submit
each of them again, and a job begins by removing the cell's metrics.json, which the first job may
have written by then.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from ptbench.errors import PtbenchError

SQUEUE = ("squeue", "--noheader", "--all")  # also hidden partitions
DUPLICATES = "%i %t %k %Z"  # id, state, comment, working directory
NUMBER = "%A"


def queued(folder: Path, squeue: Callable[[], str]) -> dict[str, str]:
    """Return the jobs that Snakemake submitted from a folder: their comments, by job id.

    Args:
        folder: where Snakemake ran.
        squeue: returns a line for each job in the queue, in the format `DUPLICATES`.
    """
    jobs = {}
    for line in squeue().splitlines():
        identifier, _, comment, directory = line.split(" ", 3)
        if comment.startswith("rule_") and os.path.realpath(directory) == os.path.realpath(folder):
            jobs[identifier] = comment
    return jobs


def ask_squeue(fields: str) -> str | None:
    """Return what squeue prints; None where there is no Slurm, or Slurm does not answer.

    Args:
        fields: of each job's line, in the syntax of squeue's `--format`.
    """
    if shutil.which(SQUEUE[0]) is None:
        return None
    command = (*SQUEUE, f"--format={fields}")
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout


def job_numbers() -> set[str] | None:
    """Return the ids of all waiting and running jobs; None if Slurm does not answer."""
    answer = ask_squeue(NUMBER)
    return None if answer is None else set(answer.split())


def refuse_duplicates(
    folder: Path, squeue: Callable[[], str] = lambda: ask_squeue(DUPLICATES) or ""
) -> None:
    """Refuse to run while jobs of an earlier run are in the queue.

    Raises:
        PtbenchError: if there are any; it says which, and what to do.
    """
    jobs = queued(folder, squeue)
    if jobs:
        raise PtbenchError(
            f"{'1 job' if len(jobs) == 1 else f'{len(jobs)} jobs'} of an earlier run "
            f"{'is' if len(jobs) == 1 else 'are'} still in Slurm's queue and would be submitted a "
            "second time. Wait until all are done, or cancel them (their cells save their progress "
            f"and continue later): scancel {' '.join(jobs)}"
        )
