"""What can be measured in a few minutes on a machine with one GPU, in PyTorch and JAX.

    PYTHONPATH=workflow python benchmarks/gpu.py --corpora results/corpora --output DIR

It needs a Python with torch, jax, pydantic, ruamel.yaml and what else `workflow/ptbench` imports,
and no environments of ours. Parts, each of which writes its files as soon as it has them:

- speed: training speed of stock, tuned, stock in bfloat16, and PyTorch's own example, beside what
  the GPU's float32 products allow (speed.csv, speed.json, limits.json);
- tests: the contract and parity tests on the GPU (tests.txt, tests.xml);
- runs: whole trainings on the corpus (cells/), several at a time. They give perplexities; their
  speeds are of a shared GPU, as their provenance says (`cells_at_once`).

A part that fails says so, and the others go on; the exit status is then 1.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy

from ptbench.backends import Framework
from ptbench.cli import positive
from ptbench.configuration.config import read_configuration
from ptbench.configuration.experiments import expand
from ptbench.configuration.specification import (
    Cell,
    Specification,
    code_digest,
    parse_cell_path,
)
from ptbench.configuration.study import load_study, resolve
from ptbench.measurement.benchmark import OWN, Benchmark, all_competitors, show
from ptbench.training.provenance import provenance

ROOT = Path(__file__).resolve().parents[1]
FRAMEWORKS: tuple[Framework, ...] = ("pytorch", "jax")
MODELS = ("small", "medium", "large", "mos", "bmlg", "awd-lstm")
PARTS = ("speed", "tests", "runs")


def arguments() -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--corpora", type=Path, help="folder of prepared corpora, for the runs")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--frameworks", nargs="+", choices=FRAMEWORKS, default=FRAMEWORKS)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--implementations", nargs="+", choices=OWN, default=list(OWN))
    parser.add_argument("--accelerator", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rounds", type=positive, default=5, help="turns of each competitor")
    parser.add_argument("--seconds", type=float, default=0.5, help="least length of a turn")
    parser.add_argument(
        "--cells", nargs="*", metavar="VARIANT/FRAMEWORK/SEEDS",
        default=["zaremba-small/pytorch/1,2,3", "zaremba-small/jax/1,2,3"],
        help="what is trained, such as zaremba-medium/jax/1",
    )  # fmt: skip
    parser.add_argument(
        "--experiments", nargs="*", default=[], help="whose runs are trained, with the cells"
    )
    parser.add_argument("--at-once", type=int, default=3, help="runs at a time")
    parser.add_argument("--budget", default="full", help="of the runs; see config.yaml")
    parser.add_argument("--select", default="", help="pytest's -k")
    return parser.parse_args()


def measure_speed(asked: argparse.Namespace) -> None:
    """Measure training speeds, each competitor alone on the GPU.

    Raises:
        RuntimeError: naming each competitor that fails.
    """
    benchmark = Benchmark(
        environments=ROOT, accelerator=asked.accelerator, threads=2, rounds=asked.rounds,
        seconds=asked.seconds, output=asked.output, interpreter=Path(sys.executable),
    )  # fmt: skip
    show(benchmark.run(asked.models, all_competitors(asked.frameworks, asked.implementations)))
    if benchmark.failures:
        raise RuntimeError("; ".join(benchmark.failures))


def run_tests(asked: argparse.Namespace) -> None:
    """Run the contract and parity tests, a process for each framework.

    Raises:
        RuntimeError: if one fails.
    """
    command = [
        sys.executable, "-m", "pytest", "-q", "tests/contract", "tests/parity",
        f"--numprocesses={len(asked.frameworks) + 1}", "-p", "no:cacheprovider",
        f"--accelerator={asked.accelerator}", f"--python={sys.executable}",
        f"--junit-xml={asked.output / 'tests.xml'}",
        f"--basetemp={asked.output / 'attempts' / 'tests'}", "-k", asked.select,
        *(f"--framework={framework}" for framework in asked.frameworks),
    ]  # fmt: skip
    with (asked.output / "tests.txt").open("w") as log:
        done = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=False)
    print("".join((asked.output / "tests.txt").read_text().splitlines(keepends=True)[-12:]))
    if done.returncode:
        raise RuntimeError(f"pytest ended with status {done.returncode}")


def train(asked: argparse.Namespace, specification: Specification, cell: Cell) -> None:
    """Train one cell, as the workflow does.

    Raises:
        RuntimeError: if it fails.
    """
    output = asked.output / "cells" / cell.path
    work = asked.output / "attempts" / cell.path
    command = [
        sys.executable, "-m", "ptbench", "train", "--cell", cell.path,
        "--specification", specification.text(),
        "--corpus", asked.corpora / specification.recipe.corpus_folder,
        "--output", output, "--checkpoints", work / "checkpoints", "--attempts", work,
        "--keep-checkpoints", "none", "--threads", "2", "--log", work / "log",
    ]  # fmt: skip
    start = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=False)
    if done.returncode:
        log = work / "log"
        said = log.read_text(errors="replace").strip().splitlines()[-1:] if log.exists() else []
        raise RuntimeError(f"{cell.path} failed: {''.join(said)}")
    metrics = json.loads((output / "metrics.json").read_text())
    said = f"test perplexity {metrics['test']['perplexity']:.2f}" if metrics["test"] else "no score"
    seconds = time.perf_counter() - start
    print(f"{cell.path}: {metrics['status']}, {said}, {seconds:.0f} s", flush=True)


def train_all(asked: argparse.Namespace) -> None:
    """Train all cells that were asked for.

    Raises:
        RuntimeError: naming each that fails.
    """
    if asked.corpora is None:
        raise RuntimeError("--corpora says where the prepared corpora are")
    config = read_configuration([ROOT / "config.yaml"])
    config |= {"accelerator": asked.accelerator, "budget": asked.budget}
    study = load_study(
        config | {"experiments": asked.experiments, "frameworks": list(asked.frameworks)}
        if asked.experiments
        else config
    )
    planned = study.experiments.values() if asked.experiments else ()
    with concurrent.futures.ThreadPoolExecutor(asked.at_once) as pool:
        jobs = [
            pool.submit(train, asked, study.specification(cell.variant), cell)
            for cell in dict.fromkeys(cell for each in planned for cell in each.cells)
        ]
        for each in asked.cells:
            variant, framework, seeds = each.split("/")
            for recipe, values in expand(variant, "--cells"):
                specification = resolve(
                    recipe, values, study.recipes, study.corpora, study.config, "--cells"
                )
                for seed in seeds.split(","):
                    where = f"{specification.variant}/{framework}/devices-1/seed-{seed}"
                    jobs.append(pool.submit(train, asked, specification, parse_cell_path(where)))
    failures = [str(job.exception()) for job in jobs if job.exception()]
    if failures:
        raise RuntimeError("; ".join(failures))


PART: dict[str, Callable[[argparse.Namespace], None]] = {
    "speed": measure_speed, "tests": run_tests, "runs": train_all
}  # fmt: skip


def main() -> None:
    """Do the parts that were asked for, speed first and alone, the others at once."""
    asked = arguments()
    # relative to the project, as its commands are, so that their records name no folder above it
    asked.output = Path(os.path.relpath(asked.output, ROOT))
    asked.corpora = asked.corpora and Path(os.path.relpath(asked.corpora, ROOT))
    os.chdir(ROOT)
    asked.output.mkdir(parents=True, exist_ok=True)
    # one process must not take three quarters of the GPU from the others, as JAX does
    os.environ |= {"PYTHONPATH": str(ROOT / "workflow"), "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    facts = provenance(numpy.__name__) | {"training_code": code_digest()}
    (asked.output / "machine.json").write_text(json.dumps(facts, indent=2) + "\n")
    failures = []

    def attempt(part: str) -> None:
        start = time.perf_counter()
        try:
            PART[part](asked)
            said = "done"
        except Exception as error:
            failures.append(part)
            said = f"failed: {error}"
        print(f"{part}: {said}, {time.perf_counter() - start:.0f} s", flush=True)

    if "speed" in asked.parts:
        attempt("speed")
    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(attempt, [part for part in PARTS[1:] if part in asked.parts]))
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
