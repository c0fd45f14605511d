"""How numbers and names are written for people. Machine-readable files carry full precision."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

from ptbench.backends import FRAMEWORKS

METRIC_NAMES = {
    "train_perplexity": "Training perplexity",
    "valid_perplexity": "Validation perplexity",
    "test_perplexity": "Test perplexity",
    "tokens_per_second": "Tokens per second",
    "seconds_per_epoch": "Seconds per epoch",
    "training_seconds": "Training time",
    "total_seconds": "Total time",
    "epochs": "Epochs",
    "parameters": "Parameters",
    "peak_device_memory_bytes": "Peak memory on the GPUs",
}
MINUS = "\N{MINUS SIGN}"
FIGURE_SPACE = "\N{FIGURE SPACE}"  # as wide as a digit
NOTHING = "\N{EN DASH}"


def framework_name(framework: str) -> str:
    """Return the framework's name as its authors write it."""
    row = FRAMEWORKS.get(framework)
    return row.title if row else framework


class Group(Protocol):
    """What rows that differ by framework alone have in common."""

    @property
    def variant(self) -> str: ...
    @property
    def devices(self) -> int: ...
    @property
    def implementation(self) -> str: ...


def group_title(group: Group) -> str:
    """Heading of the rows that differ by framework alone."""
    return f"{group.variant}, {format_devices(group.devices)}, {group.implementation}"


def format_devices(devices: int) -> str:
    """`1 device`, `2 devices`."""
    return f"{devices} device" + ("" if devices == 1 else "s")


def group_key(group: Group) -> tuple[str, int]:
    """What tells groups apart; the variant decides the implementation."""
    return group.variant, group.devices


def format_perplexity(value: float | None) -> str:
    """Two decimals below 10,000, none above."""
    if value is None:
        return NOTHING
    if math.isinf(value):
        return "∞"
    return f"{value:,.2f}" if value < 10_000 else f"{value:,.0f}"


def format_count(value: float | None) -> str:
    """Whole, with thousands separated."""
    return NOTHING if value is None else f"{value:,.0f}"


def format_parameters(value: int | None) -> str:
    """In millions to three decimals from a million, as the literature prints it; else whole."""
    if value is None:
        return NOTHING
    return f"{value / 1e6:.3f} M" if value >= 1_000_000 else f"{value:,}"


def format_epoch(value: float | None) -> str:
    """A median epoch, which may end in a half."""
    return NOTHING if value is None else f"{value:g}"


def format_bytes(value: float | None) -> str:
    """In MB or GB (powers of ten)."""
    if value is None:
        return NOTHING
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.0f} MB"


def format_seconds(value: float | None) -> str:
    """In the unit a person would choose."""
    if value is None:
        return NOTHING
    if value < 120:
        return f"{value:.1f} s"
    minutes = round(value / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def format_percent(fraction: float | None) -> str:
    """A signed percentage with a true minus sign."""
    if fraction is None or math.isnan(fraction):
        return NOTHING
    text = f"{abs(fraction) * 100:,.1f}" if abs(fraction) < 10 else f"{abs(fraction) * 100:,.0f}"
    sign = "" if not float(text.replace(",", "")) else MINUS if fraction < 0 else "+"
    return f"{sign}{text} %"


def format_p(p: float | None) -> str:
    """Three decimals, or `< 0.001`."""
    if p is None:
        return NOTHING
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def format_signed(value: float | None, decimals: int = 4) -> str:
    """A signed number with a true minus sign."""
    if value is None:
        return NOTHING
    return (MINUS if value < 0 else "+") + f"{abs(value):.{decimals}f}"


def align_plus_minus(
    values: Sequence[tuple[float | None, float | None]], padding: str = " "
) -> list[str]:
    """`mean ± std` of each row, padded so that the ± stand below one another.

    A mean without a std is padded as if it had one, so that the means align too.

    Args:
        values: mean and standard deviation of each row; None where there is none.
        padding: as wide as a digit: a space in fixed-width text, FIGURE_SPACE in proportional.
    """
    means = [format_perplexity(mean) for mean, _ in values]
    stds = ["" if std is None else f" ± {format_perplexity(std)}" for _, std in values]
    left = max(map(len, means), default=0)
    right = max(map(len, stds), default=0)
    return [
        padding * (left - len(mean)) + mean + (std or padding * right).ljust(right, padding)
        if mean != NOTHING
        else NOTHING
        for mean, std in zip(means, stds, strict=True)
    ]
