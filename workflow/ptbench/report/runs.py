"""Every planned run with its state, and for one without a result why, and how to run it again."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from ptbench.analysis.collect import CANNOT_RUN
from ptbench.analysis.experiment import CellLine, RowResult
from ptbench.backends import FRAMEWORKS
from ptbench.report.commands import renewing_command, run_again
from ptbench.report.status import State, attempt_state
from ptbench.training.attempts import look


class Run(NamedTuple):
    """One planned run."""

    row: RowResult
    line: CellLine
    state: State
    reason: str | None  # why it is in this state
    log: Path | None  # of its newest attempt, if it has no result
    again: str | None  # command that runs it alone, if it has no result and there is one


def runs_of(rows: Iterable[RowResult], results: Path) -> dict[str, Run]:
    """Return every run of some rows once, by path.

    Args:
        rows: of any experiments, which may share runs.
        results: the results folder; the attempts in it say why a run has no result.
    """
    command = renewing_command(results)
    return {line.path: _run(row, line, results, command) for row in rows for line in row.cells}


def _run(row: RowResult, line: CellLine, results: Path, command: Sequence[str] | None) -> Run:
    if line.state != "missing":
        return Run(row, line, "done" if line.state == "ok" else "diverged", line.reason, None, None)
    folder = results / "attempts" / line.path
    # What cannot run here may have failed before that was known; the reason is the same.
    seen = None if (line.reason or "").startswith(CANNOT_RUN) else look(folder)
    state, reason = attempt_state(seen)
    log = folder / f"attempt-{seen.record.attempt}.log" if seen else None
    return Run(
        row,
        line,
        state,
        line.reason or reason,
        log if log and log.exists() else None,
        run_again(command, results / "cells" / line.path / "metrics.json") if command else None,
    )


class Batch(NamedTuple):
    """Runs without a result that differ by seed alone and are missing for the same reason."""

    row: RowResult
    seeds: list[int]
    reason: str | None
    targets: str  # what makes all of them, as a shell expands it


def missing(runs: Iterable[Run], results: Path) -> list[Batch]:
    """Return the missing runs, those of several seeds together, so that thousands fit on a page."""
    own = (run for run in runs if run.state == "missing")
    batches = []
    for _, group in groupby(own, key=lambda run: (run.line.path.rpartition("/")[0], run.reason)):
        first, *others = group
        seeds = [run.line.cell.seed for run in (first, *others)]
        text = f"{{{','.join(map(str, seeds))}}}" if others else str(seeds[0])
        folder = results / "cells" / first.line.path.rpartition("/")[0]
        targets = f"{shlex.quote(str(folder))}/seed-{text}/metrics.json"
        batches.append(Batch(first.row, seeds, first.reason, targets))
    return batches


class Asked(NamedTuple):
    """How many times as much as they used the jobs of some runs asked for."""

    runs: int
    median: float
    low: float
    high: float


def asked_over_used(runs: Iterable[Run]) -> dict[str, Asked]:
    """Return this for memory and time, of the runs of which it is known."""
    lines = [run.line for run in runs]
    found = {
        "memory": [line.asked_memory for line in lines if line.asked_memory],
        "time": [line.asked_time for line in lines if line.asked_time],
    }
    return {
        name: Asked(len(own), statistics.median(own), min(own), max(own))
        for name, own in found.items()
        if own
    }


def versions_of(rows: Iterable[RowResult]) -> dict[str, list[str]]:
    """Return the versions of each framework that the rows have."""
    found: dict[str, set[str]] = {}
    for row in rows:
        found.setdefault(row.framework, set()).update(row.framework_versions)
    return {name: sorted(found[name]) for name in FRAMEWORKS if name in found}
