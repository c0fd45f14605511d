"""Reading the published numbers, `workflow/papers/<document>/published.csv`.

Setting ours beside them lives in `experiment.py`, judging them in `agreement.py`. Printed numbers
that have no row there are in `left_out.csv`, each with the reason.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import Field, ValidationError, ValidationInfo, field_validator

from ptbench.analysis.collect import AnalysisError
from ptbench.analysis.metrics import METRICS, MetricName
from ptbench.backends import Framework
from ptbench.configuration.papers import NamedRow, RowField
from ptbench.configuration.specification import VARIANT_PATTERN
from ptbench.model.recipe import Model, Name

COLUMNS = (
    "experiment", "variant", "framework", "devices", "over", "metric", "value", "std", "runs",
    "alternative", "locator", "note",
)  # fmt: skip
Row = TypeVar("Row", bound=Model)


class PublishedValue(Model):
    """One row: a number, where it was printed, and which row of ours it is set beside.

    In the file, `value` is a number, a bound such as `>3000` or `<130`, or the word `diverges`.
    """

    experiment: Name = Field(description="Experiment that answers it.")
    variant: str = Field(pattern=f"^{VARIANT_PATTERN}$", description="Variant that answers it.")
    framework: Framework | None = Field(description="Only framework it is set beside; empty: any.")
    devices: int = Field(ge=1, description="Data-parallel replicas that it was measured with.")
    over: RowField | None = Field(
        None,
        description="Row that ours is divided by, as `variant [framework] [devices]`: the value is "
        "the ratio of the two; empty: it is a number of its own.",
    )
    metric: MetricName = Field(description="What was measured, in our words and units.")
    kind: Literal["number", "above", "below", "diverges"] = Field(
        "number", description="Whether the value is a number, a bound, or that runs diverge."
    )
    value: float = Field(gt=0, description="The number, ratio or bound; infinite: it diverges.")
    rounding: float = Field(0.0, ge=0, description="Half a unit of its last digit, as written.")
    std: float | None = Field(None, ge=0, description="Its standard deviation, if printed.")
    runs: int | None = Field(
        None, ge=1, description="How many runs it is the mean of; empty: not stated."
    )
    alternative: str = Field(
        "",
        description="Name of a printed number that has several readings: rows of one document and "
        "metric with the same name count once, by the reading that fits.",
    )
    source: str = Field(min_length=1, description="Short name of the document: its folder.")
    locator: str = Field(min_length=1, description="Table, figure or section within it.")
    note: str = Field(description="What a reader must know to judge it.")

    @field_validator("framework", "over", "std", "runs", mode="before")
    @classmethod
    def _empty_is_none(cls, value: object) -> object:
        return None if value == "" else value

    @field_validator("value")
    @classmethod
    def _only_divergence_is_infinite(cls, value: float, info: ValidationInfo) -> float:
        if math.isinf(value) and info.data.get("kind") != "diverges":
            raise ValueError("must be finite; write diverges where no number was reached")
        return value

    @property
    def row(self) -> NamedRow:
        """The row of ours that it is set beside."""
        return NamedRow(self.variant, self.framework, self.devices)


class LeftOut(Model):
    """Printed numbers that are set beside nothing; `*` stands for anything, `[12]` for 1 or 2."""

    source: str = Field(min_length=1, description="Short name of the document: its folder.")
    locator: str = Field(min_length=1, description="Table, figure or section within it.")
    metric: str = Field(min_length=1, description="What was measured.")
    value: str = Field(min_length=1, description="The number, in our units.")
    reason: str = Field(min_length=1, description="Why no row of ours answers it.")


def read_published(folder: Path) -> list[PublishedValue]:
    """Return all rows of `*/published.csv` in a folder; each document has a folder of its name.

    Raises:
        AnalysisError: naming file, line and column, if a row is malformed or there twice.
    """
    values: list[PublishedValue] = []
    seen: dict[tuple[object, ...], str] = {}
    for path in sorted(folder.glob("*/published.csv")):
        for where, row in _rows(path, COLUMNS):
            value = _made(PublishedValue, row | _number(row["value"]), where)
            key = tuple(value.model_dump(exclude={"value", "rounding", "std", "runs"}).values())
            if key in seen:
                raise AnalysisError(f"{where} repeats {seen[key]}")
            seen[key] = where
            values.append(value)
    return values


def read_left_out(folder: Path) -> list[LeftOut]:
    """Return all rows of `*/left_out.csv` in a folder, in which a document need not have one.

    Raises:
        AnalysisError: naming file, line and column, if a row is malformed.
    """
    columns = [name for name in LeftOut.model_fields if name != "source"]
    return [
        _made(LeftOut, row, where)
        for path in sorted(folder.glob("*/left_out.csv"))
        for where, row in _rows(path, columns)
    ]


def _rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, object]]]:
    """Yield where each row of a CSV file is, and its columns with the document's name."""
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        if reader.fieldnames != list(columns):
            raise AnalysisError(f"{path}: the first line must be {','.join(columns)}")
        for row in reader:
            yield f"{path}, line {reader.line_num}", {**row, "source": path.parent.name}


def _made(kind: type[Row], row: Mapping[str, object], where: str) -> Row:
    try:
        return kind.model_validate(row)
    except ValidationError as error:
        first = error.errors()[0]
        column = ".".join(map(str, first["loc"]))
        raise AnalysisError(f"{where}: {column}={first['input']!r}: {first['msg']}") from error


def _number(text: object) -> dict[str, object]:
    """Return what the column `value` says: kind, value, and half a unit of its last digit."""
    if text == "diverges":
        return {"kind": "diverges", "value": math.inf}
    digits = str(text).removeprefix(">").removeprefix("<")
    kind = {">": "above", "<": "below"}.get(str(text)[:1], "number")
    try:
        exponent = Decimal(digits).as_tuple().exponent
    except InvalidOperation:
        exponent = "n"  # no number at all: pydantic will say so
    rounding = 0.5 * 10.0**exponent if isinstance(exponent, int) else 0.0
    return {"kind": kind, "value": digits, "rounding": rounding}


def readings(values: Iterable[PublishedValue]) -> list[list[PublishedValue]]:
    """Return each printed number with all its readings, in the order of the first of them.

    Readings of one number share their `alternative`, or differ in experiment and note alone.
    """
    numbers: dict[tuple[object, ...], list[PublishedValue]] = {}
    for value in values:
        own = (value.row, value.over, value.kind, value.value)
        key = (value.source, value.metric, value.alternative or (value.locator, *own))
        numbers.setdefault(key, []).append(value)
    return list(numbers.values())


def ratios_within(values: Iterable[PublishedValue]) -> list[PublishedValue]:
    """Return the times, speeds and sizes of each table as ratios to its first row.

    That is all that can be judged where the hardware is another. A table is what a document prints
    at one locator of one metric in one framework, and one experiment answers.
    """
    tables: dict[tuple[object, ...], list[PublishedValue]] = {}
    for value in values:
        if METRICS[value.metric].depends_on_machine and not value.over and value.kind == "number":
            key = (value.source, value.locator, value.experiment, value.metric, value.framework)
            tables.setdefault(key, []).append(value)
    return [
        value.model_copy(update={"value": value.value / first.value, "over": first.row})
        for first, *others in tables.values()
        for value in others
        if value.row != first.row
    ]
