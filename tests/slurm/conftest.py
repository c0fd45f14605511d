"""A Slurm for the tests, and studies that run on it as a user's would."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.slurm.testbed import Testbed, UnavailableError
from tests.workflow.conftest import Project

from ptbench.training.records import read_history

CLOCKED = {"tokens_per_second", "training_seconds", "validation_seconds"}
EXPERIMENT = """
recipes:
  tiny:
    corpus: synthetic
    subset: 100
    layers: 1
    hidden_size: 8
    embedding_size: 8
    batch_size: 20
    sequence_length: 10
    dropout: 0.2
    optimizer: adam
    learning_rate: 0.003
    schedule: constant
    epochs: {epochs}
experiments:
  tiny:
    title: A tiny model on a cluster
    variants: [tiny]
    devices: {devices}
    seeds: {seeds}
    frameworks: {frameworks}
"""


class Study(Project):
    """A clone whose `slurm/` has been fitted to the testbed, as a user fits it to a cluster."""

    def __init__(
        self,
        folder: Path,
        frameworks: list[str],
        devices: list[int],
        seeds: list[int],
        epochs: int = 2,
    ) -> None:
        super().__init__(folder)
        self.process: subprocess.Popen[bytes] | None = None  # the newest of `start`
        (self.folder / "workflow/experiments/tiny.yaml").write_text(
            EXPERIMENT.format(frameworks=frameworks, devices=devices, seeds=seeds, epochs=epochs)
        )
        (self.folder / "slurm/reproduction.yaml").write_text("experiments: [tiny]\n")
        self.profile("seconds-between-status-checks: 30", 2)
        self.profile("max-jobs-per-timespan: 1/2s", "5/1s")
        self.profile("latency-wait: 60", 5)
        self.cells = [
            f"tiny/{framework}/devices-{count}/seed-{seed}"
            for framework in frameworks
            for count in devices
            for seed in seeds
        ]

    def profile(self, old: str, value: object) -> None:
        """Give a key of the profile, named with the value it has, another value."""
        self.replace("slurm/profile.yaml", old, f"{old.partition(': ')[0]}: {value}")

    def run(self, *arguments: str, expect: int | None = 0) -> str:
        """Run `snakemake --profile slurm` to its end; what it said, which goes to `said` too."""
        answer = self.snakemake("--profile", "slurm", *arguments, expect=expect)
        text = answer.stdout + answer.stderr
        with (self.folder / "said").open("a") as said:
            said.write(text)
        return text

    def said(self) -> str:
        """What all runs so far said, and what is in Snakemake's own logs of them."""
        logs = sorted((self.folder / ".snakemake/log").glob("*.log"))
        return "".join(file.read_text() for file in [self.folder / "said", *logs])

    @contextlib.contextmanager
    def start(self, *arguments: str, background: bool = False) -> Iterator[subprocess.Popen[bytes]]:
        """`snakemake --profile slurm`, killed at the end of the block if it still runs.

        Args:
            arguments: of it.
            background: it ignores SIGINT, as a shell has it behind an `&`.
        """
        ignored = ["env", "--ignore-signal=INT"] if background else []
        with (self.folder / "said").open("ab") as said:
            process = subprocess.Popen(
                [*ignored, sys.executable, "-m", "snakemake", "--profile", "slurm", *arguments],
                cwd=self.folder, stdout=said, stderr=said, stdin=subprocess.DEVNULL,
                env=self.environment(),
            )  # fmt: skip
        self.process = process
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    def file(self, cell: str, name: str = "metrics.json") -> Path:
        """A file of a cell's results."""
        return self.folder / "results/cells" / cell / name

    def facts(self, cell: str) -> dict[str, Any]:
        """The provenance of a finished cell."""
        facts: dict[str, Any] = json.loads(self.file(cell, "provenance.json").read_text())
        return facts

    def histories(self) -> list[list[dict[str, float]]]:
        """What every cell went through, without the columns that a clock wrote."""
        return [
            [
                row.model_dump(exclude=CLOCKED)
                for row in read_history(self.file(cell, "history.csv"))
            ]
            for cell in self.cells
        ]

    def finished(self) -> dict[str, tuple[int, bytes]]:
        """Time and content of the metrics of every finished cell."""
        files = {cell: self.file(cell) for cell in self.cells}
        return {
            cell: (file.stat().st_mtime_ns, file.read_bytes())
            for cell, file in files.items()
            if file.exists()
        }


@pytest.fixture(scope="session")
def testbed() -> Iterator[Testbed]:
    """A running Slurm; tests are skipped, with the reason, where there can be none."""
    try:
        made = Testbed.start()
    except UnavailableError as reason:
        pytest.skip(f"no Slurm here: {reason}")
    # an interrupted test run, too, must leave no daemon and no configuration behind
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    yield made
    made.stop()
