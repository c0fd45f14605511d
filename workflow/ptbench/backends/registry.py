"""The frameworks there are. Adding one is adding its file beside this and its line here."""

from __future__ import annotations

import importlib
import os
from typing import cast

from ptbench.backends.contract import Backend

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
    """
    os.environ["OMP_NUM_THREADS"] = str(threads)
    module, name = BACKENDS[framework].split(":")
    return cast(type[Backend], getattr(importlib.import_module(module), name))
