"""Snakemake interrupted and killed while a cell trains, and the same command again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest
from tests.workflow.conftest import Project

from ptbench.training.attempts import Seen, look
from ptbench.training.records import read_history, read_metrics

FRAMEWORK = "jax"  # the quickest to start
CELL = f"demo-lstm/{FRAMEWORK}/devices-1/seed-1"
TARGET = f"results/cells/{CELL}/metrics.json"
COMMAND = ("--cores", "2", TARGET, "--config", "checkpoint_minutes=0.001")


@pytest.fixture(autouse=True)
def _clean(project: Project) -> Iterator[None]:
    """Without the cell, and without what a test left running."""
    yield
    for process in psutil.process_iter(["cwd"]):
        if process.info["cwd"] == str(project.folder):
            process.kill()
    (project.folder / TARGET).unlink(missing_ok=True)


def start(project: Project) -> subprocess.Popen[bytes]:
    """Snakemake in a process group of its own, as a terminal starts it, once the cell has saved."""
    last = project.folder / "results/checkpoints" / CELL / "last.safetensors"
    assert not last.exists()
    with (project.folder / "said").open("w") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "snakemake", *COMMAND], cwd=project.folder,
            stdout=said, stderr=subprocess.STDOUT, start_new_session=True,
            # A test run behind an `&` ignores it, and so would Snakemake.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            env=project.environment(),
        )  # fmt: skip
    while not last.exists():
        assert process.poll() is None, (project.folder / "said").read_text()
        time.sleep(0.02)
    return process


def newest(project: Project) -> Seen:
    seen = look(project.folder / "results/attempts" / CELL)
    assert seen is not None
    return seen


def test_ctrl_c_saves_the_cell_and_the_same_command_goes_on(project: Project) -> None:
    process = start(project)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=120) != 0
    deadline = time.monotonic() + 60
    while newest(project).status == "running" and time.monotonic() < deadline:
        time.sleep(0.1)
    assert newest(project).status == "interrupted"
    assert not (project.folder / TARGET).exists()
    project.snakemake(*COMMAND)
    metrics = read_metrics(project.folder / TARGET)
    assert metrics.attempts == 2
    history = read_history(project.folder / f"results/cells/{CELL}/history.csv")
    assert len(history) == metrics.epochs


def test_after_a_killed_snakemake_its_cell_trains_on_and_the_next_one_waits_for_it(
    project: Project,
) -> None:
    process = start(project)
    before = newest(project)
    process.kill()
    process.wait()
    assert newest(project).status == "running", "the cell does not notice"
    project.snakemake("--unlock", *COMMAND)
    project.snakemake(*COMMAND)
    after = newest(project)
    assert after.record.attempt == before.record.attempt
    assert after.record.holder == before.record.holder
    assert after.status == "finished"
    assert read_metrics(project.folder / TARGET).attempts == 1
