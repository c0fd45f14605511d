"""The training loop: framework-neutral, and ignorant of files.

Epoch by epoch: train on every window in order with state carried over, validate, remember the best
parameters; at the end score the test split once with those. `cell.py` calls it and writes the
results down.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from ptbench.backends.contract import Backend, Parameters, Scalar
from ptbench.configuration.models import Recipe
from ptbench.corpus.batching import ParallelStreams
from ptbench.measurement.clocks import Clocks
from ptbench.training.records import Epoch, Score, perplexity, score
from ptbench.training.schedules import learning_rate

WARM_UP_STEPS = 3  # steps that may compile or fill caches; trained on, but not counted as speed
FETCH_EVERY = 50  # steps between fetches of the losses from the device
REPORT_SECONDS = 10.0  # least time between two progress reports within an epoch


class Splits(NamedTuple):
    """The corpus as the recipe batches it."""

    train: ParallelStreams
    valid: ParallelStreams
    test: ParallelStreams


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
    for number in range(1, recipe.epochs + 1):
        rate = learning_rate(recipe, number)
        trained = train_epoch(backend, recipe, splits.train, rate, number, clocks, watch)
        if problem := divergence(recipe, "training", number, trained.nll, splits.train):
            run.diverged = problem
            return run
        valid, evaluation_seconds = evaluate(backend, splits.valid, clocks)
        train_nll = trained.nll / splits.train.predicted_tokens
        epoch = Epoch(
            epoch=number,
            learning_rate=rate,
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
        if problem := divergence(
            recipe, "validation", number, valid.nll * valid.tokens, splits.valid
        ):
            run.diverged = problem
            return run
        if run.best is None or epoch.valid_nll < run.best.valid_nll:
            run.best = epoch
            with clocks("checkpointing"):
                run.best_parameters = backend.parameters()
    assert run.best_parameters is not None  # a valid_nll that is not finite has diverged
    backend.load_parameters(run.best_parameters)
    run.test, _ = evaluate(backend, splits.test, clocks)
    return run


def divergence(
    recipe: Recipe, split: str, epoch: int, nll_sum: float, streams: ParallelStreams
) -> str | None:
    """Why a run with this loss counts as diverged; None if it does not."""
    value = perplexity(nll_sum / streams.predicted_tokens)
    if math.isnan(nll_sum) or math.isinf(nll_sum):
        return f"the {split} loss of epoch {epoch} is not finite"
    if value > recipe.divergence_perplexity:
        limit = recipe.divergence_perplexity
        return f"the {split} perplexity of epoch {epoch} is {value:.4g}, above {limit:g}"
    return None


def warm_up_evaluation(backend: Backend, splits: Splits, clocks: Clocks) -> None:
    """Let the framework compile its evaluation on its own clock; nothing is kept."""
    with clocks("compile"):
        for streams in (splits.valid, splits.test):
            state = backend.initial_state(streams.batch_size, training=False)
            float(backend.evaluate_step(*next(iter(streams)), state).nll)


def train_epoch(
    backend: Backend,
    recipe: Recipe,
    streams: ParallelStreams,
    rate: float,
    number: int,
    clocks: Clocks,
    watch: Callable[[Progress], None],
) -> TrainedEpoch:
    """One pass over the training split. Stops early at a loss that is not finite."""
    nll_sum = norm_sum = 0.0
    tokens = steps = timed_tokens = 0
    pending: list[tuple[Scalar, Scalar]] = []
    clock_before = dict(clocks.seconds)
    reported = time.perf_counter()
    state = backend.initial_state(streams.batch_size, training=True)
    windows = iter(streams)
    while steps < len(streams) and math.isfinite(nll_sum):
        # A run of steps that ends in a fetch, all on one clock.
        warming = backend.step < WARM_UP_STEPS
        length = WARM_UP_STEPS if warming else FETCH_EVERY
        with clocks("compile" if warming else "training"):
            for batch in (next(windows) for _ in range(min(length, len(streams) - steps))):
                result = backend.train_step(*batch, state, rate)
                state = result.state
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
            watch(Progress(number, recipe.epochs, steps / len(streams),
                           perplexity(nll_sum / tokens), timed_tokens / seconds))  # fmt: skip
    if math.isfinite(nll_sum) and tokens != streams.predicted_tokens:
        raise AssertionError(f"trained on {tokens} of {streams.predicted_tokens} tokens")
    spent = {
        clock: clocks.seconds[clock] - clock_before.get(clock, 0.0)
        for clock in ("compile", "training")
    }
    # A corpus shorter than the warm-up has no warm speed; what there is, is reported.
    speed = timed_tokens / spent["training"] if timed_tokens else tokens / spent["compile"]
    return TrainedEpoch(nll_sum, norm_sum / max(steps, 1), sum(spent.values()), speed)


def evaluate(backend: Backend, streams: ParallelStreams, clocks: Clocks) -> tuple[Score, float]:
    """Score of a split, every predicted token counted once, and the seconds it took."""
    before = clocks.seconds["evaluation"]
    nll_sum, tokens = 0.0, 0
    pending: list[Scalar] = []
    with clocks("evaluation"):
        state = backend.initial_state(streams.batch_size, training=False)
        for batch in streams:
            nll, state = backend.evaluate_step(*batch, state)
            pending.append(nll)
            tokens += int(batch.mask.sum())
            if len(pending) == FETCH_EVERY:
                nll_sum += sum(map(float, pending))
                pending.clear()
        nll_sum += sum(map(float, pending))
    if tokens != streams.predicted_tokens:
        raise AssertionError(f"evaluated {tokens} of {streams.predicted_tokens} tokens")
    return score(nll_sum, tokens), clocks.seconds["evaluation"] - before
