"""What all backends share: shapes, counts, layouts, divisors and shares of a batch."""

from __future__ import annotations

import math
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.problems import new_oracle

from ptbench.corpus.batching import Batch
from ptbench.model.optimizers import OPTIMIZER_SLOTS, rate_and_epsilon
from ptbench.model.parameters import (
    Layout,
    Parameters,
    check_parameters,
    kept_count,
    kept_weights,
    parameter_count,
    parameter_shapes,
    smallest_draws,
)
from ptbench.model.recipe import Recipe

SMALL = Recipe(layers=2, embedding_size=3, hidden_size=2)


def test_slots_have_the_names_that_checkpoints_have() -> None:
    """Another name, and no older checkpoint is read any more."""
    assert OPTIMIZER_SLOTS == {
        "sgd": (),
        "adam": ("first_moment", "second_moment"),
        "rmsprop": ("mean_square",),
        "asgd": ("average",),
    }


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


def test_the_model_s_own_parameters_are_accepted() -> None:
    check_parameters(parameters_of(SMALL, 7), parameter_shapes(SMALL, 7))


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
        check_parameters(changed, parameter_shapes(SMALL, 7))


def divisor(objective: str, mask: list[list[int]]) -> float:
    real = np.array(mask, np.float32)
    words = np.zeros(real.shape, np.int32)
    oracle = new_oracle(SMALL.model_copy(update={"objective": objective}), vocabulary_size=7)
    return oracle.objective_divisor(Batch(words, words, real))


def test_a_sum_over_time_is_divided_by_the_batch_size_and_a_mean_by_the_real_tokens() -> None:
    mask = [[1, 1, 1], [1, 0, 0]]
    assert divisor("sum_over_time", mask) == 3
    assert divisor("mean_per_token", mask) == 4


def test_the_mean_over_nothing_but_padding_is_not_divided_by_zero() -> None:
    assert divisor("mean_per_token", [[0, 0, 0], [0, 0, 0]]) == 1


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


@given(share=st.integers(1, 5), devices=st.integers(1, 16), axis=st.integers(0, 1))
def test_devices_share_a_batch_evenly_in_contiguous_blocks(
    share: int, devices: int, axis: int
) -> None:
    array = np.arange(2 * share * devices).reshape(2, -1)
    array = array if axis == 1 else array.T
    oracle = new_oracle(SMALL, devices=devices, vocabulary_size=7)
    blocks = oracle.shares(array, axis)
    assert [block.shape[axis] for block in blocks] == [share] * devices
    np.testing.assert_array_equal(np.concatenate(blocks, axis), array)
    assert not any(np.shares_memory(block, array) for block in blocks)


def test_a_batch_that_does_not_divide_by_the_devices_is_refused() -> None:
    oracle = new_oracle(SMALL, devices=2, vocabulary_size=7)
    with pytest.raises(ValueError, match="a batch of 5 does not divide by 2 devices"):
        oracle.shares(np.zeros((3, 5)), axis=1)


@given(
    gates=st.sampled_from([(), (1, 0, 2), (2, 0, 1)]),
    transposed=st.booleans(), sparse=st.booleans(), packed=st.booleans(),
)  # fmt: skip
def test_an_array_comes_back_from_any_layout_as_it_was(
    gates: tuple[int, ...], transposed: bool, sparse: bool, packed: bool
) -> None:
    rng = np.random.default_rng(0)
    array = rng.random((4, 6)).astype(np.float32)
    kept = rng.random((4, 6)) < 0.5 if sparse else None
    layout = Layout(transposed, gates, kept, packed=packed and sparse)
    stored = layout.stored(array)
    expected = array if kept is None else array * kept
    np.testing.assert_array_equal(layout.canonical(stored), expected)
    if not packed and not gates:
        np.testing.assert_array_equal(stored, expected.T if transposed else expected)


def test_gates_are_stored_in_the_order_of_the_framework() -> None:
    reset, update, candidate = np.arange(3.0).reshape(3, 1).repeat(2, axis=1)
    array = np.concatenate([reset, update, candidate])
    stored = Layout(gate_order=(1, 0, 2)).stored(array)
    np.testing.assert_array_equal(stored, np.concatenate([update, reset, candidate]))


LARGE_MOS = {"mixtures": 15, "layers": 2, "embedding_size": 1500, "hidden_size": 1500}
MEDIUM = {"layers": 2, "embedding_size": 650, "hidden_size": 650}
# BM of the TensorFlow thesis: its Table A.2 with 5 mixtures.
BEST_MOS = {"layers": 3, "embedding_size": 900, "hidden_size": 900, "mixtures": 5}
CUDNN = MEDIUM | {"recurrent_bias": True}  # cuDNN's LSTM has two bias vectors


@pytest.mark.parametrize(
    ("model", "millions"),
    [
        ({"layers": 2, "embedding_size": 200, "hidden_size": 200}, 4.652),
        (MEDIUM, 19.775),
        ({"layers": 2, "embedding_size": 1500, "hidden_size": 1500}, 66.022),
        ({"layers": 2, "embedding_size": 200, "hidden_size": 200, "mixtures": 15}, 5.258),
        (MEDIUM | {"mixtures": 15}, 26.132),
        (LARGE_MOS, 99.817),
        (BEST_MOS, 41.520),
        (BEST_MOS | {"mixtures": 14}, 48.826),
        (MEDIUM | {"mixtures": 10, "tie_weights": True, "softmax_bias": False}, 17.503),
        (MEDIUM | {"mixtures": 10, "output_rank": 256}, 20.240),
        (CUDNN | {"layers": 1}, 16.395),
        (CUDNN, 19.780),
        (CUDNN | {"mixtures": 10}, 24.018),
    ],
)
def test_models_have_the_published_number_of_parameters(
    model: dict[str, Any], millions: float
) -> None:
    """Zhang 2018, Tables 5.1, 6.1, 7.2, 7.3; Singh 2018, section 4.3."""
    count = parameter_count(Recipe.model_validate(model), vocabulary_size=10_000)
    assert f"{count / 1e6:.3f}" == f"{millions:.3f}"


# Table 1 of SparseLang 2018 prints thousands of weights rounded to two figures; with the biases,
# of which there are 8 x 2250, the count is 18,000 higher.
@pytest.mark.parametrize(
    ("kept", "thousands"), [(0.01, 810), (0.005, 405), (0.002, 162), (0.001, 81), (0.0005, 40.5)]
)
def test_a_sparse_model_keeps_the_share_of_the_weights(kept: float, thousands: float) -> None:
    recipe = Recipe(layers=2, embedding_size=2250, hidden_size=2250, kept_weights=kept)
    shapes = parameter_shapes(recipe, 10_000)
    count = sum(
        kept_count(recipe, name, shape)
        for name, shape in shapes.items()
        if name.endswith((".input", ".recurrent"))
    )
    assert count / 1000 == pytest.approx(thousands, rel=1e-4)


def test_every_gate_keeps_the_same_number_of_weights_and_the_seed_says_which() -> None:
    recipe = Recipe(layers=2, embedding_size=12, hidden_size=16, kept_weights=0.3, rnn="gru")
    masks = kept_weights(recipe, 40, seed=1)
    again, other = kept_weights(recipe, 40, seed=1), kept_weights(recipe, 40, seed=2)
    shapes = parameter_shapes(recipe, 40)
    assert {name: mask.shape for name, mask in masks.items()} == {
        name: shape for name, shape in shapes.items() if name.endswith((".input", ".recurrent"))
    }
    drawn = []
    for name, mask in masks.items():
        for gate in np.split(mask, 3, axis=1):
            assert gate.sum() == round(0.3 * gate.size)
            drawn.append(gate.ravel())
        np.testing.assert_array_equal(again[name], mask)
        assert not np.array_equal(other[name], mask)
    assert len({tuple(gate) for gate in drawn}) == len(drawn)


@pytest.mark.parametrize("chunk", [1, 7, 100, 1000])
@pytest.mark.parametrize("count", [1, 30, 999, 1000])
def test_which_weights_are_kept_does_not_depend_on_the_size_of_the_chunks(
    count: int, chunk: int
) -> None:
    order = np.argsort(np.random.default_rng(5).random(1000), kind="stable")
    drawn = smallest_draws(np.random.default_rng(5), 1000, count, chunk)
    np.testing.assert_array_equal(drawn, order[:count])


def test_drawing_few_weights_of_a_wide_gate_takes_little_memory() -> None:
    tracemalloc.start()
    drawn = smallest_draws(np.random.default_rng(1), 20_000_000, 2000, chunk=1 << 18)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(set(drawn.tolist())) == 2000
    assert peak < 8 * 20_000_000 / 10  # of the bytes of all numbers together
