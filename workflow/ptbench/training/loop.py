"""The training loop: framework-neutral, and ignorant of files.

Epoch by epoch: train on every batch in order, validate, remember the best parameters; at the end
score the test split once with those. `cell.py` calls it and writes the results down, and a `Keeper`
is given what it needs to go on where it was, should the process end.
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

import numpy.typing as npt

from ptbench.backends.base import Backend, Scalar, State
from ptbench.corpus.batching import Feed
from ptbench.errors import InterruptionError
from ptbench.model.parameters import Parameters
from ptbench.model.recipe import Recipe
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
    """Where a run is, for whoever watches it."""

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
        if clock == "compile":
            self.compile_seconds += seconds
        else:
            self.training_seconds += seconds

    @property
    def tokens_per_second(self) -> float:
        """Of warm steps; a corpus shorter than the warm-up has none, and what there is counts."""
        if self.timed_tokens:
            return self.timed_tokens / self.training_seconds
        return self.tokens / self.compile_seconds


@dataclass
class Run:
    """What training gave so far."""

    history: list[Epoch] = field(default_factory=list)
    best: Epoch | None = None  # of the lowest validation nll
    best_parameters: Parameters | None = None
    sums: Sums | None = None  # of the epoch under way; None between two
    test: Score | None = None
    diverged: str | None = None  # why, if it did
    stopped: Stop | None = None  # why training ended, if it did not diverge
    state: State = None  # the recurrent one, where the epoch under way is
    steps_here: int = 0  # training steps of this process, the first of which compile

    @property
    def tokens_per_second(self) -> float | None:
        """Median over the epochs [tokens/s]; None if no whole epoch was trained."""
        rates = [epoch.tokens_per_second for epoch in self.history]
        return statistics.median(rates) if rates else None

    @property
    def seconds_per_epoch(self) -> float | None:
        """Median over the epochs of training and validation together [s]."""
        totals = [e.training_seconds + e.evaluation_seconds for e in self.history]
        return statistics.median(totals) if totals else None


@dataclass
class Saved:
    """All that a run needs to go on in another process, bit for bit."""

    run: Run
    snapshot: dict[str, npt.NDArray[Any]]  # the backend's own


class Keeper:
    """What lets a run outlive its process; this one does not. See `checkpoints.py`."""

    def interrupted(self) -> bool:
        """Whether the process has been told to end. Asked at every step, so it must be quick."""
        return False

    def due(self) -> bool:
        """Whether it is time for a checkpoint within an epoch."""
        return False

    def save(self, saved: Saved) -> None:
        """Keep this; called outside all clocks but that of checkpointing."""


def train(
    backend: Backend,
    recipe: Recipe,
    splits: Splits,
    clocks: Clocks,
    watch: Callable[[Progress], None],
    keeper: Keeper | None = None,
    saved: Saved | None = None,
) -> Run:
    """Train `backend` as the recipe says and score it.

    A loss that is not finite, or a perplexity above the recipe's limit, ends the run early; it is
    then diverged, which is a result, and keeps the history of its whole epochs.

    Args:
        backend: new, on its devices.
        recipe: what to do.
        splits: on what.
        clocks: where the time goes.
        watch: is told of progress.
        keeper: is given a checkpoint after every epoch, and when it wants one within.
        saved: goes on from there, to the same end as a run that never stopped.

    Raises:
        InterruptionError: once the keeper says so; what had been done has been saved.
    """
    keeper = keeper or Keeper()
    run = Run()
    warm_up_evaluation(backend, splits, clocks, keeper)
    warm_up_training(backend, splits.train, clocks, keeper)
    if saved:
        run = saved.run
        with clocks("start_up"):
            run.state = backend.restore(saved.snapshot)

    def keep() -> None:
        with clocks("checkpointing"):
            keeper.save(Saved(run, backend.snapshot(run.state)))

    def pause() -> None:
        if keeper.interrupted():
            keep()
            raise InterruptionError
        if keeper.due():
            keep()

    run.stopped = stop(recipe, run.history) if run.history else None
    while run.stopped is None:
        number = len(run.history) + 1
        if run.sums is None:
            if rolls_back(recipe, run.history) and run.best_parameters is not None:
                backend.load_parameters(run.best_parameters)
            run.sums = Sums()
            run.state = backend.initial_state(splits.train.batch_size, training=True)
        train_epoch(backend, recipe, splits.train, run, clocks, watch, keeper, pause)
        sums = run.sums
        run.diverged = divergence(recipe, "training", number, sums.nll, splits.train)
        if run.diverged:
            return run
        try:
            with mean_parameters(backend, recipe, run, clocks):
                valid, evaluation_seconds = evaluate(backend, splits.valid, clocks, keeper)
                better = run.best is None or valid.nll < run.best.valid_nll
                with clocks("checkpointing"):
                    scored = backend.parameters() if better else None
        except InterruptionError:
            keep()
            raise
        train_nll = sums.nll / splits.train.predicted_tokens
        epoch = Epoch(
            epoch=number,
            learning_rate=sums.learning_rate,
            train_nll=train_nll,
            train_perplexity=perplexity(train_nll),
            valid_nll=valid.nll,
            valid_perplexity=valid.perplexity,
            gradient_norm=sums.gradient_norm / max(sums.steps, 1),
            tokens_per_second=sums.tokens_per_second,
            training_seconds=sums.compile_seconds + sums.training_seconds,
            evaluation_seconds=evaluation_seconds,
        )
        run.history.append(epoch)
        run.sums = None
        watch(Progress(number, recipe.epochs, 1.0, epoch.train_perplexity,
                       epoch.tokens_per_second, finished=epoch))  # fmt: skip
        valid_nll = valid.nll * valid.tokens
        run.diverged = divergence(recipe, "validation", number, valid_nll, splits.valid)
        if run.diverged:
            return run
        if scored is not None:
            run.best, run.best_parameters = epoch, scored
        keep()
        run.stopped = stop(recipe, run.history)
        if keeper.interrupted():
            raise InterruptionError
    assert run.best_parameters is not None  # a valid_nll that is not finite has diverged
    backend.load_parameters(run.best_parameters)
    run.test, _ = evaluate(backend, splits.test, clocks, keeper)
    return run


@contextlib.contextmanager
def mean_parameters(backend: Backend, recipe: Recipe, run: Run, clocks: Clocks) -> Iterator[None]:
    """asgd's mean in the place of the parameters it is of, once it has begun; else nothing."""
    if averages_since(recipe, run.history) is None:
        yield
        return
    with clocks("checkpointing"):
        trained = backend.snapshot(run.state)
        backend.load_parameters({n: trained[f"optimizer.average.{n}"] for n in backend.shapes})
    try:
        yield
    finally:
        with clocks("checkpointing"):
            run.state = backend.restore(trained)


def divergence(recipe: Recipe, split: str, epoch: int, nll_sum: float, feed: Feed) -> str | None:
    """Why a run with this loss counts as diverged; None if it does not."""
    value = perplexity(nll_sum / feed.predicted_tokens)
    if math.isnan(nll_sum) or math.isinf(nll_sum):
        return f"the {split} loss of epoch {epoch} is not finite"
    if value > recipe.divergence_perplexity:
        limit = recipe.divergence_perplexity
        return f"the {split} perplexity of epoch {epoch} is {value:.4g}, above {limit:g}"
    return None


def warm_up_evaluation(backend: Backend, splits: Splits, clocks: Clocks, keeper: Keeper) -> None:
    """Let the framework compile its evaluation on its own clock; nothing is kept."""
    with clocks("compile"):
        for feed in (splits.valid, splits.test):
            state = backend.initial_state(feed.batch_size, training=False)
            for batch in feed.shapes():
                float(backend.evaluate_step(batch, state).nll)
                if keeper.interrupted():
                    raise InterruptionError


def warm_up_training(backend: Backend, feed: Feed, clocks: Clocks, keeper: Keeper) -> None:
    """Let the framework compile a training step of every shape, if there are several.

    Sentences come in one for each length, and each compiles when it first comes, which may be late
    in an epoch. A single shape compiles in the first steps of the run. The model stays as it was.
    """
    shapes = feed.shapes()
    if len(shapes) == 1:
        return
    with clocks("compile"):
        state = backend.initial_state(feed.batch_size, training=True)
        before = backend.snapshot(state)
        for batch in shapes:
            float(backend.train_step(batch, state, 0.0).nll)
            if keeper.interrupted():
                raise InterruptionError
        backend.restore(before)


def train_epoch(
    backend: Backend,
    recipe: Recipe,
    feed: Feed,
    run: Run,
    clocks: Clocks,
    watch: Callable[[Progress], None],
    keeper: Keeper,
    pause: Callable[[], None],
) -> None:
    """What is left of a pass over the training split, added to `run.sums`.

    Calls `pause` wherever the run may be saved: after each fetch, off all clocks. Stops early at a
    loss that is not finite.
    """
    sums = run.sums
    assert sums is not None
    pending: list[tuple[Scalar, Scalar]] = []
    reported = time.perf_counter()
    number = len(run.history) + 1
    since = averages_since(recipe, run.history)
    backend.average_from = None if since is None else since * len(feed)
    zero_state = backend.initial_state(feed.batch_size, training=True)
    # Closed at once, whatever happens: a thread may be preparing batches.
    with contextlib.closing(feed.epoch(number, sums.steps)) as batches:
        while sums.steps < len(feed):
            # A run of steps that ends in a fetch, all on one clock.
            warming = run.steps_here < WARM_UP_STEPS
            clock = "compile" if warming else "training"
            before = clocks.seconds[clock]
            with clocks(clock):
                for batch in itertools.islice(batches, WARM_UP_STEPS if warming else FETCH_EVERY):
                    rate = learning_rate(recipe, run.history, (sums.steps + 1) / len(feed))
                    result = backend.train_step(batch, run.state, rate)
                    run.state = result.state if feed.carries_state else zero_state
                    pending.append((result.nll, result.gradient_norm))
                    count = int(batch.mask.sum())
                    sums.learning_rate = rate
                    sums.tokens += count
                    sums.timed_tokens += 0 if warming else count
                    sums.steps += 1
                    run.steps_here += 1
                    if keeper.interrupted():
                        break
                # One by one: where a run was interrupted must not show in how its sums are rounded.
                for nll, norm in pending:
                    sums.nll += float(nll)
                    sums.gradient_norm += float(norm)
                pending.clear()
            sums.add_seconds(clock, clocks.seconds[clock] - before)
            if not math.isfinite(sums.nll):
                return
            if sums.timed_tokens and time.perf_counter() - reported > REPORT_SECONDS:
                reported = time.perf_counter()
                mean = perplexity(sums.nll / sums.tokens)
                fraction = sums.steps / len(feed)
                watch(Progress(number, recipe.epochs, fraction, mean, sums.tokens_per_second))
            pause()
    if sums.tokens != feed.predicted_tokens:
        raise AssertionError(f"trained on {sums.tokens} of {feed.predicted_tokens} tokens")


def evaluate(
    backend: Backend, feed: Feed, clocks: Clocks, keeper: Keeper | None = None
) -> tuple[Score, float]:
    """Score of a split, every predicted token counted once, and the seconds it took.

    Raises:
        InterruptionError: once the keeper says so.
    """
    before = clocks.seconds["evaluation"]
    nll_sum, tokens = 0.0, 0
    pending: list[Scalar] = []
    with clocks("evaluation"), contextlib.closing(feed.epoch(1)) as batches:
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
    return score(nll_sum, tokens), clocks.seconds["evaluation"] - before
