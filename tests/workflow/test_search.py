"""Searches end to end in two frameworks: at random, and by a sampler, killed and run again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from typing import Any

import psutil
import pytest
from tests.workflow.conftest import Project

from ptbench.analysis.search import SearchResult, propose
from ptbench.configuration.search import Question
from ptbench.training.attempts import look
from ptbench.training.records import read_metrics

SPACE = "{hidden_size: {low: 4, high: 16, log: true}, learning_rate: {low: 0.1, high: 2}}"
FILE = f"""
search:
  at-random:
    {{title: R, recipe: demo-lstm, space: {SPACE}, trials: 2, full: 1, published: demo-lstm,
     short: {{epochs: 2, constant_epochs: 2}}, frameworks: [jax, pytorch], seeds: [1]}}
  learning:
    {{title: L, recipe: demo-lstm, space: {SPACE}, trials: 4, full: 1, generation: 2, method: tpe,
     short: {{epochs: 2, constant_epochs: 2}}, frameworks: [jax, pytorch], seeds: [1]}}
  failing:
    {{title: F, recipe: demo-lstm, method: tpe, generation: 2, trials: 3, full: 1, seed: 4,
     space: {{batch_size: {{choices: [10, 1000000]}}, learning_rate: {{low: 0.1, high: 1}}}},
     frameworks: [jax], seeds: [1]}}
"""
COMMAND = ("--cores", "2", "--config", "experiments=[at-random,learning]", "budget=smoke")
RANDOM = "results/searches/at-random+budget=smoke"
LEARNING = "results/searches/learning+budget=smoke"


@pytest.fixture(scope="module")
def searched(project: Project) -> Project:
    """Both searches, run to the report; Snakemake and its trainers were killed on the way."""
    (project.folder / "workflow/experiments/own.yaml").write_text(FILE)
    with (project.folder / "said").open("w") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "snakemake", f"{LEARNING}/selection.json", *COMMAND],
            cwd=project.folder, stdout=said, stderr=subprocess.STDOUT, start_new_session=True,
            env=project.environment(),
        )  # fmt: skip
    attempts = project.folder / "results/attempts/learning-trial-3+budget=smoke"
    while not list(attempts.glob("*/*/*/attempt-1.json")):
        assert process.poll() is None, (project.folder / "said").read_text()
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    for other in psutil.process_iter(["cwd"]):
        if other.info["cwd"] == str(project.folder):
            other.kill()
    process.wait()
    project.snakemake("--unlock", *COMMAND)
    project.snakemake(*COMMAND)
    return project


def read(project: Project, file: str) -> Any:
    return json.loads((project.folder / file).read_bytes())


def test_trials_run_in_the_first_framework_and_winners_in_both(searched: Project) -> None:
    for folder, name, count in ((RANDOM, "at-random", 2), (LEARNING, "learning", 4)):
        result = SearchResult.model_validate(read(searched, f"{folder}/search.json"))
        assert [trial.state for trial in result.trials] == ["ok"] * count
        assert all("/jax/" in trial.cell for trial in result.trials)
        best = min(result.trials, key=lambda trial: trial.nll or 99)
        selected = read(searched, f"{folder}/selection.json")["winners"]
        assert [each["number"] for each in selected.values()] == [best.number]
        for framework in ("jax", "pytorch"):
            cell = f"{name}-winner-1+budget=smoke/{framework}/devices-1/seed-1"
            folder_of_cell = searched.folder / "results/cells" / cell
            assert read_metrics(folder_of_cell / "metrics.json").status == "ok"
            recipe = (folder_of_cell / "recipe.yaml").read_text()
            assert best.point
            assert f"hidden_size: {best.point['hidden_size']}\n" in recipe
        page = searched.folder / f"results/report/searches/{name}+budget=smoke.html"
        assert f"{name}-best:" in page.read_text()
    index = (searched.folder / "results/report/index.html").read_text()
    assert "searches/learning+budget=smoke.html" in index


def test_a_killed_search_went_on_with_the_trials_that_it_would_have_had(searched: Project) -> None:
    killed = look(
        searched.folder / "results/attempts/learning-trial-3+budget=smoke/jax/devices-1/seed-1"
    )
    assert killed
    assert killed.record.attempt == 2
    assert killed.status == "finished"
    for number in (1, 2):
        file = f"{LEARNING}/generation-{number}.json"
        written = read(searched, file)
        question = Question.model_validate(written["question"])
        assert propose(question, searched.folder / "results") == written
    assert searched.planned(*COMMAND) == []


def test_searches_are_packed_unless_a_selection_is_not_what_the_trials_say(
    searched: Project,
) -> None:
    def pack() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "ptbench", "archive"],
            cwd=searched.folder, env=searched.environment(), capture_output=True, text=True,
        )  # fmt: skip

    answer = pack()
    assert answer.returncode == 0, answer.stderr
    assert "results/archive/at-random-learning.crate.zip" in answer.stdout
    file = searched.folder / LEARNING / "selection.json"
    before = file.read_text()
    try:
        selection = json.loads(before)
        selection["trials"][0]["nll"] += 1e-3
        file.write_text(json.dumps(selection))
        answer = pack()
    finally:
        file.write_text(before)
    assert answer.returncode == 2
    said = f"refused: {LEARNING}/selection.json is not what the trials say"
    assert said in answer.stderr


def test_a_generation_that_has_been_proposed_stays_when_a_result_is_made_again(
    searched: Project,
) -> None:
    cell = searched.folder / "results/cells/learning-trial-1+budget=smoke/jax/devices-1/seed-1"
    (cell / "metrics.json").rename(cell / "kept")
    planned = searched.planned(*COMMAND)
    (cell / "kept").rename(cell / "metrics.json")
    assert f"{LEARNING}/selection.json" in planned
    generation = searched.folder / LEARNING / "generation-1.json"
    before = generation.read_text()
    generation.write_text(before[:-9])  # damaged: it is proposed anew
    assert f"{LEARNING}/generation-1.json" in searched.planned(*COMMAND)
    generation.write_text(before)
    assert not [file for file in planned if "generation" in file or "learning-trial-2" in file]


def test_a_failed_trial_counts_as_the_worst_and_is_waited_for_once_the_search_is_edited(
    searched: Project,
) -> None:
    target = "results/searches/failing+budget=smoke/generation-2.json"
    command = ("--cores", "2", target, "--config", "experiments=failing", "budget=smoke")
    answer = searched.snakemake(*command, expect=1)
    assert "failing+budget=smoke trial 1 jax seed 1 failed; see" in answer.stderr
    assert not (searched.folder / target).exists()
    searched.snakemake(*command)
    told = [trial["state"] for trial in read(searched, target)["told"]]
    assert told == ["failed", "ok"]
    study = ("--config", "experiments=failing", "budget=smoke", "profile=true")
    planned = searched.planned(*study)
    assert "results/report/index.html" in planned
    assert not [file for file in planned if "failing-trial-1" in file]
    file = searched.folder / "workflow/experiments/own.yaml"
    before = file.read_text()
    file.write_text(before.replace("[10, 1000000]", "[10, 20]"))
    planned = searched.planned(target, *study)
    file.write_text(before)
    assert [name for name in planned if "failing-trial-1" in name]
    assert target in planned
