"""The training speed of a backend, for `speed_worker.py`."""

from __future__ import annotations

import itertools
import os
import time
from typing import Any

import numpy as np

from ptbench.backends import create
from ptbench.backends.base import Setup
from ptbench.corpus.batching import Batch
from ptbench.model.recipe import Recipe
from ptbench.training.provenance import peak_of

BATCHES = 8  # different ones, so that no look-up is always in the cache
LEARNING_RATE = 0.1
SECONDS_AT_ONCE = 0.2  # of training between two looks at the clock


def random_batches(recipe: Recipe, vocabulary_size: int) -> list[Batch]:
    """Return batches of words whose frequencies fall as 1 / rank, about as those of text do."""
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
    """Training by a backend, as the training loop calls it."""

    def __init__(self, task: dict[str, Any]) -> None:
        """Build the model that a task describes."""
        setup = Setup(
            Recipe.model_validate(task["recipe"]),
            task["vocabulary_size"],
            accelerator=task["accelerator"],
            threads=task["threads"],
        )
        self.backend = create(task["framework"], setup)
        self.stream = itertools.cycle(random_batches(setup.recipe, setup.vocabulary_size))
        self.state = self.backend.initial_state(setup.recipe.batch_size, training=True)

    def train(self, seconds: float) -> dict[str, float]:
        """Take steps for at least that long; return tokens, seconds, and the last nll per token."""
        tokens, count, start = 0, 1, time.perf_counter()
        while True:
            for batch in itertools.islice(self.stream, count):
                result = self.backend.train_step(batch, self.state, LEARNING_RATE)
                self.state = result.state
                tokens += batch.mask.size
            nll = float(result.nll) / batch.mask.size
            self.backend.synchronize()
            spent = time.perf_counter() - start
            if spent >= seconds:
                return {"tokens": tokens, "seconds": spent, "nll": nll}
            seconds_per_step = spent * batch.mask.size / tokens
            count = max(int(SECONDS_AT_ONCE / seconds_per_step), 1)

    def settings(self) -> dict[str, str]:
        """Return the backend's settings."""
        return self.backend.settings()

    def peak_memory(self) -> int:
        """Return the largest memory of the device, or of this process on CPUs [bytes]."""
        return self.backend.peak_device_memory() or peak_of(os.getpid())
