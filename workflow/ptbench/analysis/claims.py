"""The findings of a document, each with the test that judges it: `papers/<document>/claims.yaml`.

The tests themselves are in `findings.py`. What the seeds gave comes from a `Values` function, so
this module knows no files but `claims.yaml` and no results folder.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, Self

import numpy as np
from pydantic import Field, model_validator

from ptbench.analysis import agreement, findings
from ptbench.analysis.findings import Evidence, Verdict
from ptbench.analysis.metrics import METRICS, MetricName
from ptbench.analysis.statistics import SIGNIFICANCE, holm
from ptbench.backends import FRAMEWORKS
from ptbench.configuration.errors import parse
from ptbench.configuration.papers import NamedRow, RowField
from ptbench.model.recipe import Model
from ptbench.yaml import read_mapping, shown_path

# tests of p values, whose family is the document's; the others have a verdict of their own
TESTS = ("lower", "higher", "equal", "ordering", "rises", "falls", "saturates", "interaction")


TestKind = Literal[
    "lower", "higher", "equal", "ordering", "rises", "falls", "saturates", "optimum",
    "interaction", "value", "ratio", "slope", "above",
]  # fmt: skip


class ClaimTest(Model):
    """One test of a finding; `findings.py` says what each of them does."""

    test: TestKind = Field(description="How it is judged.")
    metric: MetricName = Field("valid_perplexity", description="What is compared.")
    left: list[RowField] = Field(min_length=1, description="Rows that the finding is about.")
    right: list[RowField] = Field([], description="Rows that they are compared with.")
    number: float | list[float] | None = Field(
        None, description="The value, ratio, slope or bound that the document gives, in our units."
    )
    tolerance: float | None = Field(
        None, gt=0, description="Largest relative difference of an exact count; null: an interval."
    )
    margin: float | None = Field(
        None, gt=0, description="Difference that does not matter [nats, or log ratio]; null: ours."
    )
    at: int | None = Field(None, ge=0, description="Which row it saturates at, from 0.")
    positions: list[float] | None = Field(
        None, description="With slope: what varies, for each row, such as its parameters."
    )

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        left, right = len(self.left), len(self.right)
        if self.test in ("lower", "higher", "equal", "ratio") and not (
            right and (left == right or 1 in (left, right))
        ):
            raise ValueError(f"{left} rows cannot be paired with {right}: as many, or one")
        if self.test in ("ordering", "rises", "falls", "saturates", "slope") and left < 2:
            raise ValueError(f"the test {self.test} needs several rows on the left")
        if self.test == "saturates" and (self.at is None or self.at >= left - 1):
            raise ValueError("saturates needs `at`: a row before the last")
        if self.test == "interaction" and (left, right) != (2, 2):
            raise ValueError("an interaction needs two rows on the left and two on the right")
        if (self.test in ("value", "ratio", "slope", "above")) != (self.number is not None):
            raise ValueError("value, ratio, slope and above, and they alone, need a number")
        if (self.test == "slope") != (self.positions is not None and len(self.positions) == left):
            raise ValueError("slope, and it alone, needs a position for each row")
        if isinstance(self.number, list) and len(self.number) != left:
            raise ValueError(f"{len(self.number)} numbers for {left} rows")
        return self

    @property
    def has_p(self) -> bool:
        """Whether it gives a p value of the document's family."""
        return self.test in TESTS

    @property
    def rows(self) -> list[NamedRow]:
        """Every row that the test reads."""
        return list(dict.fromkeys([*self.left, *self.right]))

    @property
    def numbers(self) -> list[float]:
        """The document's number for each row on the left."""
        if isinstance(self.number, list):
            return self.number
        return [math.nan if self.number is None else self.number] * len(self.left)

    @property
    def sentence(self) -> str:
        """The test in words."""
        left, right = _listed(self.left), _listed(self.right)
        numbers = ", ".join(f"{number:g}" for number in dict.fromkeys(self.numbers))
        match self.test:
            case "lower" | "higher":
                words = f"{self.test} in {left} than in {right}"
            case "equal":
                words = f"equal in {left} and in {right}, within the margin"
            case "ordering":
                words = f"lower in each of these than in the next: {left}"
            case "rises" | "falls":
                words = f"{self.test} along {left}"
            case "saturates":
                assert self.at is not None
                words = f"never lower by the margin after {self.left[self.at]} along {left}"
            case "optimum":
                words = f"lowest in {self.left[0]} of {_listed(self.rows)}"
            case "interaction":
                a, b, c, d = (*self.left, *self.right)
                words = f"the ratio of {a} to {b} is lower than that of {c} to {d}"
            case "value":
                words = f"{numbers} in {left}"
            case "ratio":
                words = f"{left} over {right} is {numbers}"
            case "slope":
                words = f"the power law along {left} has the exponent {numbers}"
            case "above":
                words = f"above {numbers}, or diverged, in {left}"
        return f"{METRICS[self.metric].title}: {words}"

    @property
    def pairs(self) -> list[tuple[NamedRow, NamedRow]]:
        """Each row on the left with the one that it is compared with."""
        size = max(len(self.left), len(self.right))
        left, right = (side * (size // len(side)) for side in (self.left, self.right))
        return list(zip(left, right, strict=True))


def _listed(rows: Sequence[NamedRow]) -> str:
    """Name the rows, or the first and the last where they are many."""
    if len(rows) > 3:
        return f"{rows[0]} to {rows[-1]} ({len(rows)} rows)"
    return ", ".join(map(str, rows))


class Claim(Model):
    """A finding that a document states, and the tests that must all uphold it."""

    id: str = Field(pattern=r"^[a-z0-9-]+$", description="Name of the finding.")
    locator: str = Field(description="Where the document states it.")
    claim: str = Field(description="The finding in a sentence.")
    printed: str | None = Field(None, description="The numbers that the document gives for it.")
    note: str | None = Field(None, description="What a reader must know to judge it.")
    tests: list[ClaimTest] = Field([], description="Its tests; all must uphold it.")
    untested: str | None = Field(None, description="Why it has no test, such as: an opinion.")

    @model_validator(mode="after")
    def _is_tested_or_says_why_not(self) -> Self:
        if bool(self.tests) == (self.untested is not None):
            raise ValueError("it needs tests, or the reason why it is untested")
        return self


class ClaimFile(Model):
    """`claims.yaml`."""

    claims: list[Claim] = Field(description="In the order of the document.")


def read_claims(folder: Path) -> list[Claim]:
    """Return the findings of the document in a folder; none if it has no claims.yaml.

    Raises:
        ConfigurationError: with file and line, if one is malformed.
    """
    file = folder / "claims.yaml"
    if not file.exists():
        return []
    return parse(ClaimFile, read_mapping(file), shown_path(file)).claims


class Numbers(NamedTuple):
    """What our seeds gave for one row, as shown beside a finding."""

    row: str
    metric: str
    values: list[float]  # of the metric itself, one for each seed; infinite: diverged


@dataclass(frozen=True)
class Result:
    """A finding's verdict and the grounds for it."""

    claim: Claim
    verdict: Verdict | Literal["untested"]
    effect: float | None = None  # of the test with least to spare [nats, or log ratio]
    p: float | None = None  # adjusted
    p_opposite: float | None = None  # adjusted; of the finding's opposite
    seeds: int | None = None  # a side that would settle it
    numbers: list[Numbers] = field(default_factory=list)
    equal: findings.Equal | None = None  # where the opposite is that two rows are equal
    is_room: bool = False  # whether the effect is what is left to the margin
    shared: bool = False  # whether some of its numbers do not compare: runs shared their machine


# Gives a metric's value of a row by seed; None: the row has not been run.
Values = Callable[[NamedRow, str], Mapping[int, float] | None]
# Says whether rows' numbers of a metric may be set against each other.
Comparable = Callable[[str, Sequence[NamedRow]], bool]


class Gathered(NamedTuple):
    """What the seeds gave for all rows of a test, in one framework or in those that it names."""

    rows: dict[NamedRow, list[float]]
    fair: bool  # whether the rows compare


def judge_claims(
    claims: Sequence[Claim],
    values: Values,
    margin: float,
    comparable: Comparable | None = None,
) -> list[Result]:
    """Judge all findings of one document; their p values are one family for Holm's correction.

    Args:
        claims: the findings.
        values: gives the seeds' values; a row without a framework is asked for in each of them.
        margin: difference that does not matter, unless a test has its own [nats, log ratio].
        comparable: says whether rows compare; a test of others cannot tell. None: all do.
    """
    gathered = [
        [(test, _gather(test, values, comparable)) for test in claim.tests] for claim in claims
    ]
    evidence = [
        findings.all_of(
            [
                _evidence(test, rows, test.margin or margin)
                for test, groups in tests
                if test.has_p
                for rows in groups
            ]
        )
        for tests in gathered
    ]
    ps = holm([each.p for each in evidence])
    opposites = holm([each.p_opposite for each in evidence])
    return [
        _result(claim, tests, each, p, opposite, margin)
        for claim, tests, each, p, opposite in zip(
            claims, gathered, evidence, ps, opposites, strict=True
        )
    ]


def _gather(test: ClaimTest, values: Values, comparable: Comparable | None) -> list[Gathered]:
    """Return the values of each row, once for each framework if a row has none of its own.

    A ratio is formed seed by seed, so only seeds that all rows have count for it.
    """
    anywhere = any(row.framework is None for row in test.rows)
    found: list[Gathered] = []
    for framework in FRAMEWORKS if anywhere else [None]:
        asked = {
            row: row if row.framework else row._replace(framework=framework) for row in test.rows
        }
        rows: dict[NamedRow, Mapping[int, float]] = {}
        for row, own in asked.items():
            seeds = values(own, test.metric)
            if seeds is None:
                break
            rows[row] = seeds
        else:
            shared = set.intersection(*(set(seeds) for seeds in rows.values()))
            kept = {
                row: [seeds[s] for s in sorted(seeds) if test.test != "ratio" or s in shared]
                for row, seeds in rows.items()
            }
            fair = comparable is None or comparable(test.metric, list(asked.values()))
            found.append(Gathered(kept, fair))
    return found


def _evidence(test: ClaimTest, gathered: Gathered, margin: float) -> Evidence:
    """Return what one framework's seeds say."""
    if not gathered.fair:
        return findings.NOTHING
    logs = {row: _logarithms(seeds) for row, seeds in gathered.rows.items()}
    left = [logs[row] for row in test.left]
    certain = map(METRICS[test.metric].is_certain, gathered.rows.values())
    if test.test in ("lower", "higher", "equal", "ordering") and all(certain):
        return _sizes(test, {row: seeds[0] for row, seeds in logs.items()}, margin)
    match test.test:
        case "rises" | "falls":
            return findings.trend(left, test.test)
        case "saturates":
            assert test.at is not None
            return findings.saturates(left, test.at, margin)
        case "interaction":
            a, b, c, d = (logs[row] for row in (*test.left, *test.right))
            return findings.interaction(a, b, c, d, margin)
        case "ordering":  # each row is lower than the next one
            steps = itertools.pairwise(left)
            return findings.all_of([findings.lower(a, b, margin) for a, b in steps])
        case "equal":
            return findings.all_of(
                [findings.equal(logs[a], logs[b], margin) for a, b in test.pairs]
            )
    pairs = test.pairs if test.test == "lower" else [(b, a) for a, b in test.pairs]
    return findings.all_of([findings.lower(logs[a], logs[b], margin) for a, b in pairs])


def _sizes(test: ClaimTest, logs: Mapping[NamedRow, float], margin: float) -> Evidence:
    """Compare counts and sizes that every seed has alike: what they say is certain."""
    pairs = list(itertools.pairwise(test.left)) if test.test == "ordering" else test.pairs
    sign = -1 if test.test == "higher" else 1
    gains = [sign * (logs[b] - logs[a]) for a, b in pairs]
    effect = margin - max(map(abs, gains)) if test.test == "equal" else min(gains)
    equal = findings.Equal(0.0, 0.0) if not effect and test.test != "equal" else None
    return Evidence(
        effect, float(effect <= 0), float(effect > 0), equal=equal, is_room=test.test == "equal"
    )


def _logarithms(values: Sequence[float]) -> list[float]:
    return [math.log(value) if value > 0 else math.nan for value in values]


def _result(
    claim: Claim,
    tests: Sequence[tuple[ClaimTest, list[Gathered]]],
    evidence: Evidence,
    p: float | None,
    p_opposite: float | None,
    margin: float,
) -> Result:
    if not claim.tests:
        return Result(claim, "untested")
    if not all(groups for _, groups in tests):
        return Result(claim, "not run")
    direct = [(test, each) for test, groups in tests if not test.has_p for each in groups]
    # Any of several verdicts may contradict a finding, so each may be wrong so much less often.
    count = sum(len(test.left) if test.test in ("value", "ratio") else 1 for test, _ in direct)
    error = SIGNIFICANCE / max(1, count)
    verdicts = [_direct(test, gathered, error, margin) for test, gathered in direct]
    if any(test.has_p for test, _ in tests):
        verdicts.append(findings.verdict(evidence, p, p_opposite))
    numbers = [
        Numbers(str(row), test.metric, seeds)
        for test, groups in tests
        for each in groups
        for row, seeds in each.rows.items()
    ]
    return Result(
        claim,
        _together(verdicts),
        evidence.effect,
        p,
        p_opposite,
        None if "cannot tell" in verdicts[: len(direct)] else evidence.seeds,
        numbers,
        evidence.equal,
        evidence.is_room,
        shared=not all(each.fair for _, groups in tests for each in groups),
    )


def _together(verdicts: Sequence[Verdict]) -> Verdict:
    """Return the verdict of several tests that must all uphold a finding."""
    if "contradicted" in verdicts:
        return "contradicted"
    return "upheld" if all(verdict == "upheld" for verdict in verdicts) else "cannot tell"


def _direct(test: ClaimTest, gathered: Gathered, error: float, margin: float) -> Verdict:
    """Judge by a test whose verdict needs no p value of the document's family.

    Args:
        test: the test.
        gathered: what the seeds gave.
        error: probability with which each of its verdicts may be wrong.
        margin: difference that does not matter, unless the test has its own [nats, log ratio].
    """
    rows = gathered.rows
    if not gathered.fair:
        return "cannot tell"
    match test.test:
        case "optimum":
            if min(len(rows[row]) for row in test.rows) < 2:  # one seed says nothing of chance
                return "cannot tell"
            shares = findings.best_probabilities([_logarithms(rows[row]) for row in test.rows])
            if shares[0] >= 1 - error:
                return "upheld"
            other = max(shares[1:], default=0.0)
            return "contradicted" if other >= 1 - error else "cannot tell"
        case "above":
            bounds = zip(test.left, test.numbers, strict=True)
            return _together([findings.beyond(rows[row], bound) for row, bound in bounds])
        case "slope":
            groups = [_logarithms(rows[row]) for row in test.left]
            return findings.slope_holds(test.positions or [], groups, test.numbers[0], error)
        case "ratio":
            samples = [
                [
                    x - y if math.isfinite(y) else math.nan
                    for x, y in zip(_logarithms(rows[a]), _logarithms(rows[b]), strict=True)
                ]
                for a, b in test.pairs
            ]
        case _ if test.tolerance is not None:
            if not all(rows[row] for row in test.left):
                return "cannot tell"
            exact = [
                np.allclose(rows[row], number, rtol=test.tolerance, atol=0)
                for row, number in zip(test.left, test.numbers, strict=True)
            ]
            return "upheld" if all(exact) else "contradicted"
        case _:
            samples = [_logarithms(rows[row]) for row in test.left]
    return _together(
        [
            _number(sample, math.log(number), error, test.margin or margin)
            for sample, number in zip(samples, test.numbers, strict=True)
        ]
    )


def _number(sample: Sequence[float], number: float, error: float, margin: float) -> Verdict:
    """Judge a number that a finding states as one that is published: could it be another draw?"""
    found = agreement.judge_seeds(sample, agreement.Published(number), margin, 1 - error)
    if found.verdict in ("reproduced", "close"):
        return "upheld"
    return "contradicted" if found.verdict == "not reproduced" else "cannot tell"
