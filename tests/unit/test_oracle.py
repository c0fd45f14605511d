"""The float64 oracle, which all frameworks are compared with, against calculus and theory."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.problems import new_oracle

from ptbench.backends.oracle import Gru, Layer, Lstm, Oracle, log_softmax, sigmoid
from ptbench.corpus.batching import Batch
from ptbench.model.recipe import Recipe

VOCABULARY, TIME, BATCH = 5, 3, 2


def oracle_with(**changes: Any) -> Oracle:
    small = {"layers": 2, "embedding_size": 3, "hidden_size": 4, "initialization_scale": 0.5}
    oracle = new_oracle(Recipe.model_validate(small | changes), seed=1, vocabulary_size=VOCABULARY)
    rng = np.random.default_rng(2)
    oracle.load_parameters({name: rng.uniform(-1, 1, p.shape) for name, p in oracle.p.items()})
    return oracle


def random_state(oracle: Oracle) -> dict[str, Any]:
    rng = np.random.default_rng(4)
    zero = oracle.initial_state(BATCH, True)
    return {name: rng.uniform(-1, 1, array.shape) for name, array in zero.items()}


MOS = {"mixtures": 3, "latent_size": 2, "latent_dropout": 0.3}
MODELS: dict[str, dict[str, Any]] = {
    "one layer": {"layers": 1},
    "mean per token": {"objective": "mean_per_token"},
    "dropout": {"dropout": 0.4},
    "gru": {"rnn": "gru"},
    "gru, two biases, recurrent dropout": {
        "rnn": "gru", "recurrent_bias": True, "recurrent_dropout": 0.4
    },
    "rnn_tanh": {"rnn": "rnn_tanh"},
    "rnn_relu, two biases": {"rnn": "rnn_relu", "recurrent_bias": True},
    "another last width": {"last_hidden_size": 3, "recurrent_dropout": 0.4},
    "sparse": {"kept_weights": 0.4},
    "tied": {"tie_weights": True, "hidden_size": 3, "softmax_bias": False},
    "tied behind a projection": {"tie_weights": True, "word_dropout": 0.3},
    "factorised": {"output_rank": 2},
    "mixture": MOS,
    "mixture, tied behind a projection": MOS | {"tie_weights": True},
    "mixture, factorised": MOS | {"output_rank": 1, "latent_size": None},
    "every dropout, locked": MOS
    | {
        "dropout_kind": "locked", "input_dropout": 0.2, "hidden_dropout": 0.3,
        "output_dropout": 0.4, "word_dropout": 0.2, "recurrent_dropout": 0.3,
        "weight_dropout": 0.4,
    },
    "weight dropout, gru": {"weight_dropout": 0.4, "rnn": "gru", "recurrent_bias": True},
    "weight dropout, sparse": {"weight_dropout": 0.4, "kept_weights": 0.6},
    "penalties": {"activation_regularization": 2.0, "temporal_activation_regularization": 3.0},
    "penalties, dropout, mean per token": {
        "activation_regularization": 2.0, "temporal_activation_regularization": 3.0,
        "dropout": 0.4, "objective": "mean_per_token", "rnn": "gru",
    },
}  # fmt: skip


def batch_of(steps: int, seed: int = 3) -> Batch:
    rng = np.random.default_rng(seed)
    inputs, targets = rng.integers(0, VOCABULARY, (2, steps, BATCH), np.int32)
    mask = np.ones((steps, BATCH), np.float32)
    mask[-1, 1] = 0
    return Batch(inputs, targets, mask)


def penalties(oracle: Oracle, batch: Batch, state: dict[str, Any]) -> float:
    """Return the sum of both activation regularisations over real tokens, by their definition."""
    recipe = oracle.recipe
    masks = oracle.dropout_masks(*batch.inputs.shape) if recipe.drops else oracle.no_masks
    forward = oracle.forward(batch.inputs, state, masks)
    h = forward.traces[-1].h[1:]
    total = 0.0
    for t, b in np.argwhere(batch.mask):
        total += recipe.activation_regularization * float((forward.top[t, b] ** 2).mean())
        if t and batch.mask[t - 1, b]:
            change = float(((h[t, b] - h[t - 1, b]) ** 2).mean())
            total += recipe.temporal_activation_regularization * change
    return total


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS.keys())
def test_gradients_are_the_objective_s_central_differences(changes: dict[str, Any]) -> None:
    oracle, batch = oracle_with(**changes), batch_of(TIME)
    state = random_state(oracle)
    divisor = oracle.objective_divisor(batch)
    _, gradients, _ = oracle.loss_and_gradients(batch, state)
    # Rounding costs about epsilon / h, and truncation h^2 / 6 times the third derivative, so the
    # cube root of epsilon is nearly the best h. The factor of 10 allows for many roundings.
    epsilon = np.finfo(np.float64).eps
    h = epsilon ** (1 / 3)

    def objective_at(array: Any, index: tuple[int, ...], value: float) -> float:
        before = array[index]
        array[index] = value
        nll, _, _ = oracle.loss_and_gradients(batch, state)
        total = nll + penalties(oracle, batch, state)
        array[index] = before
        return total / divisor

    for name, array in oracle.p.items():
        for index in np.argwhere(np.broadcast_to(oracle.kept.get(name, True), array.shape)):
            index = tuple(index)
            above = objective_at(array, index, array[index] + h)
            below = objective_at(array, index, array[index] - h)
            tolerance = 10 * epsilon / h * abs(above) + h**2
            assert gradients[name][index] == pytest.approx(
                (above - below) / (2 * h), rel=0, abs=tolerance
            ), (name, index)


def test_one_unit_of_an_lstm_does_as_computed_by_hand() -> None:
    # Gates i, f, g, o of 3/4, 1/4, 3/5, 1/2, as sigmoid(log 3) = 3/4 and tanh(log 2) = 3/5.
    z = np.array([math.log(3), -math.log(3), math.log(2), 0.0])
    x, h0 = 2.0, 4.0
    w, u, b = z[None] / 4, z[None] / 16, z / 4  # x w + h u + b = z
    # c = c0 / 4 + 3/4 * 3/5 = log 2, so h = 1/2 * tanh(log 2) = 3/10.
    c0 = 4 * (math.log(2) - 9 / 20)
    layer = Layer(Lstm, w, u, b, np.zeros(4), np.ones(1))
    trace = layer.forward(np.array([[[x]]]), np.array([[h0]]), np.array([[c0]]))
    np.testing.assert_allclose(trace.steps[0].gates[0], [3 / 4, 1 / 4, 3 / 5, 1 / 2], rtol=1e-14)
    assert trace.c[1, 0, 0] == pytest.approx(math.log(2), rel=1e-14)
    assert trace.h[1, 0, 0] == pytest.approx(3 / 10, rel=1e-14)


def test_one_unit_of_a_gru_does_as_computed_by_hand() -> None:
    # Reset 3/4 and update 1/4, as sigmoid(log 3) = 3/4; the candidate is tanh(log 2) = 3/5 of
    # 1/4 log 2 from the input and, before the reset, log 2 from the previous output and its bias.
    z = np.array([math.log(3), -math.log(3), math.log(2)])
    w, b = z[None] / np.array([4, 4, 16]), z / np.array([4, 4, 8])  # x w + b: 3/4, 3/4, 1/4 of z
    u = z[None] / np.array([16, 16, 8])
    r = np.array([0.0, 0.0, z[2] / 2])  # h u + r: 1/4, 1/4, 1 of z
    layer = Layer(Gru, w, u, b, r, np.ones(1))
    trace = layer.forward(np.array([[[2.0]]]), np.array([[4.0]]), np.zeros((1, 1)))
    np.testing.assert_allclose(trace.steps[0].gates[0], [3 / 4, 1 / 4, 3 / 5], rtol=1e-14)
    assert trace.h[1, 0, 0] == pytest.approx(3 / 4 * 3 / 5 + 1 / 4 * 4, rel=1e-14)


def test_sigmoid_neither_overflows_nor_loses_its_symmetry() -> None:
    x = np.array([-1000.0, -1.0, 0.0, 1.0, 1000.0])
    with np.errstate(all="raise"):
        y = sigmoid(x)
    np.testing.assert_allclose(y, [0, 1 / (1 + math.e), 0.5, math.e / (1 + math.e), 1], rtol=1e-14)


def test_log_softmax_is_exact_where_probabilities_underflow() -> None:
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        result = log_softmax(np.array([[1000.0, 0.0, -1000.0]]))
    np.testing.assert_array_equal(result, [[0, -1000, -2000]])


def test_log_softmax_is_the_logarithm_of_a_distribution() -> None:
    logits = np.random.default_rng(1).normal(0, 3, (2, 3, 7))
    np.testing.assert_allclose(np.exp(log_softmax(logits)).sum(axis=-1), 1, rtol=1e-14)
    np.testing.assert_allclose(log_softmax(logits + 50), log_softmax(logits), atol=1e-13)


def test_a_uniform_model_loses_log_vocabulary_nats_for_each_token() -> None:
    oracle, batch = oracle_with(), batch_of(TIME)
    oracle.load_parameters({name: np.zeros_like(p) for name, p in oracle.p.items()})
    nll = oracle.evaluate_step(batch, oracle.initial_state(BATCH, False)).nll
    assert nll == pytest.approx(batch.mask.sum() * math.log(VOCABULARY), rel=1e-14)


def test_two_windows_with_carried_state_are_one_window_of_both() -> None:
    oracle, batch = oracle_with(), batch_of(2 * TIME)
    start = oracle.initial_state(BATCH, False)
    whole = oracle.evaluate_step(batch, start)
    first = oracle.evaluate_step(Batch(*(array[:TIME] for array in batch)), start)
    second = oracle.evaluate_step(Batch(*(array[TIME:] for array in batch)), first.state)
    assert first.nll + second.nll == pytest.approx(whole.nll, rel=1e-14)
    for name, array in whole.state.items():
        np.testing.assert_allclose(second.state[name], array, rtol=1e-14)


def test_evaluation_adds_up_the_log_probabilities_of_the_targets() -> None:
    oracle, (inputs, targets, mask) = oracle_with(), batch_of(TIME)
    state = oracle.initial_state(BATCH, False)
    log_p, _ = oracle.next_token_log_probabilities(inputs, state)
    expected = -sum(
        mask[t, b] * float(log_p[t, b, targets[t, b]]) for t, b in np.ndindex(TIME, BATCH)
    )
    assert oracle.evaluate_step(Batch(inputs, targets, mask), state).nll == pytest.approx(expected)


@pytest.mark.parametrize("clip_norm", [None, 0.01, 1000.0])
def test_a_step_goes_against_the_gradient_and_no_further_than_the_clip_norm_allows(
    clip_norm: float | None,
) -> None:
    oracle, batch, rate = oracle_with(clip_norm=clip_norm), batch_of(TIME), 0.1
    before = {name: p.copy() for name, p in oracle.p.items()}
    state = oracle.initial_state(BATCH, True)
    _, gradients, _ = oracle.loss_and_gradients(batch, state)
    norm = math.sqrt(sum(float((g**2).sum()) for g in gradients.values()))
    step = oracle.train_step(batch, state, rate)
    assert step.gradient_norm == pytest.approx(norm)
    assert norm > 0.01
    scale = 0.01 / norm if clip_norm == 0.01 else 1
    for name, p in oracle.p.items():
        np.testing.assert_allclose(before[name] - p, rate * scale * gradients[name], atol=1e-14)


def test_weight_decay_adds_its_multiple_of_the_parameters_to_the_clipped_gradient() -> None:
    plain, decayed = oracle_with(clip_norm=0.01), oracle_with(clip_norm=0.01, weight_decay=0.3)
    before = {name: p.copy() for name, p in plain.p.items()}
    norms = [
        oracle.train_step(batch_of(TIME), oracle.initial_state(BATCH, True), 0.1).gradient_norm
        for oracle in (plain, decayed)
    ]
    assert norms[0] == norms[1]  # the penalty is not clipped
    for name in before:
        difference = plain.p[name] - decayed.p[name]
        np.testing.assert_allclose(difference, 0.1 * 0.3 * before[name], atol=1e-14)


def directions(gradients: list[float], **changes: Any) -> list[float]:
    """Return what a rate of 1 subtracts from a number at each of these gradients."""
    oracle, subtracted = oracle_with(**changes), []
    for gradient in gradients:
        oracle.step += 1
        bias = np.full_like(oracle.p["softmax.bias"], gradient)
        subtracted.append(float(oracle.direction("softmax.bias", bias)[0]))
    return subtracted


def test_adam_s_step_at_a_constant_gradient_is_the_rate_whatever_the_betas() -> None:
    """Corrected for their bias, the moments of a constant g are g and g^2."""
    betas = {"adam_beta1": 0.7, "adam_beta2": 0.95, "optimizer_epsilon": 0.01}
    for g in (2.0, -0.03):
        expected = [g / (abs(g) + 0.01)] * 5
        assert directions([g] * 5, optimizer="adam", **betas) == pytest.approx(expected)


def test_adam_s_second_step_is_as_computed_by_hand() -> None:
    # m: 0.5 * 4 = 2, then 0.5 * 2 + 0.5 * 1 = 1.5; v: 0.25 * 16 = 4, then 0.75 * 4 + 0.25 = 3.25;
    # 1 - 0.5^2 = 0.75 and 1 - 0.75^2 = 0.4375
    expected = [4 / 4.1, 1.5 / 0.75 / (math.sqrt(3.25 / 0.4375) + 0.1)]
    betas = {"adam_beta1": 0.5, "adam_beta2": 0.75, "optimizer_epsilon": 0.1}
    assert directions([4.0, 1.0], optimizer="adam", **betas) == pytest.approx(expected)


def test_rmsprop_s_mean_square_of_a_constant_gradient_grows_as_one_minus_decay_to_the_t() -> None:
    g, decay, epsilon = 3.0, 0.8, 0.1
    expected = [g / (g * math.sqrt(1 - decay**t) + epsilon) for t in range(1, 6)]
    changes = {"rmsprop_decay": decay, "optimizer_epsilon": epsilon}
    assert directions([g] * 5, optimizer="rmsprop", **changes) == pytest.approx(expected)


def test_averaged_sgd_moves_as_sgd_does_and_keeps_the_mean_of_its_last_parameters() -> None:
    plain, averaging = oracle_with(), oracle_with(optimizer="asgd")
    state, passed = plain.initial_state(BATCH, True), []
    for averaged in (1, 1, 1, 2, 3):
        averaging.average_from = 2 if averaging.step >= 2 else None
        assert averaging.averaged == averaged
        for oracle in (plain, averaging):
            oracle.train_step(batch_of(TIME), state, 0.1)
        passed.append(plain.p["softmax.weight"].copy())
        if averaged == 1:
            assert np.array_equal(averaging.arrays["average"]["softmax.weight"], passed[-1])
    assert np.array_equal(averaging.p["softmax.weight"], passed[-1])
    mean = averaging.arrays["average"]["softmax.weight"]
    np.testing.assert_allclose(mean, np.mean(passed[2:], axis=0), rtol=1e-14)


def test_a_gradient_of_zero_moves_nothing() -> None:
    for optimizer in ("sgd", "adam", "rmsprop", "asgd"):
        assert directions([0.0, 0.0], optimizer=optimizer) == [0, 0]


def test_dropout_keeps_the_mean_of_what_it_drops() -> None:
    rates = {"dropout": 0.4, "latent_dropout": 0.3, "word_dropout": 0.2, "recurrent_dropout": 0.1}
    oracle = oracle_with(mixtures=3, hidden_size=60, weight_dropout=0.6, **rates)
    oracle.vocabulary_size = 5000
    masks = oracle.dropout_masks(50, 400)
    drawn = [(0.4, m) for m in masks.units] + [(0.1, m) for m in masks.recurrent]
    drawn += [(0.6, m) for m in masks.weights]
    for rate, mask in [*drawn, (0.2, masks.words), (0.3, masks.latents)]:
        keep = 1 - rate
        assert set(np.unique(mask)) == {0, 1 / keep}
        deviation = math.sqrt(keep * rate / mask.size) / keep
        assert mask.mean() == pytest.approx(1, abs=5 * deviation)


def test_locked_dropout_has_one_mask_for_all_time_steps() -> None:
    masks = oracle_with(dropout=0.4, dropout_kind="locked").dropout_masks(50, 4)
    assert [mask.shape for mask in masks.units] == [(1, 4, 3), (1, 4, 4), (1, 4, 4)]


def test_a_mixture_of_equal_softmaxes_is_that_softmax() -> None:
    one, many = oracle_with(mixtures=1, latent_size=2), oracle_with(mixtures=4, latent_size=2)
    repeated = {
        name: np.concatenate([value] * 4, axis=-1) if name.startswith("latent.") else value
        for name, value in one.p.items()
    }
    many.load_parameters(repeated | {"prior.weight": many.p["prior.weight"]})
    batch, state = batch_of(TIME), one.initial_state(BATCH, False)
    expected = one.evaluate_step(batch, state).nll
    assert many.evaluate_step(batch, state).nll == pytest.approx(expected, rel=1e-14)


def test_a_mixture_s_logarithm_is_exact_where_its_probabilities_underflow() -> None:
    oracle, batch = oracle_with(mixtures=2), batch_of(TIME)
    oracle.p["softmax.weight"] *= 0
    oracle.p["softmax.bias"] = np.array([0.0, -1000.0, -2000.0, -3000.0, -4000.0])
    nll = oracle.evaluate_step(batch, oracle.initial_state(BATCH, False)).nll
    assert nll == pytest.approx(1000 * (batch.targets * batch.mask).sum(), rel=1e-12)


@given(
    seed=st.integers(0, 2**32 - 1),
    scale=st.floats(0.01, 50),
    kind=st.sampled_from(list(MODELS)),
)
def test_probabilities_sum_to_one_however_large_the_parameters(
    seed: int, scale: float, kind: str
) -> None:
    oracle, rng = oracle_with(**MODELS[kind]), np.random.default_rng(seed)
    drawn = {name: scale * rng.uniform(-1, 1, p.shape) for name, p in oracle.p.items()}
    oracle.load_parameters(drawn)
    inputs = rng.integers(0, VOCABULARY, (TIME, BATCH))
    forward = oracle.forward(inputs, random_state(oracle), oracle.no_masks)
    sums = np.exp(forward.log_probabilities).sum(axis=-1)
    np.testing.assert_allclose(sums, 1, rtol=0, atol=1e-10)
