"""Read what the runs of an experiment left, grouped into the rows of its table.

A row is (variant, framework, devices). A cell without metrics.json is kept as missing; so is, in a
partial report, one whose result cannot count.
"""

from __future__ import annotations

import contextlib
import csv
import json
import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ptbench.analysis.metrics import METRICS, Result
from ptbench.analysis.plan import ExperimentPlan, PlannedVariant
from ptbench.backends import FRAMEWORKS
from ptbench.configuration.obstacles import obstacle
from ptbench.configuration.search import found_specification
from ptbench.configuration.specification import Cell
from ptbench.errors import PtbenchError
from ptbench.model.recipe import Accelerator, Implementation, Recipe
from ptbench.model.work import flops_per_token, units_held
from ptbench.training.records import Metrics, perplexity, read_history, read_metrics

State = Literal["ok", "diverged", "missing"]
CANNOT_RUN = "cannot run here"  # so begins why a cell will have no result
OUTDATED = "outdated: its recipe has changed"  # why a result no longer counts
SHARED = "its runs are not known to have had one kind of machine to themselves"
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
    kneser_ney_nll_nats: dict[int, dict[str, float]] = Field(
        {}, description="What n-grams reach, by order and split [nats per token]."
    )

    @property
    def best_bigram_perplexity(self) -> float | None:
        """Return the perplexity of the best possible bigram model."""
        return None if self.best_bigram_nll_nats is None else perplexity(self.best_bigram_nll_nats)

    def ngram_perplexities(self, metric: str) -> dict[int, float]:
        """Return the perplexity of n-gram models by order, if the metric is one of theirs."""
        split = metric.removesuffix("_perplexity")
        of = self.kneser_ney_nll_nats.items()
        return {order: perplexity(nll[split]) for order, nll in of if split in nll}


class Provenance(BaseModel):
    """The part of provenance.json that the report shows; a run without it is still a result."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    git_commit: str | None = Field(None, description="Commit of ptbench that ran.")
    git_dirty: bool | None = Field(None, description="Whether the work tree had changes.")
    framework_version: str | None = Field(None, description="Version of the framework.")
    cpu: str | None = Field(None, description="Processor.")
    cores: int | None = Field(None, description="CPU cores that it could use.")
    gpus: tuple[dict[str, str], ...] = Field((), description="Name and driver of each GPU.")
    threads: int | None = Field(None, description="CPU threads that it was given.")
    cells_at_once: int | None = Field(
        None,
        description="Of older runs: cells that its machine trained when its last attempt "
        "began or ended, whichever are more.",
    )
    asked_megabytes: int | None = Field(None, description="Memory that its job asked for [MB].")
    asked_minutes: int | None = Field(None, description="Time that its job asked for [minutes].")
    slurm_job: str | None = Field(None, description="Number of its Slurm job.")
    started: str | None = Field(None, description="When the attempt that finished it began (UTC).")
    finished: str | None = Field(None, description="When it ended (UTC).")


@dataclass(frozen=True)
class CellResult:
    """One planned run and what it left, if it has finished."""

    cell: Cell
    result: Result | None = None
    provenance: Provenance = field(default_factory=Provenance)
    unusable: str | None = None  # why what it left does not count

    @property
    def state(self) -> State:
        """Return how it ended."""
        return self.result.metrics.status if self.result else "missing"

    @property
    def reason(self) -> str | None:
        """Return why it diverged or is missing."""
        return self.result.metrics.reason if self.result else self.unusable

    @property
    def machine(self) -> str | None:
        """Return its processor and its kinds of GPU."""
        hardware = self.result.metrics.hardware if self.result else None
        cores = hardware.cores if hardware else self.provenance.cores
        cpu = self.provenance.cpu and f"{self.provenance.cpu}{f', {cores} cores' if cores else ''}"
        names = [cpu, *(gpu.get("name") for gpu in self.provenance.gpus)]
        return " + ".join(dict.fromkeys(name for name in names if name)) or None

    def at_once(self, accelerator: Accelerator | None) -> int | None:
        """Return the most cells that shared what it trained on; None if that is unknown.

        Slurm gives a GPU to one job alone. Runs on the node's other GPUs take nothing from it as
        long as there are cores for all, which `Hardware.busy` tells.
        """
        if accelerator == "cuda" and self.provenance.slurm_job:
            return 1
        if self.result is None:
            return None
        metrics = self.result.metrics
        if metrics.hardware and metrics.hardware.cells_at_once:
            return metrics.hardware.cells_at_once
        return self.provenance.cells_at_once if metrics.attempts == 1 else None

    @property
    def busy(self) -> str | None:
        """Return how busy its machine was, if it was too busy for the run's speed to count."""
        hardware = self.result.metrics.hardware if self.result else None
        if hardware is None or not hardware.busy:
            return None
        return (
            f"its machine was busy: other processes used {hardware.other_cores:.1f} of "
            f"{hardware.cores} cores, and the run had {hardware.threads} "
            f"thread{'' if hardware.threads == 1 else 's'}"
        )


class Placed(Protocol):
    """Where the runs of a row were made, and what was beside them."""

    @property
    def accelerator(self) -> Accelerator | None: ...
    @property
    def machines(self) -> tuple[str, ...]: ...
    @property
    def cells_at_once(self) -> int | None: ...
    @property
    def busy(self) -> int: ...


def is_alone(row: Placed) -> bool:
    """Return whether each run of a row is known to have had its machine to itself."""
    return row.cells_at_once == 1 and not row.busy


def most_at_once(counts: Iterable[int | None]) -> int | None:
    """Return the most cells at once; None if a run does not know, so may have had others beside."""
    found = list(counts)
    most = max(filter(None, found), default=None)
    return None if most == 1 and None in found else most


def comparable(metric: str, rows: Iterable[Placed]) -> bool:
    """Return whether rows' numbers of a metric may be set against each other.

    What depends on the machine compares on one kind of device and machine; and times, speeds and
    what is computed from them only where each run had its machine to itself. Memory does not depend
    on what runs beside.
    """
    if not METRICS[metric].depends_on_machine:
        return True
    rows = list(rows)
    places = {(row.machines, row.accelerator) for row in rows}
    one_kind = len(places) == 1 and all(len(machines) == 1 for machines, _ in places)
    return one_kind and (METRICS[metric].unit == "bytes" or all(map(is_alone, rows)))


@dataclass(frozen=True)
class Row:
    """The seeds of one (variant, framework, devices)."""

    variant: str
    framework: str
    devices: int
    planned: PlannedVariant
    cells: tuple[CellResult, ...]
    accelerator: Accelerator | None = None  # kind of device, if the plan says it

    def results(self, state: State = "ok") -> dict[int, Result]:
        """Return what the cells in a state left, by seed; only those that are ok are averaged."""
        return {c.cell.seed: c.result for c in self.cells if c.result and c.state == state}

    def values(self, metric: str) -> dict[int, float]:
        """Return a metric of each seed that ended well, as its `read` gives it."""
        read = METRICS[metric].read
        found = {seed: read(result) for seed, result in self.results().items()}
        return {seed: value for seed, value in found.items() if value is not None}

    @property
    def implementation(self) -> Implementation:
        """Return how its models compute: stock or tuned, as the recipe says."""
        return self.planned.implementation

    @property
    def machines(self) -> tuple[str, ...]:
        """Return the kinds of machine of its runs."""
        return tuple(sorted({cell.machine for cell in self.cells if cell.machine}))

    @property
    def cells_at_once(self) -> int | None:
        """Return the most cells that shared what its runs trained on; None if that is unknown."""
        return most_at_once(run.at_once(self.accelerator) for run in self.cells if run.result)

    @property
    def busy(self) -> int:
        """Return how many of its runs had a machine that was busier than its cores."""
        return sum(cell.busy is not None for cell in self.cells)

    @property
    def complete(self) -> bool:
        """Return whether every planned seed ended well."""
        return all(cell.state == "ok" for cell in self.cells)

    @property
    def usable(self) -> bool:
        """Return whether the seeds that ended well stand for the row: at most one other failed."""
        ok = len(self.results())
        return ok > 0 and len(self.cells) - ok <= MAXIMUM_FAILED

    @property
    def problem(self) -> str | None:
        """Return which seeds failed, in words; None if none did."""
        if self.complete:
            return None
        if all(cell.state == "missing" for cell in self.cells):
            reasons = dict.fromkeys(cell.unusable for cell in self.cells if cell.unusable)
            return "no seed has a result" + (f" ({'; '.join(reasons)})" if reasons else "")
        words = {"missing": "has no result", "diverged": "diverged"}
        listed = ", ".join(
            f"seed {c.cell.seed} {words[c.state]}" + (f" ({c.unusable})" if c.unusable else "")
            for c in self.cells
            if c.state != "ok"
        )
        if self.usable:
            return listed
        diverged = any(cell.state == "diverged" for cell in self.cells)
        return f"{'invalid' if diverged else 'incomplete'}: {listed}"


def collect_rows(
    plan: ExperimentPlan,
    results_folder: Path,
    fingerprint: Callable[[Cell], str | None] | None = None,
) -> list[Row]:
    """Return the rows of an experiment, by variant and devices as planned, then by framework.

    Args:
        plan: the experiment.
        results_folder: holds cells/.
        fingerprint: of a cell as it is now, for a partial report: a cell with another one counts
            as missing, and so does one that cannot be read. None: every result must count.

    Raises:
        AnalysisError: if a file cannot be read, or if cells that would be averaged or compared have
            different fingerprints or were scored on different numbers of tokens.
    """
    rows: dict[tuple[str, int, str], list[CellResult]] = defaultdict(list)
    variants: dict[str, list[CellResult]] = defaultdict(list)
    alike: dict[tuple[str, Accelerator | None], list[CellResult]] = defaultdict(list)
    for cell in plan.cells:
        result = _with_rent(_of_itself(_read_usable(cell, results_folder, fingerprint), plan), plan)
        why = obstacle(plan.cannot_run, cell)
        if why and not _is_current(result, plan, results_folder):
            result = CellResult(cell, unusable=f"{CANNOT_RUN}: {why}")
        rows[cell.variant, cell.devices, cell.framework].append(result)
        variants[cell.variant].append(result)
        alike[cell.variant, plan.accelerators.get(cell.framework)].append(result)
    for (variant, _), cells in alike.items():
        _refuse_mixed(
            (c for c in cells if c.result),
            lambda metrics: metrics.fingerprint,
            f"cells of {variant} were run with different settings and must not be averaged; "
            "run the experiment again to renew the outdated ones: fingerprint",
        )
    for variant, cells in variants.items():
        _refuse_mixed(
            (c for c in cells if c.state == "ok"),
            lambda m: tuple(score and score.tokens for score in (m.valid, m.test)),
            f"cells of {variant} were scored on different numbers of tokens and must not be "
            "compared: valid and test tokens",
        )
    order, frameworks = list(variants), list(FRAMEWORKS)
    return [
        Row(
            variant,
            framework,
            devices,
            plan.variant(variant),
            tuple(sorted(cells, key=lambda c: c.cell.seed)),
            plan.accelerators.get(framework),
        )
        for (variant, devices, framework), cells in sorted(
            rows.items(), key=lambda r: (order.index(r[0][0]), r[0][1], frameworks.index(r[0][2]))
        )
    ]


def _is_current(found: CellResult, plan: ExperimentPlan, results_folder: Path) -> bool:
    """Return whether a cell that cannot run here has a result of its present recipe."""
    if found.result is None:
        return False
    variant, framework = found.cell.variant, found.cell.framework
    now = plan.fingerprints.get(variant, {}).get(framework)
    if file := plan.found.get(variant):  # `results/searches/...`
        with contextlib.suppress(FileNotFoundError):
            own = found_specification(results_folder.joinpath(*Path(file).parts[1:]), variant)
            now = own.on(plan.accelerators[framework]).fingerprint
    return now == found.result.metrics.fingerprint


def _read_usable(
    cell: Cell, results_folder: Path, fingerprint: Callable[[Cell], str | None] | None
) -> CellResult:
    """Read a cell; given fingerprints, one whose result cannot count is missing, with a reason."""
    if fingerprint is None:
        return _read_cell(cell, results_folder)
    try:
        found = _read_cell(cell, results_folder)
    except AnalysisError as error:
        return CellResult(cell, unusable=str(error))
    if found.result and found.result.metrics.fingerprint != fingerprint(cell):
        return CellResult(cell, unusable=OUTDATED)
    return found


def _of_itself(found: CellResult, plan: ExperimentPlan) -> CellResult:
    """Return a cell without what counters say of all runs that shared its GPU or machine."""
    accelerator = plan.accelerators.get(found.cell.framework)
    if found.result is None or found.at_once(accelerator) == 1:
        return found
    metrics = found.result.metrics
    if metrics.hardware is None:
        return found
    without = dict.fromkeys(("gpu_utilization", "gpu_memory_bytes", "gpu_joules", "cpu_joules"))
    hardware = metrics.hardware.model_copy(update=without)
    metrics = metrics.model_copy(update={"hardware": hardware})
    return replace(found, result=found.result._replace(metrics=metrics))


def _with_rent(found: CellResult, plan: ExperimentPlan) -> CellResult:
    """Return a cell with what a second of its GPUs or CPU cores costs, where that is known."""
    hour = plan.rents.get(found.cell.framework)
    if found.result is None or hour is None:
        return found
    accelerator, threads = plan.accelerators.get(found.cell.framework), found.provenance.threads
    if accelerator == "cuda" and found.at_once(accelerator) != 1:
        return found  # the others would pay, too
    if accelerator != "cuda" and threads is None:
        return found
    hardware = found.result.metrics.hardware
    cores = hardware.cores if hardware else None
    units = units_held(accelerator or "cpu", found.cell.devices, threads or 1, cores)
    return replace(found, result=found.result._replace(rent_per_second=units * hour / 3600))


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
        provenance = Provenance.model_validate_json(path.read_bytes() if path.exists() else b"{}")
    except FileNotFoundError as error:
        raise AnalysisError(f"{path} is missing although the run has finished") from error
    except (OSError, ValidationError, UnicodeDecodeError, csv.Error) as error:
        raise AnalysisError(
            f"{path} cannot be read ({first_line(error)}); delete the cell's metrics.json and run "
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
    scores = (metrics.train, metrics.valid, metrics.test)
    if metrics.status == "ok" and any(s is None or not math.isfinite(s.nll) for s in scores):
        raise AnalysisError(
            f"{folder / 'metrics.json'} says ok but lacks a finite score of a split"
        )
    flops = _flops_per_token(folder / "recipe.yaml", metrics.vocabulary_size)
    return CellResult(cell, Result(metrics, history, flops), provenance)


def _flops_per_token(recipe_yaml: Path, vocabulary_size: int) -> float | None:
    """Return the operations of a run's training step for each token; None if they are unknown.

    Sparse products are not those that are counted.
    The trainer writes each value of recipe.yaml as JSON, which is read a hundred times as fast.
    """
    try:
        lines = [line.partition(": ") for line in recipe_yaml.read_text().splitlines()]
        found = {key: json.loads(value) for key, _, value in lines if key in Recipe.model_fields}
        recipe = Recipe.model_validate(found)
        return None if recipe.kernel == "sparse" else flops_per_token(recipe, vocabulary_size)
    except (OSError, ValueError):
        return None


def first_line(error: Exception) -> str:
    """Return the first problem that an error tells of, in one line."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc'])) or 'file'}: {first['msg']}"
    return str(error).splitlines()[0]


def _refuse_mixed(
    cells: Iterable[CellResult], key: Callable[[Metrics], Hashable], message: str
) -> None:
    """Raise AnalysisError if the finished cells do not all have the same key."""
    groups: dict[Hashable, list[str]] = defaultdict(list)
    for cell in cells:
        assert cell.result is not None
        groups[key(cell.result.metrics)].append(cell.cell.path)
    if len(groups) > 1:
        listed = "; ".join(f"{value} in {', '.join(paths)}" for value, paths in groups.items())
        raise AnalysisError(f"{message} {listed}")


def read_corpus_facts(results_folder: Path, corpus_folder: str) -> CorpusFacts:
    """Return what corpus.json says about the corpus' floor; nothing where there is no such file.

    Raises:
        AnalysisError: if corpus.json is there but cannot be read.
    """
    path = results_folder / "corpora" / corpus_folder / "corpus.json"
    if not path.exists():
        return CorpusFacts()
    try:
        return CorpusFacts.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise AnalysisError(f"{path} cannot be read ({first_line(error)})") from error
