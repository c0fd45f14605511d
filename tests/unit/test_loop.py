"""The training loop, on the float64 oracle: what it trains on, keeps, scores, and when it ends."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from tests.support.problems import new_oracle, same

from ptbench.backends.base import Setup, State, TrainStep
from ptbench.backends.oracle import Oracle
from ptbench.corpus.batching import ParallelStreams, Prefetched, Sentences, Windows
from ptbench.model.parameters import Parameters
from ptbench.model.recipe import Recipe
from ptbench.training.clocks import Clocks
from ptbench.training.loop import Progress, Run, Splits, Trainer, accuracy, evaluate, train

VOCABULARY = 9
SIZES = {"layers": 1, "embedding_size": 5, "hidden_size": 5, "constant_epochs": 1}


def text(length: int, seed: int) -> npt.NDArray[np.int64]:
    """Tokens with something to learn: each is mostly the successor of the one before."""
    rng = np.random.default_rng(seed)
    jump = rng.random(length) < 0.2
    return np.where(jump, rng.integers(0, VOCABULARY, length), np.arange(length) % VOCABULARY)


def splits() -> Splits:
    return Splits(*(ParallelStreams(text(n, n), 4, 6) for n in (300, 90, 80)))


class Recorder(Oracle):
    """The oracle, and what was asked of it."""

    def __init__(self, setup: Setup) -> None:
        self.loaded: list[Parameters] = []
        self.states: list[State] = []
        super().__init__(setup)

    def load_parameters(self, parameters: Any) -> None:
        self.loaded.append(dict(parameters))
        super().load_parameters(parameters)

    def train_step(self, *arguments: Any) -> TrainStep:
        self.states.append(arguments[1])
        return super().train_step(*arguments)


def run(recipe: Recipe, on: Splits | None = None) -> tuple[Run, Recorder, list[Progress]]:
    backend = new_oracle(recipe, 1, 3, VOCABULARY, Recorder)
    seen: list[Progress] = []
    return train(backend, on or splits(), Clocks(), seen.append), backend, seen


def test_the_test_split_is_scored_with_the_best_epochs_parameters() -> None:
    recipe = Recipe(**SIZES, schedule="constant", epochs=5, learning_rate=12.0, clip_norm=1.0)
    result, backend, _ = run(recipe)
    assert result.best is not None
    assert result.test is not None
    nlls = [epoch.valid_nll for epoch in result.history]
    assert result.best.valid_nll == min(nlls)
    assert result.best is not result.history[-1], "the rate should be too high to end at the best"
    score = evaluate(backend, splits().valid)
    assert score.nll == pytest.approx(min(nlls), rel=1e-6)
    assert result.stopped == "epochs"


class Successor(Oracle):
    """Holds the successor of each word for the most probable next one."""

    def next_token_log_probabilities(self, inputs: Any, state: State) -> Any:
        return np.eye(VOCABULARY, dtype=np.float32)[(inputs + 1) % VOCABULARY], state


@pytest.mark.parametrize("feeding", [ParallelStreams, Windows])
def test_accuracy_is_the_share_of_real_tokens_that_were_the_most_probable(
    feeding: type[ParallelStreams | Windows],
) -> None:
    feed = feeding(text(83, 1), 4, 6)
    real = [(batch, batch.mask > 0) for batch in feed.epoch(1)]
    right = sum(
        np.count_nonzero((batch.inputs[mask] + 1) % VOCABULARY == batch.targets[mask])
        for batch, mask in real
    )
    assert 0 < right < feed.predicted_tokens
    backend = new_oracle(Recipe(**SIZES), 1, 3, VOCABULARY, Successor)
    assert accuracy(backend, feed) == right / feed.predicted_tokens


def test_every_epoch_is_recorded_and_reported_and_training_lowers_the_loss() -> None:
    result, _, seen = run(Recipe(**SIZES, epochs=4))
    assert [epoch.epoch for epoch in result.history] == [1, 2, 3, 4]
    assert [p.finished for p in seen if p.finished] == result.history
    assert result.history[-1].train_nll < result.history[0].train_nll < np.log(VOCABULARY) + 0.1


def test_rolling_back_trains_on_from_the_best_parameters() -> None:
    recipe = Recipe(
        **{**SIZES, "constant_epochs": 4}, epochs=5, schedule="roll_back_then_decay",
        learning_rate=12.0, clip_norm=1.0, learning_rate_decay=0.01,
    )  # fmt: skip
    result, backend, _ = run(recipe)
    before = [epoch.valid_nll for epoch in result.history[:4]]
    assert min(before) < before[-1], "the rate should be too high to end at the best"
    rolled_back = backend.loaded[1]  # the first load is the initial draw
    probe = new_oracle(recipe, seed=3, vocabulary_size=VOCABULARY)
    probe.load_parameters(rolled_back)
    score = evaluate(probe, splits().valid)
    assert score.nll == pytest.approx(min(before), rel=1e-6)


def test_averaged_parameters_are_scored_and_kept_and_training_goes_on_from_its_own() -> None:
    changes: dict[str, Any] = {"schedule": "constant", "epochs": 3, "learning_rate": 6.0}
    plain, _, _ = run(Recipe(**SIZES, **changes))
    recipe = Recipe(**SIZES, **changes, optimizer="asgd", averaging_interval=None)
    result, backend, _ = run(recipe)
    assert [e.train_nll for e in result.history] == [e.train_nll for e in plain.history]
    assert result.history[-1].valid_nll < plain.history[-1].valid_nll
    assert result.best is not None
    assert result.best_parameters is not None
    backend.load_parameters(result.best_parameters)
    score = evaluate(backend, splits().valid)
    assert score.nll == pytest.approx(result.best.valid_nll, rel=1e-6)

    # The mean is of all steps since the beginning, over the borders of epochs.
    passed: list[Any] = []

    class Watched(Oracle):
        def train_step(self, *arguments: Any) -> TrainStep:
            step = super().train_step(*arguments)
            passed.append(self.p["softmax.bias"].copy())
            return step

    watched = new_oracle(recipe, 1, 3, VOCABULARY, Watched)
    whole = train(watched, splits(), Clocks(), lambda _: None)
    assert whole.best is not None
    assert whole.best.epoch == 3
    mean = np.mean(passed, axis=0)
    np.testing.assert_allclose(whole.best_parameters["softmax.bias"], mean, rtol=1e-5)


def is_zero(state: dict[str, Any]) -> bool:
    return not any(array.any() for array in state.values())


def test_state_is_carried_through_streams_and_zero_for_each_batch_of_windows() -> None:
    _, carried, _ = run(Recipe(**SIZES, epochs=1))
    assert is_zero(carried.states[0])
    assert not any(is_zero(state) for state in carried.states[1:])
    windows = Splits(*(Windows(text(n, n), 4, 6, wraps=n == 300) for n in (300, 90, 80)))
    result, fresh, _ = run(Recipe(**SIZES, epochs=2, feeding="windows"), windows)
    assert all(is_zero(state) for state in fresh.states)
    assert len(result.history) == 2


def test_a_loss_above_the_limit_or_not_finite_ends_the_run_as_diverged_with_its_history() -> None:
    limited, _, _ = run(Recipe(**SIZES, epochs=3, divergence_perplexity=1.5))
    assert limited.diverged is not None
    assert limited.diverged.startswith("the training perplexity of epoch 1 is ")
    assert limited.diverged.endswith(", above 1.5")
    assert limited.history == []
    assert limited.test is None

    class Breaks(Recorder):
        def train_step(self, *arguments: Any) -> TrainStep:
            result = super().train_step(*arguments)
            return result._replace(nll=float("nan")) if self.step > 20 else result

    recipe = Recipe(**SIZES, epochs=3)
    backend = new_oracle(recipe, 1, 3, VOCABULARY, Breaks)
    broken = train(backend, splits(), Clocks(), watch=list[Progress]().append)
    assert broken.diverged == "the training loss of epoch 2 is not finite"
    assert [broken.best] == broken.history


def test_equal_runs_have_equal_histories_but_for_the_clock() -> None:
    def history() -> list[dict[str, Any]]:
        result, _, _ = run(Recipe(**SIZES, epochs=3, dropout=0.3))
        clocked = {"tokens_per_second", "training_seconds", "validation_seconds"}
        return [epoch.model_dump(exclude=clocked) for epoch in result.history]

    assert history() == history()


def sentences() -> Splits:
    """Sentences of three lengths, the longest of which comes last."""
    tokens = np.concatenate([[*[1] * length, 0] for length in [*[3, 11] * 20, *[20] * 4]])
    return Splits(*(Sentences(tokens, 4, end_of_sentence=0) for _ in range(3)))


SENTENCES = Recipe(
    **SIZES, epochs=2, feeding="sentences", optimizer="adam", learning_rate=0.01, dropout=0.3
)


def test_a_step_of_every_shape_compiles_on_its_own_clock_before_training() -> None:
    running: list[str] = []
    first: dict[tuple[int, ...], str] = {}

    class Known(Clocks):
        @contextlib.contextmanager
        def __call__(self, phase: str) -> Iterator[None]:
            running.append(phase)
            with super().__call__(phase):
                yield
            running.pop()

    class Compiles(Recorder):
        def train_step(self, *arguments: Any) -> TrainStep:
            first.setdefault(arguments[0].inputs.shape, running[-1])
            return super().train_step(*arguments)

    backend = new_oracle(SENTENCES, 1, 0, VOCABULARY, Compiles)
    train(backend, sentences(), Known(), lambda _: None)
    assert first == {(8, 4): "compile", (16, 4): "compile", (24, 4): "compile"}


def test_compiling_every_shape_leaves_no_trace_in_the_result(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def result() -> tuple[list[float], dict[str, Any]]:
        trained, backend, _ = run(SENTENCES, sentences())
        numbers = [n for e in trained.history for n in (e.train_nll, e.valid_nll, e.gradient_norm)]
        assert backend.step == 2 * len(sentences().train)
        return numbers, backend.snapshot(backend.initial_state(4, training=True))

    numbers, after = result()
    monkeypatch.setattr(Trainer, "warm_up_training", lambda _: None)
    expected, expected_after = result()
    assert numbers == expected
    assert same(after, expected_after)


def test_a_run_that_fails_or_ends_early_leaves_no_thread_that_prepares_batches() -> None:
    class Breaks(Recorder):
        def train_step(self, *arguments: Any) -> TrainStep:
            if self.step == 5:
                raise RuntimeError("the step failed")
            return super().train_step(*arguments)

    ahead = Splits(*(Prefetched(feed, 2) for feed in splits()))
    recipe = Recipe(**SIZES, epochs=1)
    with pytest.raises(RuntimeError, match="the step failed"):
        train(new_oracle(recipe, 1, 0, VOCABULARY, Breaks), ahead, Clocks(), lambda _: None)
    assert [thread.name for thread in threading.enumerate() if thread.name == "prefetch"] == []
    run(recipe, ahead)
    assert [thread.name for thread in threading.enumerate() if thread.name == "prefetch"] == []
