"""`ptbench train` with the oracle in the framework's place: a real process that starts in a second.

    TOY_SECONDS=0.01 python -m tests.support.toy_trainer train ...

TOY_START is what building the model sleeps and TOY_SECONDS what a step does; TOY_PACE is a file
that says the latter anew at every step. At the N-th training step of the process TOY_FAILS=N raises
an error and TOY_HANGS=N never returns. TOY_GRACE replaces the time that a signal leaves.
"""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from typing import Any

from tests.support.problems import new_oracle

from ptbench import cli
from ptbench.backends.base import Backend, TrainStep
from ptbench.backends.oracle import Oracle
from ptbench.configuration.specification import Cell, Specification
from ptbench.training import cell as trainer
from ptbench.training import signals
from ptbench.training.signals import end_children


class Toy(Oracle):
    """The oracle, slower, and as unreliable as asked for."""

    steps_here = 0

    def train_step(self, *arguments: Any) -> TrainStep:
        self.steps_here += 1
        pace = os.environ.get("TOY_PACE")
        time.sleep(float(Path(pace).read_text() if pace else os.environ.get("TOY_SECONDS", "0")))
        if self.steps_here == int(os.environ.get("TOY_FAILS", "-1")):
            print("about to fail")
            raise RuntimeError("CUDA out of memory.\nTried to allocate 20.00 GiB")
        if self.steps_here == int(os.environ.get("TOY_HANGS", "-1")):
            time.sleep(10_000)
        return super().train_step(*arguments)

    def close(self) -> None:
        end_children()


def create_backend(
    cell: Cell, specification: Specification, vocabulary_size: int, *_: int
) -> Backend:
    # As a replica: a process that must not end before this one, and does once this one has.
    subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    time.sleep(float(os.environ.get("TOY_START", "0")))
    return new_oracle(specification.recipe, cell.devices, cell.seed, vocabulary_size, Toy)


if __name__ == "__main__":
    trainer.create_backend = create_backend  # type: ignore[assignment]
    signals.GRACE_SECONDS = float(os.environ.get("TOY_GRACE", signals.GRACE_SECONDS))
    cli.main()
