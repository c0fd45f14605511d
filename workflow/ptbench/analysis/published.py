"""Reading the published numbers, `workflow/papers/<document>/published.csv`.

Setting ours beside them lives in `experiment.py`.
"""

from __future__ import annotations

import csv
from pathlib import Path

from pydantic import Field, ValidationError, field_validator

from ptbench.analysis.collect import AnalysisError
from ptbench.analysis.metrics import MetricName
from ptbench.backends import Framework
from ptbench.configuration.specification import VARIANT_PATTERN
from ptbench.model.recipe import Model, Name


class PublishedValue(Model):
    """One row: a number, where it was printed, and which row of ours it is set beside."""

    experiment: Name = Field(description="Experiment that answers it.")
    variant: str = Field(pattern=f"^{VARIANT_PATTERN}$", description="Variant that answers it.")
    framework: Framework | None = Field(description="Only framework it is set beside; empty: any.")
    devices: int = Field(ge=1, description="Data-parallel replicas that it was measured with.")
    metric: MetricName = Field(description="What was measured, in our words and units.")
    value: float = Field(gt=0, allow_inf_nan=False, description="The number.")
    std: float | None = Field(ge=0, description="Its standard deviation, if printed.")
    source: str = Field(min_length=1, description="Short name of the document: its folder.")
    locator: str = Field(min_length=1, description="Table, figure or section within it.")
    note: str = Field(description="What a reader must know to judge it.")

    @field_validator("framework", "std", mode="before")
    @classmethod
    def _empty_is_none(cls, value: object) -> object:
        return None if value == "" else value


def read_published(folder: Path) -> list[PublishedValue]:
    """Return all rows of `*/published.csv` in a folder; each document has a folder of its name.

    Raises:
        AnalysisError: naming file, line and column, if a row is malformed or there twice.
    """
    values: list[PublishedValue] = []
    seen: dict[tuple[object, ...], str] = {}
    for path in sorted(folder.glob("*/published.csv")):
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            columns = [name for name in PublishedValue.model_fields if name != "source"]
            if reader.fieldnames != columns:
                raise AnalysisError(f"{path}: the first line must be {','.join(columns)}")
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                try:
                    value = PublishedValue.model_validate({**row, "source": path.parent.name})
                except ValidationError as error:
                    first = error.errors()[0]
                    column = ".".join(map(str, first["loc"]))
                    raise AnalysisError(
                        f"{where}: {column}={first['input']!r}: {first['msg']}"
                    ) from error
                key = tuple(value.model_dump(exclude={"value", "std"}).values())
                if key in seen:
                    raise AnalysisError(f"{where} repeats {seen[key]}")
                seen[key] = where
                values.append(value)
    return values
