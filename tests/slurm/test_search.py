"""A search that learns, through a real Slurm."""

from __future__ import annotations

import json

import pytest
from tests.slurm.conftest import Study
from tests.slurm.testbed import Testbed

from ptbench.training.records import read_metrics

pytestmark = pytest.mark.slurm

SEARCH = """
search:
  learning:
    title: A search on a cluster
    recipe: tiny
    method: tpe
    space: {learning_rate: {low: 0.001, high: 0.03, log: true}}
    trials: 3
    generation: 2
    full: 1
    short: {epochs: 1}
    frameworks: [pytorch]
    seeds: [1]
"""


def test_trials_and_winners_are_jobs_and_the_sampler_runs_where_snakemake_does(
    testbed: Testbed, tmp_path_factory: pytest.TempPathFactory
) -> None:
    study = Study(tmp_path_factory.mktemp("search"), ["pytorch"], [1], [1])
    (study.folder / "workflow/experiments/own.yaml").write_text(SEARCH)
    (study.folder / "slurm/reproduction.yaml").write_text("experiments: [learning]\n")
    study.run("results/report/searches/learning.html")
    assert testbed.ask("squeue", "-h") == ""
    trials = [f"learning-trial-{n}/pytorch/devices-1/seed-1" for n in (1, 2, 3)]
    cells = [*trials, "learning-winner-1/pytorch/devices-1/seed-1"]
    assert all(read_metrics(study.file(cell)).status == "ok" for cell in cells)
    assert len({study.facts(cell)["slurm_job"] for cell in cells} - {None}) == 4
    assert study.said().count("has been submitted with SLURM jobid") == 4
    second = json.loads((study.folder / "results/searches/learning/generation-2.json").read_text())
    assert [trial["state"] for trial in second["told"]] == ["ok", "ok"]
    assert "Nothing to be done" in study.run("results/report/searches/learning.html")
