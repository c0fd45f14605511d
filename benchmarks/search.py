"""Do samplers that learn find better recipes than chance: `uv run python benchmarks/search.py`.

Searches the recipe of a small LSTM on the synthetic corpus with each method, over seeds. Trials are
trained for an epoch by the float64 oracle, in this process, because a framework takes longer to
start than they do. Compares the best validation nll after equal trials, and after equal time (the
least that any search of any method took), by a two-sided Mann-Whitney test against random. All
searches of a seed train from the same initial values.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from scipy.stats import mannwhitneyu

from ptbench.analysis.search import Trial, import_torch_from, next_points
from ptbench.backends import ORACLE, create
from ptbench.backends.base import Setup
from ptbench.configuration.experiments import Dimension
from ptbench.configuration.search import Point, Question, Space, draw_points
from ptbench.configuration.study import load_study
from ptbench.corpus.prepare import prepare
from ptbench.corpus.store import open_corpus
from ptbench.training.cell import feed
from ptbench.training.clocks import Clocks
from ptbench.training.loop import train

ROOT = Path(__file__).parents[1]
GENERATION = 4
DIMENSIONS = {
    "hidden_size": Dimension(low=4, high=24, log=True),
    "embedding_size": Dimension(same_as="hidden_size"),
    "learning_rate": Dimension(low=0.05, high=20.0, log=True),
    "clip_norm": Dimension(low=0.2, high=20.0, log=True),
    "batch_size": Dimension(low=10, high=60, step=10),
    "initialization_scale": Dimension(low=0.01, high=0.5, log=True),
    "dropout": Dimension(low=0.0, high=0.5),
}


def space() -> Space:
    """Return what is searched: of the demo's recipe, one epoch."""
    study = load_study({"experiments": ["demo"]})
    specification = study.specification("demo-lstm")
    return Space(
        recipe=specification.recipe,
        dimensions=DIMENSIONS,
        constraint=None,
        short={"epochs": 1, "constant_epochs": 1},
        corpus_definition=specification.corpus_definition,
        accelerator="cpu",
        devices=[1],
    )


def run_trial(searched: Space, corpus_folder: Path, seed: int, number: int, point: Point) -> Trial:
    """Train one trial."""
    began = time.process_time()
    recipe = searched.specification("trial", point, short=True).recipe
    corpus = open_corpus(corpus_folder, recipe.source)
    backend = create(ORACLE, Setup(recipe, corpus.vocabulary_size, 1, seed, "cpu", 1))
    run = train(backend, feed(corpus, recipe, 1), Clocks(), lambda _: None)
    nll = None if run.diverged or run.best is None else run.best.valid_nll
    return Trial(
        number=number, variant="trial", cell="", point=point, nll=nll,
        state="diverged" if nll is None else "ok", seconds=time.process_time() - began,
    )  # fmt: skip


def search(
    method_and_seed: tuple[str, int], searched: Space, corpus_folder: Path, trials: int
) -> list[Trial]:
    """Run one search."""
    method, seed = method_and_seed
    if method == "gp":
        import_torch_from(ROOT / "results/environments/pytorch-cpu")
    run = partial(run_trial, searched, corpus_folder, seed)
    done: list[Trial] = []
    if method == "random":
        for number, point in enumerate(draw_points(searched, trials, seed, "benchmark"), start=1):
            done.append(run(number, point))
        return done
    while len(done) < trials:
        count = min(GENERATION, trials - len(done))
        question = Question(
            space=searched, method=method, seed=seed, generation=len(done) // GENERATION + 1,
            variants=["trial"] * count, told={}, files=[],
        )  # fmt: skip
        for point in next_points(question, done):
            done.append(run(len(done) + 1, point))
    return done


def best(trials: list[Trial], seconds: float = math.inf) -> float:
    """Return the lowest nll of the trials that end within so many seconds of processor time."""
    spent, lowest = 0.0, math.inf
    for trial in trials:
        spent += trial.seconds or 0.0
        if spent > seconds:
            break
        lowest = min(lowest, math.inf if trial.nll is None else trial.nll)
    return lowest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", default=["random", "tpe"])
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path, help="JSON of all trials")
    asked = parser.parse_args()
    searched = space()
    jobs = [(method, seed) for seed in range(1, asked.seeds + 1) for method in asked.methods]
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "synthetic"
        asked_for = load_study({"experiments": ["demo"]}).corpus("synthetic")
        prepare(*asked_for, Path(folder), corpus)
        work = partial(search, searched=searched, corpus_folder=corpus, trials=asked.trials)
        with ProcessPoolExecutor(asked.processes) as pool:
            found = dict(zip(jobs, pool.map(work, jobs), strict=True))
    shortest = min(sum(trial.seconds or 0.0 for trial in each) for each in found.values())
    print(
        f"{asked.trials} trials, {asked.seeds} seeds; equal time: {shortest:.0f} s of a processor"
    )
    for title, seconds in (("equal trials", math.inf), ("equal time", shortest)):
        values = {
            method: [best(found[method, seed], seconds) for seed in range(1, asked.seeds + 1)]
            for method in asked.methods
        }
        for method, own in values.items():
            text = f"{title}: {method}: best nll, median {median(own):.4f}, "
            text += f"{min(own):.4f} to {max(own):.4f}"
            if method != "random" and "random" in values:
                test = mannwhitneyu(own, values["random"])
                text += (
                    f"; Mann-Whitney against random: U {test.statistic:.0f}, p {test.pvalue:.2g}"
                )
            print(text)
    if asked.output:
        content: dict[str, Any] = {
            f"{method} {seed}": [trial.model_dump(mode="json") for trial in trials]
            for (method, seed), trials in found.items()
        }
        asked.output.write_text(json.dumps(content))


if __name__ == "__main__":
    main()
