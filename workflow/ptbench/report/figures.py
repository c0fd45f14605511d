"""The figures of an experiment. How they look: `drawing.py`.

A framework has one colour and one marker in every figure; what else differs has line styles, so
that nothing is told by colour alone.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ptbench.analysis.collect import CellResult, Row, comparable, is_alone
from ptbench.analysis.experiment import Analysis, FigureFile, RowResult
from ptbench.analysis.metrics import METRICS, PERPLEXITY, Metric, write_seconds
from ptbench.analysis.published import PublishedValue
from ptbench.analysis.variants import Sweep
from ptbench.report.drawing import (
    DASHES,
    MARKERS,
    add_legend,
    columns_for,
    cross,
    key,
    legend_lines,
    number_ticks,
    panels,
    ramp,
    save,
    set_limits,
    spans,
    style,
    time_unit,
)
from ptbench.report.formatting import format_devices, framework_name, group_title, grouped
from ptbench.report.palette import (
    CLOCKS,
    FRAMEWORK_COLOURS,
    FRAMEWORK_MARKERS,
    INK,
    LIGHT_BACKGROUND,
    MUTED,
)
from ptbench.report.words import fairness
from ptbench.training.records import perplexity

ROW_HEIGHT = 0.26  # inches per framework in a list
BAND_HEIGHT = 0.36  # inches per variant, where its frameworks share a line
SINGLY = 3  # variants and numbers of devices whose frameworks have a line each
MOST_LINES = 4  # variants that are told apart by dashes and have training curves too
MOST_MARKED = 6  # variants that are told apart by markers; of more, the legend names a few
MOST_LETTERS = 30  # in a line of a variant's label
WORDS = 12  # rows whose numbers are told in words; of more, the best and the worst
LEAST_PROBLEMS = 3  # for a performance profile


class Drawing(NamedTuple):
    """A figure and what is said about it."""

    file: FigureFile
    draw: Callable[[], Figure]


def write_figures(analysis: Analysis, rows: Sequence[Row], folder: Path) -> tuple[FigureFile, ...]:
    """Draw every figure that has something to show, as {folder}/{name}.svg.

    Args:
        analysis: the numbers.
        rows: the same rows with their histories.
        folder: made if need be.
    """
    drawings = list(choose(analysis, rows))
    if drawings:
        with style():
            for drawing in drawings:
                save(drawing.draw(), folder / drawing.file.name)
    return tuple(drawing.file for drawing in drawings)


def choose(analysis: Analysis, rows: Sequence[Row]) -> Iterator[Drawing]:
    """Yield the figures that have something to show, in the order of the page."""
    ok = [row for row in analysis.rows if row.n_ok]
    if not ok:
        if any(row.n_diverged for row in analysis.rows):
            yield _curves(analysis, rows)
        return
    for sweep in analysis.sweeps:
        yield _sweep(analysis, rows, sweep)
    several = len({row.devices for row in ok}) > 1
    swept = {name for sweep in analysis.sweeps for line in sweep.lines for name in line.variants}
    listed = several or {row.variant for row in ok} - swept  # what no sweep shows
    if several:
        yield _scaling(analysis)
    if listed:
        yield _perplexity(analysis)
    yield _curves(analysis, rows)
    times = several and len(analysis.variants) <= MOST_LINES  # shown by the figure of scaling
    if listed and (len(grouped(analysis.rows)) <= SINGLY or not times):
        yield _speed(analysis)
    if len(ok) > 1 and comparable("total_seconds", ok):
        yield _front(analysis)
    problems = max(map(len, profile(analysis).values()), default=0)
    if len({row.framework for row in ok}) > 1 and problems >= LEAST_PROBLEMS:
        yield _profile(analysis)
    if len(grouped(analysis.rows)) <= SINGLY or _finished_by_all(analysis):
        yield _seconds(analysis)


def _frameworks(rows: Iterable[RowResult | Row]) -> list[str]:
    return [name for name in FRAMEWORK_COLOURS if any(row.framework == name for row in rows)]


def _framework_keys(frameworks: Sequence[str], line: str = "none") -> list[Any]:
    return [
        key(
            framework_name(name),
            color=FRAMEWORK_COLOURS[name],
            marker=FRAMEWORK_MARKERS[name],
            linestyle=line,
        )
        for name in frameworks
    ]


def _published_key() -> Any:
    return key(
        "published", color=INK, marker="D", markerfacecolor=LIGHT_BACKGROUND, linestyle="none"
    )


def _cross_key() -> Any:
    return key("diverged", color=MUTED, marker="X", markersize=7, linestyle="none", mew=0)


NGRAM_DASHES = (":", "--")  # of the reference lines of n-grams, by their order

CROSSES = (
    "Crosses are runs that diverged, at their last finite value; at the upper edge where they have "
    "none, or one beyond it."
)
PUBLISHED = "Open markers are published values."
QUARTILES = "quartiles, or of fewer than five seeds the range"


def _sentences(*parts: str | None) -> str:
    return " ".join(part for part in parts if part)


def _unfair(analysis: Analysis) -> str | None:
    """Say why times and speeds of a figure do not compare; None if they do."""
    rows = [row for row in analysis.rows if row.n_ok]
    return None if all(map(is_alone, rows)) else fairness(rows)


def _diverged(rows: Iterable[RowResult]) -> bool:
    return any(row.n_diverged for row in rows)


def _published_points(analysis: Analysis, metric: str) -> list[PublishedValue]:
    """Return the published numbers of a metric, each once; none beside runs that were reduced."""
    if analysis.reductions:
        return []
    values = [line.published for line in analysis.published]
    kept = [v for v in values if v.metric == metric and v.kind == "number" and v.over is None]
    return list({(v.variant, v.framework, v.devices, v.value): v for v in kept}.values())


def _plot_published(axes: Axes, x: float, y: float, framework: str | None) -> None:
    axes.plot(
        x,
        y,
        FRAMEWORK_MARKERS[framework] if framework else "D",
        markerfacecolor=LIGHT_BACKGROUND,
        markeredgecolor=FRAMEWORK_COLOURS[framework] if framework else INK,
        markersize=6.5,
        markeredgewidth=1.3,
        zorder=4,
    )


def _no_result(row: RowResult) -> str:
    return "diverged" if row.n_diverged else "no result"


def _describe(analysis: Analysis, text: Callable[[RowResult], str | None], metric: Metric) -> str:
    """Return what the rows show, in words: all of a few rows, else each framework's range.

    Args:
        analysis: the rows.
        text: what a row shows; None if it has no result.
        metric: by which the best and the worst are told.
    """
    if len(analysis.rows) <= WORDS:
        parts = [
            f"{group_title(rows[0])}: "
            + ", ".join(f"{framework_name(r.framework)} {text(r) or _no_result(r)}" for r in rows)
            for rows in grouped(analysis.rows)
        ]
        return "; ".join(parts) + "."
    several = len({row.devices for row in analysis.rows}) > 1

    def place(row: RowResult) -> str:
        return analysis.label(row.variant) + (
            f" on {format_devices(row.devices)}" if several else ""
        )

    parts = []
    for name in _frameworks(analysis.rows):
        rows = [row for row in analysis.rows if row.framework == name]
        valued = sorted((r for r in rows if r.n_ok), key=lambda r: r.value(metric.name) or 0.0)
        if metric.better == "higher":
            valued.reverse()
        said = [f"{text(row)} ({place(row)})" for row in (valued[0], valued[-1])] if valued else []
        without = len(rows) - len(valued)
        missing = f", {without} of {len(rows)} rows without result" if without else ""
        parts.append(f"{framework_name(name)} from {' to '.join(said) or 'no result'}{missing}")
    return "; ".join(parts) + "."


def _value_text(metric: Metric) -> Callable[[RowResult], str | None]:
    def text(row: RowResult) -> str | None:
        value = row.value(metric.name)
        return None if value is None else metric.write(value)

    return text


# Sweeps


def _sweep(analysis: Analysis, rows: Sequence[Row], sweep: Sweep) -> Drawing:
    """Return the figure of perplexity and time against a swept key of the recipe."""
    metric = METRICS[analysis.metric]
    words = sweep.key.replace("_", " ")
    together = ", ".join(each.replace("_", " ") for each in sweep.together)
    names = {name for line in sweep.lines for name in line.variants}
    shown = [row for row in analysis.rows if row.variant in names]
    published = any(v.variant in names for v in _published_points(analysis, metric.name))
    return Drawing(
        FigureFile(
            name=f"sweep-{sweep.key.replace('_', '-')}",
            title=f"{metric.title} and time by {words}",
            caption=_sentences(
                "Lines are means over seeds with their 95 % t intervals; below, medians and "
                f"{QUARTILES}.",
                f"Each line has the settings of its style: {_lines_text(sweep)}."
                if len(sweep.lines) > 1
                else None,
                f"With it change: {together}." if together else None,
                PUBLISHED if published else None,
                CROSSES if _diverged(shown) else None,
            ),
            alternative=_describe(
                analysis.model_copy(update={"rows": tuple(shown)}), _value_text(metric), metric
            ),
        ),
        lambda: draw_sweep(analysis, rows, sweep),
    )


def _lines_text(sweep: Sweep) -> str:
    styles = ("full", "broken", "dotted", "dash-dotted")
    return "; ".join(
        f"{styles[i % len(styles)]}, {line.label}" for i, line in enumerate(sweep.lines)
    )


def draw_sweep(analysis: Analysis, rows: Sequence[Row], sweep: Sweep) -> Figure:
    """Draw perplexity and time per epoch against a swept key, a line for each framework."""
    metric, time = METRICS[analysis.metric], METRICS["seconds_per_epoch"]
    devices = min(row.devices for row in analysis.rows)
    found = {(r.variant, r.framework): r for r in analysis.rows if r.devices == devices}
    cells = {(r.variant, r.framework): r.cells for r in rows if r.devices == devices}
    frameworks = _frameworks(analysis.rows)
    values = [value for line in sweep.lines for value in line.values]
    points = [p for p in _published_points(analysis, metric.name) if p.devices == devices]
    places = {n: v for line in sweep.lines for n, v in zip(line.variants, line.values, strict=True)}
    points = [p for p in points if p.variant in places]
    diverged = _diverged(row for row in found.values() if row.variant in places)
    extra = [_published_key()] * bool(points) + [_cross_key()] * diverged
    labels = [line.label for line in sweep.lines]
    lines = [
        key(label, color=INK, linestyle=DASHES[i % len(DASHES)])
        for i, label in enumerate(labels)
        if len(labels) > 1
    ]
    named = [*_framework_keys(frameworks), *extra]
    columns = columns_for([*(handle.get_label() for handle in named)], 4)
    line_columns = columns_for(labels)
    figure, [[upper], [lower]] = panels(
        2,
        height=1.75,
        between=0.22,
        legend=legend_lines(named, columns) + legend_lines(lines, line_columns),
    )
    for axes, shown in ((upper, metric), (lower, time)):
        drawn: list[float] = []
        for index, line in enumerate(sweep.lines):
            for framework in frameworks:
                numbers = [
                    (x, summary)
                    for name, x in zip(line.variants, line.values, strict=True)
                    if (row := found.get((name, framework)))
                    and (summary := row.metrics.get(shown.name))
                ]
                drawn += _plot_line(axes, numbers, framework, DASHES[index % len(DASHES)])
        if axes is upper:
            drawn += [p.value for p in points]
        axes.grid(axis="y")
        if sweep.logarithmic:
            axes.set_xscale("log")
        set_limits(axes, drawn, spans(drawn))
        axes.set_ylabel(shown.label)
        number_ticks(axes.xaxis, sorted(set(values)), sweep.logarithmic)
    for point in points:
        _plot_published(upper, places[point.variant], point.value, point.framework)
    for (name, framework), of in cells.items():
        for cell in of:
            if name in places and cell.state == "diverged":
                end = last_finite(cell)
                cross(upper, places[name], end and end[1], FRAMEWORK_COLOURS[framework])
    upper.tick_params(labelbottom=False)
    lower.set_xlabel(sweep.key.replace("_", " ").capitalize())
    if lines:
        _two_legends(figure, named, columns, lines, line_columns)
    else:
        add_legend(figure, named, columns)
    return figure


def _two_legends(
    figure: Figure, first: Sequence[Any], columns: int, second: Sequence[Any], more: int
) -> None:
    """Set a legend of colours and, below it, one of line styles."""
    width, height = figure.get_size_inches()
    add_legend(figure, second, more)
    below = 0.06 + 0.2 * legend_lines(second, more)
    figure.legend(
        handles=first,
        loc="lower left",
        bbox_to_anchor=(0.1 / width, below / height),
        ncols=columns,
    )


def _plot_line(
    axes: Axes, numbers: Sequence[tuple[float, Any]], framework: str, dash: Any
) -> list[float]:
    """Draw summaries as a line with its band; return the numbers drawn."""
    if not numbers:
        return []
    colour = FRAMEWORK_COLOURS[framework]
    x = [at for at, _ in numbers]
    y = [summary.value for _, summary in numbers]
    low = [y_ if s.low is None else s.low for (_, s), y_ in zip(numbers, y, strict=True)]
    high = [y_ if s.high is None else s.high for (_, s), y_ in zip(numbers, y, strict=True)]
    axes.plot(x, y, color=colour, marker=FRAMEWORK_MARKERS[framework], linestyle=dash, zorder=3)
    axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    return [*y, *low, *high]


# Lists: perplexity and speed of every row


def _perplexity(analysis: Analysis) -> Drawing:
    """Return the figure of each row's mean with interval, floor and published values."""
    metric = METRICS[analysis.metric]
    single = len(grouped(analysis.rows)) <= SINGLY

    def text(row: RowResult) -> str | None:
        summary = row.metrics.get(metric.name)
        if summary is None:
            return None
        spread = f" ({metric.spread_text(summary)})" if summary.low is not None else ""
        return metric.write(summary.value) + spread

    return Drawing(
        FigureFile(
            name="perplexity",
            title=f"{metric.title} by framework",
            caption=_sentences(
                "Markers are means over seeds, bars their 95 % t intervals"
                + (", ticks the seeds; " if single else "; ")
                + f"{metric.better} is better.",
                "The full line is the corpus' floor, below which no model can stay on average."
                if analysis.floor_perplexity
                else None,
                "Broken lines are n-gram models of the same text."
                if analysis.ngram_perplexities
                else None,
                PUBLISHED if _published_points(analysis, metric.name) else None,
                "Crosses at the right edge are rows whose runs diverged."
                if any(row.n_diverged and not row.n_ok for row in analysis.rows)
                else None,
            ),
            alternative=_describe(analysis, text, metric),
        ),
        lambda: draw_list(analysis, metric.name),
    )


def _speed(analysis: Analysis) -> Drawing:
    """Return the figure of each row's training speed."""
    metric = METRICS["tokens_per_second"]
    return Drawing(
        FigureFile(
            name="tokens-per-second",
            title="Training speed by framework",
            caption=_sentences(
                f"Markers are medians over seeds, thick bars are {QUARTILES}; {metric.better} is "
                "better.",
                _unfair(analysis),
            ),
            alternative="Median tokens per second. "
            + _describe(analysis, _value_text(metric), metric),
        ),
        lambda: draw_list(analysis, metric.name),
    )


def draw_list(analysis: Analysis, name: str) -> Figure:
    """Draw a metric of every row: variants and numbers of devices downwards.

    Of a few, each framework has a line with its number; of many, a variant's frameworks share one.
    A metric whose ratios matter has an axis from zero, or a logarithmic one.
    """
    metric = METRICS[name]
    groups = grouped(analysis.rows)
    single = len(groups) <= SINGLY
    is_perplexity = metric.kind is PERPLEXITY
    floor = analysis.floor_perplexity if is_perplexity else None
    ngrams = analysis.ngram_perplexities if name == analysis.metric else {}
    points = _published_points(analysis, name) if is_perplexity else []
    frameworks = _frameworks(analysis.rows)
    named = [] if single else _framework_keys(frameworks)
    if floor:
        named.append(key(f"floor of the corpus, {metric.write(floor)}", color=INK))
    for (order, value), dashes in zip(ngrams.items(), NGRAM_DASHES, strict=False):
        label = f"Kneser-Ney {order}-gram, {metric.write(value)}"
        named.append(key(label, color=MUTED, linestyle=dashes))
    if points:
        named.append(_published_key())
    columns = columns_for([handle.get_label() for handle in named], 3)
    several = len({row.devices for row in analysis.rows}) > 1
    titles = [
        _row_label(analysis, rows[0], several) if single else _band_label(analysis, rows[0])
        for rows in groups
    ]
    if single:
        lines = sum(len(rows) for rows in groups) + (len(groups) if len(groups) > 1 else 0)
        left, right, height = 1.0, 0.95, ROW_HEIGHT * lines + 0.1
    else:
        left = 0.3 + 0.07 * max(len(line) for title in titles for line in title.split("\n"))
        right, height = 0.25, BAND_HEIGHT * len(groups)
    figure, [[axes]] = panels(
        1,
        height=height,
        left=left,
        right=right,
        above=0.12,
        legend=legend_lines(named, columns) if named else 0,
    )
    values = [v for row in analysis.rows for v in _shown_numbers(row, name)]
    values += [point.value for point in points] + ([floor] if floor and values else [])
    values += list(ngrams.values()) if values else []
    _list_limits(axes, values, from_zero=not is_perplexity)
    axes.set_xlabel(metric.label)
    axes.grid(axis="x")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    places: dict[tuple[str, int, str | None], float] = {}
    ticks: list[tuple[float, str]] = []
    lined: list[tuple[float, float]] = []  # where lines are drawn: not across a heading
    at = 0.0
    for rows, title in zip(groups, titles, strict=True):
        if single and len(groups) > 1:
            _heading(axes, at, title)
            at += 1
        places[rows[0].variant, rows[0].devices, None] = at - (0.45 if single else 0)
        for index, row in enumerate(rows):
            offset = 0.0 if single else 0.15 * (index - (len(rows) - 1) / 2)
            places[row.variant, row.devices, row.framework] = at + offset
            _draw_row(axes, at + offset, row, name, single)
            if single:
                ticks.append((at, framework_name(row.framework)))
                _value_label(axes, at, row, metric)
                at += 1
        if not single:
            ticks.append((at, title))
            axes.axhline(at + 0.5, color=MUTED, linewidth=0.3)
            at += 1
        lined.append((at - 0.5 - (len(rows) if single else 1), at - 0.5))
    tops, ends = zip(*lined, strict=True)
    if floor:
        axes.vlines([floor] * len(tops), tops, ends, color=INK, linewidth=1.2, zorder=1)
    for value, dashes in zip(ngrams.values(), NGRAM_DASHES, strict=False):
        axes.vlines(
            [value] * len(tops), tops, ends, color=MUTED, linewidth=1.2, linestyle=dashes, zorder=1
        )
    axes.set_ylim(at - 0.5, -0.5)
    axes.set_yticks([place for place, _ in ticks], [text for _, text in ticks])
    for point in points:
        place = places.get((point.variant, point.devices, point.framework))
        if place is None:
            place = places[point.variant, point.devices, None]
        _plot_published(axes, point.value, place, point.framework)
    add_legend(figure, named, columns)
    return figure


def _heading(axes: Axes, y: float, title: str) -> None:
    axes.annotate(
        title,
        (0, y),
        xycoords=("figure fraction", "data"),
        xytext=(6, 0),
        textcoords="offset points",
        va="center",
        weight="bold",
        fontsize=9,
        bbox={"facecolor": LIGHT_BACKGROUND, "edgecolor": "none", "pad": 1},
    )


def _row_label(analysis: Analysis, row: RowResult, several: bool) -> str:
    title = group_title(row) if len(analysis.variants) == 1 else analysis.label(row.variant)
    return title if len(analysis.variants) == 1 or not several else f"{title}, {row.devices}"


def _band_label(analysis: Analysis, row: RowResult) -> str:
    label = analysis.label(row.variant)
    if len({each.devices for each in analysis.rows}) > 1:
        devices = format_devices(row.devices)
        label = f"{label}, {devices}" if len(analysis.variants) > 1 else devices
    parts, wrapped = label.split(", "), [""]
    for part in parts:
        if wrapped[-1] and len(wrapped[-1]) + len(part) > MOST_LETTERS:
            wrapped[-1] += ","
            wrapped.append("")
        wrapped[-1] = f"{wrapped[-1]}, {part}" if wrapped[-1] else part
    return "\n".join(wrapped[:2]) + ("…" if len(wrapped) > 2 else "")


def _shown_numbers(row: RowResult, metric: str) -> list[float]:
    summary = row.metrics.get(metric)
    if summary is None:
        return []
    ends = (summary.value, summary.low, summary.high)
    found = [*row.seeds(metric), *(end for end in ends if end is not None)]
    return [value for value in found if math.isfinite(value)]


def _list_limits(axes: Axes, values: Sequence[float], from_zero: bool) -> None:
    if not values:
        axes.set_xticks([])
        return
    low, high = min(values), max(values)
    logarithmic = spans(values, 30.0 if from_zero else 3.0)
    if logarithmic:
        axes.set_xscale("log")
        ratio = (high / low) ** 0.04
        axes.set_xlim(low / ratio, high * ratio)
    else:
        room = 0.05 * (high - low) or 0.02 * high
        axes.set_xlim(0.0 if from_zero else low - room, high + room)
    number_ticks(axes.xaxis, (), logarithmic)


def _draw_row(axes: Axes, y: float, row: RowResult, name: str, single: bool) -> None:
    """Draw a row's value with its interval, quartiles or range; hollow if too many seeds failed.

    A row without a number whose runs diverged is a cross at the right edge.
    """
    colour = FRAMEWORK_COLOURS[row.framework]
    summary = row.metrics.get(name)
    if summary is None:
        if row.n_diverged:
            axes.plot(
                1, y, "X", color=colour, markersize=7, mew=0, clip_on=False,
                transform=axes.get_yaxis_transform(),
            )  # fmt: skip
        return
    width = 2.0 if METRICS[name].kind is PERPLEXITY else 5.0
    if summary.low is not None and summary.high is not None:
        ends = [summary.low, summary.high]
        axes.plot(ends, [y, y], color=colour, linewidth=width, alpha=2 / width, zorder=2)
    if single:
        seeds = row.seeds(name)
        axes.plot(seeds, [y + 0.28] * len(seeds), "|", color=colour, markersize=4.5, zorder=3)
    axes.plot(
        summary.value,
        y,
        FRAMEWORK_MARKERS[row.framework],
        markersize=6.5 if single else 5.0,
        markerfacecolor=colour if row.usable else LIGHT_BACKGROUND,
        markeredgecolor=LIGHT_BACKGROUND if row.usable else MUTED,
        markeredgewidth=0.6 if row.usable else 1.2,
        zorder=4,
    )


def _value_label(axes: Axes, y: float, row: RowResult, metric: Metric) -> None:
    """Write the number of a row in the right margin, or why there is none."""
    text = _value_text(metric)(row)
    axes.annotate(
        text or _no_result(row),
        (1, y),
        xycoords=("axes fraction", "data"),
        xytext=(62, 0),
        textcoords="offset points",
        ha="right",
        va="center",
        color=INK if row.usable else MUTED,
        style="normal" if text else "italic",
        fontsize=9,
    )


# Scaling


def _scaling(analysis: Analysis) -> Drawing:
    """Return the figure of time, speed-up, efficiency and perplexity by number of devices."""
    metric = METRICS["seconds_per_epoch"]
    many = len(analysis.variants) > MOST_LINES
    return Drawing(
        FigureFile(
            name="scaling",
            title="Scaling with the number of devices",
            caption=_sentences(
                "Medians over seeds. Speed-up is tokens per second over those of the fewest "
                "devices, efficiency is speed-up over the factor of devices; the grey line is "
                "ideal.",
                "Replicas on a CPU share its cores: beyond their number there is nothing to gain."
                if any(row.accelerator != "cuda" for row in analysis.rows)
                else None,
                _unfair(analysis),
                f"Geometric means over the variants that a framework finished on every number of "
                f"devices: {_whole_variants(analysis)} of {len(analysis.variants)}."
                if many
                else None,
                f"Line styles are variants: {_variants_text(analysis)}."
                if 1 < len(analysis.variants) <= MOST_LINES
                else None,
            ),
            alternative="Median seconds per epoch. "
            + _describe(analysis, _value_text(metric), metric),
        ),
        lambda: draw_scaling(analysis),
    )


def _variants_text(analysis: Analysis) -> str:
    styles = ("full", "broken", "dotted", "dash-dotted")
    return "; ".join(f"{styles[i]}, {v.label}" for i, v in enumerate(analysis.variants))


def _whole_variants(analysis: Analysis) -> str:
    """Write how many variants each framework has usable rows of on every number of devices."""
    devices = {row.devices for row in analysis.rows}
    found: dict[tuple[str, str], set[int]] = defaultdict(set)
    for row in analysis.rows:
        if row.usable:
            found[row.framework, row.variant].add(row.devices)
    return ", ".join(
        f"{framework_name(name)} {sum(of == devices for (f, _), of in found.items() if f == name)}"
        for name in _frameworks(analysis.rows)
    )


def scaling(analysis: Analysis, metric: str) -> dict[tuple[str, str], dict[int, float]]:
    """Return a metric by number of devices, for each (line, framework).

    A line is a variant. Of more than four variants it is their geometric mean, over those that
    have a number for every number of devices.
    """
    found: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    for row in analysis.rows:
        value = row.value(metric)
        if value is not None and row.usable and math.isfinite(value):
            found[row.variant, row.framework][row.devices] = value
    if len(analysis.variants) <= MOST_LINES:
        return dict(found)
    devices = {row.devices for row in analysis.rows}
    means = {}
    for framework in _frameworks(analysis.rows):
        whole = [v for (_, f), v in found.items() if f == framework and v.keys() == devices]
        if whole:
            means["", framework] = {
                count: math.exp(sum(math.log(v[count]) for v in whole) / len(whole))
                for count in sorted(devices)
            }
    return means


def draw_scaling(analysis: Analysis) -> Figure:
    """Draw time per epoch, speed-up, efficiency and perplexity against the number of devices."""
    metric = METRICS[analysis.metric]
    devices = sorted({row.devices for row in analysis.rows})
    frameworks = _frameworks(analysis.rows)
    order = [variant.name for variant in analysis.variants]
    named = _framework_keys(frameworks)
    columns = columns_for([handle.get_label() for handle in named], 5)
    figure, [[time, faster], [efficiency, score]] = panels(
        2, 2, height=1.6, between=0.55, legend=legend_lines(named, columns)
    )
    seconds, speeds = scaling(analysis, "seconds_per_epoch"), scaling(analysis, "tokens_per_second")
    ratios = {
        line: {count: speed / of[min(of)] for count, speed in of.items()}
        for line, of in speeds.items()
        if devices[0] in of
    }
    shares = {
        line: {count: ratio * devices[0] / count for count, ratio in of.items()}
        for line, of in ratios.items()
    }
    shown = [
        (time, seconds, METRICS["seconds_per_epoch"].label),
        (faster, ratios, "Speed-up"),
        (efficiency, shares, "Efficiency"),
        (score, scaling(analysis, metric.name), metric.title),
    ]
    for axes, lines, label in shown:
        drawn = []
        for (variant, framework), of in lines.items():
            counts = sorted(of)
            drawn += [of[count] for count in counts]
            axes.plot(
                counts,
                [of[count] for count in counts],
                color=FRAMEWORK_COLOURS[framework],
                marker=FRAMEWORK_MARKERS[framework],
                linestyle=DASHES[order.index(variant) if variant else 0],
            )
        if axes in (faster, efficiency):
            ideal = [count / devices[0] if axes is faster else 1.0 for count in devices]
            axes.plot(devices, ideal, color=MUTED, linewidth=1, zorder=1)
            drawn += ideal
        set_limits(axes, drawn, spans(drawn) and axes in (time, score))
        if axes is efficiency:
            axes.set_ylim(0, max([*drawn, 1.0]) * 1.07)
        number_ticks(axes.xaxis, devices)
        axes.set_title(label)
        axes.grid(axis="y")
    for axes in (efficiency, score):
        axes.set_xlabel("Devices")
    add_legend(figure, named, columns)
    return figure


# Curves


def _curves(analysis: Analysis, rows: Sequence[Row]) -> Drawing:
    """Return the figure of training and validation perplexity by epoch and by time."""
    metric = METRICS["valid_perplexity"]
    several = len(analysis.variants) > 1

    def text(row: RowResult) -> str | None:
        texts = [METRICS[m].text(row.value(m)) for m in ("valid_perplexity", "best_epoch")]
        diverged = f"{row.n_diverged} of {row.n_planned} diverged" if row.n_diverged else ""
        said = (" in epoch ".join(texts) if row.n_ok else "", diverged)
        return " and ".join(part for part in said if part) or None

    return Drawing(
        FigureFile(
            name="learning-curves",
            title="Perplexity after each epoch, and by time of training",
            caption=_sentences(
                "Lines are means over the seeds that ended well and had not stopped before that "
                "epoch: full lines with markers of the validation split"
                + ("" if _many_lines(analysis) else ", thin ones of the training split")
                + "; the scale is logarithmic.",
                None
                if several
                else "Bands reach from the best to the worst seed of the validation split.",
                f"On {format_devices(min(row.devices for row in rows))}." if several else None,
                f"Colours go from blue to orange in the order of the {len(analysis.variants)} "
                "variants, of which the legend names some."
                if len(analysis.variants) > MOST_MARKED
                else None,
                CROSSES if _diverged(analysis.rows) else None,
            ),
            alternative="Best validation perplexity and its median epoch. "
            + _describe(analysis, text, metric),
        ),
        lambda: draw_curves(analysis, rows),
    )


def _many_lines(analysis: Analysis) -> bool:
    return len(analysis.variants) > MOST_LINES


class Curve(NamedTuple):
    """Mean over the seeds of one row, by epoch."""

    epochs: list[int]
    seconds: list[float]
    train: list[float]
    valid: list[float]
    low: list[float]  # of the best and of the worst seed
    high: list[float]


def curve(row: Row) -> Curve:
    """Return the mean curve of the seeds that ended well; perplexities of the mean nll."""
    histories = [result.history for result in row.results().values()]
    columns: dict[int, list[tuple[float, float, float]]] = defaultdict(list)
    for history in histories:
        seconds = 0.0
        for epoch in history:
            seconds += epoch.training_seconds + epoch.validation_seconds
            columns[epoch.epoch].append((seconds, epoch.train_nll, epoch.valid_nll))
    epochs = sorted(columns)
    means = [np.mean(columns[epoch], axis=0) for epoch in epochs]
    nlls = [[valid for *_, valid in columns[epoch]] for epoch in epochs]
    return Curve(
        epochs,
        [float(mean[0]) for mean in means],
        [perplexity(float(mean[1])) for mean in means],
        [perplexity(float(mean[2])) for mean in means],
        [perplexity(min(of)) for of in nlls],
        [perplexity(max(of)) for of in nlls],
    )


def last_finite(cell: CellResult) -> tuple[float, float] | None:
    """Return a run's last epoch with a finite validation perplexity, and that; None without any."""
    history = cell.result.history if cell.result else ()
    finite = [(e.epoch, perplexity(e.valid_nll)) for e in history]
    finite = [(epoch, value) for epoch, value in finite if math.isfinite(value)]
    return finite[-1] if finite else None


def draw_curves(analysis: Analysis, rows: Sequence[Row]) -> Figure:
    """Draw perplexity by epoch and by time.

    Of one variant, frameworks are overlaid, in a panel for each number of devices; of several, the
    variants, in a panel for each framework, on the fewest devices.
    """
    several = len(analysis.variants) > 1
    fewest = min(row.devices for row in rows)
    if several:
        colours = dict(zip(
            [v.name for v in analysis.variants], ramp(len(analysis.variants)), strict=True
        ))  # fmt: skip
        groups = {
            framework_name(name): [r for r in rows if (r.framework, r.devices) == (name, fewest)]
            for name in _frameworks(rows)
        }
        labels = [variant.label for variant in analysis.variants]
        marked = len(labels) <= MOST_MARKED
        styles = {
            variant.name: (
                colours[variant.name],
                MARKERS[i] if marked else "none",
                DASHES[i % len(DASHES)],
            )
            for i, variant in enumerate(analysis.variants)
        }
        named = [
            key(label, color=colour, marker=marker, linestyle=dash)
            for label, (colour, marker, dash) in zip(labels, styles.values(), strict=True)
        ]
        if not marked:
            named = [named[round(i)] for i in np.linspace(0, len(named) - 1, MOST_MARKED)]
    else:
        counts = sorted({row.devices for row in rows})
        counts = counts if len(counts) <= MOST_LINES else [counts[0], counts[-1]]
        groups = {format_devices(n): [r for r in rows if r.devices == n] for n in counts}
        styles = {
            name: (FRAMEWORK_COLOURS[name], FRAMEWORK_MARKERS[name], "solid")
            for name in _frameworks(rows)
        }
        named = _framework_keys(list(styles), "solid")
    if _diverged(analysis.rows):
        named.append(_cross_key())
    columns = columns_for([str(handle.get_label()) for handle in named])
    figure, grid = panels(
        len(groups),
        2,
        height=1.5 if len(groups) > 1 else 2.0,
        between=0.55,
        aside=0.25,
        legend=legend_lines(named, columns),
    )
    curves = {id(row): curve(row) for group in groups.values() for row in group}
    shown = [c for c in curves.values() if c.epochs]
    values = [v for c in shown for v in (*c.valid, *(() if several else (*c.low, *c.high)))]
    if not _many_lines(analysis):
        values += [v for c in shown for v in c.train]
    ends = [
        end
        for group in groups.values()
        for row in group
        for cell in row.cells
        if cell.state == "diverged" and (end := last_finite(cell))
    ]
    if not values:
        values = [value for _, value in ends]
    longest = int(max([1, *(c.epochs[-1] for c in shown), *(epoch for epoch, _ in ends)]))
    times = [c.seconds[-1] for c in shown] or [1.0]
    logarithmic = spans(times, 10.0)
    unit, scale = time_unit(max(times))
    for (title, group), pair in zip(groups.items(), grid, strict=True):
        for axes in pair:
            axes.grid(axis="y")
            set_limits(axes, values, True)
        for index, row in enumerate(group):
            of = styles[row.variant if several else row.framework]
            _draw_curve(
                pair, curves[id(row)], scale, of, index, not _many_lines(analysis), not several
            )
        for row in group:
            colour = styles[row.variant if several else row.framework][0]
            for cell in row.cells:
                if cell.state == "diverged":
                    _cross_both(pair, cell, colour, scale)
        pair[0].set_title(title)
        pair[0].set_ylabel("Perplexity")
        pair[1].tick_params(labelleft=False)
        pair[0].set_xlim(0.5 if longest < 20 else 0, longest + 0.5)
        if logarithmic:
            pair[1].set_xscale("log")
        else:
            pair[1].set_xlim(0, max(times) / scale * 1.03 or 1)
        number_ticks(pair[0].xaxis, (), whole=True)
        number_ticks(pair[1].xaxis, (), logarithmic)
        if not any(curves[id(row)].epochs for row in group) and not _any_diverged(group):
            pair[0].text(0.5, 0.5, "no result", transform=pair[0].transAxes, ha="center")
    grid[-1][0].set_xlabel("Epoch")
    grid[-1][1].set_xlabel(unit.capitalize())
    add_legend(figure, named, columns)
    return figure


def _any_diverged(rows: Iterable[Row]) -> bool:
    return any(cell.state == "diverged" for row in rows for cell in row.cells)


def _draw_curve(
    pair: Sequence[Axes],
    of: Curve,
    scale: float,
    look: tuple[str, str, Any],
    index: int,
    train: bool,
    band: bool,
) -> None:
    """Draw a row's curve; `index` moves its markers, so that equal curves can be told apart.

    `scale` is the unit of time [s].
    """
    if not of.epochs:
        return
    colour, marker, dash = look
    every = max(1, len(of.epochs) // 6)
    width = 1.5 if marker != "none" else 0.9
    places: tuple[Sequence[float], Sequence[float]] = (of.epochs, [at / scale for at in of.seconds])
    for axes, x in zip(pair, places, strict=True):
        axes.plot(
            x, of.valid, color=colour, marker=marker, linestyle=dash,
            markevery=(index % every, every),
            markersize=4.5, linewidth=width, zorder=3,
        )  # fmt: skip
        if train:
            axes.plot(x, of.train, color=colour, linestyle=dash, linewidth=0.8, alpha=0.7)
        if band:
            axes.fill_between(x, of.low, of.high, color=colour, alpha=0.18, linewidth=0)


def _cross_both(pair: Sequence[Axes], cell: CellResult, colour: str, scale: float) -> None:
    """Mark a diverged run by its epoch and by its time, whose unit is `scale` [s]."""
    end = last_finite(cell)
    history = cell.result.history if cell.result else ()
    until = [e for e in history if end and e.epoch <= end[0]]
    time = sum(e.training_seconds + e.validation_seconds for e in until) / scale
    for axes, x in zip(pair, (end[0] if end else 1, time), strict=True):
        cross(axes, x, end and end[1], colour)


# Front and profile


def _front(analysis: Analysis) -> Drawing:
    """Return the figure of perplexity against time with its Pareto front."""
    metric = METRICS[analysis.metric]
    best = [f"{_point_name(analysis, r)} {_point_text(r, metric)}" for r in front(analysis)]
    return Drawing(
        FigureFile(
            name="front",
            title=f"{metric.title} against the time of a run",
            caption="Each marker is a row: mean over seeds against the median time of a run. No "
            "row is better in both than one on the line, the Pareto front.",
            alternative="On the Pareto front: " + "; ".join(best) + ".",
        ),
        lambda: draw_front(analysis),
    )


def _point_name(analysis: Analysis, row: RowResult) -> str:
    parts = [framework_name(row.framework)]
    if len(analysis.variants) > 1:
        parts.append(analysis.label(row.variant))
    if len({each.devices for each in analysis.rows}) > 1:
        parts.append(format_devices(row.devices))
    return ", ".join(parts)


def _point_text(row: RowResult, metric: Metric) -> str:
    return f"{metric.text(row.value(metric.name))} in {write_seconds(_seconds_of(row))}"


def _seconds_of(row: RowResult) -> float:
    return row.value("total_seconds") or 0.0


def front(analysis: Analysis) -> list[RowResult]:
    """Return the usable rows than which none is better in both perplexity and time, by time."""
    found: list[RowResult] = []
    rows = [row for row in analysis.rows if row.usable and row.value(analysis.metric)]
    for row in sorted(rows, key=lambda r: (_seconds_of(r), r.value(analysis.metric) or 0.0)):
        value = row.value(analysis.metric)
        if not found or (value or 0.0) < (found[-1].value(analysis.metric) or 0.0):
            found.append(row)
    return found


def draw_front(analysis: Analysis) -> Figure:
    """Draw perplexity against the time of a run, and the Pareto front."""
    metric = METRICS[analysis.metric]
    rows = [row for row in analysis.rows if row.usable and row.value(metric.name)]
    frameworks = _frameworks(rows)
    named = [*_framework_keys(frameworks), key("Pareto front", color=INK, linewidth=1)]
    columns = columns_for([handle.get_label() for handle in named], 4)
    figure, [[axes]] = panels(1, height=2.3, above=0.15, legend=legend_lines(named, columns))
    unit, scale = time_unit(max(map(_seconds_of, rows), default=0.0))
    times = [_seconds_of(row) / scale for row in rows]
    values = [row.value(metric.name) or 0.0 for row in rows]
    for row, x, y in zip(rows, times, values, strict=True):
        axes.plot(
            x,
            y,
            FRAMEWORK_MARKERS[row.framework],
            color=FRAMEWORK_COLOURS[row.framework],
            markersize=6,
            markeredgecolor=LIGHT_BACKGROUND,
            markeredgewidth=0.6,
        )
    best = front(analysis)
    axes.step(
        [_seconds_of(row) / scale for row in best],
        [row.value(metric.name) or 0.0 for row in best],
        where="post",
        color=INK,
        linewidth=1,
        zorder=1,
    )
    if spans(times, 10.0):
        axes.set_xscale("log")
    elif times:
        axes.set_xlim(0, max(times) * 1.05)
    set_limits(axes, values, spans(values))
    number_ticks(axes.xaxis, (), spans(times, 10.0))
    if len(analysis.variants) > 1:
        _name_points(axes, [(_seconds_of(r) / scale, r, metric.name) for r in best], analysis)
    axes.grid(axis="both")
    axes.set_xlabel(f"{unit.capitalize()} of a run")
    axes.set_ylabel(metric.title)
    add_legend(figure, named, columns)
    return figure


def _name_points(
    axes: Axes, points: Sequence[tuple[float, RowResult, str]], analysis: Analysis
) -> None:
    """Write the variant beside the points of the front, where there is room for it."""
    last = math.inf
    for x, row, metric in reversed(points):
        y = row.value(metric) or 0.0
        height = axes.transAxes.inverted().transform(axes.transData.transform((x, y)))[1]
        if abs(height - last) > 0.09:
            axes.annotate(
                analysis.label(row.variant),
                (x, y),
                xytext=(5, 4),
                textcoords="offset points",
                fontsize=7.5,
            )
            last = height


def _profile(analysis: Analysis) -> Drawing:
    """Return the performance profile of the frameworks' speeds over all variants."""
    ratios = profile(analysis)
    first = [
        f"{framework_name(name)} is fastest in {sum(r == 1 for r in of)} of {len(of)}"
        for name, of in ratios.items()
    ]
    return Drawing(
        FigureFile(
            name="performance-profile",
            title="Performance profile of training speed",
            caption="The share of variants and numbers of devices in which a framework takes at "
            "most so many times as long as the fastest (Dolan and Moré 2002): on the left, where "
            "it is the fastest. Rows without a result count as slowest of all. Only variants whose "
            "runs had one kind of machine to themselves are counted.",
            alternative="; ".join(first) + ".",
        ),
        lambda: draw_profile(analysis),
    )


def profile(analysis: Analysis) -> dict[str, list[float]]:
    """Return each framework's time over that of the fastest, for every variant and device count.

    Infinite where it has no usable result. Variants whose speeds do not compare are left out.
    """
    ratios: dict[str, list[float]] = {name: [] for name in _frameworks(analysis.rows)}
    for rows in grouped(analysis.rows):
        speeds = {
            row.framework: speed
            for row in rows
            if row.usable and (speed := row.value("tokens_per_second"))
        }
        if comparable("tokens_per_second", (row for row in rows if row.framework in speeds)):
            fastest = max(speeds.values())
            for name, of in ratios.items():
                of.append(fastest / speeds[name] if name in speeds else math.inf)
    return ratios


def draw_profile(analysis: Analysis) -> Figure:
    """Draw each framework's performance profile as steps."""
    ratios = profile(analysis)
    named = _framework_keys(list(ratios), "solid")
    columns = columns_for([handle.get_label() for handle in named], 5)
    figure, [[axes]] = panels(1, height=1.9, above=0.15, legend=legend_lines(named, columns))
    finite = [r for of in ratios.values() for r in of if math.isfinite(r)]
    end = max(finite, default=1.0) * 1.05
    for index, (name, of) in enumerate(ratios.items()):
        steps = sorted(r for r in of if math.isfinite(r))
        x = [1.0, *steps, end]
        y = [0.0, *(np.arange(1, len(steps) + 1) / len(of)), len(steps) / len(of)]
        axes.plot(
            x,
            y,
            drawstyle="steps-post",
            color=FRAMEWORK_COLOURS[name],
            marker=FRAMEWORK_MARKERS[name],
            markevery=(1 + index % 2, 3),
            linestyle=DASHES[index % len(DASHES)],
        )
    logarithmic = end > 4
    if logarithmic:
        axes.set_xscale("log")
    axes.set_xlim(1, end)
    axes.set_ylim(0, 1.03)
    number_ticks(axes.xaxis, (), logarithmic)
    axes.grid(axis="both")
    axes.set_xlabel("Time / time of the fastest")
    axes.set_ylabel("Share of problems")
    add_legend(figure, named, columns)
    return figure


# Where the time went


def clock_parts(row: RowResult) -> dict[str, float]:
    """Return the mean seconds by clock; they add up to the mean total. Empty without results."""
    if not row.n_ok:
        return {}

    def mean(clock: str) -> float:
        seconds = row.seeds(f"{clock}_seconds")
        return float(np.mean(seconds)) if seconds else 0.0

    parts = {clock: mean(clock) for clock in CLOCKS if clock != "other"}
    return {**parts, "other": max(0.0, mean("total") - sum(parts.values()))}


def _seconds(analysis: Analysis) -> Drawing:
    """Return the figure of where the time of a run went."""
    metric = METRICS["total_seconds"]

    def text(row: RowResult) -> str | None:
        parts = clock_parts(row)
        if not parts:
            return None
        total, training = (write_seconds(s) for s in (sum(parts.values()), parts["training"]))
        return f"{total}, training {training}"

    many = len(grouped(analysis.rows)) > SINGLY
    groups = _finished_by_all(analysis)
    return Drawing(
        FigureFile(
            name="seconds",
            title="Where the time of a run went",
            caption=_sentences(
                "Wall-clock seconds of one run by clock, means over seeds; the clocks do not "
                "overlap.",
                _unfair(analysis),
                f"A bar is the mean over those {len(groups)} of {len(grouped(analysis.rows))} "
                "variants and numbers of devices that all frameworks shown have finished."
                if many
                else None,
            ),
            alternative="Mean seconds of a run. " + _describe(analysis, text, metric),
        ),
        lambda: draw_seconds(analysis),
    )


def _finished_by_all(analysis: Analysis) -> list[list[RowResult]]:
    """Return the rows of each variant and device count that every framework with any result has."""
    shown = {row.framework for row in analysis.rows if row.n_ok}
    groups = ([row for row in rows if row.n_ok] for rows in grouped(analysis.rows))
    return [rows for rows in groups if rows and {row.framework for row in rows} == shown]


def draw_seconds(analysis: Analysis) -> Figure:
    """Draw where the time of a run went, by clock, as stacked bars."""
    groups = grouped(analysis.rows)
    bars: list[tuple[str, str, Mapping[str, float]]] = []  # title of its group, name, parts
    if len(groups) <= SINGLY:
        several = len({row.devices for row in analysis.rows}) > 1
        for rows in groups:
            title = _row_label(analysis, rows[0], several)
            bars += [(title, framework_name(r.framework), clock_parts(r)) for r in rows]
    else:
        for name in _frameworks(analysis.rows):
            own = (row for rows in _finished_by_all(analysis) for row in rows)
            found = [clock_parts(row) for row in own if row.framework == name]
            mean = {clock: float(np.mean([p[clock] for p in found])) for clock in CLOCKS if found}
            bars.append(("", framework_name(name), mean))
    titles = list(dict.fromkeys(title for title, *_ in bars))
    lines = len(bars) + (len(titles) if len(titles) > 1 else 0)
    handles = [Patch(facecolor=colour, label=name) for name, colour in CLOCKS.values()]
    figure, [[axes]] = panels(
        1, height=ROW_HEIGHT * lines + 0.1, left=1.0, right=0.95, above=0.12, legend=2
    )
    longest = max((sum(parts.values()) for *_, parts in bars), default=0.0)
    unit, scale = time_unit(longest)
    ticks, at = [], 0
    for title in titles:
        if len(titles) > 1:
            _heading(axes, at, title)
            at += 1
        for _, name, parts in (bar for bar in bars if bar[0] == title):
            left = 0.0
            for clock, seconds in parts.items():
                width = seconds / scale
                colour = CLOCKS[clock][1]
                axes.barh(at, width, left=left, height=0.62, color=colour, linewidth=0)
                left += width
            axes.annotate(
                write_seconds(left * scale) if parts else "no result",
                (1, at),
                xycoords=("axes fraction", "data"),
                xytext=(62, 0),
                textcoords="offset points",
                ha="right",
                va="center",
                fontsize=9,
                color=INK if parts else MUTED,
            )
            ticks.append((at, name))
            at += 1
    axes.set_ylim(at - 0.4, -0.6)
    axes.set_yticks([place for place, _ in ticks], [name for _, name in ticks])
    axes.set_xlim(0, 1.02 * longest / scale or 1)
    number_ticks(axes.xaxis, ())
    axes.grid(axis="x")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(f"{unit.capitalize()} of a run")
    add_legend(figure, handles, 5)
    return figure
