"""The six criteria of Singh's proposal, side by side: one table for each profiled variant.

1. Loading and preprocessing, 2. time of a step, an epoch, a prediction, and its price, 3. replicas,
4. use of the hardware, 5. ease of use, 6. perplexity. The frameworks are the columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import NamedTuple

from ptbench.analysis.experiment import RowResult
from ptbench.analysis.metrics import METRICS, NOTHING, write_share
from ptbench.analysis.source import read_source
from ptbench.backends.features import read_features
from ptbench.measurement.mistakes import read_mistakes
from ptbench.report.formatting import format_devices, format_std
from ptbench.report.profiles import PHASES, ProfiledGroup, ProfiledRow


class Line(NamedTuple):
    """One measured quantity."""

    title: str
    texts: Mapping[str, str]  # by framework


class CriteriaTable(NamedTuple):
    """All criteria of one variant."""

    variant: str
    frameworks: list[str]
    criteria: dict[str, list[Line]]  # by the criterion's name


def criteria_of(
    rows: Sequence[RowResult], profiles: Iterable[ProfiledGroup]
) -> list[CriteriaTable]:
    """Return a table for each variant that was profiled on as few devices as it ran on.

    Args:
        rows: of an experiment.
        profiles: of the same.
    """
    profiled = {
        (each.row.variant, each.row.devices, each.row.framework): each
        for group in profiles
        for each in group.rows
    }
    tables = []
    for variant in dict.fromkeys(row.variant for row in rows):
        own = [row for row in rows if row.variant == variant]
        fewest = min(row.devices for row in own)
        found = {
            row.framework: each
            for row in own
            if (each := profiled.get((variant, fewest, row.framework)))
        }
        if found:
            tables.append(_table(variant, own, fewest, found))
    return tables


def _table(
    variant: str, rows: Sequence[RowResult], fewest: int, profiled: Mapping[str, ProfiledRow]
) -> CriteriaTable:
    by_devices = {
        devices: {row.framework: row for row in rows if row.devices == devices}
        for devices in sorted({row.devices for row in rows})
    }
    base = by_devices[fewest]

    def metrics(*names: str) -> list[Line]:
        lines = [
            Line(METRICS[name].title, {key: _metric(row, name) for key, row in base.items()})
            for name in names
        ]
        return [line for line in lines if set(line.texts.values()) != {NOTHING}]

    def of_profile(title: str, read: Callable[[ProfiledRow], str]) -> Line:
        return Line(title, {key: read(each) for key, each in profiled.items()})

    phases = [
        Line(
            f"{heading}, ms",
            {key: _ms(getattr(each.profile, name).median) for key, each in profiled.items()},
        )
        for name, heading in PHASES.items()
    ]
    prediction = [
        of_profile("Predicting a word, ms", lambda each: _ms(each.profile.prediction[0].median)),
        of_profile(
            "Words predicted/s, many rows at once",
            lambda each: f"{each.profile.prediction[-1].words_per_second:,.0f}",
        ),
    ]
    return CriteriaTable(
        variant,
        list(base),
        {
            "Loading": [
                *metrics("load_seconds"),
                of_profile(
                    "First batch, ms",
                    lambda each: _ms(each.profile.loading["memory"].open_seconds),
                ),
            ],
            "Time and price": [
                *phases,
                *metrics("seconds_per_batch", "seconds_per_epoch"),
                *prediction,
                *metrics("rent"),
            ],
            "Replicas": [
                line
                for devices, own in by_devices.items()
                if devices != fewest
                for line in _scaling(base, own, fewest, devices)
            ],
            "Hardware": [
                of_profile("Share of NumPy's products", _share_of_bound),
                *metrics(
                    "peak_memory_bytes", "peak_device_memory_bytes", "own_cores",
                    "gpu_utilization", "flops_per_second", "gpu_joules", "cpu_joules",
                ),
            ],
            "Ease of use": _ease(list(base)),
            "Perplexity": metrics(
                "test_perplexity", "valid_perplexity", "train_perplexity", "test_accuracy"
            ),
        },
    )  # fmt: skip


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}"


def _share_of_bound(each: ProfiledRow) -> str:
    """Write a run's speed over what NumPy's products would allow."""
    speed, limit = each.row.value("tokens_per_second"), each.profile.bound_tokens_per_second
    return write_share(speed / limit, 0) if speed and limit else NOTHING


def _metric(row: RowResult, name: str) -> str:
    summary = row.metrics.get(name)
    text = METRICS[name].text(summary.value if summary else None)
    return f"{text} {format_std(summary)}".rstrip()


def _scaling(
    base: Mapping[str, RowResult], own: Mapping[str, RowResult], fewest: int, devices: int
) -> list[Line]:
    """Return what more devices give: speed-up, its share of the devices, and the perplexity."""
    ratios = {}
    for name, row in own.items():
        one = base[name].value("tokens_per_second") if name in base else None
        many = row.value("tokens_per_second")
        ratios[name] = many / one if many and one else None
    more = devices / fewest
    on = format_devices(devices)
    return [
        Line(f"Speed-up on {on}", {k: f"{r:.2f}" if r else NOTHING for k, r in ratios.items()}),
        Line(
            f"Efficiency on {on}",
            {k: write_share(r / more, 0) if r else NOTHING for k, r in ratios.items()},
        ),
        Line(
            f"Test perplexity on {on}", {k: _metric(r, "test_perplexity") for k, r in own.items()}
        ),
    ]


@cache
def _ease_by_framework() -> dict[str, dict[str, str]]:
    """Return, by title, what each framework takes in source and says to mistakes."""
    features, source, mistakes = read_features(), read_source(), read_mistakes()
    count = len(next(iter(features.values())))
    named = {name: sum(m.names_cause for m in own.values()) for name, own in mistakes.items()}
    asked = len(next(iter(mistakes.values())))
    return {
        f"Features built in, of {count}": {
            name: str(sum(each.built_in for each in own.values())) for name, own in features.items()
        },
        "Lines of code": {k: str(sum(own.lines.values())) for k, own in source.items()},
        "Lines for a second device": {k: str(own.replica_lines) for k, own in source.items()},
        "Names of the framework used": {k: str(len(own.symbols)) for k, own in source.items()},
        f"Mistakes whose cause is named, of {asked}": {k: str(n) for k, n in named.items()},
    }


def _ease(frameworks: Sequence[str]) -> list[Line]:
    return [
        Line(title, {name: texts.get(name, NOTHING) for name in frameworks})
        for title, texts in _ease_by_framework().items()
    ]
