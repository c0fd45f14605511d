"""The analysis of one experiment: all numbers of its tables, figures and page, from its cells.

Values in, values out; files are read by `collect.py` and written by `ptbench.report`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Literal

from pydantic import Field

from ptbench.analysis.collect import CorpusFacts, Provenance, Row, State
from ptbench.analysis.plan import ExperimentPlan, Metric
from ptbench.analysis.published import PublishedMetric, PublishedValue
from ptbench.analysis.statistics import (
    Difference,
    PerplexitySummary,
    Quartiles,
    compare_pairs,
    quartiles,
    summarise_perplexity,
)
from ptbench.backends import Framework
from ptbench.configuration.specification import Cell
from ptbench.model.recipe import Implementation, Model
from ptbench.training.records import Seconds

Split = Literal["train", "valid", "test"]


class CellLine(Model):
    """One planned run in the list of runs."""

    cell: Cell = Field(description="Which run.")
    path: str = Field(description="Its folder, relative to results/cells.")
    state: State = Field(description="ok, diverged or missing.")
    reason: str | None = Field(None, description="Why it counts as diverged or missing.")
    best_epoch: int | None = Field(None, description="Epoch of the lowest validation nll.")
    epochs: int | None = Field(None, description="Epochs trained.")
    valid_perplexity: float | None = Field(None, description="After the best epoch.")
    test_perplexity: float | None = Field(None, description="With the best epoch's parameters.")
    tokens_per_second: float | None = Field(None, description="Median over epochs [tokens/s].")
    total_seconds: float | None = Field(None, description="Wall-clock of the process [s].")


class RowResult(Model):
    """One row of the results table. Averages are over the seeds that ended well."""

    variant: str = Field(description="Name of the variant.")
    framework: Framework = Field(description="Framework.")
    devices: int = Field(description="Data-parallel replicas.")
    implementation: Implementation = Field(description="stock or tuned, as the recipe says.")
    n_ok: int = Field(description="Seeds that ended well.")
    n_planned: int = Field(description="Seeds planned.")
    usable: bool = Field(description="False if two or more seeds failed, or all did.")
    problem: str | None = Field(description="Which seeds failed.")
    fingerprint: str | None = Field(description="Of the specification that was run.")
    train: PerplexitySummary | None = Field(description="Training split, last epoch, as it ran.")
    valid: PerplexitySummary | None = Field(description="Validation split.")
    test: PerplexitySummary | None = Field(description="Test split.")
    best_epoch: Quartiles | None = Field(description="Epoch of the lowest validation nll.")
    tokens_per_second: Quartiles | None = Field(description="Training speed [tokens/s].")
    seconds_per_epoch: Quartiles | None = Field(description="Training and validation [s].")
    training_seconds: Quartiles | None = Field(description="Training steps after the first [s].")
    total_seconds: Quartiles | None = Field(description="Wall-clock of the process [s].")
    epochs: Quartiles | None = Field(description="Epochs trained.")
    seconds: Seconds | None = Field(description="Mean over seeds, so that the clocks add up [s].")
    parameters: int | None = Field(description="Trainable numbers in the model.")
    peak_memory_bytes: int | None = Field(description="Largest of the seeds [bytes].")
    peak_device_memory_bytes: int | None = Field(description="Largest of the seeds [bytes].")
    framework_versions: tuple[str, ...] = Field(description="Of the framework, in its runs.")
    machines: tuple[str, ...] = Field(description="Processors and GPUs of its runs.")
    cells_at_once: int | None = Field(description="Most cells that a machine trained at once.")
    commits: tuple[str, ...] = Field(description="Commits of its runs; `+changes` if not clean.")
    cells: tuple[CellLine, ...] = Field(description="Its runs, missing ones too.")

    def perplexity(self, metric: Metric) -> PerplexitySummary | None:
        """The summary of the split that the metric names."""
        return self.valid if metric == "valid_perplexity" else self.test


class PairResult(Model):
    """Two frameworks at one variant and number of devices, compared by the plan's metric."""

    variant: str = Field(description="Name of the variant.")
    devices: int = Field(description="Data-parallel replicas.")
    a: Framework = Field(description="First framework.")
    b: Framework = Field(description="Second framework.")
    outcome: Difference = Field(description="Tests and verdict.")


class PublishedResult(Model):
    """A published number beside ours."""

    published: PublishedValue = Field(description="The published number and its source.")
    framework: Framework = Field(description="Framework of our row.")
    n_ok: int = Field(description="Seeds of our row that ended well.")
    ours: float | None = Field(description="Our number.")
    low: float | None = Field(description="Lower end of our 95 % interval, or lower quartile.")
    high: float | None = Field(description="Upper end of our 95 % interval, or upper quartile.")
    relative_gap: float | None = Field(description="(ours - published) / published.")
    inside: bool | None = Field(
        description="Whether it lies in our 95 % interval, if there is one."
    )


class FigureFile(Model):
    """A figure of the experiment, as figures/{name}.svg and .png."""

    name: str = Field(description="File name without its ending.")
    title: str = Field(description="What is drawn.")
    caption: str = Field(description="How to read it.")
    alternative: str = Field(description="The same in words, for those who cannot see it.")


class Analysis(Model):
    """`analysis.json`: everything the report says of one experiment."""

    name: str = Field(description="Name of the experiment.")
    title: str = Field(description="Heading.")
    description: str = Field(description="One paragraph.")
    corpus_folder: str = Field(description="Prepared corpus.")
    metric: Metric = Field(description="What the frameworks are compared by.")
    equivalence_margin: float = Field(description="Largest difference that does not matter [nats].")
    floor_perplexity: float | None = Field(description="No model can be better on average.")
    best_bigram_perplexity: float | None = Field(description="Best possible bigram model.")
    rows: tuple[RowResult, ...] = Field(description="The results table.")
    pairs: tuple[PairResult, ...] = Field(description="Frameworks against one another.")
    published: tuple[PublishedResult, ...] = Field(description="Ours against published numbers.")
    figures: tuple[FigureFile, ...] = Field((), description="What was drawn.")

    def count(self, state: State) -> int:
        """Number of cells in the state."""
        return sum(cell.state == state for row in self.rows for cell in row.cells)


def analyse(
    plan: ExperimentPlan,
    rows: Sequence[Row],
    corpus: CorpusFacts,
    published: Sequence[PublishedValue],
) -> Analysis:
    """All numbers of one experiment.

    Args:
        plan: the experiment.
        rows: as `collect_rows` returns them.
        corpus: facts of the plan's corpus.
        published: published numbers of all experiments; those of this one are taken.
    """
    results = tuple(_row_result(row) for row in rows)
    return Analysis(
        name=plan.name,
        title=plan.title,
        description=plan.description,
        corpus_folder=plan.corpus_folder,
        metric=plan.metric,
        equivalence_margin=plan.equivalence_margin,
        floor_perplexity=corpus.floor_perplexity,
        best_bigram_perplexity=corpus.best_bigram_perplexity,
        rows=results,
        pairs=_pairs(plan, rows),
        published=tuple(
            _beside(value, row)
            for value in published
            for row in results
            if value.experiment == plan.name
            and value.variant == row.variant
            and value.framework in (None, row.framework)
            and value.devices == row.devices
        ),
    )


def _row_result(row: Row) -> RowResult:
    metrics = row.metrics()

    def summary(split: Split) -> PerplexitySummary | None:
        nlls = row.nlls(split)
        return summarise_perplexity(nlls) if nlls else None

    device_memory = [
        m.peak_device_memory_bytes for m in metrics if m.peak_device_memory_bytes is not None
    ]
    return RowResult(
        variant=row.variant,
        framework=row.framework,
        devices=row.devices,
        implementation=row.implementation,
        n_ok=len(row.ok),
        n_planned=len(row.cells),
        usable=row.usable,
        problem=row.problem,
        fingerprint=next((c.metrics.fingerprint for c in row.cells if c.metrics), None),
        train=summary("train"),
        valid=summary("valid"),
        test=summary("test"),
        best_epoch=quartiles([m.best_epoch for m in metrics if m.best_epoch is not None]),
        tokens_per_second=quartiles(
            [m.tokens_per_second for m in metrics if m.tokens_per_second is not None]
        ),
        seconds_per_epoch=quartiles(
            [m.seconds_per_epoch for m in metrics if m.seconds_per_epoch is not None]
        ),
        training_seconds=quartiles([m.seconds.training for m in metrics]),
        total_seconds=quartiles([m.seconds.total for m in metrics]),
        epochs=quartiles([m.epochs for m in metrics]),
        seconds=_mean_seconds([m.seconds for m in metrics]) if metrics else None,
        parameters=max((m.parameters for m in metrics), default=None),
        peak_memory_bytes=max((m.peak_memory_bytes for m in metrics), default=None),
        peak_device_memory_bytes=max(device_memory, default=None),
        framework_versions=_distinct(cell.provenance.framework_version for cell in row.cells),
        machines=_distinct(_machine(cell.provenance) for cell in row.cells),
        cells_at_once=max(
            (c.provenance.cells_at_once for c in row.cells if c.provenance.cells_at_once),
            default=None,
        ),
        commits=_distinct(_commit(cell.provenance) for cell in row.cells),
        cells=tuple(_cell_line(row, index) for index in range(len(row.cells))),
    )


def _distinct(values: Iterable[str | None]) -> tuple[str, ...]:
    return tuple(sorted({value for value in values if value}))


def _machine(provenance: Provenance) -> str | None:
    names = [provenance.cpu, *(gpu.get("name") for gpu in provenance.gpus)]
    return " + ".join(name for name in names if name) or None


def _commit(provenance: Provenance) -> str | None:
    if provenance.git_commit is None:
        return None
    return provenance.git_commit[:12] + ("+changes" if provenance.git_dirty else "")


def _mean_seconds(seconds: Sequence[Seconds]) -> Seconds:
    return Seconds(
        **{
            clock: sum(getattr(each, clock) for each in seconds) / len(seconds)
            for clock in Seconds.model_fields
        }
    )


def _cell_line(row: Row, index: int) -> CellLine:
    result = row.cells[index]
    metrics = result.metrics
    if metrics is None:
        return CellLine(
            cell=result.cell, path=result.cell.path, state="missing", reason=result.unusable
        )
    return CellLine(
        cell=result.cell,
        path=result.cell.path,
        state=result.state,
        reason=metrics.reason,
        best_epoch=metrics.best_epoch,
        epochs=metrics.epochs,
        valid_perplexity=metrics.valid.perplexity if metrics.valid else None,
        test_perplexity=metrics.test.perplexity if metrics.test else None,
        tokens_per_second=metrics.tokens_per_second,
        total_seconds=metrics.seconds.total,
    )


def _pairs(plan: ExperimentPlan, rows: Sequence[Row]) -> tuple[PairResult, ...]:
    """Every two frameworks of a variant and number of devices; one family of tests in all."""
    split: Split = "valid" if plan.metric == "valid_perplexity" else "test"
    groups: dict[tuple[str, int], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.variant, row.devices].append(row)
    couples = [couple for group in groups.values() for couple in combinations(group, 2)]
    outcomes = compare_pairs(
        [tuple(row.nlls(split) if row.usable else [] for row in couple) for couple in couples],  # type: ignore[misc]
        plan.equivalence_margin,
    )
    return tuple(
        PairResult(
            variant=a.variant, devices=a.devices, a=a.framework, b=b.framework, outcome=outcome
        )
        for (a, b), outcome in zip(couples, outcomes, strict=True)
    )


def _beside(value: PublishedValue, row: RowResult) -> PublishedResult:
    ours, low, high = _our_number(value.metric, row) if row.usable else (None, None, None)
    return PublishedResult(
        published=value,
        framework=row.framework,
        n_ok=row.n_ok,
        ours=ours,
        low=low,
        high=high,
        relative_gap=None if ours is None else ours / value.value - 1,
        inside=(
            low <= value.value <= high
            if value.metric.endswith("perplexity") and low is not None and high is not None
            else None
        ),
    )


def _our_number(
    metric: PublishedMetric, row: RowResult
) -> tuple[float | None, float | None, float | None]:
    """Our value and its spread.

    A perplexity has its 95 % interval, a speed, a time or a number of epochs is a median with
    quartiles, and a size has no spread.
    """
    if metric in ("parameters", "peak_device_memory_bytes"):
        return getattr(row, metric), None, None
    ours: PerplexitySummary | Quartiles | None = getattr(row, metric.removesuffix("_perplexity"))
    if ours is None:
        return None, None, None
    middle = ours.median if isinstance(ours, Quartiles) else ours.perplexity
    return middle, ours.low, ours.high
