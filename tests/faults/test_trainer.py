"""The trainer as a process: killed, told to end, started twice, out of memory and of disk.

With the oracle in a framework's place, so that a process starts in a second; the frameworks
themselves are in `test_frameworks.py`.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.faults.harness import RECIPE, Trainer, make_corpus
from tests.faults.hostile_shell import EVERYWHERE, assert_ignored, hostile_shell

from ptbench.training.attempts import Failure, look
from ptbench.training.records import read_metrics


class Toy(Trainer):
    """The cell of a framework that is none."""

    def command(self) -> list[str | Path]:
        return [sys.executable, "-m", "tests.support.toy_trainer"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def toy(corpus: Path, tmp_path: Path) -> Toy:
    return Toy("jax", 1, corpus, tmp_path, RECIPE.model_copy(update={"epochs": 2}))


@pytest.fixture(scope="module")
def uninterrupted(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    toy = Toy(
        "jax", 1, corpus, tmp_path_factory.mktemp("ref"), RECIPE.model_copy(update={"epochs": 2})
    )
    toy.finish()
    return toy.result()


def ended(process: subprocess.Popen[str], seconds: float = 60) -> str:
    """What a process said by its end."""
    return process.communicate(timeout=seconds)[0]


def failure(toy: Toy, attempt: int) -> Failure:
    path = toy.attempts / f"attempt-{attempt}.failure.json"
    return Failure.model_validate_json(path.read_bytes())


def status(toy: Toy) -> str | None:
    seen = look(toy.attempts)
    return seen and seen.status


def test_killed_again_and_again_it_ends_as_one_that_was_not(
    toy: Toy, uninterrupted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOY_SECONDS", "0.03")  # or it is done before it is killed
    moments = toy.kill_until_done(random.Random(1), kills=6, delay=0.5, at_start=0.3)
    did = list(moments)
    assert toy.kills >= 3
    assert toy.result() == uninterrupted
    attempts = read_metrics(toy.output / "metrics.json").attempts
    assert did.count("killed") <= attempts <= toy.kills + 1
    assert {path.name for path in toy.checkpoints.iterdir()} == {"best.safetensors"}


@pytest.mark.parametrize(
    ("keep", "files"),
    [("none", set()), ("best", {"best"}), ("all", {"best", "last", "previous"})],
)
def test_of_a_finished_cell_those_parameters_stay_that_were_asked_for(
    toy: Toy, keep: str, files: set[str]
) -> None:
    toy.checkpoints.mkdir(parents=True)
    (toy.checkpoints / "best.safetensors").write_text("of another recipe, trained before")
    (toy.checkpoints / ".best.safetensors.1").write_text("left by a process that was killed")
    toy.finish("--keep-checkpoints", keep)
    assert {path.stem for path in toy.checkpoints.iterdir()} == files


def test_a_result_that_was_removed_is_made_anew_though_its_checkpoints_were_kept(
    toy: Toy, uninterrupted: Any
) -> None:
    keep = ("--keep-checkpoints", "all")
    toy.finish(*keep)
    (toy.output / "metrics.json").unlink()
    process = toy.start(*keep, TOY_SECONDS="0.02")
    assert toy.wait_for_checkpoint(process)
    process.send_signal(signal.SIGTERM)
    assert "] goes on" not in ended(process)
    assert status(toy) == "interrupted"
    assert "goes on in epoch" in toy.finish(*keep), "its own checkpoints stay"
    assert toy.result() == uninterrupted
    assert read_metrics(toy.output / "metrics.json").attempts == 2


def test_the_users_shell_and_dot_files_change_nothing(
    toy: Toy, uninterrupted: Any, tmp_path: Path
) -> None:
    settings = dict(EVERYWHERE)
    # The toy's process imports NumPy before it ignores anything, and would end with a warning.
    del settings["PYTHONWARNINGS"], settings["NPY_PROMOTION_STATE"]
    toy.environment = hostile_shell(tmp_path / "home", settings)
    toy.finish()
    assert toy.result() == uninterrupted
    assert_ignored(toy, settings)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP"])
def test_told_to_end_it_saves_says_so_and_ends_with_75(
    toy: Toy, name: str, uninterrupted: Any
) -> None:
    """As schedulers and terminals do it: to every process of the group, replicas too."""
    process = toy.start(TOY_SECONDS="0.02")
    assert toy.wait_for_checkpoint(process)
    began = time.monotonic()
    os.killpg(process.pid, signal.Signals[name])
    said = ended(process)
    assert process.returncode == 75, said
    assert time.monotonic() - began < 15, "a step takes 0.02 s; the rest is a busy machine's"
    assert f"{name}: saving, and ending" in said
    assert "was told to end, and stopped in epoch" in said
    assert "the same command goes on from there" in toy.log.read_text()
    assert "Traceback" not in toy.log.read_text()
    assert status(toy) == "interrupted"
    assert not list(toy.attempts.glob("*.failure.json"))
    said = toy.finish()
    assert "goes on in epoch" in said
    assert toy.result() == uninterrupted
    assert read_metrics(toy.output / "metrics.json").attempts == 2


def test_a_terminal_that_is_gone_neither_ends_nor_fails_it(toy: Toy, uninterrupted: Any) -> None:
    """As with `| tee log` and Ctrl-C, which ends tee too."""
    process = toy.start(TOY_SECONDS="0.02")
    assert toy.wait_for_checkpoint(process)
    assert process.stdout is not None
    process.stdout.close()
    assert toy.wait_for_checkpoint(process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    assert "SIGTERM: saving" in toy.log.read_text()
    assert status(toy) == "interrupted"
    assert not list(toy.attempts.glob("*.failure.json"))
    toy.finish()
    assert toy.result() == uninterrupted


def test_in_the_background_what_the_terminal_sends_is_ignored(toy: Toy) -> None:
    """As after `nohup ptbench ... &` in a script."""
    both = (signal.SIGINT, signal.SIGHUP)
    process = toy.start(ignoring=both, TOY_SECONDS="0.02")
    assert toy.wait_for_checkpoint(process)
    for each in both:
        os.killpg(process.pid, each)
    assert toy.wait_for_checkpoint(process)
    process.send_signal(signal.SIGTERM)
    assert "SIGTERM: saving, and ending" in ended(process)


def test_told_to_end_before_the_first_step_it_says_so_and_ends_at_once(toy: Toy) -> None:
    """Also one that waits for another process."""
    process = toy.start(TOY_START="1000")
    while status(toy) != "running":
        time.sleep(0.02)
    second = toy.start("--wait-for-lock", "600")
    assert second.stdout is not None
    assert "is at it; waiting" in second.stdout.readline()
    for each in (second, process):
        each.send_signal(signal.SIGTERM)
        assert "ptbench: SIGTERM came before the first step; " in ended(each)
        assert each.returncode == 75
    assert status(toy) == "interrupted"


def test_a_step_that_never_ends_is_not_waited_for_longer_than_the_grace(toy: Toy) -> None:
    process = toy.start(TOY_HANGS="20", TOY_GRACE="0.5")
    assert toy.wait_for_checkpoint(process)
    time.sleep(1)
    replicas = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGTERM)
    ended(process)
    assert process.returncode == 75
    assert replicas
    assert not psutil.wait_procs(replicas, timeout=10)[1], "the replicas end with it"
    assert status(toy) == "interrupted"
    assert "the step under way did not end" in (toy.attempts / "attempt-1.json").read_text()
    toy.finish()


def test_a_failure_is_told_in_full_kept_and_gone_on_from(toy: Toy, uninterrupted: Any) -> None:
    process = toy.start(TOY_FAILS="100")
    ended(process)
    assert process.returncode == 1
    assert not (toy.output / "metrics.json").exists()
    left = failure(toy, 1)
    assert (
        left.reason
        == "out of memory (RuntimeError: CUDA out of memory. Tried to allocate 20.00 GiB)"
    )
    assert "about to fail" in left.log_tail
    assert left.log_tail[-1] == "Tried to allocate 20.00 GiB"
    assert "Traceback (most recent call last):" in left.log_tail
    assert status(toy) == "failed"
    toy.log.unlink()  # as Snakemake does
    toy.finish()
    assert toy.result() == uninterrupted
    assert failure(toy, 1) == left
    assert "about to fail" in (toy.attempts / "attempt-1.log").read_text()
    assert (toy.attempts / "attempt-2.log").samefile(toy.log)


def test_a_cell_that_cannot_begin_leaves_its_reason_too(toy: Toy) -> None:
    toy.corpus = toy.folder / "nowhere"
    process = toy.start()
    said = ended(process)
    assert process.returncode == 2
    assert "there is no prepared corpus in" in failure(toy, 1).reason
    assert failure(toy, 1).reason in said


def test_a_duplicate_refuses_or_waits_and_destroys_nothing(toy: Toy, uninterrupted: Any) -> None:
    """A Snakemake was killed, its job runs on, and a second Snakemake starts the same cell."""
    (toy.folder / "study.json").touch()  # as each Snakemake writes it when it starts
    first = toy.start(TOY_SECONDS="0.02")
    assert toy.wait_for_checkpoint(first)
    second = toy.start()
    said = ended(second)
    assert second.returncode == 2
    assert f"is being run by process {first.pid} on" in said
    first.send_signal(signal.SIGSTOP)
    third = toy.start("--wait-for-lock", "600")
    while not toy.log.exists() or "is at it; waiting" not in toy.log.read_text():
        time.sleep(0.02)
    first.send_signal(signal.SIGCONT)
    ended(first, 300)
    assert first.returncode == 0
    said = ended(third)
    assert third.returncode == 0, said
    assert "had finished already" in said
    assert toy.result() == uninterrupted
    assert read_metrics(toy.output / "metrics.json").attempts == 1
    # A Snakemake that saw no metrics.json while it planned deletes it now, and starts the cell.
    text = (toy.output / "metrics.json").read_text()
    (toy.output / "metrics.json").unlink()
    assert "had finished already" in toy.finish()
    assert json.loads((toy.output / "metrics.json").read_text()) == json.loads(text)


def test_of_two_started_at_once_one_trains_and_both_succeed(toy: Toy, uninterrupted: Any) -> None:
    pair = [toy.start("--wait-for-lock", "600") for _ in range(2)]
    said = [ended(process, 300) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], said
    assert toy.result() == uninterrupted
    assert read_metrics(toy.output / "metrics.json").attempts == 1


def test_a_full_disk_ends_it_in_a_sentence_and_it_goes_on_once_there_is_room(
    toy: Toy, uninterrupted: Any
) -> None:
    """A limit on the size of files stands for the disk: a record fits, a checkpoint does not."""
    process = toy.start(TOY_SECONDS="0.02")
    assert toy.wait_for_checkpoint(process)
    limit = 20_000
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))
    said = ended(process)
    assert process.returncode == 2
    assert "last.safetensors cannot be written" in said
    assert "Traceback" not in said
    assert "last.safetensors cannot be written" in failure(toy, 1).reason
    assert "goes on in epoch" in toy.finish()
    assert toy.result() == uninterrupted
