"""How far a study is: the state of every planned cell, and why cells failed.

It only reads, so it can be asked while the workflow runs.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Literal, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from ptbench.analysis.collect import CANNOT_RUN, OUTDATED
from ptbench.configuration.specification import Cell, parse_cell_path
from ptbench.configuration.study import Study
from ptbench.report.commands import run_again
from ptbench.report.formatting import framework_name
from ptbench.slurm import Job, Queue, comment_of, queue_of
from ptbench.training.attempts import Seen, look, record_path
from ptbench.training.records import read_metrics

State = Literal[
    "done", "diverged", "running", "starting", "queued", "interrupted", "failed", "missing"
]  # fmt: skip
STATES: dict[State, str] = {  # and the colour of each
    "done": "green",
    "diverged": "magenta",
    "running": "cyan",
    "starting": "cyan",
    "queued": "blue",
    "interrupted": "yellow",
    "failed": "red",
    "missing": "dim",
}


def _job_error(rule: str, output: str) -> re.Pattern[str]:
    """Match a failed job in Snakemake's log: a message, what its output is about, and its logs."""
    return re.compile(
        rf"^Error in rule {rule}:\n(?: {{4}}message: (?:None|(.+))\n)?(?:.*\n)*?"
        rf" {{4}}output: {output}\n(?: {{4}}log: (.+?)(?: \(check .*)?\n)?",
        re.MULTILINE,
    )


JOB_ERROR = _job_error("train", r"results/cells/(.+)/metrics\.json")
PREPARATION_ERROR = _job_error("(corpus|environment)", r"results/(?:corpora|environments)/(.+)/\S+")
NOT_SUBMITTED = (
    "not submitted"  # so begins what the executor says of a job that Slurm does not have
)
DISK = 100e6  # bytes that are to be free: a checkpoint takes as much


class CellStatus(NamedTuple):
    """One planned cell as it is now."""

    path: str  # its folder, relative to results/cells
    cell: Cell
    state: State  # missing: no result of its present recipe is there
    attempts: int = 0  # how often it was begun
    reason: str | None = None  # why it is in this state
    log: str | None = None  # of its newest attempt
    since: str | None = None  # when its newest attempt began (UTC)
    host: str | None = None  # where that ran, or runs


def cell_status(cell: Cell, study: Study, results: Path, queue: Queue | None = None) -> CellStatus:
    """Return the state of a cell, from its metrics.json, its newest attempt, and Slurm's queue.

    Args:
        cell: which.
        study: knows its recipe.
        results: the results folder.
        queue: Slurm's; None: unknown.
    """
    folder = results / "attempts" / cell.path
    seen = look(folder)
    if seen and queue and (number := _job_of(seen)) and number not in queue.numbers:
        seen = seen._replace(lives=False)  # its job is gone
    job = queue.jobs.get(comment_of(cell.path)) if queue else None
    result = results / "cells" / cell.path / "metrics.json"
    state, reason = _state(cell, study, result, seen, job)
    status = CellStatus(cell.path, cell, state, reason=reason)
    if seen is None:
        return status
    log = folder / f"attempt-{seen.record.attempt}.log"
    return status._replace(
        attempts=seen.record.attempt,
        log=str(log) if log.exists() else None,
        since=seen.record.started or None,
        host=seen.record.holder.host,
    )


def _state(
    cell: Cell, study: Study, result: Path, seen: Seen | None, job: Job | None
) -> tuple[State, str | None]:
    """Return the state of a cell and the reason for it.

    Args:
        cell: which.
        study: knows its recipe.
        result: its metrics.json.
        seen: its newest attempt.
        job: its job in Slurm's queue.
    """
    outdated = False
    if result.exists() and not (seen and seen.status == "running"):
        try:
            metrics = read_metrics(result)
        except (OSError, ValueError):
            return "failed", f"{result} cannot be read"
        outdated = metrics.fingerprint != study.fingerprint(cell.path)
        if not outdated:
            return ("done" if metrics.status == "ok" else "diverged"), metrics.reason
    if job and not _trains(seen, job):
        if job.state in ("RUNNING", "COMPLETING"):
            return "starting", f"job {job.number} on {job.nodes}"
        return "queued", f"job {job.number}: {job.reason}"
    return ("missing", OUTDATED) if outdated else attempt_state(seen)


def attempt_state(seen: Seen | None) -> tuple[State, str | None]:
    """Return the state of a cell without a result, and the reason, from its newest attempt."""
    if seen is None:
        return "missing", None
    reason = seen.record.reason
    if seen.status == "finished":
        return "missing", reason  # its result was removed, so it must run again
    if seen.status == "killed":
        return "failed", reason or "its process was killed and left no message"
    return seen.status, reason


def _trains(seen: Seen | None, job: Job) -> bool:
    """Return whether the newest attempt at a cell is of its job, or of another that lives."""
    if seen is None:
        return False
    if _job_of(seen) != job.number:
        return seen.lives
    began = seen.record.started
    # Slurm may have queued the job again, under its number, since the attempt.
    since = job.started if job.state in ("RUNNING", "COMPLETING") else None
    return since is not None and bool(began) and datetime.fromisoformat(began) >= since


def _job_of(seen: Seen) -> str | None:
    """Return the number of the Slurm job that an attempt was made in."""
    job = seen.record.holder.slurm_job
    return job and job.rpartition(" ")[2]


def study_status(study: Study, results: Path) -> dict[str, list[CellStatus]]:
    """Return the cells of every experiment; cells that experiments share are in each of them."""
    known = {cell.path: cell_status(cell, study, results) for cell in study.cells}
    # Slurm is asked after the first look, or a job that has just begun would seem gone. Then the
    # cells are looked at again, because a job that has just ended may have recorded how.
    if queue := queue_of(results.resolve().parent):
        known |= {
            status.path: cell_status(status.cell, study, results, queue)
            for status in known.values()
            if status.state not in ("done", "diverged")
        }
    for path, status in known.items() if study.cannot_run else ():
        why = study.obstacle(status.cell)
        if why and status.state == "missing":
            known[path] = status._replace(reason=f"{CANNOT_RUN}: {why}")
    failed = failed_corpora(study, results)
    for path, status in known.items() if failed else ():
        corpus = study.recipe(path).corpus_folder
        cannot = study.obstacle(status.cell)
        if corpus in failed and status.state == "missing" and not cannot:
            known[path] = status._replace(reason=f"corpus {corpus} failed: {failed[corpus][0]}")
    return {
        name: [known[cell.path] for cell in planned.cells]
        for name, planned in study.experiments.items()
    }


def distinct(status: Mapping[str, Sequence[CellStatus]]) -> list[CellStatus]:
    """Return every cell once."""
    return list({cell.path: cell for cells in status.values() for cell in cells}.values())


class JobError(NamedTuple):
    """A cell's job that failed, as Snakemake's log tells it."""

    message: str  # may be empty
    log: str | None


def job_errors(log: str) -> dict[str, JobError]:
    """Return the cells whose jobs failed, by path; from Snakemake's own log."""
    return {
        path: JobError(message.partition("For further error details")[0].strip(" ."), logs or None)
        for message, path, logs in JOB_ERROR.findall(log)
    }


def failed_corpora(study: Study, results: Path) -> dict[str, tuple[str, Path]]:
    """Return why each corpus that is not there could not be had, where that was tried, and a log.

    Args:
        study: names the corpora.
        results: the results folder.
    """
    found = {}
    for corpus in dict.fromkeys(study.recipe(cell.path).corpus_folder for cell in study.cells):
        log = results / "logs" / "corpora" / f"{corpus}.log"
        reason = _preparation_reason(log)
        if reason and not (results / "corpora" / corpus / "corpus.json").exists():
            found[corpus] = (reason, log)
    return found


def _preparation_reason(log: Path) -> str | None:
    """Return why a corpus or an environment could not be made, from its log."""
    text = log.read_text(errors="replace") if log.exists() else ""
    reasons: list[str] = re.findall(r"^ptbench: (.*)$", text, re.MULTILINE)
    return reasons[-1] if reasons else None


def preparation_failures(log: str, study: Study, results: Path) -> str:
    """Return, of each corpus or environment whose job failed, why, and its own log.

    Args:
        log: Snakemake's own.
        study: names the corpora and frameworks.
        results: the results folder.
    """
    found = {(kind, name): Path(path) for kind, _, name, path in PREPARATION_ERROR.findall(log)}
    for corpus, (_, own) in failed_corpora(study, results).items():
        found.setdefault(("corpus", corpus), own)
    return "\n".join(
        f"{kind} {name} failed: {_preparation_reason(own) or 'no reason is known'}\n  log:   {own}"
        for (kind, name), own in found.items()
    )


def disk_sentence(results: Path) -> str | None:
    """Say that the disk of the results is full, or nearly; None if it is not."""
    free = shutil.disk_usage(results).free if results.exists() else DISK
    if free >= DISK:
        return None
    return f"The disk of {results} is full: {free / 1e6:.0f} MB are free. Make room first."


def after_errors(
    cells: Iterable[CellStatus], errors: Mapping[str, JobError], study: Study, results: Path
) -> list[CellStatus]:
    """Return the cells, with those failed whose job failed before it began an attempt.

    The files of such a cell show no attempt, or an older one.

    Args:
        cells: as their files show them.
        errors: as `job_errors` returns them.
        study: knows the recipes.
        results: the results folder.
    """
    known = {cell.path: cell for cell in cells}
    run_began = _touched(results / "study.json")
    for path, (message, log) in errors.items():
        cell = known.get(path) or cell_status(parse_cell_path(path), study, results)
        known[path] = cell
        record = record_path(results / "attempts" / path, cell.attempts)
        old = cell.state in ("failed", "interrupted") and _touched(record) < run_began
        if cell.state == "running":
            reason = f"its job failed, though a process on {cell.host} seems to be at it"
        elif cell.state == "missing" or old:
            began = "its job ended before its trainer began"
            reason = f"{began} ({message})" if message else began
            if message.startswith(NOT_SUBMITTED):
                reason, log = message, None
        else:
            continue
        known[path] = CellStatus(path, cell.cell, "failed", reason=reason, log=log)
    return list(known.values())


def _touched(path: Path) -> float:
    """Return when a file was last written or touched [s since 1970]; 0 if it is not there."""
    return path.stat().st_mtime if path.exists() else 0.0


def status_json(status: Mapping[str, Sequence[CellStatus]], hours_left: float | None = None) -> str:
    """Return for machines how many cells are in each state, each cell, and the hours left."""
    cells = distinct(status)
    counts = Counter(cell.state for cell in cells)
    content = {
        "planned": len(cells),
        "states": {state: counts[state] for state in STATES},
        "hours_left": hours_left,
        "experiments": {name: [cell.path for cell in own] for name, own in status.items()},
        "cells": [{k: v for k, v in c._asdict().items() if k != "cell"} for c in cells],
    }
    return json.dumps(content, indent=2)


def show(status: Mapping[str, Sequence[CellStatus]], console: Console) -> None:
    """Print the grid by experiment and framework, and what the cells are at that are under way."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    every = distinct(status)
    states = [state for state in STATES if state == "done" or any(c.state == state for c in every)]
    table.add_column("experiment", no_wrap=True)
    table.add_column("framework", no_wrap=True)
    table.add_column("planned", justify="right", no_wrap=True)
    for state in states:
        table.add_column(state, justify="right", style=STATES[state], no_wrap=True)
    lines = []  # in place of the table where that is too wide

    def add(name: str, framework: str, cells: Sequence[CellStatus], first: bool = True) -> None:
        counts = Counter(cell.state for cell in cells)
        shown = [f"{counts[state]:,}" if counts[state] else "·" for state in states]
        table.add_row(name if first else "", framework, f"{len(cells):,}", *shown)
        of = ", ".join(f"{counts[state]:,} {state}" for state in states if counts[state])
        lines.append(f"{name} {framework}".strip() + f": {of}")

    for name, cells in status.items():
        for index, framework in enumerate(dict.fromkeys(c.cell.framework for c in cells)):
            own = [cell for cell in cells if cell.cell.framework == framework]
            add(name, framework_name(framework), own, first=index == 0)
        table.add_section()
    add("all", "", every)
    table.rows[-1].style = "bold"
    natural = console.measure(table, options=console.options.update(width=10_000)).maximum
    if natural <= console.width:
        console.print(table)
        lines = []
    lines += [
        f"[cyan]running[/] {c.path}: attempt {c.attempts}, on {c.host} since {c.since}"
        for c in every
        if c.state == "running"
    ]
    lines += [f"[cyan]starting[/] {c.path}: {c.reason}" for c in every if c.state == "starting"]
    waiting = Counter((c.reason or "").partition(": ")[2] for c in every if c.state == "queued")
    lines += [f"[blue]queued[/] {count}: {reason}" for reason, count in waiting.most_common()]
    if outdated := sum(cell.reason == OUTDATED for cell in every):
        lines.append(f"{outdated} of the missing have a result that is {OUTDATED}")
    reasons = Counter(c.reason for c in every if (c.reason or "").startswith(CANNOT_RUN))
    lines += [f"{count:,} {reason}" for reason, count in reasons.items()]
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False)


def failures(cells: Iterable[CellStatus], results: Path, command: Sequence[str]) -> str:
    """Return for each failed or interrupted cell why, its log, and what to type.

    What runs a failed one alone shows soon whether it fails again; after an interruption, the whole
    study goes on.

    Args:
        cells: each once.
        results: the results folder.
        command: what runs the workflow, without targets.
    """
    paragraphs = []
    for cell in cells:
        if cell.state not in ("failed", "interrupted"):
            continue
        alone = run_again(command, results / "cells" / cell.path / "metrics.json")
        again = alone if cell.state == "failed" else shlex.join(command)
        times = "" if cell.attempts < 2 else f" (attempt {cell.attempts})"
        paragraphs.append(
            f"{cell.path} {cell.state}{times}: {cell.reason or 'no reason is known'}\n"
            f"  log:   {cell.log or 'none'}\n"
            f"  again: {again}"
        )
    return "\n".join(paragraphs)
