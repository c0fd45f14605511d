"""Shapes, counts, divisors and shares that all backends take from the contract."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptbench.backends.contract import (
    Parameters,
    check_parameters,
    device_columns,
    objective_divisor,
    parameter_count,
    parameter_shapes,
    rate_and_epsilon,
    slot_names,
)
from ptbench.configuration.models import Recipe

SMALL = Recipe(layers=2, embedding_size=3, hidden_size=2)


def parameters_of(recipe: Recipe, vocabulary_size: int) -> Parameters:
    shapes = parameter_shapes(recipe, vocabulary_size)
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


def test_a_model_has_an_embedding_two_weights_and_a_bias_for_each_layer_and_a_softmax() -> None:
    assert parameter_shapes(SMALL, 7) == {
        "embedding": (7, 3),
        "rnn.0.input": (3, 8),
        "rnn.0.recurrent": (2, 8),
        "rnn.0.bias": (8,),
        "rnn.1.input": (2, 8),
        "rnn.1.recurrent": (2, 8),
        "rnn.1.bias": (8,),
        "softmax.weight": (7, 2),
        "softmax.bias": (7,),
    }


@pytest.mark.parametrize(
    ("hidden_size", "published"), [(200, "4.652"), (650, "19.775"), (1500, "66.022")]
)
def test_zaremba_s_models_have_the_published_number_of_parameters(
    hidden_size: int, published: str
) -> None:
    """In millions, of the small, medium and large model on PTB's 10,000 words."""
    recipe = Recipe(layers=2, embedding_size=hidden_size, hidden_size=hidden_size)
    assert f"{parameter_count(recipe, 10_000) / 1e6:.3f}" == published


def test_the_model_s_own_parameters_are_accepted() -> None:
    check_parameters(parameters_of(SMALL, 7), SMALL, 7)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"rnn.1.bias": None}, "lack rnn.1.bias"),
        ({"rnn.2.bias": np.zeros(8)}, "have rnn.2.bias, which the model does not"),
        (
            {"softmax.weight": np.zeros((2, 7))},
            r"softmax.weight has shape \(2, 7\); the model has \(7, 2\)",
        ),
    ],
    ids=["missing", "unknown", "transposed"],
)
def test_other_parameters_are_refused_by_name(change: dict[str, Any], sentence: str) -> None:
    changed = {
        name: array
        for name, array in (parameters_of(SMALL, 7) | change).items()
        if array is not None
    }
    with pytest.raises(ValueError, match=sentence):
        check_parameters(changed, SMALL, 7)


def test_a_sum_over_time_is_divided_by_the_batch_size_and_a_mean_by_the_real_tokens() -> None:
    mask = np.array([[1, 1, 1], [1, 0, 0]], np.float32)
    assert objective_divisor(Recipe(objective="sum_over_time"), mask) == 3
    assert objective_divisor(Recipe(objective="mean_per_token"), mask) == 4


def test_the_mean_over_nothing_but_padding_is_not_divided_by_zero() -> None:
    mask = np.zeros((2, 3), np.float32)
    assert objective_divisor(Recipe(objective="mean_per_token"), mask) == 1


def test_adam_keeps_two_moments_of_each_parameter_and_sgd_nothing() -> None:
    names = list(parameter_shapes(SMALL, 7))
    adam = SMALL.model_copy(update={"optimizer": "adam"})
    moments = ("first_moment", "second_moment")
    assert slot_names(adam, 7) == [(moment, name) for moment in moments for name in names]
    assert slot_names(SMALL, 7) == []


@given(step=st.integers(0, 10_000), m=st.floats(-10, 10), v=st.floats(1e-6, 10))
def test_adam_s_rate_and_epsilon_correct_the_bias_of_both_moments(
    step: int, m: float, v: float
) -> None:
    recipe = Recipe(optimizer="adam", optimizer_epsilon=0.01)
    rate, epsilon = rate_and_epsilon(recipe, 0.3, step)
    m_hat, v_hat = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.999 ** (step + 1))
    expected = 0.3 * m_hat / (math.sqrt(v_hat) + 0.01)
    assert rate * m / (math.sqrt(v) + epsilon) == pytest.approx(expected, rel=1e-9)


def test_other_optimizers_rate_and_epsilon_are_the_recipe_s() -> None:
    assert rate_and_epsilon(Recipe(optimizer="rmsprop"), 0.3, 0) == (0.3, 1e-7)


@given(share=st.integers(1, 50), devices=st.integers(1, 16))
def test_devices_share_the_columns_evenly_in_contiguous_blocks(share: int, devices: int) -> None:
    columns = np.arange(share * devices)
    blocks = [columns[block] for block in device_columns(columns.size, devices)]
    assert [block.size for block in blocks] == [share] * devices
    np.testing.assert_array_equal(np.concatenate(blocks), columns)


def test_a_batch_that_does_not_divide_by_the_devices_is_refused() -> None:
    with pytest.raises(ValueError, match="a batch of 5 does not divide by 2 devices"):
        device_columns(5, 2)
