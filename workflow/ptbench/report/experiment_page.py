"""The page of one experiment, from its `Analysis` and its figures.

Words, numbers and links only: `ptbench.analysis` makes the numbers and `figures.py` the figures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from ptbench.analysis import headline
from ptbench.analysis.experiment import Analysis, PairResult, PublishedResult, RowResult
from ptbench.analysis.metrics import METRICS, NOTHING, Metric, write_bytes
from ptbench.analysis.reaching import Reaching
from ptbench.analysis.statistics import SIGNIFICANCE, Difference, t_quantile
from ptbench.analysis.variants import BestVariant, TrendResult, VariantComparison
from ptbench.report import formatting, words
from ptbench.report.criteria import criteria_of
from ptbench.report.formatting import FIGURE_SPACE, group_key, group_title, grouped
from ptbench.report.opening import opening
from ptbench.report.profiles import GREATTI, PHASES, profiles_of
from ptbench.report.runs import runs_of, versions_of
from ptbench.report.site import Site
from ptbench.report.svg import inline_svg
from ptbench.report.tables import printed_metrics

CELL_FILES = ("metrics.json", "history.csv", "provenance.json", "recipe.yaml")
TABLE_FILES = (
    "table.csv",
    "table.md",
    "table.tex",
    "differences.csv",
    "variants.csv",
    "comparison.csv",
    "curves.csv",
    "analysis.json",
)


class Line(NamedTuple):
    """One row of the results: for each metric its number, and its interval or quartiles."""

    row: RowResult
    texts: list[tuple[str, str]]


class Group(NamedTuple):
    """Rows that differ by framework alone."""

    title: str
    common: str  # what all of them share: metrics that are the same in every row
    lines: list[Line]


class Matrix(NamedTuple):
    """Verdicts between the frameworks of one variant and number of devices."""

    title: str
    frameworks: list[str]
    pairs: dict[tuple[str, str], PairResult]  # (row, column); the row is pair.b


class VariantTable(NamedTuple):
    """Variants against the baseline at one number of devices, by framework."""

    devices: int
    frameworks: list[str]
    lines: dict[str, dict[str, VariantComparison]]  # by label, then by framework


def write_experiment_page(site: Site, analysis: Analysis, folder: Path) -> Path:
    """Write experiments/{name}.html and return where it is.

    Args:
        site: the report.
        analysis: the experiment.
        folder: with the tables and figures that the page shows and links to.
    """
    figures = [
        (file, inline_svg(folder / "figures" / f"{file.name}.svg", f"figure-{index}"))
        for index, file in enumerate(analysis.figures)
    ]
    columns, groups = results_table(analysis)
    profiles = profiles_of(analysis.rows, site.results)
    finished = [row for row in analysis.rows if row.n_ok or row.n_diverged]
    speeds = headline.compare_speeds(headline.groups_of([analysis]))
    perplexities = headline.compare_perplexities([analysis])
    kinds = {pair.outcome.test.kind for pair in analysis.pairs if pair.outcome.test}
    return site.write(
        "experiment.html.j2",
        f"experiments/{analysis.name}.html",
        analysis=analysis,
        folder=folder,
        columns=columns,
        groups=groups,
        printed=printed_metrics(analysis),
        variant_tables=_variant_tables(analysis),
        interval=_interval,
        header=formatting.format_header,
        places=_places(analysis),
        matrices=_matrices(analysis),
        tests=" and ".join(sorted(kinds)),
        opening=opening(speeds, finished, perplexities),
        compared=speeds is not None,
        words=words,
        figures=figures,
        published=[
            (metric, found)
            for name, metric in METRICS.items()
            if (found := [line for line in analysis.published if line.published.metric == name])
        ],
        reaching=_reaching(analysis),
        rents=words.rents_sentence(analysis),
        published_value=formatting.format_published,
        ours=_ours,
        expected=_expected,
        runs=runs_of(analysis.rows, site.results),
        profiles=profiles,
        criteria=criteria_of(analysis.rows, profiles),
        phases=PHASES,
        greatti=GREATTI,
        milliseconds=lambda seconds: f"{seconds * 1e3:.3g}",
        write_bytes=write_bytes,
        machines=_distinct(analysis, "machines"),
        commits=_distinct(analysis, "commits"),
        versions=versions_of(analysis.rows),
        rows=finished,
        fairness=words.fairness(finished),
        cell_files=CELL_FILES,
        table_files=[name for name in TABLE_FILES if (folder / name).exists()],
    )


def _distinct(analysis: Analysis, field: str) -> list[str]:
    return sorted({value for row in analysis.rows for value in getattr(row, field)})


def results_table(analysis: Analysis) -> tuple[list[Metric], list[Group]]:
    """Return the columns of the results and their lines.

    A metric that is the same in all frameworks of every group, such as the parameters, is said
    once for the group and has no column.
    """
    metrics = printed_metrics(analysis)
    texts = {metric.name: _column(metric, analysis.rows) for metric in metrics}
    indices = [
        [index for index, _ in group]
        for _, group in groupby(enumerate(analysis.rows), key=lambda pair: group_key(pair[1]))
    ]
    common = [metric for metric in metrics if _is_common(texts[metric.name], indices)]
    columns = [metric for metric in metrics if metric not in common]
    groups = []
    for own in indices:
        shared = []
        for metric in common:
            said = next((texts[metric.name][i][0] for i in own if texts[metric.name][i][0]), "")
            if said != NOTHING:
                shared.append(f"{metric.title.lower()} {said}")
        groups.append(
            Group(
                group_title(analysis.rows[own[0]]),
                ", ".join(shared),
                [Line(analysis.rows[i], [texts[m.name][i] for m in columns]) for i in own],
            )
        )
    return columns, groups


def _is_common(column: Sequence[tuple[str, str]], groups: Sequence[Sequence[int]]) -> bool:
    """Return whether a column says the same in all rows of each group that have a number."""
    if any(sub for _, sub in column) or max(map(len, groups)) == 1:
        return False
    return all(len({column[i][0] for i in own} - {NOTHING}) < 2 for own in groups)


def _column(metric: Metric, rows: Sequence[RowResult]) -> list[tuple[str, str]]:
    """Return what all rows show of a metric: its number with ±, and its interval or quartiles."""
    summaries = [row.metrics.get(metric.name) for row in rows]
    stds = [formatting.format_std(summary).removeprefix("± ") for summary in summaries]
    width = max(map(len, stds))
    column = []
    for summary, std in zip(summaries, stds, strict=True):
        text = metric.text(summary.value if summary else None)
        if width and summary:  # padded, so that the signs stand below one another
            text += f" {'±' if std else ' '} {std.rjust(width, FIGURE_SPACE)}"
        column.append((text, metric.spread_text(summary)))
    return column


def _variant_tables(analysis: Analysis) -> list[VariantTable]:
    tables: dict[int, VariantTable] = {}
    for each in analysis.comparisons:
        table = tables.setdefault(each.devices, VariantTable(each.devices, [], {}))
        if each.framework not in table.frameworks:
            table.frameworks.append(each.framework)
        table.lines.setdefault(analysis.label(each.variant), {})[each.framework] = each
    return [tables[devices] for devices in sorted(tables)]


def _interval(outcome: Difference) -> str:
    """Write the interval that a verdict rests on: of equivalence 90 %, else 95 %."""
    test = outcome.test
    if test is None:
        return ""
    half = (test.high - test.low) / 2
    if outcome.verdict == "equivalent":
        freedom = test.degrees_of_freedom
        half *= t_quantile(1 - SIGNIFICANCE, freedom) / t_quantile(1 - SIGNIFICANCE / 2, freedom)
    ends = (math.expm1(test.difference + each) for each in (-half, half))
    return " to ".join(map(formatting.format_percent, ends))


def _places(
    analysis: Analysis,
) -> dict[tuple[str, int], tuple[BestVariant | None, list[TrendResult]]]:
    """Return the best variant and the trends of each framework and number of devices."""
    best = {(each.framework, each.devices): each for each in analysis.best}
    trends: dict[tuple[str, int], list[TrendResult]] = {}
    for each in analysis.trends:
        trends.setdefault((each.framework, each.devices), []).append(each)
    rows = dict.fromkeys((row.framework, row.devices) for row in analysis.rows)
    return {
        place: (best.get(place), trends.get(place, []))
        for place in rows
        if place in best or place in trends
    }


def _matrices(analysis: Analysis) -> list[Matrix]:
    """Return the verdicts of every group of rows that has at least two frameworks."""
    matrices = []
    for rows in grouped(analysis.rows):
        pairs = [p for p in analysis.pairs if (p.variant, p.devices) == group_key(rows[0])]
        if pairs:
            frameworks = [row.framework for row in rows]
            matrices.append(
                Matrix(group_title(rows[0]), frameworks, {(p.b, p.a): p for p in pairs})
            )
    return matrices


def _reaching(analysis: Analysis) -> list[tuple[str, Reaching]]:
    """Return what the frameworks took to a perplexity, with the title of each group."""
    titles = {group_key(row): group_title(row) for row in analysis.rows}
    return [(titles[each.variant, each.devices], each) for each in analysis.reaching]


def _ours(line: PublishedResult) -> str:
    """Write our value."""
    return NOTHING if line.ours is None else _written(line, line.ours)


def _expected(line: PublishedResult) -> str:
    """Write where another run was to be expected, by which the number was judged."""
    if line.expected_low is None or line.expected_high is None:
        return NOTHING
    return f"{_written(line, line.expected_low)} to {_written(line, line.expected_high)}"


def _written(line: PublishedResult, value: float) -> str:
    if line.published.over:
        return formatting.format_ratio(value)
    return METRICS[line.published.metric].write(value)
