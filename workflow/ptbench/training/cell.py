"""One cell from its specification to its files: the work of `ptbench train`.

`metrics.json` is written last, and only for a run that finished.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from ptbench.backends import create
from ptbench.backends.base import Backend, Setup
from ptbench.configuration.specification import PROTOCOL, Cell, Specification, code_digest
from ptbench.corpus.batching import (
    Feed,
    First,
    Overwritten,
    ParallelStreams,
    Prefetched,
    Sentences,
    VariedStreams,
    Windows,
)
from ptbench.corpus.definitions import Split
from ptbench.corpus.sources import Source
from ptbench.corpus.store import Corpus, open_corpus
from ptbench.errors import InterruptionError, PtbenchError
from ptbench.files import remove_leftovers, write_atomically
from ptbench.isolation import ignored_sentence
from ptbench.model.parameters import parameter_count
from ptbench.model.recipe import BUDGETS, Keep, Recipe
from ptbench.training.attempts import Attempt, now
from ptbench.training.checkpoints import Checkpoints, Identity, clear, packed, write_arrays
from ptbench.training.clocks import Clocks
from ptbench.training.devices import check_devices
from ptbench.training.hardware import Sampler
from ptbench.training.loop import Progress, Run, Splits, train
from ptbench.training.provenance import peak_memory_bytes, provenance
from ptbench.training.records import Metrics, Score, Seconds, history_csv, perplexity
from ptbench.training.signals import Signals


@dataclass(frozen=True)
class Paths:
    """Where a cell's files are."""

    corpus: Path  # folder, read
    output: Path  # folder: metrics.json, history.csv, recipe.yaml, provenance.json
    attempts: Path  # folder: attempt-N.json, attempt-N.log, attempt-N.failure.json
    checkpoints: Path  # folder: best.safetensors, and last and previous while the cell trains

    @property
    def metrics(self) -> Path:
        """The cell's result."""
        return self.output / "metrics.json"


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
    keep: Keep = "best",
    asked: tuple[int, int] | None = None,
    nodes: int = 1,
) -> Metrics:
    """Train and score one cell and write its files, from its last checkpoint if it has one.

    If the cell has finished already, only its `metrics.json` is written again where Snakemake
    deleted it for a duplicate of the job.

    Args:
        cell: which run.
        specification: what it is to do.
        paths: where to read and write.
        threads: CPU threads, shared by all replicas.
        say: called with a line of progress now and then.
        checkpoint_minutes: between two checkpoints within an epoch.
        wait_for_lock: longest time to wait for another process that trains the cell [s].
        attempt: opened here, and closed by the caller if this fails.
        signals: whether the process has been told to end.
        keep: which parameters of a finished cell stay.
        asked: memory [MB] and time [minutes] that its job asked for; None: unknown.
        nodes: of its Slurm job, which the devices are shared out to; this process is on the first.

    Raises:
        InterruptionError: if it has been, and had not finished.
        PtbenchError: if the specification, the corpus or the devices do not allow the run, or
            another process trains the cell.
    """
    attempt, signals = attempt or attempt_at(cell, specification, paths), signals or Signals()
    done = attempt.open(paths.output, wait_for_lock, say)
    if done:
        if not paths.metrics.exists():
            write_atomically(paths.metrics, done.model_dump_json(indent=2) + "\n")
        say(f"[{cell.path}] had finished already; to train it again, remove its metrics.json")
        return done
    if attempt.repeats:
        clear(paths.checkpoints)  # from the end of the finished run nothing would be trained
    trainer = CellTrainer(cell, specification, paths, threads, attempt, say, nodes)
    trainer.start()
    if asked:
        trainer.facts["asked_megabytes"], trainer.facts["asked_minutes"] = asked
    run = trainer.train(checkpoint_minutes, signals)
    return trainer.finish(run, keep)


class CellTrainer:
    """This process's work on a cell: `start`, `train`, then `finish`."""

    def __init__(
        self,
        cell: Cell,
        specification: Specification,
        paths: Paths,
        threads: int,
        attempt: Attempt,
        say: Callable[[str], None],
        nodes: int,
    ) -> None:
        """Take what `run_cell` is given; the attempt is open.

        Raises:
            PtbenchError: if the specification is another cell's, or the devices are not there.
        """
        check_devices(cell.devices // nodes, specification.accelerator)
        if specification.variant != cell.variant:
            raise PtbenchError(
                f"the specification is of {specification.variant}, not {cell.variant}"
            )
        self.cell, self.specification, self.paths = cell, specification, paths
        self.recipe = specification.recipe.within_budget()
        self.threads, self.nodes, self.attempt, self.say = threads, nodes, attempt, say
        self.clocks = Clocks()
        on_gpus = specification.accelerator == "cuda"
        self.sampler = Sampler(threads, gpus=cell.devices // nodes if on_gpus else 0)
        self.began = now()

    def start(self) -> None:
        """Open the corpus, build the model on its devices, and note the run's surroundings."""
        with self.clocks("load"):
            self.corpus = open_corpus(self.paths.corpus, self.recipe.source)
            self.splits = feed(self.corpus, self.recipe, self.cell.devices, self.cell.seed)
        with self.clocks("start_up"):
            size = self.corpus.vocabulary_size
            self.backend = create_backend(
                self.cell, self.specification, size, self.threads, self.nodes
            )
            self.clocks.synchronize = self.backend.synchronize
        self.facts: dict[str, Any] = provenance(self.backend.package) | {
            "devices": self.backend.device_names(),
            "settings": {
                "implementation": self.backend.recipe.implementation,
                **self.backend.settings(),
            },
            "threads": self.threads,
            "nodes": self.nodes,
            "corpus": self.corpus.description,
            "started": self.began,
        }
        count = len(self.facts["devices"])
        if count != self.cell.devices:
            raise PtbenchError(f"{self.cell.path} got {count} devices, not {self.cell.devices}")
        if sentence := ignored_sentence():
            self.say(f"[{self.cell.path}] {sentence}")

    def train(self, checkpoint_minutes: float, signals: Signals) -> Run:
        """Train and score, from the last checkpoint if there is one that can be used."""
        self.checkpoints = checkpoints = Checkpoints(
            self.paths.checkpoints,
            self.identity(),
            lambda: self.clocks.seconds | {"total": self.total_seconds()},
            checkpoint_minutes,
            signals,
            self.attempt.check,
            self.say,
            self.sampler.totals,
        )
        with self.clocks("start_up"):
            resumed = checkpoints.latest(self.new_snapshot)
        if resumed:
            for clock, seconds in resumed.seconds.items():
                self.clocks.seconds[clock] += seconds
            self.sampler.add(resumed.hardware)
            self.say(f"[{self.cell.path}] goes on {checkpoints.position}")
        saved = resumed.saved if resumed else None
        signals.losable = True
        try:
            with self.sampler:
                return train(
                    self.backend, self.splits, self.clocks, self.report, checkpoints, saved
                )
        except InterruptionError:
            where = checkpoints.position or "before its first step"
            raise InterruptionError(
                f"{self.cell.path} was told to end, and stopped {where}; the same command goes on "
                "from there"
            ) from None

    def finish(self, run: Run, keep: Keep) -> Metrics:
        """Write the cell's files, `metrics.json` last, and close the attempt."""
        self.attempt.check()
        with self.clocks("checkpointing"):
            self.write_best_model(run, keep)
        # Measured while the replicas' processes are alive.
        peak, peak_on_devices = peak_memory_bytes(), self.backend.peak_device_memory()
        self.facts["attempts"] = self.attempt.count
        self.facts["finished"] = now()
        self.backend.close()
        self.clocks.seconds["total"] = self.total_seconds()
        metrics = self.metrics(run, peak, peak_on_devices)
        for name, text in {
            "recipe.yaml": recipe_yaml(self.specification),
            "history.csv": history_csv(run.history),
            "provenance.json": json.dumps(self.facts, indent=2) + "\n",
            "metrics.json": metrics.model_dump_json(indent=2) + "\n",
        }.items():
            write_atomically(self.paths.output / name, text)
        self.attempt.finish(metrics)
        if keep != "all":
            clear(self.paths.checkpoints)
        return metrics

    def identity(self) -> Identity:
        """Return what a checkpoint must have in common with this run to be of use to it."""
        facts = self.facts
        return Identity(
            cell=self.cell.path,
            fingerprint=self.specification.fingerprint,
            corpus=digest(self.paths.corpus),
            vocabulary_size=self.corpus.vocabulary_size,
            framework=f"{facts['framework_package']} {facts['framework_version']}",
        )

    def new_snapshot(self) -> dict[str, Any]:
        """Return the snapshot of a run that has not begun."""
        batch_size = self.splits.train.batch_size
        return self.backend.snapshot(self.backend.initial_state(batch_size, training=True))

    def total_seconds(self) -> float:
        """Return the age of this process plus what the attempts before it spent.

        Time spent waiting for another process is not counted.
        """
        age = time.time() - psutil.Process().create_time()
        return self.clocks.seconds["total"] + age - self.attempt.waited

    def report(self, progress: Progress) -> None:
        """Say how far the run is, in a line that names the cell."""
        cell = self.cell
        label = f"{cell.variant} {cell.framework} devices {cell.devices} seed {cell.seed}"
        where = f"[{label}] epoch {progress.epoch}/{progress.epochs}"
        speed = f"{progress.tokens_per_second:,.0f} tokens/s"
        train = f"train {progress.train_perplexity:.2f}"
        if progress.finished:
            valid = progress.finished.valid_perplexity
            self.say(f"{where}  {train}  valid {valid:.2f}  {speed}")
        else:
            self.say(f"{where}  {progress.fraction:.0%}  {train}  {speed}")

    def write_best_model(self, run: Run, keep: Keep) -> None:
        """Write `best.safetensors`: the parameters that were scored, and what they are of.

        Where there are none, or none are kept, there is no such file: one of an earlier run of the
        cell would be taken for this run's.
        """
        path = self.paths.checkpoints / "best.safetensors"
        remove_leftovers(path)
        if keep == "none" or run.best_parameters is None or run.best is None:
            path.unlink(missing_ok=True)
            return
        metadata = {
            "cell": self.cell.path,
            "specification": self.specification.text(),
            "vocabulary_size": str(self.corpus.vocabulary_size),
            "vocabulary_sha256": self.corpus.vocabulary_sha256,
            "epoch": str(run.best.epoch),
        }
        arrays = packed(run.best_parameters, self.recipe)
        write_arrays(path, arrays, metadata)

    def metrics(self, run: Run, peak: int, peak_on_devices: int | None) -> Metrics:
        """Return `metrics.json` of the finished run."""
        best, last = run.best, run.history[-1] if run.history else None
        size = self.corpus.vocabulary_size
        return Metrics(
            protocol=self.specification.protocol,
            fingerprint=self.specification.fingerprint,
            cell=self.cell,
            status="diverged" if run.diverged else "ok",
            reason=run.diverged,
            parameters=parameter_count(self.recipe, size),
            vocabulary_size=size,
            stopped=run.stopped,
            steps_per_epoch=len(self.splits.train),
            epochs=len(run.history),
            best_epoch=best.epoch if best else None,
            train=last and mean_score(last.train_nll, self.splits.train),
            valid=best and mean_score(best.valid_nll, self.splits.valid),
            test=run.test,
            test_accuracy=run.test_accuracy,
            tokens_per_second=run.tokens_per_second,
            seconds_per_epoch=run.seconds_per_epoch,
            seconds=Seconds(**self.clocks.seconds),
            attempts=self.facts["attempts"],
            peak_memory_bytes=peak,
            peak_device_memory_bytes=peak_on_devices,
            # what is sampled is this node alone
            hardware=self.sampler.hardware() if self.nodes == 1 else None,
        )


def mean_score(nll: float, feed: Feed) -> Score:
    """Return the score of a split from its mean nll [nats/token]."""
    return Score(nll=nll, perplexity=perplexity(nll), tokens=feed.predicted_tokens)


def attempt_at(
    cell: Cell, specification: Specification, paths: Paths, log: Path | None = None
) -> Attempt:
    """Return an attempt at the cell, not opened yet."""
    text = digest(paths.corpus)
    return Attempt(paths.attempts, cell.path, specification.fingerprint, text, log)


def digest(corpus: Path) -> str:
    """Return twelve hexadecimal digits that change with a prepared corpus' text.

    They are empty if there is no such corpus; `open_corpus` then says what to do.
    """
    try:
        description = json.loads((corpus / "corpus.json").read_text(encoding="utf-8"))
        facts = [description.get(key) for key in ("raw_sha256", "subset", "tokens")]
    except (OSError, ValueError, AttributeError):
        return ""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def read_specification(text: str, code: str | None = None) -> Specification:
    """Return a specification from its text.

    Args:
        text: as `Specification.text` gives it.
        code: digest of the code that it was planned with; None: of any.

    Raises:
        PtbenchError: if it is not valid, of another protocol, or planned with other code.
    """
    if code is not None and code != code_digest():
        raise PtbenchError(
            "the code that trains was changed after this run had begun, and cells of one run are "
            "trained with one code; give the same command again to train the rest with the new one"
        )
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


def feed(corpus: Corpus, recipe: Recipe, devices: int, seed: int = 0) -> Splits:
    """Return the corpus as the recipe feeds it; training batches are for all devices together.

    Args:
        corpus: the text.
        recipe: says how.
        devices: number of replicas.
        seed: of the lengths of windows, where they vary.

    Raises:
        PtbenchError: if a split is too short for one batch.
    """
    return Splits(
        train=feed_split(corpus, recipe, "train", recipe.global_batch_size(devices), True, seed),
        valid=feed_split(corpus, recipe, "valid", recipe.evaluation_batch_size),
        test=feed_split(corpus, recipe, "test", recipe.test_batch_size),
    )


def feed_split(
    corpus: Corpus,
    recipe: Recipe,
    split: Split,
    batch_size: int,
    training: bool = False,
    seed: int = 0,
) -> Feed:
    """Return one split of the corpus as the recipe feeds it.

    Raises:
        PtbenchError: if it is too short for one batch.
    """
    tokens: Source = getattr(corpus, split)
    budget = None if recipe.budget == "full" else BUDGETS[recipe.budget]
    length = recipe.sequence_length
    try:
        if recipe.feeding == "windows":
            windows = Windows(tokens, batch_size, length, wraps=training)
            fed: Feed = Overwritten(windows) if recipe.aliased and training else windows
        elif recipe.feeding == "sentences":
            fed = Sentences(tokens, batch_size, corpus.end_of_sentence)
        elif recipe.window_lengths == "varied" and training:
            fed = VariedStreams(tokens, batch_size, length, seed, budget and budget.batches)
        else:
            fed = ParallelStreams(tokens, batch_size, length)
    except ValueError as error:
        raise PtbenchError(f"corpus {recipe.corpus_folder}: {error}") from error
    if budget:
        fed = First(fed, budget.batches if training else budget.evaluation_batches)
    return Prefetched(fed, recipe.prefetch) if recipe.prefetch else fed


def create_backend(
    cell: Cell, specification: Specification, vocabulary_size: int, threads: int, nodes: int = 1
) -> Backend:
    """Return the cell's model with its initial parameters, on its devices."""
    recipe, accelerator = specification.recipe.within_budget(), specification.accelerator
    setup = Setup(recipe, vocabulary_size, cell.devices, cell.seed, accelerator, threads, nodes)
    return create(cell.framework, setup)


def recipe_yaml(specification: Specification) -> str:
    """Return the resolved recipe as YAML; JSON scalars are YAML, so no library is needed."""
    head = {"variant": specification.variant, "fingerprint": specification.fingerprint}
    values = head | specification.recipe.model_dump(mode="json")
    return "".join(f"{key}: {json.dumps(value)}\n" for key, value in values.items())
