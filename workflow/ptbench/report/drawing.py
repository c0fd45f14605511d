"""How figures look and are written: style, panels, marks and files. What they show: `figures.py`.

Drawn without pyplot's global state, with matplotlib's own defaults and the font that it brings, so
that the same numbers give the same bytes whatever the user's own settings. In the SVG, text stays
text. Sizes are in inches and panels are placed by hand: a layout engine would draw every figure
twice more.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from ptbench.files import replacing
from ptbench.report.palette import GRID, INK, LIGHT_BACKGROUND, MUTED

WIDTH = 5.2  # inches: a column of a paper; still legible on a phone
LEFT = 0.8  # room for an axis' numbers and label
RIGHT = 0.12
TITLE = 0.3  # room above a panel
LABELS = 0.5  # room below a panel, for its axis' numbers and label
LEGEND_LINE = 0.2
DASHES: tuple[Any, ...] = ("solid", (0, (5, 1.6)), (0, (1.2, 1.4)), (0, (6, 1.5, 1.2, 1.5)))
MARKERS = "osD^vh"  # not the cross of diverged runs
STYLE: Any = {  # matplotlib types its keys as literals
    "svg.fonttype": "none",
    "svg.hashsalt": "ptbench",
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titley": 1.0,
    "axes.titlelocation": "left",
    "axes.titlepad": 6,
    "axes.labelsize": 9.5,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.facecolor": LIGHT_BACKGROUND,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "figure.facecolor": LIGHT_BACKGROUND,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.handlelength": 2.4,
    "legend.columnspacing": 1.2,
    "legend.borderaxespad": 0,
    "legend.borderpad": 0,
    "lines.linewidth": 1.5,
    "lines.markersize": 5,
    "lines.markeredgewidth": 1.0,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
}


@contextmanager
def style() -> Iterator[None]:
    """Set the one look of all figures; the user's matplotlibrc has no say."""
    with matplotlib.style.context(["default", STYLE]):
        yield


def save(figure: Figure, stem: Path) -> None:
    """Write `{stem}.svg`, the same bytes for the same drawing."""
    FigureCanvasSVG(figure)
    with replacing(stem.with_suffix(".svg")) as path:
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
        text = _shortened(path.read_text(encoding="utf-8"))
        # A reader without matplotlib's font gets the nearest in width.
        text = text.replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, sans-serif")
        path.write_text(text, encoding="utf-8")


def _shortened(svg: str) -> str:
    """Return the drawing with coordinates of two decimals, which are 0.01 points."""

    def path(match: re.Match[str]) -> str:
        data = re.sub(r"(\.\d\d)\d+", r"\1", match[2]).replace(" \n", "\n").strip()
        return f'{match[1]}="{data}"'

    svg = re.sub(r'\b(d|x|y|transform)="([^"]*)"', path, svg)
    return re.sub(r"\n +", "\n", svg)


def panels(
    rows: int,
    columns: int = 1,
    *,
    height: float,
    width: float = WIDTH,
    left: float = LEFT,
    right: float = RIGHT,
    above: float = TITLE,
    between: float = LABELS + TITLE,
    below: float = LABELS,
    aside: float = 0.65,
    legend: int = 0,
) -> tuple[Figure, list[list[Axes]]]:
    """Return a figure and its panels, row by row.

    Args:
        height: of each panel.
        left, right, above, below: margins of the whole.
        between: from one panel down to the next.
        aside: from one panel to the one beside it.
        legend: lines of text for which there is to be room below the panels.
    """
    total = above + rows * height + (rows - 1) * between + below + legend * LEGEND_LINE
    each = (width - left - right - (columns - 1) * aside) / columns
    figure = Figure(figsize=(width, total))
    axes = [
        [
            figure.add_axes(
                (
                    (left + column * (each + aside)) / width,
                    1 - (above + row * (height + between) + height) / total,
                    each / width,
                    height / total,
                )
            )
            for column in range(columns)
        ]
        for row in range(rows)
    ]
    return figure, axes


def add_legend(figure: Figure, handles: Sequence[Any], columns: int) -> None:
    """Set a legend into the room that `panels` left below."""
    if handles:
        width, height = figure.get_size_inches()
        figure.legend(
            handles=handles,
            loc="lower left",
            bbox_to_anchor=(0.1 / width, 0.06 / height),
            ncols=columns,
        )


def legend_lines(handles: Sequence[object], columns: int) -> int:
    """Return how many lines a legend takes."""
    return math.ceil(len(handles) / columns)


def columns_for(labels: Sequence[str], most: int = 5) -> int:
    """Return how many columns a legend of these labels has in the width of a figure."""
    widest = 0.45 + 0.077 * max(map(len, labels), default=1)
    return max(1, min(most, int((WIDTH - 0.2) / widest)))


def key(label: str, **properties: Any) -> Line2D:
    """Return an entry of a legend."""
    return Line2D([], [], label=label, **properties)


def number_ticks(
    axis: Axis, values: Sequence[float], logarithmic: bool = False, whole: bool = False
) -> None:
    """Number an axis as people do: plain numbers, round ones on a logarithmic axis too.

    Args:
        values: that are numbered if there is room for all of them.
        whole: whether there is nothing between whole numbers.
    """
    low, high = axis.get_view_interval()
    if values and len(told_apart(values, low, high, logarithmic)) == len(values):
        axis.set_major_locator(FixedLocator(list(values)))
    elif not logarithmic or high / low < 10:
        axis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10], integer=whole))
    else:
        few = high / low > 1e3
        axis.set_major_locator(LogLocator(subs=(1,) if few else (1, 2, 5), numticks=8))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: plain_number(value)))


def told_apart(
    values: Sequence[float], low: float, high: float, logarithmic: bool
) -> Sequence[float]:
    """Return the ascending values whose numbers do not run into one another on an axis."""
    scale = math.log if logarithmic else float
    kept: list[float] = []
    for value in values:
        far = kept and scale(value) - scale(kept[-1]) >= 0.07 * (scale(high) - scale(low))
        if not kept or far:
            kept.append(value)
    return kept


def plain_number(value: float) -> str:
    """Write a number of an axis in full, or as a power of ten where that is long."""
    if value and not 1e-4 <= abs(value) < 1e7:
        return f"{value:.0e}".replace("e+0", "e").replace("e+", "e").replace("e-0", "e-")
    return f"{value:,.10g}"


def time_unit(seconds: float) -> tuple[str, float]:
    """Return the unit in which an axis of times reaches so far, and its seconds."""
    if seconds > 2 * 3600:
        return "hours", 3600.0
    return ("minutes", 60.0) if seconds > 600 else ("seconds", 1.0)


def set_limits(axes: Axes, values: Sequence[float], logarithmic: bool) -> None:
    """Show all values on the vertical axis with some room around them."""
    found = [value for value in values if math.isfinite(value) and (value > 0 or not logarithmic)]
    if not found:
        axes.set_yticks([])
        return
    low, high = min(found), max(found)
    if logarithmic:
        axes.set_yscale("log")
        ratio = max((high / low) ** 0.07, 1.005)
        axes.set_ylim(low / ratio, high * ratio)
    else:
        room = 0.07 * (high - low) or 0.02 * abs(high) or 1.0
        axes.set_ylim(low - room, high + room)
    number_ticks(axes.yaxis, (), logarithmic)


def spans(values: Sequence[float], ratio: float = 3.0) -> bool:
    """Return whether positive values span more than a ratio, so that an axis is logarithmic."""
    found = [value for value in values if value > 0 and math.isfinite(value)]
    return bool(found) and max(found) > ratio * min(found)


def cross(axes: Axes, x: float, y: float | None, colour: str, label: str = "") -> None:
    """Mark a run that diverged: at its last finite value, or at the upper edge of the panel."""
    inside = y is not None and y < axes.get_ylim()[1]
    axes.plot(
        x,
        1.0 if y is None or not inside else y,
        "X",
        label=label,
        color=colour,
        markersize=8,
        markeredgecolor=LIGHT_BACKGROUND,
        clip_on=False,
        zorder=5,
        transform=axes.transData if inside else axes.get_xaxis_transform(),
    )


def ramp(count: int) -> list[str]:
    """Return colours from blue over grey to orange, for values in order.

    They tell low from high for colour-blind readers, on light and on dark. Dashes and markers tell
    neighbours apart.
    """
    stops = np.array([[47, 103, 214], [132, 126, 150], [205, 98, 22]], np.float64)
    places = np.linspace(0, 2, max(count, 2))
    mixed = np.stack([np.interp(places, [0, 1, 2], stops[:, c]) for c in range(3)], axis=1)
    return [f"#{round(r):02x}{round(g):02x}{round(b):02x}" for r, g, b in mixed[:count]]
