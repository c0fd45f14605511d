"""The analysis of one experiment: all numbers of its tables, figures and page, from its cells.

Values in, values out; `collect.py` reads files, `ptbench.report` writes them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import NamedTuple

from pydantic import Field

from ptbench.analysis.agreement import Judgement, PublishedVerdict, judge_published
from ptbench.analysis.collect import (
    SHARED,
    CellResult,
    CorpusFacts,
    Provenance,
    Row,
    State,
    comparable,
    is_alone,
)
from ptbench.analysis.metrics import METRICS, PERPLEXITY, Summary
from ptbench.analysis.plan import ExperimentPlan, Settings
from ptbench.analysis.published import PublishedValue
from ptbench.analysis.reaching import Reaching, compare_reaching
from ptbench.analysis.statistics import Difference, Pair, compare_pairs, joint_equivalence_p
from ptbench.analysis.variants import (
    BestVariant,
    Sweep,
    TrendResult,
    VariantComparison,
    compare_variants,
    find_sweeps,
    variant_labels,
)
from ptbench.backends import Framework
from ptbench.configuration.experiments import Compared
from ptbench.configuration.papers import NamedRow
from ptbench.configuration.specification import Cell, is_smoke, reductions, whole
from ptbench.model.recipe import Accelerator, Implementation, Model

NOT_JUDGED = Judgement("cannot tell")


class CellLine(Model):
    """One planned run in the list of runs."""

    cell: Cell = Field(description="Which run.")
    state: State = Field(description="ok, diverged or missing.")
    reason: str | None = Field(None, description="Why it counts as diverged or missing.")
    note: str | None = Field(None, description="What else to know: whether its machine was busy.")
    values: dict[str, float] = Field({}, description="Its metrics by name, where it has them.")
    asked_memory: float | None = Field(None, description="What its job asked for, over its peak.")
    asked_time: float | None = Field(None, description="What its job asked for, over its total.")

    @property
    def path(self) -> str:
        """Return its folder, relative to results/cells."""
        return self.cell.path


class RowResult(Model):
    """One row of the results table. Summaries are over the seeds that ended well."""

    variant: str = Field(description="Name of the variant.")
    framework: Framework = Field(description="Framework.")
    devices: int = Field(description="Data-parallel replicas.")
    accelerator: Accelerator | None = Field(None, description="Kind of device that trained.")
    implementation: Implementation = Field(description="stock or tuned, as the recipe says.")
    n_ok: int = Field(description="Seeds that ended well.")
    n_diverged: int = Field(description="Seeds that diverged.")
    n_planned: int = Field(description="Seeds planned.")
    usable: bool = Field(description="False if two or more seeds failed, or all did.")
    problem: str | None = Field(description="Which seeds failed.")
    fingerprint: str | None = Field(description="Of the specification that was run.")
    metrics: dict[str, Summary] = Field(description="By name, those that its seeds have.")
    framework_versions: tuple[str, ...] = Field(description="Of the framework, in its runs.")
    machines: tuple[str, ...] = Field(description="Processors and GPUs of its runs.")
    cells_at_once: int | None = Field(
        description="Most cells that a machine trained at once; null: unknown."
    )
    busy: int = Field(0, description="Its runs whose machine was busier than its cores.")
    commits: tuple[str, ...] = Field(description="Commits of its runs; `+changes` if not clean.")
    began: str | None = Field(None, description="When the first of its runs began (UTC).")
    ended: str | None = Field(None, description="When the last of its runs ended (UTC).")
    cells: tuple[CellLine, ...] = Field(description="Its runs, missing ones too.")

    @property
    def alone(self) -> bool:
        """Return whether each of its runs is known to have had its machine to itself."""
        return is_alone(self)

    def value(self, metric: str) -> float | None:
        """Return the number that stands for the row's seeds, if there is one."""
        summary = self.metrics.get(metric)
        return summary.value if summary else None

    def seeds(self, metric: str) -> list[float]:
        """Return the number of each seed that ended well."""
        return list(self.good_seeds(metric).values())

    def good_seeds(self, metric: str) -> dict[int, float]:
        """Return the number of each seed that ended well, by seed."""
        return {
            line.cell.seed: line.values[metric]
            for line in self.cells
            if line.state == "ok" and metric in line.values
        }

    def seed_values(self, metric: str) -> dict[int, float]:
        """Return the number of each seed that finished; a diverged one's perplexity is infinite."""
        good, infinite = self.good_seeds(metric), METRICS[metric].kind is PERPLEXITY
        return {
            line.cell.seed: good.get(line.cell.seed, math.inf)
            for line in self.cells
            if line.cell.seed in good or (infinite and line.state == "diverged")
        }


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
    low: float | None = Field(description="Lower end of our summary of the metric.")
    high: float | None = Field(description="Upper end of our summary of the metric.")
    relative_gap: float | None = Field(description="(ours - published) / published.")
    verdict: PublishedVerdict = Field(description="Whether the number is reproduced.")
    expected_low: float | None = Field(
        description="Lower end of the 95 % prediction interval: where the number was expected."
    )
    expected_high: float | None = Field(description="Upper end of the same.")
    seeds: int | None = Field(description="Seeds that would settle it, if it cannot be told.")
    reason: str | None = Field(None, description="Why it cannot be told, where that is known.")
    cv: float | None = Field(description="CV* of the published number and ours [%].")


class VariantFacts(Model):
    """What tells a variant from the others of its experiment."""

    name: str = Field(description="Name of the variant.")
    label: str = Field(description="A short name, by what tells it from the others.")
    settings: Settings = Field(description="Its values of the keys in which variants differ.")


class FigureFile(Model):
    """A figure of the experiment, as figures/{name}.svg."""

    name: str = Field(description="File name without its ending.")
    title: str = Field(description="What is drawn.")
    caption: str = Field(description="How to read it.")
    alternative: str = Field(description="The same in words, for those who cannot see it.")


class Analysis(Model):
    """`analysis.json`: everything the report says about one experiment."""

    name: str = Field(description="Name of the experiment.")
    title: str = Field(description="Heading.")
    description: str = Field(description="One paragraph.")
    corpus_folder: str = Field(description="Prepared corpus.")
    metric: Compared = Field(description="What frameworks and variants are compared by.")
    equivalence_margin: float = Field(description="Largest difference that does not matter [nats].")
    floor_perplexity: float | None = Field(description="No model can be better on average.")
    best_bigram_perplexity: float | None = Field(description="Best possible bigram model.")
    ngram_perplexities: dict[int, float] = Field(
        {}, description="Kneser-Ney n-grams by order, in the metric, where it is of valid or test."
    )
    rows: tuple[RowResult, ...] = Field(description="The results table.")
    variants: tuple[VariantFacts, ...] = Field(description="Its variants, in order.")
    sweeps: tuple[Sweep, ...] = Field(description="What its variants sweep.")
    baseline: str = Field(description="The variant that the others are compared with.")
    comparisons: tuple[VariantComparison, ...] = Field(description="Variants and the baseline.")
    trends: tuple[TrendResult, ...] = Field(description="Along each line of each sweep.")
    best: tuple[BestVariant, ...] = Field(description="Of each framework and number of devices.")
    pairs: tuple[PairResult, ...] = Field(description="Frameworks against one another.")
    reaching: tuple[Reaching, ...] = Field(
        (), description="What the frameworks took to a common perplexity."
    )
    rents: dict[Framework, float] = Field({}, description="Of an hour of a GPU or CPU core.")
    currency: str = Field("", description="Of the rents.")
    all_equivalent_p: float | None = Field(description="p that some pair is not equivalent.")
    published: tuple[PublishedResult, ...] = Field(description="Ours against published numbers.")
    figures: tuple[FigureFile, ...] = Field((), description="What was drawn.")

    def count(self, state: State) -> int:
        """Return the number of cells in the state."""
        return sum(cell.state == state for row in self.rows for cell in row.cells)

    @property
    def reductions(self) -> list[str]:
        """What made its runs smaller, or of another text, such as `budget=quick`."""
        return sorted({each for row in self.rows for each in reductions(row.variant)})

    @property
    def kinds_of_device(self) -> set[Accelerator]:
        """The kinds of device that its rows were trained on, where there are several."""
        kinds = {row.accelerator for row in self.rows if row.accelerator}
        return kinds if len(kinds) > 1 else set()

    def label(self, variant: str) -> str:
        """Return a variant's short name."""
        return next(each.label for each in self.variants if each.name == variant)


def analyse(
    plan: ExperimentPlan,
    rows: Sequence[Row],
    corpus: CorpusFacts,
    published: Sequence[PublishedValue],
) -> Analysis:
    """Return all numbers of one experiment.

    Args:
        plan: the experiment.
        rows: as `collect_rows` returns them.
        corpus: facts of the plan's corpus.
        published: published numbers of all experiments; those of this one are taken.
    """
    results = tuple(_row_result(row) for row in rows)
    concluding = [row for row in rows if not is_smoke(row.variant)]
    pairs = _pairs(plan, concluding)
    settings = {row.variant: row.planned.settings for row in rows}
    labels = variant_labels(settings)
    sweeps = find_sweeps(settings)
    compared = compare_variants(plan, concluding, sweeps)
    return Analysis(
        name=plan.name,
        title=plan.title,
        description=plan.description,
        corpus_folder=plan.corpus_folder,
        metric=plan.metric,
        equivalence_margin=plan.equivalence_margin,
        floor_perplexity=corpus.floor_perplexity,
        best_bigram_perplexity=corpus.best_bigram_perplexity,
        ngram_perplexities=corpus.ngram_perplexities(plan.metric),
        rows=results,
        variants=tuple(
            VariantFacts(name=name, label=labels[name], settings=of)
            for name, of in settings.items()
        ),
        sweeps=sweeps,
        baseline=plan.baseline_variant,
        comparisons=compared.baseline,
        trends=compared.trends,
        best=compared.best,
        pairs=pairs,
        reaching=compare_reaching(rows),
        rents=plan.rents,
        currency=plan.currency,
        all_equivalent_p=joint_equivalence_p([pair.outcome.p_equivalence for pair in pairs]),
        published=tuple(
            _beside(value, row, results, plan.equivalence_margin)
            for value in published
            for row in results
            if value.experiment == plan.name
            and (value.variant, value.devices) == (whole(row.variant), row.devices)
            and value.framework in (None, row.framework)
        ),
    )


def _row_result(row: Row) -> RowResult:
    values = {name: list(row.values(name).values()) for name in METRICS}
    return RowResult(
        variant=row.variant,
        framework=row.framework,
        devices=row.devices,
        accelerator=row.accelerator,
        implementation=row.planned.implementation,
        n_ok=len(row.results()),
        n_diverged=len(row.results("diverged")),
        n_planned=len(row.cells),
        usable=row.usable,
        problem=row.problem,
        fingerprint=next((c.result.metrics.fingerprint for c in row.cells if c.result), None),
        metrics={n: METRICS[n].kind.summarise(found) for n, found in values.items() if found},
        framework_versions=_distinct(cell.provenance.framework_version for cell in row.cells),
        machines=row.machines,
        cells_at_once=row.cells_at_once,
        busy=row.busy,
        commits=_distinct(_commit(cell.provenance) for cell in row.cells),
        began=min(_distinct(cell.provenance.started for cell in row.cells), default=None),
        ended=max(_distinct(cell.provenance.finished for cell in row.cells), default=None),
        cells=tuple(_cell_line(cell) for cell in row.cells),
    )


def _distinct(values: Iterable[str | None]) -> tuple[str, ...]:
    return tuple(sorted({value for value in values if value}))


def _commit(provenance: Provenance) -> str | None:
    if provenance.git_commit is None:
        return None
    return provenance.git_commit[:12] + ("+changes" if provenance.git_dirty else "")


def _cell_line(found: CellResult) -> CellLine:
    values = {}
    for name, metric in METRICS.items():
        value = metric.read(found.result) if found.result else None
        if value is not None:
            values[name] = metric.shown(value)
    memory, time = _asked_over_used(found)
    return CellLine(
        cell=found.cell,
        state=found.state,
        reason=found.reason,
        note=found.busy,
        values=values,
        asked_memory=memory,
        asked_time=time,
    )


def _asked_over_used(found: CellResult) -> tuple[float | None, float | None]:
    """Return how many times the memory and time that a run used its job asked for.

    Of several attempts each had its own time, and nothing is said of that.
    """
    asked = found.provenance
    if found.result is None or asked.asked_megabytes is None or asked.asked_minutes is None:
        return None, None
    metrics = found.result.metrics
    memory = asked.asked_megabytes * 1e6 / metrics.peak_memory_bytes
    seconds = metrics.seconds.total
    return memory, 60 * asked.asked_minutes / seconds if metrics.attempts == 1 else None


def _pairs(plan: ExperimentPlan, rows: Sequence[Row]) -> tuple[PairResult, ...]:
    """Compare every two frameworks of a variant and number of devices; one family of tests."""
    groups: dict[tuple[str, int], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.variant, row.devices].append(row)
    couples = [couple for group in groups.values() for couple in combinations(group, 2)]

    def sample(row: Row) -> dict[int, float]:
        return row.values(plan.metric) if row.usable else {}

    outcomes = compare_pairs(
        [
            Pair(sample(a), sample(b), a.planned.paired, a.complete and b.complete)
            for a, b in couples
        ],
        plan.equivalence_margin,
    )
    return tuple(
        PairResult(
            variant=a.variant, devices=a.devices, a=a.framework, b=b.framework, outcome=outcome
        )
        for (a, b), outcome in zip(couples, outcomes, strict=True)
    )


class Judged(NamedTuple):
    """What our seeds say of a published number."""

    n: int  # seeds
    judgement: Judgement


def judge_row(
    value: PublishedValue, row: RowResult, over: RowResult | None, margin: float
) -> Judged | None:
    """Judge a published number by the seeds of a row that finished; None if there is none.

    A ratio of times or speeds cannot be told by runs that shared their machine (`comparable`).

    Args:
        value: the number.
        row: ours.
        over: that ours is divided by, seed by seed, where the number is a ratio; None: there is
            none.
        margin: difference that does not matter [nats, or log ratio].
    """
    seeds, divisors = row.seed_values(value.metric), dict[int, float]()
    if value.over is not None:
        divisors = over.seed_values(value.metric) if over else {}
        seeds = {seed: number for seed, number in seeds.items() if seed in divisors}
        divisors = {seed: divisors[seed] for seed in seeds}
    if not seeds:
        return None
    if over is not None and value.over is not None and not comparable(value.metric, (row, over)):
        return Judged(len(seeds), Judgement("cannot tell", reason=SHARED))
    ours, below = list(seeds.values()), list(divisors.values())
    return Judged(len(seeds), judge_published(value, ours, below, margin))


def _beside(
    value: PublishedValue, row: RowResult, rows: Sequence[RowResult], margin: float
) -> PublishedResult:
    """Set a published number beside ours and judge it by the seeds that finished.

    Ours is the row's summary of the metric. A ratio is that of two rows' numbers; a bound has no
    gap.
    """
    summary = row.metrics.get(value.metric)
    ours, low, high = (summary.value, summary.low, summary.high) if summary else (None, None, None)
    over = None
    if value.over is not None:
        over = _divisor(value.over, row.framework, rows)
        below = over.value(value.metric) if over else None
        ours, low, high = (ours / below if ours and below else None), None, None
    found = judge_row(value, row, over, margin)
    verdict: PublishedVerdict = "not run"
    judged = NOT_JUDGED
    if found and reductions(row.variant):
        verdict = "reduced budget"
    elif found:
        judged = found.judgement
        verdict = judged.verdict
    expected = [None if end is None else math.exp(end) for end in (judged.low, judged.high)]
    return PublishedResult(
        published=value,
        framework=row.framework,
        n_ok=row.n_ok,
        ours=ours,
        low=low,
        high=high,
        relative_gap=(
            ours / value.value - 1 if ours is not None and value.kind == "number" else None
        ),
        verdict=verdict,
        expected_low=expected[0],
        expected_high=expected[1],
        seeds=judged.seeds,
        reason=judged.reason,
        cv=judged.cv,
    )


def _divisor(over: NamedRow, own: Framework, rows: Sequence[RowResult]) -> RowResult | None:
    """Return the row that another is divided by: in its own framework, or in the named one."""
    wanted = (over.variant, over.framework or own, over.devices)
    found = (r for r in rows if (whole(r.variant), r.framework, r.devices) == wanted)
    return next(found, None)
