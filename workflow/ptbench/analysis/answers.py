"""What a study answers to one document: its findings, published numbers, tables and figures.

Values in, values out, from the `Analysis` of the experiments that plan a row which the document
names. `ptbench.report` writes and draws them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

from pydantic import Field

from ptbench.analysis import agreement
from ptbench.analysis.agreement import PublishedVerdict
from ptbench.analysis.claims import Result, judge_claims, read_claims
from ptbench.analysis.collect import SHARED, comparable
from ptbench.analysis.exhibits import ExhibitResult, fill_exhibit, read_exhibits
from ptbench.analysis.experiment import Analysis, RowResult, judge_row
from ptbench.analysis.findings import Equal
from ptbench.analysis.metrics import METRICS
from ptbench.analysis.published import (
    LeftOut,
    PublishedValue,
    ratios_within,
    read_left_out,
    read_published,
    readings,
)
from ptbench.backends import FRAMEWORKS, Framework
from ptbench.configuration.experiments import Paper, load_library, read_paper
from ptbench.configuration.papers import NamedRow
from ptbench.configuration.specification import reductions, whole
from ptbench.model.recipe import Model

FindingVerdict = Literal[
    "upheld", "contradicted", "cannot tell", "reduced budget", "not run", "untested"
]
FINDING_VERDICTS = get_args(FindingVerdict)
NUMBER_VERDICTS = agreement.FITS


class SeedNumbers(Model):
    """What our seeds gave for one row of a finding."""

    row: str = Field(description="Variant, framework and devices.")
    metric: str = Field(description="Name of the metric.")
    values: tuple[float, ...] = Field(description="One for each seed; infinite: diverged.")


class Finding(Model):
    """A finding of the document, and what our results say of it."""

    id: str = Field(description="Name of the finding.")
    locator: str = Field(description="Where the document states it.")
    claim: str = Field(description="The finding in a sentence.")
    printed: str | None = Field(description="The numbers that the document gives for it.")
    note: str | None = Field(description="What a reader must know to judge it.")
    tests: tuple[str, ...] = Field(description="Its tests in words; all must uphold it.")
    verdict: FindingVerdict = Field(description="What may be said.")
    reason: str | None = Field(description="Why there is no verdict, where there is none.")
    effect: float | None = Field(description="Of the test with least to spare [nats, log ratio].")
    is_room: bool = Field(False, description="Whether the effect is what is left to the margin.")
    p: float | None = Field(description="Adjusted over the document's findings (Holm).")
    p_opposite: float | None = Field(description="The same of the finding's opposite.")
    equal: Equal | None = Field(
        None, description="Where the opposite is that rows are equal: their difference, the margin."
    )
    seeds: int | None = Field(description="Seeds a side that would settle it.")
    numbers: tuple[SeedNumbers, ...] = Field(description="What the seeds gave.")


class Reading(Model):
    """Our row in one framework, and whether it gives a published number."""

    published: PublishedValue = Field(description="The number as it is judged; a time: as a ratio.")
    framework: Framework = Field(description="Framework of our row.")
    n: int = Field(description="Seeds.")
    ours: float | None = Field(description="Our number; null: all seeds diverged.")
    low: float | None = Field(description="Lower end of the 95 % prediction interval.")
    high: float | None = Field(description="Its upper end.")
    cv: float | None = Field(description="CV* of the published number and ours [%].")
    seeds: int | None = Field(description="Seeds that would settle it.")
    reason: str | None = Field(None, description="Why it cannot be told, where that is known.")
    verdict: PublishedVerdict = Field(description="What may be said.")


class PublishedNumber(Model):
    """A published number, which counts once, and ours beside it."""

    published: PublishedValue = Field(description="The number as printed, and its source.")
    verdict: PublishedVerdict = Field(description="Of the reading that fits best.")
    reason: str | None = Field(None, description="Why it is not judged, where it is not.")
    best: int | None = Field(None, description="Which reading fits best, from 0.")
    readings: tuple[Reading, ...] = Field((), description="Of each row and framework of ours.")


class Answers(Model):
    """`answers.json`: everything the report says about one document."""

    paper: str = Field(description="Name of the document: its folder.")
    about: Paper = Field(description="Citation, hardware and readings.")
    experiments: tuple[str, ...] = Field(description="Experiments that answer it.")
    reductions: tuple[str, ...] = Field(description="What made runs smaller: budget=quick.")
    equivalence_margin: float = Field(description="Largest difference that does not matter [nats].")
    findings: tuple[Finding, ...] = Field(description="In the document's order.")
    published: tuple[PublishedNumber, ...] = Field(description="In the document's order.")
    left_out: tuple[LeftOut, ...] = Field(description="Printed numbers that no row answers.")
    exhibits: tuple[ExhibitResult, ...] = Field(description="In the document's order.")

    def findings_by_verdict(self) -> dict[str, int]:
        """Return how many findings have each verdict, those that none has too."""
        counts = Counter(finding.verdict for finding in self.findings)
        return {verdict: counts[verdict] for verdict in FINDING_VERDICTS}

    def numbers_by_verdict(self) -> dict[str, int]:
        """Return how many published numbers have each verdict, those that none has too."""
        counts = Counter(number.verdict for number in self.published)
        return {verdict: counts[verdict] for verdict in NUMBER_VERDICTS}

    @property
    def findings_upheld(self) -> tuple[int, int]:
        """Return how many findings are upheld, of how many upheld or contradicted (QRA++, IV)."""
        counts = self.findings_by_verdict()
        return counts["upheld"], counts["upheld"] + counts["contradicted"]

    @property
    def numbers_reproduced(self) -> tuple[int, int]:
        """Return how many numbers are reproduced or close, of how many that could be told.

        What the recipe decides, such as the number of parameters, is no result of a run.
        """
        measured = (n for n in self.published if not METRICS[n.published.metric].is_decided)
        counts = Counter(number.verdict for number in measured)
        held = counts["reproduced"] + counts["close"]
        return held, held + counts["not reproduced"]


def answer(folder: Path, analyses: Sequence[Analysis]) -> Answers:
    """Return the answers to the document in a folder of its name.

    Args:
        folder: of the document.
        analyses: of the study's experiments that plan a row which the document names; at least one.

    Raises:
        ConfigurationError, AnalysisError: if a file of the document is malformed.
    """
    rows = best_rows(analyses)
    margin = analyses[0].equivalence_margin
    published = [value for value in read_published(folder.parent) if value.source == folder.name]
    ratios = {_place(ratio): ratio for ratio in ratios_within(published)}
    numbers = [(group, _number(group, ratios, rows, margin)) for group in readings(published)]

    def values(row: NamedRow, metric: str) -> dict[int, float] | None:
        return seed_values(rows[row], metric) if row in rows else None

    def compare(metric: str, named: Sequence[NamedRow]) -> bool:
        return comparable(metric, [rows[row] for row in named])

    results = judge_claims(read_claims(folder), values, margin, compare)
    verdicts = {value: number.verdict for group, number in numbers for value in group}
    exhibits = read_exhibits(folder)
    recipes = load_library().recipes if any(each.recipes for each in exhibits) else {}
    return Answers(
        paper=folder.name,
        about=read_paper(folder),
        experiments=tuple(analysis.name for analysis in analyses),
        reductions=tuple(sorted({each for a in analyses for each in a.reductions})),
        equivalence_margin=margin,
        findings=tuple(_finding(result, rows) for result in results),
        published=tuple(number for _, number in numbers),
        left_out=tuple(each for each in read_left_out(folder.parent) if each.source == folder.name),
        exhibits=tuple(fill_exhibit(each, rows, verdicts, recipes) for each in exhibits),
    )


def best_rows(analyses: Sequence[Analysis]) -> dict[NamedRow, RowResult]:
    """Return every row once, by its name in the document.

    Where experiments share it, it is the one with most finished seeds; rows of a reduced budget or
    of another text stand in where there is no other.
    """

    def rank(row: RowResult) -> tuple[bool, int]:
        return not reductions(row.variant), _finished(row)

    rows: dict[NamedRow, RowResult] = {}
    for row in (row for analysis in analyses for row in analysis.rows):
        name = NamedRow(whole(row.variant), row.framework, row.devices)
        if name not in rows or rank(row) > rank(rows[name]):
            rows[name] = row
    return rows


def _finished(row: RowResult) -> int:
    return row.n_ok + row.n_diverged


def seed_values(row: RowResult, metric: str) -> dict[int, float] | None:
    """Return a metric of every finished seed; None if none has finished."""
    return row.seed_values(metric) if _finished(row) else None


def _finding(result: Result, rows: Mapping[NamedRow, RowResult]) -> Finding:
    claim, reason = result.claim, _reason(result, rows)
    verdict: FindingVerdict = result.verdict
    reduced = {
        each
        for test in claim.tests
        for name in test.rows
        for row in _found(name, rows)
        for each in reductions(row.variant)
    }
    if reduced and result.numbers:
        reason = f"with {', '.join(sorted(reduced))}; of these runs it would be: {verdict}"
        verdict = "reduced budget"
    return Finding(
        id=claim.id,
        locator=claim.locator,
        claim=claim.claim,
        printed=claim.printed,
        note=claim.note,
        tests=tuple(test.sentence for test in claim.tests),
        verdict=verdict,
        reason=reason,
        effect=result.effect,
        is_room=result.is_room,
        p=result.p,
        p_opposite=result.p_opposite,
        equal=result.equal,
        seeds=result.seeds if result.verdict == "cannot tell" else None,
        numbers=tuple(
            SeedNumbers(row=n.row, metric=n.metric, values=tuple(n.values)) for n in result.numbers
        ),
    )


def _reason(result: Result, rows: Mapping[NamedRow, RowResult]) -> str | None:
    """Return why a finding is not judged."""
    if result.verdict == "untested":
        return result.claim.untested
    if result.verdict == "not run":
        named = dict.fromkeys(row for test in result.claim.tests for row in test.rows)
        lacking = [row for row in named if not _has_result(row, rows)]
        first = f"no result of {lacking[0]}" if lacking else "no framework ran all of its rows"
        more = len(lacking) - 1
        return first + (f" and {more} other row{'s' if more > 1 else ''}" if more > 0 else "")
    if result.verdict == "cannot tell" and result.shared:
        return SHARED
    if result.verdict == "cannot tell" and any(len(n.values) < 2 for n in result.numbers):
        return "fewer than two seeds of a row have its number"
    return None


def _has_result(row: NamedRow, rows: Mapping[NamedRow, RowResult]) -> bool:
    return any(_finished(each) > 0 for each in _found(row, rows))


def _found(row: NamedRow, rows: Mapping[NamedRow, RowResult]) -> list[RowResult]:
    """Return our rows of that name: one for each framework, if it names none."""
    frameworks = [row.framework] if row.framework else list(FRAMEWORKS)
    names = [row._replace(framework=framework) for framework in frameworks]
    return [rows[name] for name in names if name in rows]


def _place(value: PublishedValue) -> tuple[object, ...]:
    """Return where a number is printed, and of which row and metric."""
    return value.experiment, value.row, value.metric, value.locator


def _number(
    group: Sequence[PublishedValue],
    ratios: Mapping[tuple[object, ...], PublishedValue],
    rows: Mapping[NamedRow, RowResult],
    margin: float,
) -> PublishedNumber:
    """Judge one printed number by all its readings, in every framework that ran them."""
    found = [
        reading
        for value in group
        for framework in ([value.framework] if value.framework else FRAMEWORKS)
        if (reading := _reading(ratios.get(_place(value), value), framework, rows, margin))
    ]
    if not found:
        named = ", ".join(dict.fromkeys(str(value.row) for value in group))
        return PublishedNumber(
            published=group[0], verdict="not run", reason=f"no result of {named}"
        )
    best = agreement.best_reading([reading.verdict for reading in found])
    return PublishedNumber(
        published=group[0], verdict=found[best].verdict, best=best, readings=tuple(found)
    )


def _reading(
    value: PublishedValue,
    framework: Framework,
    rows: Mapping[NamedRow, RowResult],
    margin: float,
) -> Reading | None:
    """Judge one reading of a number in one framework; None where it has no result to judge by."""
    row = rows.get(NamedRow(value.variant, framework, value.devices))
    below = None
    if value.over is not None:
        over = value.over
        below = rows.get(over if over.framework else over._replace(framework=framework))
    found = judge_row(value, row, below, margin) if row else None
    if row is None or found is None:
        return None
    judged = found.judgement
    number = row.value(value.metric)
    divisor = below.value(value.metric) if below else 1.0
    return Reading(
        published=value,
        framework=framework,
        n=found.n,
        ours=number / divisor if number is not None and divisor else None,
        low=None if judged.low is None else math.exp(judged.low),
        high=None if judged.high is None else math.exp(judged.high),
        cv=judged.cv,
        seeds=judged.seeds,
        reason=judged.reason,
        verdict="reduced budget" if reductions(row.variant) else judged.verdict,
    )
