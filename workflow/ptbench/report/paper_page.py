"""The page of one document, from its `Answers` and its drawings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from markupsafe import Markup

from ptbench.analysis.agreement import PublishedVerdict
from ptbench.analysis.answers import (
    FINDING_VERDICTS,
    NUMBER_VERDICTS,
    Answers,
    Finding,
    PublishedNumber,
    SeedNumbers,
)
from ptbench.analysis.exhibits import ExhibitResult
from ptbench.analysis.metrics import METRICS, NOTHING
from ptbench.analysis.statistics import SIGNIFICANCE
from ptbench.report import exhibits, words
from ptbench.report.formatting import format_p, format_percent, format_published, format_ratio
from ptbench.report.site import Site
from ptbench.report.svg import inline_svg


class Shown(NamedTuple):
    """An exhibit as the page shows it."""

    result: ExhibitResult
    svg: Markup | None
    headings: list[str]  # of its metrics
    # label, seeds, cells
    lines: list[tuple[str, str, list[tuple[str, str, PublishedVerdict | None]]]]
    words: str
    keys: list[str]  # of settings


def write_paper_page(site: Site, answers: Answers, folder: Path) -> Path:
    """Write papers/{paper}.html and return where it is.

    Args:
        site: the report.
        answers: of the document.
        folder: with the drawings that the page shows and links to.
    """
    return site.write(
        "paper.html.j2",
        f"papers/{answers.paper}.html",
        answers=answers,
        folder=folder,
        exhibits=[_shown(result, folder) for result in answers.exhibits],
        finding_verdicts=[v for v in FINDING_VERDICTS if answers.findings_by_verdict()[v]],
        number_verdicts=[v for v in NUMBER_VERDICTS if answers.numbers_by_verdict()[v]],
        findings=sorted(answers.findings, key=lambda f: FINDING_VERDICTS.index(f.verdict)),
        by_place=_by_place(answers.published),
        seeds_in_words=seeds_in_words,
        finding_note=finding_note,
        number_text=format_published,
        our_number=our_number,
        words=words,
    )


def _shown(result: ExhibitResult, folder: Path) -> Shown:
    exhibit = result.exhibit
    svg = None
    if exhibits.is_drawn(result):
        svg = inline_svg(folder / "exhibits" / f"{exhibit.id}.svg", exhibit.id)
    lines = []
    for line in [] if result.missing else result.lines:
        cells = [
            (
                exhibits.our_text(result, metric, line),
                exhibits.published_text(result, metric, line.cells[metric].published),
                line.cells[metric].verdict,
            )
            for metric in exhibit.metrics
        ]
        lines.append((line.label, exhibits.seeds_text(line), cells))
    keys = dict.fromkeys(key for settings in result.settings.values() for key in settings)
    headings = [exhibits.title_of(result, metric) for metric in exhibit.metrics]
    words = "" if result.missing or not lines else exhibits.in_words(result)
    return Shown(result, svg, headings, lines, words, list(keys))


def _by_place(numbers: Sequence[PublishedNumber]) -> dict[str, list[PublishedNumber]]:
    """Return the published numbers by where they are printed, in the document's order."""
    places: dict[str, list[PublishedNumber]] = {}
    for number in numbers:
        places.setdefault(number.published.locator, []).append(number)
    return places


def seeds_in_words(numbers: SeedNumbers) -> str:
    """Write the range of a row's seeds, how many there are and how many diverged."""
    metric = METRICS[numbers.metric]
    finite = [value for value in numbers.values if value != float("inf")]
    diverged = len(numbers.values) - len(finite)
    said = f"; {diverged} diverged" if diverged else ""
    if not finite:
        return f"{diverged} seeds diverged" if diverged else "no number"
    low, high = metric.write(min(finite)), metric.write(max(finite))
    return f"{low}{'' if low == high else f' to {high}'}, n = {len(numbers.values)}{said}"


def finding_note(finding: Finding) -> str:
    """Write what a verdict rests on: effect, p, and the seeds that would settle it.

    Where the opposite of the finding is shown, the p is that of the opposite.
    """
    parts = [finding.reason] if finding.reason else []
    opposite = 1.0 if finding.p_opposite is None else finding.p_opposite
    shown = finding.verdict != "upheld" and opposite < SIGNIFICANCE
    if shown and finding.equal:
        difference, margin = finding.equal
        within = f" within {said_effect(margin)}" if margin else ""
        parts.append(f"shown to be equal{within} (p {said_p(opposite)})")
        if difference:
            parts.append(f"the difference of {said_effect(difference)} is {direction(difference)}")
        return "; ".join(parts)
    if shown:
        parts.append(f"the opposite is shown (p {said_p(opposite)})")
    if finding.effect is not None and finding.is_room:
        where = "inside" if finding.effect > 0 else "beyond"
        parts.append(f"{said_effect(finding.effect)} {where} the margin")
    elif finding.effect is not None and not math.isnan(finding.effect):
        parts.append(f"a difference of {said_effect(finding.effect)} {direction(finding.effect)}")
    if finding.p is not None and not shown and finding.verdict != "contradicted":
        parts.append(f"p {said_p(finding.p)}")
    if finding.verdict == "cannot tell" and finding.seeds:
        parts.append(f"{finding.seeds} seeds would settle it")
    return ", ".join(parts)


def said_effect(logarithm: float) -> str:
    """Write the size of a difference of logarithms in percent."""
    return format_percent(math.expm1(abs(logarithm))).removeprefix("+")


def direction(effect: float) -> str:
    """Say on which side of nothing an effect is, as the finding has it."""
    return "in the claim's direction" if effect > 0 else "against the claim"


def said_p(p: float) -> str:
    """Write `= 0.012`, or `< 0.001`."""
    text = format_p(p)
    return text if text.startswith("<") else f"= {text}"


def our_number(number: PublishedNumber) -> str:
    """Write ours of the reading that fits best."""
    if number.best is None:
        return NOTHING
    reading = number.readings[number.best]
    if reading.ours is None:
        return "diverged"
    if reading.published.over:
        return format_ratio(reading.ours)
    return METRICS[reading.published.metric].write(reading.ours)
