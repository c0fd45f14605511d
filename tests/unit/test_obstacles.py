"""What cannot run is known before, said, and marked; the rest goes on."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from tests.support.fake_results import metrics, write_cell

from ptbench.analysis.collect import CorpusFacts, collect_rows
from ptbench.analysis.costs import Estimator
from ptbench.analysis.experiment import analyse
from ptbench.analysis.plan import plan_experiment
from ptbench.configuration import obstacles
from ptbench.configuration.study import Study, load_study
from ptbench.errors import ConfigurationError
from ptbench.report.costs import costs_of, time_left
from ptbench.report.status import distinct, show, study_status


def study_on(capability: float | None, **config: Any) -> Study:
    asked = {"experiments": ["demo"], "seeds": [1], "devices": [1], "accelerator": "cuda"}
    return load_study(asked | {"cuda_capability": capability} | config)


@pytest.mark.parametrize(
    ("study", "frameworks"),
    [
        (study_on(8.0), []),  # A100
        (study_on(8.6), []),  # RTX 3090
        (study_on(8.9), ["mxnet"]),  # RTX 4090
        (study_on(9.0), ["mxnet"]),  # H100
        (study_on(9.0, accelerators={"mxnet": "cpu"}), []),
        (study_on(9.0, accelerator="cpu"), []),
        (study_on(9.0, frameworks=["jax"]), []),
    ],
)
def test_mxnet_cannot_run_on_gpus_after_ampere(study: Study, frameworks: list[str]) -> None:
    assert list(study.cannot_run) == frameworks


def test_runs_that_would_need_several_nodes_cannot_be_in_three_frameworks() -> None:
    study = load_study({"experiments": ["demo"], "devices": [2, 4], "devices_per_node": 2})
    assert not {cell for cell in study.cells if cell.devices == 2} - {*study.runnable(study.cells)}
    spanning = {cell.framework for cell in study.runnable(study.cells) if cell.devices == 4}
    assert spanning == {"pytorch", "jax"}
    assert study.obstacles == [
        f"3 of 30 runs cannot run here: a run in {title} is on one node here; PyTorch and JAX can "
        "span several"
        for title in ("TensorFlow", "Keras", "MXNet")
    ]
    assert [study.config.nodes(devices) for devices in (1, 2, 4, 6)] == [1, 1, 2, 3]


def test_nodes_must_be_filled_and_on_one_machine_there_is_one() -> None:
    asked = {"experiments": ["demo"], "devices": [3], "devices_per_node": 2}
    with pytest.raises(ConfigurationError, match="devices=3 do not fill nodes of devices_per_node"):
        load_study(asked)
    study = load_study(asked | {"devices": [4]}, on_cluster=False)
    assert study.config.nodes(4) == 1
    assert not study.obstacles


def test_the_machine_s_own_gpus_are_asked_where_none_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(obstacles, "capability_here", lambda: 9.0)
    assert list(study_on(None).cannot_run) == ["mxnet"]
    assert not study_on(8.0).cannot_run
    monkeypatch.setattr(obstacles, "capability_here", lambda: None)
    assert not study_on(None).cannot_run


def test_the_gpu_that_is_asked_is_the_first_that_runs_may_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of two unlike GPUs, as NVIDIA's library numbers them."""
    library = SimpleNamespace(
        NVMLError=RuntimeError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda index: [(9, 0), (8, 6)][index],
        nvmlDeviceGetCudaComputeCapability=lambda capability: capability,
        nvmlDeviceGetCount=lambda: 2,
    )
    monkeypatch.setitem(sys.modules, "pynvml", library)
    for visible, capability in (("0,1", 9.0), ("1", 8.6), ("1,0", 8.6)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert obstacles.capability_here() == capability
        assert obstacles.gpus_here() == len(visible.split(","))
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert obstacles.capability_here() is None


def test_runs_on_more_gpus_than_this_machine_has_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(obstacles, "gpus_here", lambda: 1)
    asked = {"experiments": ["demo"], "accelerator": "cuda", "cuda_capability": 9.0, "seeds": 1}
    study = load_study(asked, on_cluster=False)
    assert {cell.devices for cell in study.runnable(study.cells)} == {1}
    assert "4 of 10 runs cannot run here: this machine has 1 GPU" in study.obstacles
    assert study.cannot_run["mxnet"].devices == 1  # on none of these GPUs
    assert {each.devices for each in load_study(asked).runnable(study.cells)} == {1, 2}


def test_it_is_said_with_what_would_help() -> None:
    [sentence] = study_on(9.0).obstacles
    assert sentence.startswith("1 of 5 runs cannot run here: the last build of MXNet knows no GPU")
    assert sentence.endswith("and these have 9.0; `accelerators: {mxnet: cpu}` trains it on CPUs")
    assert not study_on(8.0).obstacles


def test_status_and_report_mark_such_runs_and_estimates_leave_them_out(tmp_path: Path) -> None:
    study = study_on(9.0)
    for cell in study.runnable(study.cells):
        fingerprint = study.fingerprint(cell.path)
        write_cell(tmp_path, metrics(cell, 4.7, fingerprint=fingerprint))
    found = study_status(study, tmp_path)
    [missing] = [cell for cell in distinct(found) if cell.state == "missing"]
    assert missing.cell.framework == "mxnet"
    assert (missing.reason or "").startswith("cannot run here: the last build of MXNet")
    console = Console(width=100, record=True, file=(tmp_path / "said").open("w"))
    show(found, console)
    assert "\n1 cannot run here: the last build of MXNet knows no GPU" in console.export_text()
    estimator = Estimator(study, tmp_path)
    assert time_left(distinct(found), estimator).costs.runs == []
    assert len(costs_of(study.cells, estimator).runs) == 4
    assert not [row for row in study.profiles() if "mxnet" in row]

    plan = plan_experiment(study, "demo")
    analysis = analyse(plan, collect_rows(plan, tmp_path), CorpusFacts(), [])
    problems = {row.framework: row.problem for row in analysis.rows if row.problem}
    assert problems.keys() == {"mxnet"}
    assert problems["mxnet"].startswith("no seed has a result (cannot run here: the last build")


def test_a_result_from_elsewhere_counts_all_the_same(tmp_path: Path) -> None:
    study = study_on(9.0)
    for cell in study.cells:
        write_cell(tmp_path, metrics(cell, 4.7, fingerprint=study.fingerprint(cell.path)))
    assert {cell.state for cell in distinct(study_status(study, tmp_path))} == {"done"}
    plan = plan_experiment(study, "demo")
    assert all(row.problem is None for row in collect_rows(plan, tmp_path))
    # Not one of a recipe that has changed since: nothing here could renew it.
    [cell] = [cell for cell in study.cells if study.obstacle(cell)]
    write_cell(tmp_path, metrics(cell, 4.7, fingerprint="f" * 12))
    problems = {row.framework: row.problem for row in collect_rows(plan, tmp_path) if row.problem}
    assert problems.keys() == {"mxnet"}
    assert problems["mxnet"].startswith("no seed has a result (cannot run here: ")
    assert json.loads(study.plan("demo"))["cannot_run"].keys() == {"mxnet"}
