"""The rows that a document names, and the experiments of a study that plan them.

A document names rows of our results in its findings (`claims.yaml`), its tables and figures
(`exhibits.yaml`) and its published numbers (`published.csv`). What is said of them is read by
`ptbench.analysis`; here only their names are, because the workflow's rules ask which experiments
answer a document.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from pydantic import BeforeValidator

from ptbench.backends import FRAMEWORKS
from ptbench.configuration.experiments import WORKFLOW
from ptbench.configuration.specification import whole
from ptbench.errors import ConfigurationError
from ptbench.yaml import read_mapping, shown_path

if TYPE_CHECKING:
    from ptbench.configuration.study import PlannedExperiment

ROW = re.compile(r"(?P<variant>[^\s\[\]]+)(?: \[(?P<framework>\w+)\])?(?: \[(?P<devices>\d+)\])?")
FILES = ("paper.yaml", "claims.yaml", "exhibits.yaml", "published.csv")  # what answers are made of


class NamedRow(NamedTuple):
    """A row of our results: the seeds of one variant in one framework."""

    variant: str
    framework: str | None  # None: every framework that ran it
    devices: int

    def __str__(self) -> str:
        framework = f" [{self.framework}]" if self.framework else ""
        return f"{self.variant}{framework}" + (f" [{self.devices}]" if self.devices > 1 else "")


def parse_row(text: object) -> object:
    """Return the row that `variant [framework] [devices]` names; both brackets may be left out.

    Raises:
        ValueError: if it is not of that form, or there is no such framework.
    """
    if not isinstance(text, str):
        return text
    match = ROW.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not of the form: variant [framework] [devices]")
    framework = match["framework"]
    if framework is not None and framework not in FRAMEWORKS:
        raise ValueError(f"{text!r}: there is no framework {framework}")
    return NamedRow(match["variant"], framework, int(match["devices"] or 1))


RowField = Annotated[NamedRow, BeforeValidator(parse_row)]


def paper_folders() -> dict[str, Path]:
    """Return the folder of each document, by its name."""
    return {file.parent.name: file.parent for file in sorted(WORKFLOW.glob("papers/*/paper.yaml"))}


def paper_files(paper: str) -> list[Path]:
    """Return the files that a document's answers are made of, those that it has."""
    return [file for name in FILES if (file := WORKFLOW / "papers" / paper / name).exists()]


def named_rows(folder: Path) -> set[NamedRow]:
    """Return every row of our results that a document names.

    Raises:
        ConfigurationError: if a file is malformed.
    """
    rows = set()
    for name, texts in READERS.items():
        file = folder / name
        if not file.exists():
            continue
        try:
            rows |= {parse_row(text) for text in texts(file)}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ConfigurationError(
                f"{shown_path(file)}: malformed ({error}); `uv run ptbench validate` says where"
            ) from error
    return {row for row in rows if isinstance(row, NamedRow)}


def _of_claims(file: Path) -> Iterator[Any]:
    for claim in read_mapping(file).get("claims", ()):
        for test in claim.get("tests", ()):
            yield from test.get("left", ())
            yield from test.get("right", ())


def _of_exhibits(file: Path) -> Iterator[Any]:
    for exhibit in read_mapping(file).get("exhibits", ()):
        yield from exhibit.get("rows", {}).values()


def _of_published(file: Path) -> Iterator[Any]:
    with file.open(encoding="utf-8", newline="") as opened:
        for line in csv.DictReader(opened):
            yield str(NamedRow(line["variant"], line["framework"] or None, int(line["devices"])))
            if line["over"]:
                yield line["over"]


READERS: dict[str, Callable[[Path], Iterator[Any]]] = {
    "claims.yaml": _of_claims,
    "exhibits.yaml": _of_exhibits,
    "published.csv": _of_published,
}


def answering(folder: Path, experiments: Mapping[str, PlannedExperiment]) -> list[str]:
    """Return the experiments that plan a row which the document in a folder names."""
    rows = named_rows(folder)
    return [name for name, experiment in experiments.items() if _plans_any(experiment, rows)]


def _plans_any(experiment: PlannedExperiment, rows: set[NamedRow]) -> bool:
    variants = {whole(each.variant) for each in experiment.specifications}
    return any(
        row.variant in variants
        and row.devices in experiment.devices
        and (row.framework is None or row.framework in experiment.frameworks)
        for row in rows
    )
