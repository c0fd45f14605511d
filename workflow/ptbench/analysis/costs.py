"""What a study takes before it is run: device time, wall-clock time, disk, energy and money.

A run's time comes from the first of these that there is: the run itself, if it has finished; the
other seeds of its row; the same run in the budget `smoke`, scaled to its text and epochs; the
same model in other frameworks on the same kind of device; the speeds of its framework in other
finished runs, scaled by the model's matrix products; the bound on the safe side that its job asks a
cluster for. Of a study that is under way, the pace of a row's running runs comes before the last
four.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from ptbench.configuration.config import Prices
from ptbench.configuration.requests import SMOKE, Used, used
from ptbench.configuration.specification import Cell
from ptbench.configuration.study import Study
from ptbench.corpus import CorpusError
from ptbench.corpus.definitions import (
    SPLITS,
    CorpusDefinition,
    DownloadedCorpus,
    FolderCorpus,
    MarkovCorpus,
    texts_in,
)
from ptbench.corpus.vocabulary import tokenize
from ptbench.errors import ConfigurationError
from ptbench.model import work
from ptbench.model.optimizers import OPTIMIZER_SLOTS
from ptbench.model.recipe import Accelerator, Recipe
from ptbench.model.shapes import stored_bytes
from ptbench.model.work import CorpusSize
from ptbench.training.records import Metrics, read_metrics

Source = Literal["finished", "other seeds", "smoke", "pace", "frameworks", "speeds", "bound"]
SOURCES: dict[Source, str] = {
    "finished": "by their own results",
    "other seeds": "by other seeds of the same row",
    "smoke": "by the same run in the budget smoke, scaled to its text and epochs",
    "pace": "by how far a run of the same row has come",
    "frameworks": "by the same model in other frameworks, on the same kind of device",
    "speeds": "by the speed of their framework in other finished runs",
    "bound": "by bounds on the safe side, because nothing like them has finished here",
}


# Tokens of a line, its end counted: of PTB's sentences. Lines of other texts may be longer.
LINE_TOKENS = 22


class Measured(NamedTuple):
    """A run that ended well, and what its time depends on."""

    metrics: Metrics
    recipe: Recipe
    flops: float  # of the products of a training step for each token


class RunCost(NamedTuple):
    """What one planned run takes."""

    cell: Cell
    seconds: float
    source: Source
    units: int  # GPUs that it holds, or CPU cores
    accelerator: Accelerator  # which of the two
    disk_bytes: int  # of the parameters that are kept
    memory_bytes: int  # main memory, at most; measured where a seed of its row has finished

    @property
    def unit_hours(self) -> float:
        """Return GPU-hours or core-hours."""
        return self.seconds * self.units / 3600


@dataclass(frozen=True)
class Costs:
    """What several runs take together."""

    runs: Sequence[RunCost]
    prices: Prices
    accelerator: Accelerator  # of most runs of the study; single frameworks may have another

    @property
    def unit_hours(self) -> float:
        """Return GPU-hours or core-hours, on the kind of device that most runs have."""
        return sum(r.unit_hours for r in self.runs if r.accelerator == self.accelerator)

    @property
    def other_hours(self) -> float:
        """Return the same of the runs on the other kind."""
        return sum(r.unit_hours for r in self.runs if r.accelerator != self.accelerator)

    @property
    def left(self) -> Costs:
        """Return what is still to be run."""
        runs = [run for run in self.runs if run.source != "finished"]
        return Costs(runs, self.prices, self.accelerator)

    def hours(self, units: int) -> float:
        """Return the shortest wall-clock time on so many GPUs or cores [h].

        No schedule is shorter than the longest run, nor than all runs without a gap. There are
        enough devices of the other kind.
        """
        longest = max((run.seconds / 3600 for run in self.runs), default=0.0)
        return max(longest, self.unit_hours / units)

    @property
    def disk_bytes(self) -> int:
        """Return the size of all parameters that are kept [bytes]."""
        return sum(run.disk_bytes for run in self.runs)

    @property
    def kilowatt_hours(self) -> float:
        """Return the energy, by the assumed power of a GPU or core [kWh]."""
        return sum(r.unit_hours * self.prices.of(r.accelerator)[1] / 1000 for r in self.runs)

    @property
    def money(self) -> float:
        """Return the rent of the GPUs or cores, which includes their energy."""
        return sum(r.unit_hours * self.prices.of(r.accelerator)[0] for r in self.runs)

    @property
    def by_source(self) -> dict[Source, int]:
        """Return how many runs are estimated in which way."""
        counts = {source: sum(run.source == source for run in self.runs) for source in SOURCES}
        return {source: count for source, count in counts.items() if count}


class Estimator:
    """Estimates the time of runs from the finished runs of a results folder."""

    def __init__(self, study: Study, results: Path) -> None:
        """Read every finished run whose variant and meaning the study knows."""
        self.study, self.results = study, results
        self.ended: dict[Cell, Metrics] = {}  # diverged ones too, which are never run again
        self.finished: dict[Cell, Measured] = {}
        self.rows: dict[tuple[str, str, int], list[Metrics]] = defaultdict(list)
        self.smoke: dict[str, list[Used]] = {}
        self.sizes: dict[str, CorpusSize] = {}
        for path in sorted((results / "cells").glob("*/*/devices-*/seed-*/metrics.json")):
            self._read(path)

    def _read(self, path: Path) -> None:
        try:
            metrics = read_metrics(path)
            specification = self.study.specification(metrics.cell.variant)
            specification = self.study.on(specification, metrics.cell.framework)
        except (OSError, ValueError, ConfigurationError):
            return  # of another configuration; what cannot be read is no measurement
        if metrics.fingerprint != specification.fingerprint:
            return
        recipe, cell = specification.recipe, metrics.cell
        self.ended[cell] = metrics
        if metrics.status != "ok":
            return
        flops = work.flops_per_token(recipe, metrics.vocabulary_size)
        self.finished[cell] = Measured(metrics, recipe, flops)
        self.rows[cell.variant, cell.framework, cell.devices].append(metrics)

    @property
    def accelerator(self) -> Accelerator:
        """Return the kind of device that most runs of the study have."""
        kinds = map(self.study.config.accelerator_of, (c.framework for c in self.study.cells))
        return Counter(kinds).most_common(1)[0][0]

    def size(self, recipe: Recipe) -> CorpusSize:
        """Return the size of a recipe's corpus, as prepared or else as defined."""
        folder = recipe.corpus_folder
        if folder not in self.sizes:
            prepared = self.results / "corpora" / folder / "corpus.json"
            if prepared.exists():
                self.sizes[folder] = work.corpus_size(str(prepared))
            else:
                self.sizes[folder] = planned_size(*self.study.corpus(folder))
        return self.sizes[folder]

    def run(self, cell: Cell) -> RunCost:
        """Return what a run takes."""
        recipe = self.study.specification(cell.variant).recipe
        size = self.size(recipe)
        seconds, source = self._seconds(cell, recipe, size)
        config = self.study.config
        accelerator = config.accelerator_of(cell.framework)
        cores = None
        if cell in self.ended and (hardware := self.ended[cell].hardware):
            cores = hardware.cores
        units = work.units_held(accelerator, cell.devices, config.threads, cores)
        # The last checkpoint has the present and the best parameters, and the optimizer's arrays.
        copies = {"none": 0, "best": 1, "all": 3 + len(OPTIMIZER_SLOTS[recipe.optimizer])}
        disk = copies[config.keep_checkpoints] * stored_bytes(recipe, size.vocabulary_size)
        memory = self._memory_bytes(cell, size)
        return RunCost(cell, seconds, source, units, accelerator, disk, memory)

    def _row(self, cell: Cell) -> list[Metrics]:
        """Return the finished runs of a cell's row."""
        return self.rows.get((cell.variant, cell.framework, cell.devices), [])

    def _memory_bytes(self, cell: Cell, size: CorpusSize) -> int:
        if row := self._row(cell):
            return max(metrics.peak_memory_bytes for metrics in row)
        if smoke := self._smoke(cell):
            return round(SMOKE.memory * max(used.memory_bytes for used in smoke))
        return 1_000_000 * self.study.memory_bound(cell, size)

    def _seconds(self, cell: Cell, recipe: Recipe, size: CorpusSize) -> tuple[float, Source]:
        if cell in self.ended:
            return self.ended[cell].seconds.total, "finished"
        if row := self._row(cell):
            return statistics.median(each.seconds.total for each in row), "other seeds"
        if smoke := self._smoke(cell):
            epochs = recipe.epochs
            return statistics.median(u.scaled_seconds(epochs, size) for u in smoke), "smoke"
        kind = self.study.config.accelerator_of
        if others := [
            metrics.seconds.total
            for (variant, framework, devices), row in self.rows.items()
            for metrics in row
            if (variant, devices) == (cell.variant, cell.devices)
            and kind(framework) == kind(cell.framework)
        ]:
            return statistics.median(others), "frameworks"
        return self.without_its_row(cell, recipe, size)

    def _smoke(self, cell: Cell) -> list[Used]:
        """Return what the seeds of a cell's row used in the budget `smoke`."""
        row = cell.path.rpartition("/")[0]
        if row not in self.smoke:
            self.smoke[row] = self.study.smoke_used_by(row, self.results)
        return self.smoke[row]

    def without_its_row(self, cell: Cell, recipe: Recipe, size: CorpusSize) -> tuple[float, Source]:
        """Return the seconds of a run by other models than its own, or by the bound."""
        flops = work.flops_per_token(recipe, size.vocabulary_size)
        alike = [
            measured
            for other, measured in self.finished.items()
            if (other.framework, other.devices) == (cell.framework, cell.devices)
            and measured.recipe.implementation == recipe.implementation
            and measured.recipe.precision == recipe.precision
            and measured.recipe.kernel == recipe.kernel
            and measured.recipe.budget in ("full", recipe.budget)  # few steps tell little of many
            and other.variant != cell.variant
        ]
        if alike:
            nearest = min(alike, key=lambda m: abs(math.log(m.flops / flops)))
            run, ratio = used(nearest.metrics.model_dump()), flops / nearest.flops
            read = work.budgeted(recipe, cell.devices, size)
            return run.scaled_seconds(recipe.within_budget().epochs, read, ratio), "speeds"
        accelerator = self.study.config.accelerator_of(cell.framework)
        return 60.0 * work.runtime_minutes(recipe, accelerator, cell.devices, size), "bound"

    def error(self) -> list[float]:
        """Return, for the study's finished runs, their time over the estimate by other models."""
        ratios = []
        for cell in filter(self.finished.__contains__, self.study.cells):
            measured = self.finished[cell]
            seconds, source = self.without_its_row(
                cell, measured.recipe, self.size(measured.recipe)
            )
            if source == "speeds":
                ratios.append(measured.metrics.seconds.total / seconds)
        return ratios


def planned_size(name: str, definition: CorpusDefinition, subset: int | None = None) -> CorpusSize:
    """Return the size of a corpus before it is prepared.

    A synthetic text ends with a whole sentence, so it has a few tokens more. Of a subset the number
    of lines is known, and the vocabulary is taken to be the whole one.

    Args:
        name: of the corpus.
        definition: where its text comes from.
        subset: lines of each split that are used; None: all.

    Raises:
        CorpusError: if a text of a folder is missing, or only preparing the corpus can tell.
    """
    if subset is not None:
        every = planned_size(name, definition)
        tokens = {s: min(count, subset * LINE_TOKENS) for s, count in every.tokens.items()}
        return CorpusSize(tokens, every.vocabulary_size)
    if isinstance(definition, FolderCorpus):
        paths = texts_in(name, definition.folder)
        words = {split: tokenize(path.read_text(encoding="utf-8")) for split, path in paths.items()}
        return CorpusSize({s: len(found) for s, found in words.items()}, len(set(words["train"])))
    if isinstance(definition, DownloadedCorpus):
        size = definition.size
        if size is None:
            raise CorpusError(
                f"corpus {name}: its size is not known before it is prepared; give it a `size`"
            )
        return CorpusSize({split: getattr(size, split) for split in SPLITS}, size.vocabulary)
    tokens = {str(split): getattr(definition, f"{split}_tokens") for split in SPLITS}
    if isinstance(definition, MarkovCorpus):
        first_and_last = 2 * definition.openers_per_topic
        of_topics = definition.topics * (first_and_last + definition.content_words_per_topic)
        return CorpusSize(tokens, of_topics + definition.function_words + 1)
    return CorpusSize(tokens, definition.words + 1)
