"""A process in a framework's environment that trains for a while whenever it is told to.

    python -m ptbench.measurement.speed_worker '{"kind": "backend", ...}'

The other end is `benchmark.py`. Requests are lines of JSON on standard input, answers lines of JSON
on what was standard output; everything else that is printed goes to standard error.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from typing import Any

import numpy as np
import psutil

from ptbench.corpus.batching import Batch
from ptbench.model.recipe import Recipe
from ptbench.model.work import Product

WARM_UP_STEPS = 3
BATCHES = 8  # different ones, so that no look-up is always in the cache


def random_batches(recipe: Recipe, vocabulary_size: int) -> list[Batch]:
    """Batches of words whose frequencies fall as 1 / rank, as those of text do about."""
    rng = np.random.default_rng(0)
    frequencies = 1 / np.arange(1, vocabulary_size + 1)
    shape = (BATCHES, 2, recipe.sequence_length, recipe.batch_size)
    words = rng.choice(vocabulary_size, shape, p=frequencies / frequencies.sum())
    mask = np.ones(shape[2:], np.float32)
    return [
        Batch(np.ascontiguousarray(x, np.int32), np.ascontiguousarray(y, np.int32), mask)
        for x, y in words
    ]


class BackendSpeed:
    """Training by a backend, as the training loop steps it."""

    def __init__(
        self, framework: str, recipe: Recipe, vocabulary_size: int, threads: int, accelerator: str
    ) -> None:
        from ptbench.backends import create
        from ptbench.backends.base import Setup

        setup = Setup(recipe, vocabulary_size, 1, 0, accelerator, threads)  # type: ignore[arg-type]
        self.backend = create(framework, setup)
        self.recipe = recipe
        self.batches = random_batches(recipe, vocabulary_size)
        self.state = self.backend.initial_state(recipe.batch_size, training=True)

    def train(self, seconds: float) -> dict[str, float]:
        """Whole steps for at least that long: tokens, seconds, and the last nll per token."""
        tokens, start = 0, time.perf_counter()
        while True:
            for batch in self.batches[: max(1, min(BATCHES, self.steps_at_once(tokens, start)))]:
                result = self.backend.train_step(batch, self.state, 0.1)
                self.state = result.state
                tokens += batch.mask.size
            nll = float(result.nll) / batch.mask.size
            self.backend.synchronize()
            spent = time.perf_counter() - start
            if spent >= seconds:
                return {"tokens": tokens, "seconds": spent, "nll": nll}

    def steps_at_once(self, tokens: int, start: float) -> int:
        """Steps between two looks at the clock: about a fifth of a second's."""
        if not tokens:
            return 1
        rate = tokens / (time.perf_counter() - start)
        return int(0.2 * rate / self.batches[0].mask.size)

    def settings(self) -> dict[str, str]:
        return self.backend.settings()

    def peak_memory(self) -> int:
        """Of the device, where it has memory of its own [bytes]."""
        return self.backend.peak_device_memory() or resident_memory()


def resident_memory() -> int:
    """Largest resident set of this process so far [bytes]."""
    for line in open(f"/proc/{os.getpid()}/status"):  # noqa: PTH123, SIM115 - no file of ours
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return int(psutil.Process().memory_info().rss)


def create(task: dict[str, Any]) -> Any:
    threads = task["threads"]
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if task["kind"] == "backend":
        recipe = Recipe.model_validate(task["recipe"])
        return BackendSpeed(
            task["framework"], recipe, task["vocabulary_size"], threads, task["accelerator"]
        )
    module, name = task["class"].split(":")
    made = getattr(importlib.import_module(module), name)
    if task["kind"] == "products":
        return made(threads)
    return made(Recipe.model_validate(task["recipe"]), task["vocabulary_size"], threads)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(content: Any) -> None:
        print(json.dumps(content), file=answers, flush=True)

    worker = create(json.loads(sys.argv[1]))
    if hasattr(worker, "train"):
        for _ in range(WARM_UP_STEPS):
            worker.train(0.0)
    answer(worker.settings() if hasattr(worker, "settings") else {})
    for line in sys.stdin:
        request = json.loads(line)
        if "product" in request:
            answer(worker.rate(Product(*request["product"]), request["seconds"]))
        else:
            measured = worker.train(request["seconds"])
            peak = getattr(worker, "peak_memory", resident_memory)()
            answer(measured | {"peak_memory_bytes": peak})


if __name__ == "__main__":
    main()
