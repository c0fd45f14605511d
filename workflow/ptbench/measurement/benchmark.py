"""Training speed of every framework, side by side, and as a share of what the machine allows.

All competitors run in the same minutes: in each round every competitor, and every matrix product,
has a turn while the others wait, in an order that rotates. As the machine's speed drifts, the share
of the bound is taken within each round. Printed are medians over the rounds.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ptbench.backends import Framework
from ptbench.configuration.experiments import load_library
from ptbench.environments import PYTHON
from ptbench.errors import PtbenchError
from ptbench.files import write_atomically
from ptbench.measurement.competitors import MODELS, OWN
from ptbench.model.recipe import Accelerator, Recipe
from ptbench.model.work import Product, bound, flops_per_token, training_products
from ptbench.training.hardware import Gpus
from ptbench.training.provenance import provenance

VOCABULARY_SIZE = 10_000  # PTB's
# For each shape and round; a GPU's clock drifts less.
PRODUCT_SECONDS: dict[Accelerator, float] = {"cpu": 0.15, "cuda": 0.03}
START_SECONDS = 10  # that a competitor takes beside its turns, about
# The product classes, and the frameworks in whose environments they run.
PRODUCTS = {
    "NumPy": ("jax", "ptbench.measurement.products:NumPyProducts"),
    "PyTorch": ("pytorch", "ptbench.measurement.products:PyTorchProducts"),
}
BACKEND = "ptbench.measurement.backend_speed:BackendSpeed"
# What users of a framework write without us: its name, and the class that measures it.
PEERS = {
    "keras": ("fit", "ptbench.measurement.keras_fit:KerasFit"),
    "pytorch": ("example", "ptbench.measurement.pytorch_example:PyTorchExample"),
}


@dataclass(frozen=True)
class Competitor:
    """Something whose training speed is measured."""

    framework: Framework
    implementation: str  # a key of `OWN`, or a peer's name

    @property
    def label(self) -> str:
        """Its name in messages."""
        return f"{self.framework} {self.implementation}"

    def can_train(self, recipe: Recipe) -> bool:
        """Return whether it has the model: peers have LSTMs of one width alone."""
        is_plain = not recipe.mixtures and not recipe.tie_weights
        return is_plain or self.implementation in OWN

    def task(self, recipe: Recipe, accelerator: Accelerator) -> dict[str, Any]:
        """Return what its worker is asked to make."""
        task: dict[str, Any] = {
            "framework": self.framework,
            "vocabulary_size": VOCABULARY_SIZE,
            "recipe": recipe.model_dump(mode="json"),
            "accelerator": accelerator,
        }
        name, peer = PEERS.get(self.framework, ("", ""))
        if self.implementation == name:
            return task | {"class": peer}
        task["recipe"] |= OWN[self.implementation]
        return task | {"class": BACKEND}


def all_competitors(
    frameworks: Sequence[Framework], implementations: Sequence[str]
) -> list[Competitor]:
    """Return each implementation of each framework, and the peers of those that have one."""
    competitors = [Competitor(f, i) for f in frameworks for i in implementations]
    return competitors + [Competitor(f, PEERS[f][0]) for f in frameworks if f in PEERS]


class Worker:
    """A process that measures when asked to; see `speed_worker.py`."""

    def __init__(self, python: Path, task: dict[str, Any], log: Path) -> None:
        """Start it."""
        self.log = log
        self.task = task
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [python, "-m", "ptbench.measurement.speed_worker", json.dumps(task)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                env=os.environ
                | {
                    "PYTHONPATH": str(Path(__file__).parents[2]),
                    # JAX would take three quarters of a GPU that all share
                    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
                },
            )  # fmt: skip

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What it says of itself once it is ready, its first answer."""
        return dict(self.answer())

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
        with contextlib.suppress(BrokenPipeError):  # it has ended, as `answer` will say
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        return self.answer()


@dataclass
class Result:
    """One competitor's speed on one model."""

    model: str
    competitor: Competitor
    settings: dict[str, str] = field(default_factory=dict)
    tokens_per_second: list[float] = field(default_factory=list)  # by round
    bounds: list[float] = field(default_factory=list)  # of the products alone
    joules_per_token: list[float] = field(default_factory=list)  # of the GPU, where it says so
    peak_memory_bytes: int = 0

    @property
    def fraction_of_bound(self) -> float:
        """Median over rounds of speed / bound."""
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
            "fraction_of_bound": round(fraction, 3),
            "peak_memory_mb": round(self.peak_memory_bytes / 1e6),
            "millijoules_per_token": round(statistics.median(self.joules_per_token) * 1e3, 3)
            if self.joules_per_token
            else None,
            "rounds": len(rates),
        }

    def content(self) -> dict[str, Any]:
        """Return its part of `speed.json`."""
        return self.row() | {
            "tokens_per_second_by_round": self.tokens_per_second,
            "bound_by_round": self.bounds,
            "joules_per_token_by_round": self.joules_per_token,
            "settings": self.settings,
        }


Entry = tuple[Worker, Result]


def take_settings(worker: Worker, result: Result) -> None:
    """Wait until a worker is ready, and note its settings."""
    result.settings = worker.settings


@dataclass
class Contest:
    """One model, and those who train it."""

    model: str
    recipe: Recipe
    entries: list[Entry] = field(default_factory=list)


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
    interpreter: Path | None = None  # one Python with all frameworks, in place of environments
    failures: list[str] = field(default_factory=list)  # a sentence for each competitor that failed

    @cached_property
    def gpus(self) -> Gpus:
        """The GPU that is measured, which counts its energy; none on CPUs."""
        return Gpus(1 if self.accelerator == "cuda" else 0)

    def run(self, models: Sequence[str], competitors: Sequence[Competitor]) -> list[Result]:
        """Measure, and write `speed.csv` and `speed.json` into the output folder.

        The files are written anew after each model. A competitor that fails is left out.

        Args:
            models: names in `MODELS`.

        Raises:
            PtbenchError: if an environment is missing.
        """
        self.check_environments(competitors)
        self.say(self.outline(models, competitors))
        results: list[Result] = []
        # A GPU's machine has cores enough to start everything at once.
        groups = [[model] for model in models] if self.accelerator == "cpu" else [models]
        for group in groups:
            with ExitStack() as stack:
                engines = self.start_products(stack)
                contests = [self.start_contest(stack, model, competitors) for model in group]
                for contest in contests:
                    for entry in list(contest.entries):
                        self.try_with(contest, entry, take_settings)
                for contest in contests:
                    if contest.entries:
                        results += self.measure(contest, engines)
                        self.write(results)
        return results

    def outline(self, models: Sequence[str], competitors: Sequence[Competitor]) -> str:
        """Say what is measured, and about how long it takes."""
        recipes = [load_library().recipes[MODELS[model]] for model in models]
        entries = sum(each.can_train(recipe) for recipe in recipes for each in competitors)
        seconds = entries * (self.rounds * self.seconds + START_SECONDS)
        return (
            f"Models: {', '.join(models)}. On each in turn: "
            f"{', '.join(each.label for each in competitors)}. Rounds: {self.rounds}, with "
            f"{self.seconds:g} s for each. This takes about {max(seconds / 60, 1):.0f} min."
        )

    def write(self, results: Sequence[Result]) -> None:
        """Write what has been measured so far."""
        rows, table = [result.row() for result in results], io.StringIO()
        writer = csv.DictWriter(table, [*rows[0]] if rows else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        facts = {"accelerator": self.accelerator, "threads": self.threads}
        content = {
            "facts": provenance("numpy") | facts,
            "results": [result.content() for result in results],
        }
        write_atomically(self.output / "speed.csv", table.getvalue())
        text = json.dumps(content, indent=2, default=str) + "\n"
        write_atomically(self.output / "speed.json", text)

    def check_environments(self, competitors: Sequence[Competitor]) -> None:
        """Raise PtbenchError if an environment that is needed is missing."""
        needed = {str(competitor.framework) for competitor in competitors}
        needed |= {framework for framework, _ in self.engines().values()}
        for framework in sorted(needed):
            if not self.python(framework).exists():
                raise PtbenchError(
                    f"{self.environments} has no environment {framework}-{self.accelerator}: build "
                    f"it with `uv run ptbench environments {framework} --accelerator "
                    f"{self.accelerator} --output {self.environments}`"
                )

    def engines(self) -> dict[str, tuple[str, str]]:
        """Return what multiplies matrices here; see `PRODUCTS`."""
        return PRODUCTS if self.accelerator == "cpu" else {"PyTorch": PRODUCTS["PyTorch"]}

    def python(self, framework: str) -> Path:
        """Return the interpreter of a framework's environment."""
        folder = self.environments / f"{framework}-{self.accelerator}"
        return self.interpreter or (folder / PYTHON).absolute()

    def start(self, task: dict[str, Any], name: str) -> Worker:
        """Start a worker in the environment of its task's framework."""
        log = self.output / "logs" / f"{name}.log"
        return Worker(self.python(task["framework"]), {"threads": self.threads} | task, log)

    def start_products(self, stack: ExitStack) -> list[Worker]:
        """Start the workers that multiply matrices."""
        engines = []
        for engine, (framework, name) in self.engines().items():
            task = {"framework": framework, "class": name, "accelerator": self.accelerator}
            engines.append(stack.enter_context(self.start(task, f"products-{engine}")))
            if limits := engines[-1].settings:
                write_atomically(self.output / "limits.json", json.dumps(limits, indent=2) + "\n")
        return engines

    def start_contest(
        self, stack: ExitStack, model: str, competitors: Sequence[Competitor]
    ) -> Contest:
        """Start a worker for every competitor that can train the model."""
        contest = Contest(model, load_library().recipes[MODELS[model]])
        for each in competitors:
            if not each.can_train(contest.recipe):
                self.say(f"{model}: without {each.label}, which has no such model")
                continue
            name = f"{model}-{each.label.replace(' ', '-')}"
            task = each.task(contest.recipe, self.accelerator)
            worker = stack.enter_context(self.start(task, name))
            contest.entries.append((worker, Result(model, each)))
            if self.accelerator == "cpu":  # one at a time compiles
                self.try_with(contest, contest.entries[-1], take_settings)
        return contest

    def measure(self, contest: Contest, engines: Sequence[Worker]) -> list[Result]:
        """Measure all competitors on one model, taking turns."""
        model, recipe = contest.model, contest.recipe
        for number in range(self.rounds):
            shift = number % max(len(contest.entries), 1)
            for entry in [*contest.entries[shift:], *contest.entries[:shift]]:
                self.try_with(contest, entry, self.take_turn)
            if not contest.entries:
                return []
            rates = product_rates(recipe, engines, PRODUCT_SECONDS[self.accelerator])
            limit = bound(recipe, VOCABULARY_SIZE, rates)
            for _, result in contest.entries:
                result.bounds.append(limit)
            self.say(f"{model}: round {number + 1} of {self.rounds} done")
        flops = flops_per_token(recipe, VOCABULARY_SIZE) / 1e6
        self.say(
            f"{model}: {flops:.1f} MFLOP a token; the products alone allow {limit:,.0f} tokens/s"
        )
        return [result for _, result in contest.entries]

    def try_with(
        self, contest: Contest, entry: Entry, act: Callable[[Worker, Result], None]
    ) -> None:
        """Act on a worker and its result; if that fails, the competitor leaves the contest."""
        try:
            act(*entry)
        except PtbenchError as error:
            contest.entries.remove(entry)
            self.failures.append(f"{contest.model}: {error}")
            self.say(f"{contest.model}: {error}")

    def take_turn(self, worker: Worker, result: Result) -> None:
        """Let one competitor train, and add its speed to its result."""
        before = self.gpus.joules()
        answer = worker.ask(seconds=self.seconds)
        if before is not None and (after := self.gpus.joules()) is not None:
            result.joules_per_token.append((after - before) / answer["tokens"])
        result.tokens_per_second.append(answer["tokens"] / answer["seconds"])
        result.peak_memory_bytes = answer["peak_memory_bytes"]
        if not 0 < answer["nll"] < 100:
            raise PtbenchError(
                f"{result.competitor.label} trained to a loss of {answer['nll']} nats per token"
            )


def product_rates(
    recipe: Recipe, engines: Sequence[Worker], seconds: float
) -> dict[Product, float]:
    """Return the speed of each product of a training step, by the fastest engine [FLOP/s]."""
    return {
        product: max(engine.ask(product=product, seconds=seconds) for engine in engines)
        for product in training_products(recipe, VOCABULARY_SIZE)
    }


def show(results: Sequence[Result]) -> None:
    """Print the table."""
    table = Table("model", "framework", "implementation", "tokens/s", "lowest to highest",
                  "of bound", "peak memory", title="Medians over rounds")  # fmt: skip
    for result in results:
        row = result.row()
        table.add_row(
            row["model"], row["framework"], row["implementation"],
            f"{row['tokens_per_second']:,.0f}", f"{row['lowest']:,.0f} to {row['highest']:,.0f}",
            f"{result.fraction_of_bound:.2f}", f"{row['peak_memory_mb']:,} MB",
        )  # fmt: skip
    Console(width=None if sys.stdout.isatty() else 120).print(table)
