"""Two folders of results, such as those of two machines or of two versions of a framework: which
rows moved, and whether by more than chance."""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import fmean
from typing import Literal

from pydantic import Field

from ptbench.analysis.experiment import Analysis, RowResult
from ptbench.analysis.headline import groups_of
from ptbench.analysis.statistics import SIGNIFICANCE, Pair, compare_pairs, holm, t_test
from ptbench.backends import Framework
from ptbench.model.recipe import Model

SPEED = "tokens_per_second"
Movement = Literal["same", "equivalent", "different", "inconclusive"]


class Change(Model):
    """One row of both folders: the second against the first."""

    variant: str = Field(description="Name of the variant.")
    framework: Framework = Field(description="Framework.")
    devices: int = Field(description="Data-parallel replicas.")
    seeds: int = Field(description="Seeds compared: those of both, or the fewer of either.")
    versions: tuple[str, str] = Field(description="Of the framework, first and second.")
    same_recipe: bool = Field(description="Whether both were run with the same settings.")
    perplexity: tuple[float | None, float | None] = Field(description="Test perplexities.")
    change: float | None = Field(description="Second perplexity over the first, less one.")
    verdict: Movement = Field(description="Of the perplexities; same: every seed ended equal.")
    reason: str = Field(description="The reason for the verdict.")
    speed: float | None = Field(
        description="Second training speed over the first: of the seeds' geometric means."
    )
    speed_low: float | None = Field(description="Lower end of its 95 % interval.")
    speed_high: float | None = Field(description="Upper end of its 95 % interval.")
    speed_p: float | None = Field(description="p of equal speeds, after Holm over all rows.")
    alone: bool = Field(description="Whether all runs of both had their machine to themselves.")

    @property
    def slower_or_faster(self) -> bool:
        """Return whether the speed moved by more than chance."""
        return self.speed_p is not None and self.speed_p < SIGNIFICANCE

    @property
    def moved(self) -> bool:
        """Return whether anything moved by more than chance; a perplexity, by more than matters."""
        return self.verdict == "different" or self.slower_or_faster


class Comparison(Model):
    """Two folders of results."""

    changes: tuple[Change, ...] = Field(description="Rows that both have.")
    only_first: tuple[str, ...] = Field(description="Usable rows that the first has alone.")
    only_second: tuple[str, ...] = Field(description="Usable rows that the second has alone.")
    equivalence_margin: float = Field(description="Largest difference that does not matter [nats].")


def compare_folders(first: Iterable[Analysis], second: Iterable[Analysis]) -> Comparison:
    """Compare the rows that the analyses of two folders have in common.

    Perplexities are compared as frameworks are, with Holm's correction over all rows: seed by seed
    where both have at least two seeds in common, because a seed draws the same initial values and
    batches in both; otherwise by Welch's test. Speeds are compared as logarithms by Welch's test.

    Args:
        first: of the one folder; at least one. Its margin of equivalence is taken.
        second: of the other.
    """
    first, second = list(first), list(second)
    margin = first[0].equivalence_margin
    before, after = _rows(first), _rows(second)
    both = [(before[name], after[name]) for name in before if name in after]
    pairs = [_pair(a, b) for a, b in both]
    perplexities = compare_pairs(pairs, margin)
    speeds = [t_test(_logs(b, SPEED), _logs(a, SPEED), margin) for a, b in both]
    p_speeds = holm([test.p if test else None for test in speeds])
    changes = []
    for (a, b), pair, found, speed, p in zip(
        both, pairs, perplexities, speeds, p_speeds, strict=True
    ):
        same = bool(pair.a) and pair.a == pair.b
        old, new = _logs(a, SPEED), _logs(b, SPEED)
        changes.append(
            Change(
                variant=a.variant,
                framework=a.framework,
                devices=a.devices,
                seeds=min(found.n_a, found.n_b),
                versions=(" ".join(a.framework_versions), " ".join(b.framework_versions)),
                same_recipe=a.fingerprint == b.fingerprint,
                perplexity=(a.value("test_perplexity"), b.value("test_perplexity")),
                change=None if found.difference is None else math.expm1(found.difference),
                verdict="same" if same else found.verdict,
                reason="every seed ended with the same perplexity" if same else found.reason,
                speed=math.exp(fmean(new) - fmean(old)) if old and new else None,
                speed_low=math.exp(speed.low) if speed else None,
                speed_high=math.exp(speed.high) if speed else None,
                speed_p=p,
                alone=a.alone and b.alone,
            )
        )
    return Comparison(
        changes=tuple(changes),
        only_first=tuple(name for name in before if name not in after),
        only_second=tuple(name for name in after if name not in before),
        equivalence_margin=margin,
    )


def _rows(analyses: Iterable[Analysis]) -> dict[str, RowResult]:
    return {
        f"{variant}/{framework}/devices-{devices}": row
        for (variant, devices), own in groups_of(analyses).items()
        for framework, row in own.items()
    }


def _pair(a: RowResult, b: RowResult) -> Pair:
    before, after = _nlls(a), _nlls(b)
    paired = len(before.keys() & after.keys()) > 1
    complete = a.n_ok == a.n_planned and b.n_ok == b.n_planned
    return Pair(after, before, paired, complete)  # the second less the first


def _nlls(row: RowResult) -> dict[int, float]:
    return {seed: math.log(value) for seed, value in row.good_seeds("test_perplexity").items()}


def _logs(row: RowResult, metric: str) -> list[float]:
    return [math.log(value) for value in row.seeds(metric)]
