"""Learning rates, rolling back and stopping, against their definitions."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptbench.model.recipe import Recipe
from ptbench.training.records import Epoch
from ptbench.training.schedules import (
    averages_since,
    learning_rate,
    plateau_decays,
    rolls_back,
    stop,
)


def history(*valid_nlls: float, seconds: float = 1.0) -> list[Epoch]:
    """Epochs of which the validation nll alone matters."""
    return [
        Epoch(
            epoch=number, learning_rate=1, train_nll=1, train_perplexity=math.e, valid_nll=nll,
            valid_perplexity=math.exp(nll), gradient_norm=1, tokens_per_second=1,
            training_seconds=seconds, validation_seconds=1,
        )
        for number, nll in enumerate(valid_nlls, start=1)
    ]  # fmt: skip


def rates(recipe: Recipe, *valid_nlls: float) -> list[float]:
    """The rate of each epoch that would see these validation losses, and of the next."""
    seen = history(*valid_nlls)
    return [learning_rate(recipe, seen[:count]) for count in range(len(seen) + 1)]


def test_constant_then_decay_is_that_of_the_tensorflow_tutorial() -> None:
    """Its small configuration: max_epoch 4, lr_decay 0.5, epochs counted from 0 there."""
    recipe = Recipe(constant_epochs=4, learning_rate_decay=0.5, learning_rate=1.0, epochs=13)
    tutorial = [0.5 ** max(i + 1 - 4, 0.0) for i in range(13)]
    assert rates(recipe, *[5.0] * 12) == tutorial


class ReduceLROnPlateau:
    """Keras 2.1.3's callback in mode min, transcribed: the specification of `plateau`."""

    def __init__(self, lr: float, factor: float, patience: int, epsilon: float) -> None:
        self.lr, self.factor, self.patience, self.epsilon = lr, factor, patience, epsilon
        self.best, self.wait, self.min_lr = math.inf, 0, 0.0

    def on_epoch_end(self, current: float) -> None:
        if current < self.best - self.epsilon:
            self.best, self.wait = current, 0
        else:
            if self.wait >= self.patience:
                self.lr = max(self.lr * self.factor, self.min_lr)
                self.wait = 0
            self.wait += 1


@pytest.mark.parametrize("patience", [0, 1, 2, 3])
@pytest.mark.parametrize(
    "nlls",
    [
        (5, 4, 4.1, 4.2, 4.3, 4.4, 3.9, 3.95, 3.96, 3.97),
        (5, 5, 5, 5, 5, 5, 5),
        (5, 4.99995, 4.9999, 4.9, 4.95, 4.8, 4.85, 4.86),
        (3, 4, 2, 5, 1, 6, 7, 8),
    ],
)
def test_plateau_is_keras_2_1_3(patience: int, nlls: tuple[float, ...]) -> None:
    recipe = Recipe(
        schedule="plateau", learning_rate=1, learning_rate_decay=0.1, plateau_patience=patience
    )
    keras = ReduceLROnPlateau(1.0, 0.1, patience, 1e-4)
    expected = [1.0]
    for nll in nlls:
        keras.on_epoch_end(nll)
        expected.append(keras.lr)
    assert rates(recipe, *nlls) == pytest.approx(expected)


def test_plateau_cuts_at_the_second_epoch_without_improvement_and_then_at_every_further_one() -> (
    None
):
    """As the logs of the Keras thesis show (experiments, A.0)."""
    recipe = Recipe(schedule="plateau", learning_rate_decay=0.1)
    seen = history(5, 4, 4.1, 4.2, 4.3, 4.4, 3.5, 3.6, 3.7)
    assert [plateau_decays(recipe, seen[:n]) for n in range(1, 10)] == [0, 0, 0, 1, 2, 3, 3, 3, 4]


def test_plateau_without_patience_divides_by_four_as_the_pytorch_example_does() -> None:
    recipe = Recipe(
        schedule="plateau", learning_rate=20, learning_rate_decay=0.25, plateau_patience=0,
        plateau_threshold=0,
    )  # fmt: skip
    assert rates(recipe, 6, 5, 5.5, 4.9, 4.95, 4.96) == [20, 20, 20, 5, 5, 1.25, 0.3125]


def test_warm_up_rises_step_by_step_and_decays_after() -> None:
    recipe = Recipe(
        schedule="warm_up_then_decay", learning_rate=2, warm_up_epochs=2, learning_rate_decay=0.25
    )
    assert learning_rate(recipe, [], 0.5) == pytest.approx(0.5)
    assert learning_rate(recipe, history(5), 1.0) == pytest.approx(2)
    assert learning_rate(recipe, history(5, 5), 0.5) == pytest.approx(1)
    assert learning_rate(recipe, history(5, 5, 5), 1.0) == pytest.approx(2 / 16)


def test_rolling_back_happens_once_after_the_constant_epochs() -> None:
    recipe = Recipe(schedule="roll_back_then_decay", constant_epochs=2, epochs=9)
    seen = history(5, 4, 4.5, 3, 3)
    assert [rolls_back(recipe, seen[:n]) for n in range(6)] == [False, False, True] + [False] * 3
    assert rates(recipe, 5, 4, 4.5) == [1, 1, 0.5, 0.25]


@pytest.mark.parametrize(
    ("limits", "nlls", "expected"),
    [
        ({"epochs": 4}, (5, 4, 3), None),
        ({"epochs": 4}, (5, 4, 3, 2), "epochs"),
        ({"patience": 2}, (5, 4, 4.1), None),
        ({"patience": 2}, (5, 4, 4.1, 4.0), "patience"),  # no lower is no improvement
        ({"patience": 2}, (5, 4, 4.1, 3.9), None),
        ({"target_perplexity": 60}, (5, 4.2), None),  # exp(4.2) is 66.7
        ({"target_perplexity": 60}, (5, 4.05), "target_perplexity"),  # and exp(4.05) 57.4
        ({"maximum_seconds": 3}, (5, 4), None),
        ({"maximum_seconds": 3}, (5, 4, 3), "maximum_seconds"),
    ],
)
def test_training_stops_at_the_recipe_s_limit(
    limits: dict[str, Any], nlls: tuple[float, ...], expected: str | None
) -> None:
    assert stop(Recipe(**limits), history(*nlls)) == expected


def merity_switches(nlls: list[float], interval: int) -> int | None:
    """When the code of Merity et al. 2017 turns to ASGD, transcribed: the epochs before it."""
    earlier: list[float] = []
    for epoch, nll in enumerate(nlls, start=1):
        if len(earlier) > interval and nll > min(earlier[:-interval]):
            return epoch
        earlier.append(nll)
    return None


@given(
    nlls=st.lists(st.integers(0, 12).map(float), max_size=14),
    interval=st.integers(1, 5),
)
def test_averaging_begins_where_the_code_of_merity_et_al_begins(
    nlls: list[float], interval: int
) -> None:
    recipe = Recipe(optimizer="asgd", averaging_interval=interval)
    assert averages_since(recipe, history(*nlls)) == merity_switches(nlls, interval)


def test_averaging_begins_at_once_where_told_and_never_with_another_optimizer() -> None:
    rising = history(1.0, 2.0, 3.0, 4.0)
    assert averages_since(Recipe(optimizer="asgd", averaging_interval=None), rising) == 0
    assert averages_since(Recipe(optimizer="asgd", averaging_interval=None), []) == 0
    assert averages_since(Recipe(optimizer="sgd", averaging_interval=1), rising) is None
    assert averages_since(Recipe(optimizer="asgd", averaging_interval=1), rising) == 3


def test_fine_tuning_starts_from_the_best_parameters_with_a_mean_and_a_rate_of_its_own() -> None:
    recipe = Recipe(
        optimizer="asgd", averaging_interval=1, schedule="constant", learning_rate=30.0,
        epochs=5, constant_epochs=0, fine_tuning_epochs=2, fine_tuning_learning_rate=25.0,
    )  # fmt: skip
    seen = history(5.0, 4.0, 3.0, 2.0)
    assert [rolls_back(recipe, seen[:n]) for n in range(5)] == [False, False, False, True, False]
    assert [averages_since(recipe, seen[:n]) for n in range(5)] == [None, None, None, 3, 3]
    assert [learning_rate(recipe, seen[:n]) for n in range(5)] == [30, 30, 30, 25, 25]


@given(
    before=st.lists(st.integers(0, 12).map(float), min_size=3, max_size=3),
    after=st.lists(st.integers(0, 12).map(float), min_size=1, max_size=9),
    interval=st.integers(1, 4),
)
def test_fine_tuning_ends_where_the_code_of_merity_et_al_ends(
    before: list[float], after: list[float], interval: int
) -> None:
    """The same rule, of the epochs of fine-tuning alone."""
    recipe = Recipe(
        optimizer="asgd", averaging_interval=interval, epochs=13, constant_epochs=0,
        fine_tuning_epochs=10,
    )  # fmt: skip
    if merity_switches(after[:-1], interval) is not None:
        return  # it had ended
    ends = merity_switches(after, interval) is not None
    assert stop(recipe, history(*before, *after)) == ("fine_tuning" if ends else None)
