"""The figures of an experiment, as SVG and PNG.

Drawn without pyplot's global state, on the Agg back-end and with the font that matplotlib brings,
so that the same numbers give the same bytes. In the SVG, text stays text.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from ptbench.analysis.collect import Row
from ptbench.analysis.experiment import Analysis, FigureFile, RowResult
from ptbench.report.formatting import (
    FIGURE_SPACE,
    METRIC_NAMES,
    format_count,
    format_perplexity,
    format_seconds,
    framework_name,
    group_key,
    group_title,
)
from ptbench.report.palette import (
    CLOCK_COLOURS,
    FRAMEWORK_COLOURS,
    FRAMEWORK_MARKERS,
    GRID,
    INK,
    LIGHT_BACKGROUND,
    MUTED,
)
from ptbench.training.records import perplexity

WIDTH = 5.2  # inches: a column of a paper, and still legible when a phone shrinks it
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


def write_figures(analysis: Analysis, rows: Sequence[Row], folder: Path) -> tuple[FigureFile, ...]:
    """Draw every figure that has something to show, as {folder}/{name}.svg and .png.

    Args:
        analysis: the numbers.
        rows: the same rows with their histories.
        folder: made if need be.
    """
    if not any(row.n_ok for row in analysis.rows):
        return ()
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for draw, file in (
        (lambda: draw_perplexity(analysis), _perplexity_file(analysis)),
        (lambda: draw_learning_curves(rows), _learning_curves_file(analysis)),
        (lambda: draw_speed(analysis), _speed_file(analysis)),
        (lambda: draw_seconds(analysis), _seconds_file(analysis)),
    ):
        with style():
            save(draw(), folder / file.name)
        files.append(file)
    return tuple(files)


@contextmanager
def style() -> Iterator[None]:
    """The one look of all figures."""
    with matplotlib.rc_context(COMMON_STYLE):
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


def _groups(rows: Sequence[RowResult]) -> list[tuple[tuple[str, int], list[RowResult]]]:
    return [(key, list(group)) for key, group in groupby(rows, key=group_key)]


def _separate(figure: Figure) -> None:
    """Leave room between one panel's axis and the next one's title."""
    engine = figure.get_layout_engine()
    assert isinstance(engine, ConstrainedLayoutEngine)
    engine.set(h_pad=0.07)


def _list_axes(
    analysis: Analysis, label: str, share_limits: Callable[[str], tuple[float, float] | None]
) -> tuple[Figure, list[tuple[Axes, list[RowResult]]]]:
    """One axes per variant and number of devices, with the frameworks listed downwards."""
    groups = _groups(analysis.rows)
    heights = [len(rows) * ROW_HEIGHT for _, rows in groups]
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.7 * len(groups) + 0.55), layout="constrained")
    _separate(figure)
    grid = figure.add_gridspec(len(groups), 1, height_ratios=heights)
    drawn = []
    for index, ((variant, _), rows) in enumerate(groups):
        axes = figure.add_subplot(grid[index])
        axes.set_title(group_title(rows[0]))
        axes.set_yticks(range(len(rows)), [framework_name(row.framework) for row in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x")
        limits = share_limits(variant)
        if limits:
            axes.set_xlim(*limits)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        if index == len(groups) - 1:
            axes.set_xlabel(label)
        drawn.append((axes, rows))
    return figure, drawn


def _value_labels(axes: Axes, rows: Sequence[RowResult], texts: Sequence[str | None]) -> None:
    """The number of each row in the right margin, or that there is none."""
    width = max(len(text or "") for text in texts)
    for y, (row, text) in enumerate(zip(rows, texts, strict=True)):
        axes.annotate(
            "no result" if text is None else text.rjust(width, FIGURE_SPACE),
            (1, y),
            xycoords=("axes fraction", "data"),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            color=INK if row.usable else MUTED,
            style="italic" if text is None else "normal",
            fontsize=9,
        )


def _colour(row: RowResult) -> str:
    return FRAMEWORK_COLOURS[row.framework] if row.usable else MUTED


def _marker(axes: Axes, x: float, y: float, row: RowResult) -> None:
    """The row's value; hollow and grey if too many of its seeds failed."""
    axes.plot(
        x,
        y,
        FRAMEWORK_MARKERS[row.framework],
        markersize=6.5,
        markerfacecolor=_colour(row) if row.usable else LIGHT_BACKGROUND,
        markeredgecolor=LIGHT_BACKGROUND if row.usable else _colour(row),
        zorder=4,
    )


def _seed_ticks(axes: Axes, values: Sequence[float], y: float, row: RowResult) -> None:
    axes.plot(values, [y + 0.24] * len(values), "|", color=_colour(row), markersize=4.5, zorder=3)


def draw_perplexity(analysis: Analysis) -> Figure:
    """The mean of each row with its interval and its seeds, the floor and published values."""
    published = _published_lines(analysis)
    sources = list(dict.fromkeys(source for *_, source, _ in published))
    dashes = {
        source: [(1, 1.5), (4, 1.5, 1, 1.5), (7, 2)][i % 3] for i, source in enumerate(sources)
    }

    def limits(variant: str) -> tuple[float, float] | None:
        values = [value for (v, _), _, value in published if v == variant]
        for row in (row for row in analysis.rows if row.variant == variant):
            summary = row.perplexity(analysis.metric)
            values += _seed_values(row, analysis.metric)
            values += [v for v in (summary and summary.low, summary and summary.high) if v]
        if values and analysis.floor_perplexity:
            values.append(analysis.floor_perplexity)
        return _padded(values)

    figure, drawn = _list_axes(analysis, METRIC_NAMES[analysis.metric], limits)
    for axes, rows in drawn:
        if analysis.floor_perplexity:
            axes.axvline(analysis.floor_perplexity, color=INK, linewidth=1.2, zorder=1)
        for group, source, value in published:
            if group == group_key(rows[0]):
                axes.axvline(value, color=MUTED, linewidth=1.2, dashes=dashes[source], zorder=1)
        for y, row in enumerate(rows):
            summary = row.perplexity(analysis.metric)
            if summary is None:
                continue
            if summary.low is not None and summary.high is not None:
                ends = [summary.low, summary.high]
                axes.plot(ends, [y, y], color=_colour(row), linewidth=2, zorder=2)
            _seed_ticks(axes, _seed_values(row, analysis.metric), y, row)
            _marker(axes, summary.perplexity, y, row)
        summaries = [row.perplexity(analysis.metric) for row in rows]
        texts = [format_perplexity(s.perplexity) if s else None for s in summaries]
        _value_labels(axes, rows, texts)
    handles = []
    if analysis.floor_perplexity:
        floor = f"floor of the corpus, {format_perplexity(analysis.floor_perplexity)}"
        handles.append(Line2D([], [], color=INK, linewidth=1.2, label=floor))
    for source in sources:
        values = sorted({value for _, s, value in published if s == source})
        shown = f", {' and '.join(map(format_perplexity, values))}" if len(values) < 3 else ""
        handles.append(
            Line2D(
                [],
                [],
                color=MUTED,
                linewidth=1.2,
                dashes=dashes[source],
                label=f"published: {source}{shown}",
            )
        )
    if handles:
        figure.legend(handles=handles, loc="outside lower left", ncols=1)
    return figure


def _published_lines(analysis: Analysis) -> list[tuple[tuple[str, int], str, float]]:
    """(group of rows, source, value) of the published values of the metric, each once."""
    lines = (
        (
            (line.published.variant, line.published.devices),
            line.published.source,
            line.published.value,
        )
        for line in analysis.published
        if line.published.metric == analysis.metric
    )
    return list(dict.fromkeys(lines))


def _seed_values(row: RowResult, field: str) -> list[float]:
    values = [getattr(cell, field) for cell in row.cells if cell.state == "ok"]
    return [value for value in values if value is not None]


def _padded(values: Sequence[float]) -> tuple[float, float] | None:
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return None
    low, high = min(finite), max(finite)
    padding = 0.06 * (high - low) or 0.02 * abs(high) or 1.0
    return low - padding, high + padding


def draw_speed(analysis: Analysis) -> Figure:
    """Median, quartiles and seeds of the training speed of each row."""

    def limits(variant: str) -> tuple[float, float] | None:
        rows = [row for row in analysis.rows if row.variant == variant]
        speeds = [speed for row in rows for speed in _seed_values(row, "tokens_per_second")]
        return (0.0, 1.06 * max(speeds)) if speeds else None

    figure, drawn = _list_axes(analysis, METRIC_NAMES["tokens_per_second"], limits)
    for axes, rows in drawn:
        for y, row in enumerate(rows):
            speed = row.tokens_per_second
            if speed is None:
                continue
            colour = _colour(row)
            axes.plot([0, speed.median], [y, y], color=colour, linewidth=1, alpha=0.35, zorder=1)
            axes.plot([speed.low, speed.high], [y, y], color=colour, linewidth=5, alpha=0.45)
            _seed_ticks(axes, _seed_values(row, "tokens_per_second"), y, row)
            _marker(axes, speed.median, y, row)
        speeds = [row.tokens_per_second for row in rows]
        _value_labels(axes, rows, [format_count(s.median) if s else None for s in speeds])
    return figure


CLOCK_NAMES = {
    "load": "load data",
    "start_up": "start up",
    "compile": "compile",
    "training": "train",
    "evaluation": "evaluate",
    "checkpointing": "save",
    "other": "other",
}


def clock_parts(row: RowResult) -> dict[str, float]:
    """Mean seconds by clock, and what is left of the total; they add up to the total."""
    assert row.seconds is not None
    parts = {name: getattr(row.seconds, name) for name in CLOCK_NAMES if name != "other"}
    return {**parts, "other": max(0.0, row.seconds.total - sum(parts.values()))}


def draw_seconds(analysis: Analysis) -> Figure:
    """Where the time of a run went, by clock, as stacked bars."""

    def limits(variant: str) -> tuple[float, float] | None:
        totals = [
            sum(clock_parts(row).values())
            for row in analysis.rows
            if row.variant == variant and row.seconds
        ]
        return (0.0, 1.02 * max(totals)) if max(totals, default=0.0) > 0 else None

    figure, drawn = _list_axes(analysis, "Seconds per run, mean over seeds", limits)
    for axes, rows in drawn:
        for y, row in enumerate(rows):
            if row.seconds is None:
                continue
            left = 0.0
            for clock, seconds in clock_parts(row).items():
                axes.barh(
                    y, seconds, left=left, height=0.58, color=CLOCK_COLOURS[clock], linewidth=0
                )
                left += seconds
        totals = [row.seconds.total if row.seconds else None for row in rows]
        texts = [None if total is None else format_seconds(total) for total in totals]
        _value_labels(axes, rows, texts)
    handles = [
        Patch(facecolor=CLOCK_COLOURS[clock], label=name) for clock, name in CLOCK_NAMES.items()
    ]
    figure.legend(
        handles=handles, loc="outside lower left", ncols=4, columnspacing=1.2, handlelength=1.2
    )
    return figure


def draw_learning_curves(rows: Sequence[Row]) -> Figure:
    """Validation perplexity by epoch: a line per framework, a band from best to worst seed."""
    data = pd.DataFrame(
        [
            (row.variant, row.devices, row.framework, cell.cell.seed, e.epoch, e.valid_nll)
            for row in rows
            for cell in row.ok
            for e in cell.history
        ],
        columns=["variant", "devices", "framework", "seed", "epoch", "nll"],
    )
    titles = {group_key(row): group_title(row) for row in rows}
    facets = list(titles)
    columns = 1 if len(facets) <= 4 else 2
    count = math.ceil(len(facets) / columns)
    width = WIDTH if columns == 1 else 2 * WIDTH * 0.8
    figure = Figure(figsize=(width, 2.8 * count + 0.2), layout="constrained")
    _separate(figure)
    for index, (variant, devices) in enumerate(facets):
        axes = figure.add_subplot(count, columns, index + 1)
        axes.set_title(titles[variant, devices])
        part = data[(data.variant == variant) & (data.devices == devices)]
        _draw_curves(axes, part)
        axes.set_ylabel("Validation perplexity" if index % columns == 0 else "")
        axes.set_xlabel("Epoch" if index >= len(facets) - columns else "")
    return figure


def _draw_curves(axes: Axes, data: pd.DataFrame) -> None:
    axes.grid(axis="y")
    if data.empty:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.text(0.5, 0.5, "no result", transform=axes.transAxes, ha="center", color=MUTED)
        return
    axes.set_yscale("log")
    frameworks = list(dict.fromkeys(data.framework))
    sns.lineplot(
        data=data.assign(perplexity=[perplexity(nll) for nll in data.nll]),
        x="epoch",
        y="perplexity",
        hue="framework",
        hue_order=frameworks,
        palette=FRAMEWORK_COLOURS,
        estimator=_geometric_mean,
        errorbar=lambda values: (values.min(), values.max()),
        err_kws={"alpha": 0.18, "linewidth": 0},
        linewidth=1.6,
        marker="o" if data.epoch.nunique() <= 3 else None,
        markeredgewidth=0,
        legend=False,
        ax=axes,
    )
    low, high = axes.get_ylim()
    if high / low < 10:  # a decade or less: round numbers rather than powers of ten
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
    else:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
    last = {framework: _last_point(data[data.framework == framework]) for framework in frameworks}
    _label_line_ends(axes, last)


def _geometric_mean(perplexities: Sequence[float]) -> float:
    return float(np.exp(np.mean(np.log(np.asarray(perplexities, dtype=np.float64)))))


def _last_point(data: pd.DataFrame) -> tuple[float, float]:
    epoch = data.epoch.max()
    return float(epoch), perplexity(float(data[data.epoch == epoch].nll.mean()))


def _label_line_ends(axes: Axes, ends: dict[str, tuple[float, float]]) -> None:
    """Name each line at its end, in its colour; names that would overlap are moved apart."""
    low, high = np.log(axes.get_ylim())
    heights = {name: (math.log(y) - low) / (high - low) for name, (_, y) in ends.items()}
    order = sorted(heights, key=lambda name: heights[name])
    places = spread([heights[name] for name in order], gap=0.085)
    for name, place in zip(order, places, strict=True):
        axes.annotate(
            framework_name(name),
            xy=ends[name],
            xycoords="data",
            xytext=(1.07, place),
            textcoords="axes fraction",
            color=FRAMEWORK_COLOURS[name],
            va="center",
            fontsize=9,
            arrowprops={
                "arrowstyle": "-",
                "color": FRAMEWORK_COLOURS[name],
                "linewidth": 0.7,
                "alpha": 0.6,
                "shrinkA": 1,
                "shrinkB": 1,
                "relpos": (0, 0.5),
            },
        )


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Move ascending heights in [0, 1] as little as need be for neighbours to be `gap` apart.

    The least-squares answer: isotonic regression of height - index · gap by the pool-adjacent-
    violators algorithm (Barlow et al. 1972), clipped so that all stay inside [0, 1].
    """
    blocks: list[tuple[float, int]] = []  # sum of (height - offset), members
    for index, height in enumerate(heights):
        blocks.append((height - index * gap, 1))
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            (a, m), (b, n) = blocks[-2:]
            blocks[-2:] = [(a + b, m + n)]
    highest = max(0.0, 1 - (len(heights) - 1) * gap)  # of the lowest label, with all above it
    starts = [min(max(total / n, 0.0), highest) for total, n in blocks for _ in range(n)]
    return [start + index * gap for index, start in enumerate(starts)]


def _describe(analysis: Analysis, text: Callable[[RowResult], str]) -> str:
    parts = [
        f"{group_title(rows[0])}: "
        + ", ".join(f"{framework_name(row.framework)} {text(row)}" for row in rows)
        for _, rows in _groups(analysis.rows)
    ]
    return "; ".join(parts) + "."


def _perplexity_file(analysis: Analysis) -> FigureFile:
    def text(row: RowResult) -> str:
        summary = row.perplexity(analysis.metric)
        if summary is None:
            return "no result"
        words = format_perplexity(summary.perplexity)
        if summary.low is not None:
            words += f" ({format_perplexity(summary.low)} to {format_perplexity(summary.high)})"
        return words

    floor = (
        "The full line is the corpus' floor, below which no model can stay on average. "
        if analysis.floor_perplexity
        else ""
    )
    dashed = "Broken lines are published values. " if _published_lines(analysis) else ""
    return FigureFile(
        name="perplexity",
        title=f"{METRIC_NAMES[analysis.metric]} by framework",
        caption="Markers are means over seeds, bars their 95 % t intervals, ticks the seeds; "
        f"lower is better. {floor}{dashed}".strip(),
        alternative=_describe(analysis, text),
    )


def _learning_curves_file(analysis: Analysis) -> FigureFile:
    def text(row: RowResult) -> str:
        if row.valid is None or row.best_epoch is None:
            return "no result"
        return f"{format_perplexity(row.valid.perplexity)} in epoch {row.best_epoch.median:g}"

    return FigureFile(
        name="learning-curves",
        title="Validation perplexity after each epoch",
        caption="Lines are means over the seeds that ended well, bands reach from the best to the "
        "worst of them; the scale is logarithmic.",
        alternative="Best validation perplexity and its median epoch. " + _describe(analysis, text),
    )


def _speed_file(analysis: Analysis) -> FigureFile:
    def text(row: RowResult) -> str:
        speed = row.tokens_per_second
        return "no result" if speed is None else format_count(speed.median)

    return FigureFile(
        name="tokens-per-second",
        title="Training speed by framework",
        caption="Markers are medians over seeds, thick bars reach from the lower to the upper "
        "quartile, ticks are the seeds; higher is better.",
        alternative="Median tokens per second. " + _describe(analysis, text),
    )


def _seconds_file(analysis: Analysis) -> FigureFile:
    def text(row: RowResult) -> str:
        if row.seconds is None:
            return "no result"
        return (
            f"{format_seconds(row.seconds.total)}, training {format_seconds(row.seconds.training)}"
        )

    return FigureFile(
        name="seconds",
        title="Where the time of a run went",
        caption="Wall-clock seconds of one run by clock, means over seeds; the clocks do not "
        "overlap.",
        alternative="Mean seconds of a run. " + _describe(analysis, text),
    )
