"""The frameworks there are. Adding one is adding its file beside this and its line here."""

from __future__ import annotations

import importlib
import os
import sys
from typing import cast

from ptbench.backends.contract import Backend
from ptbench.errors import PtbenchError

# framework: where its Backend is
BACKENDS = {
    "pytorch": "ptbench.backends.pytorch:PyTorchBackend",
    "tensorflow": "ptbench.backends.tensorflow:TensorFlowBackend",
    "keras": "ptbench.backends.keras:KerasBackend",
    "mxnet": "ptbench.backends.mxnet:MXNetBackend",
    "jax": "ptbench.backends.jax:JaxBackend",
    "numpy": "ptbench.backends.numpy_oracle:NumpyOracle",  # the float64 oracle, for tests alone
}


def backend_class(framework: str, threads: int) -> type[Backend]:
    """Import the framework and return its backend; only its own environment can.

    Args:
        threads: CPU threads of each replica. OpenMP reads its count once, before the import.

    Raises:
        PtbenchError: if this is not the framework's environment.
    """
    os.environ["OMP_NUM_THREADS"] = str(threads)
    module, name = BACKENDS[framework].split(":")
    try:
        return cast(type[Backend], getattr(importlib.import_module(module), name))
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("ptbench"):
            raise
        raise PtbenchError(
            f"{framework} cannot be used here: {sys.executable} has no module {error.name}; run in "
            f"its own environment, results/environments/{framework}-cpu"
        ) from error
