"""What is known before a study begins to be impossible on the devices that it is given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ptbench.backends import FRAMEWORKS, Framework, one_node
from ptbench.configuration.config import Config
from ptbench.configuration.specification import Cell

# The newest CUDA compute capability that a framework's last build has kernels for. MXNet 1.9.1 was
# built with CUDA 11.7, which ends with Ampere (8.0 to 8.7).
NEWEST_CAPABILITY: dict[Framework, float] = {"mxnet": 8.7}


class Obstacle(NamedTuple):
    """Why runs of a framework cannot be."""

    devices: int  # runs of at least so many cannot be
    why: str


Obstacles = Mapping[Framework, Obstacle]


def obstacle(obstacles: Obstacles, cell: Cell) -> str | None:
    """Return why a run cannot be; None if it can."""
    found = obstacles.get(cell.framework)
    return found.why if found and cell.devices >= found.devices else None


def cannot_run(config: Config, on_cluster: bool = True) -> dict[Framework, Obstacle]:
    """Return the frameworks of a configuration of which runs cannot be, and why.

    Args:
        config: of the study.
        on_cluster: whether runs are made on other machines than this one.
    """
    found = {}
    on_gpus = [each for each in config.frameworks if config.accelerator_of(each) == "cuda"]
    if on_gpus and not on_cluster and (gpus := gpus_here()):
        why = f"this machine has {gpus} GPU{'' if gpus == 1 else 's'}"
        found = dict.fromkeys(on_gpus, Obstacle(gpus + 1, why))
    if config.devices_per_node:
        for framework in config.frameworks:
            if not FRAMEWORKS[framework].spans_nodes:
                found[framework] = Obstacle(config.devices_per_node + 1, one_node(framework))
    for framework, newest in NEWEST_CAPABILITY.items():
        if framework in on_gpus:
            capability = config.cuda_capability or capability_here()
            if capability is not None and capability > newest:
                found[framework] = Obstacle(
                    1,
                    f"the last build of {FRAMEWORKS[framework].title} knows no GPU of a compute "
                    f"capability above {newest}, and these have {capability}; "
                    f"`accelerators: {{{framework}: cpu}}` trains it on CPUs",
                )
    return found


def capability_here() -> float | None:
    """Return the CUDA compute capability of the first GPU that runs may use; None if unknown."""
    from ptbench.training.hardware import Gpus, quietly  # psutil: only where GPUs are asked for

    gpus = Gpus(1)
    with quietly():
        for handle in gpus.handles:
            major, minor = gpus.nvml.nvmlDeviceGetCudaComputeCapability(handle)
            return float(f"{major}.{minor}")
    return None


def gpus_here() -> int | None:
    """Return how many of this machine's GPUs runs may use; None if unknown."""
    from ptbench.training.hardware import Gpus, quietly, visible_gpus

    gpus, count = Gpus(1), None
    with quietly():
        if gpus.handles:
            count = len(visible_gpus(gpus.nvml.nvmlDeviceGetCount()))
    return count
