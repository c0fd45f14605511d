"""The HTML page: one self-contained file, from the analysis.json of each experiment.

Words, numbers and links only; the numbers are made in `ptbench.analysis`, the figures drawn in
`figures.py`. The page needs no network and no script.
"""

from __future__ import annotations

import math
import os
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from pydantic import Field, ValidationError

from ptbench.analysis.collect import AnalysisError
from ptbench.analysis.experiment import (
    Analysis,
    CellLine,
    FigureFile,
    PairResult,
    PublishedResult,
    RowResult,
)
from ptbench.analysis.statistics import PerplexitySummary, Quartiles
from ptbench.files import write_atomically
from ptbench.model.recipe import Model
from ptbench.report import formatting
from ptbench.report.formatting import (
    FIGURE_SPACE,
    NOTHING,
    align_plus_minus,
    framework_name,
    group_key,
    group_title,
)
from ptbench.report.palette import (
    DARK_BACKGROUND,
    DARK_FRAMEWORK_COLOURS,
    DARK_GRID,
    DARK_INK,
    DARK_MUTED,
    FRAMEWORK_COLOURS,
    GRID,
    INK,
    LIGHT_BACKGROUND,
    MUTED,
    PAGE_VARIABLES,
)
from ptbench.report.tables import format_interval, invalid_mark

SVG = "http://www.w3.org/2000/svg"
XLINK = "http://www.w3.org/1999/xlink"
CELL_FILES = ("metrics.json", "history.csv", "provenance.json", "recipe.yaml")
TABLE_FILES = (
    "table.csv",
    "table.md",
    "table.tex",
    "differences.csv",
    "comparison.csv",
    "analysis.json",
)


class RunFacts(Model):
    """What the page's head says of the workflow that made it."""

    created: str = Field(description="Date and time, as it is to be printed.")
    version: str = Field(description="Version of ptbench.")
    commit: str | None = Field(None, description="Commit of the work tree.")
    dirty: bool = Field(False, description="Whether the work tree had uncommitted changes.")
    machine: str = Field(description="Where the page was made: processor, cores, memory, system.")


@dataclass(frozen=True)
class Line:
    """One row of the results, with its perplexities aligned to those of the other rows."""

    row: RowResult
    test: str
    valid: str


@dataclass(frozen=True)
class Table:
    """The rows that differ by framework alone."""

    title: str
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Matrix:
    """Verdicts between the frameworks of one variant and number of devices."""

    title: str
    frameworks: tuple[str, ...]
    pairs: dict[tuple[str, str], PairResult]  # (row, column), row after column


@dataclass(frozen=True)
class Section:
    """One experiment, as the template needs it."""

    analysis: Analysis
    folder: str  # relative address
    tables: tuple[Table, ...]
    matrices: tuple[Matrix, ...]
    verdicts: Counter[str]
    figures: tuple[tuple[FigureFile, Markup], ...]
    published: tuple[tuple[str, tuple[PublishedResult, ...]], ...]
    runs: tuple[tuple[RowResult, tuple[CellLine, ...]], ...]


def render_report(
    experiment_folders: Sequence[Path], report_folder: Path, run_facts: RunFacts
) -> Path:
    """Write `{report_folder}/index.html` and return its path.

    Args:
        experiment_folders: what `analyse_experiment` wrote, in the order of the page.
        report_folder: made if need be; beside it lies `cells`, which the page links to.
        run_facts: for the head of the page.

    Raises:
        AnalysisError: if a folder has no readable analysis.json or lacks a figure it names.
    """
    sections = [_section(folder, report_folder, i) for i, folder in enumerate(experiment_folders)]
    cells = {cell.path: cell for s in sections for row in s.analysis.rows for cell in row.cells}
    rows = [row for section in sections for row in section.analysis.rows]
    environment = Environment(
        loader=PackageLoader("ptbench.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        perplexity=formatting.format_perplexity,
        count=formatting.format_count,
        percent=formatting.format_percent,
        p=formatting.format_p,
        signed=formatting.format_signed,
        seconds=formatting.format_seconds,
        framework=framework_name,
        metric=formatting.METRIC_NAMES.__getitem__,
        devices=formatting.format_devices,
        epoch=formatting.format_epoch,
        parameters=formatting.format_parameters,
        bytes=formatting.format_bytes,
        interval=format_interval,
        quartile_range=_quartile_range,
        invalid_mark=invalid_mark,
        group_title=group_title,
        published_value=_published_value,
        ours=_ours,
        address=lambda path: quote(path, safe="/+=,.-_"),
    )
    page = environment.get_template("report.html.j2").render(
        sections=sections,
        states=Counter(cell.state for cell in cells.values()),
        planned=len(cells),
        frameworks=[
            (
                name,
                sorted(
                    {v for row in rows if row.framework == name for v in row.framework_versions}
                ),
            )
            for name in FRAMEWORK_COLOURS
            if any(row.framework == name for row in rows)
        ],
        machines=sorted({machine for row in rows for machine in row.machines}),
        commits=sorted({commit for row in rows for commit in row.commits}),
        facts=run_facts,
        cells_at_once=max((row.cells_at_once for row in rows if row.cells_at_once), default=None),
        colours=_colour_rules(),
        cell_files=CELL_FILES,
        table_files=TABLE_FILES,
        effect=lambda nats: None if nats is None else math.expm1(nats),
    )
    path = report_folder / "index.html"
    write_atomically(path, page)
    return path


def _section(folder: Path, report_folder: Path, index: int) -> Section:
    path = folder / "analysis.json"
    try:
        analysis = Analysis.model_validate_json(path.read_bytes())
        figures = tuple(
            (file, inline_svg(folder / "figures" / f"{file.name}.svg", f"figure-{index}-{number}"))
            for number, file in enumerate(analysis.figures)
        )
    except (OSError, ValidationError, ElementTree.ParseError) as error:
        raise AnalysisError(
            f"{folder} is not a whole analysis of an experiment: {error}"
        ) from error
    rows = analysis.rows
    return Section(
        analysis=analysis,
        folder=quote(os.path.relpath(folder, report_folder), safe="/+=,.-_"),
        tables=_tables(analysis),
        matrices=_matrices(analysis),
        verdicts=Counter(pair.outcome.verdict for pair in analysis.pairs),
        figures=figures,
        published=_published_by_metric(analysis),
        runs=tuple((row, row.cells) for row in rows),
    )


def _tables(analysis: Analysis) -> tuple[Table, ...]:
    """The results by variant and number of devices; ± aligned over the whole experiment."""

    def column(summaries: Sequence[PerplexitySummary | None]) -> list[str]:
        pairs = [(s.perplexity, s.perplexity_std) if s else (None, None) for s in summaries]
        return align_plus_minus(pairs, FIGURE_SPACE)

    rows = analysis.rows
    columns = (rows, column([row.test for row in rows]), column([row.valid for row in rows]))
    lines = [Line(*values) for values in zip(*columns, strict=True)]
    return tuple(
        Table(group_title(group[0].row), group)
        for _, each in groupby(lines, key=lambda line: group_key(line.row))
        for group in [tuple(each)]
    )


def _quartile_range(quartiles: Quartiles | None) -> str:
    if quartiles is None or quartiles.n == 1:
        return ""
    low, high = map(formatting.format_count, (quartiles.low, quartiles.high))
    return f"{low} to {high}"


def _matrices(analysis: Analysis) -> tuple[Matrix, ...]:
    titles = {group_key(row): group_title(row) for row in analysis.rows}
    return tuple(
        Matrix(
            title=titles[key],
            frameworks=tuple(
                row.framework for row in analysis.rows if (row.variant, row.devices) == key
            ),
            pairs={(pair.b, pair.a): pair for pair in pairs},
        )
        for key, pairs in groupby(analysis.pairs, key=lambda pair: (pair.variant, pair.devices))
    )


def _published_by_metric(
    analysis: Analysis,
) -> tuple[tuple[str, tuple[PublishedResult, ...]], ...]:
    """The comparison with published numbers, in the order of the metrics."""
    return tuple(
        (metric, lines)
        for metric in formatting.METRIC_NAMES
        if (lines := tuple(li for li in analysis.published if li.published.metric == metric))
    )


def _published_value(line: PublishedResult) -> str:
    """The published value, followed by its standard deviation where one was printed."""
    metric, std = line.published.metric, line.published.std
    text = _number(metric, line.published.value)
    return text if std is None else f"{text} ± {_number(metric, std)}"


def _ours(line: PublishedResult) -> str:
    """Our value, followed by its interval where it has one."""
    if line.ours is None:
        return NOTHING
    text = _number(line.published.metric, line.ours)
    if line.low is None or line.high is None:
        return text
    low, high = (_number(line.published.metric, end) for end in (line.low, line.high))
    return f"{text} ({low} to {high})"


def _number(metric: str, value: float) -> str:
    if metric.endswith("perplexity"):
        return formatting.format_perplexity(value)
    if metric == "parameters":
        return formatting.format_parameters(round(value))
    if metric == "peak_device_memory_bytes":
        return formatting.format_bytes(value)
    if metric in ("training_seconds", "total_seconds"):
        return formatting.format_seconds(value)
    if metric == "seconds_per_epoch":
        return f"{value:,.1f}"
    if metric == "epochs":
        return formatting.format_epoch(value)
    return formatting.format_count(value)


def _colour_rules() -> dict[str, dict[str, str]]:
    light = {"ink": INK, "muted": MUTED, "grid": GRID, "background": LIGHT_BACKGROUND}
    dark = {
        "ink": DARK_INK,
        "muted": DARK_MUTED,
        "grid": DARK_GRID,
        "background": DARK_BACKGROUND,
    }
    return {
        "light": light | FRAMEWORK_COLOURS,
        "dark": dark | DARK_FRAMEWORK_COLOURS,
    }


def inline_svg(path: Path, prefix: str) -> Markup:
    """The drawing as an element of the page.

    Its ids get a prefix, as two drawings on a page must not share one, and its colours become the
    page's variables, so that it follows the reader's choice of light or dark. Its words for those
    who cannot see it stand beside it, so the element itself is hidden from them.
    """
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", XLINK)
    root = ElementTree.fromstring(path.read_text(encoding="utf-8"))
    for parent in root.iter():
        for child in list(parent):
            if child.tag in {f"{{{SVG}}}metadata", f"{{{SVG}}}style"}:
                parent.remove(child)
    for element in root.iter():
        for key, value in element.attrib.items():
            element.set(key, _inline_attribute(key, value, prefix))
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.set("aria-hidden", "true")
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _inline_attribute(key: str, value: str, prefix: str) -> str:
    if key == "id":
        return f"{prefix}-{value}"
    if key == f"{{{XLINK}}}href":
        return value.replace("#", f"#{prefix}-", 1)
    value = re.sub(r"url\(#", f"url(#{prefix}-", value)
    if key == "style":
        for colour, variable in PAGE_VARIABLES.items():
            value = value.replace(colour, f"var({variable})")
    return value
