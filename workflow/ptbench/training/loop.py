"""The training loop: framework-neutral, and ignorant of files.

Epoch by epoch: train on every batch in order, validate, remember the best parameters; at the end
score the test split once with those. `cell.py` calls it and writes the results down.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from ptbench.backends.contract import Backend, Parameters, Scalar
from ptbench.configuration.models import Recipe
from ptbench.corpus.batching import Feed
from ptbench.measurement.clocks import Clocks
from ptbench.training.records import Epoch, Score, perplexity, score
from ptbench.training.schedules import Stop, learning_rate, rolls_back, stop

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
class Run:
    """What training gave."""

    history: list[Epoch] = field(default_factory=list)
    best: Epoch | None = None
    best_parameters: Parameters | None = None
    test: Score | None = None
    diverged: str | None = None  # why, if it did
    stopped: Stop | None = None  # why training ended, if it did not diverge

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


class TrainedEpoch(NamedTuple):
    """What one pass over the training split gave."""

    nll: float  # summed [nats]
    gradient_norm: float  # mean over steps
    learning_rate: float  # of the last step
    seconds: float  # of training, steps that compile included
    tokens_per_second: float  # steps that compile left out


def train(
    backend: Backend,
    recipe: Recipe,
    splits: Splits,
    clocks: Clocks,
    watch: Callable[[Progress], None],
) -> Run:
    """Train `backend` as the recipe says and score it.

    A loss that is not finite, or a perplexity above the recipe's limit, ends the run early; it is
    then diverged, which is a result, and keeps the history of its whole epochs.
    """
    run = Run()
    warm_up_evaluation(backend, splits, clocks)
    while run.stopped is None:
        number = len(run.history) + 1
        if rolls_back(recipe, run.history) and run.best_parameters is not None:
            backend.load_parameters(run.best_parameters)
        trained = train_epoch(backend, recipe, splits.train, run.history, clocks, watch)
        run.diverged = divergence(recipe, "training", number, trained.nll, splits.train)
        if run.diverged:
            return run
        valid, evaluation_seconds = evaluate(backend, splits.valid, clocks)
        train_nll = trained.nll / splits.train.predicted_tokens
        epoch = Epoch(
            epoch=number,
            learning_rate=trained.learning_rate,
            train_nll=train_nll,
            train_perplexity=perplexity(train_nll),
            valid_nll=valid.nll,
            valid_perplexity=valid.perplexity,
            gradient_norm=trained.gradient_norm,
            tokens_per_second=trained.tokens_per_second,
            training_seconds=trained.seconds,
            evaluation_seconds=evaluation_seconds,
        )
        run.history.append(epoch)
        watch(Progress(number, recipe.epochs, 1.0, epoch.train_perplexity,
                       trained.tokens_per_second, finished=epoch))  # fmt: skip
        valid_nll = valid.nll * valid.tokens
        run.diverged = divergence(recipe, "validation", number, valid_nll, splits.valid)
        if run.diverged:
            return run
        if run.best is None or epoch.valid_nll < run.best.valid_nll:
            run.best = epoch
            with clocks("checkpointing"):
                run.best_parameters = backend.parameters()
        run.stopped = stop(recipe, run.history)
    assert run.best_parameters is not None  # a valid_nll that is not finite has diverged
    backend.load_parameters(run.best_parameters)
    run.test, _ = evaluate(backend, splits.test, clocks)
    return run


def divergence(recipe: Recipe, split: str, epoch: int, nll_sum: float, feed: Feed) -> str | None:
    """Why a run with this loss counts as diverged; None if it does not."""
    value = perplexity(nll_sum / feed.predicted_tokens)
    if math.isnan(nll_sum) or math.isinf(nll_sum):
        return f"the {split} loss of epoch {epoch} is not finite"
    if value > recipe.divergence_perplexity:
        limit = recipe.divergence_perplexity
        return f"the {split} perplexity of epoch {epoch} is {value:.4g}, above {limit:g}"
    return None


def warm_up_evaluation(backend: Backend, splits: Splits, clocks: Clocks) -> None:
    """Let the framework compile its evaluation on its own clock; nothing is kept."""
    with clocks("compile"):
        for feed in (splits.valid, splits.test):
            state = backend.initial_state(feed.batch_size, training=False)
            for batch in feed.shapes():
                float(backend.evaluate_step(*batch, state).nll)


def train_epoch(
    backend: Backend,
    recipe: Recipe,
    feed: Feed,
    history: list[Epoch],
    clocks: Clocks,
    watch: Callable[[Progress], None],
) -> TrainedEpoch:
    """One pass over the training split. Stops early at a loss that is not finite."""
    nll_sum = norm_sum = 0.0
    tokens = steps = timed_tokens = 0
    pending: list[tuple[Scalar, Scalar]] = []
    clock_before = dict(clocks.seconds)
    reported = time.perf_counter()
    number, rate = len(history) + 1, 0.0
    zero_state = state = backend.initial_state(feed.batch_size, training=True)
    batches = feed.epoch(number)
    while steps < len(feed) and math.isfinite(nll_sum):
        # A run of steps that ends in a fetch, all on one clock.
        warming = backend.step < WARM_UP_STEPS
        length = WARM_UP_STEPS if warming else FETCH_EVERY
        with clocks("compile" if warming else "training"):
            for batch in itertools.islice(batches, length):
                rate = learning_rate(recipe, history, (steps + 1) / len(feed))
                result = backend.train_step(*batch, state, rate)
                state = result.state if feed.carries_state else zero_state
                pending.append((result.nll, result.gradient_norm))
                count = int(batch.mask.sum())
                tokens += count
                timed_tokens += 0 if warming else count
                steps += 1
            nll_sum += sum(float(nll) for nll, _ in pending)
            norm_sum += sum(float(norm) for _, norm in pending)
            pending.clear()
        if timed_tokens and time.perf_counter() - reported > REPORT_SECONDS:
            reported = time.perf_counter()
            seconds = clocks.seconds["training"] - clock_before.get("training", 0.0)
            watch(Progress(number, recipe.epochs, steps / len(feed),
                           perplexity(nll_sum / tokens), timed_tokens / seconds))  # fmt: skip
    if math.isfinite(nll_sum) and tokens != feed.predicted_tokens:
        raise AssertionError(f"trained on {tokens} of {feed.predicted_tokens} tokens")
    spent = {
        clock: clocks.seconds[clock] - clock_before.get(clock, 0.0)
        for clock in ("compile", "training")
    }
    # A corpus shorter than the warm-up has no warm speed; what there is, is reported.
    speed = timed_tokens / spent["training"] if timed_tokens else tokens / spent["compile"]
    return TrainedEpoch(nll_sum, norm_sum / max(steps, 1), rate, sum(spent.values()), speed)


def evaluate(backend: Backend, feed: Feed, clocks: Clocks) -> tuple[Score, float]:
    """Score of a split, every predicted token counted once, and the seconds it took."""
    before = clocks.seconds["evaluation"]
    nll_sum, tokens = 0.0, 0
    pending: list[Scalar] = []
    with clocks("evaluation"):
        zero_state = state = backend.initial_state(feed.batch_size, training=False)
        for batch in feed.epoch(1):
            nll, state = backend.evaluate_step(*batch, state)
            state = state if feed.carries_state else zero_state
            pending.append(nll)
            tokens += int(batch.mask.sum())
            if len(pending) == FETCH_EVERY:
                nll_sum += sum(map(float, pending))
                pending.clear()
        nll_sum += sum(map(float, pending))
    if tokens != feed.predicted_tokens:
        raise AssertionError(f"evaluated {tokens} of {feed.predicted_tokens} tokens")
    return score(nll_sum, tokens), clocks.seconds["evaluation"] - before
