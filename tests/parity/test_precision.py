"""In bfloat16, frameworks round all that they multiply, and nothing that they keep.

bfloat16 has 8 bits of mantissa, the leading one included: rounding to it changes a number by up to
`ROUNDING` of it. On the longest way through two layers and five time steps, a gradient has been
rounded some eighty times: input, weight, gates and output in each step, back and forth. Independent
errors, uniform up to e, add up to sqrt(80 / 3) e, or 5 e. `OF_GRADIENTS` leaves a factor of three
for what cancels in sums.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support import probes
from tests.support.cases import MOS, PENALTIES
from tests.support.checkpoints import save_model, small_corpus
from tests.support.problems import (
    BATCH,
    VOCABULARY,
    new_oracle,
    random_batch,
    random_parameters,
    recipe,
    relative_error,
    same,
    train,
)
from tests.support.remote import Backends, probe

from ptbench.backends import FRAMEWORKS
from ptbench.backends.base import Backend
from ptbench.backends.oracle import Oracle
from ptbench.corpus.batching import Batch
from ptbench.corpus.store import open_corpus
from ptbench.errors import PtbenchError
from ptbench.model.parameters import Parameters
from ptbench.model.recipe import Recipe
from ptbench.training.inference import evaluate_split

ROUNDING = 2**-8
OF_GRADIENTS = 16 * ROUNDING
FLOAT32 = 1e-5  # what frameworks are held to in float32: what is further off has been rounded

pytestmark = pytest.mark.frameworks(
    *(name for name, row in FRAMEWORKS.items() if "bfloat16" in row.precisions)
)


def low(**changes: Any) -> Recipe:
    return recipe(precision="bfloat16", **changes)


# Each kernel with and without a mixture, and among them all layers and all kinds of output.
MODELS = {
    "fused lstm, tied": (low(tie_weights=True, last_hidden_size=12), 1),
    "fused gru, two biases, mixture, factorised, two devices": (
        low(rnn="gru", recurrent_bias=True, output_rank=5, **MOS), 2
    ),
    "stepwise lstm, two biases, penalties": (
        low(kernel="stepwise", recurrent_bias=True, **PENALTIES), 1
    ),
    "stepwise rnn, mixture": (low(kernel="stepwise", rnn="rnn_tanh", **MOS), 1),
}  # fmt: skip
models = pytest.mark.parametrize(("model", "devices"), MODELS.values(), ids=MODELS)


def pair(
    backends: Backends, framework: str, model: Recipe, devices: int, parameters: Parameters
) -> tuple[Backend, Oracle]:
    """Return the framework's backend and the oracle with these parameters."""
    backend, oracle = backends.get(framework, model, devices), new_oracle(model)
    backend.load_parameters(parameters)
    oracle.load_parameters(parameters)
    return backend, oracle


@models
def test_loss_and_gradients_are_the_oracle_s_but_for_the_rounding(
    backends: Backends, framework: str, model: Recipe, devices: int
) -> None:
    parameters = random_parameters(model, seed=1)
    backend, oracle = pair(backends, framework, model, devices, parameters)
    state = backend.initial_state(BATCH, training=True)
    oracle_state = oracle.initial_state(BATCH, training=True)
    for seed in range(2):  # from a zero and from a carried state
        batch = random_batch(seed)
        gradients = backend.gradients(batch, state)
        for name, expected in oracle.gradients(batch, oracle_state).items():
            error = relative_error(gradients[name], expected)
            assert FLOAT32 < error < OF_GRADIENTS, name
        step = backend.train_step(batch, state, 0.0)
        exact = oracle.train_step(batch, oracle_state, 0.0)
        assert float(step.nll) == pytest.approx(exact.nll, rel=ROUNDING)
        assert float(step.gradient_norm) == pytest.approx(exact.gradient_norm, rel=OF_GRADIENTS)
        state, oracle_state = step.state, exact.state


@models
def test_evaluation_and_prediction_are_the_oracle_s_but_for_the_rounding(
    backends: Backends, framework: str, model: Recipe, devices: int
) -> None:
    backend, oracle = pair(backends, framework, model, devices, random_parameters(model, seed=1))
    batch, state = random_batch(3), backend.initial_state(BATCH, training=False)
    log_p, _ = backend.next_token_log_probabilities(batch.inputs, state)
    oracle_state = oracle.initial_state(BATCH, training=False)
    expected, _ = oracle.next_token_log_probabilities(batch.inputs, oracle_state)
    assert FLOAT32 < relative_error(log_p, expected) < ROUNDING
    np.testing.assert_allclose(np.exp(log_p).sum(axis=-1), 1, rtol=1e-5)  # float32 from logits on
    nll = float(backend.evaluate_step(batch, state).nll)
    assert nll == pytest.approx(evaluated(oracle, batch), rel=ROUNDING)


@models
def test_no_product_sees_more_of_a_weight_than_bfloat16_holds(
    backends: Backends, framework: str, model: Recipe, devices: int
) -> None:
    exact = {name: in_bfloat16(p) for name, p in random_parameters(model, seed=1).items()}
    backend, oracle = pair(backends, framework, model, devices, exact)
    batch, state = random_batch(3), backend.initial_state(BATCH, training=False)
    before = float(backend.evaluate_step(batch, state).nll)
    oracle_before = evaluated(oracle, batch)
    for name, array in exact.items():
        if array.ndim == 1:
            continue  # some frameworks add biases in float32
        changed = exact | {name: array * np.float32(1 + 2**-10)}  # rounded, it is the same again
        backend.load_parameters(changed)
        oracle.load_parameters(changed)
        assert float(backend.evaluate_step(batch, state).nll) == before, name
        assert evaluated(oracle, batch) != pytest.approx(oracle_before, rel=1e-8)


@pytest.mark.parametrize(
    ("model", "devices"), [each for each in MODELS.values() if not each[0].mixtures]
)
def test_products_give_numbers_of_bfloat16(
    backends: Backends, framework: str, model: Recipe, devices: int
) -> None:
    """A word whose logit is 0 shows the logits of the others."""
    parameters = random_parameters(model, seed=1)
    parameters["embedding" if model.tie_weights else "softmax.weight"][0] = 0
    parameters["softmax.bias"][:] = 0
    backend, oracle = pair(backends, framework, model, devices, parameters)
    inputs = random_batch(3).inputs
    state = backend.initial_state(BATCH, training=False)
    log_p, _ = backend.next_token_log_probabilities(inputs, state)
    logits = log_p - log_p[..., :1]
    np.testing.assert_allclose(logits, nearest_bfloat16(logits), rtol=0, atol=1e-5)
    exact, _ = oracle.next_token_log_probabilities(
        inputs, oracle.initial_state(BATCH, training=False)
    )
    exact -= exact[..., :1]
    assert np.abs(exact - nearest_bfloat16(exact)).max() > 1e-4


def nearest_bfloat16(array: Any) -> Any:
    return in_bfloat16((array.view(np.uint32) + np.uint32(0x8000)).view(np.float32))


def evaluated(oracle: Oracle, batch: Batch) -> float:
    return float(oracle.evaluate_step(batch, oracle.initial_state(BATCH, training=False)).nll)


def in_bfloat16(array: Any) -> Any:
    """Return the numbers, cut to bfloat16, as float32: its upper half."""
    return (array.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


# With what is dropped, which is drawn and scaled in float32.
TRAINED = low(
    optimizer="adam", learning_rate=0.01, clip_norm=5.0, dropout=0.1, weight_dropout=0.1, **MOS
)


def test_what_is_kept_is_float32_and_a_hundred_steps_lower_the_loss_and_can_be_resumed(
    backends: Backends, framework: str
) -> None:
    backend = backends.get(framework, TRAINED)
    batches = [learnable_batch(seed) for seed in range(100)]
    rates = [TRAINED.learning_rate] * 100
    first, _, state = train(backend, batches[:50], rates[:50])
    snapshot = backend.snapshot(state)
    last = train(backend, batches[50:], rates[50:], state)
    after = backend.parameters()
    assert np.mean(last[0][-10:]) < 0.8 * np.mean(first[:10])

    for name, array in snapshot.items():
        if name == "step":
            continue
        assert array.dtype == np.float32, name
        if name.startswith(("parameter.", "optimizer.")):
            assert not np.array_equal(array, in_bfloat16(array)), f"{name} has been rounded"
    state = backend.restore(snapshot)
    assert train(backend, batches[50:], rates[50:], state)[:2] == last[:2]
    assert same(backend.parameters(), after)


def learnable_batch(seed: int) -> Batch:
    """Return a batch whose targets are the words after its inputs."""
    inputs = random_batch(seed).inputs
    return Batch(inputs, (inputs + 1) % VOCABULARY, np.ones(inputs.shape, np.float32))


@pytest.mark.frameworks("mxnet")
def test_mxnet_says_that_it_has_no_bfloat16(backends: Backends, framework: str) -> None:
    sentence = "precision=bfloat16, which mxnet does not have; it is in pytorch, tensorflow, keras"
    with pytest.raises(PtbenchError, match=sentence):
        backends.new(framework, low())


@pytest.mark.frameworks("mxnet")
def test_mxnet_s_recurrent_operator_still_has_no_bfloat16(
    backends: Backends, framework: str
) -> None:
    anyone = backends.get(framework, recipe())  # a process in the framework's environment
    assert "Unknown type" in probe(probes.error_of_an_mxnet_lstm_in_bfloat16, anyone)


@pytest.mark.frameworks("mxnet")
def test_mxnet_scores_a_model_that_was_trained_in_bfloat16_in_float32(
    backends: Backends, framework: str, tmp_path: Path
) -> None:
    saved = low(evaluation_batch_size=4, test_batch_size=4)
    corpus, oracle = small_corpus(tmp_path), new_oracle(saved)
    path = save_model(tmp_path / "low.safetensors", saved, oracle.parameters(), corpus)
    anyone = backends.get(framework, recipe())  # a process in the framework's environment
    score = probe(probes.score_of_checkpoint, anyone, str(path), "test")
    expected = evaluate_split(oracle, open_corpus(corpus), "test").perplexity
    assert score["perplexity"] == pytest.approx(expected, rel=1e-5)
