"""A run in a shell full of settings ends as one in a clean shell, bit for bit.

With the trainer's own command, because some settings are read when a process starts. What each
setting becomes is in `tests/unit/test_isolation.py`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.faults.harness import RECIPE, Trainer, make_corpus

from ptbench.backends import ORACLE

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
    "oracle": {},
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


class Oracle(Trainer):
    """The cell of the oracle, in JAX's name and this environment."""

    def command(self) -> list[str | Path]:
        return [sys.executable, "-m", "tests.support.toy_trainer"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def test_the_users_shell_and_dot_files_change_nothing(
    framework: str, corpus: Path, tmp_path: Path
) -> None:
    recipe = RECIPE.model_copy(update={"epochs": 2})

    def trainer(name: str) -> Trainer:
        if framework == ORACLE:
            return Oracle("jax", 1, corpus, tmp_path / name, recipe)
        return Trainer(framework, 1, corpus, tmp_path / name, recipe)

    clean, hostile = trainer("clean"), trainer("hostile")
    clean.finish()

    home = tmp_path / "home"
    (home / ".keras").mkdir(parents=True)
    (home / ".keras" / "keras.json").write_text('{"floatx": "float16", "epsilon": 0.1}')
    settings = EVERYWHERE | SETTINGS[framework]
    if framework == ORACLE:  # its process imports NumPy first, which would end with a warning
        del settings["PYTHONWARNINGS"], settings["NPY_PROMOTION_STATE"]
    process = hostile.start(HOME=str(home), **settings)
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, f"{said}\n{hostile.log.read_text()[-3000:]}"
    assert hostile.result() == clean.result()

    ignored: dict[str, Any] = json.loads((hostile.output / "provenance.json").read_text())[
        "ignored_settings"
    ]
    files = {name for name in ignored if name.endswith("keras.json")}
    assert len(files) == (framework in ("tensorflow", "keras"))
    assert ignored.items() >= settings.items()
    assert set(ignored) - files == set(settings)
    lines = [line for line in hostile.log.read_text().splitlines() if " ignored from the " in line]
    assert len(lines) == 1
    assert all(f"{name}={value}" in lines[0] for name, value in settings.items())
