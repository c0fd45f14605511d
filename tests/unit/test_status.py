"""How far a study is, told from what its cells have left so far."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from tests.support.fake_results import metrics, write_cell, write_diverged

from ptbench.analysis.collect import OUTDATED
from ptbench.analysis.costs import Estimator
from ptbench.cli import main
from ptbench.configuration.specification import Cell
from ptbench.configuration.study import Study, load_study
from ptbench.corpus import CorpusError
from ptbench.errors import InterruptionError
from ptbench.report.costs import Left, time_left
from ptbench.report.status import (
    JobError,
    after_errors,
    disk_sentence,
    distinct,
    failures,
    job_errors,
    preparation_failures,
    show,
    status_json,
    study_status,
)
from ptbench.slurm import comment_of
from ptbench.training.attempts import Attempt
from ptbench.training.records import Metrics, Seconds


@pytest.fixture
def study() -> Study:
    return load_study({"frameworks": ["pytorch", "jax"], "seeds": [1, 2, 3], "devices": [1]})


def finished(study: Study, cell: Cell) -> Metrics:
    """The result of a cell as the study has it."""
    return metrics(cell, 4.7, fingerprint=study.specification(cell.variant).fingerprint)


def attempt(results: Path, cell: Cell) -> Attempt:
    made = Attempt(results / "attempts" / cell.path, cell.path, "0123456789ab", "corpus")
    assert made.open(results / "cells" / cell.path) is None
    return made


def states(study: Study, results: Path) -> dict[str, str]:
    return {cell.path: cell.state for cell in study_status(study, results)["demo"]}


def test_cells_that_nobody_has_begun_are_missing(study: Study, tmp_path: Path) -> None:
    assert set(states(study, tmp_path).values()) == {"missing"}


def test_each_cell_is_in_the_state_that_its_files_tell(study: Study, tmp_path: Path) -> None:
    done, diverged, running, interrupted, failed, killed = study.cells
    write_cell(tmp_path, finished(study, done))
    write_diverged(tmp_path, diverged, fingerprint=finished(study, diverged).fingerprint)
    with attempt(tmp_path, running):
        with pytest.raises(InterruptionError), attempt(tmp_path, interrupted):
            raise InterruptionError("told to end by signal 15")
        with pytest.raises(MemoryError), attempt(tmp_path, failed):
            raise MemoryError("no room for 20 GiB")
        attempt(tmp_path, killed)._ended.set()  # no more signs of life
        record = tmp_path / "attempts" / killed.path / "attempt-1.json"
        content = json.loads(record.read_text())
        content["holder"]["started"] = "1"  # the process of that number is another one
        record.write_text(json.dumps(content))

        found = states(study, tmp_path)
        assert found == {
            done.path: "done", diverged.path: "diverged", running.path: "running",
            interrupted.path: "interrupted", failed.path: "failed", killed.path: "failed",
        }  # fmt: skip
        status = study_status(study, tmp_path)
        counts = json.loads(status_json(status))
        assert counts["planned"] == 6
        assert counts["states"] == {
            "done": 1, "diverged": 1, "running": 1, "starting": 0, "queued": 0, "interrupted": 1,
            "failed": 2, "missing": 0,
        }  # fmt: skip
        text = failures(distinct(status), tmp_path, ["snakemake", "--cores", "1"])
        assert f"{failed.path} failed: " in text
        assert "no room for 20 GiB" in text
        assert f"{interrupted.path} interrupted: " in text
        target = tmp_path / "cells" / failed.path / "metrics.json"
        assert f"again: snakemake --cores 1 -- {target}\n" in text
        assert "again: snakemake --cores 1\n" in text  # the interrupted one, and all else
        assert done.path not in text
        assert running.path not in text


def foreign(results: Path, cell: Cell, slurm_job: str | None) -> None:
    """Make it look as if a cell's attempt had just been begun on another machine."""
    attempt(results, cell)._ended.set()
    record = results / "attempts" / cell.path / "attempt-1.json"
    content = json.loads(record.read_text())
    content["holder"] |= {"host": "node7", "machine": "another", "slurm_job": slurm_job}
    record.write_text(json.dumps(content))


def slurm_says(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Put a squeue on the PATH."""
    squeue = folder / "bin" / "squeue"
    squeue.parent.mkdir()
    squeue.write_text(f"#!/bin/sh\n{script}\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", str(squeue.parent))


@pytest.mark.parametrize(
    ("squeue", "gone", "there", "outside"),
    [
        (
            "echo '42|RUNNING|2020-01-01T00:00:00|None|node7|mine|/tmp'",
            "failed",
            "running",
            "running",
        ),
        ("true", "failed", "failed", "running"),
        ("exit 1", "running", "running", "running"),  # Slurm's controller does not answer
    ],
)
def test_a_cell_whose_slurm_job_is_gone_has_failed(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    squeue: str, gone: str, there: str, outside: str,
) -> None:  # fmt: skip
    slurm_says(tmp_path, monkeypatch, squeue)
    for cell, job in zip(study.cells, ("hpc 4", "hpc 42", None), strict=False):
        foreign(tmp_path, cell, job)
    assert list(states(study, tmp_path).values())[:3] == [gone, there, outside]
    said = failures(distinct(study_status(study, tmp_path)), tmp_path, [])
    assert (f"{study.cells[0].path} failed: " in said) is (gone == "failed")


@pytest.mark.parametrize(
    ("job", "state", "reason"),
    [
        ("42|PENDING|N/A|Resources|", "queued", "job 42: Resources"),
        ("43|RUNNING|2020-01-01T00:00:00|None|node7", "starting", "job 43 on node7"),
        ("42|RUNNING|2020-01-01T00:00:00|None|node7", "running", None),
        # after a crash: the attempt on the old node may seem to live, and its job waits, or starts
        ("42|PENDING|2099-01-01T00:00:00|BeginTime|", "queued", "job 42: BeginTime"),
        ("42|RUNNING|2099-01-01T00:00:00|None|node8", "starting", "job 42 on node8"),
        ("43|PENDING|N/A|Priority|", "queued", "job 43: Priority"),
    ],
)
def test_a_cell_with_a_job_is_queued_starting_or_running(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    job: str, state: str, reason: str | None,
) -> None:  # fmt: skip
    begun, fresh, other, *_ = study.cells
    foreign(tmp_path, begun, "hpc 42")  # its newest attempt
    lines = [
        f"{job}|{comment_of(begun.path)}|{tmp_path.parent}",
        f"50|PENDING|N/A|Dependency||{comment_of(fresh.path)}|{tmp_path.parent}",
        f"51|PENDING|N/A|Dependency||{comment_of(other.path)}|/elsewhere",
    ]
    slurm_says(tmp_path, monkeypatch, "".join(f"echo '{line}'\n" for line in lines))
    found = {cell.path: cell for cell in distinct(study_status(study, tmp_path))}
    assert (found[begun.path].state, found[begun.path].reason) == (state, reason)
    assert (found[fresh.path].state, found[fresh.path].reason) == ("queued", "job 50: Dependency")
    assert found[other.path].state == "missing"
    assert failures(found.values(), tmp_path, ["snakemake"]) == ""  # nothing to run again
    console = Console(record=True, width=120)
    show(study_status(study, tmp_path), console)
    assert "queued 1: Dependency" in console.export_text()


def test_a_cell_whose_result_was_removed_is_to_be_run_anew(study: Study, tmp_path: Path) -> None:
    cell = study.cells[0]
    with attempt(tmp_path, cell) as made:
        made.finish(finished(study, cell))
    assert states(study, tmp_path)[cell.path] == "missing"


FURTHER = (  # as Snakemake ends the message about a job that failed
    "For further error details see the cluster/cloud log and the log files of the involved rule(s)."
)


def block(cell: Cell, message: str = "", rule: str = "train") -> str:
    """A failed job in Snakemake's log, locally or, with a message, in a Slurm job."""
    slurm = f", /p/results/logs/slurm/rule_train/{cell.seed}/7.log" if message else ""
    return (
        f"[Sat Oct  3 10:00:00 2026]\nError in rule {rule}:\n"
        + (f"    message: {message}\n" if message else "")
        + "    jobid: 3\n    input: results/corpora/synthetic/corpus.json\n"
        f"    output: results/cells/{cell.path}/metrics.json\n"
        f"    log: results/logs/cells/{cell.path}.log{slurm} "
        "(check log file(s) for error details)\n"
        "    shell:\n        python -m ptbench train\n"
        "        (command exited with non-zero exit code)\n"
    )


def test_the_jobs_that_failed_are_read_from_snakemakes_log(study: Study) -> None:
    first, second, third, other, *_ = study.cells
    log = (
        f"rule train:\n    output: results/cells/{third.path}/metrics.json\n    jobid: 3\n\n"
        + block(first)
        + "Trying to restart job 3.\n"
        + block(second, f"Slurm job 7: it ended as FAILED. {FURTHER}")
        + block(other, rule="analyse")
        + "1 of 4 steps (25%) done\n"
    )
    slurm = "/p/results/logs/slurm/rule_train/2/7.log"
    assert job_errors(log) == {
        first.path: JobError("", f"results/logs/cells/{first.path}.log"),
        second.path: JobError(
            "Slurm job 7: it ended as FAILED", f"results/logs/cells/{second.path}.log, {slurm}"
        ),
    }
    assert job_errors("") == {}


def test_a_corpus_that_failed_is_told_in_the_sentence_of_its_log(
    study: Study, tmp_path: Path
) -> None:
    own = tmp_path / "mine.log"
    own.write_text("[mine] a mirror is gone\nptbench: corpus mine cannot be had\n")
    log = "".join(
        f"Error in rule corpus:\n    jobid: 2\n    output: results/corpora/{name}/corpus.json\n"
        f"    log: {path} (check log file(s) for error details)\n    shell:\n        python\n"
        for name, path in (("mine", own), ("other", "nowhere.log"))
    )
    assert preparation_failures(log, study, tmp_path) == (
        f"corpus mine failed: corpus mine cannot be had\n  log:   {own}\n"
        "corpus other failed: no reason is known\n  log:   nowhere.log"
    )
    assert preparation_failures("", study, tmp_path) == ""


def test_cells_whose_corpus_could_not_be_had_say_so_after_the_run_too(
    study: Study, tmp_path: Path
) -> None:
    log = tmp_path / "logs/corpora/synthetic.log"
    log.parent.mkdir(parents=True)
    log.write_text("ptbench: no mirror answers\n")
    cells = distinct(study_status(study, tmp_path))
    assert {cell.reason for cell in cells} == {"corpus synthetic failed: no mirror answers"}
    said = f"corpus synthetic failed: no mirror answers\n  log:   {log}"
    assert preparation_failures("", study, tmp_path) == said
    corpus = tmp_path / "corpora/synthetic/corpus.json"
    corpus.parent.mkdir(parents=True)
    corpus.touch()
    assert preparation_failures("", study, tmp_path) == ""


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert disk_sentence(tmp_path) is None
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=3_000_000))
    said = f"The disk of {tmp_path} is full: 3 MB are free. Make room first."
    assert disk_sentence(tmp_path) == said


def test_a_job_that_fails_before_its_trainer_begins_is_listed_whatever_came_before(
    study: Study, tmp_path: Path
) -> None:
    begun, never, before, waiting, done, _ = study.cells
    outside = never.model_copy(update={"seed": 9})
    (tmp_path / "study.json").touch()
    for cell in (begun, before):
        with pytest.raises(MemoryError), attempt(tmp_path, cell):
            raise MemoryError("no room")
    old = (tmp_path / "study.json").stat().st_mtime - 60
    os.utime(tmp_path / "attempts" / before.path / "attempt-1.json", (old, old))
    write_cell(tmp_path, finished(study, done))  # at another try
    errors = {cell.path: JobError("", f"{cell.path}.log") for cell in (*study.cells[:5], outside)}
    errors[outside.path] = JobError("not submitted: sbatch: error: no such partition", "x.log")
    with attempt(tmp_path, waiting):
        found = after_errors(distinct(study_status(study, tmp_path)), errors, study, tmp_path)
    listed = dict(
        re.findall(r"^(\S+) failed: (.*)\n  log:   ", failures(found, tmp_path, []), re.MULTILINE)
    )
    early = "its job ended before its trainer began"
    held = f"its job failed, though a process on {socket.gethostname()} seems to be at it"
    assert listed == {
        begun.path: "out of memory (MemoryError: no room)",
        never.path: early,
        before.path: early,
        waiting.path: held,
        outside.path: "not submitted: sbatch: error: no such partition",
    }
    assert "x.log" not in failures(found, tmp_path, [])  # no job, no log
    assert f"  log:   {before.path}.log\n" in failures(found, tmp_path, [])


def test_a_result_that_cannot_be_read_is_a_failure_and_made_anew(
    study: Study, tmp_path: Path
) -> None:
    cell = study.cells[0]
    write_cell(tmp_path, finished(study, cell))
    path = tmp_path / "cells" / cell.path / "metrics.json"
    path.write_text("{")
    assert states(study, tmp_path)[cell.path] == "failed"
    text = failures(distinct(study_status(study, tmp_path)), tmp_path, ["snakemake"])
    assert "metrics.json cannot be read" in text
    assert text.endswith(f"again: snakemake -- {path}")


def test_a_result_of_another_recipe_is_outdated_and_its_cell_missing(
    study: Study, tmp_path: Path
) -> None:
    outdated, diverged, *current = study.cells
    write_cell(tmp_path, metrics(outdated, 4.7, fingerprint="ffffffffffff"))
    write_diverged(tmp_path, diverged, fingerprint="ffffffffffff")
    for cell in current:
        write_cell(tmp_path, finished(study, cell))
    status = study_status(study, tmp_path)
    counts = json.loads(status_json(status))
    assert {state: n for state, n in counts["states"].items() if n} == {"done": 4, "missing": 2}
    assert [cell["reason"] for cell in counts["cells"][:2]] == [OUTDATED, OUTDATED]
    console = Console(record=True, width=120)
    show(status, console)
    assert f"2 of the missing have a result that is {OUTDATED}" in console.export_text()


def test_the_grid_has_every_framework_and_state(study: Study, tmp_path: Path) -> None:
    write_cell(tmp_path, finished(study, study.cells[0]))
    console = Console(record=True, width=120)
    show(study_status(study, tmp_path), console)
    lines = [line.split() for line in console.export_text().splitlines() if line.strip()]
    assert lines[0] == [
        "experiment", "framework", "planned", "done", "missing",
    ]  # fmt: skip
    assert ["demo", "PyTorch", "3", "1", "2"] in lines
    assert ["JAX", "3", "·", "3"] in lines
    assert ["all", "6", "1", "5"] in lines
    console = Console(record=True, width=40)
    show(study_status(study, tmp_path), console)
    assert console.export_text().splitlines() == [
        "demo PyTorch: 1 done, 2 missing", "demo JAX: 3 missing", "all: 1 done, 5 missing",
    ]  # fmt: skip


def test_the_command_says_what_to_type_and_why_the_time_left_is_not_known(
    study: Study,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def unknown(*_: object) -> None:
        raise CorpusError("corpus mine: its size is not known before it is prepared")

    monkeypatch.setattr("ptbench.analysis.costs.planned_size", unknown)
    study.write(tmp_path / "study.json", [], "snakemake --cores all --config seeds=1")
    main(["status", "--failed", "--results", str(tmp_path)])
    assert capsys.readouterr().out == "Nothing has failed or been interrupted.\n"
    with pytest.raises(MemoryError), attempt(tmp_path, study.cells[0]):
        raise MemoryError("no room")
    main(["status", "--results", str(tmp_path)])
    said = capsys.readouterr().out
    assert "How long what is left takes is not known: corpus mine: its size" in said
    # Without the two dashes, `partial` would be another value of --config.
    assert said.endswith("there: snakemake --cores all --config seeds=1 -- partial\n")


def test_the_time_left_comes_from_finished_seeds_and_is_shared_by_what_runs_at_once(
    study: Study, tmp_path: Path
) -> None:
    pytorch, jax = study.cells[:3], study.cells[3:]
    seconds = Seconds(total=7200.0)
    for cell in (pytorch[0], *jax):
        fingerprint = study.specification(cell.variant).fingerprint
        write_cell(tmp_path, metrics(cell, 4.7, fingerprint=fingerprint, seconds=seconds))

    def left(at_once: int | None = None) -> Left:
        cells = distinct(study_status(study, tmp_path))
        return time_left(cells, Estimator(study, tmp_path), at_once)

    assert left(1).hours == pytest.approx(4.0)  # two seeds of PyTorch, each as long as the first
    assert left(2).hours == left(9).hours == pytest.approx(2.0)
    assert "takes about 4 h 0 min on 1 core." in left(1).sentence
    assert "2 by other seeds of the same row" in left(1).sentence
    with attempt(tmp_path, pytorch[1]):
        log = tmp_path / "attempts" / pytorch[1].path / "attempt-1.log"
        log.write_text(
            "[demo-lstm pytorch devices 1 seed 2] epoch 2/4  50%  train 9.10  9 tokens/s\n"
        )
        assert left().at_once == 1  # that of the run under way
        assert left().hours == pytest.approx(4.0 - 2.0 * 1.5 / 4)
        log.write_text("[demo-lstm pytorch devices 1 seed 2] epoch 2/4  train 9.10  valid 9.10\n")
        assert left().hours == pytest.approx(4.0 - 2.0 * 2 / 4)
    # It continues from there.
    assert left().hours == pytest.approx(4.0 - 2.0 * 2 / 4)
    shutil.rmtree(tmp_path / "attempts")
    for cell in pytorch:
        write_cell(tmp_path, finished(study, cell))
    assert left().sentence == ""


def test_the_time_left_goes_by_the_pace_of_what_runs_where_nothing_of_its_row_has_finished(
    study: Study, tmp_path: Path
) -> None:
    """An hour after its attempt began, a run is through a quarter of its epochs more."""

    def left() -> Left:
        cells = distinct(study_status(study, tmp_path))
        return time_left(cells, Estimator(study, tmp_path), 1)

    cell = study.cells[0]
    folder = tmp_path / "attempts" / cell.path
    for number, lines, hours in (
        (1, ("epoch 1/4  train 9.10",), 3 + 2 * 4),  # 4 hours each, of three seeds
        (2, ("epoch 2/4  train 9.10", "epoch 3/4  train 9.10"), 1 + 2 * 4),  # from its checkpoint
    ):
        with suppress(InterruptionError), attempt(tmp_path, cell):
            record = folder / f"attempt-{number}.json"
            content = record.read_text()
            began = datetime.now(UTC) - timedelta(hours=1)
            record.write_text(json.dumps(json.loads(content) | {"started": began.isoformat()}))
            said = "".join(f"[demo-lstm pytorch devices 1 seed 1] {line}\n" for line in lines)
            (folder / f"attempt-{number}.log").write_text(said)
            runs = [run for run in left().costs.runs if run.cell.framework == "pytorch"]
            assert {run.source for run in runs} == {"pace"}
            assert sum(run.seconds for run in runs) / 3600 == pytest.approx(hours, rel=1e-2)
            assert left().sentence.startswith("What is left takes at most about ")  # JAX: a bound
            record.write_text(content)
            raise InterruptionError("told to end")
