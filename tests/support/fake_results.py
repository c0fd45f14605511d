"""Results folders drawn from a known law, written through the records' own models.

The test nll of a seed is that of its framework plus normal noise, and the other splits' lie near
it. Histories fall towards the validation nll as a run's would. Nothing here is measured.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ptbench.analysis.plan import ExperimentPlan
from ptbench.backends import FRAMEWORKS
from ptbench.configuration.specification import PROTOCOL, Cell
from ptbench.files import write_atomically
from ptbench.training.records import (
    Epoch,
    Metrics,
    Score,
    Seconds,
    history_csv,
    score,
)

TOKENS = 10_000


def plan(
    name: str = "demo",
    variants: Sequence[str] = ("tiny",),
    frameworks: Sequence[str] = FRAMEWORKS,
    devices: Sequence[int] = (1,),
    seeds: Sequence[int] = (1, 2, 3),
    **settings: Any,
) -> ExperimentPlan:
    """Return a plan of every combination."""
    cells = tuple(
        Cell(variant=variant, framework=framework, devices=count, seed=seed)
        for variant in variants
        for count in devices
        for framework in frameworks
        for seed in seeds
    )
    defaults: dict[str, Any] = {"corpus_folder": "synthetic", "equivalence_margin": 0.02}
    title = f"The {name} experiment"
    return ExperimentPlan(**{"name": name, "title": title, "cells": cells, **defaults, **settings})


def score_of(nll: float, tokens: int = TOKENS) -> Score:
    return score(nll * tokens, tokens)


def metrics(cell: Cell, test_nll: float, **changes: Any) -> Metrics:
    """Metrics of a run with this test nll, and validation and training nll near it."""
    fields: dict[str, Any] = {
        "protocol": PROTOCOL,
        "fingerprint": "0123456789ab",
        "cell": cell,
        "status": "ok",
        "parameters": 4_651_600,
        "vocabulary_size": 10_000,
        "steps_per_epoch": 2324,
        "epochs": 13,
        "best_epoch": 12,
        "train": score_of(test_nll - 0.8),
        "valid": score_of(test_nll + 0.05),
        "test": score_of(test_nll),
        "tokens_per_second": 10_000.0,
        "seconds_per_epoch": 93.0,
        "seconds": Seconds(
            load=0.4,
            start_up=4.0,
            compile=2.5,
            training=1200.0,
            validation=72.0,
            test=8.0,
            checkpointing=1.5,
            total=1290.0,
        ),
        "peak_memory_bytes": 820_000_000,
        "peak_device_memory_bytes": None,
    }
    return Metrics(**{**fields, **changes})


def history(result: Metrics) -> list[Epoch]:
    """Epochs that fall to the result's validation nll, and stay there from the best on."""
    assert result.valid is not None
    assert result.tokens_per_second is not None
    rows, best = [], result.best_epoch or result.epochs
    for epoch in range(1, result.epochs + 1):
        above = 0.0 if epoch >= best else 1.2 * (math.exp(-0.45 * epoch) - math.exp(-0.45 * best))
        nll = result.valid.nll + above
        rows.append(
            Epoch(
                epoch=epoch,
                learning_rate=0.5 ** max(0, epoch - 4),
                train_nll=nll - 0.02 * epoch,
                train_perplexity=math.exp(nll - 0.02 * epoch),
                valid_nll=nll,
                valid_perplexity=math.exp(nll),
                gradient_norm=12.0,
                tokens_per_second=result.tokens_per_second,
                training_seconds=90.0,
                validation_seconds=3.0,
            )
        )
    return rows


def write_cell(results: Path, result: Metrics, epochs: Sequence[Epoch] | None = None) -> None:
    """All four files of a cell."""
    folder = results / "cells" / result.cell.path
    rows = history(result) if epochs is None else epochs
    write_atomically(folder / "history.csv", history_csv(rows))
    write_atomically(
        folder / "provenance.json",
        json.dumps(
            {
                "git_commit": "0123456789abcdef0123456789abcdef01234567",
                "git_dirty": False,
                "framework_version": "1.2.3",
                "cpu": "Example CPU",
                "cells_at_once": 1,
                "gpus": [],
                "started": "2030-01-01T12:00:00+00:00",
                "finished": "2030-01-01T12:21:30+00:00",
            }
        ),
    )
    write_atomically(folder / "recipe.yaml", "corpus: synthetic\n")
    write_atomically(folder / "metrics.json", result.model_dump_json(indent=1))


def write_unknown(results: Path) -> None:
    """Say of no run whether it had its machine to itself."""
    for path in results.glob("cells/**/provenance.json"):
        content = json.loads(path.read_text())
        write_atomically(path, json.dumps(content | {"cells_at_once": None}))


def write_diverged(results: Path, cell: Cell, epochs: int = 0, **changes: Any) -> None:
    """A run whose loss left the recipe's limit after so many whole epochs."""
    result = metrics(
        cell,
        5.0,
        status="diverged",
        reason=f"the training perplexity of epoch {epochs + 1} is 2.1e+07, above 1e+06",
        epochs=epochs,
        best_epoch=None,
        **changes,
    )
    write_cell(
        results,
        result.model_copy(update={"train": None, "valid": None, "test": None}),
        history(result),
    )


def write_corpus(results: Path, folder: str = "synthetic", **facts: Any) -> None:
    write_atomically(results / "corpora" / folder / "corpus.json", json.dumps(facts))


def write_results(
    results: Path,
    experiment: ExperimentPlan,
    nll: float | Mapping[str, float] = 4.75,
    noise: float = 0.004,
    speed: Mapping[str, float] | None = None,
    seed: int = 0,
) -> None:
    """Every planned cell: test nll normal about its framework's with standard deviation `noise`."""
    random = np.random.default_rng(seed)
    for cell in experiment.cells:
        centre = nll if isinstance(nll, float) else nll[cell.framework]
        rate = (speed or {}).get(cell.framework, 10_000.0) * cell.devices**0.8
        rate *= float(random.lognormal(0, 0.03))
        training = 13 * 929_589 / rate
        load, start, build = 0.4, float(random.uniform(2, 8)), float(random.uniform(1, 9))
        evaluation = 0.09 * training
        write_cell(
            results,
            metrics(
                cell,
                float(random.normal(centre, noise)),
                tokens_per_second=rate,
                best_epoch=int(random.integers(11, 14)),
                seconds=Seconds(
                    load=load,
                    start_up=start,
                    compile=build,
                    training=training,
                    validation=evaluation,
                    test=7.5,
                    checkpointing=1.5,
                    total=load + start + build + training + evaluation + 10.5,
                ),
                peak_memory_bytes=int(random.uniform(5e8, 1.6e9)),
            ),
        )
