"""A trainer that was killed and told to end, in a hostile shell, ends as one that was left alone.

Both are compared bit for bit. These are short runs; `benchmarks/soak.py` goes on for as long as it
is asked to.
"""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import psutil
import pytest
from tests.faults.harness import Trainer, make_corpus
from tests.faults.hostile_shell import EVERYWHERE, SETTINGS, assert_ignored, hostile_shell

from ptbench.backends import Framework
from ptbench.training.attempts import look
from ptbench.training.records import read_history, read_metrics

INTERRUPTIONS = 2  # of each run; starting a framework takes seconds


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def test_killed_and_told_to_end_in_a_hostile_shell_on_two_devices_it_ends_as_one_left_alone(
    framework: Framework, corpus: Path, tmp_path: Path
) -> None:
    """Two devices are the harder case: replicas get the signals and the settings too."""
    settings = EVERYWHERE | SETTINGS[framework]
    trainer = interrupt(framework, 2, corpus, tmp_path, hostile_shell(tmp_path / "home", settings))
    assert_ignored(trainer, settings)


# PyTorch, the first framework, alone has other code for one device, where there are no processes
# for replicas. To the others, one is a number of devices like two, and starting each of them four
# times takes half a minute. Resuming on one device is in `tests/contract/test_steps.py` for all.
@pytest.mark.one_framework
def test_killed_on_one_device_it_ends_as_one_that_was_not(
    framework: Framework, corpus: Path, tmp_path: Path
) -> None:
    interrupt(framework, 1, corpus, tmp_path, {})


def interrupt(
    framework: Framework, devices: int, corpus: Path, folder: Path, shell: dict[str, str]
) -> Trainer:
    """Compare a run that was interrupted several times with one that was not; return the first.

    Args:
        framework: of both runs.
        devices: of both runs.
        corpus: folder of the prepared corpus.
        folder: for the results.
        shell: environment variables of the run that is interrupted.
    """
    reference = Trainer(framework, devices, corpus, folder / "uninterrupted")
    reference.finish()
    metrics = read_metrics(reference.output / "metrics.json")
    assert metrics.status == "ok"
    assert metrics.stopped == "patience"
    rates = {epoch.learning_rate for epoch in read_history(reference.output / "history.csv")}
    assert len(rates) > 1, "the plateau lowered it"
    assert metrics.seconds_per_epoch is not None

    trainer = Trainer(framework, devices, corpus, folder / "interrupted", environment=shell)
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
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(folder) in str(p.info)]
    return trainer


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
