"""Real trainers in their frameworks' environments, on a text of a few thousand words, to be killed.

Used by the tests beside it and by `benchmarks/soak.py`.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from ptbench import environments
from ptbench.backends import Framework
from ptbench.configuration.specification import Cell, Specification
from ptbench.corpus.definitions import MarkovCorpus
from ptbench.corpus.prepare import prepare
from ptbench.model.recipe import Recipe
from ptbench.training.checkpoints import read_arrays
from ptbench.training.records import read_history, read_metrics

ROOT = Path(__file__).parents[2]
CORPUS = MarkovCorpus(
    kind="synthetic", process="markov", seed=1, train_tokens=8_000, valid_tokens=1_500,
    test_tokens=1_500, topics=5, openers_per_topic=2, content_words_per_topic=14,
    function_words=16, topic_loyalty=0.97, closing_probability=0.15,
)  # fmt: skip
# Three fetches an epoch, and a checkpoint after each. What could be lost on the way: Adam's
# moments, the carried state, the masks of dropout, what the plateau and the patience have seen.
RECIPE = Recipe(
    layers=1, embedding_size=16, hidden_size=16, mixtures=2, latent_size=8, batch_size=16,
    sequence_length=8, test_batch_size=16, dropout=0.2, initialization_scale=0.2, optimizer="adam",
    learning_rate=0.02, schedule="plateau", plateau_patience=0, plateau_threshold=0.2,
    learning_rate_decay=1e-4,  # soon nothing moves, and patience ends any framework's run
    patience=2, epochs=15,
)  # fmt: skip

# In the place of Slurm's: it runs the other node's replicas here, and writes down their numbers.
SRUN = """#!/bin/sh
for argument; do
    case $argument in --ntasks=*) tasks=${argument#*=};; --*|-*) ;; *) break;; esac
    shift
done
for number in $(seq 0 $((tasks - 1))); do
    SLURM_PROCID=$number SLURMD_NODENAME=second SLURM_LAUNCH_NODE_IPADDR=127.0.0.1 "$@" &
    echo $! >> "$0.pids"
done
wait
"""

CLOCKED = {"tokens_per_second", "training_seconds", "validation_seconds"}  # of history.csv
MEASURED = {  # of metrics.json: what a clock or a memory counter gave, and how often it was tried
    "tokens_per_second", "seconds_per_epoch", "seconds", "attempts", "peak_memory_bytes",
    "peak_device_memory_bytes", "hardware",
}  # fmt: skip


def make_corpus(folder: Path) -> Path:
    """The text, prepared."""
    prepare("synthetic", CORPUS, None, folder / "downloads", folder / "synthetic")
    return folder / "synthetic"


def two_nodes(trainer: Trainer) -> Path:
    """Let a trainer have two nodes; the file will have the numbers of the other one's processes."""
    folder = trainer.folder / "slurm"
    folder.mkdir(parents=True)
    (folder / "srun").write_text(SRUN)
    (folder / "srun").chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURMD_NODENAME": "first"}
    trainer.environment = job | {"PATH": f"{folder}:{os.environ['PATH']}"}
    trainer.arguments = (*trainer.arguments, "--nodes", "2")
    return folder / "srun.pids"


@dataclass
class Trainer:
    """One cell, and the command that trains it."""

    framework: Framework
    devices: int
    corpus: Path
    folder: Path  # its results
    recipe: Recipe = RECIPE
    arguments: Sequence[str] = ("--checkpoint-minutes", "0")
    environment: Mapping[str, str] = field(default_factory=dict)  # beside this process' own
    kills: int = field(default=0, init=False)

    @property
    def cell(self) -> Cell:
        return Cell(variant="faults", framework=self.framework, devices=self.devices, seed=1)

    @property
    def output(self) -> Path:
        return self.folder / "cells" / self.cell.path

    @property
    def attempts(self) -> Path:
        return self.folder / "attempts" / self.cell.path

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints" / self.cell.path

    @property
    def log(self) -> Path:
        return self.folder / "logs" / f"{self.cell.path}.log"

    def command(self) -> list[str | Path]:
        """What runs `ptbench` in the framework's environment."""
        environment = ROOT / "results" / "environments" / f"{self.framework}-cpu"
        environments.build(self.framework, "cpu", environment)
        return [environment / environments.PYTHON, "-m", "ptbench"]

    def start(
        self, *arguments: str, ignoring: Sequence[signal.Signals] = (), **environment: str
    ) -> subprocess.Popen[str]:
        """The trainer, in a session of its own, perhaps ignoring SIGINT or SIGHUP."""
        specification = Specification(variant="faults", recipe=self.recipe, corpus_definition={})
        return subprocess.Popen(
            [
                *self.command(), "train",
                "--cell", self.cell.path, "--specification", specification.text(),
                "--corpus", self.corpus, "--output", self.output,
                "--attempts", self.attempts, "--checkpoints", self.checkpoints, "--log", self.log,
                "--threads", str(self.devices), *self.arguments, *arguments,
            ],
            env={
                **os.environ, "PYTHONPATH": "workflow", "OMP_WAIT_POLICY": "passive",
                # JAX compiles for longer than it trains: once for all that are started, here.
                "JAX_COMPILATION_CACHE_DIR": str(self.corpus.parent / "compiled"),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
                **self.environment, **environment,
            },
            cwd=ROOT, start_new_session=True, text=True,
            # A test run behind an `&` ignores SIGINT, one after nohup SIGHUP; so would the trainer.
            preexec_fn=lambda: [
                signal.signal(each, signal.SIG_IGN if each in ignoring else signal.SIG_DFL)
                for each in (signal.SIGINT, signal.SIGHUP)
            ],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def finish(self, *arguments: str) -> str:
        """Run to the end; what it said."""
        process = self.start(*arguments)
        said, _ = process.communicate(timeout=600)
        assert process.returncode == 0, f"{said}\n{self.log.read_text()[-3000:]}"
        return said

    def result(self) -> Any:
        """All that the finished cell has and no clock wrote."""
        best, metadata = read_arrays(self.checkpoints / "best.safetensors")
        return (
            [e.model_dump(exclude=CLOCKED) for e in read_history(self.output / "history.csv")],
            read_metrics(self.output / "metrics.json").model_dump(exclude=MEASURED),
            {name: np.asarray(array).tobytes() for name, array in best.items()},
            metadata["epoch"],
        )

    def wait_for_checkpoint(self, process: subprocess.Popen[str]) -> bool:
        """Wait until the process has saved something new; False if it ended before."""
        last = self.checkpoints / "last.safetensors"

        def written() -> int:
            try:
                return last.stat().st_mtime_ns
            except FileNotFoundError:  # none yet, or the new one is just taking its place
                return 0

        before = written()
        while process.poll() is None:
            if written() > before:
                return True
            time.sleep(0.005)
        return False

    def kill_until_done(
        self, random: random.Random, kills: int, delay: float, at_start: float = 0.0
    ) -> Iterator[str]:
        """Kill the trainer again and again, then let it end.

        Yields what became of each: `killed early`, perhaps before it had begun; `killed`, after it
        had saved something; or `finished`.

        Args:
            random: chooses the moments.
            kills: how often at most.
            delay: longest time between a checkpoint and the kill [s].
            at_start: share of kills that come at any time before the first checkpoint.
        """
        started: list[float] = []  # seconds to the first checkpoint
        while self.kills < kills:
            process = self.start()
            began = time.monotonic()
            early = bool(started) and random.random() < at_start
            if early:
                time.sleep(random.uniform(0, min(started)))
            elif self.wait_for_checkpoint(process):
                started.append(time.monotonic() - began)
                time.sleep(random.uniform(0, delay))
            if process.poll() is not None:
                said, _ = process.communicate()
                assert process.returncode == 0, f"{said}\n{self.log.read_text()[-3000:]}"
                yield "finished"
                return
            family = psutil.Process(process.pid).children(recursive=True)
            process.kill()
            process.communicate()
            self.kills += 1
            _, alive = psutil.wait_procs(family, timeout=30)
            assert not alive, f"{alive} outlived the trainer that started them"
            yield "killed early" if early else "killed"
        self.finish()
        yield "finished"
