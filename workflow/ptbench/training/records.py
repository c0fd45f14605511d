"""A run's results: `metrics.json`, `history.csv` and their models.

`metrics.json` exists only for a finished run, `ok` or `diverged`. The trainer writes it in a
framework's environment, and the analysis reads it in the workflow's.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import Field

from ptbench.configuration.specification import Cell
from ptbench.model.recipe import Model

BUSY = 0.1  # share of a run's cores that other processes may take before its machine is busy


class Score(Model):
    """How well a split was predicted."""

    nll: float = Field(description="Mean negative log-likelihood [nats per token].")
    perplexity: float = Field(description="exp(nll).")
    tokens: int = Field(description="Predicted tokens, each counted once.")


def score(nll_sum: float, tokens: int) -> Score:
    """Return the score of `tokens` predictions whose nlls sum to `nll_sum` nats."""
    nll = nll_sum / tokens
    return Score(nll=nll, perplexity=perplexity(nll), tokens=tokens)


def perplexity(nll: float) -> float:
    """Return exp(nll), infinity where that overflows."""
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf


class Epoch(Model):
    """One row of `history.csv`; two equal runs differ in the seconds and tokens/s alone."""

    epoch: int = Field(description="Counted from 1.")
    learning_rate: float = Field(description="Rate of this epoch's last step.")
    train_nll: float = Field(description="Mean over the epoch's steps as they ran [nats/token].")
    train_perplexity: float = Field(description="exp(train_nll).")
    valid_nll: float = Field(description="After the epoch [nats/token].")
    valid_perplexity: float = Field(description="exp(valid_nll).")
    gradient_norm: float = Field(description="Mean global norm before clipping.")
    tokens_per_second: float = Field(description="Training tokens over training time, warm.")
    training_seconds: float = Field(description="Training alone [s].")
    validation_seconds: float = Field(description="Validation alone [s].")


class Seconds(Model):
    """Where a run's time went. The clocks do not overlap; each stops on a synchronised device.

    A run of several attempts counts each of them up to the checkpoint that the next one went on
    from. What was lost after that checkpoint is not counted.
    """

    load: float = Field(0.0, description="Opening and batching the prepared corpus [s].")
    start_up: float = Field(0.0, description="Importing the framework, building the model [s].")
    compile: float = Field(
        0.0, description="First steps of each kind and attempt, not counted as speed [s]."
    )
    training: float = Field(0.0, description="Training steps after the first [s].")
    validation: float = Field(0.0, description="Scoring the validation split after epochs [s].")
    test: float = Field(0.0, description="Scoring the test split, for its perplexity [s].")
    accuracy: float = Field(
        0.0, description="Reading it again for the accuracy of the next word, with compiling [s]."
    )
    checkpointing: float = Field(0.0, description="Saving parameters and checkpoints [s].")
    total: float = Field(
        0.0,
        description="From the start of the process to its end [s]; of an attempt that was "
        "interrupted, to the checkpoint that the next one went on from.",
    )


class Hardware(Model):
    """What a run did to its machine while it trained, validated, tested and saved.

    Means over time, of all attempts up to the checkpoints that were gone on from, as the clocks
    are. `training/hardware.py` samples it.
    """

    seconds: float = Field(description="Time that was sampled [s].")
    cores: int = Field(description="CPU cores of the machine.")
    threads: int = Field(description="CPU threads that the run was given.")
    own_cores: float = Field(description="Cores that the run's processes kept busy.")
    other_cores: float = Field(description="Cores that all other processes kept busy.")
    memory_bytes: int = Field(description="Resident memory of the run's processes [bytes].")
    sampling_seconds: float = Field(description="Processor time that sampling took [s].")
    cells_at_once: int | None = Field(
        None, description="Most cells that the machine trained at once; null: not recorded."
    )
    gpu_utilization: float | None = Field(
        None,
        description="Share of the time in which the run's GPUs had work, whoever gave it, by NVML.",
    )
    gpu_memory_bytes: int | None = Field(
        None, description="Largest memory in use on the run's GPUs, by whomever, by NVML [bytes]."
    )
    gpu_joules: float | None = Field(
        None, description="Energy of the run's GPUs, whoever used them, by NVML's counter [J]."
    )
    cpu_joules: float | None = Field(
        None,
        description="Energy of all of the machine's processors and their memory, by RAPL, whoever "
        "used them [J].",
    )

    @property
    def busy(self) -> bool:
        """Return whether other processes took cores that the run could have used."""
        usable = min(self.threads, self.cores)
        return usable + self.other_cores - self.cores > BUSY * usable


class Metrics(Model):
    """`metrics.json`: the result of one cell."""

    protocol: int = Field(description="Version of what training and measuring mean.")
    fingerprint: str = Field(description="Of the specification that was run.")
    cell: Cell = Field(description="Which run this is.")
    status: Literal["ok", "diverged"] = Field(description="How it ended.")
    reason: str | None = Field(None, description="Why it counts as diverged.")
    stopped: str | None = Field(None, description="Which of the recipe's limits ended training.")
    parameters: int = Field(description="Trainable numbers in the model.")
    vocabulary_size: int = Field(description="Word types.")
    steps_per_epoch: int = Field(description="Training steps of one epoch.")
    epochs: int = Field(description="Epochs trained.")
    best_epoch: int | None = Field(description="Epoch of the lowest validation nll.")
    train: Score | None = Field(description="Training split in the last epoch, as it ran.")
    valid: Score | None = Field(description="Validation split after the best epoch.")
    test: Score | None = Field(description="Test split with the best epoch's parameters.")
    test_accuracy: float | None = Field(
        None, description="Share of the test split's tokens that were the most probable."
    )
    tokens_per_second: float | None = Field(description="Median over epochs [tokens/s].")
    seconds_per_epoch: float | None = Field(description="Median of training + validation [s].")
    seconds: Seconds = Field(description="Where the time went.")
    attempts: int = Field(
        1, description="Processes that worked on it; all but the last were cut short or failed."
    )
    peak_memory_bytes: int = Field(description="Largest resident memory of all processes [bytes].")
    peak_device_memory_bytes: int | None = Field(
        None, description="Largest allocation on the GPUs, by the framework's own count [bytes]."
    )
    hardware: Hardware | None = Field(None, description="Use of the machine; null: not sampled.")


def history_csv(epochs: Iterable[Epoch]) -> str:
    """Return the text of `history.csv`, numbers in their shortest exact form."""
    lines = [",".join(Epoch.model_fields)]
    lines += [",".join(repr(value) for _, value in epoch) for epoch in epochs]
    return "\n".join(lines) + "\n"


def read_history(path: Path) -> list[Epoch]:
    """Return the rows of a `history.csv`."""
    with path.open(encoding="utf-8", newline="") as file:
        return [Epoch.model_validate(row) for row in csv.DictReader(file)]


def read_metrics(path: Path) -> Metrics:
    """Return the content of a `metrics.json`."""
    return Metrics.model_validate_json(path.read_bytes())
