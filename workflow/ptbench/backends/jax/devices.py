"""The machine: its devices, and every setting that changes speed or rounding."""

from __future__ import annotations

import os
from typing import Any

import jax
from jax.extend.backend import clear_backends

from ptbench.errors import PtbenchError
from ptbench.model.recipe import Accelerator, Recipe

# The mesh's one axis: the replicas, among which the batch is shared.
DATA = "data"
MATMUL_PRECISION = "highest"  # float32 on GPUs, not TF32


def claim_devices(accelerator: Accelerator, devices: int, threads: int) -> list[Any]:
    """The first `devices` devices of that kind.

    The CPU appears to JAX as as many devices as were asked for before its first use. They share
    one pool of threads, which has at least as many threads as there are devices.

    Raises:
        PtbenchError: if there are fewer.
    """
    jax.config.update("jax_default_matmul_precision", MATMUL_PRECISION)
    if accelerator == "cpu":
        os.environ["NPROC"] = str(threads)  # XLA reads the size of its pool from it
        try:
            jax.config.update("jax_platforms", "cpu")
            jax.config.update("jax_num_cpu_devices", devices)
        except RuntimeError:  # JAX is in use already; whoever uses it keeps working
            if jax.device_count("cpu") < devices:
                clear_backends()
                jax.config.update("jax_num_cpu_devices", devices)
    try:
        found = jax.devices(accelerator)
    except RuntimeError:  # no such backend
        found = []
    if len(found) < devices:
        raise PtbenchError(
            f"devices={devices} on {accelerator}, but JAX finds {len(found)}; "
            "ask for fewer devices, or make more visible (CUDA_VISIBLE_DEVICES)"
        )
    return list(found[:devices])


def compiler_options(accelerator: Accelerator) -> dict[str, Any]:
    """What XLA is told that is not its default."""
    if accelerator == "cuda":
        return {"xla_gpu_deterministic_ops": True}  # gradients are scattered in a fixed order
    # Replicas wait for one another however busy the machine is; by default XLA aborts after 40 s.
    return {"xla_cpu_collective_call_terminate_timeout_seconds": 24 * 3600}


def random_generator(recipe: Recipe) -> str:
    """What draws the dropout masks: JAX's default, or XLA's own generator, which is faster."""
    return "rbg" if recipe.implementation == "tuned" else str(jax.config.jax_default_prng_impl)


def settings(
    recipe: Recipe, accelerator: Accelerator, devices: int, threads: int, memory_is_kept: bool
) -> dict[str, str]:
    """The settings, for provenance."""
    allocator = "JAX's for CUDA" if accelerator == "cuda" else "glibc"
    return {
        "implementation": recipe.implementation,
        "threads": str(max(threads, devices)),  # of XLA's pool, see claim_devices
        "matmul_precision": f"{MATMUL_PRECISION} (float32; no TF32)",
        "random_generator": random_generator(recipe),
        "allocator": allocator + (", memory kept between steps" if memory_is_kept else ""),
        **{k: str(v) for k, v in compiler_options(accelerator).items()},
    }
