"""The HTML page: one self-contained file, from the analysis.json of each experiment.

Words, numbers and links only: `ptbench.analysis` makes the numbers and `figures.py` the figures.
The page needs no network and no script.
"""

from __future__ import annotations

import math
import os
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from pydantic import Field, ValidationError

from ptbench.analysis.collect import AnalysisError, first_line
from ptbench.analysis.experiment import (
    Analysis,
    FigureFile,
    PairResult,
    PublishedResult,
    RowResult,
)
from ptbench.analysis.metrics import METRICS, NOTHING, Metric
from ptbench.analysis.statistics import SIGNIFICANCE
from ptbench.backends import FRAMEWORKS
from ptbench.files import write_atomically
from ptbench.model.recipe import Model
from ptbench.report import formatting
from ptbench.report.formatting import FIGURE_SPACE, group_key, group_title, grouped
from ptbench.report.palette import DARK_PAGE, LIGHT_PAGE, PAGE_VARIABLES
from ptbench.report.tables import printed_metrics

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
    """What the page's head says about the workflow that made it."""

    created: str = Field(description="Date and time, as it is to be printed.")
    version: str = Field(description="Version of ptbench.")
    commit: str | None = Field(None, description="Commit of the work tree.")
    dirty: bool = Field(False, description="Whether the work tree had uncommitted changes.")
    machine: str = Field(description="Where the page was made: processor, cores, memory, system.")


class Line(NamedTuple):
    """One row of the results: for each metric its number, and its interval or quartiles."""

    row: RowResult
    texts: list[tuple[str, str]]


class Matrix(NamedTuple):
    """Verdicts between the frameworks of one variant and number of devices."""

    title: str
    frameworks: list[str]
    pairs: dict[tuple[str, str], PairResult]  # (row, column); the row is pair.b


class Section(NamedTuple):
    """One experiment, as the template needs it."""

    analysis: Analysis
    folder: str  # relative address
    metrics: list[Metric]  # the columns of the results
    tables: list[list[Line]]  # lines that differ by framework alone
    matrices: list[Matrix]
    verdicts: Counter[str]
    tests: str  # the kinds of t test made, in words
    all_equivalent: bool
    figures: list[tuple[FigureFile, Markup]]
    published: list[tuple[Metric, list[PublishedResult]]]


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
    rows = [row for section in sections for row in section.analysis.rows]
    cells = {cell.path: cell for row in rows for cell in row.cells}
    versions = {
        name: sorted({v for row in rows if row.framework == name for v in row.framework_versions})
        for name in FRAMEWORKS
        if any(row.framework == name for row in rows)
    }
    environment = Environment(
        loader=PackageLoader("ptbench.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=formatting.format_percent,
        p=formatting.format_p,
        signed=formatting.format_signed,
        framework=formatting.framework_name,
        devices=formatting.format_devices,
        seeds=formatting.format_seeds,
        group_title=group_title,
        published_value=_published_value,
        ours=_ours,
        address=_address,
    )
    page = environment.get_template("report.html.j2").render(
        sections=sections,
        metrics=METRICS,
        states=Counter(cell.state for cell in cells.values()),
        planned=len(cells),
        frameworks=versions,
        machines=sorted({machine for row in rows for machine in row.machines}),
        commits=sorted({commit for row in rows for commit in row.commits}),
        facts=run_facts,
        cells_at_once=max((row.cells_at_once for row in rows if row.cells_at_once), default=None),
        colours={"light": LIGHT_PAGE, "dark": DARK_PAGE},
        cell_files=CELL_FILES,
        table_files=TABLE_FILES,
        effect=lambda nats: None if nats is None else math.expm1(nats),
    )
    path = report_folder / "index.html"
    write_atomically(path, page)
    return path


def _address(path: str) -> str:
    return quote(path, safe="/+=,.-_")


def _section(folder: Path, report_folder: Path, index: int) -> Section:
    try:
        analysis = Analysis.model_validate_json((folder / "analysis.json").read_bytes())
        figures = [
            (file, inline_svg(folder / "figures" / f"{file.name}.svg", f"figure-{index}-{number}"))
            for number, file in enumerate(analysis.figures)
        ]
    except (OSError, ValidationError, ElementTree.ParseError) as error:
        raise AnalysisError(
            f"{folder} is not a whole analysis of an experiment: {first_line(error)}"
        ) from error
    metrics = printed_metrics(analysis)
    columns = [_column(metric, analysis.rows) for metric in metrics]
    lines = [Line(row, [column[i] for column in columns]) for i, row in enumerate(analysis.rows)]
    kinds = {pair.outcome.test.kind for pair in analysis.pairs if pair.outcome.test}
    p = analysis.all_equivalent_p
    return Section(
        analysis=analysis,
        folder=_address(os.path.relpath(folder, report_folder)),
        metrics=metrics,
        tables=[list(group) for _, group in groupby(lines, key=lambda line: group_key(line.row))],
        matrices=_matrices(analysis),
        verdicts=Counter(pair.outcome.verdict for pair in analysis.pairs),
        tests=" and ".join(sorted(kinds)),
        all_equivalent=p is not None and p < SIGNIFICANCE,
        figures=figures,
        published=[
            (metric, found)
            for name, metric in METRICS.items()
            if (found := [line for line in analysis.published if line.published.metric == name])
        ],
    )


def _column(metric: Metric, rows: Sequence[RowResult]) -> list[tuple[str, str]]:
    """Return what all rows show of a metric: its number with ±, and its interval or quartiles."""
    summaries = [row.metrics.get(metric.name) for row in rows]
    stds = [formatting.format_std(metric, summary).removeprefix("± ") for summary in summaries]
    width = max(map(len, stds))
    column = []
    for summary, std in zip(summaries, stds, strict=True):
        text = metric.text(summary.value if summary else None)
        if width and summary:  # padded, so that the signs stand below one another
            text += f" {'±' if std else ' '} {std.rjust(width, FIGURE_SPACE)}"
        column.append((text, metric.spread_text(summary)))
    return column


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


def _published_value(line: PublishedResult) -> str:
    """Write the published value, with its standard deviation where one was printed."""
    metric, value = METRICS[line.published.metric], line.published
    if value.kind == "diverges":
        return "diverges"
    text = f"× {value.value:.3g}" if value.over else metric.write(value.value)
    text = {"above": "> ", "below": "< "}.get(value.kind, "") + text
    return text if value.std is None else f"{text} ± {metric.write(value.std)}"


def _ours(line: PublishedResult) -> str:
    """Write our value, followed by its interval where it has one."""
    if line.ours is None:
        return NOTHING
    if line.published.over:
        return f"× {line.ours:.3g}"
    write = METRICS[line.published.metric].write
    if line.low is None or line.high is None:
        return write(line.ours)
    return f"{write(line.ours)} ({write(line.low)} to {write(line.high)})"


def inline_svg(path: Path, prefix: str) -> Markup:
    """Return a drawing as an element of the page.

    Its ids get a prefix, because two drawings on a page must not share one. Its colours become the
    page's variables, so that it follows the reader's choice of light or dark. It is hidden from
    screen readers, which read the words beside it.

    Args:
        path: the SVG file.
        prefix: of its ids.
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
