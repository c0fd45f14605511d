"""Variants against variants: what they differ in, sweeps, and comparisons with the baseline.

Frameworks against frameworks are compared in `experiment.py`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

from pydantic import Field

from ptbench.analysis.collect import Row, comparable
from ptbench.analysis.findings import best_probabilities, trend
from ptbench.analysis.plan import ExperimentPlan, Settings
from ptbench.analysis.statistics import (
    SIGNIFICANCE,
    Difference,
    MeanTest,
    Pair,
    compare_pairs,
    holm,
    t_test,
)
from ptbench.backends import Framework
from ptbench.configuration.specification import format_override
from ptbench.model.recipe import Model, Recipe

SPEED = "tokens_per_second"
CHOSEN_BY = "valid_perplexity"  # the test text chooses nothing
LEAST_POINTS = 3  # of a line that shows how something depends on a setting
MOST_KEYS = 3  # in a variant's label
DECADE = 10  # values that span less are drawn on a linear axis


class SweepLine(Model):
    """Variants that differ in the swept key alone, in the order of its values."""

    label: str = Field(description="What else its variants have in common; empty: all of them.")
    variants: tuple[str, ...] = Field(description="Names of the variants.")
    values: tuple[float, ...] = Field(description="The swept key's value of each.")


class Sweep(Model):
    """Variants that show how something depends on one key of the recipe."""

    key: str = Field(description="The swept key of the recipe.")
    together: tuple[str, ...] = Field(description="Keys that change with it, each in its own way.")
    logarithmic: bool = Field(description="Whether its values are spaced by ratios.")
    lines: tuple[SweepLine, ...] = Field(description="One for each combination of other settings.")


class VariantComparison(Model):
    """A variant against the experiment's baseline, in one framework and number of devices."""

    variant: str = Field(description="Name of the variant.")
    baseline: str = Field(description="Name of the variant that it is compared with.")
    framework: Framework = Field(description="Framework of both.")
    devices: int = Field(description="Data-parallel replicas of both.")
    outcome: Difference = Field(description="Tests and verdict; the variant minus the baseline.")
    improvement: float | None = Field(description="1 - perplexity / that of the baseline.")
    improvement_low: float | None = Field(description="Lower end of its 95 % interval.")
    improvement_high: float | None = Field(description="Upper end of its 95 % interval.")
    speed: float | None = Field(
        description="Tokens per second / those of the baseline; null: not comparable."
    )
    speed_low: float | None = Field(description="Lower end of its 95 % interval.")
    speed_high: float | None = Field(description="Upper end of its 95 % interval.")


class TrendResult(Model):
    """Whether the compared metric rises or falls along a line of a sweep."""

    key: str = Field(description="The swept key of the recipe.")
    line: str = Field(description="Label of the line.")
    framework: Framework = Field(description="Framework.")
    devices: int = Field(description="Data-parallel replicas.")
    direction: Literal["rises", "falls"] | None = Field(description="None: neither is shown.")
    p: float | None = Field(description="Two-sided p of no trend (Jonckheere-Terpstra).")
    p_holm: float | None = Field(description="p after Holm's correction over the experiment.")


class BestVariant(Model):
    """Which variant is the best in one framework and number of devices, and how surely."""

    framework: Framework = Field(description="Framework.")
    devices: int = Field(description="Data-parallel replicas.")
    variant: str = Field(description="The variant that is most probably the best.")
    probability: float = Field(
        description="That it has the lowest mean validation nll, by its seeds."
    )
    probabilities: dict[str, float] = Field(description="The same of every variant.")


def variant_labels(settings: Mapping[str, Settings]) -> dict[str, str]:
    """Return a short label for each variant: its recipe and what tells it from the others.

    The recipe is named if there are several. Of one recipe's variants, the fewest keys that tell
    them apart are named; where these are many, what differs from the first of them.

    Args:
        settings: of each variant, by name, the keys in which variants differ.
    """
    recipes: dict[str, list[str]] = defaultdict(list)
    for name in settings:
        recipes[name.partition("+")[0]].append(name)
    labels = {}
    for recipe, names in recipes.items():
        keys = _telling_keys([settings[name] for name in names])
        first = settings[names[0]]
        for name in names:
            own = settings[name]
            named = keys if len(keys) <= MOST_KEYS else [k for k in own if own[k] != first[k]]
            words = [word for key in named if (word := _words(key, own[key]))]
            labels[name] = ", ".join([recipe, *words] if len(recipes) > 1 or not words else words)
    return labels if len(labels) > 1 else {name: name for name in labels}


def _telling_keys(settings: Sequence[Settings]) -> list[str]:
    """Return few keys that tell the settings apart: each splits most of what is not told yet."""
    chosen: list[str] = []
    keys = sorted(settings[0], key=lambda key: _preference(key, settings))

    def groups(of: Iterable[str]) -> int:
        return len({tuple(each[key] for key in of) for each in settings})

    while keys and groups(chosen) < groups(keys):
        chosen.append(max(keys, key=lambda key: groups([*chosen, key])))
    return sorted(chosen, key=list(Recipe.model_fields).index)


def _preference(key: str, settings: Iterable[Settings]) -> tuple[int, int]:
    """Return a key's rank among keys that say the same: words, then whole numbers, then others.

    Of two like numbers, the later in the recipe: hidden_size rather than embedding_size.
    """
    values = [each[key] for each in settings]
    place = list(Recipe.model_fields).index(key)
    if any(isinstance(value, str | bool) for value in values):
        return 0, place
    return (1 if all(isinstance(value, int | None) for value in values) else 2), -place


def _words(key: str, value: object) -> str:
    name = key.replace("_", " ")
    if value is None or (isinstance(value, bool) and value == Recipe.model_fields[key].default):
        return ""
    if isinstance(value, bool):
        return name if value else f"no {name}"
    return value.replace("_", " ") if isinstance(value, str) else f"{name} {format_override(value)}"


def find_sweeps(settings: Mapping[str, Settings]) -> tuple[Sweep, ...]:
    """Return the sweeps that the variants make up.

    A sweep has a line of at least three variants that differ in one number of the recipe, and in
    keys that change with it. The first shows most variants; another is added where it shows two
    that none before it shows.

    Args:
        settings: of each variant, by name, the keys in which variants differ.
    """
    names = list(settings)
    keys = list(next(iter(settings.values()), {}))
    numeric = [key for key in keys if all(_is_number(settings[name][key]) for name in names)]
    candidates = [
        sweep
        for key in sorted(numeric, key=lambda key: _preference(key, settings.values()))
        if (sweep := _sweep(key, settings)).lines
    ]
    found: list[Sweep] = []
    shown: set[str] = set()

    def gain(sweep: Sweep) -> int:
        return len({name for line in sweep.lines for name in line.variants} - shown)

    while candidates and gain(best := max(candidates, key=gain)) >= 2:
        found.append(best)
        shown |= {name for line in best.lines for name in line.variants}
    return tuple(found)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _sweep(key: str, settings: Mapping[str, Settings]) -> Sweep:
    def parts(of: str) -> list[int]:
        """Number the values of a key as they come; keys that change together have one numbering."""
        seen: dict[Hashable, int] = {}
        return [seen.setdefault(each[of], len(seen)) for each in settings.values()]

    keys = list(next(iter(settings.values())))
    together = [other for other in keys if other != key and parts(other) == parts(key)]
    rest = [other for other in keys if other != key and other not in together]
    lines: dict[tuple[object, ...], list[str]] = defaultdict(list)
    for name in settings:
        lines[tuple(settings[name][other] for other in rest)].append(name)
    kept = [names for names in lines.values() if len(names) >= LEAST_POINTS]
    firsts = [names[0] for names in lines.values()]
    labels = variant_labels({name: {k: settings[name][k] for k in rest} for name in firsts})
    drawn = []
    for names in kept:
        by_value = sorted((float(settings[name][key] or 0), name) for name in names)
        drawn.append(
            SweepLine(
                label=labels[names[0]] if len(lines) > 1 else "",
                variants=tuple(name for _, name in by_value),
                values=tuple(value for value, _ in by_value),
            )
        )
    return Sweep(
        key=key,
        together=tuple(together),
        logarithmic=is_geometric([value for line in drawn for value in line.values]),
        lines=tuple(drawn),
    )


def is_geometric(values: Iterable[float]) -> bool:
    """Return whether values are spaced by ratios rather than by steps.

    That is, they span a decade, and the one in the middle is nearer to the geometric mean of the
    ends than to their arithmetic mean.
    """
    ordered = sorted(set(values))
    if not ordered or ordered[0] <= 0 or ordered[-1] < DECADE * ordered[0]:
        return False
    low, middle, high = ordered[0], ordered[len(ordered) // 2], ordered[-1]
    return abs(math.log(middle / math.sqrt(low * high))) < abs(math.log(2 * middle / (low + high)))


class Comparisons(NamedTuple):
    """What came of comparing an experiment's variants with one another."""

    baseline: tuple[VariantComparison, ...]
    trends: tuple[TrendResult, ...]
    best: tuple[BestVariant, ...]


def compare_variants(
    plan: ExperimentPlan, rows: Sequence[Row], sweeps: Sequence[Sweep]
) -> Comparisons:
    """Compare the variants of an experiment in each framework and number of devices.

    Seeds of two variants are independent samples (Welch), as in the tests of findings: variants
    differ in their parameters or in what is done with them. All comparisons with the baseline are
    one family for Holm's correction, and all trends are another. A diverged seed has no mean; in
    trends and best values it is worse than any number.
    """
    places: dict[tuple[Framework, int], dict[str, Row]] = defaultdict(dict)
    for row in rows:
        places[row.cells[0].cell.framework, row.devices][row.variant] = row
    if len(next(iter(places.values()), {})) < 2:
        return Comparisons((), (), ())
    return Comparisons(
        _against_baseline(plan, places), _trends(plan, places, sweeps), _best(places)
    )


Places = Mapping[tuple[Framework, int], Mapping[str, Row]]


def _against_baseline(plan: ExperimentPlan, places: Places) -> tuple[VariantComparison, ...]:
    couples = [
        (framework, devices, row, variants[plan.baseline_variant])
        for (framework, devices), variants in places.items()
        for name, row in variants.items()
        if name != plan.baseline_variant
    ]

    def sample(row: Row) -> dict[int, float]:
        return row.values(plan.metric) if row.usable else {}

    outcomes = compare_pairs(
        [Pair(sample(a), sample(b), False, a.complete and b.complete) for *_, a, b in couples],
        plan.equivalence_margin,
    )
    compared = []
    for (framework, devices, row, base), outcome in zip(couples, outcomes, strict=True):
        low, high = (outcome.test.low, outcome.test.high) if outcome.test else (None, None)
        speed, slowest, fastest = _speed_ratio(row, base)
        compared.append(
            VariantComparison(
                variant=row.variant,
                baseline=base.variant,
                framework=framework,
                devices=devices,
                outcome=outcome,
                improvement=_improvement(outcome.difference),
                improvement_low=_improvement(high),
                improvement_high=_improvement(low),
                speed=speed,
                speed_low=slowest,
                speed_high=fastest,
            )
        )
    return tuple(compared)


def _improvement(nats: float | None) -> float | None:
    return None if nats is None else -math.expm1(nats)


def _speed_ratio(row: Row, base: Row) -> tuple[float | None, float | None, float | None]:
    """Return the ratio of two rows' speeds and its 95 % interval: Welch's, of the logarithms.

    None where the speeds do not compare (`comparable`).
    """
    if not (row.usable and base.usable and comparable(SPEED, (row, base))):
        return None, None, None
    a, b = ([math.log(speed) for speed in each.values(SPEED).values()] for each in (row, base))
    if not (a and b):
        return None, None, None
    ratio = math.exp(sum(a) / len(a) - sum(b) / len(b))
    test: MeanTest | None = t_test(a, b, margin=1.0)
    return (ratio, math.exp(test.low), math.exp(test.high)) if test else (ratio, None, None)


def _seeds(row: Row, metric: str) -> list[float]:
    """Return the mean nll of each seed, infinite if it diverged; missing seeds are left out."""
    return [*row.values(metric).values(), *(math.inf for _ in row.results("diverged"))]


def _trends(
    plan: ExperimentPlan, places: Places, sweeps: Sequence[Sweep]
) -> tuple[TrendResult, ...]:
    tested = []
    for (framework, devices), variants in places.items():
        for sweep in sweeps:
            for line in sweep.lines:
                groups = [_seeds(variants[name], plan.metric) for name in line.variants]
                found = trend([group for group in groups if group], "rises")
                p = None
                if found.p is not None and found.p_opposite is not None:
                    p = min(1.0, 2 * min(found.p, found.p_opposite))
                rises = (found.p or 0.0) < (found.p_opposite or 0.0)
                tested.append((framework, devices, sweep.key, line.label, rises, p))
    adjusted = holm([p for *_, p in tested])
    return tuple(
        TrendResult(
            key=key,
            line=label,
            framework=framework,
            devices=devices,
            direction=(
                ("rises" if rises else "falls")
                if p_holm is not None and p_holm < SIGNIFICANCE
                else None
            ),
            p=p,
            p_holm=p_holm,
        )
        for (framework, devices, key, label, rises, p), p_holm in zip(tested, adjusted, strict=True)
    )


def _best(places: Places) -> tuple[BestVariant, ...]:
    """Return the best variant of every place whose variants have at least two seeds each.

    The best has the lowest validation perplexity, whatever the experiment compares.
    """
    best = []
    for (framework, devices), variants in places.items():
        groups = [_seeds(row, CHOSEN_BY) for row in variants.values()]
        if min(map(len, groups)) < 2:  # one seed says nothing of chance
            continue
        shares = dict(zip(variants, best_probabilities(groups), strict=True))
        winner = max(shares, key=lambda name: shares[name])
        if shares[winner] > 0:
            best.append(
                BestVariant(
                    framework=framework,
                    devices=devices,
                    variant=winner,
                    probability=shares[winner],
                    probabilities=shares,
                )
            )
    return tuple(best)
