"""What the frameworks take to the same perplexity: epochs, time and rent.

The perplexity is on the validation split, and is the highest of the lowest ones of the group's
runs, so that each of them has reached it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

from pydantic import Field

from ptbench.analysis.collect import Row
from ptbench.analysis.metrics import Result, Summary, summarise_median
from ptbench.backends import Framework
from ptbench.model.recipe import Model


class Reached(Model):
    """What the seeds of one row took to the perplexity."""

    framework: Framework = Field(description="Framework.")
    epochs: Summary = Field(description="Whole epochs until then.")
    seconds: Summary = Field(description="Training and validation until then [s].")
    rent: Summary | None = Field(description="Of the same time; null: not known.")


class Reaching(Model):
    """Rows that differ by framework alone, at a perplexity that all of them reached."""

    variant: str = Field(description="Name of the variant.")
    devices: int = Field(description="Data-parallel replicas.")
    perplexity: float = Field(description="Of the validation split.")
    rows: tuple[Reached, ...] = Field(description="By framework, as in the results table.")


def compare_reaching(rows: Sequence[Row]) -> tuple[Reaching, ...]:
    """Return what it took to a common perplexity, of each group with several frameworks.

    Args:
        rows: as `collect_rows` returns them; those with too many failed seeds are left out.
    """
    groups: dict[tuple[str, int], list[Row]] = defaultdict(list)
    for row in rows:
        if row.usable:
            groups[row.variant, row.devices].append(row)
    return tuple(
        _reaching(variant, devices, own)
        for (variant, devices), own in groups.items()
        if len(own) > 1
    )


def _reaching(variant: str, devices: int, rows: Sequence[Row]) -> Reaching:
    runs = [run for row in rows for run in row.results().values()]
    highest = max(min(e.valid_perplexity for e in run.history) for run in runs)
    target = math.ceil(100 * highest) / 100
    return Reaching(
        variant=variant,
        devices=devices,
        perplexity=target,
        rows=tuple(_reached(row, target) for row in rows),
    )


def _reached(row: Row, target: float) -> Reached:
    runs = row.results().values()
    taken = [_until(run, target) for run in runs]
    rents = [
        run.rent_per_second * seconds
        for run, (_, seconds) in zip(runs, taken, strict=True)
        if run.rent_per_second is not None
    ]
    return Reached(
        framework=row.framework,
        epochs=summarise_median([epochs for epochs, _ in taken]),
        seconds=summarise_median([seconds for _, seconds in taken]),
        rent=summarise_median(rents) if rents else None,
    )


def _until(run: Result, target: float) -> tuple[int, float]:
    """Return the epochs and seconds that a run took to a perplexity, which it has reached."""
    seconds = 0.0
    for epoch in run.history:
        seconds += epoch.training_seconds + epoch.validation_seconds
        if epoch.valid_perplexity <= target:
            return epoch.epoch, seconds
    raise ValueError(f"{run.metrics.cell.path} did not reach {target}")
