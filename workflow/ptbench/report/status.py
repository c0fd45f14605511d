"""How far a study is: the state of every planned cell, and why cells failed.

It only reads, so it can be asked while the workflow runs.
"""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from ptbench.analysis.collect import OUTDATED
from ptbench.configuration.specification import Cell, parse_cell_path
from ptbench.configuration.study import Study
from ptbench.report.formatting import framework_name
from ptbench.slurm import job_numbers
from ptbench.training.attempts import Seen, look, record_path
from ptbench.training.records import read_metrics

State = Literal["done", "diverged", "running", "interrupted", "failed", "missing"]
STATES: dict[State, str] = {  # and the colour of each
    "done": "green",
    "diverged": "magenta",
    "running": "cyan",
    "interrupted": "yellow",
    "failed": "red",
    "missing": "dim",
}


def _job_error(rule: str, output: str) -> re.Pattern[str]:
    """Match a failed job in Snakemake's log: what its output is about, and its logs."""
    return re.compile(
        rf"^Error in rule {rule}:\n(?:.*\n)*?"
        rf" {{4}}output: {output}\n(?: {{4}}log: (.+?)(?: \(check .*)?\n)?",
        re.MULTILINE,
    )


JOB_ERROR = _job_error("train", r"results/cells/(.+)/metrics\.json")
PREPARATION_ERROR = _job_error("(corpus|environment)", r"results/(?:corpora|environments)/(.+)/\S+")


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


def cell_status(
    cell: Cell, study: Study, results: Path, jobs: Collection[str] | None = None
) -> CellStatus:
    """Return the state of a cell, from its metrics.json and its newest attempt.

    Args:
        cell: which.
        study: knows its recipe.
        results: the results folder.
        jobs: that Slurm has; None: unknown.
    """
    folder = results / "attempts" / cell.path
    seen = look(folder)
    if seen and jobs is not None and _without_job(seen, jobs):
        seen = seen._replace(lives=False)
    state, reason = _state(cell, study, results / "cells" / cell.path / "metrics.json", seen)
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


def _state(cell: Cell, study: Study, result: Path, seen: Seen | None) -> tuple[State, str | None]:
    """Return the state of a cell and the reason for it.

    Args:
        cell: which.
        study: knows its recipe.
        result: its metrics.json.
        seen: its newest attempt.
    """
    if result.exists() and not (seen and seen.status == "running"):
        try:
            metrics = read_metrics(result)
        except (OSError, ValueError):
            return "failed", f"{result} cannot be read"
        if metrics.fingerprint != study.specification(cell.variant).fingerprint:
            return "missing", OUTDATED
        return ("done" if metrics.status == "ok" else "diverged"), metrics.reason
    if seen is None:
        return "missing", None
    reason = seen.record.reason
    if seen.status == "finished":
        return "missing", reason  # its result was removed, so it must run again
    if seen.status == "killed":
        return "failed", reason or "its process was killed and left no message"
    return seen.status, reason


def _without_job(seen: Seen, jobs: Collection[str]) -> bool:
    """Return whether an attempt was made in a Slurm job that Slurm no longer has."""
    job = seen.record.holder.slurm_job
    return job is not None and job.rpartition(" ")[2] not in jobs


def study_status(study: Study, results: Path) -> dict[str, list[CellStatus]]:
    """Return the cells of every experiment; cells that experiments share are in each of them."""
    known = {cell.path: cell_status(cell, study, results) for cell in study.cells}
    running = [status.cell for status in known.values() if status.state == "running"]
    # Slurm is asked after the first look, or a job that has just begun would seem gone. Then the
    # cells are looked at again, because a job that has just ended may have recorded how.
    jobs = job_numbers() if running else None
    known |= {cell.path: cell_status(cell, study, results, jobs) for cell in running}
    return {
        name: [known[cell.path] for cell in planned.cells]
        for name, planned in study.experiments.items()
    }


def distinct(status: Mapping[str, Sequence[CellStatus]]) -> list[CellStatus]:
    """Return every cell once."""
    return list({cell.path: cell for cells in status.values() for cell in cells}.values())


def job_errors(log: str) -> dict[str, str]:
    """Return the cells whose jobs failed, by path, with their logs; from Snakemake's own log."""
    return dict(JOB_ERROR.findall(log))


def preparation_failures(log: str) -> str:
    """Return, of each corpus or environment whose job failed, why, and its own log.

    Args:
        log: Snakemake's own.
    """
    paragraphs = []
    for kind, name, path in dict.fromkeys(PREPARATION_ERROR.findall(log)):
        own = Path(path).read_text(errors="replace") if Path(path).exists() else ""
        reasons = re.findall(r"^ptbench: (.*)$", own, re.MULTILINE)
        reason = reasons[-1] if reasons else "no reason is known"
        paragraphs.append(f"{kind} {name} failed: {reason}\n  log:   {path}")
    return "\n".join(paragraphs)


def after_errors(
    cells: Iterable[CellStatus], errors: Mapping[str, str], study: Study, results: Path
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
    for path, log in errors.items():
        cell = known.get(path) or cell_status(parse_cell_path(path), study, results)
        known[path] = cell
        record = record_path(results / "attempts" / path, cell.attempts)
        old = cell.state in ("failed", "interrupted") and _touched(record) < run_began
        if cell.state == "running":
            reason = f"its job failed, though a process on {cell.host} seems to be at it"
        elif cell.state == "missing" or old:
            reason = "its job ended before its trainer began"
        else:
            continue
        known[path] = CellStatus(path, cell.cell, "failed", reason=reason, log=log or None)
    return list(known.values())


def _touched(path: Path) -> float:
    """Return when a file was last written or touched [s since 1970]; 0 if it is not there."""
    return path.stat().st_mtime if path.exists() else 0.0


def status_json(status: Mapping[str, Sequence[CellStatus]]) -> str:
    """Return for machines how many cells are in each state, and each cell."""
    cells = distinct(status)
    counts = Counter(cell.state for cell in cells)
    content = {
        "planned": len(cells),
        "states": {state: counts[state] for state in STATES},
        "experiments": {name: [cell.path for cell in own] for name, own in status.items()},
        "cells": [{k: v for k, v in c._asdict().items() if k != "cell"} for c in cells],
    }
    return json.dumps(content, indent=2)


def show(status: Mapping[str, Sequence[CellStatus]], console: Console) -> None:
    """Print the grid by experiment and framework, the running cells, and how many are outdated."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("experiment", overflow="fold")
    table.add_column("framework", no_wrap=True)
    table.add_column("planned", justify="right", no_wrap=True)
    for state, style in STATES.items():
        table.add_column(state, justify="right", style=style, no_wrap=True)
    for name, cells in status.items():
        for index, framework in enumerate(dict.fromkeys(c.cell.framework for c in cells)):
            own = [cell for cell in cells if cell.cell.framework == framework]
            table.add_row("" if index else name, framework_name(framework), *_counts(own))
        table.add_section()
    every = distinct(status)
    table.add_row("all", "", *_counts(every), style="bold")
    console.print(table)
    lines = [
        f"[cyan]running[/] {c.path}: attempt {c.attempts}, on {c.host} since {c.since}"
        for c in every
        if c.state == "running"
    ]
    if outdated := sum(cell.reason == OUTDATED for cell in every):
        lines.append(f"{outdated} of the missing have a result that is {OUTDATED}")
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False)


def _counts(cells: Sequence[CellStatus]) -> list[str]:
    counts = Counter(cell.state for cell in cells)
    return [str(len(cells)), *(str(counts[state]) if counts[state] else "·" for state in STATES)]


def failures(cells: Iterable[CellStatus], results: Path, command: Sequence[str]) -> str:
    """Return for each failed or interrupted cell why, its log, and how to run it alone.

    Args:
        cells: each once.
        results: the results folder.
        command: what runs the workflow, without targets.
    """
    paragraphs = []
    for cell in cells:
        if cell.state not in ("failed", "interrupted"):
            continue
        target = results / "cells" / cell.path / "metrics.json"
        again = [*command, "--", str(target)]
        times = "" if cell.attempts < 2 else f" (attempt {cell.attempts})"
        paragraphs.append(
            f"{cell.path} {cell.state}{times}: {cell.reason or 'no reason is known'}\n"
            f"  log:   {cell.log or 'none'}\n"
            f"  again: {shlex.join(again)}"
        )
    return "\n".join(paragraphs)
