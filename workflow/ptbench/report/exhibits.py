"""A document's tables and figures in their own shape: ours filled, the document's open.

`{id}.svg` and `.csv` of each exhibit that can be drawn; of tables `.csv` and `.tex`.
`ptbench.analysis.exhibits` has the numbers.
"""

from __future__ import annotations

import csv
import io
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from ptbench.analysis.exhibits import ExhibitCell, ExhibitLine, ExhibitResult
from ptbench.analysis.metrics import METRICS, NOTHING, PERPLEXITY
from ptbench.analysis.published import PublishedValue
from ptbench.analysis.variants import is_geometric
from ptbench.configuration.papers import NamedRow
from ptbench.files import write_atomically
from ptbench.report.drawing import WIDTH, cross, number_ticks, save, style
from ptbench.report.formatting import format_published
from ptbench.report.palette import FRAMEWORK_COLOURS, INK, LIGHT_BACKGROUND, MUTED
from ptbench.report.tables import LATEX

# Lines of one figure: no two are alike in grey, because dashes change with every colour.
COLOURS = (INK, *FRAMEWORK_COLOURS.values())
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)))


class Curve(NamedTuple):
    """One run's perplexities by epoch."""

    diverged: bool
    epochs: list[int]
    values: dict[str, list[float]]  # by metric: train_perplexity, valid_perplexity


Curves = Mapping[NamedRow, Sequence[Curve]]


def write_exhibits(results: Sequence[ExhibitResult], curves: Curves, folder: Path) -> None:
    """Write the files of every exhibit that is drawn.

    Args:
        results: the exhibits.
        curves: of every row that an exhibit of kind `curves` names.
        folder: of the document; `exhibits` and `tables` are made in it.
    """
    for name in ("exhibits", "tables"):  # there in any case, because they are the rule's outputs
        (folder / name).mkdir(parents=True, exist_ok=True)
    for result in results:
        exhibit = result.exhibit
        if result.missing or exhibit.kind == "settings":
            continue
        stem = folder / "exhibits" / exhibit.id
        write_atomically(stem.with_name(f"{exhibit.id}.csv"), exhibit_csv(result))
        if exhibit.kind == "table":
            write_atomically(folder / "tables" / f"{exhibit.id}.tex", exhibit_latex(result))
            continue
        with style():
            figure = draw_curves(result, curves) if exhibit.kind == "curves" else draw_sweep(result)
            save(figure, stem)


def curve_rows(results: Sequence[ExhibitResult]) -> set[NamedRow]:
    """Return the rows whose curves are drawn."""
    drawn = (r for r in results if r.exhibit.kind == "curves" and not r.missing)
    return {line.row for result in drawn for line in result.lines}


def is_drawn(result: ExhibitResult) -> bool:
    """Return whether an exhibit has a figure."""
    return result.exhibit.kind in ("curves", "sweep", "scaling") and not result.missing


# Words and numbers ------------------------------------------------------------------------------


def title_of(result: ExhibitResult, metric: str) -> str:
    """Return the heading of a column or the label of an axis."""
    if result.exhibit.relative_to is None:
        return METRICS[metric].label
    return f"{METRICS[metric].title} over that of {result.exhibit.relative_to}"


def published_text(result: ExhibitResult, metric: str, value: PublishedValue | None) -> str:
    """Write a published number as the exhibit does; a dash where there is none."""
    if value is None:
        return NOTHING
    return format_published(value, lambda number: _text(result, metric, number))


def our_text(result: ExhibitResult, metric: str, line: ExhibitLine) -> str:
    """Write our number, ± its standard deviation; or why there is none."""
    ours = line.cells[metric].ours
    if ours is None:
        return "diverged" if line.n_diverged and not line.n_ok else NOTHING
    text = _text(result, metric, ours.value)
    return text if ours.std is None else f"{text} ± {_text(result, metric, ours.std)}"


def seeds_text(line: ExhibitLine) -> str:
    """Write how many seeds ended well, of those planned."""
    if not line.n_planned:
        return "not in the study"
    diverged = f", {line.n_diverged} diverged" if line.n_diverged else ""
    return f"{line.n_ok}/{line.n_planned}{diverged}"


def _text(result: ExhibitResult, metric: str, value: float) -> str:
    return f"{value:.3g}" if result.exhibit.relative_to else METRICS[metric].write(value)


def in_words(result: ExhibitResult) -> str:
    """Return what an exhibit shows, for those who cannot see it."""
    parts = []
    for metric in result.exhibit.metrics:
        lines = "; ".join(
            f"{line.label}: {our_text(result, metric, line)}"
            f" (published {published_text(result, metric, line.cells[metric].published)})"
            for line in result.lines
        )
        parts.append(f"{title_of(result, metric)}. {lines}.")
    return " ".join(parts)


def exhibit_csv(result: ExhibitResult) -> str:
    """Return an exhibit as CSV: a line for each row and metric, in full precision."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        (
            "label", "variant", "framework", "devices", "metric", "n_ok", "n_diverged", "n_planned",
            "ours", "ours_std", "ours_low", "ours_high", "published_kind", "published",
            "published_std", "verdict",
        )
    )  # fmt: skip
    for line, metric in itertools.product(result.lines, result.exhibit.metrics):
        cell = line.cells[metric]
        ours, theirs = cell.ours, cell.published
        numbers = (ours.value, ours.std, ours.low, ours.high) if ours else (None,) * 4
        said = (theirs.kind, theirs.value, theirs.std) if theirs else (None,) * 3
        counts = (line.n_ok, line.n_diverged, line.n_planned)
        writer.writerow((line.label, *line.row, metric, *counts, *numbers, *said, cell.verdict))
    return text.getvalue()


def exhibit_latex(result: ExhibitResult) -> str:
    r"""Return a table as LaTeX, the document's in brackets; needs `\usepackage{booktabs}`."""
    metrics = result.exhibit.metrics
    head = " & ".join(["", "Seeds", *(title_of(result, m).translate(LATEX) for m in metrics)])
    body = []
    for line in result.lines:
        cells = []
        for metric in metrics:
            theirs = line.cells[metric].published
            said = f" ({published_text(result, metric, theirs)})" if theirs else ""
            cells.append(our_text(result, metric, line) + said)
        texts = (line.label, seeds_text(line), *cells)
        body.append(" & ".join(text.translate(LATEX) for text in texts) + r" \\")
    caption = f"{result.exhibit.title}: ours, and in brackets those of {result.exhibit.number}."
    return "\n".join(
        [
            r"% needs \usepackage{booktabs}",
            r"\begin{table*}",
            r"\centering",
            rf"\caption{{{caption.translate(LATEX)}}}",
            rf"\label{{tab:{result.exhibit.id}}}",
            rf"\begin{{tabular}}{{lr{'r' * len(metrics)}}}",
            r"\toprule",
            head + r" \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table*}",
            "",
        ]
    )


# Figures ----------------------------------------------------------------------------------------


def draw_sweep(result: ExhibitResult) -> Figure:
    """Draw a sweep or a scaling: a panel for each metric, ours filled, the document's open."""
    figure, panels = _panels(result)
    at, is_number = _positions([line.label for line in result.lines])
    for axes, metric in zip(panels, result.exhibit.metrics, strict=True):
        cells = [line.cells[metric] for line in result.lines]
        _draw_ours(axes, at, cells)
        _draw_published(axes, at, cells)
        _mark_diverged(axes, at, result.lines, metric)
        axes.set_ylabel(title_of(result, metric))
        _number_perplexities(axes, metric)
        if is_number:
            if result.exhibit.relative_to:
                axes.set_ylim(0, 1.05 * at[-1] / at[0])
                axes.plot(at, [x / at[0] for x in at], color=MUTED, linewidth=1, zorder=1)
                axes.annotate("ideal", (at[-1], at[-1] / at[0]), color=MUTED, ha="right")
            if is_geometric(at):
                axes.set_xscale("log")
            axes.set_xticks(at, [f"{x:g}" for x in at])
            axes.xaxis.set_minor_locator(NullLocator())
        else:
            axes.set_xticks(at, [line.label for line in result.lines], rotation=30, ha="right")
        axes.set_xlabel((result.exhibit.x or "").replace("_", " "))
    panels[0].legend(loc="best")
    return figure


def _panels(result: ExhibitResult) -> tuple[Figure, list[Axes]]:
    count = len(result.exhibit.metrics)
    width = WIDTH if count == 1 else 1.5 * WIDTH
    figure = Figure(figsize=(width, 3.0), layout="constrained")
    panels = [figure.add_subplot(1, count, index + 1) for index in range(count)]
    for axes in panels:
        axes.grid(axis="y")
    return figure, panels


def _positions(labels: Sequence[str]) -> tuple[list[float], bool]:
    try:
        return [float(label) for label in labels], True
    except ValueError:
        return [float(index) for index in range(len(labels))], False


def _draw_ours(axes: Axes, at: Sequence[float], cells: Sequence[ExhibitCell]) -> None:
    found = [(x, cell.ours) for x, cell in zip(at, cells, strict=True) if cell.ours]
    axes.plot(
        [x for x, _ in found], [ours.value for _, ours in found], "o-", color=INK, markersize=5,
        linewidth=1.6, label="ours", zorder=3,
    )  # fmt: skip
    bars = [(x, o.low, o.high) for x, o in found if o.low is not None and o.high is not None]
    if bars:
        axes.vlines(*zip(*bars, strict=True), color=INK, linewidth=1.2, zorder=2)


def _draw_published(axes: Axes, at: Sequence[float], cells: Sequence[ExhibitCell]) -> None:
    found = [
        (x, cell.published)
        for x, cell in zip(at, cells, strict=True)
        if cell.published and math.isfinite(cell.published.value)
    ]
    if not found:
        return
    axes.plot(
        [x for x, _ in found], [value.value for _, value in found], "s--", color=MUTED,
        markerfacecolor=LIGHT_BACKGROUND, markersize=5.5, linewidth=1.1, zorder=4,
        label="published",
    )  # fmt: skip
    for x, value in found:
        if value.std:
            ends = [value.value - value.std, value.value + value.std]
            axes.plot([x, x], ends, color=MUTED, linewidth=1, zorder=2)


def _mark_diverged(
    axes: Axes, at: Sequence[float], lines: Sequence[ExhibitLine], metric: str
) -> None:
    """Put a cross on the upper edge where seeds diverged."""
    if METRICS[metric].kind is not PERPLEXITY:
        return
    label = "seeds diverged"
    for x, line in zip(at, lines, strict=True):
        if line.n_diverged:
            cross(axes, x, None, INK, label)
            label = ""  # once in the legend


def _number_perplexities(axes: Axes, metric: str) -> None:
    """Draw perplexities on a logarithmic axis, other metrics from zero; number both plainly."""
    logarithmic = METRICS[metric].kind is PERPLEXITY
    if logarithmic:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    number_ticks(axes.yaxis, (), logarithmic)


def draw_curves(result: ExhibitResult, curves: Curves) -> Figure:
    """Draw perplexities by epoch: a line for each row, a band from the best to the worst seed.

    The published perplexity, which is that of the best epoch, is an open square at the line's end.
    """
    figure, panels = _panels(result)
    for axes, metric in zip(panels, result.exhibit.metrics, strict=True):
        for index, line in enumerate(result.lines):
            colour, dashes = COLOURS[index % len(COLOURS)], DASHES[index % len(DASHES)]
            end = _draw_runs(axes, curves.get(line.row, ()), metric, line.label, colour, dashes)
            theirs = line.cells[metric].published
            if theirs and theirs.kind == "number" and math.isfinite(theirs.value):
                axes.plot(
                    end, theirs.value, "s", color=colour, markerfacecolor=LIGHT_BACKGROUND,
                    markersize=6, clip_on=False, zorder=5,
                )  # fmt: skip
        axes.set_ylabel(METRICS[metric].title)
        axes.set_xlabel("Epoch")
        _number_perplexities(axes, metric)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
    handles, labels = panels[0].get_legend_handles_labels()
    longest = max(map(len, labels), default=0)
    figure.legend(handles, labels, loc="outside lower left", ncols=2 if longest < 30 else 1)
    return figure


def _draw_runs(
    axes: Axes,
    runs: Sequence[Curve],
    metric: str,
    label: str,
    colour: str,
    dashes: str | tuple[float, Sequence[float]],
) -> int:
    """Draw the seeds of one row; return the epoch of the line's end.

    The line is the mean of the seeds as far as all of them were trained; thin lines are the rest.
    """
    good = [run for run in runs if not run.diverged]
    every = min((len(run.epochs) for run in good), default=0)
    logs = np.log([run.values[metric][:every] for run in good]).reshape(len(good), every)
    x = range(1, every + 1)
    axes.plot(
        x, np.exp(logs.mean(axis=0)) if good else [], linestyle=dashes, color=colour, linewidth=1.6,
        marker="o" if every == 1 else None, label=label, zorder=3,
    )  # fmt: skip
    if good:
        ends = np.exp([logs.min(axis=0), logs.max(axis=0)])
        axes.fill_between(x, *ends, color=colour, alpha=0.15, linewidth=0)
    for run in good:
        rest = slice(every - 1, None)
        axes.plot(run.epochs[rest], run.values[metric][rest], color=colour, linewidth=0.7, zorder=2)
    for run in runs:
        finite = [
            (epoch, value)
            for epoch, value in zip(run.epochs, run.values[metric], strict=True)
            if run.diverged and math.isfinite(value)
        ]
        if finite:
            axes.plot(
                *finite[-1], "X", color=colour, markeredgecolor=LIGHT_BACKGROUND, markersize=8,
                clip_on=False, zorder=5,
            )  # fmt: skip
    return max(every, 1)
