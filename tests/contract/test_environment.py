"""Environment variables that a user may have set do not change a result."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from tests.support.problems import BATCH, DROPOUT, random_batch, same, train
from tests.support.remote import Backends, RemoteBackend

from ptbench.backends.base import Backend

# framework: variables that it reads, with values that would change its results
VARIABLES: dict[str, dict[str, str]] = {
    "jax": {
        "JAX_ENABLE_X64": "1",
        "JAX_DEFAULT_MATMUL_PRECISION": "bfloat16",
        "JAX_NUMPY_DTYPE_PROMOTION": "strict",
        "JAX_DEFAULT_PRNG_IMPL": "rbg",
        "JAX_THREEFRY_PARTITIONABLE": "0",
        "JAX_RANDOM_SEED_OFFSET": "1",
        "JAX_DISABLE_JIT": "1",
        "JAX_DEBUG_NANS": "1",
        "JAX_PLATFORMS": "cuda",
        "XLA_FLAGS": "--xla_cpu_enable_fast_math=true",
    },
}


def results(backend: Backend) -> tuple[list[float], Mapping[str, Any]]:
    """Return the losses of training and of an evaluation after it, and the parameters."""
    nll, norms, _ = train(backend, [random_batch(seed) for seed in range(3)], [0.5] * 3)
    state = backend.initial_state(BATCH, training=False)
    evaluated = backend.evaluate_step(random_batch(3), state)
    return [*nll, *norms, float(evaluated.nll)], backend.parameters()


def test_variables_of_the_user_change_no_bit(
    backends: Backends, framework: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if framework not in VARIABLES:
        pytest.skip(f"no variables are known that would change results of {framework}")
    losses, parameters = results(backends.new(framework, DROPOUT))
    for variable, value in VARIABLES[framework].items():
        monkeypatch.setenv(variable, value)
    worker = backends.start(framework)
    try:
        other_losses, other_parameters = results(RemoteBackend(worker, framework, DROPOUT))
    finally:
        worker.close()
    assert other_losses == losses
    assert same(other_parameters, parameters)
