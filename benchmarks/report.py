"""What the report on a whole study costs: `uv run python benchmarks/report.py`.

Draws the results of every run of slurm/reproduction.yaml (`drawn_study.py`), and runs the commands
that the workflow's rules run: `analyse` for each experiment, `answer` for each document, `report`.
Prints their processor time, which a busy machine does not stretch much, their largest memory, and
the sizes of the pages. Ends with status 1 if one is above its budget.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from drawn_study import Law, plant_all, write

from ptbench.configuration.config import read_configuration
from ptbench.configuration.study import Study, load_study

ROOT = Path(__file__).parents[1]
SECONDS = 90.0  # of processor time, for everything
MEGABYTES = 1000.0  # of memory, for each process
PAGE = 2.0e6  # bytes
INDEX = 300e3


def run(words: Sequence[str | Path]) -> tuple[float, float]:
    """Return the processor time [s] and the peak memory [MB] of a command of ptbench."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "workflow")}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # it doubles the time of imports
    process = subprocess.Popen(
        [sys.executable, "-m", "ptbench", *map(str, words)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        env=environment,
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(map(str, words))[:200]} failed")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def make(study: Study, results: Path) -> dict[str, list[tuple[float, float]]]:
    """Run every command on drawn results; return what each of them took."""
    site, experiments, papers = results / "report", results / "experiments", results / "papers"
    folders = ["--results", results, "--report", site]
    took: dict[str, list[tuple[float, float]]] = {"analyse": [], "answer": [], "report": []}
    for name in study.experiments:
        words = ["analyse", "--plan", study.plan(name), "--output", experiments / name, *folders]
        took["analyse"].append(run(words))
    for paper, names in study.papers.items():
        words = ["answer", *(experiments / name for name in names), "--output", papers / paper]
        words += ["--paper", ROOT / "workflow" / "papers" / paper, *folders]
        took["answer"].append(run(words))
    words = ["report", *(experiments / name for name in study.experiments), *folders]
    took["report"].append(run([*words, "--documents", *(papers / paper for paper in study.papers)]))
    return took


def within(results: Path, took: dict[str, list[tuple[float, float]]]) -> bool:
    """Print times, memory and sizes; return whether all are within their budgets."""
    good = True

    def line(words: str, value: float, budget: float, unit: str) -> None:
        nonlocal good
        good &= value <= budget
        above = "" if value <= budget else "  ABOVE"
        print(f"{words:44} {value:8.1f} {unit} of {budget:.0f}{above}")

    for name, each in took.items():
        print(f"{name}: {len(each)} processes, {sum(seconds for seconds, _ in each):.1f} s")
    everything = [each for found in took.values() for each in found]
    line("processor time", sum(seconds for seconds, _ in everything), SECONDS, "s")
    line("largest memory", max(memory for _, memory in everything), MEGABYTES, "MB")
    site = results / "report"
    line("index.html", (site / "index.html").stat().st_size / 1e3, INDEX / 1e3, "kB")
    pages = sorted(site.rglob("*.html"), key=lambda page: page.stat().st_size, reverse=True)
    for page in pages[:5]:
        line(str(page.relative_to(site)), page.stat().st_size / 1e6, PAGE / 1e6, "MB")
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", type=Path, help="new folder to leave the results in")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    study = load_study(read_configuration([ROOT / "slurm" / "reproduction.yaml"]))
    with tempfile.TemporaryDirectory() as temporary:
        results = arguments.keep or Path(temporary) / "results"
        if arguments.keep and arguments.keep.exists():
            parser.error(f"{arguments.keep} is there; name a new folder")
        law = Law(np.random.default_rng(arguments.seed))
        plant_all(law)
        print(f"{write(study, law, results)} runs", flush=True)
        sys.exit(not within(results, make(study, results)))


if __name__ == "__main__":
    main()
