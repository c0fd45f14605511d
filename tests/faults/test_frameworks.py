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

from ptbench.training.attempts import look
from ptbench.training.records import read_metrics

DEVICES = {"pytorch": 2, "jax": 2, "tensorflow": 2}  # of the others one
KILLS = 1  # besides one SIGTERM; to start a framework takes seconds


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def test_killed_and_told_to_end_it_ends_as_one_that_was_not(
    framework: str, corpus: Path, tmp_path: Path
) -> None:
    devices = DEVICES.get(framework, 1)
    reference = Trainer(framework, devices, corpus, tmp_path / "uninterrupted")
    reference.finish()
    metrics = read_metrics(reference.output / "metrics.json")
    assert metrics.status == "ok"
    epoch = metrics.seconds_per_epoch
    assert epoch is not None

    trainer = Trainer(framework, devices, corpus, tmp_path / "interrupted")
    process = trainer.start()
    assert trainer.wait_for_checkpoint(process)
    os.killpg(process.pid, signal.SIGTERM)  # replicas too, as Slurm does
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 75, said
    seen = look(trainer.attempts)
    assert seen is not None
    assert seen.status == "interrupted"
    assert "Traceback" not in trainer.log.read_text(), "no replica died before its time"

    moments = random.Random(framework)
    assert list(trainer.kill_until_done(moments, KILLS, delay=epoch))[-1] == "finished"
    assert trainer.kills > 0
    assert trainer.result() == reference.result()
    # the last kill may have come when all was written
    attempts = read_metrics(trainer.output / "metrics.json").attempts
    assert 1 + trainer.kills <= attempts <= 2 + trainer.kills
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in str(p.info)]
