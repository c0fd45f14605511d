"""One cell from its specification to its files: the command a scheduler runs.

`metrics.json` is written last, and only for a run that finished.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from ptbench.backends import create
from ptbench.backends.base import Backend, Setup
from ptbench.configuration.specification import PROTOCOL, Cell, Specification
from ptbench.corpus.batching import Feed, ParallelStreams, Prefetched, Sentences, Windows
from ptbench.corpus.definitions import Split
from ptbench.corpus.sources import Source
from ptbench.corpus.store import Corpus, open_corpus
from ptbench.errors import InterruptionError, PtbenchError
from ptbench.model.parameters import parameter_count
from ptbench.model.recipe import Recipe
from ptbench.training.attempts import Attempt
from ptbench.training.checkpoints import Checkpoints, Identity, write_arrays
from ptbench.training.clocks import Clocks
from ptbench.training.devices import check_devices
from ptbench.training.loop import Progress, Run, Splits, train
from ptbench.training.provenance import cells_at_once, peak_memory_bytes, provenance
from ptbench.training.records import Metrics, Score, Seconds, history_csv, write_atomically
from ptbench.training.signals import Signals


@dataclass(frozen=True)
class Paths:
    """Where a cell's files are."""

    corpus: Path  # folder, read
    output: Path  # folder: metrics.json, history.csv, recipe.yaml, provenance.json
    attempts: Path  # folder: attempt-N.json, attempt-N.log, attempt-N.failure.json
    checkpoints: Path  # folder: best.safetensors, and while it runs what it can go on from


def run_cell(
    cell: Cell,
    specification: Specification,
    paths: Paths,
    threads: int,
    say: Callable[[str], None] = print,
    checkpoint_minutes: float = 10.0,
    wait_for_lock: float = 0.0,
    attempt: Attempt | None = None,
    signals: Signals | None = None,
) -> Metrics:
    """Train and score one cell and write its files, from its last checkpoint if it has one.

    Does nothing if the cell has been finished already, save putting back a `metrics.json` that
    Snakemake deleted as it started a duplicate.

    Args:
        cell: which run.
        specification: what it is to do.
        paths: where to read and write.
        threads: CPU threads, shared by all replicas.
        say: receives a line of progress now and then.
        checkpoint_minutes: between two checkpoints within an epoch.
        wait_for_lock: longest time to wait for another process that is at it [s].
        attempt: to be opened here, and closed by the caller if this fails.
        signals: whether the process has been told to end.

    Raises:
        InterruptionError: if it has been, and had not finished.
        PtbenchError: if the specification, the corpus or the devices do not allow the run, or
            another process is at it.
    """
    attempt = attempt or attempt_at(cell, specification, paths)
    done = attempt.open(paths.output, wait_for_lock, say, signals.interrupted if signals else never)
    if done:
        if not (paths.output / "metrics.json").exists():
            write_atomically(paths.output / "metrics.json", done.model_dump_json(indent=2) + "\n")
        say(f"[{cell.path}] had finished already; to train it again, remove its metrics.json")
        return done
    check_devices(cell.devices, specification.accelerator)
    began = datetime.datetime.now(datetime.UTC)
    clocks = Clocks()
    recipe = specification.recipe
    if specification.variant != cell.variant:
        raise PtbenchError(f"the specification is of {specification.variant}, not {cell.variant}")
    with clocks("load"):
        corpus = open_corpus(paths.corpus, recipe.source)
        splits = feed(corpus, recipe, cell.devices)
    with clocks("start_up"):
        backend = create_backend(cell, specification, corpus.vocabulary_size, threads)
        clocks.synchronize = backend.synchronize
    facts = provenance(backend.package) | {
        "devices": backend.device_names(),
        "settings": backend.settings(),
        "threads": threads,
        "corpus": corpus.description,
        "cells_at_once": cells_at_once(),
        "started": began.isoformat(timespec="seconds"),
    }
    if len(facts["devices"]) != cell.devices:
        raise PtbenchError(f"{cell.path} got {len(facts['devices'])} devices, not {cell.devices}")

    checkpoints = Checkpoints(
        paths.checkpoints,
        identity(cell, specification, paths.corpus, corpus.vocabulary_size, facts),
        lambda: clocks.seconds | {"total": clocks.seconds["total"] + age(attempt)},
        checkpoint_minutes,
        signals,
        attempt.check,
        say,
    )
    with clocks("start_up"):
        resumed = checkpoints.latest(
            lambda: backend.snapshot(backend.initial_state(splits.train.batch_size, training=True))
        )
    if resumed:
        for clock, seconds in resumed.seconds.items():
            clocks.seconds[clock] += seconds
        say(f"[{cell.path}] goes on {checkpoints.position}")
    saved = resumed.saved if resumed else None
    if signals:
        signals.losable = True
    try:
        run = train(backend, recipe, splits, clocks, watcher(cell, say), checkpoints, saved)
    except InterruptionError:
        where = checkpoints.position or "before its first step"
        raise InterruptionError(
            f"{cell.path} was told to end, and did {where}; the same command goes on from there"
        ) from None

    attempt.check()
    paths.output.mkdir(parents=True, exist_ok=True)
    with clocks("checkpointing"):
        if run.best_parameters is not None and run.best is not None:
            write_arrays(
                paths.checkpoints / "best.safetensors",
                run.best_parameters,
                {
                    "cell": cell.path,
                    "specification": specification.text(),
                    "vocabulary_size": str(corpus.vocabulary_size),
                    "vocabulary_sha256": corpus.vocabulary_sha256,
                    "epoch": str(run.best.epoch),
                },
            )
    facts["cells_at_once"] = max(facts["cells_at_once"], cells_at_once())
    facts["attempts"] = attempt.count
    facts["finished"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    # While the replicas' processes still live.
    peak, peak_on_devices = peak_memory_bytes(), backend.peak_device_memory()
    backend.close()
    clocks.seconds["total"] += age(attempt)
    metrics = summarize(
        cell,
        specification,
        corpus.vocabulary_size,
        splits,
        run,
        clocks,
        peak,
        peak_on_devices,
        attempt.count,
    )
    write_atomically(paths.output / "recipe.yaml", recipe_yaml(specification))
    write_atomically(paths.output / "history.csv", history_csv(run.history))
    write_atomically(paths.output / "provenance.json", json.dumps(facts, indent=2) + "\n")
    write_atomically(paths.output / "metrics.json", metrics.model_dump_json(indent=2) + "\n")
    attempt.finish(metrics)
    checkpoints.clear()
    return metrics


def attempt_at(
    cell: Cell, specification: Specification, paths: Paths, log: Path | None = None
) -> Attempt:
    """An attempt at the cell, not opened yet."""
    text = digest(paths.corpus)
    return Attempt(paths.attempts, cell.path, specification.fingerprint, text, log)


def never() -> bool:
    """Nobody tells this process to end."""
    return False


def identity(
    cell: Cell,
    specification: Specification,
    corpus: Path,
    vocabulary_size: int,
    facts: Mapping[str, Any],
) -> Identity:
    """What a checkpoint must have in common with this run to be of use to it."""
    return Identity(
        cell=cell.path,
        fingerprint=specification.fingerprint,
        corpus=digest(corpus),
        vocabulary_size=vocabulary_size,
        framework=f"{facts['framework_package']} {facts['framework_version']}",
    )


def digest(corpus: Path) -> str:
    """Twelve hexadecimal digits that change with a prepared corpus' text, wherever it came from.

    Empty if there is no such corpus, which `open_corpus` will have more to say about.
    """
    try:
        description = json.loads((corpus / "corpus.json").read_text(encoding="utf-8"))
        facts = [description.get(key) for key in ("raw_sha256", "subset", "tokens")]
    except (OSError, ValueError, AttributeError):
        return ""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def age(attempt: Attempt) -> float:
    """Age of this process without what it waited for another [s]."""
    return time.time() - psutil.Process().create_time() - attempt.waited


def read_specification(text: str) -> Specification:
    """A specification from its text.

    Raises:
        PtbenchError: if it is not valid, or of another protocol.
    """
    try:
        specification = Specification.model_validate_json(text)
    except ValueError as error:
        raise PtbenchError(f"the specification cannot be read: {error}") from error
    if specification.protocol != PROTOCOL:
        raise PtbenchError(
            f"the specification is of protocol {specification.protocol}; this ptbench runs "
            f"{PROTOCOL}"
        )
    return specification


def feed(corpus: Corpus, recipe: Recipe, devices: int) -> Splits:
    """The corpus as the recipe feeds it, the training batch for all devices together.

    Raises:
        PtbenchError: if a split is too short for one batch.
    """
    return Splits(
        train=feed_split(corpus, recipe, "train", recipe.global_batch_size(devices), training=True),
        valid=feed_split(corpus, recipe, "valid", recipe.evaluation_batch_size),
        test=feed_split(corpus, recipe, "test", recipe.test_batch_size),
    )


def feed_split(
    corpus: Corpus, recipe: Recipe, split: Split, batch_size: int, training: bool = False
) -> Feed:
    """One split of the corpus as the recipe feeds it.

    Raises:
        PtbenchError: if it is too short for one batch.
    """
    tokens: Source = getattr(corpus, split)
    try:
        if recipe.feeding == "windows":
            fed: Feed = Windows(tokens, batch_size, recipe.sequence_length, wraps=training)
        elif recipe.feeding == "sentences":
            fed = Sentences(tokens, batch_size, corpus.end_of_sentence)
        else:
            fed = ParallelStreams(tokens, batch_size, recipe.sequence_length)
    except ValueError as error:
        raise PtbenchError(f"corpus {recipe.corpus_folder}: {error}") from error
    return Prefetched(fed, recipe.prefetch) if recipe.prefetch else fed


def create_backend(
    cell: Cell, specification: Specification, vocabulary_size: int, threads: int
) -> Backend:
    """The cell's model with its initial parameters, on its devices."""
    recipe, accelerator = specification.recipe, specification.accelerator
    setup = Setup(recipe, vocabulary_size, cell.devices, cell.seed, accelerator, threads)
    return create(cell.framework, setup)


def watcher(cell: Cell, say: Callable[[str], None]) -> Callable[[Progress], None]:
    """Turns progress into lines that say which cell they are about."""
    label = f"{cell.variant} {cell.framework} devices {cell.devices} seed {cell.seed}"

    def watch(progress: Progress) -> None:
        where = f"[{label}] epoch {progress.epoch}/{progress.epochs}"
        speed = f"{progress.tokens_per_second:,.0f} tokens/s"
        if progress.finished:
            valid = progress.finished.valid_perplexity
            say(f"{where}  train {progress.train_perplexity:.2f}  valid {valid:.2f}  {speed}")
        else:
            say(f"{where}  {progress.fraction:.0%}  train {progress.train_perplexity:.2f}  {speed}")

    return watch


def summarize(
    cell: Cell,
    specification: Specification,
    vocabulary_size: int,
    splits: Splits,
    run: Run,
    clocks: Clocks,
    peak: int,
    peak_on_devices: int | None,
    attempts: int,
) -> Metrics:
    """`metrics.json` of a finished run."""
    best, last = run.best, run.history[-1] if run.history else None
    return Metrics(
        protocol=specification.protocol,
        fingerprint=specification.fingerprint,
        cell=cell,
        status="diverged" if run.diverged else "ok",
        reason=run.diverged,
        parameters=parameter_count(specification.recipe, vocabulary_size),
        vocabulary_size=vocabulary_size,
        stopped=run.stopped,
        epochs=len(run.history),
        best_epoch=best.epoch if best else None,
        train=last
        and Score(
            nll=last.train_nll,
            perplexity=last.train_perplexity,
            tokens=splits.train.predicted_tokens,
        ),
        valid=best
        and Score(
            nll=best.valid_nll,
            perplexity=best.valid_perplexity,
            tokens=splits.valid.predicted_tokens,
        ),
        test=run.test,
        tokens_per_second=run.tokens_per_second,
        seconds_per_epoch=run.seconds_per_epoch,
        seconds=Seconds(**clocks.seconds),
        attempts=attempts,
        peak_memory_bytes=peak,
        peak_device_memory_bytes=peak_on_devices,
    )


def recipe_yaml(specification: Specification) -> str:
    """The resolved recipe as YAML. JSON scalars are YAML scalars, so no library is needed."""
    head = {"variant": specification.variant, "fingerprint": specification.fingerprint}
    values = head | specification.recipe.model_dump(mode="json")
    return "".join(f"{key}: {json.dumps(value)}\n" for key, value in values.items())
