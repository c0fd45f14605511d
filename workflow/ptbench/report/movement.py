"""What `ptbench compare` prints of two results folders."""

from __future__ import annotations

import math
from collections import Counter

from rich import box
from rich.console import Console
from rich.table import Table

from ptbench.analysis.metrics import METRICS, NOTHING
from ptbench.analysis.movement import Change, Comparison
from ptbench.report.formatting import format_devices, format_percent, framework_name
from ptbench.report.words import count, factor

SHOWN = 4  # names of rows that one folder has alone


def show(found: Comparison, every: bool, console: Console) -> None:
    """Print how many rows moved, and which.

    Args:
        found: the comparison.
        every: whether to list rows that did not move too.
        console: where to.
    """
    verdicts = Counter(change.verdict for change in found.changes)
    margin = format_percent(math.expm1(found.equivalence_margin))[1:]
    console.print(
        f"{count(len(found.changes), 'row')} in both. Test perplexity: {verdicts['same']} the "
        f"same, {verdicts['equivalent']} equivalent within {margin}, {verdicts['different']} "
        f"different, {verdicts['inconclusive']} inconclusive. Speed: "
        f"{sum(change.slower_or_faster for change in found.changes)} moved by more than chance.",
        highlight=False,
    )
    shown = [change for change in found.changes if every or change.moved]
    if shown:
        console.print(_table(shown))
    if any(not change.alone and change.slower_or_faster for change in shown):
        console.print("* of runs that shared their machine: no fair comparison of speed")
    for which, rows in (("first", found.only_first), ("second", found.only_second)):
        if rows:
            more = f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
            console.print(f"Only in the {which}: {', '.join(rows[:SHOWN])}{more}.", highlight=False)


def _table(changes: list[Change]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("row", overflow="fold")
    for title in ("versions", "perplexity", "change"):
        table.add_column(title, justify="right")
    table.add_column("verdict")
    table.add_column("speed, times the first", justify="right")
    write = METRICS["test_perplexity"].text
    for change in changes:
        name = f"{change.variant}, {framework_name(change.framework)}"
        recipe = "" if change.same_recipe else " (other recipe)"
        versions = dict.fromkeys(version or "?" for version in change.versions)
        table.add_row(
            f"{name}, {format_devices(change.devices)}{recipe}",
            " → ".join(versions),
            " → ".join(write(value) for value in change.perplexity),
            format_percent(change.change),
            change.verdict,
            _speed(change),
            style="bold" if change.moved else None,
        )
    return table


def _speed(change: Change) -> str:
    if change.speed is None:
        return NOTHING
    text = factor(change.speed)
    if change.speed_low is not None and change.speed_high is not None:
        text += f" ({factor(change.speed_low)} to {factor(change.speed_high)})"
    return text + ("" if change.alone else " *")
