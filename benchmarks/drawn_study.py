"""Results of a whole study, drawn from a known law.

`uv run python benchmarks/drawn_study.py FOLDER` writes them. Nothing is trained. A `Law` gives each
row of the study the mean and deviation of the logarithm of each metric, and the share of seeds that
diverge. `plant` makes it uphold a finding, contradict it, or leave it open; `truth` says what the
law makes of a test, whatever was planted. `write` draws the files of all runs of
slurm/reproduction.yaml from it, to measure the report on; `error_rates.py` judges findings by seeds
that are drawn in memory.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from ptbench.analysis.agreement import TOLERANCE
from ptbench.analysis.claims import Claim, ClaimTest, read_claims
from ptbench.analysis.findings import EXPONENT_TOLERANCE
from ptbench.analysis.metrics import METRICS, PERPLEXITY
from ptbench.backends import FRAMEWORKS
from ptbench.configuration.config import read_configuration
from ptbench.configuration.papers import NamedRow, paper_folders
from ptbench.configuration.specification import PROTOCOL, Cell, Specification
from ptbench.configuration.study import Study, load_study
from ptbench.training.records import Seconds

ROOT = Path(__file__).parents[1]
MARGIN = 0.02  # config.yaml's equivalence_margin [nats]
CLEAR = 10 * MARGIN  # a difference that any few seeds show
NOISE = 0.004  # deviation of a seed's log perplexity: what seeds of these models have
OPEN_NOISE = 0.5  # with so much, a few seeds show nothing
TIMES = 0.02  # deviation of the logarithm of a time or speed

WIDEST = 2 * TOLERANCE  # an upheld number may be so far from the truth, not farther
STEEPEST = 2 * EXPONENT_TOLERANCE
ROUNDING = 1e-9

Outcome = Literal["upheld", "contradicted", "cannot tell", "just false", "just true"]
OUTCOMES: tuple[Outcome, ...] = ("upheld", "contradicted", "cannot tell")
EDGES: tuple[Outcome, ...] = ("just false", "just true")  # where verdicts are wrong most often
# Logarithms of a run's metrics where nothing is planted; perplexities are drawn around theirs.
USUAL = {
    "tokens_per_second": math.log(9000), "seconds_per_epoch": math.log(110),
    "seconds_per_batch": math.log(0.08), "total_seconds": math.log(4600),
    "training_seconds": math.log(4200), "training_and_validation_seconds": math.log(4400),
    "validation_seconds": math.log(120), "test_seconds": math.log(60),
    "load_seconds": math.log(0.8), "start_up_seconds": math.log(5), "compile_seconds": math.log(4),
    "checkpointing_seconds": math.log(3), "epochs": math.log(39), "best_epoch": math.log(35),
    "parameters": math.log(2e7), "peak_memory_bytes": math.log(1.6e9),
    "peak_device_memory_bytes": math.log(9e8), "steps_per_epoch": math.log(1327),
}  # fmt: skip


class Normal(NamedTuple):
    """The law of one metric's logarithm over the seeds of one row."""

    mean: float
    deviation: float
    diverging: float = 0.0  # share of the seeds


@dataclass
class Law:
    """What the seeds of every row are drawn from."""

    random: np.random.Generator
    laws: dict[tuple[NamedRow, str], Normal] = field(default_factory=dict)

    def __call__(self, row: NamedRow, metric: str) -> Normal:
        """Return the law of a row's metric; what nothing has been planted on is usual."""
        found = self.laws.get((row, metric))
        if found is None:
            found = self.laws[row, metric] = self._usual(metric)
        return found

    def _usual(self, metric: str) -> Normal:
        if METRICS[metric].kind is PERPLEXITY:
            return Normal(self.random.normal(4.6, 0.15), NOISE)
        spread = 0.0 if is_exact(metric) else TIMES
        return Normal(USUAL[metric] + self.random.normal(0, 0.3), spread)

    def draw(self, row: NamedRow, metric: str, seeds: int) -> list[float]:
        """Return a metric of so many seeds; a diverged one is infinite."""
        mean, deviation, diverging = self(row, metric)
        values = np.exp(self.random.normal(mean, deviation, seeds))
        values[self.random.random(seeds) < diverging] = math.inf
        return values.tolist()

    def plant(self, claim: Claim, outcome: Outcome) -> None:
        """Make the law uphold a finding, contradict it or leave it open, whatever it was before."""
        for test in claim.tests:
            for framework in frameworks_of(test):
                self._plant(test, framework, outcome)

    def _plant(self, test: ClaimTest, framework: str | None, outcome: Outcome) -> None:
        noise = self._noise(test.metric, outcome)
        left = [of(row, framework) for row in test.left]
        right = [of(row, framework) for row in test.right]
        margin = test.margin or MARGIN
        # By how much a difference is in the finding's direction, and by how much equals differ.
        step, apart = {
            "upheld": (CLEAR, 0.0),
            "contradicted": (-CLEAR, CLEAR),
            "cannot tell": (0.0, 0.0),
            "just false": (0.0, margin * (1 + ROUNDING)),
            "just true": (margin * (1 + ROUNDING), margin * (1 - ROUNDING)),
        }[outcome]
        base = self(right[0] if right else left[0], test.metric).mean

        def put(row: NamedRow, mean: float, diverging: float = 0.0) -> None:
            self.laws[row, test.metric] = Normal(mean, noise, diverging)

        match test.test:
            case "lower" | "higher" | "equal":
                for row in right:
                    put(row, base)
                sign = {"lower": -1, "higher": 1, "equal": 0}[test.test]
                for row in left:
                    if row not in right:
                        put(row, base + (sign * step if sign else apart))
            case "ordering" | "rises" | "falls":
                sign = -1 if test.test == "falls" else 1
                for place, row in enumerate(left):
                    put(row, base + sign * step * place)
            case "optimum":
                others = [row for row in (*left, *right) if row != left[0]]
                put(left[0], base)
                for place, row in enumerate(dict.fromkeys(others)):
                    least = CLEAR if outcome.startswith("just") and place else step
                    put(row, base + min(least, ROUNDING) if least == margin else base + least)
            case "saturates":
                assert test.at is not None
                for place, row in enumerate(left):
                    put(row, base - (apart if place == test.at + 1 else 0.0))
            case "interaction":
                for row in (*left, *right):
                    put(row, base)
                put(left[0], base - step)
            case "value":
                for row, number in zip(left, test.numbers, strict=True):
                    put(row, math.log(number) + self._gap(outcome, WIDEST))
            case "ratio":
                for row in right:
                    put(row, base)
                for (row, _), number in zip(test.pairs, test.numbers, strict=True):
                    put(of(row, framework), base + math.log(number) + self._gap(outcome, WIDEST))
            case "slope":
                exponent = test.numbers[0] + self._gap(outcome, STEEPEST)
                for row, at in zip(left, test.positions or (), strict=True):
                    put(row, base + exponent * math.log(at / (test.positions or [1.0])[0]))
            case "above":
                is_true = outcome in ("upheld", "just true")
                share = 0.5 if outcome == "cannot tell" else 0.0
                for row, number in zip(left, test.numbers, strict=True):
                    put(row, math.log(number) + (CLEAR if is_true else -CLEAR), share)

    @staticmethod
    def _gap(outcome: Outcome, widest: float) -> float:
        """Return how far a number is from the document's."""
        return {"contradicted": 2 * widest, "just false": widest}.get(outcome, 0.0)

    def _noise(self, metric: str, outcome: Outcome) -> float:
        if is_exact(metric):
            return 0.0
        if outcome == "cannot tell":
            return OPEN_NOISE
        return NOISE if METRICS[metric].kind is PERPLEXITY else TIMES

    def truth(self, test: ClaimTest, framework: str | None, margin: float) -> tuple[bool, bool]:
        """Return whether the law makes a test's finding false, and whether it makes it true.

        Neither, where a difference is in the finding's direction and smaller than the margin: it is
        then as well said that the finding holds as that there is no difference that matters.
        """
        margin = test.margin or margin

        def mean(row: NamedRow) -> float:
            law = self(of(row, framework), test.metric)
            return math.inf if law.diverging else law.mean

        left = [mean(row) for row in test.left]
        pairs = [(mean(a), mean(b)) for a, b in test.pairs] if test.right else []
        numbers = [math.log(n) if n > 0 else math.nan for n in test.numbers]
        least = 0.0 if is_exact(test.metric) else margin
        match test.test:
            case "lower":
                effects = [b - a for a, b in pairs]
            case "higher":
                effects = [a - b for a, b in pairs]
            case "ordering":
                effects = [b - a for a, b in itertools.pairwise(left)]
            case "interaction":
                a, b = left
                c, d = (mean(row) for row in test.right)
                effects = [(c - d) - (a - b)]
            case "equal":
                far = [abs(a - b) for a, b in pairs]
                return max(far) >= margin, max(far) < margin
            case "rises" | "falls":
                total = sum(
                    self._ahead(of(a, framework), of(b, framework), test.metric)
                    for a, b in itertools.combinations(test.left, 2)
                )
                total *= 1 if test.test == "rises" else -1
                return total <= 0, total > 0
            case "saturates":
                gains = [left[test.at or 0] - each for each in left[(test.at or 0) + 1 :]]
                return max(gains) >= margin, max(gains) < margin
            case "optimum":
                others = [mean(row) for row in test.rows if row != test.left[0]]
                return left[0] >= min(others), left[0] < min(others)
            case "value":
                gaps = [abs(each - number) for each, number in zip(left, numbers, strict=True)]
                return max(gaps) >= WIDEST, max(gaps) < ROUNDING
            case "ratio":
                gaps = [abs(a - b - n) for (a, b), n in zip(pairs, numbers, strict=True)]
                return max(gaps) >= WIDEST, max(gaps) < ROUNDING
            case "slope":
                x = np.log(test.positions or [])
                slope = float(np.polyfit(x, left, 1)[0])
                gap = abs(slope - test.numbers[0])
                return gap >= STEEPEST, gap < ROUNDING
            case "above":
                low = [each <= number for each, number in zip(left, numbers, strict=True)]
                return any(low), not any(low)
        return min(effects) <= 0, min(effects) > least

    def _ahead(self, a: NamedRow, b: NamedRow, metric: str) -> float:
        """Return by how much the probability that b is above a exceeds one half."""
        first, second = self(a, metric), self(b, metric)
        scale = math.hypot(first.deviation, second.deviation) or 1e-12
        return 0.5 * math.erf((second.mean - first.mean) / scale / math.sqrt(2))


def is_exact(metric: str) -> bool:
    """Return whether a metric is the same for every seed."""
    return metric in ("parameters", "steps_per_epoch")


def of(row: NamedRow, framework: str | None) -> NamedRow:
    """Return a row in its own framework, or in the given one."""
    return row if row.framework else row._replace(framework=framework)


def frameworks_of(test: ClaimTest) -> Sequence[str | None]:
    """Return the frameworks that a test is made in; None: its rows name their own."""
    return list(FRAMEWORKS) if any(row.framework is None for row in test.rows) else [None]


@cache
def all_claims() -> dict[str, list[Claim]]:
    """Return every document's findings."""
    return {name: read_claims(folder) for name, folder in paper_folders().items()}


def plant_all(law: Law, outcomes: Sequence[Outcome] = OUTCOMES) -> dict[str, Outcome]:
    """Plant an outcome on every finding, each in its turn, and return them by finding.

    Findings share rows, so that one which is planted later may undo an earlier one's; the order is
    drawn.
    """
    claims = [claim for found in all_claims().values() for claim in found if claim.tests]
    planted: dict[str, Outcome] = {}
    for index in law.random.permutation(len(claims)):
        claim = claims[index]
        planted[claim.id] = outcomes[int(law.random.integers(len(outcomes)))]
        law.plant(claim, planted[claim.id])
    return planted


# The files of a study ---------------------------------------------------------------------------


def write(study: Study, law: Law, results: Path) -> int:
    """Write the four files of every cell, and each corpus' facts; return how many cells.

    One seed in a hundred diverges, beside those that the law makes diverge.
    """
    specifications = {
        each.variant: each
        for planned in study.experiments.values()
        for each in planned.specifications
    }
    rows: dict[NamedRow, list[Cell]] = {}
    for cell in study.cells:
        rows.setdefault(NamedRow(cell.variant, cell.framework, cell.devices), []).append(cell)
    for row, cells in rows.items():
        _write_row(law, row, cells, specifications[row.variant], results)
    for specification in specifications.values():
        file = results / "corpora" / specification.recipe.corpus_folder / "corpus.json"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("{}\n")
    return len(study.cells)


def _write_row(
    law: Law, row: NamedRow, cells: Sequence[Cell], specification: Specification, results: Path
) -> None:
    names = [name for name in METRICS if name in USUAL or METRICS[name].kind is PERPLEXITY]
    drawn = {name: law.draw(row, name, len(cells)) for name in names}
    fingerprint = specification.fingerprint
    recipe = "".join(
        f"{key}: {json.dumps(value)}\n"
        for key, value in specification.recipe.model_dump(mode="json").items()
    )
    for index, cell in enumerate(cells):
        values = {name: found[index] for name, found in drawn.items()}
        diverged = any(math.isinf(value) for value in values.values()) or (
            law.random.random() < 0.01
        )
        metrics, history = _run(cell, fingerprint, values, diverged)
        folder = results / "cells" / cell.path
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "history.csv").write_text(history)
        (folder / "provenance.json").write_text(PROVENANCE)
        (folder / "recipe.yaml").write_text(recipe)
        (folder / "metrics.json").write_text(json.dumps(metrics))


PROVENANCE = json.dumps(
    {
        "git_commit": "0123456789abcdef0123456789abcdef01234567",
        "git_dirty": False,
        "framework_version": "1.2.3",
        "cpu": "Drawn CPU",
        "gpus": [{"name": "Drawn GPU", "driver": "1.0"}],
        "cells_at_once": 1,
    }
)
TOKENS = {"train": 929_580, "valid": 73_759, "test": 82_429}
HEADER = (
    "epoch,learning_rate,train_nll,train_perplexity,valid_nll,valid_perplexity,gradient_norm,"
    "tokens_per_second,training_seconds,validation_seconds\n"
)


def _run(
    cell: Cell, fingerprint: str, values: dict[str, float], diverged: bool
) -> tuple[dict[str, object], str]:
    """Return metrics.json and history.csv of one run."""
    epochs = max(1, round(values["epochs"]))
    ended = max(1, epochs // 4) if diverged else epochs

    def score(split: str) -> dict[str, float]:
        value = values[f"{split}_perplexity"]
        return {"nll": math.log(value), "perplexity": value, "tokens": TOKENS[split]}

    clocks = {clock: values[f"{clock}_seconds"] for clock in Seconds.model_fields}
    metrics: dict[str, object] = {
        "protocol": PROTOCOL,
        "fingerprint": fingerprint,
        "cell": cell.model_dump(),
        "status": "diverged" if diverged else "ok",
        "reason": "the training perplexity is 2.1e+07, above 1e+06" if diverged else None,
        "parameters": round(values["parameters"]),
        "vocabulary_size": 10_000,
        "steps_per_epoch": round(values["steps_per_epoch"]),
        "epochs": ended,
        "best_epoch": None if diverged else min(ended, max(1, round(values["best_epoch"]))),
        "train": None if diverged else score("train"),
        "valid": None if diverged else score("valid"),
        "test": None if diverged else score("test"),
        "tokens_per_second": values["tokens_per_second"],
        "seconds_per_epoch": values["seconds_per_epoch"],
        "seconds": clocks,
        "peak_memory_bytes": round(values["peak_memory_bytes"]),
        "peak_device_memory_bytes": round(values["peak_device_memory_bytes"]),
    }
    return metrics, HEADER + "".join(_epochs(values, ended, diverged))


def _epochs(values: dict[str, float], epochs: int, diverged: bool) -> Iterator[str]:
    ends = {
        split: 5.0 if diverged else math.log(values[f"{split}_perplexity"])
        for split in ("train", "valid")
    }
    speed, each = values["tokens_per_second"], values["seconds_per_epoch"]
    for epoch in range(1, epochs + 1):
        above = 1.5 * (math.exp(-0.3 * epoch) - math.exp(-0.3 * epochs))
        above = 2.0 * epoch / epochs if diverged else above
        train, valid = ends["train"] + 1.2 * above, ends["valid"] + above
        yield (
            f"{epoch},1.0,{train!r},{math.exp(train)!r},{valid!r},{math.exp(valid)!r},5.0,"
            f"{speed!r},{0.96 * each!r},{0.04 * each!r}\n"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="folder that is made")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.results.exists():
        parser.error(f"{arguments.results} is there; name a new folder")
    begun = time.perf_counter()
    study = load_study(read_configuration([ROOT / "slurm" / "reproduction.yaml"]))
    law = Law(np.random.default_rng(arguments.seed))
    planted = plant_all(law)
    count = write(study, law, arguments.results)
    print(
        f"{count} runs and {len(planted)} planted findings in {time.perf_counter() - begun:.0f} s"
    )


if __name__ == "__main__":
    main()
