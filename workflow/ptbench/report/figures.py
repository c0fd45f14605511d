"""The figures of an experiment, as SVG and PNG.

Drawn without pyplot's global state, on the Agg back-end, with matplotlib's own defaults and the
font that it brings, so that the same numbers give the same bytes whatever the user's own settings.
In the SVG, text stays text.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")

import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from scipy.optimize import isotonic_regression

from ptbench.analysis.collect import CellResult, Row
from ptbench.analysis.experiment import Analysis, FigureFile, RowResult
from ptbench.analysis.metrics import METRICS, PERPLEXITY, write_seconds
from ptbench.report.formatting import (
    FIGURE_SPACE,
    format_devices,
    framework_name,
    group_key,
    group_title,
    grouped,
)
from ptbench.report.palette import (
    CLOCKS,
    FRAMEWORK_COLOURS,
    FRAMEWORK_MARKERS,
    GRID,
    INK,
    LIGHT_BACKGROUND,
    MUTED,
)
from ptbench.training.records import perplexity

WIDTH = 5.2  # inches: a column of a paper; still legible on a phone
ROW_HEIGHT = 0.3  # inches per framework in a list
PNG_RESOLUTION = 200  # dots per inch
COMMON_STYLE: Any = {  # matplotlib types its keys as literals
    "svg.fonttype": "none",
    "svg.hashsalt": "ptbench",
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
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


class Drawing(NamedTuple):
    """A figure and what is said about it."""

    file: FigureFile
    draw: Callable[[], Figure]


def write_figures(analysis: Analysis, rows: Sequence[Row], folder: Path) -> tuple[FigureFile, ...]:
    """Draw every figure that has something to show, as {folder}/{name}.svg and .png.

    Args:
        analysis: the numbers.
        rows: the same rows with their histories.
        folder: made if need be.
    """
    drawings = []
    if any(row.n_ok for row in analysis.rows):
        drawings += [
            _perplexity(analysis),
            _learning_curves(analysis, rows),
            _speed(analysis),
            _seconds(analysis),
        ]
    elif any(row.n_diverged for row in analysis.rows):
        drawings.append(_learning_curves(analysis, rows))
    for drawing in drawings:
        folder.mkdir(parents=True, exist_ok=True)
        with style():
            save(drawing.draw(), folder / drawing.file.name)
    return tuple(drawing.file for drawing in drawings)


@contextmanager
def style() -> Iterator[None]:
    """Set the one look of all figures; the user's matplotlibrc has no say."""
    with matplotlib.style.context(["default", COMMON_STYLE]):
        yield


def save(figure: Figure, stem: Path) -> None:
    """Write `{stem}.svg` and `{stem}.png`, each the same bytes for the same drawing."""
    FigureCanvasAgg(figure)
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    figure.set_layout_engine("none")  # both files show the layout that was just made
    # A reader without matplotlib's font gets the nearest in width.
    drawing = text.getvalue().replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, sans-serif")
    stem.with_suffix(".svg").write_text(drawing, encoding="utf-8")
    figure.savefig(stem.with_suffix(".png"), dpi=PNG_RESOLUTION, metadata={"Software": None})


def _separate(figure: Figure) -> None:
    """Leave room between one panel's axis and the next one's title."""
    engine = figure.get_layout_engine()
    assert isinstance(engine, ConstrainedLayoutEngine)
    engine.set(h_pad=0.07)


def _list_axes(
    analysis: Analysis, label: str, limits: Callable[[str], tuple[float, float] | None]
) -> tuple[Figure, list[tuple[Axes, list[RowResult]]]]:
    """Return one axes for each variant and number of devices, frameworks listed downwards.

    Args:
        analysis: the rows.
        label: of the lowest axis.
        limits: of a variant's axes, given its name.
    """
    groups = grouped(analysis.rows)
    heights = [len(rows) * ROW_HEIGHT for rows in groups]
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.7 * len(groups) + 0.55), layout="constrained")
    _separate(figure)
    grid = figure.add_gridspec(len(groups), 1, height_ratios=heights)
    drawn = []
    for index, rows in enumerate(groups):
        axes = figure.add_subplot(grid[index])
        axes.set_title(group_title(rows[0]))
        axes.set_yticks(range(len(rows)), [framework_name(row.framework) for row in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x")
        if found := limits(rows[0].variant):
            axes.set_xlim(*found)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        if index == len(groups) - 1:
            axes.set_xlabel(label)
        drawn.append((axes, rows))
    return figure, drawn


def _value_labels(axes: Axes, rows: Sequence[RowResult], texts: Sequence[str | None]) -> None:
    """Write the number of each row in the right margin, or why there is none."""
    width = max(len(text or "") for text in texts)
    for y, (row, text) in enumerate(zip(rows, texts, strict=True)):
        axes.annotate(
            _no_result(row) if text is None else text.rjust(width, FIGURE_SPACE),
            (1, y),
            xycoords=("axes fraction", "data"),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            color=INK if row.usable else MUTED,
            style="italic" if text is None else "normal",
            fontsize=9,
        )


def _no_result(row: RowResult) -> str:
    return "diverged" if row.n_diverged else "no result"


def _colour(row: RowResult) -> str:
    return FRAMEWORK_COLOURS[row.framework] if row.usable else MUTED


def _draw_row(axes: Axes, y: int, row: RowResult, metric: str) -> None:
    """Draw a row's value, its interval or quartiles, and a tick for each of its seeds.

    The marker is hollow and grey if too many of its seeds failed.
    """
    summary = row.metrics.get(metric)
    if summary is None:
        return
    colour = _colour(row)
    width = 2.0 if METRICS[metric].kind is PERPLEXITY else 5.0
    if summary.low is not None and summary.high is not None:
        ends = [summary.low, summary.high]
        axes.plot(ends, [y, y], color=colour, linewidth=width, alpha=2 / width, zorder=2)
    seeds = row.seeds(metric)
    axes.plot(seeds, [y + 0.24] * len(seeds), "|", color=colour, markersize=4.5, zorder=3)
    axes.plot(
        summary.value,
        y,
        FRAMEWORK_MARKERS[row.framework],
        markersize=6.5,
        markerfacecolor=colour if row.usable else LIGHT_BACKGROUND,
        markeredgecolor=LIGHT_BACKGROUND if row.usable else colour,
        zorder=4,
    )


def _values(analysis: Analysis, variant: str, metric: str) -> list[float]:
    """Return all numbers that a variant's rows show of a metric."""
    values: list[float] = []
    for row in analysis.rows:
        summary = row.metrics.get(metric)
        if row.variant == variant and summary:
            ends = (summary.low, summary.high)
            values += [*row.seeds(metric), *(end for end in ends if end is not None)]
    return [value for value in values if math.isfinite(value)]


def _texts(rows: Sequence[RowResult], metric: str) -> list[str | None]:
    texts = [METRICS[metric].text(row.value(metric)) for row in rows]
    return [t if metric in row.metrics else None for t, row in zip(texts, rows, strict=True)]


def _describe(analysis: Analysis, text: Callable[[RowResult], str | None]) -> str:
    """Return what the rows show, in words.

    Args:
        analysis: the rows.
        text: what a row shows; None if it has no result.
    """
    parts = [
        f"{group_title(rows[0])}: "
        + ", ".join(f"{framework_name(r.framework)} {text(r) or _no_result(r)}" for r in rows)
        for rows in grouped(analysis.rows)
    ]
    return "; ".join(parts) + "."


def _perplexity(analysis: Analysis) -> Drawing:
    """Return the figure of each row's mean with interval and seeds, floor and published values."""
    metric = METRICS[analysis.metric]
    floor = analysis.floor_perplexity
    published = _published_lines(analysis)

    def text(row: RowResult) -> str | None:
        summary = row.metrics.get(metric.name)
        if summary is None:
            return None
        spread = f" ({metric.spread_text(summary)})" if summary.low is not None else ""
        return metric.write(summary.value) + spread

    full = (
        "The full line is the corpus' floor, below which no model can stay on average. "
        if floor
        else ""
    )
    broken = "Broken lines are published values. " if published else ""
    return Drawing(
        FigureFile(
            name="perplexity",
            title=f"{metric.title} by framework",
            caption="Markers are means over seeds, bars their 95 % t intervals, ticks the seeds; "
            f"{metric.better} is better. {full}{broken}".strip(),
            alternative=_describe(analysis, text),
        ),
        lambda: draw_perplexity(analysis),
    )


def draw_perplexity(analysis: Analysis) -> Figure:
    """Draw the metric that frameworks are compared by, with the floor and published values."""
    metric = METRICS[analysis.metric]
    floor = analysis.floor_perplexity
    published = _published_lines(analysis)
    sources = list(dict.fromkeys(source for _, source, _ in published))
    patterns = [(1, 1.5), (4, 1.5, 1, 1.5), (7, 2)]
    dashes = {source: patterns[i % len(patterns)] for i, source in enumerate(sources)}

    def limits(variant: str) -> tuple[float, float] | None:
        values = _values(analysis, variant, metric.name)
        values += [value for (name, _), _, value in published if name == variant]
        return _padded([*values, floor] if values and floor else values)

    figure, drawn = _list_axes(analysis, metric.label, limits)
    for axes, rows in drawn:
        if floor:
            axes.axvline(floor, color=INK, linewidth=1.2, zorder=1)
        for group, source, value in published:
            if group == group_key(rows[0]):
                axes.axvline(value, color=MUTED, linewidth=1.2, dashes=dashes[source], zorder=1)
        for y, row in enumerate(rows):
            _draw_row(axes, y, row, metric.name)
        _value_labels(axes, rows, _texts(rows, metric.name))
    handles = []
    if floor:
        label = f"floor of the corpus, {metric.write(floor)}"
        handles.append(Line2D([], [], color=INK, linewidth=1.2, label=label))
    for source in sources:
        values = sorted({value for _, s, value in published if s == source})
        shown = f", {' and '.join(map(metric.write, values))}" if len(values) < 3 else ""
        label = f"published: {source}{shown}"
        handles.append(
            Line2D([], [], color=MUTED, linewidth=1.2, dashes=dashes[source], label=label)
        )
    if handles:
        figure.legend(handles=handles, loc="outside lower left", ncols=1)
    return figure


def _published_lines(analysis: Analysis) -> list[tuple[tuple[str, int], str, float]]:
    """Return (group of rows, source, value) of the metric's published values, each once."""
    values = (line.published for line in analysis.published)
    lines = (
        ((v.variant, v.devices), v.source, v.value)
        for v in values
        if v.metric == analysis.metric and v.kind == "number" and v.over is None
    )
    return list(dict.fromkeys(lines))


def _padded(values: Sequence[float]) -> tuple[float, float] | None:
    if not values:
        return None
    low, high = min(values), max(values)
    padding = 0.06 * (high - low) or 0.02 * abs(high) or 1.0
    return low - padding, high + padding


def _speed(analysis: Analysis) -> Drawing:
    """Return the figure of each row's training speed."""
    metric = METRICS["tokens_per_second"]

    def text(row: RowResult) -> str | None:
        return _texts([row], metric.name)[0]

    return Drawing(
        FigureFile(
            name="tokens-per-second",
            title="Training speed by framework",
            caption="Markers are medians over seeds, thick bars reach from the lower to the upper "
            f"quartile, ticks are the seeds; {metric.better} is better.",
            alternative="Median tokens per second. " + _describe(analysis, text),
        ),
        lambda: draw_from_zero(analysis, metric.name),
    )


def draw_from_zero(analysis: Analysis, metric: str) -> Figure:
    """Draw a metric whose ratios matter: axes begin at zero."""

    def limits(variant: str) -> tuple[float, float] | None:
        values = _values(analysis, variant, metric)
        return (0.0, 1.06 * max(values)) if values else None

    figure, drawn = _list_axes(analysis, METRICS[metric].label, limits)
    for axes, rows in drawn:
        for y, row in enumerate(rows):
            line = [0.0, row.value(metric) or 0.0]
            axes.plot(line, [y, y], color=_colour(row), linewidth=1, alpha=0.35, zorder=1)
            _draw_row(axes, y, row, metric)
        _value_labels(axes, rows, _texts(rows, metric))
    return figure


def clock_parts(row: RowResult) -> dict[str, float]:
    """Return the mean seconds by clock; they add up to the mean total. Empty without results."""
    if not row.n_ok:
        return {}

    def mean(clock: str) -> float:
        return float(np.mean(row.seeds(f"{clock}_seconds")))

    parts = {clock: mean(clock) for clock in CLOCKS if clock != "other"}
    return {**parts, "other": max(0.0, mean("total") - sum(parts.values()))}


def _seconds(analysis: Analysis) -> Drawing:
    """Return the figure of where the time of a run went."""

    def text(row: RowResult) -> str | None:
        parts = clock_parts(row)
        if not parts:
            return None
        total, training = (write_seconds(s) for s in (sum(parts.values()), parts["training"]))
        return f"{total}, training {training}"

    return Drawing(
        FigureFile(
            name="seconds",
            title="Where the time of a run went",
            caption="Wall-clock seconds of one run by clock, means over seeds; the clocks do not "
            "overlap.",
            alternative="Mean seconds of a run. " + _describe(analysis, text),
        ),
        lambda: draw_seconds(analysis),
    )


def draw_seconds(analysis: Analysis) -> Figure:
    """Draw where the time of a run went, by clock, as stacked bars."""

    def limits(variant: str) -> tuple[float, float] | None:
        rows = [row for row in analysis.rows if row.variant == variant]
        longest = max(sum(clock_parts(row).values()) for row in rows)
        return (0.0, 1.02 * longest) if longest else None

    figure, drawn = _list_axes(analysis, "Seconds per run, mean over seeds", limits)
    for axes, rows in drawn:
        totals: list[str | None] = []
        for y, row in enumerate(rows):
            left = 0.0
            for clock, seconds in clock_parts(row).items():
                colour = CLOCKS[clock][1]
                axes.barh(y, seconds, left=left, height=0.58, color=colour, linewidth=0)
                left += seconds
            totals.append(write_seconds(left) if row.n_ok else None)
        _value_labels(axes, rows, totals)
    handles = [Patch(facecolor=colour, label=name) for name, colour in CLOCKS.values()]
    figure.legend(
        handles=handles, loc="outside lower left", ncols=4, columnspacing=1.2, handlelength=1.2
    )
    return figure


def _learning_curves(analysis: Analysis, rows: Sequence[Row]) -> Drawing:
    """Return the figure of validation perplexity by epoch."""

    def text(row: RowResult) -> str | None:
        texts = [METRICS[m].text(row.value(m)) for m in ("valid_perplexity", "best_epoch")]
        diverged = f"{row.n_diverged} of {row.n_planned} diverged" if row.n_diverged else ""
        return " and ".join(
            part for part in (" in epoch ".join(texts) if row.n_ok else "", diverged) if part
        )

    crosses = (
        " Crosses are runs that diverged, at their last finite value; at the upper edge where they "
        "have none."
        if any(row.n_diverged for row in analysis.rows)
        else ""
    )
    return Drawing(
        FigureFile(
            name="learning-curves",
            title="Validation perplexity after each epoch",
            caption="Lines are means over the seeds that ended well and had not stopped before "
            "that epoch, bands reach from the best to the worst of them; the scale is logarithmic."
            f"{crosses}",
            alternative="Best validation perplexity and its median epoch. "
            + _describe(analysis, text),
        ),
        lambda: draw_learning_curves(rows),
    )


def draw_learning_curves(rows: Sequence[Row]) -> Figure:
    """Draw validation perplexity by epoch: a line per framework, a band from best to worst seed."""
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.variant, row.devices), []).append(row)
    columns = 1 if len(groups) <= 4 else 2
    count = math.ceil(len(groups) / columns)
    width = WIDTH if columns == 1 else 2 * WIDTH * 0.8
    figure = Figure(figsize=(width, 2.8 * count + 0.2), layout="constrained")
    _separate(figure)
    for index, ((variant, devices), group) in enumerate(groups.items()):
        axes = figure.add_subplot(count, columns, index + 1)
        axes.set_title(f"{variant}, {format_devices(devices)}, {group[0].planned.implementation}")
        _draw_curves(axes, group)
        axes.set_ylabel("Validation perplexity" if index % columns == 0 else "")
        axes.set_xlabel("Epoch" if index >= len(groups) - columns else "")
    return figure


def _draw_curves(axes: Axes, rows: Sequence[Row]) -> None:
    axes.grid(axis="y")
    data = pd.DataFrame(
        [
            (row.framework, epoch.epoch, epoch.valid_nll)
            for row in rows
            for result in row.results().values()
            for epoch in result.history
        ],
        columns=["framework", "epoch", "nll"],
    )
    diverged = [
        (row.framework, cell) for row in rows for cell in row.cells if cell.state == "diverged"
    ]
    if data.empty and not diverged:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.text(0.5, 0.5, "no result", transform=axes.transAxes, ha="center", color=MUTED)
        return
    axes.set_yscale("log")
    line = "o-" if data.epoch.nunique() <= 3 else "-"
    ends = {}
    for framework in dict.fromkeys(data.framework):
        of_it = data[data.framework == framework]
        curve = of_it.groupby("epoch").nll.agg(["mean", "min", "max"]).map(perplexity)
        colour = FRAMEWORK_COLOURS[framework]
        axes.plot(curve.index, curve["mean"], line, linewidth=1.6, color=colour, mew=0)
        axes.fill_between(curve.index, curve["min"], curve["max"], color=colour, alpha=0.18, lw=0)
        ends[framework] = (float(curve.index[-1]), float(curve["mean"].iloc[-1]))
    for framework, cell in diverged:
        end = last_finite(cell)
        axes.plot(
            *(end or (1, 1)),
            "X",
            color=FRAMEWORK_COLOURS[framework],
            markersize=8,
            markeredgecolor=LIGHT_BACKGROUND,
            clip_on=False,
            zorder=5,
            transform=axes.transData if end else axes.get_xaxis_transform(),
        )
        ends.setdefault(framework, end or (1.0, math.inf))
    _label_ticks(axes)
    _label_line_ends(axes, ends)


def last_finite(cell: CellResult) -> tuple[float, float] | None:
    """Return a run's last epoch with a finite validation perplexity, and that; None without any."""
    history = cell.result.history if cell.result else ()
    finite = [(e.epoch, perplexity(e.valid_nll)) for e in history]
    finite = [(epoch, value) for epoch, value in finite if math.isfinite(value)]
    return finite[-1] if finite else None


def _label_ticks(axes: Axes) -> None:
    """Number a logarithmic axis of perplexities and an axis of epochs as people do."""
    low, high = axes.get_ylim()
    if high / low < 10:  # a decade or less: round numbers rather than powers of ten
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
    else:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))


def _label_line_ends(axes: Axes, ends: dict[str, tuple[float, float]]) -> None:
    """Name each line at its end, in its colour; names that would overlap are moved apart."""
    low, high = axes.get_ylim()
    ends = {name: (x, min(y, high)) for name, (x, y) in ends.items()}
    heights = {name: math.log(y / low) / math.log(high / low) for name, (_, y) in ends.items()}
    order = sorted(heights, key=lambda name: heights[name])
    places = spread([heights[name] for name in order], gap=0.085)
    for name, place in zip(order, places, strict=True):
        colour = FRAMEWORK_COLOURS[name]
        axes.annotate(
            framework_name(name),
            xy=ends[name],
            xycoords="data",
            xytext=(1.07, place),
            textcoords="axes fraction",
            color=colour,
            va="center",
            fontsize=9,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.7,
                "alpha": 0.6,
                "shrinkA": 1,
                "shrinkB": 1,
                "relpos": (0, 0.5),
            },
        )


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Move ascending heights in [0, 1] as little as possible until neighbours are `gap` apart.

    The least-squares answer is the isotonic regression of height - index · gap, clipped so that all
    stay inside [0, 1].
    """
    offsets = gap * np.arange(len(heights))
    starts = isotonic_regression(np.asarray(heights) - offsets).x
    highest = max(0.0, 1 - offsets[-1])  # of the lowest label, with all above it
    return (np.clip(starts, 0.0, highest) + offsets).tolist()
