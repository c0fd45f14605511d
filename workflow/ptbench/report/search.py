"""The page of one search, with its figures, its trials as CSV, and its winner as a recipe."""

from __future__ import annotations

import csv
import io
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ptbench.analysis.experiment import FigureFile
from ptbench.analysis.metrics import METRICS
from ptbench.analysis.search import SearchResult, Trial, ranked, read_search
from ptbench.configuration.search import Shown, bounds
from ptbench.configuration.specification import format_override, reductions
from ptbench.files import write_atomically
from ptbench.report import words
from ptbench.report.drawing import (
    number_ticks,
    panels,
    ramp,
    save,
    set_limits,
    spans,
    style,
    time_unit,
)
from ptbench.report.palette import CLOCKS, GRID, INK, LIGHT_BACKGROUND, MUTED
from ptbench.report.site import Site
from ptbench.report.svg import inline_svg

BLUE = CLOCKS["training"][1]
ABSENT = -0.12  # where a line of parallel coordinates passes a key that its trial does not have
MOST_SHOWN = 25  # trials on the page itself; the rest is folded


def write_search(
    site: Site, contest: Shown, results: Path, output: Path, partial: bool = False
) -> Path:
    """Write what a search came to, as far as it is, and return where its page is.

    Writes trials.csv, recipe.yaml and figures/*.svg; search.json last of these, because it tells
    that the others are there.

    Args:
        site: the report.
        contest: the search.
        results: the results folder.
        output: made if need be.
        partial: whether runs may be under way.
    """
    result = read_search(contest, results, partial)
    figures = list(drawings(result))
    (output / "figures").mkdir(parents=True, exist_ok=True)
    with style():
        for file, draw in figures:
            save(draw(), output / "figures" / file.name)
    for name, text in {
        "trials.csv": trials_csv(result),
        "recipe.yaml": result.recipe or f"# The winner is {result.undecided}.\n",
        "search.json": result.model_dump_json(indent=1) + "\n",
    }.items():
        write_atomically(output / name, text)
    ranks = {trial.cell: rank for rank, trial in enumerate(result.ranked, start=1)}
    best_first = sorted(shown_trials(result), key=lambda trial: ranks.get(trial.cell, math.inf))
    return site.write(
        "search.html.j2",
        f"searches/{contest.name}.html",
        search=result,
        folder=output,
        trials=best_first,
        ranks=ranks,
        shown=MOST_SHOWN,
        value=lambda trial, key: value_text((trial.point or {}).get(key)),
        space={key: words_of(result, key) for key in contest.space.dimensions},
        words=words,
        reduced=words.reduced_warning(reductions(contest.name), of_document=False),
        figures=[
            (file, inline_svg(output / "figures" / f"{file.name}.svg", f"figure-{index}"))
            for index, (file, _) in enumerate(figures)
        ],
    )


def shown_trials(result: SearchResult) -> list[Trial]:
    """Return all trials, with what others found among them, in the order of the draws."""
    return [*result.trials, *filter(None, [result.published])]


def value_text(value: object) -> str:
    """Write a key's value; a dash if the trial does not have it."""
    return "–" if value is None else format_override(value)


def words_of(result: SearchResult, key: str) -> str:
    """Say in words what was tried of a key."""
    dimension = result.contest.space.dimensions[key]
    if dimension.same_as is not None:
        text = f"as {dimension.same_as}"
    elif dimension.choices is not None:
        text = ", ".join(map(format_override, dimension.choices))
    else:
        low, high = bounds(dimension)
        text = f"{format_override(low)} to {format_override(high)}"
        text += f" by {format_override(dimension.step)}" if dimension.step is not None else ""
        text += ", by its logarithm" if dimension.log else ""
    for parent, among in dimension.when.items():
        text += f", where {parent} is {' or '.join(map(format_override, among))}"
    return text


def trials_csv(result: SearchResult) -> str:
    """Return a line for each trial: its values, how it ended and what it came to."""
    columns = list(result.contest.space.dimensions)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["trial", "state", "valid_nll", "valid_perplexity", "seconds", *columns, "cell"]
    )
    for trial in shown_trials(result):
        point = trial.point or {}
        own = [point.get(key, "") for key in columns]
        name = trial.number or "published"
        numbers = (trial.nll, trial.perplexity, trial.seconds)
        writer.writerow([name, trial.state, *numbers, *own, trial.cell])
    return text.getvalue()


def drawings(result: SearchResult) -> Iterator[tuple[FigureFile, Callable[[], Figure]]]:
    """Yield the figures that have something to show."""
    best = ranked(result.trials)
    if not best:
        return
    write = METRICS["valid_perplexity"].write
    yield (
        FigureFile(
            name="best-so-far",
            title="The best trial so far",
            caption="Lowest validation perplexity of the trials so far, by their number and by the "
            "time that they took one after another, without failed attempts. Dots are trials; "
            "crosses at the upper edge diverged or failed. The dashed line is the published recipe "
            "at the same budget.",
            alternative=f"Of {len(result.trials)} trials, number {best[0].number} is the best, "
            f"with a validation perplexity of {write(best[0].perplexity or math.nan)}.",
        ),
        lambda: draw_best(result),
    )
    yield (
        FigureFile(
            name="parallel-coordinates",
            title="What good trials have in common",
            caption="Each line is a trial that ended well; blue ones are the best, orange ones the "
            "worst, by rank; left of an axis the trial does not have the key. The dashed line is "
            "the published recipe, at the edge where it lies beyond the axis.",
            alternative="The best trial has "
            + ", ".join(f"{key} {value_text(v)}" for key, v in (best[0].point or {}).items())
            + ".",
        ),
        lambda: draw_parallel(result),
    )
    if result.importances:
        yield (
            FigureFile(
                name="importance",
                title="Which keys matter",
                caption="Share of the variance of the validation log-likelihood over trials that a "
                "key explains alone (functional ANOVA of a random forest, by Optuna), of keys that "
                "all trials have. What is left to 1 is of keys together.",
                alternative=", ".join(f"{k} {v:.2f}" for k, v in result.importances.items()) + ".",
            ),
            lambda: draw_importance(result.importances),
        )


def draw_best(result: SearchResult) -> Figure:
    """Draw the lowest perplexity so far, by trials and by time."""
    figure, [[by_trial, by_time]] = panels(1, 2, height=2.0, width=7.0, left=1.1, aside=0.95)
    seconds = list(itertools.accumulate(trial.seconds or 0.0 for trial in result.trials))
    unit, scale = time_unit(max(seconds))
    found = [trial.perplexity for trial in result.trials]
    beside = result.published.perplexity if result.published else None
    values = [value for value in [*found, beside] if value is not None]
    for axes, places, label in (
        (by_trial, [float(trial.number) for trial in result.trials], "trials"),
        (by_time, [at / scale for at in seconds], unit),
    ):
        set_limits(axes, values, spans(values))
        good = [(x, y) for x, y in zip(places, found, strict=True) if y is not None]
        axes.plot(*zip(*good, strict=True), "o", color=MUTED, markersize=3, alpha=0.6, mew=0)
        lowest = list(itertools.accumulate((y for _, y in good), min))
        axes.step([x for x, _ in good], lowest, where="post", color=BLUE)
        for x, trial in zip(places, result.trials, strict=True):
            if trial.state in ("diverged", "failed"):
                axes.plot(
                    x, 1.0, "X", color=MUTED, markersize=6, clip_on=False, mew=0,
                    transform=axes.get_xaxis_transform(),
                )  # fmt: skip
        if beside is not None:
            axes.axhline(beside, color=INK, linestyle=(0, (5, 1.6)), linewidth=1)
        axes.set_xlim(0, None)
        number_ticks(axes.xaxis, (), whole=label == "trials")
        axes.set_xlabel(label)
        axes.grid(axis="y")
    by_trial.set_ylabel("validation perplexity")
    return figure


def draw_parallel(result: SearchResult) -> Figure:
    """Draw a line for each trial through its values, coloured by its rank."""
    best = ranked(result.trials)
    keys = result.searched
    height = 0.24 * len(keys) + 0.3
    figure, [[axes]] = panels(1, height=height, left=1.9, above=0.1, below=0.25)
    colours = ramp(len(best))
    for rank in reversed(range(len(best))):
        point = best[rank].point or {}
        places = [place(result, key, point[key]) if key in point else ABSENT for key in keys]
        width = 2.2 if rank == 0 else 1.0
        axes.plot(places, range(len(keys)), color=colours[rank], linewidth=width, zorder=2)
    if result.published is not None:
        point = result.published.point or {}
        places = [min(max(place(result, key, point[key]), ABSENT), 1 - ABSENT) for key in keys]
        axes.plot(places, range(len(keys)), color=INK, linestyle=(0, (5, 1.6)), zorder=3)
    for row, key in enumerate(keys):
        axes.axhline(row, color=GRID, zorder=0, linewidth=0.8)
        for x, text in ticks(result, key):
            axes.text(
                x, row, text, fontsize=7.5, color=MUTED, ha="center", va="center", zorder=4,
                bbox={"facecolor": LIGHT_BACKGROUND, "edgecolor": "none", "pad": 0.6, "alpha": 0.8},
            )  # fmt: skip
    axes.set_xlim(ABSENT - 0.05, 1.05 - ABSENT)
    axes.set_ylim(len(keys) - 0.5, -0.5)
    axes.set_yticks(range(len(keys)), [key.replace("_", " ") for key in keys])
    bare(axes)
    return figure


def draw_importance(importances: Mapping[str, float]) -> Figure:
    """Draw a bar for each key."""
    figure, [[axes]] = panels(1, height=0.26 * len(importances) + 0.1, left=1.9, above=0.1)
    axes.barh(range(len(importances)), list(importances.values()), color=BLUE, height=0.6)
    axes.set_yticks(range(len(importances)), [key.replace("_", " ") for key in importances])
    axes.set_ylim(len(importances) - 0.5, -0.5)
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of the variance")
    number_ticks(axes.xaxis, ())
    return figure


def bare(axes: Axes) -> None:
    """Take away the horizontal axis, whose numbers mean nothing."""
    axes.set_xticks([])
    axes.tick_params(axis="y", length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def place(result: SearchResult, key: str, value: Any) -> float:
    """Return where a value is on its key's axis, from 0 to 1; `ABSENT` if it has no place there."""
    dimension = result.contest.space.dimensions[key]
    if dimension.choices is not None:
        among = value in dimension.choices  # what others found may not be
        last = max(len(dimension.choices) - 1, 1)
        return dimension.choices.index(value) / last if among else ABSENT
    if value is None or (dimension.log and value <= 0):
        return ABSENT
    low, high = bounds(dimension)
    scale = math.log if dimension.log else float
    return (scale(value) - scale(low)) / ((scale(high) - scale(low)) or 1.0)


def ticks(result: SearchResult, key: str) -> list[tuple[float, str]]:
    """Return the values that are written on a key's axis, and where."""
    dimension = result.contest.space.dimensions[key]
    values = dimension.choices if dimension.choices is not None else list(bounds(dimension))
    return [(place(result, key, value), value_text(value)) for value in values]
