"""Whether a cell was given exactly its devices, checked before a framework is imported.

With one GPU too few a cell would measure another run; with one too many it would hold a GPU that it
does not use, or use another job's.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from ptbench.errors import PtbenchError
from ptbench.model.recipe import Accelerator

# Slurm's lists of the GPUs of a step and of its job, should it not set CUDA's own.
LISTS = ("CUDA_VISIBLE_DEVICES", "SLURM_STEP_GPUS", "SLURM_JOB_GPUS")


def check_devices(
    devices: int, accelerator: Accelerator, environment: Mapping[str, str] = os.environ
) -> None:
    """Make sure that a cell has its devices.

    In a Slurm job the list of GPUs must have exactly `devices` entries, even if the CPU trains in
    a job that asked for GPUs; a job without any may train on the CPU. Elsewhere the list may have
    more: the cell takes the first ones.

    Args:
        devices: data-parallel replicas of the cell on this node.
        accelerator: kind of device that is to train.
        environment: environment variables.

    Raises:
        PtbenchError: if it has not.
    """
    name = next((name for name in LISTS if name in environment), None)
    in_slurm = "SLURM_JOB_ID" in environment
    if name is None:
        if in_slurm and accelerator == "cuda":
            raise PtbenchError(
                f"Slurm job {environment['SLURM_JOB_ID']} was given no GPU where the cell needs "
                f"{devices}: let set-resources in slurm/profile.yaml ask for them as this site "
                "wants it, with gpu or gres"
            )
        return
    granted = device_list(environment[name])
    if accelerator == "cpu" and not granted:
        return
    if in_slurm:
        if len(granted) != devices:
            raise PtbenchError(
                f"Slurm job {environment['SLURM_JOB_ID']} was given {len(granted)} GPUs "
                f"({name}={environment[name]}) where the cell needs exactly {devices}: let "
                "set-resources in slurm/profile.yaml ask for as many as the cell has devices"
            )
    elif accelerator == "cuda" and len(granted) < devices:
        raise PtbenchError(
            f"{name}={environment[name]} shows {len(granted)} GPUs and the cell needs {devices}: "
            "unset it, or name more"
        )


def device_list(text: str) -> list[str]:
    """Return the devices of a list as CUDA reads it, up to the first that is invalid."""
    devices: list[str] = []
    for entry in map(str.strip, text.split(",")):
        if not entry or entry in ("-1", "NoDevFiles"):
            break
        devices.append(entry)
    return devices
