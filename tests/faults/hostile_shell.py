"""A shell full of settings that a run must ignore, for each framework.

The trainer's own command runs in it, because some settings are read when a process starts. What
each setting becomes is in `tests/unit/test_isolation.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.faults.harness import Trainer

# Every library's own rules, and settings that all frameworks could read.
EVERYWHERE = {
    "PYTHONWARNINGS": "error",
    "OMP_NUM_THREADS": "3",
    "OMP_THREAD_LIMIT": "2",
    "MKL_CBWR": "COMPATIBLE",
    "NPY_PROMOTION_STATE": "legacy",
    "ONEDNN_DEFAULT_FPMATH_MODE": "BF16",
    "DNNL_DEFAULT_FPMATH_MODE": "BF16",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
}
TENSORFLOW = {
    "TF_ENABLE_ONEDNN_OPTS": "0",
    "TF_SET_ONEDNN_FPMATH_MODE": "BF16",
    "TF_USE_LEGACY_KERAS": "1",
    "TF_XLA_FLAGS": "--tf_xla_auto_jit=2 --tf_xla_cpu_global_jit",
    "TF_NUM_INTRAOP_THREADS": "3",
    "XLA_FLAGS": "--xla_cpu_enable_fast_math=true",
    "KERAS_BACKEND": "torch",
    "KERAS_MAX_EPOCHS": "1",
}
SETTINGS: dict[str, dict[str, str]] = {
    "pytorch": {
        "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1",
        "TORCH_LINEAR_FLATTEN_3D": "1",
        "ATEN_CPU_CAPABILITY": "default",
    },
    "tensorflow": TENSORFLOW,
    "keras": TENSORFLOW,
    "mxnet": {
        "MXNET_SAFE_ACCUMULATION": "1",
        "MXNET_ENGINE_TYPE": "NaiveEngine",
        "MXNET_EXEC_BULK_EXEC_TRAIN": "0",
        "MXNET_USE_MKLDNN_RNN": "0",
        "MXNET_MKLDNN_ENABLED": "0",
        "MXNET_BACKWARD_DO_MIRROR": "1",
        "DMLC_ROLE": "server",
    },
    "jax": {
        "JAX_ENABLE_X64": "1",
        "JAX_DEFAULT_MATMUL_PRECISION": "bfloat16",
        "JAX_DEFAULT_PRNG_IMPL": "rbg",
        "JAX_THREEFRY_PARTITIONABLE": "0",
        "JAX_RANDOM_SEED_OFFSET": "1",
        "JAX_DISABLE_JIT": "1",
        "JAX_DEBUG_NANS": "1",
        "JAX_NUMPY_DTYPE_PROMOTION": "strict",
        "JAX_PLATFORMS": "no_such_platform",
        "XLA_FLAGS": "--xla_cpu_enable_fast_math=true",
    },
}


def hostile_shell(home: Path, settings: Mapping[str, str]) -> dict[str, str]:
    """Return these settings and a home folder, which is made, with a `keras.json`."""
    (home / ".keras").mkdir(parents=True)
    (home / ".keras" / "keras.json").write_text('{"floatx": "float16", "epsilon": 0.1}')
    return {"HOME": str(home), **settings}


def assert_ignored(trainer: Trainer, settings: Mapping[str, str]) -> None:
    """Fail unless a finished run names all that it ignored of a hostile shell, and no more."""
    ignored: dict[str, Any] = json.loads((trainer.output / "provenance.json").read_text())[
        "ignored_settings"
    ]
    files = {name for name in ignored if name.endswith("keras.json")}
    assert len(files) == (trainer.framework in ("tensorflow", "keras"))
    assert ignored.items() >= settings.items()
    assert set(ignored) - files == set(settings)
    lines = [line for line in trainer.log.read_text().splitlines() if " ignored from the " in line]
    assert lines
    for line in lines:
        assert all(f"{name}={value}" in line for name, value in settings.items())
