"""Profiles: a phase of a step that takes longer shows in that phase alone."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.checkpoints import small_corpus
from tests.support.problems import new_oracle, recipe

from ptbench.backends.base import Scalar, State, TrainStep
from ptbench.backends.oracle import Oracle
from ptbench.corpus.batching import Batch, Batches, ParallelStreams
from ptbench.measurement.products import NumPyProducts
from ptbench.measurement.profile import (
    evaluation_seconds,
    measure_bound,
    measure_lines,
    measure_loading,
    measure_phases,
    measure_prediction,
)
from ptbench.model.recipe import Recipe
from ptbench.model.work import flops_per_token

PLANTED = 0.03  # seconds
MODEL = recipe()


class Slow(Oracle):
    """An oracle that takes longer for one phase: every call that has the phase does."""

    phase = ""

    def pause(self, *phases: str) -> None:
        if self.phase in phases:
            time.sleep(PLANTED)

    def forward_pass(self, batch: Batch, state: State) -> Scalar:
        self.pause("forward")
        return super().forward_pass(batch, state)

    def forward_and_backward_pass(self, batch: Batch, state: State) -> Scalar:
        self.pause("forward", "backward")
        return super().forward_and_backward_pass(batch, state)

    def train_step(self, batch: Batch, state: State, learning_rate: float) -> TrainStep:
        self.pause("forward", "backward", "update")
        return super().train_step(batch, state, learning_rate)

    def evaluate_step(self, batch: Batch, state: State) -> Any:
        self.pause("evaluation")
        return super().evaluate_step(batch, state)


class SlowFeed(ParallelStreams):
    """A feed that takes longer for each batch."""

    def epoch(self, number: int = 1, start: int = 0) -> Batches:
        for batch in super().epoch(number, start):
            time.sleep(PLANTED)
            yield batch


def split(kind: type[ParallelStreams] = ParallelStreams) -> ParallelStreams:
    tokens = np.arange(200, dtype=np.int32) % 7
    return kind(tokens, MODEL.batch_size, MODEL.sequence_length)


@pytest.mark.parametrize("phase", ["feed", "forward", "backward", "update", "evaluation"])
def test_a_planted_sleep_is_found_in_its_phase_alone(phase: str) -> None:
    backend = new_oracle(MODEL, kind=Slow)
    backend.phase = phase
    found = measure_phases(backend, split(SlowFeed if phase == "feed" else ParallelStreams), 11)
    assert found["steps"] == 11
    phases = ("feed", "forward", "backward", "update", "evaluation")
    medians = {name: found[name].median for name in phases}
    assert medians[phase] > 0.8 * PLANTED
    assert {name for name, median in medians.items() if median > 0.5 * PLANTED} == {phase}


def test_the_phases_of_a_step_add_up_to_the_step_and_leave_the_model_as_it_was() -> None:
    backend = new_oracle(MODEL)
    before = backend.parameters()
    found = measure_phases(backend, split(), 11)
    parts = sum(found[name].median for name in ("forward", "backward", "update"))
    assert parts == pytest.approx(found["step"].median)
    after = backend.parameters()
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_the_bound_is_the_speed_at_which_the_products_alone_take_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(NumPyProducts, "rate", lambda *_: 1e6)
    assert measure_bound(MODEL, 7) == pytest.approx(1e6 / flops_per_token(MODEL, 7))


def test_prediction_is_timed_by_call_and_by_word() -> None:
    backend = new_oracle(MODEL)
    found = measure_prediction(backend, split()._source, rows=10)
    assert 0 < found.median <= found.percentile_95
    assert found.calls > 100
    assert found.words_per_second == pytest.approx(10 / found.median)


def test_every_source_of_a_corpus_is_loaded_and_the_text_in_memory_takes_most(
    tmp_path: Path,
) -> None:
    text = " ".join(f"word{n}" for n in range(9)) + "\n"
    corpus = small_corpus(tmp_path, words=10, train=text * 12_000)
    asked = Recipe.model_validate(MODEL.model_dump() | {"corpus": "small"})
    found = measure_loading(corpus, asked, devices=1)
    assert found.keys() == {"memory", "memory_map", "stream"}
    assert found["memory"].bytes > found["memory_map"].bytes + 4 * 120_000 / 2
    assert all(each.open_seconds > 0 and each.tokens_per_second > 0 for each in found.values())


def test_all_batches_of_a_budget_are_timed_and_none_of_them_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every batch takes as long as is planted, the first one too."""
    unhurried = ParallelStreams.epoch

    def slow(self: ParallelStreams, *arguments: Any) -> Batches:
        for batch in unhurried(self, *arguments):
            time.sleep(PLANTED)
            yield batch

    monkeypatch.setattr(ParallelStreams, "epoch", slow)
    text = " ".join(f"word{n}" for n in range(9)) + "\n"
    corpus = small_corpus(tmp_path, words=10, train=text * 200)
    changes = {"corpus": "small", "budget": "smoke"}  # six batches
    asked = Recipe.model_validate(MODEL.model_dump() | changes)
    found = measure_loading(corpus, asked, devices=1)["memory"]
    assert found.tokens_per_second < asked.batch_size * asked.sequence_length / PLANTED
    assert PLANTED < found.open_seconds < 5 * PLANTED


class Lines(Oracle):
    """An oracle whose training step takes its time in two lines, one of another function."""

    def train_step(self, batch: Batch, state: State, learning_rate: float) -> TrainStep:
        result = super().train_step(batch, state, learning_rate)
        self.twice(
            batch,
        )
        time.sleep(PLANTED)
        return result

    def twice(self, _: Batch) -> None:
        for _ in range(2):
            time.sleep(PLANTED)


def test_the_time_of_a_line_is_found_at_that_line_with_what_it_calls() -> None:
    found = {(line.function, line.text): line for line in measure_lines(
        new_oracle(MODEL, kind=Lines), split()
    )}  # fmt: skip
    sleeps = {key: line for key, line in found.items() if line.seconds > 0.7 * PLANTED}
    assert sleeps.keys() == {
        ("train_step", "self.twice("),
        ("train_step", "time.sleep(PLANTED)"),
        ("twice", "time.sleep(PLANTED)"),
    }
    for key, times in zip(sorted(sleeps), (2, 1, 2), strict=True):
        assert sleeps[key].seconds == pytest.approx(times * PLANTED, rel=0.5)
    assert sleeps["twice", "time.sleep(PLANTED)"].calls == 2
    assert ("train_step", "return result") in found


def test_a_device_that_is_still_busy_counts_for_the_line_that_asked_it() -> None:
    class Asynchronous(Lines):
        pending = 0.0

        def train_step(self, batch: Batch, state: State, learning_rate: float) -> TrainStep:
            self.pending = PLANTED
            return Oracle.train_step(self, batch, state, learning_rate)

        def synchronize(self) -> None:
            time.sleep(self.pending)
            self.pending = 0.0

    lines = measure_lines(new_oracle(MODEL, kind=Asynchronous), split())
    assert max(lines, key=lambda line: line.seconds).text == "self.pending = PLANTED"


def test_scoring_a_split_takes_its_steps_times_the_time_of_one() -> None:
    backend = new_oracle(MODEL, kind=Slow)
    backend.phase = "evaluation"
    found = evaluation_seconds(backend, split())
    assert found == pytest.approx(len(split()) * PLANTED, rel=0.5)
