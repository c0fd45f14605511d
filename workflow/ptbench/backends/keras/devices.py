"""All settings of the process: Keras' backend, TensorFlow's devices, threads and determinism."""

from __future__ import annotations

import os

os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # no start-up notes, only errors

import tensorflow as tf

from ptbench.errors import PtbenchError
from ptbench.model.recipe import Accelerator

tf.get_logger().setLevel("ERROR")


def configure_tensorflow(devices: int, accelerator: Accelerator, threads: int) -> list[str]:
    """Set TensorFlow up for this process, and name the devices to use.

    The runtime takes its settings once: a second backend in a process gets the first one's, and
    asks for the same.

    Raises:
        PtbenchError: if there are fewer devices.
    """
    kind = "GPU" if accelerator == "cuda" else "CPU"
    physical = tf.config.list_physical_devices(kind)
    try:
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(threads)
        if kind == "GPU":
            tf.config.set_visible_devices(physical[:devices], "GPU")
            for gpu in physical[:devices]:
                tf.config.experimental.set_memory_growth(gpu, True)
        else:
            tf.config.set_visible_devices([], "GPU")
            tf.config.set_logical_device_configuration(
                physical[0], [tf.config.LogicalDeviceConfiguration()] * devices
            )
    except RuntimeError:  # TensorFlow has started
        pass
    tf.config.experimental.enable_tensor_float_32_execution(False)
    if kind == "GPU":
        # Needed there alone: everywhere it makes of one cross-entropy kernel several slow ones.
        tf.config.experimental.enable_op_determinism()
    names = [device.name for device in tf.config.list_logical_devices(kind)]
    if len(names) < devices:
        raise PtbenchError(
            f"keras sees {len(names)} {kind} devices in this process; devices={devices} needs that "
            "many"
        )
    return names[:devices]


def strategy_for(devices: list[str]) -> tf.distribute.Strategy:
    """Replicas on these devices, or one model on the only one."""
    if len(devices) > 1:
        return tf.distribute.MirroredStrategy(devices)
    return tf.distribute.OneDeviceStrategy(devices[0])


def device_names(accelerator: Accelerator, devices: int) -> list[str]:
    """What to call the device of each replica."""
    if accelerator == "cpu":
        return [f"cpu:{r}" for r in range(devices)]
    gpus = tf.config.get_visible_devices("GPU")[:devices]
    return [tf.config.experimental.get_device_details(gpu)["device_name"] for gpu in gpus]


def peak_memory(accelerator: Accelerator, devices: int) -> int | None:
    """Largest allocation on any of the devices so far [bytes]; None on CPUs."""
    if accelerator == "cpu":
        return None
    count = tf.config.experimental.get_memory_info
    return max(int(count(f"GPU:{r}")["peak"]) for r in range(devices))


def settings(accelerator: Accelerator) -> dict[str, str]:
    """What changes speed or rounding."""
    return {
        "keras_backend": f"tensorflow {tf.__version__}",
        "intra_op_threads": str(tf.config.threading.get_intra_op_parallelism_threads()),
        "inter_op_threads": str(tf.config.threading.get_inter_op_parallelism_threads()),
        # XLA is no faster here on a CPU, slower to start, unable to use a second logical CPU, and
        # without cuDNN's LSTM on a GPU.
        "jit_compile": "False",
        "op_determinism": "on" if accelerator == "cuda" else "off: a CPU's kernels are anyway",
        "tf32": "off",
    }
