"""What is known before a study begins to be impossible on the devices that it is given."""

from __future__ import annotations

from ptbench.backends import FRAMEWORKS, Framework
from ptbench.configuration.config import Config

# The newest CUDA compute capability that a framework's last build has kernels for. MXNet 1.9.1 was
# built with CUDA 11.7, which ends with Ampere (8.0 to 8.7).
NEWEST_CAPABILITY: dict[Framework, float] = {"mxnet": 8.7}


def cannot_run(config: Config) -> dict[Framework, str]:
    """Return the frameworks of a configuration that cannot run on its GPUs, and why each cannot."""
    found = {}
    for framework, newest in NEWEST_CAPABILITY.items():
        if framework in config.frameworks and config.accelerator_of(framework) == "cuda":
            capability = config.cuda_capability or capability_here()
            if capability is not None and capability > newest:
                found[framework] = (
                    f"the last build of {FRAMEWORKS[framework].title} knows no GPU of a compute "
                    f"capability above {newest}, and these have {capability}; "
                    f"`accelerators: {{{framework}: cpu}}` trains it on CPUs"
                )
    return found


def capability_here() -> float | None:
    """Return the CUDA compute capability of this machine's first GPU; None if none is seen."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    except pynvml.NVMLError:
        return None
    return float(f"{major}.{minor}")
