"""Training speed of every framework, side by side, and as a share of what the machine allows.

All competitors run in the same minutes: in each round every competitor, and every matrix product,
has a turn while the others wait, in an order that rotates. As the machine's speed drifts, the share
of the bound is taken within each round. Printed are medians over the rounds.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table

from ptbench.backends import Framework
from ptbench.environments import PYTHON
from ptbench.errors import PtbenchError
from ptbench.files import write_atomically
from ptbench.model.recipe import Accelerator, Recipe
from ptbench.model.work import Product, bound, flops_per_token, training_products
from ptbench.training.provenance import provenance

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
# The product classes, and the frameworks in whose environments they run.
PRODUCTS = {
    "NumPy": ("jax", "ptbench.measurement.products:NumPyProducts"),
    "PyTorch": ("pytorch", "ptbench.measurement.products:PyTorchProducts"),
}
BACKEND = "ptbench.measurement.backend_speed:BackendSpeed"
KERAS_FIT = "ptbench.measurement.keras_fit:KerasFit"


@dataclass(frozen=True)
class Competitor:
    """Something whose training speed is measured."""

    framework: Framework
    implementation: str  # stock, tuned, or fit

    @property
    def label(self) -> str:
        """Its name in messages."""
        return f"{self.framework} {self.implementation}"

    def can_train(self, recipe: Recipe) -> bool:
        """Return whether it has the model: Keras' own `fit` has what Keras has layers for."""
        return self.implementation != "fit" or not recipe.mixtures

    def task(self, recipe: Recipe, accelerator: Accelerator) -> dict[str, Any]:
        """Return what its worker is asked to make."""
        task: dict[str, Any] = {
            "framework": self.framework,
            "vocabulary_size": VOCABULARY_SIZE,
            "recipe": recipe.model_dump(mode="json"),
        }
        if self.implementation == "fit":
            return task | {"class": KERAS_FIT}
        task["recipe"]["implementation"] = self.implementation
        return task | {"class": BACKEND, "accelerator": accelerator}


def all_competitors(
    frameworks: Sequence[Framework], implementations: Sequence[str]
) -> list[Competitor]:
    """Return each implementation of each framework, and Keras' own `fit` if Keras is there."""
    competitors = [Competitor(f, i) for f in frameworks for i in implementations]
    if "keras" in frameworks:
        competitors.append(Competitor("keras", "fit"))
    return competitors


class Worker:
    """A process that measures when asked to; see `speed_worker.py`."""

    def __init__(self, python: Path, task: dict[str, Any], log: Path) -> None:
        """Start it; the first `answer` is its settings, once it is ready."""
        self.log = log
        self.task = task
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [python, "-m", "ptbench.measurement.speed_worker", json.dumps(task)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
            )  # fmt: skip

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def answer(self) -> Any:
        """Return the next answer.

        Raises:
            PtbenchError: if the process has ended.
        """
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            status = self.process.wait()
            said = self.log.read_text(errors="replace").strip().splitlines()[-1:]
            raise PtbenchError(
                f"the benchmark of {self.task['framework']} ended with status {status}: "
                f"{''.join(said)} (its output is in {self.log})"
            )
        return json.loads(line)

    def ask(self, **request: Any) -> Any:
        """Return the answer to a request."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self.answer()


@dataclass
class Result:
    """One competitor's speed on one model."""

    model: str
    competitor: Competitor
    settings: dict[str, str]
    tokens_per_second: list[float] = field(default_factory=list)  # by round
    bounds: list[float] = field(default_factory=list)  # of the products alone; none on GPUs
    peak_memory_bytes: int = 0

    @property
    def fraction_of_bound(self) -> float | None:
        """Median over rounds of speed / bound; None on GPUs."""
        if not self.bounds:
            return None
        pairs = zip(self.tokens_per_second, self.bounds, strict=True)
        return statistics.median(speed / bound for speed, bound in pairs)

    def row(self) -> dict[str, Any]:
        """Return its row of `speed.csv`."""
        rates = sorted(self.tokens_per_second)
        fraction = self.fraction_of_bound
        return {
            "model": self.model,
            "framework": self.competitor.framework,
            "implementation": self.competitor.implementation,
            "tokens_per_second": round(statistics.median(rates), 1),
            "lowest": round(rates[0], 1),
            "highest": round(rates[-1], 1),
            "fraction_of_bound": None if fraction is None else round(fraction, 3),
            "peak_memory_mb": round(self.peak_memory_bytes / 1e6),
            "rounds": len(rates),
        }

    def content(self) -> dict[str, Any]:
        """Return its part of `speed.json`."""
        return self.row() | {
            "tokens_per_second_by_round": self.tokens_per_second,
            "bound_by_round": self.bounds,
            "settings": self.settings,
        }


@dataclass(frozen=True)
class Benchmark:
    """How speeds are measured, and where."""

    environments: Path  # folder of the frameworks' environments
    accelerator: Accelerator
    threads: int  # CPU threads of each competitor
    rounds: int  # turns of each competitor
    seconds: float  # least length of a turn
    output: Path
    say: Callable[[str], None] = print

    def run(self, models: Sequence[str], competitors: Sequence[Competitor]) -> list[Result]:
        """Measure, and write `speed.csv` and `speed.json` into the output folder.

        Args:
            models: names in `MODELS`.

        Raises:
            PtbenchError: if an environment is missing or a framework fails.
        """
        self.check_environments(competitors)
        results: list[Result] = []
        for model in models:
            able = [each for each in competitors if each.can_train(MODELS[model])]
            for each in competitors:
                if each not in able:
                    self.say(f"{model}: without {each.label}, as Keras has no layer for mixtures")
            if able:
                results += self.measure(model, able)
        table = pd.DataFrame([result.row() for result in results])
        facts = {"accelerator": self.accelerator, "threads": self.threads}
        content = {
            "facts": provenance("numpy") | facts,
            "results": [result.content() for result in results],
        }
        write_atomically(self.output / "speed.csv", table.to_csv(index=False))
        text = json.dumps(content, indent=2, default=str) + "\n"
        write_atomically(self.output / "speed.json", text)
        return results

    def check_environments(self, competitors: Sequence[Competitor]) -> None:
        """Raise PtbenchError if an environment that is needed is missing."""
        needed = {str(competitor.framework) for competitor in competitors}
        if self.accelerator == "cpu":
            needed |= {framework for framework, _ in PRODUCTS.values()}
        for framework in sorted(needed):
            if not self.python(framework).exists():
                raise PtbenchError(
                    f"{self.environments} has no environment {framework}-{self.accelerator}: build "
                    f"it with `uv run ptbench environments {framework} --accelerator "
                    f"{self.accelerator} --output {self.environments}`"
                )

    def python(self, framework: str) -> Path:
        """Return the interpreter of a framework's environment."""
        return (self.environments / f"{framework}-{self.accelerator}" / PYTHON).absolute()

    def start(self, task: dict[str, Any], name: str) -> Worker:
        """Start a worker in the environment of its task's framework."""
        log = self.output / "logs" / f"{name}.log"
        return Worker(self.python(task["framework"]), {"threads": self.threads} | task, log)

    def measure(self, model: str, competitors: Sequence[Competitor]) -> list[Result]:
        """Measure all competitors on one model, taking turns."""
        recipe = MODELS[model]
        with ExitStack() as stack:
            measured: list[tuple[Worker, Result]] = []
            for each in competitors:
                name = f"{model}-{each.label.replace(' ', '-')}"
                task = each.task(recipe, self.accelerator)
                worker = stack.enter_context(self.start(task, name))
                # Waits for its answer, so that one at a time compiles.
                measured.append((worker, Result(model, each, worker.answer())))
            engines = self.start_products(stack, model) if self.accelerator == "cpu" else []
            for number in range(self.rounds):
                shift = number % len(measured)
                for worker, result in [*measured[shift:], *measured[:shift]]:
                    self.take_turn(worker, result)
                if engines:
                    limit = bound(recipe, VOCABULARY_SIZE, product_rates(recipe, engines))
                    for _, result in measured:
                        result.bounds.append(limit)
                self.say(f"{model}: round {number + 1} of {self.rounds} done")
        results = [result for _, result in measured]
        if engines:
            flops = flops_per_token(recipe, VOCABULARY_SIZE) / 1e6
            limit = statistics.median(results[0].bounds)
            self.say(
                f"{model}: {flops:.1f} MFLOP a token; the products alone allow {limit:,.0f} "
                "tokens/s"
            )
        return results

    def start_products(self, stack: ExitStack, model: str) -> list[Worker]:
        """Start the workers that multiply matrices."""
        engines = []
        for engine, (framework, name) in PRODUCTS.items():
            task = {"framework": framework, "class": name}
            engines.append(stack.enter_context(self.start(task, f"{model}-products-{engine}")))
            engines[-1].answer()
        return engines

    def take_turn(self, worker: Worker, result: Result) -> None:
        """Let one competitor train, and add its speed to its result."""
        answer = worker.ask(seconds=self.seconds)
        result.tokens_per_second.append(answer["tokens"] / answer["seconds"])
        result.peak_memory_bytes = answer["peak_memory_bytes"]
        if not 0 < answer["nll"] < 100:
            raise PtbenchError(
                f"{result.competitor.label} trained to a loss of {answer['nll']} nats per token"
            )


def product_rates(recipe: Recipe, engines: Sequence[Worker]) -> dict[Product, float]:
    """Return the speed of each product of a training step, by the fastest engine [FLOP/s]."""
    return {
        product: max(engine.ask(product=product, seconds=PRODUCT_SECONDS) for engine in engines)
        for product in training_products(recipe, VOCABULARY_SIZE)
    }


def show(results: Sequence[Result]) -> None:
    """Print the table."""
    table = Table("model", "framework", "implementation", "tokens/s", "lowest to highest",
                  "of bound", "peak memory", title="Medians over rounds")  # fmt: skip
    for result in results:
        row = result.row()
        fraction = result.fraction_of_bound
        table.add_row(
            row["model"], row["framework"], row["implementation"],
            f"{row['tokens_per_second']:,.0f}", f"{row['lowest']:,.0f} to {row['highest']:,.0f}",
            "" if fraction is None else f"{fraction:.2f}", f"{row['peak_memory_mb']:,} MB",
        )  # fmt: skip
    Console().print(table)
