"""What this project asks Slurm, and how it judges the answers. Nothing here knows Snakemake.

`snakemake_executor_plugin_ptbench_slurm` submits and follows the jobs with it, `ptbench status`
shows them.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Literal, NamedTuple

from ptbench.errors import PtbenchError

SQUEUE = ("squeue", "--noheader", "--all")  # also hidden partitions
FIELDS = "%A|%T|%S|%r|%N|%k|%Z"  # number, state, start, reason, nodes, comment, folder
# The user's variables that hide jobs from squeue or scancel, let the latter ask back, write times
# in another way, or let sbatch submit a job many times or wait for its end (Slurm's manual pages).
MISLEADING = re.compile(r"(SQUEUE_.*|SCANCEL_.*|SLURM_TIME_FORMAT|SBATCH_ARRAY_INX|SBATCH_WAIT)")

Scarce = Literal["memory", "time"]
Judgement = Literal["finished", "failed"]

FAILED = {
    "BOOT_FAIL", "CANCELLED", "DEADLINE", "FAILED", "LAUNCH_FAILED", "NODE_FAIL", "OUT_OF_MEMORY",
    "PREEMPTED", "REVOKED", "TIMEOUT",
}  # fmt: skip
# States in which Slurm may be about to start the job again under its number.
REQUEUED = {"BOOT_FAIL", "NODE_FAIL", "PREEMPTED"}
MISSES = 2  # answers in a row without a job, after which its record has left the queue

# What sbatch says when the same words may be taken a minute later: the controller is away or busy,
# or a limit of jobs in the queue is reached.
PASSING = re.compile(
    r"Unable to contact slurm controller|Connection refused|Socket timed out|communication failure"
    r"|Transport endpoint|temporarily unable to accept job|Resource temporarily unavailable"
    r"|MaxSubmit|backup controller in standby|Zero Bytes were transmitted",
    re.IGNORECASE,
)
OUT_OF_TIME = re.compile(r"\bSIGUSR1\b|DUE TO TIME LIMIT")
# The kernel or a node ended a process for want of main memory. "CUDA out of memory" is of another.
OUT_OF_MEMORY = re.compile(
    r"oom[-_ ]kill|Out Of Memory|exit status 137|\bMemoryError|bad_alloc|[Uu]nable to allocate"
    r"|annot allocate memory"
)

# How often the jobs of this Snakemake have run out of something, by their output and what it was.
ran_out: Counter[tuple[str, Scarce]] = Counter()


class Job(NamedTuple):
    """A job in Slurm's queue."""

    number: str
    state: str
    started: datetime | None  # or when Slurm expects to start it
    reason: str  # why it waits
    nodes: str
    comment: str
    folder: str  # where Snakemake ran

    def of(self, folder: Path) -> bool:
        """Return whether Snakemake submitted it, from this folder."""
        return self.comment.startswith("rule_") and (
            os.path.realpath(self.folder) == os.path.realpath(folder)
        )


def misleading(environment: Mapping[str, str]) -> set[str]:
    """Return the variables of a shell that Slurm's commands must not see."""
    return {name for name in environment if MISLEADING.fullmatch(name)}


def ask_squeue(*options: str) -> str | None:
    """Return what squeue prints; None where there is no Slurm, or Slurm does not answer."""
    if shutil.which(SQUEUE[0]) is None:
        return None
    hidden = misleading(os.environ)
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    try:
        answer = subprocess.run(
            (*SQUEUE, *options),
            env=environment, capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout


def queue() -> list[Job] | None:
    """Return everybody's jobs that wait or run; None where Slurm does not answer, or is not."""
    answer = ask_squeue(f"--format={FIELDS}")
    if answer is None:
        return None
    jobs = []
    for line in answer.splitlines():
        fields = line.split("|", FIELDS.count("|"))
        if len(fields) != FIELDS.count("|") + 1:  # the comment of a job has a line break
            continue
        number, state, start, reason, nodes, comment, folder = fields
        started = None if start == "N/A" else datetime.fromisoformat(start).astimezone()
        jobs.append(Job(number, state, started, reason, nodes, comment, folder))
    return jobs


class Queue(NamedTuple):
    """What Slurm has, as far as one project is concerned."""

    numbers: frozenset[str]  # of everybody's jobs
    jobs: Mapping[str, Job]  # that Snakemake submitted from the project's folder, by comment


def queue_of(folder: Path) -> Queue | None:
    """Return what Slurm has of a project; None where it does not answer, or is not."""
    jobs = queue()
    if jobs is None:
        return None
    own = {job.comment: job for job in jobs if job.of(folder)}
    return Queue(frozenset(job.number for job in jobs), own)


def comment_of(cell: str) -> str:
    """Return the comment of a cell's job, as Snakemake's plugin writes it, from the cell's path."""
    variant, framework, devices, seed = cell.split("/")
    wildcards = (variant, framework, devices.removeprefix("devices-"), seed.removeprefix("seed-"))
    return f"rule_train_wildcards_{'_'.join(wildcards)}"


def refuse_duplicates(folder: Path) -> None:
    """Refuse to run while jobs of an earlier run are in the queue.

    When Snakemake is killed it forgets its jobs, but they continue to run. A new Snakemake would
    submit each of them again, and a job begins by removing the cell's metrics.json, which the first
    job may have written by then.

    Raises:
        PtbenchError: if there are any; it says which, and what to do.
    """
    jobs = [job.number for job in queue() or () if job.of(folder)]
    if jobs:
        raise PtbenchError(
            f"{'1 job' if len(jobs) == 1 else f'{len(jobs)} jobs'} of an earlier run "
            f"{'is' if len(jobs) == 1 else 'are'} still in Slurm's queue and would be submitted a "
            "second time. Wait until all are done, or cancel them (their cells save their progress "
            f"and continue later): scancel {' '.join(jobs)}"
        )


def refuse_paths(*paths: str) -> None:
    """Refuse folders whose names a job's script would take apart: Snakemake does not quote them.

    Raises:
        PtbenchError: if a path has a space or another character that a shell reads as its own.
    """
    for path in paths:
        if shlex.quote(path) != path:
            raise PtbenchError(
                f"{path}: jobs cannot run in a path with a space or a character that the shell "
                "reads as its own; move the project, or make its environment elsewhere"
            )


# -------------------------------------------------------------------------- following jobs


def states(name: str) -> dict[str, str] | None:
    """Return the states of jobs of a name, by number; None if Slurm does not answer.

    Args:
        name: of the jobs, which they have in common.
    """
    answer = ask_squeue("--states=all", f"--name={name}", "--format=%A|%T")
    if answer is None:
        return None
    return dict(line.split("|", 1) for line in answer.splitlines() if "|" in line)


def judge(
    state: str | None, misses: int, requeues: bool, outputs: Sequence[str]
) -> Judgement | None:
    """Return how a job ended; None if it has not.

    Args:
        state: of the job; None: it is not in Slurm's answer.
        misses: such answers in a row, this one counted.
        requeues: Slurm starts a job again whose node failed.
        outputs: what the job is to make. They tell about a job whose record is gone: each is
            renamed into place when it is complete.
    """
    if state is None:
        if misses < MISSES:
            return None
        return "finished" if all(Path(output).exists() for output in outputs) else "failed"
    if state == "COMPLETED":
        return "finished"
    if state in REQUEUED and requeues:
        return None
    return "failed" if state in FAILED else None


def scarce(state: str | None, logs: str) -> Scarce | None:
    """Return what a failed job ran out of; None if it was neither memory nor time.

    Args:
        state: in which it ended, in Slurm's words; None: unknown.
        logs: what it printed.
    """
    if state == "TIMEOUT" or OUT_OF_TIME.search(logs):
        return "time"
    if state == "OUT_OF_MEMORY" or OUT_OF_MEMORY.search(logs):
        return "memory"
    return None


def sbatch_words(message: str) -> str:
    """Return what sbatch said, from the plugin's message, which has the whole call too."""
    match = re.search(r"The error message was '(.*?)'\.\n", message, re.DOTALL)
    return " ".join((match[1] if match else message).split())


def passes(words: str) -> bool:
    """Return whether sbatch may take a job a minute later that it refused with these words."""
    return PASSING.search(words) is not None
