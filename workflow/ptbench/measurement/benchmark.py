"""Training speed of every framework, measured side by side and against this machine's products.

All that is compared runs in the same minutes: each round gives every competitor and every product a
turn, in an order that rotates, while the others wait. As the machine's speed drifts, a fraction of
the bound is taken within each round; what is printed are medians over the rounds.
"""

from __future__ import annotations

import csv
import io
import json
import os
import statistics
import subprocess
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ptbench.backends import FRAMEWORKS, Framework
from ptbench.environments import PYTHON
from ptbench.errors import PtbenchError
from ptbench.model.recipe import Accelerator, Recipe
from ptbench.model.work import Product, bound, flops_per_token, training_products
from ptbench.training.provenance import provenance
from ptbench.training.records import write_atomically

VOCABULARY_SIZE = 10_000  # PTB's
PRODUCT_SECONDS = 0.15  # for each shape and round
MODELS = {
    "small": Recipe(
        batch_size=20, sequence_length=20, embedding_size=200, hidden_size=200, layers=2
    ),
    "medium": Recipe(
        batch_size=20, sequence_length=35, embedding_size=650, hidden_size=650, layers=2,
        dropout=0.5,
    ),
    "mos": Recipe(
        batch_size=20, sequence_length=35, embedding_size=650, hidden_size=650, layers=2,
        dropout=0.5, mixtures=10,
    ),
}  # fmt: skip
# What multiplies matrices: the framework whose environment has it, and the class that does it.
PRODUCTS = {
    "NumPy": ("jax", "ptbench.model.work:NumpyProducts"),
    "PyTorch": ("pytorch", "ptbench.backends.pytorch.tuned:TorchProducts"),
}
YARDSTICK = ("keras", "ptbench.backends.keras.backend:KerasFit")


@dataclass(frozen=True)
class Competitor:
    """Something whose training speed is measured."""

    framework: Framework
    implementation: str  # stock, tuned, or fit

    @property
    def label(self) -> str:
        return f"{self.framework} {self.implementation}"

    def can_train(self, recipe: Recipe) -> bool:
        """Whether it has the model: Keras' own `fit` has what Keras has layers for."""
        return self.implementation != "fit" or not recipe.mixtures


class Worker:
    """A process that measures when told to; see `speed_worker.py`."""

    def __init__(self, python: Path, task: dict[str, Any], log: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        threads = str(task["threads"])
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            environment[name] = threads
        self.log = log
        self.task = task
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [python, "-m", "ptbench.measurement.speed_worker", json.dumps(task)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                env=environment,
            )  # fmt: skip

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            status = self.process.wait()
            said = self.log.read_text(errors="replace").strip().splitlines()[-1:]
            raise PtbenchError(
                f"the benchmark of {self.task.get('framework', self.task['kind'])} ended with "
                f"status {status}: {''.join(said)} (its output is in {self.log})"
            )
        return json.loads(line)

    def ask(self, **request: Any) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self.answer()


@dataclass
class Result:
    """One competitor's speed on one model."""

    model: str
    competitor: Competitor
    tokens_per_second: list[float]  # by round
    bounds: list[float]  # what the products alone would allow, by round [tokens/s]; none on GPUs
    peak_memory_bytes: int
    settings: dict[str, str]

    @property
    def fraction_of_bound(self) -> float | None:
        if not self.bounds:
            return None
        pairs = zip(self.tokens_per_second, self.bounds, strict=True)
        return statistics.median(speed / bound for speed, bound in pairs)

    def row(self) -> dict[str, Any]:
        rates = sorted(self.tokens_per_second)
        return {
            "model": self.model,
            "framework": self.competitor.framework,
            "implementation": self.competitor.implementation,
            "tokens_per_second": round(statistics.median(rates), 1),
            "lowest": round(rates[0], 1),
            "highest": round(rates[-1], 1),
            "fraction_of_bound": (
                None if self.fraction_of_bound is None else round(self.fraction_of_bound, 3)
            ),
            "peak_memory_mb": round(self.peak_memory_bytes / 1e6),
            "rounds": len(rates),
        }


def run_benchmark(
    models: Sequence[str],
    competitors: Sequence[Competitor],
    environments: Path,
    accelerator: Accelerator,
    threads: int,
    rounds: int,
    seconds: float,
    output: Path,
    say: Callable[[str], None] = print,
) -> list[Result]:
    """Measure and write `speed.csv` and `speed.json` into `output`.

    Args:
        models: names in `MODELS`.
        environments: folder of the frameworks' environments.
        threads: CPU threads of each competitor.
        rounds: turns of each competitor.
        seconds: least length of a turn [s].

    Raises:
        PtbenchError: if an environment is missing or a framework fails.
    """
    needed = {competitor.framework for competitor in competitors}
    if accelerator == "cpu":
        needed |= {framework for framework, _ in PRODUCTS.values()}  # type: ignore[misc]
    for framework in sorted(needed):
        if not (environments / f"{framework}-{accelerator}" / PYTHON).exists():
            raise PtbenchError(
                f"{environments} has no environment {framework}-{accelerator}: build it with "
                f"`uv run ptbench environments {framework} --accelerator {accelerator} "
                f"--output {environments}`"
            )
    results: list[Result] = []
    for model in models:
        able = [each for each in competitors if each.can_train(MODELS[model])]
        for each in competitors:
            if each not in able:
                say(f"{model}: without {each.label}, as Keras has no layer for its softmaxes")
        if able:
            results += benchmark_model(
                model, able, environments, accelerator, threads, rounds, seconds, output, say
            )
    rows = [result.row() for result in results]
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    facts = provenance("numpy") | {"accelerator": accelerator, "threads": threads}
    content = {
        "facts": facts,
        "results": [
            result.row()
            | {
                "tokens_per_second_by_round": result.tokens_per_second,
                "bound_by_round": result.bounds,
                "settings": result.settings,
            }
            for result in results
        ],
    }
    write_atomically(output / "speed.csv", text.getvalue())
    write_atomically(output / "speed.json", json.dumps(content, indent=2, default=str) + "\n")
    return results


def benchmark_model(
    model: str,
    competitors: Sequence[Competitor],
    environments: Path,
    accelerator: Accelerator,
    threads: int,
    rounds: int,
    seconds: float,
    output: Path,
    say: Callable[[str], None],
) -> list[Result]:
    """All competitors on one model, interleaved."""
    recipe = MODELS[model]
    products = training_products(recipe, VOCABULARY_SIZE)

    def start(framework: str, task: dict[str, Any], name: str) -> Worker:
        python = environments / f"{framework}-{accelerator}" / PYTHON
        return Worker(
            python.absolute(), {"threads": threads} | task, output / "logs" / f"{name}.log"
        )

    with ExitStack() as stack:
        workers: dict[Competitor, Worker] = {}
        settings: dict[Competitor, dict[str, str]] = {}
        for competitor in competitors:
            task: dict[str, Any] = {
                "recipe": recipe.model_dump(mode="json"), "vocabulary_size": VOCABULARY_SIZE
            }  # fmt: skip
            if competitor.implementation == "fit":
                task |= {"kind": "fit", "framework": competitor.framework, "class": YARDSTICK[1]}
            else:
                task["recipe"]["implementation"] = competitor.implementation
                task |= {
                    "kind": "backend",
                    "framework": competitor.framework,
                    "accelerator": accelerator,
                }
            name = f"{model}-{competitor.label.replace(' ', '-')}"
            workers[competitor] = stack.enter_context(start(competitor.framework, task, name))
            settings[competitor] = workers[competitor].answer()  # one at a time compiles
        engines: list[Worker] = []
        if accelerator == "cpu":
            for engine, (framework, made) in PRODUCTS.items():
                task = {"kind": "products", "class": made}
                worker = stack.enter_context(start(framework, task, f"{model}-products-{engine}"))
                worker.answer()
                engines.append(worker)

        speeds: dict[Competitor, list[float]] = {c: [] for c in competitors}
        memory: dict[Competitor, int] = {}
        bounds: list[float] = []
        for number in range(rounds):
            shift = number % len(competitors)
            for competitor in [*competitors[shift:], *competitors[:shift]]:
                measured = workers[competitor].ask(seconds=seconds)
                speeds[competitor].append(measured["tokens"] / measured["seconds"])
                memory[competitor] = measured["peak_memory_bytes"]
                if not 0 < measured["nll"] < 100:
                    raise PtbenchError(
                        f"{competitor.label} trained to a loss of {measured['nll']} nats per token"
                    )
            if engines:
                rates: dict[Product, float] = {
                    product: max(
                        engine.ask(product=product, seconds=PRODUCT_SECONDS) for engine in engines
                    )
                    for product in products
                }
                bounds.append(bound(recipe, VOCABULARY_SIZE, rates))
            say(f"{model}: round {number + 1} of {rounds} done")
    if bounds:
        flops = flops_per_token(recipe, VOCABULARY_SIZE) / 1e6
        allowed = statistics.median(bounds)
        say(f"{model}: {flops:.1f} MFLOP a token; the products alone allow {allowed:,.0f} tokens/s")
    return [
        Result(model, each, speeds[each], bounds, memory[each], settings[each])
        for each in competitors
    ]


def all_competitors(
    frameworks: Sequence[Framework], implementations: Sequence[str]
) -> list[Competitor]:
    """Each implementation of each framework, and Keras' own `fit` where Keras is among them."""
    competitors = [Competitor(f, i) for f in frameworks for i in implementations]
    if "keras" in frameworks:
        competitors.append(Competitor("keras", "fit"))
    return competitors


def show(results: Sequence[Result]) -> None:
    """Print the table."""
    table = Table("model", "framework", "implementation", "tokens/s", "lowest to highest",
                  "of bound", "peak memory", title="Medians over rounds")  # fmt: skip
    for result in results:
        row = result.row()
        table.add_row(
            row["model"], row["framework"], row["implementation"],
            f"{row['tokens_per_second']:,.0f}", f"{row['lowest']:,.0f} to {row['highest']:,.0f}",
            "" if result.fraction_of_bound is None else f"{result.fraction_of_bound:.2f}",
            f"{row['peak_memory_mb']:,} MB",
        )  # fmt: skip
    Console().print(table)


assert set(FRAMEWORKS) >= {framework for framework, _ in [*PRODUCTS.values(), YARDSTICK]}
