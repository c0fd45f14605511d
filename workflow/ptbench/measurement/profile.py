"""What a step's time is made of, prediction and loading: the work of `ptbench profile`.

A profile synchronises the device between phases, which training does not, so no speed that is
reported comes from here.
"""

from __future__ import annotations

import itertools
import statistics
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, get_args

import numpy as np
from pydantic import Field

from ptbench.backends import Framework
from ptbench.backends.base import Backend
from ptbench.configuration.specification import Cell, Specification
from ptbench.corpus.batching import Batch, Feed
from ptbench.corpus.sources import Source
from ptbench.corpus.store import open_corpus
from ptbench.errors import PtbenchError
from ptbench.files import write_atomically
from ptbench.measurement.lines import LineTimer
from ptbench.measurement.products import NumPyProducts
from ptbench.model.recipe import Model, Recipe, TokenSource
from ptbench.model.work import bound, training_products
from ptbench.training.cell import create_backend, feed
from ptbench.training.clocks import Clocks
from ptbench.training.devices import check_devices
from ptbench.training.hardware import Sampler
from ptbench.training.provenance import provenance
from ptbench.training.records import Hardware

WARM_UP_STEPS = 5  # of every shape of batch, not measured
STEPS = 100  # measured, fewer where they take longer than SECONDS
LEAST_STEPS = 10
SECONDS = 60.0
OPERATORS = 10  # the largest are kept
EVALUATED_STEPS = 20  # of the validation split, and of the test split
PROFILED_STEPS = 10  # under the framework's profiler
WORDS = 200  # whose prediction is timed one by one
PRODUCT_SECONDS = 0.2  # for each matrix product of a training step, by NumPy
BATCHES = (1, 10, 100)  # rows of which the next word is predicted at once


class Timing(Model):
    """A phase of a training step."""

    median: float = Field(description="Over the steps [s].")
    low: float = Field(description="Lower quartile [s].")
    high: float = Field(description="Upper quartile [s].")


class OperatorTime(Model):
    """One of the largest operators of a training step."""

    name: str = Field(description="As the framework's profiler calls it.")
    calls: float = Field(description="In a step.")
    seconds: float = Field(description="In a step [s].")


class LineTime(Model):
    """A statement of a training step, as a line profiler sees it."""

    function: str = Field(description="Its name in the framework's backend.")
    text: str = Field(description="The statement's first line.")
    calls: float = Field(description="In a step.")
    seconds: float = Field(description="In a step, with what it calls [s].")


class EpochTime(Model):
    """One whole epoch, by the median times of its steps, and the scoring of the test split."""

    training: float = Field(description="All training steps, with their feed [s].")
    validation: float = Field(description="Scoring the validation split [s].")
    test: float = Field(description="Scoring the test split [s].")


class Prediction(Model):
    """Predicting the next word of every row of a batch, the state carried on."""

    batch: int = Field(description="Rows.")
    calls: int = Field(description="Measured.")
    median: float = Field(description="Of a call, its probabilities brought to NumPy [s].")
    percentile_95: float = Field(description="Of a call [s].")
    words_per_second: float = Field(description="Rows over the median.")


class Loading(Model):
    """Opening a corpus and making the batches of one epoch, without a framework.

    A budget makes the epoch shorter. The corpus is opened as without one.
    """

    open_seconds: float = Field(description="Until the first batch is there [s].")
    tokens_per_second: float = Field(description="Of an epoch's training batches, prefetching off.")
    bytes: int = Field(description="Most memory that Python and NumPy allocated until then.")


class Profile(Model):
    """`profile.json`. Phases are told apart by what one call takes longer than another.

    The forward pass is the nll of the next training step, with its dropout, without gradients;
    backward is what the gradients cost more, update (with clipping) what a whole step costs more.
    """

    fingerprint: str = Field(description="Of the specification.")
    variant: str = Field(description="Name of the variant.")
    framework: Framework = Field(description="Framework.")
    devices: int = Field(description="Data-parallel replicas.")
    warm_up_steps: int = Field(description="Of every shape of batch, not measured.")
    steps: int = Field(description="Steps that the medians are over.")
    feed: Timing = Field(description="Waiting for the next batch.")
    forward: Timing = Field(description="Bringing the batch to the device, and the forward pass.")
    backward: Timing = Field(description="Backward pass, and the sum over replicas.")
    update: Timing = Field(description="Clipping, and the update of all parameters.")
    step: Timing = Field(description="A whole step after its batch is there.")
    evaluation: Timing = Field(description="An evaluation step on a batch of the training split.")
    operators: list[OperatorTime] = Field(description="The largest of a training step.")
    operator_seconds: float = Field(description="Of all operators of a training step [s].")
    lines: list[LineTime] = Field([], description="Of a training step, the device synchronised.")
    epoch: EpochTime | None = Field(None, description="A run of one epoch.")
    prediction: list[Prediction] = Field(description="By rows.")
    loading: dict[TokenSource, Loading] = Field(description="By source of the tokens.")
    bound_tokens_per_second: float | None = Field(
        None,
        description="Training speed if nothing but the model's matrix products took time, each as "
        "fast as NumPy computes it on as many threads. On one CPU device; null: not measured.",
    )
    hardware: Hardware | None = Field(description="Use of the machine meanwhile.")
    facts: dict[str, Any] = Field(description="Where and with what it was measured.")


def profile_row(
    cell: Cell,
    specification: Specification,
    corpus: Path,
    output: Path,
    threads: int,
    say: Callable[[str], None] = print,
    nodes: int = 1,
) -> Profile:
    """Profile a variant in a framework, and write `profile.json`.

    Args:
        cell: which; its seed is that of the initial values.
        specification: of the variant.
        corpus: folder of the prepared corpus.
        output: the file.
        threads: CPU threads, shared by all replicas.
        say: called with a line about each part.
        nodes: of its Slurm job, which the devices are shared out to.

    Raises:
        PtbenchError: if specification, corpus or devices do not allow it.
    """
    check_devices(cell.devices // nodes, specification.accelerator)
    recipe = specification.recipe.within_budget()
    unaided = recipe.model_copy(update={"prefetch": 0})
    loading = measure_loading(corpus, unaided, cell.devices)
    opened = open_corpus(corpus, recipe.source)
    splits = feed(opened, recipe, cell.devices)
    split = splits.train
    on_gpus = specification.accelerator == "cuda"
    sampler = Sampler(threads, gpus=cell.devices // nodes if on_gpus else 0)
    size = opened.vocabulary_size
    with (
        closing(create_backend(cell, specification, size, threads, nodes)) as backend,
        sampler,
    ):
        phases = measure_phases(backend, split)
        say(f"{cell.framework}: a step takes {phases['step'].median * 1e3:.1f} ms")
        operators = measure_operators(backend, split)
        lines = measure_lines(backend, split)
        each = phases["feed"].median + phases["step"].median
        epoch = EpochTime(
            training=len(split) * each,
            validation=evaluation_seconds(backend, splits.valid),
            test=evaluation_seconds(backend, splits.test),
        )
        prediction = [measure_prediction(backend, opened.valid, rows) for rows in BATCHES]
        say(f"{cell.framework}: a word takes {prediction[0].median * 1e3:.2f} ms")
        facts = provenance(backend.package) | {
            "devices": backend.device_names(),
            "settings": backend.settings(),
            "threads": threads,
        }
    limit = None
    dense = recipe.kernel != "sparse" and recipe.precision == "float32"  # as NumPy's products
    if not on_gpus and cell.devices == 1 and dense:
        limit = measure_bound(recipe, opened.vocabulary_size)
    steps = phases.pop("steps")
    largest = sorted(operators, key=lambda each: -each.seconds)
    profile = Profile(
        fingerprint=specification.fingerprint,
        variant=cell.variant,
        framework=cell.framework,
        devices=cell.devices,
        warm_up_steps=WARM_UP_STEPS,
        steps=steps,
        **phases,
        operators=largest[:OPERATORS],
        operator_seconds=sum(each.seconds for each in operators),
        lines=lines,
        epoch=epoch,
        prediction=prediction,
        loading=loading,
        bound_tokens_per_second=limit,
        hardware=sampler.hardware() if nodes == 1 else None,
        facts=facts,
    )
    write_atomically(output, profile.model_dump_json(indent=1) + "\n")
    return profile


def endless(split: Feed) -> Iterator[Batch]:
    """Yield the batches of one epoch after the other."""
    for number in itertools.count(1):
        with closing(split.epoch(number)) as batches:
            yield from batches


def measure_phases(backend: Backend, split: Feed, steps: int = STEPS) -> dict[str, Any]:
    """Return the timing of each phase by its name in `Profile`, and the number of steps.

    Steps are taken twice: as in training, to time the feed; and then with every pass timed beside
    the whole step on the same batch. The rate is 0, so the model stays as it is.

    Args:
        backend: the model.
        split: what trains it.
        steps: to measure; fewer where they take longer than a minute.
    """
    state = zero = backend.initial_state(split.batch_size, training=True)
    evaluated = backend.initial_state(split.batch_size, training=False)
    for batch in split.shapes():
        for _ in range(WARM_UP_STEPS):
            float(backend.forward_pass(batch, state))
            float(backend.forward_and_backward_pass(batch, state))
            float(backend.train_step(batch, state, 0.0).nll)
            float(backend.evaluate_step(batch, evaluated).nll)
    clocks = Clocks(backend.synchronize)
    taken: dict[str, list[float]] = {name: [] for name in ("feed", "forward", "both", "whole")}
    taken["evaluation"] = []

    def timed(name: str, call: Callable[..., Any], *arguments: Any) -> Any:
        before = clocks.seconds[name]
        with clocks(name):
            result = call(*arguments)
        taken[name].append(clocks.seconds[name] - before)
        return result

    with closing(endless(split)) as batches:  # type: ignore[type-var]
        end = time.perf_counter() + SECONDS / 2
        for number in range(steps):
            batch = timed("feed", next, batches)
            after = backend.train_step(batch, state, 0.0).state
            state = after if split.carries_state else zero
            backend.synchronize()
            if number + 1 >= LEAST_STEPS and time.perf_counter() > end:
                break
        end = time.perf_counter() + SECONDS / 2
        for number, batch in enumerate(itertools.islice(batches, steps)):
            timed("forward", backend.forward_pass, batch, state)
            timed("both", backend.forward_and_backward_pass, batch, state)
            after = timed("whole", backend.train_step, batch, state, 0.0).state
            timed("evaluation", backend.evaluate_step, batch, evaluated)
            state = after if split.carries_state else zero
            if number + 1 >= LEAST_STEPS and time.perf_counter() > end:
                break
    return {
        "steps": len(taken["whole"]),
        "feed": timing(taken["feed"]),
        "forward": timing(taken["forward"]),
        "backward": difference(taken["both"], taken["forward"]),
        "update": difference(taken["whole"], taken["both"]),
        "step": timing(taken["whole"]),
        "evaluation": timing(taken["evaluation"]),
    }


def timing(seconds: Sequence[float]) -> Timing:
    """Return median and quartiles."""
    low, median, high = (float(each) for each in np.percentile(seconds, [25, 50, 75]))
    return Timing(median=median, low=low, high=high)


def difference(longer: Sequence[float], shorter: Sequence[float]) -> Timing:
    """Return the difference of two medians, with the quartiles of the steps' own differences."""
    each = timing([a - b for a, b in zip(longer, shorter, strict=True)])
    median = statistics.median(longer) - statistics.median(shorter)
    return Timing(median=median, low=each.low, high=each.high)


def measure_operators(backend: Backend, split: Feed) -> list[OperatorTime]:
    """Return all operators of a training step, by the framework's own profiler."""
    state = backend.initial_state(split.batch_size, training=True)
    with closing(endless(split)) as batches:  # type: ignore[type-var]
        taken = list(itertools.islice(batches, PROFILED_STEPS))

    def work() -> None:
        for batch in taken:
            backend.train_step(batch, state, 0.0)
        backend.synchronize()

    return [
        OperatorTime(
            name=each.name,
            calls=each.calls / PROFILED_STEPS,
            seconds=each.seconds / PROFILED_STEPS,
        )
        for each in backend.operators(work)
    ]


def measure_lines(backend: Backend, split: Feed) -> list[LineTime]:
    """Return the statements of a training step with their times, the device synchronised."""
    state = backend.initial_state(split.batch_size, training=True)
    timer = LineTimer(type(backend).train_step, backend.synchronize)
    with closing(endless(split)) as batches:  # type: ignore[type-var]
        taken = list(itertools.islice(batches, PROFILED_STEPS))
    backend.synchronize()
    with timer:
        for batch in taken:
            backend.train_step(batch, state, 0.0)
    return [
        LineTime(
            function=line.function,
            text=line.text,
            calls=line.calls / PROFILED_STEPS,
            seconds=line.seconds / PROFILED_STEPS,
        )
        for line in timer.lines()
    ]


def measure_bound(recipe: Recipe, vocabulary_size: int) -> float:
    """Return the training speed that NumPy's matrix products alone would allow [tokens/s]."""
    products = NumPyProducts({})
    needed = training_products(recipe, vocabulary_size)
    rates = {each: products.rate((each.m, each.k, each.n), PRODUCT_SECONDS) for each in needed}
    return bound(recipe, vocabulary_size, rates)


def evaluation_seconds(backend: Backend, split: Feed) -> float:
    """Return how long scoring a split takes, by the median time of some of its steps [s]."""
    state = backend.initial_state(split.batch_size, training=False)
    for batch in split.shapes():
        for _ in range(WARM_UP_STEPS):
            float(backend.evaluate_step(batch, state).nll)
    seconds = []
    with closing(endless(split)) as batches:  # type: ignore[type-var]
        for batch in itertools.islice(batches, EVALUATED_STEPS):
            backend.synchronize()
            before = time.perf_counter()
            result = backend.evaluate_step(batch, state)
            backend.synchronize()
            seconds.append(time.perf_counter() - before)
            state = result.state if split.carries_state else state
    return statistics.median(seconds) * len(split)


def measure_prediction(backend: Backend, source: Source, rows: int) -> Prediction:
    """Return how long predicting one next word in each row takes.

    Args:
        backend: the model.
        source: the text, from whose beginning every row reads.
        rows: of the batch.
    """
    text = source.reader().read(WORDS + WARM_UP_STEPS)
    state = backend.initial_state(rows, training=False)
    seconds = []
    end = time.perf_counter() + SECONDS / len(BATCHES)
    for number, word in enumerate(text):
        inputs = np.full((1, rows), word, np.int32)
        before = time.perf_counter()
        _, state = backend.next_token_log_probabilities(inputs, state)  # in NumPy, so finished
        now = time.perf_counter()
        if number >= WARM_UP_STEPS:
            seconds.append(now - before)
        if len(seconds) >= LEAST_STEPS and now > end:
            break
    if not seconds:
        raise PtbenchError(f"a validation split of {len(text)} words is too short to profile on")
    median, slow = (float(each) for each in np.percentile(seconds, [50, 95]))
    return Prediction(
        batch=rows,
        calls=len(seconds),
        median=median,
        percentile_95=slow,
        words_per_second=rows / median,
    )


def measure_loading(corpus: Path, recipe: Recipe, devices: int) -> dict[TokenSource, Loading]:
    """Return what every source of the corpus takes; its memory is measured by another pass."""
    found: dict[TokenSource, Loading] = {}
    count = len(feed(open_corpus(corpus, recipe.source), recipe, devices).train)
    whole = recipe.model_copy(update={"budget": "full"})  # a budget reads all its batches to begin

    def one(source: TokenSource, count: int) -> tuple[float, float]:
        """Return the seconds until the first batch is there, and the tokens/s of so many."""
        began = time.perf_counter()
        split = feed(open_corpus(corpus, source), whole, devices).train
        first, seconds, tokens = 0.0, 0.0, 0
        with closing(split.epoch(1)) as batches:
            for number in range(count):
                asked = time.perf_counter()
                batch = next(batches)
                now = time.perf_counter()
                first = first if number else now - began
                seconds += now - asked
                tokens += int(batch.mask.sum())
        return first, tokens / seconds

    for source in get_args(TokenSource):
        one(source, 1)  # so that the system has read the files for all of them
        first, rate = one(source, count)
        tracemalloc.start()
        one(source, 1)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        found[source] = Loading(open_seconds=first, tokens_per_second=rate, bytes=peak)
    return found
