"""Dynamic evaluation updates by the formulas of Krause et al. 2018, after each scored segment."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tests.support.checkpoints import save_model, small_corpus
from tests.support.problems import AWD, new_oracle, random_parameters, recipe

from ptbench.backends.oracle import Oracle
from ptbench.cli import main
from ptbench.corpus.batching import ParallelStreams, Windows
from ptbench.corpus.store import Corpus, open_corpus
from ptbench.errors import PtbenchError
from ptbench.model.recipe import Recipe
from ptbench.training.dynamic import PLAIN, STREAMS, Dynamics, evaluate_dynamically
from ptbench.training.inference import build, read_checkpoint
from ptbench.training.loop import evaluate

MODEL = recipe(layers=1, embedding_size=4, hidden_size=4)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return open_corpus(small_corpus(tmp_path_factory.mktemp("dynamic")))


def oracle(trained: Recipe = MODEL) -> Oracle:
    """A model with large random parameters, as `build` makes it of a checkpoint."""
    made = new_oracle(trained.model_copy(update=PLAIN))
    made.load_parameters(random_parameters(trained, seed=1))
    return made


def test_without_a_rate_it_is_evaluation_of_one_stream(corpus: Corpus) -> None:
    found = evaluate_dynamically(oracle(), corpus, "test", Dynamics(learning_rate=0.0))
    expected = evaluate(oracle(), ParallelStreams(corpus.test, 1, 5))
    assert found.nll == pytest.approx(expected.nll, rel=1e-12)
    assert found.tokens == len(corpus.test) - 1


def test_every_update_is_that_of_the_formulas(corpus: Corpus) -> None:
    """One weight at a time would be too slow; one array at a time, all in the order of the text."""
    rate, decay, segment = 0.05, 0.3, 7
    model = oracle()
    trained = model.parameters()
    squares = []
    state = model.initial_state(STREAMS, training=True)
    for batch in ParallelStreams(corpus.train, STREAMS, segment).epoch():
        squares.append({n: g.astype(float) ** 2 for n, g in model.gradients(batch, state).items()})
        state = model.train_step(batch, state, 0.0).state
    rms = {n: np.sqrt(np.mean([each[n] for each in squares], axis=0)) for n in trained}
    mean = np.concatenate([r.ravel() for r in rms.values()]).mean()
    assert max((decay * r / mean).max() for r in rms.values()) > 1  # some are limited
    nll, state = 0.0, model.initial_state(1, training=True)
    for batch in ParallelStreams(corpus.test, 1, segment).epoch():
        gradients, now = model.gradients(batch, state), model.parameters()
        step = model.train_step(batch, state, 0.0)
        nll, state = nll + float(step.nll), step.state
        model.load_parameters(
            {
                n: p
                - rate * gradients[n] / (rms[n] + 0.001)
                + np.clip(decay * rms[n] / mean, 0, 1) * (trained[n] - p)
                for n, p in now.items()
            }
        )
    how = Dynamics(rate, decay, segment)
    fresh = oracle()
    found = evaluate_dynamically(fresh, corpus, "test", how)
    assert found.nll * found.tokens == pytest.approx(nll, rel=1e-6)
    for name, array in fresh.parameters().items():  # the trained ones again
        np.testing.assert_array_equal(array, trained[name])


def test_text_that_repeats_itself_becomes_more_probable(tmp_path: Path) -> None:
    corpus = open_corpus(small_corpus(tmp_path, test="word1 word2 word3 word4\n" * 30))
    static = evaluate_dynamically(oracle(), corpus, "test", Dynamics(learning_rate=0.0))
    assert evaluate_dynamically(oracle(), corpus, "test").nll < static.nll - 0.1


def test_what_a_model_was_trained_with_changes_nothing(tmp_path: Path, corpus: Corpus) -> None:
    """Dropout, penalties and the optimizer; a checkpoint is built without them."""
    small_corpus(tmp_path)
    awd = recipe(**MODEL.model_dump() | AWD | {"dropout": 0.5, "weight_decay": 0.1})
    path = save_model(
        tmp_path / "awd.safetensors", awd, random_parameters(MODEL, 1), tmp_path / "corpora/small"
    )
    model = build(read_checkpoint(path), "oracle", changes=PLAIN)
    found = evaluate_dynamically(model, corpus, "test", Dynamics(statistics_batches=1))
    assert found == evaluate_dynamically(oracle(), corpus, "test", Dynamics(statistics_batches=1))


def test_a_model_of_windows_is_updated_after_each_window(corpus: Corpus) -> None:
    windows = recipe(**MODEL.model_dump() | {"feeding": "windows", "sequence_length": 6})
    found = evaluate_dynamically(oracle(windows), corpus, "test", Dynamics(learning_rate=0.0))
    assert found.nll == pytest.approx(evaluate(oracle(), Windows(corpus.test, 1, 6)).nll, rel=1e-12)


def test_a_rate_that_is_too_high_is_a_sentence(corpus: Corpus) -> None:
    with (
        np.errstate(all="ignore"),
        pytest.raises(PtbenchError, match=r"not finite .* lower --learning-rate, which is 1e\+300"),
    ):
        evaluate_dynamically(oracle(), corpus, "test", Dynamics(learning_rate=1e300))


def test_the_command_takes_rate_decay_and_segment(tmp_path: Path) -> None:
    corpus = open_corpus(small_corpus(tmp_path))
    path = tmp_path / "best.safetensors"
    save_model(path, MODEL, random_parameters(MODEL, seed=1), tmp_path / "corpora/small")
    options = ["--learning-rate", "0.01", "--decay", "0.1", "--segment", "7", "--json"]
    answer = subprocess.run(
        [sys.executable, "-m", "ptbench", "evaluate", "--framework", "oracle", "--checkpoint", path,
         "--dynamic", *options],
        capture_output=True, text=True,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    expected = evaluate_dynamically(oracle(), corpus, "test", Dynamics(0.01, 0.1, 7))
    assert json.loads(answer.stdout)["nll"] == expected.nll


def test_options_of_dynamic_evaluation_alone_are_a_sentence(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        main(["evaluate", "--framework", "oracle", "--checkpoint", "x", "--segment", "7"])
    assert "--segment without --dynamic: nothing is learned" in capsys.readouterr().err
