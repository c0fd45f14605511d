"""Which process has a cell, and whether that process is alive.

This works between the nodes of a cluster, which share a file system but no processes: a living
holder touches its file, and only that file system's clock measures how long ago.
"""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from pydantic import Field

from ptbench.model.recipe import Model

HEARTBEAT_SECONDS = 30.0  # between two touches
SILENCE_SECONDS = 300.0  # after which a holder on another machine is dead: ten touches missed


class Holder(Model):
    """A process, described so that no other process anywhere, at any time, is mistaken for it."""

    host: str = Field(description="Name of its machine.")
    pid: int = Field(description="Number of the process.")
    machine: str | None = Field(
        description="The machine since it booted, and its namespace of processes; null: unknown."
    )
    started: str | None = Field(
        description="When the process was started [clock ticks since boot]; null: unknown."
    )
    slurm_job: str | None = Field(None, description="Cluster and number of its Slurm job.")
    slurm_restarts: int = Field(0, description="How often Slurm had requeued the job.")
    slurm_nodes: int | None = Field(None, description="Nodes of the job.")

    def __str__(self) -> str:
        job = f", Slurm job {self.slurm_job.rpartition(' ')[2]}" if self.slurm_job else ""
        return f"process {self.pid} on {self.host}{job}"


def this_process(environment: Mapping[str, str] = os.environ) -> Holder:
    """Return this process as a holder."""
    job = environment.get("SLURM_JOB_ID")
    # Snakemake's plugin removes most of Slurm's variables from the job, SLURM_RESTART_COUNT too.
    # Its inner srun then sets those of a step: SLURM_NNODES, the job's if that has one node.
    nodes = environment.get("SLURM_JOB_NUM_NODES") or environment.get("SLURM_NNODES", "")
    return Holder(
        host=socket.gethostname(),
        pid=os.getpid(),
        machine=machine(),
        started=started(os.getpid()),
        slurm_job=job and f"{environment.get('SLURM_CLUSTER_NAME', '')} {job}".strip(),
        slurm_restarts=int(environment.get("SLURM_RESTART_COUNT", 0)),
        slurm_nodes=int(nodes) if nodes.isdigit() else None,
    )


def machine() -> str | None:
    """Identify this machine, its boot, and the container whose processes this one can see."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return None


def started(pid: int) -> str | None:
    """Return when a process was started; None if there is none or it is a zombie."""
    try:
        # The fields after the command's name, which may contain spaces and brackets: proc(5).
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def lives(holder: Holder, silence: float, asking: Holder) -> bool:
    """Return whether a holder is alive, as far as can be known from here.

    Args:
        holder: the process in question.
        silence: since it last touched its file [s], by the file system's clock.
        asking: this process.
    """
    if asking.slurm_job and asking.slurm_job == holder.slurm_job:
        if asking.slurm_restarts > holder.slurm_restarts:
            return False  # Slurm has requeued the job: what ran before is gone
        if asking.slurm_nodes == 1 and asking.host != holder.host:
            return False  # the job has one node, now another one: what ran before is gone
    if holder.machine is not None and holder.machine == asking.machine:
        return holder.started is not None and started(holder.pid) == holder.started
    return silence < SILENCE_SECONDS


def silence_of(path: Path) -> float:
    """Return the seconds since a file was touched, by the clock of its file system.

    Raises:
        FileNotFoundError: if it is not there.
    """
    # Opened, because NFS then asks its server and not its cache.
    with path.open("rb") as file:
        touched = os.fstat(file.fileno()).st_mtime
    try:
        with tempfile.TemporaryFile(dir=path.parent) as now:
            now.write(b".")  # a file without content might get its time from this machine
            now.flush()
            os.fsync(now.fileno())
            return os.fstat(now.fileno()).st_mtime - touched
    except OSError:  # not allowed to write there: only this machine's own clock is left
        return time.time() - touched


def touch(path: Path) -> None:
    """Show others that this process is alive."""
    with contextlib.suppress(OSError):  # a full or absent disk; the next touch may do
        os.utime(path)
