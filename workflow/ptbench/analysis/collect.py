"""Reading what the runs of an experiment left behind, grouped into the rows of its table.

A row is (variant, framework, devices); its seeds are averaged elsewhere. Cells that have no
metrics.json are kept, as missing; so are, for a partial report, those whose result cannot count.
"""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ptbench.analysis.plan import ExperimentPlan
from ptbench.backends import FRAMEWORKS
from ptbench.configuration.specification import Cell
from ptbench.errors import PtbenchError
from ptbench.model.recipe import Implementation
from ptbench.training.records import Epoch, Metrics, Score, perplexity, read_history, read_metrics

State = Literal["ok", "diverged", "missing"]
OUTDATED = "outdated: its recipe has changed"  # why a result no longer counts
MAXIMUM_FAILED = 1  # seeds of a row that may fail before the others no longer stand for it


class AnalysisError(PtbenchError):
    """Results that cannot be read, or must not be averaged."""


class CorpusFacts(BaseModel):
    """The part of corpus.json that tables and figures show."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    floor_perplexity: float | None = Field(None, description="exp of the exact entropy rate.")
    best_bigram_nll_nats: float | None = Field(
        None, description="What the best possible bigram model reaches [nats per token]."
    )

    @property
    def best_bigram_perplexity(self) -> float | None:
        """Perplexity of the best possible bigram model."""
        return None if self.best_bigram_nll_nats is None else perplexity(self.best_bigram_nll_nats)


class Provenance(BaseModel):
    """The part of provenance.json that the report shows; a run without it is still a result."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    git_commit: str | None = Field(None, description="Commit of ptbench that ran.")
    git_dirty: bool | None = Field(None, description="Whether the work tree had changes.")
    framework_version: str | None = Field(None, description="Version of the framework.")
    cpu: str | None = Field(None, description="Processor.")
    gpus: tuple[dict[str, str], ...] = Field((), description="Name and driver of each GPU.")
    cells_at_once: int | None = Field(None, description="Most cells that its machine trained.")


@dataclass(frozen=True)
class CellResult:
    """One planned run and what it left, if it has finished."""

    cell: Cell
    metrics: Metrics | None = None
    history: tuple[Epoch, ...] = ()
    provenance: Provenance = field(default_factory=Provenance)
    unusable: str | None = None  # why what it left does not count

    @property
    def state(self) -> State:
        return "missing" if self.metrics is None else self.metrics.status


@dataclass(frozen=True)
class Row:
    """The seeds of one (variant, framework, devices)."""

    variant: str
    framework: str
    devices: int
    implementation: Implementation
    cells: tuple[CellResult, ...]

    @property
    def ok(self) -> tuple[CellResult, ...]:
        """The cells that ended well, which alone are averaged."""
        return tuple(cell for cell in self.cells if cell.state == "ok")

    def metrics(self) -> list[Metrics]:
        """Metrics of the cells that ended well."""
        return [cell.metrics for cell in self.ok if cell.metrics is not None]

    @property
    def usable(self) -> bool:
        """Whether the seeds that ended well stand for the row: at most one other failed."""
        return bool(self.ok) and len(self.cells) - len(self.ok) <= MAXIMUM_FAILED

    @property
    def problem(self) -> str | None:
        """Which seeds failed, in words; None if none did."""
        words = {"missing": "has no result", "diverged": "diverged"}
        failed = [
            f"seed {c.cell.seed} {words[c.state]}" + (f" ({c.unusable})" if c.unusable else "")
            for c in self.cells
            if c.state != "ok"
        ]
        if not failed:
            return None
        if all(cell.state == "missing" for cell in self.cells):
            reasons = dict.fromkeys(cell.unusable for cell in self.cells if cell.unusable)
            return "no seed has a result" + (f" ({'; '.join(reasons)})" if reasons else "")
        listed = ", ".join(failed)
        return listed if self.usable else f"invalid: {listed}"

    def nlls(self, split: Literal["train", "valid", "test"]) -> list[float]:
        """Mean nll of each seed that ended well [nats per token]."""
        scores = [getattr(metrics, split) for metrics in self.metrics()]
        return [score.nll for score in scores if score is not None]


def collect_rows(
    plan: ExperimentPlan, results_folder: Path, fingerprints: Mapping[str, str] | None = None
) -> list[Row]:
    """The rows of an experiment, by variant and devices as planned, then by framework.

    Args:
        plan: the experiment.
        results_folder: holds cells/.
        fingerprints: of each variant as it is now, for a report on what is there: a cell of another
            is missing, and so is one that cannot be read. None: every result must count.

    Raises:
        AnalysisError: if a file cannot be read, or cells that would be averaged or compared were
            run with different settings, as their fingerprints tell, or scored on other tokens.
    """
    if fingerprints is None:
        cells = [_read_cell(cell, results_folder) for cell in plan.cells]
    else:
        cells = [_usable(cell, results_folder, fingerprints[cell.variant]) for cell in plan.cells]
    rows: dict[tuple[str, int, str], list[CellResult]] = defaultdict(list)
    for cell in cells:
        rows[cell.cell.variant, cell.cell.devices, cell.cell.framework].append(cell)
    variants = list(dict.fromkeys(cell.variant for cell in plan.cells))
    for variant in variants:
        finished = [cell for cell in cells if cell.cell.variant == variant and cell.metrics]
        _refuse_mixed(
            finished,
            lambda metrics: metrics.fingerprint,
            f"cells of {variant} were run with different settings and must not be averaged, "
            "run the experiment again to renew the outdated ones: fingerprint",
        )
        _refuse_mixed(
            [cell for cell in finished if cell.state == "ok"],
            lambda metrics: (_score(metrics.valid).tokens, _score(metrics.test).tokens),
            f"cells of {variant} were scored on different numbers of tokens and must not be "
            "compared: valid and test tokens",
        )
    frameworks = list(FRAMEWORKS)
    order = sorted(rows, key=lambda k: (variants.index(k[0]), k[1], frameworks.index(k[2])))
    return [
        Row(
            variant,
            framework,
            devices,
            plan.implementations.get(variant, "stock"),
            tuple(sorted(rows[key], key=lambda c: c.cell.seed)),
        )
        for key in order
        for variant, devices, framework in [key]
    ]


def _usable(cell: Cell, results_folder: Path, fingerprint: str) -> CellResult:
    try:
        result = _read_cell(cell, results_folder)
    except AnalysisError as error:
        return CellResult(cell, unusable=str(error))
    if result.metrics and result.metrics.fingerprint != fingerprint:
        return CellResult(cell, unusable=OUTDATED)
    return result


def _read_cell(cell: Cell, results_folder: Path) -> CellResult:
    folder = results_folder / "cells" / cell.path
    path = folder / "metrics.json"
    if not path.exists():
        return CellResult(cell)
    try:
        metrics = read_metrics(path)
        path = folder / "history.csv"
        history = tuple(read_history(path))
        path = folder / "provenance.json"
        known = path.read_bytes() if path.exists() else b"{}"
        provenance = Provenance.model_validate_json(known)
    except FileNotFoundError as error:
        raise AnalysisError(f"{path} is missing although the run has finished") from error
    except (OSError, ValidationError, UnicodeDecodeError, csv.Error) as error:
        raise AnalysisError(
            f"{path} cannot be read ({_first_line(error)}); delete the cell's metrics.json and run "
            "the workflow again to renew the cell"
        ) from error
    if metrics.cell != cell:
        raise AnalysisError(
            f"{folder / 'metrics.json'} is the result of another cell, {metrics.cell.path}"
        )
    if len(history) != metrics.epochs:
        raise AnalysisError(
            f"{folder / 'history.csv'} has {len(history)} epochs where metrics.json has "
            f"{metrics.epochs}; delete the cell's metrics.json and run the workflow again"
        )
    if metrics.status == "ok":
        scores = (metrics.train, metrics.valid, metrics.test)
        if any(score is None or not math.isfinite(score.nll) for score in scores):
            raise AnalysisError(
                f"{folder / 'metrics.json'} says ok but lacks a finite score of a split"
            )
    return CellResult(cell, metrics, history, provenance)


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc'])) or 'file'}: {first['msg']}"
    return str(error).splitlines()[0]


def _score(value: Score | None) -> Score:
    assert value is not None  # `_read_cell` let no ok cell through without it
    return value


def _refuse_mixed(
    cells: Iterable[CellResult], key: Callable[[Metrics], Hashable], message: str
) -> None:
    groups: dict[Hashable, list[str]] = defaultdict(list)
    for cell in cells:
        assert cell.metrics is not None
        groups[key(cell.metrics)].append(cell.cell.path)
    if len(groups) > 1:
        listed = "; ".join(f"{value} in {', '.join(paths)}" for value, paths in groups.items())
        raise AnalysisError(f"{message} {listed}")


def read_corpus_facts(results_folder: Path, corpus_folder: str) -> CorpusFacts:
    """What corpus.json says of the corpus' floor; nothing where the corpus is not there.

    Raises:
        AnalysisError: if corpus.json is there but cannot be read.
    """
    path = results_folder / "corpora" / corpus_folder / "corpus.json"
    if not path.exists():
        return CorpusFacts()
    try:
        return CorpusFacts.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise AnalysisError(f"{path} cannot be read ({_first_line(error)})") from error
