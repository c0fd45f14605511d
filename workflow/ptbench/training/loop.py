"""The training loop, the same for all frameworks. It reads and writes no files.

Train on every batch in order, validate, remember the best parameters, epoch after epoch; at the end
score the test split with those: its perplexity, then its accuracy. `cell.py` calls it and writes
down the result. A `Keeper` saves what another process needs to continue the run.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ptbench.backends.base import Backend, Scalar, State
from ptbench.corpus.batching import Batch, Feed
from ptbench.errors import InterruptionError
from ptbench.model.parameters import Parameters
from ptbench.training.clocks import Clocks
from ptbench.training.records import Epoch, Score, perplexity, score
from ptbench.training.schedules import Stop, averages_since, learning_rate, rolls_back, stop

WARM_UP_STEPS = 3  # steps that may compile or fill caches; trained on, but not counted as speed
FETCH_EVERY = 50  # steps between fetches of the losses from the device
REPORT_SECONDS = 10.0  # least time between two progress reports within an epoch


class Splits(NamedTuple):
    """The corpus as the recipe batches it."""

    train: Feed
    valid: Feed
    test: Feed


@dataclass
class Progress:
    """How far a run is, for whoever watches it."""

    epoch: int
    epochs: int
    fraction: float  # of the epoch's steps
    train_perplexity: float
    tokens_per_second: float
    finished: Epoch | None = None  # set once the epoch is over


@dataclass
class Sums:
    """What the epoch under way has added up so far."""

    steps: int = 0
    nll: float = 0.0  # summed [nats]
    gradient_norm: float = 0.0  # summed over steps
    learning_rate: float = 0.0  # of the last step
    tokens: int = 0
    timed_tokens: int = 0  # without those of steps that compile
    compile_seconds: float = 0.0
    training_seconds: float = 0.0

    def add_seconds(self, clock: str, seconds: float) -> None:
        """Add to the seconds of one of the two clocks of training steps."""
        if clock == "compile":
            self.compile_seconds += seconds
        else:
            self.training_seconds += seconds

    @property
    def tokens_per_second(self) -> float:
        """Speed of the steps after the warm-up; of all steps where there are no others."""
        if self.timed_tokens:
            return self.timed_tokens / self.training_seconds
        return self.tokens / self.compile_seconds


@dataclass
class Run:
    """What training has given so far."""

    history: list[Epoch] = field(default_factory=list)
    best: Epoch | None = None  # of the lowest validation nll
    best_parameters: Parameters | None = None
    sums: Sums | None = None  # of the epoch under way; None between two
    test: Score | None = None
    test_accuracy: float | None = None
    diverged: str | None = None  # why, if it did
    stopped: Stop | None = None  # why training ended, if it did not diverge
    steps_here: int = 0  # training steps of this process, the first of which compile

    @property
    def tokens_per_second(self) -> float | None:
        """Median over the epochs [tokens/s]; None if no whole epoch was trained."""
        rates = [epoch.tokens_per_second for epoch in self.history]
        return statistics.median(rates) if rates else None

    @property
    def seconds_per_epoch(self) -> float | None:
        """Median over the epochs of training and validation together [s]."""
        totals = [e.training_seconds + e.validation_seconds for e in self.history]
        return statistics.median(totals) if totals else None


@dataclass
class Saved:
    """All that another process needs to continue a run, bit for bit."""

    run: Run
    snapshot: dict[str, npt.NDArray[Any]]  # the backend's own


class Keeper:
    """Saves a run so that it can outlive its process; this one does not. See `checkpoints.py`."""

    def interrupted(self) -> bool:
        """Return whether the process has been told to end. Called at every step."""
        return False

    def due(self) -> bool:
        """Return whether it is time for a checkpoint within an epoch."""
        return False

    def save(self, saved: Saved) -> None:
        """Keep this."""


def train(
    backend: Backend,
    splits: Splits,
    clocks: Clocks,
    watch: Callable[[Progress], None],
    keeper: Keeper | None = None,
    saved: Saved | None = None,
) -> Run:
    """Train a backend as its recipe says, and score it.

    A loss that is not finite, or a perplexity above the recipe's limit, ends the run early. It has
    then diverged, which is a result, and keeps the history of its whole epochs.

    Args:
        backend: the new model on its devices.
        splits: the text.
        clocks: where to count the seconds.
        watch: called with the progress.
        keeper: gets a checkpoint after every epoch, and within an epoch when one is due.
        saved: where to continue, to the same end as a run that never stopped.

    Raises:
        InterruptionError: once the keeper says that the process has been told to end. The keeper
            has every step that was taken.
    """
    trainer = Trainer(backend, splits, clocks, watch, keeper or Keeper())
    trainer.start(saved)
    run = trainer.run
    while run.stopped is None and run.diverged is None:
        trainer.epoch()
    if run.diverged is None:
        trainer.finish()
    return run


class Trainer:
    """A run under way: `start`, then `epoch` until it has stopped or diverged, then `finish`."""

    def __init__(
        self,
        backend: Backend,
        splits: Splits,
        clocks: Clocks,
        watch: Callable[[Progress], None],
        keeper: Keeper,
    ) -> None:
        """Take what `train` is given."""
        self.backend, self.splits, self.clocks = backend, splits, clocks
        self.watch, self.keeper = watch, keeper
        self.recipe = backend.recipe
        self.run = Run()
        self.state: State = None  # the recurrent state after the last training step

    def start(self, saved: Saved | None) -> None:
        """Compile what can be compiled, and restore a saved run."""
        self.warm_up_evaluation()
        self.warm_up_training()
        if saved:
            self.run = saved.run
            with self.clocks("start_up"):
                self.state = self.backend.restore(saved.snapshot)
        if self.run.history:
            self.run.stopped = stop(self.recipe, self.run.history)

    def epoch(self) -> None:
        """Train on what is left of one pass over the training split, validate, and save."""
        run = self.run
        if run.sums is None:
            self.begin_epoch()
        self.train_epoch()
        assert run.sums is not None
        run.diverged = self.divergence("training", run.sums.nll, self.splits.train)
        if run.diverged:
            return
        valid, seconds, parameters = self.validate()
        run.diverged = self.divergence("validation", valid.nll * valid.tokens, self.splits.valid)
        self.record(valid, seconds)
        if run.diverged:
            return
        if parameters is not None:
            run.best, run.best_parameters = run.history[-1], parameters
        self.save()
        run.stopped = stop(self.recipe, run.history)
        if self.keeper.interrupted():
            raise InterruptionError

    def finish(self) -> None:
        """Score the test split with the best parameters."""
        assert self.run.best_parameters is not None  # a valid_nll that is not finite has diverged
        self.backend.load_parameters(self.run.best_parameters)
        with self.clocks("test"):
            self.run.test = evaluate(self.backend, self.splits.test, self.keeper)
        with self.clocks("accuracy"):
            self.run.test_accuracy = accuracy(self.backend, self.splits.test, self.keeper)

    def warm_up_evaluation(self) -> None:
        """Let the framework compile its evaluation on a clock of its own; nothing is kept."""
        with self.clocks("compile"):
            for feed in (self.splits.valid, self.splits.test):
                state = self.backend.initial_state(feed.batch_size, training=False)
                for batch in feed.shapes():
                    float(self.backend.evaluate_step(batch, state).nll)
                    self.check_interruption()

    def warm_up_training(self) -> None:
        """Let the framework compile a training step of every shape, if there are several.

        Sentences come in one shape for each length, and each would compile when it first comes,
        which may be late in an epoch. A single shape compiles in the first steps of the run. The
        model stays as it was.
        """
        feed, backend = self.splits.train, self.backend
        shapes = feed.shapes()
        if len(shapes) == 1:
            return
        with self.clocks("compile"):
            state = backend.initial_state(feed.batch_size, training=True)
            before = backend.snapshot(state)
            for batch in shapes:
                float(backend.train_step(batch, state, 0.0).nll)
                self.check_interruption()
            backend.restore(before)

    def begin_epoch(self) -> None:
        """Start from a zero state, and from the best parameters where the schedule says so."""
        run = self.run
        if rolls_back(self.recipe, run.history) and run.best_parameters is not None:
            self.backend.load_parameters(run.best_parameters)
        run.sums = Sums()
        self.state = self.backend.initial_state(self.splits.train.batch_size, training=True)

    def train_epoch(self) -> None:
        """Train to the end of the split, or until a loss is not finite.

        Saves and ends the run where it may be interrupted: after each fetch, off all clocks.
        """
        run, feed = self.run, self.splits.train
        sums = run.sums
        assert sums is not None
        since = averages_since(self.recipe, run.history)
        self.backend.average_from = None if since is None else since * len(feed)
        reported = time.perf_counter()
        # Closed at once, whatever happens: a thread may be preparing batches.
        with contextlib.closing(feed.epoch(len(run.history) + 1, sums.steps)) as batches:
            while sums.steps < len(feed):
                self.train_to_fetch(batches, sums)
                if not math.isfinite(sums.nll):
                    return
                if sums.timed_tokens and time.perf_counter() - reported > REPORT_SECONDS:
                    reported = time.perf_counter()
                    self.report(sums.nll / sums.tokens, sums)
                self.pause()
        if sums.tokens != feed.predicted_tokens:
            raise AssertionError(f"trained on {sums.tokens} of {feed.predicted_tokens} tokens")

    def train_to_fetch(self, batches: Iterator[Batch], sums: Sums) -> None:
        """Take the steps up to the next fetch of losses, all on one clock."""
        warming = self.run.steps_here < WARM_UP_STEPS
        clock = "compile" if warming else "training"
        before = self.clocks.seconds[clock]
        pending: list[tuple[Scalar, Scalar]] = []
        with self.clocks(clock):
            for batch in itertools.islice(batches, WARM_UP_STEPS if warming else FETCH_EVERY):
                pending.append(self.step(batch, sums, warming))
                if self.keeper.interrupted():
                    break
            # One by one, so that the rounding of a sum does not depend on interruptions.
            for nll, norm in pending:
                sums.nll += float(nll)
                sums.gradient_norm += float(norm)
        sums.add_seconds(clock, self.clocks.seconds[clock] - before)

    def step(self, batch: Batch, sums: Sums, warming: bool) -> tuple[Scalar, Scalar]:
        """Take one training step; return its nll and gradient norm, not fetched yet."""
        feed = self.splits.train
        rate = learning_rate(self.recipe, self.run.history, (sums.steps + 1) / len(feed))
        share = 1.0
        if self.recipe.window_lengths == "varied":
            share = np.count_nonzero(batch.mask.any(axis=1)) / self.recipe.sequence_length
        result = self.backend.train_step(batch, self.state, rate * share)
        if feed.carries_state:  # elsewhere it stays the zero state that the epoch began with
            self.state = result.state
        sums.learning_rate = rate
        tokens = int(batch.mask.sum())
        sums.tokens += tokens
        sums.timed_tokens += 0 if warming else tokens
        sums.steps += 1
        self.run.steps_here += 1
        return result.nll, result.gradient_norm

    def validate(self) -> tuple[Score, float, Parameters | None]:
        """Score the validation split.

        Returns:
            The score, the seconds it took, and the parameters that were scored if they are the
            best so far.
        """
        best = self.run.best
        try:
            with self.mean_parameters():
                before = self.clocks.seconds["validation"]
                with self.clocks("validation"):
                    valid = evaluate(self.backend, self.splits.valid, self.keeper)
                seconds = self.clocks.seconds["validation"] - before
                better = best is None or valid.nll < best.valid_nll
                with self.clocks("checkpointing"):
                    return valid, seconds, self.backend.parameters() if better else None
        except InterruptionError:
            self.save()
            raise

    @contextlib.contextmanager
    def mean_parameters(self) -> Iterator[None]:
        """Put asgd's mean in the place of the parameters for a block, once the mean has begun."""
        if averages_since(self.recipe, self.run.history) is None:
            yield
            return
        backend = self.backend
        with self.clocks("checkpointing"):
            trained = backend.snapshot(self.state)
            mean = {name: trained[f"optimizer.average.{name}"] for name in backend.shapes}
            backend.load_parameters(mean)
        try:
            yield
        finally:
            with self.clocks("checkpointing"):
                self.state = backend.restore(trained)

    def record(self, valid: Score, validation_seconds: float) -> None:
        """Add the epoch under way to the history, and report it."""
        run = self.run
        sums = run.sums
        assert sums is not None
        train_nll = sums.nll / self.splits.train.predicted_tokens
        epoch = Epoch(
            epoch=len(run.history) + 1,
            learning_rate=sums.learning_rate,
            train_nll=train_nll,
            train_perplexity=perplexity(train_nll),
            valid_nll=valid.nll,
            valid_perplexity=valid.perplexity,
            gradient_norm=sums.gradient_norm / max(sums.steps, 1),
            tokens_per_second=sums.tokens_per_second,
            training_seconds=sums.compile_seconds + sums.training_seconds,
            validation_seconds=validation_seconds,
        )
        self.report(train_nll, sums, epoch)
        run.history.append(epoch)
        run.sums = None

    def report(self, train_nll: float, sums: Sums, finished: Epoch | None = None) -> None:
        """Tell whoever watches how far the run is."""
        self.watch(
            Progress(
                len(self.run.history) + 1,
                self.recipe.epochs,
                sums.steps / len(self.splits.train),
                perplexity(train_nll),
                sums.tokens_per_second,
                finished,
            )
        )

    def divergence(self, split: str, nll_sum: float, feed: Feed) -> str | None:
        """Return why a run with this loss has diverged; None if it has not."""
        epoch, limit = len(self.run.history) + 1, self.recipe.divergence_perplexity
        value = perplexity(nll_sum / feed.predicted_tokens)
        if not math.isfinite(nll_sum):
            return f"the {split} loss of epoch {epoch} is not finite"
        if value > limit:
            return f"the {split} perplexity of epoch {epoch} is {value:.4g}, above {limit:g}"
        return None

    def save(self) -> None:
        """Give the keeper all that another process needs to continue from here."""
        with self.clocks("checkpointing"):
            self.keeper.save(Saved(self.run, self.backend.snapshot(self.state)))

    def pause(self) -> None:
        """Save if it is time to; save and raise InterruptionError if the process shall end."""
        interrupted = self.keeper.interrupted()
        if interrupted or self.keeper.due():
            self.save()
        if interrupted:
            raise InterruptionError

    def check_interruption(self) -> None:
        """Raise InterruptionError if the process has been told to end, where nothing is lost."""
        if self.keeper.interrupted():
            raise InterruptionError


def evaluate(backend: Backend, feed: Feed, keeper: Keeper | None = None) -> Score:
    """Return the score of a split, every predicted token counted once.

    Raises:
        InterruptionError: once the keeper says that the process has been told to end.
    """
    nll_sum, tokens = 0.0, 0
    pending: list[Scalar] = []
    with contextlib.closing(feed.epoch(1)) as batches:
        zero_state = state = backend.initial_state(feed.batch_size, training=False)
        for batch in batches:
            nll, state = backend.evaluate_step(batch, state)
            state = state if feed.carries_state else zero_state
            pending.append(nll)
            tokens += int(batch.mask.sum())
            if keeper and keeper.interrupted():
                raise InterruptionError
            if len(pending) == FETCH_EVERY:
                nll_sum += sum(map(float, pending))
                pending.clear()
        nll_sum += sum(map(float, pending))
    if tokens != feed.predicted_tokens:
        raise AssertionError(f"evaluated {tokens} of {feed.predicted_tokens} tokens")
    return score(nll_sum, tokens)


def accuracy(backend: Backend, feed: Feed, keeper: Keeper | None = None) -> float:
    """Return the share of a split's tokens that the model held for the most probable.

    Raises:
        InterruptionError: once the keeper says that the process has been told to end.
    """
    hits = 0
    with contextlib.closing(feed.epoch(1)) as batches:
        zero_state = state = backend.initial_state(feed.batch_size, training=False)
        for batch in batches:
            log_p, state = backend.next_token_log_probabilities(batch.inputs, state)
            state = state if feed.carries_state else zero_state
            right = log_p.argmax(axis=-1) == batch.targets
            hits += int(np.count_nonzero(right & (batch.mask > 0)))
            if keeper and keeper.interrupted():
                raise InterruptionError
    return hits / feed.predicted_tokens
