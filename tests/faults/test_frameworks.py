"""A trainer that is killed, told to end, or run in a hostile shell ends as one that was left alone.

All are compared bit for bit, each in a process of its own. These are short runs;
`benchmarks/soak.py` goes on for as long as it is asked to.
"""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import psutil
import pytest
from tests.faults.harness import Trainer, make_corpus
from tests.faults.hostile_shell import EVERYWHERE, SETTINGS, finish_in_hostile_shell

from ptbench.backends import Framework
from ptbench.training.attempts import look
from ptbench.training.records import read_history, read_metrics

INTERRUPTIONS = 2  # of each run; starting a framework takes seconds


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def finished(framework: Framework, devices: int, corpus: Path, folder: Path) -> Trainer:
    """Return a trainer after a run from beginning to end."""
    trainer = Trainer(framework, devices, corpus, folder)
    trainer.finish()
    metrics = read_metrics(trainer.output / "metrics.json")
    assert metrics.status == "ok"
    assert metrics.stopped == "patience"
    rates = {epoch.learning_rate for epoch in read_history(trainer.output / "history.csv")}
    assert len(rates) > 1, "the plateau lowered it"
    return trainer


@pytest.fixture(scope="module")
def on_two_devices(
    framework: Framework, corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> Trainer:
    """Two devices are the harder case: replicas get signals and settings too."""
    return finished(framework, 2, corpus, tmp_path_factory.mktemp("uninterrupted"))


def test_killed_and_told_to_end_on_two_devices_it_ends_as_one_that_was_not(
    on_two_devices: Trainer, tmp_path: Path
) -> None:
    interrupt(on_two_devices, tmp_path)


def test_the_users_shell_and_dot_files_change_nothing(
    framework: Framework, corpus: Path, on_two_devices: Trainer, tmp_path: Path
) -> None:
    trainer = Trainer(framework, 2, corpus, tmp_path / "hostile")
    finish_in_hostile_shell(trainer, tmp_path / "home", EVERYWHERE | SETTINGS[framework])
    assert trainer.result() == on_two_devices.result()


# PyTorch, the first framework, alone has other code for one device, where there are no processes
# for replicas. To the others, one is a number of devices like two, and starting each of them five
# times takes a minute. Resuming on one device is in `tests/contract/test_steps.py` for all.
@pytest.mark.one_framework
def test_killed_on_one_device_it_ends_as_one_that_was_not(
    framework: Framework, corpus: Path, tmp_path: Path
) -> None:
    interrupt(finished(framework, 1, corpus, tmp_path / "uninterrupted"), tmp_path)


def interrupt(reference: Trainer, folder: Path) -> None:
    """Compare a run that was interrupted several times with one that was not."""
    framework, devices = reference.framework, reference.devices
    metrics = read_metrics(reference.output / "metrics.json")
    assert metrics.seconds_per_epoch is not None
    trainer = Trainer(framework, devices, reference.corpus, folder / "interrupted")
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
