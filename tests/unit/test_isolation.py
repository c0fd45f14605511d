"""The user's shell and dot files: which settings stay, which go, and that nothing is read before.

That results are the same bit for bit is in `tests/faults/test_frameworks.py`, for each framework.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ptbench.backends import FRAMEWORKS
from ptbench.cli import COMMANDS
from ptbench.isolation import EVERYWHERE, KERAS_DEFAULTS, LEAVE, RULES, THREADS

ISOLATE = """
import json, os, sys
from ptbench import isolation
isolation.isolate(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
print(json.dumps([dict(os.environ), isolation.ignored(), isolation.ignored_sentence()]))
"""


def python(
    code: str, *arguments: str, home: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run Python in a clean shell with these variables alone."""
    base = {"PATH": os.environ["PATH"], "HOME": str(home), "PYTHONPATH": "workflow"}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=base | environment, capture_output=True, text=True,
    )  # fmt: skip


def isolated(
    framework: str, home: Path, threads: int = 2, devices: int = 1, **environment: str
) -> tuple[dict[str, str], dict[str, str], str]:
    """Return the variables after the isolation, and what was ignored, as data and as a sentence."""
    answer = python(ISOLATE, framework, str(threads), str(devices), home=home, **environment)
    assert answer.returncode == 0, answer.stderr
    after, ignored, sentence = json.loads(answer.stdout)
    return after, ignored, sentence


@pytest.mark.parametrize(
    ("framework", "name", "after"),
    [
        ("jax", "JAX_ENABLE_X64", None),
        ("jax", "XLA_FLAGS", None),
        ("pytorch", "ONEDNN_DEFAULT_FPMATH_MODE", None),
        ("pytorch", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", None),
        ("tensorflow", "TF_ENABLE_ONEDNN_OPTS", None),
        ("keras", "KERAS_BACKEND", "tensorflow"),
        ("mxnet", "MXNET_SAFE_ACCUMULATION", None),
        ("mxnet", "DMLC_ROLE", None),
        ("pytorch", "NVIDIA_TF32_OVERRIDE", "0"),
        ("pytorch", "CUDA_DEVICE_ORDER", "PCI_BUS_ID"),
        ("pytorch", "NCCL_NVLS_ENABLE", None),
        ("pytorch", "NCCL_MAX_NCHANNELS", None),
        ("jax", "NCCL_MIN_CTAS", None),
        ("jax", "NCCL_CONF_FILE", os.devnull),
        ("jax", "PYTHONDEVMODE", None),
        ("oracle", "MKL_CBWR", None),
        ("oracle", "OMP_DYNAMIC", None),
        ("figures", "MATPLOTLIBRC", os.devnull),
    ],
)
def test_what_changes_results_is_overridden_and_remembered(
    tmp_path: Path, framework: str, name: str, after: str | None
) -> None:
    environment, ignored, sentence = isolated(framework, tmp_path, **{name: "user's"})
    assert environment.get(name) == after
    assert ignored == {name: "user's"}
    assert sentence == f"ignored from the environment, as it could change results: {name}=user's"


@pytest.mark.parametrize(
    ("framework", "name"),
    [
        ("oracle", "OPENBLAS_CORETYPE"),
        ("pytorch", "CUDA_VISIBLE_DEVICES"),
        ("pytorch", "PYTORCH_CUDA_ALLOC_CONF"),
        ("pytorch", "NCCL_SOCKET_IFNAME"),
        ("tensorflow", "TF_FORCE_GPU_ALLOW_GROWTH"),
        ("tensorflow", "TF_VAR_password"),
        ("jax", "JAX_COMPILATION_CACHE_DIR"),
        ("jax", "XLA_PYTHON_CLIENT_MEM_FRACTION"),
        ("jax", "TF_ENABLE_ONEDNN_OPTS"),  # another framework's
    ],
)
def test_what_changes_no_result_stays(tmp_path: Path, framework: str, name: str) -> None:
    environment, ignored, sentence = isolated(framework, tmp_path, **{name: "user's"})
    assert environment[name] == "user's"
    assert (ignored, sentence) == ({}, "")


def test_a_clean_shell_gets_the_pinned_values_and_nothing_is_said(tmp_path: Path) -> None:
    environment, ignored, sentence = isolated("keras", tmp_path)
    for rule in RULES["keras"]:
        if rule.action not in ("remove", LEAVE):
            assert environment[rule.pattern] == rule.action
    assert (ignored, sentence) == ({}, "")


def test_replicas_share_the_threads_and_the_schedulers_own_number_is_not_mentioned(
    tmp_path: Path,
) -> None:
    environment, ignored, _ = isolated("jax", tmp_path, 4, 2, OMP_NUM_THREADS="4")
    assert {environment[name] for name in THREADS} == {"2"}
    assert ignored == {}
    _, ignored, _ = isolated("jax", tmp_path, 4, 2, OMP_NUM_THREADS="7", MKL_NUM_THREADS="2")
    assert ignored == {"OMP_NUM_THREADS": "7"}


def test_a_second_call_keeps_what_a_framework_set_for_itself(tmp_path: Path) -> None:
    code = ISOLATE.replace("print", "os.environ['JAX_ITS_OWN'] = '1'; "
                           "isolation.isolate('jax', 6); print", 1)  # fmt: skip
    answer = python(code, "jax", "2", "1", home=tmp_path, JAX_ENABLE_X64="1")
    environment, ignored, _ = json.loads(answer.stdout)
    assert (environment["JAX_ITS_OWN"], environment["OMP_NUM_THREADS"]) == ("1", "6")
    assert ignored == {"JAX_ENABLE_X64": "1"}


def test_a_keras_json_is_mentioned_if_it_differs_from_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / ".keras" / "keras.json"
    path.parent.mkdir()
    path.write_text(json.dumps(KERAS_DEFAULTS, indent=4))  # as Keras itself writes it
    assert isolated("keras", tmp_path)[1] == {}
    for text in (json.dumps(KERAS_DEFAULTS | {"floatx": "float16"}), "{"):
        path.write_text(text)
        assert isolated("tensorflow", tmp_path)[1] == {str(path): text}
        assert isolated("jax", tmp_path)[1] == {}


def test_warnings_are_no_errors_any_more(tmp_path: Path) -> None:
    code = ISOLATE + "\nimport warnings; warnings.warn('deprecated', DeprecationWarning)"
    assert python(code, "jax", "1", "1", home=tmp_path, PYTHONWARNINGS="error").returncode == 0


BEFORE_NUMPY = """
import sys
from ptbench import cli
from ptbench.measurement import speed_worker

def isolate(*arguments, **keywords):
    sys.exit(f"numpy {'numpy' in sys.modules}")

cli.isolate = speed_worker.isolate = isolate
{}.main()
"""
CELL = "--cell v/jax/devices-1/seed-1 --specification {} --corpus c --output o"


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("cli", f"train {CELL} --attempts a --checkpoints p"),
        ("cli", "evaluate --framework jax --checkpoint c"),
        ("cli", "predict --framework jax --checkpoint c"),
        ("speed_worker", '{"framework":"jax","threads":1,"class":"a:B"}'),
    ],
)
def test_threads_are_set_before_numpy_reads_them(
    tmp_path: Path, module: str, arguments: str
) -> None:
    code = BEFORE_NUMPY.replace("{}.main", f"{module}.main")
    answer = python(code, *arguments.split(), home=tmp_path)
    assert answer.stderr.strip() == "numpy False"


def test_what_python_reads_before_the_isolation_is_cleared_by_the_rules() -> None:
    settings = Path("workflow/rules/common.smk").read_text()
    names = [rule.pattern for rule in EVERYWHERE if rule.pattern.startswith("PYTHON")]
    assert {"PYTHONOPTIMIZE", "PYTHONDEVMODE", "PYTHONMALLOC", "PYTHONTRACEMALLOC"} < {*names}
    for name in names:
        assert re.search(rf'\b{name}=[ "]', settings), name


def test_every_framework_has_rules() -> None:
    assert set(FRAMEWORKS) < set(RULES)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_need_no_docstrings(tmp_path: Path, command: str) -> None:
    code = "from ptbench.cli import main; main()"
    answer = python(code, command, "--help", home=tmp_path, PYTHONOPTIMIZE="2")
    assert answer.returncode == 0, answer.stderr
    assert COMMANDS[command].description.split()[0] in answer.stdout


def test_validate_runs_without_docstrings(tmp_path: Path) -> None:
    code = "from ptbench.cli import main; main()"
    answer = python(code, "validate", home=tmp_path, PYTHONOPTIMIZE="2")
    assert "cells in all" in answer.stdout, answer.stderr


DRAW = """
import sys
from pathlib import Path
from ptbench.isolation import FIGURES, isolate

isolate(FIGURES, threads=1)
sys.path.insert(0, ".")
from tests.unit.test_figures import draw

draw(Path(sys.argv[1]) / "results", Path(sys.argv[1]) / "figures")
"""


def test_a_matplotlibrc_changes_no_figure(tmp_path: Path) -> None:
    def drawn(name: str, **environment: str) -> dict[str, bytes]:
        answer = python(DRAW, str(tmp_path / name), home=tmp_path, **environment)
        assert answer.returncode == 0, answer.stderr
        folder = tmp_path / name / "figures"
        return {path.name: path.read_bytes() for path in sorted(folder.glob("*.svg"))}

    clean = drawn("clean")
    assert clean
    settings = tmp_path / ".config" / "matplotlib" / "matplotlibrc"
    settings.parent.mkdir(parents=True, exist_ok=True)
    settings.write_text("text.usetex: True\nlines.marker: o\nfigure.dpi: 300\n")
    assert drawn("hostile", MPLBACKEND="no such back-end") == clean
