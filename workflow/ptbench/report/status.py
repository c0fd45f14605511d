"""How far a study is: the state of every planned cell, and what became of those that failed.

Reads only, so it can be asked while the workflow runs.
"""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field
from rich import box
from rich.console import Console
from rich.table import Table

from ptbench.analysis.collect import OUTDATED
from ptbench.configuration.specification import Cell, parse_cell_path
from ptbench.configuration.study import Study
from ptbench.model.recipe import Model
from ptbench.report.formatting import framework_name
from ptbench.slurm import job_numbers
from ptbench.training.attempts import Seen, look
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

# What Snakemake's log has of a failed job: its output and its logs.
JOB_ERROR = re.compile(
    r"^Error in rule train:\n(?:.*\n)*?"
    r" {4}output: results/cells/(.+)/metrics\.json\n"
    r"(?: {4}log: (.+) \(check )?",
    re.MULTILINE,
)

PREPARATION_ERROR = re.compile(
    r"^Error in rule (corpus|environment):\n(?: .*\n)*?"
    r" {4}output: results/(?:corpora|environments)/(.+)/\S+\n"
    r" {4}log: (\S+)",
    re.MULTILINE,
)


class CellStatus(Model):
    """One planned cell as it is now."""

    path: str = Field(description="Its folder, relative to results/cells.")
    cell: Cell = Field(description="Which run.")
    state: State = Field(description="missing: no result of its recipe is there yet.")
    attempts: int = Field(0, description="How often it was begun.")
    reason: str | None = Field(None, description="Why it is in this state.")
    log: str | None = Field(None, description="Log of its newest attempt.")
    since: str | None = Field(None, description="When its newest attempt began (UTC).")
    host: str | None = Field(None, description="Where that ran, or runs.")


def cell_status(
    cell: Cell, study: Study, results: Path, jobs: Collection[str] | None = None
) -> CellStatus:
    """The state of a cell, from its metrics.json and its newest attempt.

    Args:
        cell: which.
        study: knows its recipe.
        results: the results folder.
        jobs: that Slurm has; None: unknown.
    """
    folder = results / "attempts" / cell.path
    seen = look(folder)
    if seen and jobs is not None and without_job(seen, jobs):
        seen = seen._replace(lives=False)
    facts = {}
    if seen is not None:
        log = folder / f"attempt-{seen.record.attempt}.log"
        facts = {
            "attempts": seen.record.attempt,
            "reason": seen.record.reason,
            "log": str(log) if log.exists() else None,
            "since": seen.record.started or None,
            "host": seen.record.holder.host,
        }
    metrics_path = results / "cells" / cell.path / "metrics.json"
    state: State
    if metrics_path.exists() and not (seen and seen.status == "running"):
        try:
            metrics = read_metrics(metrics_path)
            if metrics.fingerprint != study.specification(cell.variant).fingerprint:
                state, facts["reason"] = "missing", OUTDATED
            else:
                state = "done" if metrics.status == "ok" else "diverged"
                facts["reason"] = metrics.reason
        except (OSError, ValueError):
            state = "failed"
            facts["reason"] = f"{metrics_path} cannot be read"
    elif seen is None or seen.status == "finished":
        state = "missing"  # its result was removed, so it is to be run anew
    elif seen.status == "killed":
        state = "failed"
        facts["reason"] = seen.record.reason or "its process is gone without a word: killed"
    else:
        state = seen.status
    return CellStatus(path=cell.path, cell=cell, state=state, **facts)


def without_job(seen: Seen, jobs: Collection[str]) -> bool:
    """Whether an attempt was made under a Slurm job that Slurm no longer has."""
    job = seen.record.holder.slurm_job
    return job is not None and job.rpartition(" ")[2] not in jobs


def study_status(study: Study, results: Path) -> dict[str, list[CellStatus]]:
    """The cells of every experiment; those that experiments share are in each of them."""
    known = {cell.path: cell_status(cell, study, results) for cell in study.cells}
    running = [status.cell for status in known.values() if status.state == "running"]
    # Asked after the first look, or a job that has just begun would seem gone; then looked again,
    # for one that has just ended may have said how.
    jobs = job_numbers() if running else None
    known |= {cell.path: cell_status(cell, study, results, jobs) for cell in running}
    return {
        name: [known[cell.path] for cell in planned.cells]
        for name, planned in study.experiments.items()
    }


def distinct(status: dict[str, list[CellStatus]]) -> list[CellStatus]:
    """Every cell once."""
    return list({cell.path: cell for cells in status.values() for cell in cells}.values())


def job_errors(log: str) -> dict[str, str]:
    """The cells whose jobs failed, by path, and where to read of it; from Snakemake's own log."""
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
    """The cells and those of failed jobs, where a job may have failed before it began an attempt.

    Then the cell's files tell of no attempt or of an older one.

    Args:
        cells: as their files tell.
        errors: as `job_errors` returns them.
        study: knows the recipes.
        results: the results folder.
    """
    known = {cell.path: cell for cell in cells}
    run_began = touched(results / "study.json")
    for path, log in errors.items():
        cell = known.setdefault(path, cell_status(parse_cell_path(path), study, results))
        record = results / "attempts" / path / f"attempt-{cell.attempts}.json"
        if cell.state == "running":
            reason = f"its job failed, though a process on {cell.host} seems to be at it"
        elif cell.state == "missing" or (
            cell.state in ("failed", "interrupted") and touched(record) < run_began
        ):
            reason = "its job ended before its trainer began"
        else:
            continue
        known[path] = CellStatus(
            path=path, cell=cell.cell, state="failed", reason=reason, log=log or None
        )
    return list(known.values())


def touched(path: Path) -> float:
    """When a file was last written or touched [s since 1970]; 0 if it is not there."""
    return path.stat().st_mtime if path.exists() else 0.0


def status_json(status: dict[str, list[CellStatus]]) -> str:
    """For machines: how many cells are in each state, and each cell."""
    cells = distinct(status)
    counts = Counter(cell.state for cell in cells)
    content = {
        "planned": len(cells),
        "states": {state: counts[state] for state in STATES},
        "experiments": {name: [c.path for c in cells] for name, cells in status.items()},
        "cells": [cell.model_dump(mode="json", exclude={"cell"}) for cell in cells],
    }
    return json.dumps(content, indent=2)


def show(status: dict[str, list[CellStatus]], console: Console) -> None:
    """The grid by experiment and framework, and what is to be said of single cells."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("experiment", overflow="fold")
    table.add_column("framework", no_wrap=True)
    table.add_column("planned", justify="right", no_wrap=True)
    for state, style in STATES.items():
        table.add_column(state, justify="right", style=style, no_wrap=True)
    for name, cells in status.items():
        frameworks = list(dict.fromkeys(cell.cell.framework for cell in cells))
        for index, framework in enumerate(frameworks):
            own = [cell for cell in cells if cell.cell.framework == framework]
            table.add_row("" if index else name, framework_name(framework), *_counts(own))
        table.add_section()
    table.add_row("all", "", *_counts(distinct(status)), style="bold")
    console.print(table)
    for cell in distinct(status):
        if cell.state == "running":
            console.print(
                f"[cyan]running[/] {cell.path}: attempt {cell.attempts}, on {cell.host} "
                f"since {cell.since}",
                soft_wrap=True, highlight=False,
            )  # fmt: skip
    if outdated := sum(cell.reason == OUTDATED for cell in distinct(status)):
        console.print(
            f"{outdated} of the missing have a result that is {OUTDATED}",
            soft_wrap=True, highlight=False,
        )  # fmt: skip


def _counts(cells: Iterable[CellStatus]) -> list[str]:
    cells = list(cells)
    counts = Counter(cell.state for cell in cells)
    return [str(len(cells)), *(str(counts[state]) if counts[state] else "·" for state in STATES)]


def failures(cells: Iterable[CellStatus], results: Path, command: Sequence[str]) -> str:
    """Of each cell that failed or was interrupted: why, its log, and how to run it alone.

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
        # Snakemake sees no reason to make a file anew that is there, though it cannot be read.
        again = [*command, *(["--force"] if target.exists() else []), "--", str(target)]
        times = "" if cell.attempts < 2 else f" (attempt {cell.attempts})"
        lines = [
            f"{cell.path} {cell.state}{times}: {cell.reason or 'no reason is known'}",
            f"  log:   {cell.log or 'none'}",
            f"  again: {shlex.join(again)}",
        ]
        paragraphs.append("\n".join(lines))
    return "\n".join(paragraphs)
