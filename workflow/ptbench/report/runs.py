"""Every planned run with its state, and for one without a result why, and how to run it again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from ptbench.analysis.experiment import CellLine, RowResult
from ptbench.report.commands import run_again, study_command
from ptbench.report.status import State, attempt_state
from ptbench.training.attempts import look


class Run(NamedTuple):
    """One planned run."""

    row: RowResult
    line: CellLine
    state: State
    reason: str | None  # why it is in this state
    log: Path | None  # of its newest attempt, if it has no result
    again: str | None  # command that runs it alone, if it has no result


def runs_of(rows: Iterable[RowResult], results: Path) -> dict[str, Run]:
    """Return every run of some rows once, by path.

    Args:
        rows: of any experiments, which may share runs.
        results: the results folder; the attempts in it say why a run has no result.
    """
    command = study_command(results)
    return {line.path: _run(row, line, results, command) for row in rows for line in row.cells}


def _run(row: RowResult, line: CellLine, results: Path, command: Sequence[str]) -> Run:
    if line.state != "missing":
        return Run(row, line, "done" if line.state == "ok" else "diverged", line.reason, None, None)
    folder = results / "attempts" / line.path
    seen = look(folder)
    state, reason = attempt_state(seen)
    log = folder / f"attempt-{seen.record.attempt}.log" if seen else None
    return Run(
        row,
        line,
        state,
        line.reason or reason,
        log if log and log.exists() else None,
        run_again(command, results / "cells" / line.path / "metrics.json"),
    )
