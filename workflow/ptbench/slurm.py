"""What Slurm has in its queue: which jobs at all, and which of an earlier run.

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

SQUEUE = ("squeue", "--noheader", "--all")  # those of hidden partitions too
DUPLICATES = "%i %t %k %Z"  # id, state, comment, working directory
NUMBER = "%A"


def queued(folder: Path, squeue: Callable[[], str]) -> dict[str, str]:
    """Jobs that a Snakemake submitted from a folder: by id, what they are to do.

    Args:
        folder: where it ran.
        squeue: gives a line for each job in the queue, in the format `DUPLICATES`.
    """
    jobs = {}
    for line in squeue().splitlines():
        identifier, _, comment, directory = line.split(" ", 3)
        if comment.startswith("rule_") and os.path.realpath(directory) == os.path.realpath(folder):
            jobs[identifier] = comment
    return jobs


def ask_squeue(fields: str) -> str | None:
    """The queue as Slurm tells it; None where there is no Slurm, or none that answers.

    Args:
        fields: of the line about each job, as `--format` takes them.
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
    """The jobs that Slurm has, waiting or at work; None if that cannot be known."""
    answer = ask_squeue(NUMBER)
    return None if answer is None else set(answer.split())


def refuse_duplicates(
    folder: Path, squeue: Callable[[], str] = lambda: ask_squeue(DUPLICATES) or ""
) -> None:
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
