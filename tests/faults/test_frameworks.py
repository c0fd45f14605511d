"""Each framework's trainer, killed and told to end, and its result beside an uninterrupted run's.

A short case for each; `benchmarks/soak.py` goes on for as long as it is told to.
"""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import psutil
import pytest
from tests.faults.harness import Trainer, make_corpus

from ptbench.backends import Framework
from ptbench.training.attempts import look
from ptbench.training.records import read_history, read_metrics

INTERRUPTIONS = 3  # of each run; to start a framework takes seconds


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.mark.parametrize("devices", [1, 2])
def test_killed_and_told_to_end_it_ends_as_one_that_was_not(
    framework: Framework, devices: int, corpus: Path, tmp_path: Path
) -> None:
    reference = Trainer(framework, devices, corpus, tmp_path / "uninterrupted")
    reference.finish()
    metrics = read_metrics(reference.output / "metrics.json")
    assert metrics.status == "ok"
    assert metrics.stopped == "patience"
    rates = {epoch.learning_rate for epoch in read_history(reference.output / "history.csv")}
    assert len(rates) > 1, "the plateau lowered it"
    assert metrics.seconds_per_epoch is not None

    trainer = Trainer(framework, devices, corpus, tmp_path / "interrupted")
    told = devices > 1  # with replicas, the harder case
    if told:
        tell_to_end(trainer)
    kills, moments = INTERRUPTIONS - told, random.Random(f"{framework} {devices}")
    half_epoch = metrics.seconds_per_epoch / 2
    did = list(trainer.kill_until_done(moments, kills, half_epoch, at_start=0.3))
    assert 1 <= trainer.kills <= kills  # a fast machine may be done before the last
    assert "goes on" in trainer.log.read_text(), "it trained all anew"
    assert trainer.result() == reference.result()
    attempts = read_metrics(trainer.output / "metrics.json").attempts
    assert told + did.count("killed") + 1 <= attempts <= INTERRUPTIONS + 1
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in str(p.info)]


def tell_to_end(trainer: Trainer) -> None:
    """Let it save something, and send SIGTERM to it and its replicas, as Slurm does."""
    process = trainer.start()
    assert trainer.wait_for_checkpoint(process)
    os.killpg(process.pid, signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 75, said
    seen = look(trainer.attempts)
    assert seen is not None
    assert seen.status == "interrupted"
    assert "Traceback" not in trainer.log.read_text(), "no replica died before its time"
