"""How names, differences and p values are written for people.

`analysis/metrics.py` says how each metric is written. CSV files carry full precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Protocol, TypeVar

from ptbench.analysis.metrics import METRICS, NOTHING, PERPLEXITY, Metric, Summary, write_perplexity
from ptbench.analysis.published import PublishedValue
from ptbench.backends import FRAMEWORKS

MINUS = "\N{MINUS SIGN}"
FIGURE_SPACE = "\N{FIGURE SPACE}"  # as wide as a digit


class Group(Protocol):
    """What rows that differ by framework alone have in common."""

    @property
    def variant(self) -> str: ...
    @property
    def devices(self) -> int: ...
    @property
    def implementation(self) -> str: ...


class Seeds(Protocol):
    """How the seeds of a row ended."""

    @property
    def n_ok(self) -> int: ...
    @property
    def n_diverged(self) -> int: ...
    @property
    def n_planned(self) -> int: ...
    @property
    def usable(self) -> bool: ...


G = TypeVar("G", bound=Group)


def framework_name(framework: str) -> str:
    """Return the framework's name as its authors write it."""
    row = FRAMEWORKS.get(framework)
    return row.title if row else framework


def kind_of_device(accelerator: str | None) -> str:
    """Write `on CPUs` or `on GPUs`."""
    return {"cpu": "on CPUs", "cuda": "on GPUs"}.get(accelerator or "", "")


def group_title(group: Group) -> str:
    """Return the heading of rows that differ by framework alone."""
    return f"{group.variant}, {format_devices(group.devices)}, {group.implementation}"


def group_key(group: Group) -> tuple[str, int]:
    """Return what tells groups apart; the variant decides the implementation."""
    return group.variant, group.devices


def grouped(rows: Sequence[G]) -> list[list[G]]:
    """Return the rows in groups that differ by framework alone."""
    return [list(group) for _, group in groupby(rows, key=group_key)]


def format_devices(devices: int) -> str:
    """Write `1 device` or `2 devices`."""
    return f"{devices} device" + ("" if devices == 1 else "s")


def format_seeds(row: Seeds) -> str:
    """Write `3/3`, `2/3, 1 diverged`, `1/3, 2 diverged, invalid` or `1/3, incomplete`."""
    parts = [f"{row.n_ok}/{row.n_planned}"]
    if row.n_diverged:
        parts.append(f"{row.n_diverged} diverged")
    if row.n_ok and not row.usable:
        parts.append("invalid" if row.n_diverged else "incomplete")
    return ", ".join(parts)


def format_std(summary: Summary | None) -> str:
    """Write ± and the standard deviation of a perplexity over seeds, with as many decimals."""
    if summary is None or summary.std is None:
        return ""
    return f"± {write_perplexity(summary.std, summary.value)}"


def format_header(metric: Metric, currency: str) -> str:
    """Return the heading of a metric's column; money has its unit."""
    header = metric.header or metric.title
    return f"{header} [{currency}]" if metric.unit == "money" else header


def format_percent(fraction: float | None) -> str:
    """Write a signed percentage with a true minus sign."""
    if fraction is None or math.isnan(fraction):
        return NOTHING
    text = f"{abs(fraction) * 100:,.1f}" if abs(fraction) < 10 else f"{abs(fraction) * 100:,.0f}"
    sign = "" if not float(text.replace(",", "")) else MINUS if fraction < 0 else "+"
    return f"{sign}{text} %"


def format_p(p: float | None) -> str:
    """Write three decimals, or `< 0.001`."""
    if p is None:
        return NOTHING
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def format_signed(value: float | None, decimals: int = 4) -> str:
    """Write a signed number with a true minus sign."""
    if value is None:
        return NOTHING
    return (MINUS if value < 0 else "+") + f"{abs(value):.{decimals}f}"


def format_ratio(value: float) -> str:
    """Write a ratio of two numbers with three digits."""
    return f"× {value:.3g}"


def format_published(value: PublishedValue, write: Callable[[float], str] | None = None) -> str:
    """Write a published number: a bound with its sign, ± its standard deviation if printed.

    Args:
        value: the number.
        write: writes it; None: as its metric is written, or as a ratio if it is one.
    """
    if value.kind == "diverges":
        return "diverges"
    write = write or (format_ratio if value.over else _as_printed(value))
    text = {"above": "> ", "below": "< "}.get(value.kind, "") + write(value.value)
    return text if value.std is None or value.over else f"{text} ± {write(value.std)}"


def _as_printed(value: PublishedValue) -> Callable[[float], str]:
    """Return what writes a published number's metric with as many digits as were printed."""
    if METRICS[value.metric].kind is PERPLEXITY and value.rounding:
        digits = max(0, -round(math.log10(2 * value.rounding)))
        return lambda number: f"{number:,.{digits}f}"
    if value.metric == "parameters" and value.value >= 1e6:
        return lambda number: f"{number / 1e6:g} M"
    return METRICS[value.metric].write
