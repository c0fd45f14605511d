"""Show what a study takes, `ptbench plan`, and what is left of it, `ptbench status`."""

from __future__ import annotations

import json
import os
import statistics
from collections import defaultdict
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from rich import box
from rich.console import Console
from rich.table import Table

from ptbench.analysis.costs import SOURCES, Costs, Estimator, RunCost
from ptbench.analysis.metrics import write_bytes, write_count, write_money, write_seconds
from ptbench.configuration.experiments import load_library
from ptbench.configuration.specification import Cell
from ptbench.configuration.study import Study
from ptbench.report.live import FEW, first_share, share_done
from ptbench.report.status import CellStatus

DEAREST = 10  # rows that are listed


def costs_of(cells: Iterable[Cell], estimator: Estimator) -> Costs:
    """Return what runs take, each counted once."""
    study = estimator.study
    runs = [estimator.run(cell) for cell in study.runnable(dict.fromkeys(cells))]
    return Costs(runs, study.config.prices, estimator.accelerator)


def groups(study: Study) -> dict[str, list[str]]:
    """Return the study's experiments by document; those of no document are ours."""
    papers = load_library().papers
    found = {
        paper: [name for name in names if name in study.experiments]
        for paper, names in papers.items()
    }
    named = {name for names in found.values() for name in names}
    found["our own"] = [name for name in study.experiments if name not in named]
    return {group: names for group, names in found.items() if names}


def show(study: Study, estimator: Estimator, at_once: int, console: Console) -> None:
    """Print what the study takes, by document and experiment, and its ten dearest runs."""
    prices, kind = study.config.prices, estimator.accelerator
    unit, other = ("GPU", "core") if kind == "cuda" else ("core", "GPU")
    total = costs_of(study.cells, estimator)
    mixed = total.other_hours > 0
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("experiment", overflow="fold")
    hours = [f"{unit}-hours", *([f"{other}-hours"] if mixed else [])]
    for column in ("runs", *hours, "disk", "kWh", prices.currency):
        table.add_column(column, justify="right")

    def add(name: str, costs: Costs, style: str | None = None) -> None:
        hours = [costs.unit_hours, *([costs.other_hours] if mixed else [])]
        table.add_row(
            name, write_count(len(costs.runs)), *map(write_hours, hours),
            write_bytes(costs.disk_bytes), write_money(costs.kilowatt_hours),
            write_money(costs.money), style=style,
        )  # fmt: skip

    for group, names in groups(study).items():
        cells = [cell for name in names for cell in study.experiments[name].cells]
        add(group, costs_of(cells, estimator), "bold")
        for name in names:
            add(f"  {name}", costs_of(study.experiments[name].cells, estimator))
    add("all, each run once", total, "bold")
    console.print(table)
    said = [*study.obstacles, *too_large(total, study.config.max_memory)]
    for sentence in [*said, *sentences(total, estimator, at_once)]:
        console.print(sentence, soft_wrap=True)
    if total.left.runs and total.unit_hours + total.other_hours >= 1:
        console.print(dearest_rows(total))


def write_hours(hours: float) -> str:
    """Write hours, and minutes below one."""
    if 0 < hours < 1 / 60:
        return "< 1 min"
    return f"{hours:,.1f}" if hours >= 1 else f"{60 * hours:.0f} min"


def left_sentence(left: Costs, at_once: int) -> str:
    """Say how long what is left takes."""
    if not left.runs:
        return "Nothing is left to run."
    unit, other = ("GPU", "core") if left.accelerator == "cuda" else ("core", "GPU")
    beside = f", and {left.other_hours:,.1f} {other}-hours beside them" if left.other_hours else ""
    about = "at most about" if "bound" in left.by_source else "about"
    return (
        f"What is left takes {about} {write_seconds(3600 * left.hours(at_once))} on "
        f"{at_once} {unit}{'' if at_once == 1 else 's'}{beside}."
    )


class Left(NamedTuple):
    """What is still to be run of a study that is under way."""

    costs: Costs
    at_once: int  # GPUs or cores

    @property
    def hours(self) -> float:
        """Return the shortest wall-clock time [h]."""
        return self.costs.hours(self.at_once)

    @property
    def sentence(self) -> str:
        """Say how long it takes, and how that is known."""
        if not self.costs.runs:
            return ""
        sources = self.costs.by_source.items()
        ways = "; ".join(f"{count:,} {SOURCES[source]}" for source, count in sources)
        return f"{left_sentence(self.costs, self.at_once)} Runs left: {ways}."


def time_left(
    cells: Iterable[CellStatus], estimator: Estimator, at_once: int | None = None
) -> Left:
    """Return what a study still takes. Of a run that was begun, its share done is taken off.

    A row of which nothing has finished is timed by the pace of its running runs.

    Args:
        cells: all of the study, each once.
        estimator: knows the finished runs.
        at_once: GPUs or cores; None: as many as the runs under way have, or else this machine's
            cores, or one GPU.

    Raises:
        CorpusError: if the size of a corpus is not known yet.
    """
    kind = estimator.accelerator
    rows: dict[tuple[str, str, int], RunCost] = {}  # seeds of a row are estimated alike
    runs, busy = [], 0
    cells = list(cells)
    paces: dict[tuple[str, str, int], list[float]] = defaultdict(list)
    for status in cells:
        if seconds := seconds_at_its_pace(status):
            paces[status.cell.variant, status.cell.framework, status.cell.devices].append(seconds)
    for status in cells:
        never = status.state == "missing" and estimator.study.obstacle(status.cell)
        if status.state in ("done", "diverged") or never:
            continue
        cell = status.cell
        key = cell.variant, cell.framework, cell.devices
        if key not in rows:
            rows[key] = estimator.run(cell)
            if key in paces and rows[key].source != "other seeds":
                rows[key] = rows[key]._replace(seconds=statistics.median(paces[key]), source="pace")
        run = rows[key]._replace(cell=cell)
        if status.state == "running" and run.accelerator == kind:
            busy += run.units
        if status.log and status.state != "missing":  # it is under way, or goes on from there
            run = run._replace(seconds=run.seconds * (1 - share_done(Path(status.log))))
        runs.append(run)
    cores = os.cpu_count() or 1
    at_once = at_once or busy or (1 if kind == "cuda" else cores)
    return Left(Costs(runs, estimator.study.config.prices, kind), at_once)


def seconds_at_its_pace(status: CellStatus) -> float | None:
    """Return what the whole of a running run takes at the pace of its newest attempt [s].

    None: it does not run, or has not come far enough to tell.
    """
    if status.state != "running" or not (status.log and status.since):
        return None
    log = Path(status.log)
    gone = (datetime.now(UTC) - datetime.fromisoformat(status.since)).total_seconds()
    begun_at = first_share(log) if status.attempts > 1 else 0.0
    share = share_done(log) - begun_at
    return gone / share if share >= FEW else None


def dearest_rows(total: Costs) -> Table:
    """Return the rows whose runs take most GPU-hours or core-hours."""
    rows: dict[str, list[RunCost]] = defaultdict(list)
    for run in total.runs:
        rows[run.cell.path.rpartition("/")[0]].append(run)
    table = Table(title="The dearest rows", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("row", overflow="fold")
    for column in ("runs", "each on", "hours each", "GPU- or core-hours"):
        table.add_column(column, justify="right")
    hours = {path: sum(run.unit_hours for run in runs) for path, runs in rows.items()}
    for path in sorted(hours, key=lambda path: -hours[path])[:DEAREST]:
        runs = rows[path]
        each = statistics.median(run.seconds / 3600 for run in runs)
        kind = "GPU" if runs[0].accelerator == "cuda" else "core"
        on = f"{runs[0].units} {kind}{'' if runs[0].units == 1 else 's'}"
        table.add_row(path, str(len(runs)), on, write_hours(each), write_hours(hours[path]))
    return table


def too_large(total: Costs, max_memory: int | None) -> list[str]:
    """Say which runs may need more main memory than there is.

    Args:
        total: the study.
        max_memory: of a node [MB]; None: this machine's own.
    """
    most = 10**6 * max_memory if max_memory else psutil.virtual_memory().total
    large = [run for run in total.left.runs if run.memory_bytes > most]
    if not large:
        return []
    largest = max(large, key=lambda run: run.memory_bytes)
    where = "a node has (max_memory)" if max_memory else "this machine has"
    return [
        f"{len(large):,} run{'' if len(large) == 1 else 's'} may need up to "
        f"{write_bytes(largest.memory_bytes)} of main memory, and {where} "
        f"{write_bytes(most)}; the largest is {largest.cell.path}."
    ]


def sentences(total: Costs, estimator: Estimator, at_once: int) -> list[str]:
    """Return how long it takes, how that is known, and how far such estimates were off."""
    prices = total.prices
    kinds = dict.fromkeys([total.accelerator, *(run.accelerator for run in total.runs)])
    energy = total.kilowatt_hours * prices.kilowatt_hour
    found = [
        left_sentence(total.left, at_once),
        *(f"Runs timed {SOURCES[source]}: {count:,}." for source, count in total.by_source.items()),
        *(
            f"A {'GPU' if kind == 'cuda' else 'core'} is taken to cost {prices.of(kind)[0]:g} "
            f"{prices.currency} an hour and to use {prices.of(kind)[1]:g} W (key `prices`)."
            for kind in kinds
        ),
        "Disk is for the parameters that are kept (key `keep_checkpoints`), without environments.",
        f"At {prices.kilowatt_hour:g} {prices.currency} a kWh the energy "
        f"alone costs {energy:,.2f} {prices.currency}.",
    ]
    if ratios := estimator.error():
        found.append(
            f"What has finished took {statistics.median(ratios):.2f} times what the speeds of "
            f"other models say (from {min(ratios):.2f} to {max(ratios):.2f}, runs: {len(ratios)})."
        )
    return found


def as_json(study: Study, estimator: Estimator, at_once: int) -> str:
    """Return the same for machines."""
    total = costs_of(study.cells, estimator)

    def facts(costs: Costs) -> dict[str, Any]:
        return {
            "runs": len(costs.runs),
            "unit_hours": costs.unit_hours,
            "other_hours": costs.other_hours,
            "disk_bytes": costs.disk_bytes,
            "kilowatt_hours": costs.kilowatt_hours,
            "money": costs.money,
        }

    ratios = estimator.error()
    content = facts(total) | {
        "unit": "GPU" if estimator.accelerator == "cuda" else "core",
        "currency": study.config.prices.currency,
        "left_hours": total.left.hours(at_once),
        "at_once": at_once,
        "sources": total.by_source,
        "error": statistics.median(ratios) if ratios else None,
        "experiments": {
            name: facts(costs_of(planned.cells, estimator))
            for name, planned in study.experiments.items()
        },
    }
    return json.dumps(content, indent=1)
