"""Settings of the process and data parallelism; nothing of the model."""

from __future__ import annotations

import os

# Read when TensorFlow is imported.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # no start-up notes, only errors
os.environ["KERAS_BACKEND"] = "tensorflow"  # of the layers in tf.keras, whatever a user's file says

import tensorflow as tf

from ptbench.errors import PtbenchError
from ptbench.model.recipe import Accelerator

# Of random numbers: named, because the default depends on the kind of device.
RANDOM_GENERATOR = "philox"

# Logical CPUs cannot be added once TensorFlow is in use, and idle ones cost nothing.
LOGICAL_CPUS = 8


def start_tensorflow(accelerator: Accelerator, devices: int, threads: int) -> None:
    """Settings of the process. Repeating them is harmless; other ones come too late."""
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(threads)
    tf.config.experimental.enable_tensor_float_32_execution(False)
    gpus = tf.config.list_physical_devices("GPU")
    if accelerator == "cuda":
        # Needed on GPUs alone, and everywhere makes of one cross-entropy kernel several slow ones.
        tf.config.experimental.enable_op_determinism()
        for gpu in gpus:
            tf.config.experimental.set_memory_growth(gpu, True)  # or all memory counts as used
        return
    if gpus:
        tf.config.set_visible_devices([], "GPU")
    cpu = tf.config.list_physical_devices("CPU")[0]
    if tf.config.get_logical_device_configuration(cpu) is None:
        one = tf.config.LogicalDeviceConfiguration()
        tf.config.set_logical_device_configuration(cpu, [one] * max(devices, LOGICAL_CPUS))


def mirrored_strategy(accelerator: Accelerator, devices: int) -> tf.distribute.Strategy:
    """Data parallelism over the first `devices` devices of that kind.

    Raises:
        PtbenchError: if there are fewer.
    """
    found = tf.config.list_logical_devices("CPU" if accelerator == "cpu" else "GPU")
    if len(found) < devices:
        remedy = (
            "start a new process for more"
            if accelerator == "cpu"
            else "ask for fewer, or make more visible (CUDA_VISIBLE_DEVICES)"
        )
        raise PtbenchError(
            f"devices={devices} on {accelerator}, but TensorFlow has {len(found)}; {remedy}"
        )
    strategy = tf.distribute.MirroredStrategy(
        [device.name for device in found[:devices]],
        tf.distribute.ReductionToOneDevice() if accelerator == "cpu" else None,  # None: NCCL
    )
    assert strategy.num_replicas_in_sync == devices
    return strategy


def peak_memory(accelerator: Accelerator, devices: int) -> int | None:
    """Largest allocation on any of the devices so far [bytes]; None on CPUs."""
    if accelerator == "cpu":
        return None
    count = tf.config.experimental.get_memory_info
    return max(int(count(f"GPU:{r}")["peak"]) for r in range(devices))


def settings(accelerator: Accelerator) -> dict[str, str]:
    """What changes speed or rounding, as it is in this process."""
    return {
        "intra_op_threads": str(tf.config.threading.get_intra_op_parallelism_threads()),
        "inter_op_threads": str(tf.config.threading.get_inter_op_parallelism_threads()),
        "matmul_precision": "float32 (TF32 off)",
        "op_determinism": "on" if accelerator == "cuda" else "off: a CPU's kernels are anyway",
        "random_generator": RANDOM_GENERATOR,
    }
