"""Runs on sentences, on windows and as AWD-LSTM is trained are the oracle's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.support import probes
from tests.support.checkpoints import small_corpus
from tests.support.problems import (
    BATCH,
    VOCABULARY,
    largest_error,
    moved,
    new_oracle,
    random_parameters,
    recipe,
)
from tests.support.remote import Backends, probe

from ptbench.corpus.store import open_corpus
from ptbench.model.recipe import Recipe
from ptbench.training.cell import feed

COMMON = {"layers": 1, "schedule": "constant", "evaluation_batch_size": BATCH,
          "test_batch_size": BATCH}  # fmt: skip
# The mean loss of a batch depends on its own padding, and adam on the number of steps so far, of
# which those that only compile are none.
SENTENCES = recipe(
    **COMMON, feeding="sentences", objective="mean_per_token", clip_norm=0.1, optimizer="adam",
    learning_rate=0.01, epochs=1, constant_epochs=1,
)  # fmt: skip
# The second epoch of windows begins where the first one ended.
WINDOWS = recipe(**COMMON, feeding="windows", epochs=2, constant_epochs=1)
# What AWD-LSTM has: windows of varying length, each with a rate of its own; a mean of the steps of
# two epochs, while training goes on from the newest parameters; and a third epoch that starts from
# the best, which are a mean, and makes a new one.
VARIED = recipe(
    **COMMON, window_lengths="varied", epochs=3, constant_epochs=1, optimizer="asgd",
    averaging_interval=None, fine_tuning_epochs=1, fine_tuning_learning_rate=0.5,
    activation_regularization=2.0, temporal_activation_regularization=1.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a corpus with sentences of 2 to 16 tokens."""
    rng = np.random.default_rng(5)
    words = [f"word{n}" for n in range(VOCABULARY - 1)]

    def text(lengths: list[int]) -> str:
        return "".join(" ".join(rng.choice(words, length)) + "\n" for length in lengths)

    every_word = "".join(" ".join(words[n : n + 13]) + "\n" for n in range(0, len(words), 13))
    lengths = {
        split: rng.integers(1, 16, count).tolist()
        for split, count in (("train", 26), ("valid", 9), ("test", 11))
    }
    texts = {split: text(each) for split, each in lengths.items()}
    texts["train"] += every_word
    return small_corpus(tmp_path_factory.mktemp("feeding"), **texts)


def test_sentences_come_in_two_lengths_with_padding_and_windows_in_several_or_wrapped(
    corpus: Path,
) -> None:
    """The next test relies on this."""
    opened = open_corpus(corpus)
    sentences = feed(opened, SENTENCES, devices=1)
    for split in sentences:
        assert [len(batch.inputs) for batch in split.shapes()] == [8, 16]
        masks = [batch.mask for batch in split.epoch(1)]
        assert any(not mask.all() for mask in masks)
    # whole rows of padding, in a batch that never filled up
    assert any(not mask.any(axis=0).all() for mask in masks)
    varied = feed(opened, VARIED, devices=1).train
    assert len(varied.shapes()) > 2
    windows = feed(opened, WINDOWS, devices=1).train
    assert 2 * windows.predicted_tokens > len(opened.train) > windows.predicted_tokens


@pytest.mark.parametrize(
    ("fed", "implementation"),
    [
        (SENTENCES, "tuned"),
        (WINDOWS, "stock"),
        (VARIED, "stock"),
        pytest.param(SENTENCES, "stock", marks=pytest.mark.exhaustive),
        pytest.param(WINDOWS, "tuned", marks=pytest.mark.exhaustive),
        pytest.param(VARIED, "tuned", marks=pytest.mark.exhaustive),
    ],
    ids=lambda value: value if isinstance(value, str) else value.feeding + "-" + value.optimizer,
)
def test_losses_and_final_parameters_of_a_run_are_the_oracle_s(
    backends: Backends, framework: str, corpus: Path, fed: Recipe, implementation: str
) -> None:
    fed = fed.model_copy(update={"implementation": implementation})
    backend, oracle = backends.get(framework, fed), new_oracle(fed)
    initial = random_parameters(fed, seed=1)
    backend.load_parameters(initial)
    oracle.load_parameters(initial)
    nll, parameters = probe(probes.run_on_corpus, backend, str(corpus))
    expected_nll, expected = probe(probes.run_on_corpus, oracle, str(corpus))
    assert nll == pytest.approx(expected_nll, rel=1e-5)
    error, name = largest_error(moved(parameters, initial), moved(expected, initial))
    assert error < 2e-5, name
