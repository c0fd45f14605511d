"""What the user's shell and home folder would change in a result, and how it is kept out.

`isolate` applies the table below to the environment variables of this process, before NumPy,
matplotlib or a framework is imported. What is not in the table stays as it is. What was ignored is
in the run's log and in its `provenance.json`.

Two things are not here. Python reads variables of its own before any of this runs: the workflow's
`common.smk` overrides those. And Snakemake says which profile it uses (SNAKEMAKE_PROFILE); a
profile can set the configuration and the number of threads, which every result records.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Literal, NamedTuple

# What Keras itself writes into ~/.keras/keras.json.
KERAS_DEFAULTS = {
    "floatx": "float32",
    "epsilon": 1e-07,
    "backend": "tensorflow",
    "image_data_format": "channels_last",
}
# Every library's number of threads. How sums are split, and so rounded, depends on it.
THREADS = (
    "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS", "BLIS_NUM_THREADS",
    "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS",
)  # fmt: skip
REMOVE: Literal["remove"] = "remove"
LEAVE: Literal["leave"] = "leave"


class Rule(NamedTuple):
    """What is done about the environment variables that match a pattern."""

    pattern: str  # as in fnmatch
    action: str  # `REMOVE`, `LEAVE`, or the value that the variable gets, also where it was not set
    reason: str


# The first rule that matches a variable counts.
EVERYWHERE = (
    Rule("PYTHONOPTIMIZE", REMOVE, "replicas would run without their checks"),
    Rule("PYTHONDEVMODE", REMOVE, "checks that make replicas slow, and speed is a result"),
    Rule("PYTHONMALLOC", REMOVE, "the same"),
    Rule("PYTHONTRACEMALLOC", REMOVE, "the same"),
    Rule("PYTHONWARNINGS", REMOVE, "a framework's own warning would end the run"),
    Rule("OPENBLAS_CORETYPE", LEAVE, "some processors need it to multiply correctly"),
    Rule("OPENBLAS_*", REMOVE, "how products are split"),
    Rule("OMP_PROC_BIND", LEAVE, "where threads run; clusters set it"),
    Rule("OMP_PLACES", LEAVE, "where threads run; clusters set it"),
    Rule("OMP_WAIT_POLICY", LEAVE, "whether waiting threads sleep; shared machines set it"),
    Rule("OMP_STACKSIZE", LEAVE, "memory alone"),
    Rule("OMP_DISPLAY_*", LEAVE, "what is printed"),
    Rule("OMP_*", REMOVE, "number of threads and how loops are split"),
    Rule("GOMP_CPU_AFFINITY", LEAVE, "where threads run"),
    Rule("GOMP_*", REMOVE, "how threads wait, which is speed"),
    Rule("KMP_AFFINITY", LEAVE, "where threads run"),
    Rule("KMP_HW_SUBSET", LEAVE, "where threads run"),
    Rule("KMP_*", REMOVE, "number of threads and how sums are reduced"),
    Rule("MKL_*", REMOVE, "which instructions multiply (MKL_CBWR), and threads"),
    Rule("NPY_*", REMOVE, "NumPy's vector instructions and type promotion"),
    Rule("ONEDNN_VERBOSE*", LEAVE, "what is printed"),
    Rule("DNNL_VERBOSE*", LEAVE, "what is printed"),
    Rule("ONEDNN_*", REMOVE, "precision of products (DEFAULT_FPMATH_MODE), instructions"),
    Rule("DNNL_*", REMOVE, "the same under its older name"),
    Rule("MKLDNN_*", REMOVE, "the same under its oldest name"),
    Rule("NVIDIA_TF32_OVERRIDE", "0", "all products are of float32, in every framework"),
    Rule("CUBLAS_WORKSPACE_CONFIG", ":4096:8", "cuBLAS then repeats its sums"),
    Rule("CUBLAS*", REMOVE, "which kernels multiply"),
    Rule("CUDNN_LOG*", LEAVE, "what is printed"),
    Rule("CUDNN_*", REMOVE, "which kernels are chosen"),
    Rule("CUDA_DEVICE_ORDER", "PCI_BUS_ID", "as NVML numbers GPUs, which measures their use"),
    Rule("CUDA_LAUNCH_BLOCKING", REMOVE, "it makes training slow, and speed is a result"),
    Rule("NCCL_ALGO", REMOVE, "the order in which replicas' gradients are added"),
    Rule("NCCL_PROTO", REMOVE, "the same"),
    Rule("NCCL_NVLS_ENABLE", REMOVE, "the same: whether switches add"),
    Rule("NCCL_COLLNET_ENABLE", REMOVE, "the same"),
    Rule("NCCL_*_NCHANNELS", REMOVE, "the same: into how many parts gradients are split"),
    Rule("NCCL_*_CTAS", REMOVE, "the same under its newer name"),
    Rule("NCCL_*_NRINGS", REMOVE, "the same under its older name"),
    Rule("NCCL_NTHREADS", REMOVE, "the same within a part"),
    Rule("NCCL_BUFFSIZE", REMOVE, "the same within a part"),
    Rule("NCCL_CONF_FILE", os.devnull, "all of these in the user's ~/.nccl.conf"),
)

_TENSORFLOW = (
    Rule("TF_VAR_*", LEAVE, "Terraform's, which has the same prefix"),
    Rule("TF_CLI_*", LEAVE, "Terraform's"),
    Rule("TF_DATA_DIR", LEAVE, "Terraform's"),
    Rule("TF_LOG*", LEAVE, "Terraform's"),
    Rule("TF_CPP_*", LEAVE, "what is printed"),
    Rule("TF_FORCE_GPU_ALLOW_GROWTH", LEAVE, "GPU memory alone"),
    Rule("TF_GPU_ALLOCATOR", LEAVE, "GPU memory alone"),
    Rule("TF_*", REMOVE, "kernels, precision (TF_ENABLE_ONEDNN_OPTS), threads, tf.keras' version"),
    Rule("TF2_BEHAVIOR", REMOVE, "TensorFlow 1's behaviour"),
    Rule("XLA_*", REMOVE, "what the compiler may reorder or round"),
    Rule("KERAS_HOME", os.devnull, "the user's keras.json; so none is read or written"),
    Rule("KERAS_BACKEND", "tensorflow", "the back-end that is compared"),
    Rule("KERAS_*", REMOVE, "limits of epochs and steps"),
)

RULES: dict[str, tuple[Rule, ...]] = {
    "pytorch": (
        Rule("GLOO_SOCKET_IFNAME", "lo", "all are on this machine; else `join_group` sets it"),
        Rule("TORCH_NCCL_*", LEAVE, "time limits and what is printed"),
        Rule("TORCH_LOGS*", LEAVE, "what is printed"),
        Rule("TORCH_SHOW_*", LEAVE, "what is printed"),
        Rule("TORCH_DISTRIBUTED_DEBUG", LEAVE, "what is printed"),
        Rule("TORCH_HOME", LEAVE, "a folder for downloads, of which there are none"),
        Rule("TORCH*", REMOVE, "precision (TORCH_ALLOW_TF32_CUBLAS_OVERRIDE), compilers, kernels"),
        Rule("PYTORCH_*ALLOC_CONF", LEAVE, "GPU memory alone"),
        Rule("PYTORCH_*", REMOVE, "compilers and kernels"),
        Rule("ATEN_*", REMOVE, "vector instructions, which round differently"),
    ),
    "tensorflow": _TENSORFLOW,
    "keras": _TENSORFLOW,
    "mxnet": (
        Rule("MXNET_ENFORCE_DETERMINISM", "1", "the same sums in every run"),
        Rule("MXNET_HOME", LEAVE, "a folder for downloads, of which there are none"),
        Rule("MXNET_GPU_MEM_*", LEAVE, "GPU memory alone"),
        Rule("MXNET_*", REMOVE, "kernels, accumulation, fusion, engine, threads"),
        Rule("DMLC_*", REMOVE, "the import would start a parameter server"),
    ),
    "jax": (
        Rule("JAX_COMPILATION_CACHE_DIR", LEAVE, "time to compile alone"),
        Rule("JAX_ENABLE_COMPILATION_CACHE", LEAVE, "time to compile alone"),
        Rule("JAX_PERSISTENT_CACHE_*", LEAVE, "time to compile alone"),
        Rule("JAX_LOG*", LEAVE, "what is printed"),
        Rule("JAX_*", REMOVE, "float type (JAX_ENABLE_X64), precision, random numbers, back-end"),
        Rule("XLA_PYTHON_CLIENT_*", LEAVE, "GPU memory alone"),
        Rule("XLA_*", REMOVE, "what the compiler may reorder or round"),
    ),
}

FIGURES = "figures"
RULES[FIGURES] = (
    Rule("MPLBACKEND", "Agg", "which library draws"),
    Rule("MATPLOTLIBRC", os.devnull, "fonts, TeX and colours of the user's matplotlibrc"),
)

_isolated = False
_ignored: dict[str, str] = {}


def isolate(framework: str, threads: int, devices: int = 1) -> None:
    """Apply the table to this process's environment variables.

    Later calls only set the number of threads: a framework may have set variables of its own since
    the first.

    Args:
        framework: or `FIGURES`, for a process that draws; for a name that is not in `RULES`,
            only the rules for all frameworks apply.
        threads: CPU threads of all replicas together.
        devices: replicas. Each has a team of threads of its own.
    """
    global _isolated
    each = str(max(threads // devices, 1))
    if not _isolated:
        _isolated = True
        for name in THREADS:  # --threads says both numbers; Snakemake sets the first
            _ignore(name, os.environ.get(name), each, str(threads))
        _ignore_keras_json(framework)
        _apply((*RULES.get(framework, ()), *EVERYWHERE))
        _restore_warnings()
    os.environ |= dict.fromkeys(THREADS, each)


def ignored() -> dict[str, str]:
    """Return what `isolate` overrode or removed: the user's values, by variable or file."""
    return dict(_ignored)


def ignored_sentence() -> str:
    """Return what was ignored as a sentence; empty if nothing was."""
    settings = ", ".join(f"{name}={value}" for name, value in sorted(_ignored.items()))
    return settings and f"ignored from the environment, as it could change results: {settings}"


def _ignore(name: str, value: str | None, *accepted: str) -> None:
    """Remember a user's setting, if there is one and it is not what it becomes anyway."""
    if value and value not in accepted:
        _ignored[name] = value


def _apply(rules: tuple[Rule, ...]) -> None:
    for name, value in list(os.environ.items()):
        rule = next((rule for rule in rules if fnmatch.fnmatchcase(name, rule.pattern)), None)
        if rule is None or rule.action == LEAVE or name in THREADS:
            continue
        _ignore(name, value, rule.action)
        del os.environ[name]
    pinned = {rule.pattern: rule.action for rule in rules if rule.action not in (REMOVE, LEAVE)}
    os.environ |= pinned


def _ignore_keras_json(framework: str) -> None:
    """Remember the user's keras.json, if Keras would read it and it differs from the defaults."""
    if framework not in ("tensorflow", "keras"):
        return
    path = Path(os.environ.get("KERAS_HOME", "~/.keras")).expanduser() / "keras.json"
    if not path.is_file():
        return
    text = path.read_text(errors="replace")
    with contextlib.suppress(ValueError):
        if json.loads(text) == KERAS_DEFAULTS:
            return
    _ignore(str(path), " ".join(text.split()))


def _restore_warnings() -> None:
    """Undo PYTHONWARNINGS and -W: as errors, a framework's own warnings would end the run."""
    if sys.warnoptions:
        sys.warnoptions.clear()
        warnings.resetwarnings()
        for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning):
            warnings.simplefilter("ignore", category)
