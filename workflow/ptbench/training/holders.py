"""Which process it is that has something in its hands, and whether it still lives.

Works between the nodes of a cluster, which share no processes but a file system: a living holder
touches its file, and how long ago is told by that file system's clock alone.
"""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import time
import uuid
from collections.abc import Mapping
from pathlib import Path

from pydantic import Field

from ptbench.model.recipe import Model

HEARTBEAT_SECONDS = 30.0  # between two touches
SILENCE_SECONDS = 300.0  # after which a holder on another machine is dead: ten touches missed


class Holder(Model):
    """A process, so described that no other at any time or place is taken for it."""

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
    """The process that asks."""
    job = environment.get("SLURM_JOB_ID")
    # Snakemake's plugin takes all but a few of Slurm's variables from the job, SLURM_RESTART_COUNT
    # too, and its inner srun sets those of a step again, which has the job's only node or some.
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
    """Tells apart machines, their boots, and containers that do not see each other's processes."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return None


def started(pid: int) -> str | None:
    """When a process was started; None if there is none, or it has ended and waits to be reaped."""
    try:
        # The fields after the command's name, which may contain anything: proc(5).
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def lives(holder: Holder, silence: float, asking: Holder) -> bool:
    """Whether a holder is still at work, as far as can be known from here.

    Args:
        holder: whom it is about.
        silence: since it last touched its file [s], by the file system's clock.
        asking: this process.
    """
    if asking.slurm_job and asking.slurm_job == holder.slurm_job:
        if asking.slurm_restarts > holder.slurm_restarts:
            return False  # Slurm has started the job again: what ran before is gone
        if asking.slurm_nodes == 1 and asking.host != holder.host:
            return False  # and so it is where the job's only node has become another
    if holder.machine is not None and holder.machine == asking.machine:
        return holder.started is not None and started(holder.pid) == holder.started
    return silence < SILENCE_SECONDS


def silence_of(path: Path) -> float:
    """Seconds since a file was touched, by the clock of the file system that it is on.

    Raises:
        FileNotFoundError: if it is not there.
    """
    # Opened, because NFS then asks its server instead of what it remembers.
    with path.open("rb") as file:
        touched = os.fstat(file.fileno()).st_mtime
    try:
        with tempfile.TemporaryFile(dir=path.parent) as now:
            now.write(b".")  # a file without content might get its time from this machine
            now.flush()
            os.fsync(now.fileno())
            return os.fstat(now.fileno()).st_mtime - touched
    except OSError:  # who may not write there may look all the same, and has but its own clock
        return time.time() - touched


def touch(path: Path) -> None:
    """Say that this process lives."""
    with contextlib.suppress(OSError):  # a full or absent disk; the next touch may do
        os.utime(path)


def write_new(path: Path, text: str) -> bool:
    """Make a file with this content; False if there is one already.

    By link(2), which one process alone can succeed with, on NFS too, and which shows others the
    whole content or nothing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    own = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with own.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        try:
            path.hardlink_to(own)
        except FileExistsError:
            # A server's answer may be lost and the link there all the same (open(2), on NFS).
            return own.stat().st_nlink == 2
        return True
    finally:
        own.unlink(missing_ok=True)
