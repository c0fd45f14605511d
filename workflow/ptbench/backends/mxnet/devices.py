"""Contexts, random seeds, and all that sets MXNet's speed or rounding; the first to import it."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import numpy.typing as npt

from ptbench.backends.base import Scalar
from ptbench.errors import PtbenchError
from ptbench.model.recipe import Accelerator, Recipe

# Read by CUDA's libraries when they load: no rounding of fp32 products to TF32, no atomic sums.
os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
os.environ["MXNET_ENFORCE_DETERMINISM"] = "1"

import mxnet as mx

# Of the tuned implementation: the rows of logits that exist at a time, ...
CHUNK_ROWS = 1024
# ... and how many parameters one kernel of SGD updates. MXNet's kernel for several, which it uses
# by default, takes three times as long as a kernel for each (0).
AGGREGATED_PARAMETERS = 0


def choose_contexts(accelerator: Accelerator, devices: int) -> list[mx.Context]:
    """The contexts of all replicas; CPU contexts are threads' queues of the one processor.

    Raises:
        PtbenchError: if MXNet sees fewer GPUs than `devices`.
    """
    if accelerator == "cpu":
        return [mx.cpu(r) for r in range(devices)]
    if (found := mx.context.num_gpus()) < devices:
        raise PtbenchError(f"MXNet sees {found} GPUs where devices={devices} were asked for")
    return [mx.gpu(r) for r in range(devices)]


def graph_flags(recipe: Recipe) -> dict[str, bool]:
    """What `hybridize` is given.

    Tuned: buffers and execution plan are made once; only what a call returns is allocated anew.
    """
    if recipe.implementation == "stock":
        return {}
    return {"static_alloc": True, "static_shape": True}


def settings(recipe: Recipe) -> dict[str, str]:
    """Settings that change speed or rounding."""
    tuned = recipe.implementation == "tuned"
    return {
        "implementation": recipe.implementation,
        "logits": f"at most {CHUNK_ROWS} rows at a time" if tuned else "all at once",
        "MXNET_OPTIMIZER_AGGREGATION_SIZE": str(AGGREGATED_PARAMETERS)
        if tuned
        else os.environ.get("MXNET_OPTIMIZER_AGGREGATION_SIZE", "unset"),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "unset"),
        "hybridize": ", ".join(graph_flags(recipe)) or "no flags",
        "NVIDIA_TF32_OVERRIDE": os.environ["NVIDIA_TF32_OVERRIDE"],
        "MXNET_ENFORCE_DETERMINISM": os.environ["MXNET_ENFORCE_DETERMINISM"],
    }


def random_seed(*words: int) -> int:
    """A seed that is far from those of other words; MXNet's streams overlap for close seeds."""
    return int(np.random.SeedSequence(words).generate_state(1)[0]) >> 1  # a C int


def to_device(array: npt.NDArray[Any], context: mx.Context) -> mx.nd.NDArray:
    """A copy on the context, complete when this returns."""
    return mx.nd.array(array, ctx=context, dtype=array.dtype)


def as_scalar(array: mx.nd.NDArray) -> Scalar:
    """The same number [1] as MXNet's NumPy kind of array, which float() understands."""
    return array.as_np_ndarray()
