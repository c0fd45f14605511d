"""What a cell's job asks a cluster for, from what runs like it have used.

A run is like it that differs by seed alone, or that is the same in the budget `smoke`. Where there
is none, the bounds of `model/work.py` remain. The Snakefile asks for thousands of cells at once, so
results are read as plain JSON, and nothing here imports NumPy.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ptbench.model.recipe import Recipe
from ptbench.model.work import START_UP, CorpusSize


class Margin(NamedTuple):
    """How many times as much is asked for as was used."""

    memory: float
    time: float


# Seeds of a row on one kind of machine differ by a few percent. Nodes differ more, and so do the
# means of three steps and of a whole run, before which nobody knows how many epochs there will be.
SEEDS = Margin(memory=1.25, time=1.5)
SMOKE = Margin(memory=1.5, time=2.0)


class Used(NamedTuple):
    """What a finished run used."""

    memory_bytes: int
    epochs: int
    tokens_per_second: float
    tokens: Mapping[str, int]  # predicted in a pass, of train, valid and test
    seconds: Mapping[str, float]  # by clock, as in metrics.json

    def run_seconds(self, epochs: int) -> float:
        """Return what a run of so many epochs takes if each takes as long as these did [s]."""
        each = self.seconds["training"] + self.seconds["validation"]
        return self.seconds["total"] + each * (epochs / self.epochs - 1)

    def scaled_seconds(self, epochs: int, size: CorpusSize, ratio: float = 1.0) -> float:
        """Return the same on a whole corpus, by the tokens of each split [s].

        Args:
            epochs: of the run to estimate.
            size: of its corpus.
            ratio: operations that its products take for a token, over those of this run.
        """
        of = self.seconds
        train = ratio * size.tokens["train"] / self.tokens_per_second
        test = of["test"] + of["accuracy"]
        rest = of["total"] - of["training"] - of["validation"] - test
        valid = ratio * of["validation"] * size.tokens["valid"] / self.tokens["valid"]
        test *= ratio * size.tokens["test"] / self.tokens["test"]
        return max(rest, 0.0) + epochs * (train + valid / self.epochs) + test


def used_by(folder: Path, fingerprint: str) -> Iterator[Used]:
    """Yield what the runs of a row used that ended well.

    Args:
        folder: of the row, with a folder for each seed.
        fingerprint: of its specification; runs of another one do not count.
    """
    for path in folder.glob("seed-*/metrics.json"):
        try:
            found = json.loads(path.read_bytes())
            if found["status"] == "ok" and found["fingerprint"] == fingerprint:
                yield used(found)
        except (OSError, ValueError, KeyError, TypeError):
            continue  # what cannot be read is no measurement


def used(found: Mapping[str, Any]) -> Used:
    """Return what a run used that ended well, from its `metrics.json`."""
    return Used(
        memory_bytes=found["peak_memory_bytes"],
        epochs=found["epochs"],
        tokens_per_second=found["tokens_per_second"],
        tokens={split: found[split]["tokens"] for split in ("train", "valid", "test")},
        seconds={"accuracy": 0.0} | found["seconds"],  # older runs have no such clock
    )


class Request(NamedTuple):
    """What a job asks for."""

    megabytes: int
    minutes: int


def request(
    recipe: Recipe, size: CorpusSize, seeds: list[Used], smoke: list[Used]
) -> Request | None:
    """Return what a run needs by those like it, with a margin; None if there are none.

    Args:
        recipe: of the run.
        size: of its corpus.
        seeds: what its other seeds used.
        smoke: what the same in the budget `smoke` used.
    """
    epochs = recipe.within_budget().epochs
    if seeds:
        margin = SEEDS
        seconds = max(used.run_seconds(epochs) for used in seeds)
    elif smoke:
        margin = SMOKE
        seconds = max(used.scaled_seconds(epochs, size) for used in smoke)
    else:
        return None
    memory = max(used.memory_bytes for used in seeds or smoke)
    return Request(
        megabytes=math.ceil(margin.memory * memory / 1e6),
        minutes=math.ceil((START_UP + margin.time * seconds) / 60),
    )
