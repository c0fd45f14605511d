"""A trainer that was killed and told to end has the result of one that was not interrupted.

These are short runs; `benchmarks/soak.py` goes on for as long as it is asked to.
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

INTERRUPTIONS = 3  # of each run; starting a framework takes seconds


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def test_killed_and_told_to_end_on_two_devices_it_ends_as_one_that_was_not(
    framework: Framework, corpus: Path, tmp_path: Path
) -> None:
    """Two devices are the harder case: replicas get the signals too."""
    interrupt(framework, 2, corpus, tmp_path)


@pytest.mark.one_framework
def test_killed_on_one_device_it_ends_as_one_that_was_not(
    framework: Framework, corpus: Path, tmp_path: Path
) -> None:
    """`test_trainer.py` does more of this with the oracle; resuming is in `tests/contract`."""
    interrupt(framework, 1, corpus, tmp_path)


def interrupt(framework: Framework, devices: int, corpus: Path, tmp_path: Path) -> None:
    """Compare a run that was interrupted several times with one that was not."""
    reference = Trainer(framework, devices, corpus, tmp_path / "uninterrupted")
    reference.finish()
    metrics = read_metrics(reference.output / "metrics.json")
    assert metrics.status == "ok"
    assert metrics.stopped == "patience"
    rates = {epoch.learning_rate for epoch in read_history(reference.output / "history.csv")}
    assert len(rates) > 1, "the plateau lowered it"
    assert metrics.seconds_per_epoch is not None

    trainer = Trainer(framework, devices, corpus, tmp_path / "interrupted")
    told = devices > 1
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
    """Wait for a checkpoint, and send SIGTERM to the trainer and its replicas, as Slurm does."""
    process = trainer.start()
    assert trainer.wait_for_checkpoint(process)
    os.killpg(process.pid, signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 75, said
    seen = look(trainer.attempts)
    assert seen is not None
    assert seen.status == "interrupted"
    assert "Traceback" not in trainer.log.read_text(), "a replica died before the trainer"
