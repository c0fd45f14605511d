"""`budget` makes a part of every run, under names of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.checkpoints import small_corpus
from tests.support.problems import new_oracle

from ptbench.backends.oracle import Oracle
from ptbench.configuration.specification import Cell, Specification
from ptbench.configuration.study import Study, load_study
from ptbench.corpus.batching import (
    Feed,
    First,
    ParallelStreams,
    Sentences,
    VariedStreams,
    Windows,
)
from ptbench.model.recipe import BUDGETS, BudgetName, Recipe
from ptbench.model.work import CorpusSize, runtime_minutes
from ptbench.training.cell import Paths, run_cell

TOKENS = np.arange(1, 400) % 7
FEEDS: list[Feed] = [
    ParallelStreams(TOKENS, 4, 5), VariedStreams(TOKENS, 4, 5, seed=1),
    Windows(TOKENS, 4, 5, wraps=True), Sentences(TOKENS, 4, 0),
]  # fmt: skip


@pytest.mark.parametrize("feed", FEEDS, ids=lambda feed: type(feed).__name__)
@pytest.mark.parametrize("count", [1, 6, 10_000])
def test_the_first_batches_are_those_of_the_whole_feed(feed: Feed, count: int) -> None:
    first = First(feed, count)
    expected = list(feed.epoch(1))[:count]
    assert len(first) == len(expected)
    for batch, other in zip(first.epoch(1), expected, strict=True):
        np.testing.assert_array_equal(batch.targets, other.targets)
    assert first.predicted_tokens == sum(batch.mask.sum() for batch in expected)
    if len(expected) > 1:  # as a resumed run reads it
        assert len(list(first.epoch(1, 1))) == len(expected) - 1
    assert first.carries_state == feed.carries_state


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_run_takes_the_steps_of_its_budget(
    budget: BudgetName, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe(
        corpus="mine", budget=budget, layers=1, embedding_size=2, hidden_size=2, batch_size=2,
        sequence_length=2, evaluation_batch_size=2, epochs=8, constant_epochs=6,
    )  # fmt: skip
    specification = Specification(variant="mine", recipe=recipe, corpus_definition={})

    def create(_: Cell, given: Specification, size: int, *__: int) -> Oracle:
        return new_oracle(given.recipe.within_budget(), seed=1, vocabulary_size=size)

    monkeypatch.setattr("ptbench.training.cell.create_backend", create)
    cell = Cell(variant="mine", framework="pytorch", devices=1, seed=1)
    names = ("cell", "attempts", "checkpoints")
    paths = Paths(small_corpus(tmp_path, words=20), *(tmp_path / name for name in names))
    metrics = run_cell(cell, specification, paths, threads=1, say=lambda _: None)
    allowed = BUDGETS[budget]
    assert metrics.epochs == allowed.epochs
    assert metrics.steps_per_epoch <= allowed.batches
    assert metrics.valid is not None
    assert metrics.valid.tokens <= allowed.evaluation_batches * 4
    if budget == "smoke":
        assert (metrics.steps_per_epoch, metrics.valid.tokens) == (6, 4)


def study_of(**config: Any) -> Study:
    return load_study({"experiments": ["zhang-mos-number", "singh-optimizer"], **config})


def test_every_variant_has_a_name_of_its_own_in_a_budget() -> None:
    full, smoke = study_of(), study_of(budget="smoke")
    assert len(full.cells) == len(smoke.cells)
    assert not set(full.cells) & set(smoke.cells)
    for cell in smoke.cells:
        name = cell.variant.replace("+budget=smoke", "")
        recipe = smoke.specification(cell.variant).recipe
        assert recipe.model_copy(update={"budget": "full"}) == full.specification(name).recipe


def test_a_job_asks_for_less_time() -> None:
    size = CorpusSize({"train": 929_589, "valid": 73_760, "test": 82_430}, 10_000)
    minutes = {
        budget: runtime_minutes(Recipe(epochs=39, budget=budget), "cpu", 1, size)
        for budget in ("smoke", "quick", "full")
    }
    assert minutes["smoke"] < minutes["quick"] < minutes["full"] / 10
