"""The tables and figures of a document that we draw again: `papers/<document>/exhibits.yaml`.

The model, and what each exhibit shows of ours and of the document's. `ptbench.report.exhibits`
draws it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from ptbench.analysis.agreement import PublishedVerdict, correlate
from ptbench.analysis.experiment import RowResult
from ptbench.analysis.metrics import MetricName, Summary
from ptbench.analysis.published import PublishedValue
from ptbench.backends import FRAMEWORKS
from ptbench.configuration.errors import parse
from ptbench.configuration.papers import NamedRow, RowField
from ptbench.configuration.specification import format_override
from ptbench.model.recipe import Model, Name, Recipe
from ptbench.yaml import read_mapping, shown_path

Kind = Literal["table", "curves", "sweep", "scaling", "settings"]


class Exhibit(Model):
    """A table or figure of a document, and the rows of ours that are drawn in its shape."""

    id: str = Field(pattern=r"^[a-z0-9-]+$", description="Name of the exhibit, and of its files.")
    number: str = Field(min_length=1, description="Where it is in the document: Table 5.1.")
    title: str = Field(min_length=1, description="What it shows.")
    note: str | None = Field(None, description="What a reader must know to compare.")
    kind: Kind | None = Field(None, description="Its shape.")
    x: str | None = Field(None, description="On the horizontal axis: a recipe key, or epoch.")
    metrics: list[MetricName] = Field([], description="Columns of a table, panels of a figure.")
    relative_to: str | None = Field(
        None, description="Label of the row that numbers are divided by; null: as they are."
    )
    rows: dict[str, RowField] = Field({}, description="Rows of ours by their label in it.")
    recipes: list[Name] = Field([], description="Recipes whose settings it lists.")
    undrawn: str | None = Field(None, description="Why it is not drawn.")

    @model_validator(mode="after")
    def _is_drawn_or_says_why_not(self) -> Self:
        if (self.kind is None) == (self.undrawn is None):
            raise ValueError("it needs a kind, or the reason why it is undrawn")
        if self.kind == "settings" and not self.recipes:
            raise ValueError("settings need recipes")
        if self.kind in ("table", "curves", "sweep", "scaling") and not (
            self.rows and self.metrics
        ):
            raise ValueError(f"kind {self.kind} needs rows and metrics")
        if self.kind in ("curves", "sweep", "scaling") and self.x is None:
            raise ValueError(f"kind {self.kind} needs x, what is on its horizontal axis")
        if self.relative_to is not None and self.relative_to not in self.rows:
            raise ValueError(f"relative_to: there is no row {self.relative_to}")
        return self

    @property
    def base(self) -> NamedRow | None:
        """The row that numbers are divided by."""
        return None if self.relative_to is None else self.rows[self.relative_to]


class ExhibitFile(Model):
    """`exhibits.yaml`."""

    exhibits: list[Exhibit] = Field(description="In the order of the document.")


def read_exhibits(folder: Path) -> list[Exhibit]:
    """Return the exhibits of the document in a folder; none if it has no exhibits.yaml.

    Raises:
        ConfigurationError: with file and line, if one is malformed.
    """
    file = folder / "exhibits.yaml"
    if not file.exists():
        return []
    return parse(ExhibitFile, read_mapping(file), shown_path(file)).exhibits


class ExhibitCell(Model):
    """One number of an exhibit: ours, and the document's."""

    ours: Summary | None = Field(description="Of the seeds that ended well; null: none did.")
    published: PublishedValue | None = Field(description="The document's; null: it has none.")
    verdict: PublishedVerdict | None = Field(description="Of the document's number.")


class ExhibitLine(Model):
    """One row of an exhibit."""

    label: str = Field(description="As the document calls it.")
    row: NamedRow = Field(description="Row of ours.")
    n_ok: int = Field(description="Seeds that ended well.")
    n_diverged: int = Field(description="Seeds that diverged.")
    n_planned: int = Field(description="Seeds planned; 0: the study does not plan it.")
    cells: dict[str, ExhibitCell] = Field(description="By metric.")


class Together(Model):
    """How the published numbers of one metric and ours go together (QRA++, type II)."""

    n: int = Field(description="Numbers that both have.")
    pearson: float | None = Field(description="Pearson's r.")
    spearman: float | None = Field(description="Spearman's rho.")


class ExhibitResult(Model):
    """An exhibit filled with our numbers and the document's."""

    exhibit: Exhibit = Field(description="What is drawn.")
    lines: tuple[ExhibitLine, ...] = Field(description="Its rows.")
    settings: dict[str, dict[str, str]] = Field(
        {}, description="Of each recipe that it lists: the keys whose values are not the defaults."
    )
    together: dict[str, Together] = Field(description="By metric, where three rows have both.")
    missing: str | None = Field(None, description="Why it is not drawn.")


def fill_exhibit(
    exhibit: Exhibit,
    rows: Mapping[NamedRow, RowResult],
    published: Mapping[PublishedValue, PublishedVerdict],
    recipes: Mapping[str, Recipe],
) -> ExhibitResult:
    """Return an exhibit with our numbers and the document's.

    Args:
        exhibit: what to fill.
        rows: ours, each with its framework; a row of the exhibit without one stands for all.
        published: the document's numbers, with their verdicts.
        recipes: all of them, by name.
    """
    at = {value: verdict for value, verdict in published.items() if _is_of(value, exhibit)}
    lines: list[ExhibitLine] = []
    for label, row in _each_framework(exhibit, rows):
        ours = rows.get(row)
        cells = {
            metric: _cell(
                _ours(metric, ours, rows, exhibit), _published(at, row, metric, exhibit.base), at
            )
            for metric in exhibit.metrics
        }
        counts = (ours.n_ok, ours.n_diverged, ours.n_planned) if ours else (0, 0, 0)
        lines.append(
            ExhibitLine(
                label=label,
                row=row,
                n_ok=counts[0],
                n_diverged=counts[1],
                n_planned=counts[2],
                cells=cells,
            )
        )
    return ExhibitResult(
        exhibit=exhibit,
        lines=tuple(lines),
        settings={
            name: {
                key: format_override(value)
                for key, value in recipes[name].model_dump(exclude_defaults=True).items()
            }
            for name in exhibit.recipes
        },
        together=_together(lines, exhibit.metrics),
        missing=exhibit.undrawn or _why_not(exhibit, lines),
    )


def _each_framework(
    exhibit: Exhibit, rows: Mapping[NamedRow, RowResult]
) -> Iterator[tuple[str, NamedRow]]:
    for label, row in exhibit.rows.items():
        if row.framework:
            yield label, row
            continue
        ran = [f for f in FRAMEWORKS if row._replace(framework=f) in rows]
        for framework in ran:
            yield f"{label}, {FRAMEWORKS[framework].title}", row._replace(framework=framework)
        if not ran:
            yield label, row


def _ours(
    metric: str, row: RowResult | None, rows: Mapping[NamedRow, RowResult], exhibit: Exhibit
) -> Summary | None:
    if row is None or exhibit.base is None:
        return row.metrics.get(metric) if row else None
    base, own = rows.get(exhibit.base), row.value(metric)
    below = base.value(metric) if base else None
    return Summary(n=row.n_ok, value=own / below) if own and below else None


def _is_of(value: PublishedValue, exhibit: Exhibit) -> bool:
    """Return whether all words of the number's locator are in the name of the exhibit."""
    return _words(value.locator) <= _words(exhibit.number)


def _words(place: str) -> set[str]:
    return set(re.findall(r"[\w.]+", place))


def _published(
    values: Iterable[PublishedValue], row: NamedRow, metric: str, base: NamedRow | None
) -> PublishedValue | None:
    for value in values:
        named = (value.variant, value.devices, value.metric, value.over)
        if named == (row.variant, row.devices, metric, base) and value.framework in (
            None,
            row.framework,
        ):
            return value
    return None


def _cell(
    ours: Summary | None,
    published: PublishedValue | None,
    verdicts: Mapping[PublishedValue, PublishedVerdict],
) -> ExhibitCell:
    verdict = verdicts[published] if published else None
    return ExhibitCell(ours=ours, published=published, verdict=verdict)


def _together(lines: Sequence[ExhibitLine], metrics: Sequence[str]) -> dict[str, Together]:
    found = {}
    for metric in metrics:
        pairs = [
            (cell.published.value, cell.ours.value)
            for cell in (line.cells[metric] for line in lines)
            if cell.ours and cell.published and cell.published.kind == "number"
        ]
        if len(pairs) >= 3:
            theirs, ours = zip(*pairs, strict=True)
            found[metric] = Together(**correlate(theirs, ours)._asdict())
    return found


def _why_not(exhibit: Exhibit, lines: Sequence[ExhibitLine]) -> str | None:
    if exhibit.kind == "settings" or any(line.n_ok or line.n_diverged for line in lines):
        return None
    if any(line.n_planned for line in lines):
        return "none of its runs has a result yet"
    return "none of its rows is in the study"
