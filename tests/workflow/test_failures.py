"""A cell that fails: what is said of it, what is made without it, and how it is run again."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.sentences import assert_no_frames
from tests.workflow.conftest import Project

from ptbench.training.attempts import newest
from ptbench.training.records import read_metrics

CONFIG = ("--config", "frameworks=pytorch", "devices=1", "seeds=[1,2]", "subset=200")
VARIANT = "demo-lstm+subset=200"
CELL = f"{VARIANT}/pytorch/devices-1/seed-2"
OTHER = f"{VARIANT}/pytorch/devices-1/seed-1"
TARGET = f"results/cells/{CELL}/metrics.json"


def ask_status(project: Project, *arguments: str) -> str:
    return subprocess.run(
        [sys.executable, "-m", "ptbench", "status", *arguments],
        cwd=project.folder, capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(project.folder / "workflow")},
    ).stdout  # fmt: skip


def status(project: Project) -> dict[str, int]:
    states = json.loads(ask_status(project, "--json"))["states"]
    return {state: n for state, n in states.items() if n}


@pytest.fixture(scope="module")
def failed(project: Project) -> tuple[Project, str]:
    """A study of two seeds, of which the second cannot save; and what was said."""
    obstacle = project.folder / "results" / "checkpoints" / CELL
    obstacle.parent.mkdir(parents=True)
    obstacle.write_text("a file where its folder of checkpoints should be")
    asked = ("all", *CONFIG, "-R", "report", "report")
    answer = project.snakemake("--cores", "all", *asked, expect=1)
    return project, answer.stdout + answer.stderr


def test_the_others_are_finished(failed: tuple[Project, str]) -> None:
    project, _ = failed
    assert (project.folder / "results" / "cells" / OTHER / "metrics.json").exists()
    assert not (project.folder / TARGET).exists()


def test_the_end_names_the_cell_its_reason_its_log_and_the_command(
    failed: tuple[Project, str],
) -> None:
    project, said = failed
    (line,) = re.findall(rf"^{re.escape(CELL)} failed.*?: (.*)$", said, re.MULTILINE)
    assert "checkpoints" in line
    (log,) = re.findall(r"^  log:   (.*)$", said, re.MULTILINE)
    assert "checkpoints" in (project.folder / log).read_text()
    (again,) = re.findall(r"^  again: (.*)$", said, re.MULTILINE)
    assert shlex.split(again)[-2:] == ["--", TARGET]


def test_status_counts_it(failed: tuple[Project, str]) -> None:
    assert status(failed[0]) == {"done": 1, "failed": 1}


def test_the_next_run_is_of_that_cell_and_what_needs_it(failed: tuple[Project, str]) -> None:
    planned = failed[0].planned(*CONFIG)
    assert [path for path in planned if "/cells/" in path] == [TARGET]
    assert "results/report/index.html" in planned


def test_a_partial_report_marks_what_is_missing_and_leaves_a_study_that_runs_alone(
    failed: tuple[Project, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project, _ = failed
    squeue = tmp_path / "squeue"
    job = "7|RUNNING|2026-10-03T10:00:00|None|node1|rule_train_wildcards_tiny_jax_1_1"
    squeue.write_text(f"#!/bin/sh\necho '{job}|{project.folder}'\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    study = project.folder / "results" / "study.json"
    before = study.stat().st_mtime_ns
    assert "still in Slurm's queue" in project.snakemake("--cores", "1", expect=1).stderr
    assert study.stat().st_mtime_ns == before
    project.snakemake("--cores", "1", "partial")  # of the study that was run, not of the demo
    assert study.stat().st_mtime_ns == before
    partial = project.folder / "results" / "partial"
    page = (partial / "experiments" / "demo.html").read_text()
    assert "seed 2 has no result" in page
    assert f"../../cells/{OTHER}/metrics.json" in page
    first = (partial / "index.html").read_text()
    assert f"{CELL}</strong>" in first
    assert f" -- {TARGET}</code>" in first
    assert not (project.folder / "results" / "report").exists()


def test_the_command_that_was_printed_runs_that_cell_alone(failed: tuple[Project, str]) -> None:
    project, said = failed
    (project.folder / "results" / "checkpoints" / CELL).unlink()
    other = project.folder / "results" / "cells" / OTHER / "metrics.json"
    before = other.stat().st_mtime_ns
    (again,) = re.findall(r"^  again: (.*)$", said, re.MULTILINE)
    words = shlex.split(again)
    project.snakemake(*words[words.index("--cores") :])
    assert (project.folder / TARGET).exists()
    assert other.stat().st_mtime_ns == before
    assert not (project.folder / "results" / "report").exists()
    assert status(project) == {"done": 2}


def test_the_first_command_then_finishes_the_report(failed: tuple[Project, str]) -> None:
    project, _ = failed
    project.snakemake("--cores", "2", *CONFIG)
    assert Path(project.folder / "results" / "report" / "index.html").exists()
    assert project.planned(*CONFIG) == []


def test_a_job_that_fails_before_it_can_record_an_attempt_is_named_at_the_end(
    failed: tuple[Project, str],
) -> None:
    project, _ = failed
    cell = f"{VARIANT}/pytorch/devices-1/seed-3"
    (project.folder / "results" / "attempts" / cell).write_text("a file where its folder should be")
    target = f"results/cells/{cell}/metrics.json"
    answer = project.snakemake("--cores", "1", *CONFIG, "--", target, expect=1)
    said = answer.stdout + answer.stderr
    start = (
        f"{cell} failed: its job ended before its trainer began\n"
        f"  log:   results/logs/cells/{cell}.log\n"
        "  again: "
    )
    (again,) = re.findall(f"^{re.escape(start)}(.*)$", said, re.MULTILINE)
    assert shlex.split(again)[-2:] == ["--", target]


def test_the_command_for_a_result_that_cannot_be_read_restores_it_from_its_record(
    failed: tuple[Project, str],
) -> None:
    project, _ = failed
    before = (project.folder / TARGET).read_bytes()
    (project.folder / TARGET).write_text("{")
    (again,) = re.findall(r"^  again: (.*)$", ask_status(project, "--failed"), re.MULTILINE)
    words = shlex.split(again)
    project.snakemake(*words[words.index("snakemake") + 1 :])
    log = project.folder / TARGET.replace("/cells/", "/logs/cells/").replace(
        "/metrics.json", ".log"
    )
    assert "had finished already" in log.read_text()
    assert OTHER not in log.read_text()
    assert (project.folder / TARGET).read_bytes() == before


def test_a_result_that_cannot_be_read_and_is_asked_for_again_is_trained_again(
    failed: tuple[Project, str],
) -> None:
    project, _ = failed
    attempts = project.folder / "results" / "attempts" / CELL
    before = newest(attempts)
    (project.folder / TARGET).write_text("{")
    project.snakemake("--cores", "1", *CONFIG, "--force", "--", TARGET)
    assert newest(attempts) == before + 1
    assert read_metrics(project.folder / TARGET).attempts == 1


def test_a_corpus_that_fails_is_told_again_at_the_end(project: Project) -> None:
    (project.folder / "mine").mkdir()
    for split in ("train", "valid", "test"):
        (project.folder / "mine" / f"{split}.txt").write_text("a b")
    own = "corpora={mine: {kind: folder, folder: mine}}"
    config = ("--config", "frameworks=pytorch", "corpus=mine", own)
    target = "results/corpora/mine/corpus.json"
    said = project.snakemake("--cores", "1", *config, "--", target, expect=1).stdout
    assert "corpus mine failed: mine/train.txt does not end in a newline" in said
    assert "  log:   results/logs/corpora/mine.log\n" in said
    assert "The report on what is there: " in said


def test_a_corpus_that_is_not_there_is_refused_before_anything_runs(project: Project) -> None:
    own = "corpora={mine: {kind: folder, folder: nowhere}}"
    said = project.snakemake("-n", "--cores", "1", "--config", "corpus=mine", own, expect=1).stderr
    assert "ptbench: corpus mine: there is no folder nowhere" in said


def test_a_study_that_cannot_be_written_down_is_a_sentence(failed: tuple[Project, str]) -> None:
    """A folder in the file's place, for to root every file is writable."""
    project, _ = failed
    study = project.folder / "results" / "study.json"
    study.unlink()
    study.mkdir()
    before = (project.folder / TARGET).read_bytes()
    answer = project.snakemake("--cores", "1", "--forceall", *CONFIG, expect=1)
    assert "ptbench: results/study.json: Is a directory" in answer.stderr
    assert_no_frames(answer.stderr)
    assert (project.folder / TARGET).read_bytes() == before
    assert not list((project.folder / ".snakemake" / "locks").glob("*"))
