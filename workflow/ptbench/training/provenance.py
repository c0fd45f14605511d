"""The facts about a run's surroundings: commit, versions, hardware, environment variables."""

from __future__ import annotations

import datetime
import importlib
import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

import ptbench
from ptbench.isolation import ignored

PROJECT = Path(__file__).resolve().parents[3]


def git(*arguments: str) -> str | None:
    """Return the output of a git command on the project; None without git or a checkout.

    It takes no locks, because thousands of cells must not block a user's commit.
    """
    if not (PROJECT / ".git").exists():  # git would look for one in the folders above
        return None
    try:
        answer = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(PROJECT), *arguments],
            capture_output=True,
            text=True,
            timeout=30,
            # GIT_DIR and the like, which git sets for its hooks, would name another repository.
            env={key: value for key, value in os.environ.items() if not key.startswith("GIT_")},
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None


def cpu_model() -> str:
    """Return the processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def gpus() -> list[dict[str, str]]:
    """Return name and driver of each GPU that NVIDIA's library sees."""
    try:
        import pynvml
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    driver = str(pynvml.nvmlSystemGetDriverVersion())
    handles = map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount()))
    return [{"name": str(pynvml.nvmlDeviceGetName(h)), "driver": driver} for h in handles]


def installed_versions() -> dict[str, str]:
    """Return the version of every distribution in this environment, by its lower-case name."""
    found = importlib.metadata.distributions()
    return dict(sorted((each.name.lower(), each.version) for each in found if each.name))


def lock_sha256() -> str | None:
    """Return the SHA-256 of this environment's lock; None if ptbench did not build it."""
    try:
        facts = json.loads((Path(sys.prefix) / "environment.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return str(facts["lock_sha256"])


def provenance(package: str) -> dict[str, Any]:
    """Return where and with what a run is made: all that its recipe does not say.

    Args:
        package: name of the framework's module, which is imported if it has not been.
    """
    status = git("status", "--porcelain", "--untracked-files=no")
    return {
        "git_commit": git("rev-parse", "HEAD"),
        "git_dirty": None if status is None else bool(status),
        "framework_package": package,
        # not the distribution's, whose name depends on the accelerator (tensorflow-cpu)
        "framework_version": importlib.import_module(package).__version__,
        "versions": installed_versions(),
        "lock_sha256": lock_sha256(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "host": socket.gethostname(),
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": gpus(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "ignored_settings": ignored(),  # of the user's shell and home folder
        # where the system's libraries are taken from in place of the environment's
        "ld_library_path": os.environ.get("LD_LIBRARY_PATH"),
        "ld_preload": os.environ.get("LD_PRELOAD"),
        "cuda_visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "slurm_node": os.environ.get("SLURMD_NODENAME"),
        "command": sys.argv[1:],
    }


def run_facts() -> dict[str, Any]:
    """Return what the report's head says about where and when it was made."""
    status = git("status", "--porcelain", "--untracked-files=no")
    cores = os.cpu_count()
    memory = psutil.virtual_memory().total / 2**30
    return {
        "created": datetime.datetime.now(datetime.UTC).strftime("%d %B %Y, %H:%M UTC"),
        "version": ptbench.__version__,
        "commit": git("rev-parse", "HEAD"),
        "dirty": bool(status),
        "machine": f"{cpu_model()}, {cores} cores, {memory:.0f} GiB, {platform.system()}",
    }


def peak_memory_bytes() -> int:
    """Return the largest resident memory of this process plus that of its replicas [bytes]."""
    import resource

    own, children = (
        resource.getrusage(who).ru_maxrss
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    live = sum(peak_of(child.pid) for child in psutil.Process().children(recursive=True))
    scale = 1 if sys.platform == "darwin" else 1024  # getrusage(2): kilobytes on Linux
    return own * scale + max(live, children * scale)


def peak_of(pid: int) -> int:
    """Return the largest resident memory of a live process so far [bytes]; 0 where unknown."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0
