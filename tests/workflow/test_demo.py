"""The study of a fresh clone, in all five frameworks on one and two devices, to its report."""

from __future__ import annotations

import csv
import itertools
import json
import subprocess
import sysconfig

import pytest
from tests.workflow.conftest import Project

from ptbench.training.records import read_history, read_metrics

FRAMEWORKS = ("pytorch", "tensorflow", "keras", "mxnet", "jax")
# What a reader of a result may want to know of where it comes from.
FACTS = {
    "git_commit", "git_dirty", "framework_package", "framework_version", "versions", "python",
    "lock_sha256", "cpu", "threads", "gpus", "host", "started", "finished", "command",
}  # fmt: skip
HISTORY = [
    "epoch", "learning_rate", "train_nll", "train_perplexity", "valid_nll", "valid_perplexity",
    "gradient_norm", "tokens_per_second", "training_seconds", "validation_seconds",
]  # fmt: skip


@pytest.fixture(scope="module")
def demo(project: Project) -> Project:
    """The demo with one seed."""
    project.snakemake("--cores", "2", "--config", "seeds=[1]")
    return project


def test_every_framework_finishes_on_one_and_on_two_devices(demo: Project) -> None:
    for framework in FRAMEWORKS:
        for devices in (1, 2):
            cell = demo.folder / f"results/cells/demo-lstm/{framework}/devices-{devices}/seed-1"
            metrics = read_metrics(cell / "metrics.json")
            assert metrics.status == "ok"
            assert len(read_history(cell / "history.csv")) == metrics.epochs
            provenance = json.loads((cell / "provenance.json").read_text())
            assert len(provenance["devices"]) == devices
            assert provenance.keys() >= FACTS
            for fact in ("framework_version", "lock_sha256", "cpu", "host"):
                assert provenance[fact], fact
            assert provenance["settings"]["implementation"] == "stock"
            assert {"numpy", "safetensors"} < provenance["versions"].keys()
            assert provenance["started"] < provenance["finished"]
            header = (cell / "history.csv").read_text().partition("\n")[0]
            assert header.split(",") == HISTORY


def test_every_framework_learns_beyond_the_best_bigram_and_stays_above_the_floor(
    demo: Project,
) -> None:
    facts = json.loads((demo.folder / "results/corpora/synthetic/corpus.json").read_text())
    truth = facts["true_process"]["test"]  # what the true process scores on that very sample
    for framework, devices in itertools.product(FRAMEWORKS, (1, 2)):
        cell = demo.folder / f"results/cells/demo-lstm/{framework}/devices-{devices}/seed-1"
        test = read_metrics(cell / "metrics.json").test
        assert test is not None
        assert test.nll < facts["best_bigram_nll_nats"]
        # A model chosen without this sample is below the truth by t nats per token with a
        # probability of at most exp(-t * tokens); 0.01 nats is 1e-26 for these.
        assert test.nll > truth["nll_nats"] - 0.01
        assert test.tokens == facts["tokens"]["test"] - 1


def test_frameworks_that_start_alike_end_alike(demo: Project) -> None:
    """Shared initial parameters and data order: only dropout and rounding differ."""
    nlls = []
    for framework in FRAMEWORKS:
        cell = demo.folder / f"results/cells/demo-lstm/{framework}/devices-1/seed-1"
        test = read_metrics(cell / "metrics.json").test
        assert test is not None
        nlls.append(test.nll)
    assert max(nlls) - min(nlls) < 0.05  # nats; the equivalence margin is 0.02


def test_the_report_has_a_row_for_every_framework_and_device_count(demo: Project) -> None:
    page = (demo.folder / "results/report/experiments/demo.html").read_text()
    assert "<script" not in page
    assert '<link rel="stylesheet"' not in page
    with (demo.folder / "results/experiments/demo/table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {(row["framework"], row["devices"]) for row in rows} == {
        (framework, devices) for framework in FRAMEWORKS for devices in ("1", "2")
    }
    for framework in FRAMEWORKS:
        assert f"../../cells/demo-lstm/{framework}/devices-2/seed-1/metrics.json" in page


def test_the_gpu_script_trains_the_runs_that_it_is_asked_for(demo: Project) -> None:
    """On a CPU, with a framework's own Python, as on a machine without our environments."""
    packages = sysconfig.get_path("purelib")  # of what the framework's environment does not have
    subprocess.run(
        ["results/environments/jax-cpu/bin/python", "benchmarks/gpu.py", "--parts", "runs",
         "--corpora", "results/corpora", "--output", "results/gpu", "--accelerator", "cpu",
         "--budget", "smoke", "--cells", "demo-lstm/jax/1"],
        cwd=demo.folder, check=True, timeout=600,
        env=demo.environment() | {"PYTHONPATH": f"{demo.folder / 'workflow'}:{packages}"},
    )  # fmt: skip
    cell = demo.folder / "results/gpu/cells/demo-lstm+budget=smoke/jax/devices-1/seed-1"
    assert read_metrics(cell / "metrics.json").status == "ok"
