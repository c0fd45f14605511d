"""What a run of the workflow shows, from the events that Snakemake logs."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tests.support.fake_results import metrics, write_cell, write_diverged

from ptbench.configuration.specification import Cell
from ptbench.errors import InterruptionError
from ptbench.report.live import Display, duration, finish, name_trials
from ptbench.training.attempts import Attempt

CELL = Cell(variant="tiny", framework="jax", devices=2, seed=3)


class Run:
    """A display that is fed with events."""

    def __init__(self, folder: Path, *quiet: str) -> None:
        self.folder, self.stream = folder, io.StringIO()
        self.display = Display(self.stream, set(quiet))

    def log(
        self, event: str | None, words: str = "", level: int = logging.INFO, **facts: Any
    ) -> None:
        record = logging.LogRecord("snakemake", level, "", 0, words, (), None)
        record.__dict__ |= {"event": event, **facts} if event else facts
        self.display.handle(record)

    def begin(self, rule: str, number: int, **wildcards: str) -> Path:
        """Begin a job; return its log."""
        log = self.folder / f"{number}.log"
        outputs = [str(self.folder / "cells" / CELL.path / "metrics.json")]
        self.log(
            "job_info", jobid=number, rule_name=rule, wildcards=wildcards, output=outputs,
            log=[str(log)],
        )  # fmt: skip
        return log

    def train(self, number: int = 1) -> Path:
        own = CELL.model_dump(exclude={"devices", "seed"})
        return self.begin("train", number, **own, devices="2", seed="3")

    def said(self) -> list[str]:
        return self.stream.getvalue().splitlines()

    def picture(self) -> str:
        console = Console(file=io.StringIO(), width=80)
        console.print(self.display.picture())
        return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    begun = Run(tmp_path)
    begun.log("run_info", stats={"train": 2, "environment": 1, "report": 1, "total": 4})
    return begun


def test_what_there_is_to_do_is_said_in_a_line(run: Run) -> None:
    assert run.said() == ["To do: 2 runs, 1 environment"]


def test_a_run_that_ended_is_one_line_with_its_result(run: Run) -> None:
    write_cell(run.folder, metrics(CELL, 2.0, tokens_per_second=12345.6))
    run.train()
    run.log("job_finished", job_id=1)
    [_, line] = run.said()
    assert line.startswith(
        "1 of 2  tiny jax devices 2 seed 3: test perplexity 7.39, 12,346 tokens/s, "
    )


def test_a_run_that_diverged_says_so(run: Run) -> None:
    write_diverged(run.folder, CELL)
    run.train()
    run.log("job_finished", job_id=1)
    assert ": diverged, " in run.said()[-1]


def test_other_jobs_are_a_line_too_and_the_last_rule_is_none(run: Run) -> None:
    run.begin("environment", 1, framework="jax", accelerator="cpu", digest="0")
    run.log("job_finished", job_id=1)
    run.begin("all", 2)
    run.log("job_finished", job_id=2)
    assert [line.partition(",")[0] for line in run.said()[1:]] == [
        "the environment of jax is ready"
    ]


def test_a_failure_names_the_log_and_is_counted_until_a_retry_succeeds(run: Run) -> None:
    log = run.train()
    run.log("job_error", level=logging.ERROR, jobid=1, rule_name="train")
    assert run.said()[-1] == f"tiny jax devices 2 seed 3 failed; see {log}"
    assert "1 failed" in run.picture()
    run.train(2)
    assert "failed" not in run.picture()
    for number, framework in enumerate(("jax", "keras"), start=3):  # of one variant
        run.begin("profile", number, variant="tiny", framework=framework, devices="1")
        run.log("job_error", level=logging.ERROR, jobid=number, rule_name="profile")
    assert "2 failed" in run.picture()
    assert run.said()[-1].startswith("profile tiny keras 1 failed; see ")


def test_an_interrupted_run_has_not_failed_and_its_command_is_not_repeated(run: Run) -> None:
    attempt = Attempt(run.folder / "attempts" / CELL.path, CELL.path, "0123456789ab", "corpus")
    attempt.open(run.folder / "cells" / CELL.path)
    with pytest.raises(InterruptionError), attempt:
        raise InterruptionError("told to end by signal 2")
    run.train()
    repeated = "RuleException:\nCalledProcessError in file training.smk:\nCommand 'a long one'"
    run.log("error", repeated, level=logging.ERROR)
    run.log("job_error", level=logging.ERROR, jobid=1, rule_name="train")
    words = "tiny jax devices 2 seed 3 was interrupted; it goes on from its last checkpoint"
    assert run.said()[1:] == [words]
    assert "failed" not in run.picture()
    log = run.train(2)
    run.display.progress.running[2].started += 60  # it never came to an attempt of its own
    run.log("job_error", level=logging.ERROR, jobid=2, rule_name="train")
    assert run.said()[-1] == f"tiny jax devices 2 seed 3 failed; see {log}"


def test_the_time_left_goes_by_what_the_running_ones_have_done(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 8 runs, 4 at once that take an hour each."""
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    run.display.progress.total["train"] = 8
    logs = [run.train(number) for number in range(4)]

    def at(hours: float, epoch: str) -> str:
        nonlocal now
        now = 1000 + 3600 * hours
        for log in logs:
            log.write_text(f"[tiny jax devices 2 seed 3] epoch {epoch}  train 9.10\n")
        return run.picture().splitlines()[0]

    assert "left" not in at(0.25, "1/4")  # the wait in the queue and the first epoch
    assert "about 1 h 15 min left" in at(0.75, "3/4")
    run.log("job_finished", job_id=0)
    assert "about 1 h 0 min left" in at(1.0, "4/4")


def test_a_framework_s_own_words_do_not_hide_how_far_a_run_is(run: Run) -> None:
    run.train().write_text("[tiny jax devices 2 seed 3] epoch 1/8\n[01:02:03] graph.cc: Subgraph\n")
    assert "epoch 1/8" in run.picture()
    run.begin("corpus", 2, corpus_folder="ptb").write_text("ptb.zip:  10%\rptb.zip:  34%\rptb.z")
    assert "corpus ptb                 ptb.zip:  34%" in run.picture()


def test_a_long_name_leaves_room_for_what_a_run_says(run: Run) -> None:
    long = run.begin("train", 1, variant="v" * 60, framework="jax", devices="1", seed="3")
    said = "epoch 12/39  45%  train 123.45  12,345 tokens/s"
    long.write_text(f"[{'v' * 60} jax devices 1 seed 3] {said}\n")
    assert f"v…vvvv jax seed 3  {said}" in run.picture()


def test_a_trial_is_called_by_its_search_and_number(run: Run) -> None:
    name_trials({CELL.path: "m trial 5"})
    run.train().write_text("[tiny jax devices 2 seed 3] epoch 2/8\n")
    assert "m trial 5 jax devices 2 seed 3  epoch 2/8" in run.picture()
    run.log("job_finished", job_id=1)
    assert run.said()[-1].startswith("1 of 2  m trial 5 jax devices 2 seed 3: ")


def test_the_display_shows_what_a_cell_says_at_the_end_of_its_log(run: Run) -> None:
    log = run.train()
    assert "tiny jax devices 2 seed 3  0 s" in run.picture()
    log.write_text(
        "noise\n" * 2000 + "[tiny jax devices 2 seed 3] epoch 2/8  train 12.10\n[tiny jax"
    )
    assert "epoch 2/8  train 12.10" in run.picture()
    assert "0 of 2 runs" in run.picture()
    assert max(map(len, run.picture().splitlines())) <= 80


def test_brackets_in_a_log_are_no_markup(run: Run) -> None:
    run.train().write_text("[tiny jax] epoch 1/8 [rank0] in [/scratch/x]\n")
    assert "epoch 1/8 [rank0] in [/scratch/x]" in run.picture()


def test_snakemake_s_own_words_are_left_out_but_for_what_it_warns_of(run: Run) -> None:
    run.log(None, "Building DAG of jobs...")
    run.log("workflow_started", "SNAKEMAKE 9")
    run.log("resources_info", "Provided cores: 2")
    run.log(None, "Job 5 has been submitted with SLURM jobid 7")
    run.log(None, "Nothing to be done (all requested files are present and up to date).")
    run.log(None, "The disk is full", logging.WARNING)
    run.log("error", "MissingInputException", logging.ERROR)
    assert run.said()[1:] == [
        "Nothing to be done (all requested files are present and up to date).",
        "The disk is full", "MissingInputException",
    ]  # fmt: skip


def test_quiet_leaves_failures(tmp_path: Path) -> None:
    run = Run(tmp_path, "all")
    run.log("run_info", stats={"train": 2, "total": 2})
    log = run.train()
    run.log("job_error", level=logging.ERROR, jobid=1, rule_name="train")
    run.train(2)
    run.log("job_finished", job_id=2)
    assert run.said() == [f"tiny jax devices 2 seed 3 failed; see {log}"]


def test_finish_waits_for_what_was_logged_before(run: Run) -> None:
    logger = logging.Logger("snakemake")
    logger.addHandler(run.display)
    finish(logger)
    assert run.display.seen.is_set()


@pytest.mark.parametrize(
    ("seconds", "words"), [(8.4, "8 s"), (200, "3 min 20 s"), (18600, "5 h 10 min")]
)
def test_times_are_written_as_people_read_them(seconds: float, words: str) -> None:
    assert duration(seconds) == words
