"""Dropout multiplies by 0 or 1 / keep what the recipe names, anew for each step.

The masks are not visible from outside, but they can be read off gradients: see `masks_of`.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from scipy import stats
from tests.support.problems import (
    AWD,
    BATCH,
    IMPLEMENTATIONS,
    TIME,
    VOCABULARY,
    distinct_batch,
    largest_error,
    new_oracle,
    random_batch,
    recipe,
    train,
)
from tests.support.remote import Backends

from ptbench.backends import FRAMEWORKS
from ptbench.backends.base import Backend, Setup
from ptbench.backends.oracle import Masks, Oracle
from ptbench.corpus.batching import Batch
from ptbench.model.parameters import GATES, kept_weights
from ptbench.model.recipe import Recipe

STEPS = 4
# Rates that are not one half, to tell what is kept from what is dropped, and all different, to tell
# one place from another; a clip norm that is never reached.
EVERYWHERE: dict[str, Any] = {
    "input_dropout": 0.35, "hidden_dropout": 0.3, "output_dropout": 0.4, "clip_norm": 1000.0
}  # fmt: skip
PER_STEP = recipe(**EVERYWHERE)
LOCKED = recipe(
    **EVERYWHERE, dropout_kind="locked", recurrent_dropout=0.25,
    mixtures=2, latent_size=10, latent_dropout=0.2,
)  # fmt: skip
LATENTS = recipe(**EVERYWHERE, mixtures=2, latent_size=10, latent_dropout=0.2)
WORDS = recipe(**EVERYWHERE, word_dropout=0.25, recurrent_dropout=0.25, kernel="stepwise")
# Previous outputs are dropped by other code in each of these. One wide layer compiles faster than
# two, and its masks are as unlikely to be equal by chance.
ONE_LAYER = EVERYWHERE | {"recurrent_dropout": 0.25, "layers": 1, "hidden_size": 32}
# Weights are dropped by other code where the previous output is, and for each kernel and cell.
WEIGHTS = EVERYWHERE | {"weight_dropout": 0.3, "layers": 1, "hidden_size": 32}
RECIPES = {
    "per step": PER_STEP,
    "locked": LOCKED,
    "latents": LATENTS,
    "words": WORDS,
    "lstm, two biases": recipe(**ONE_LAYER, recurrent_bias=True),
    "sparse lstm": recipe(**ONE_LAYER, kept_weights=0.3),
    "sparse lstm, sparse kernel": recipe(**ONE_LAYER, kept_weights=0.3, kernel="sparse"),
    "gru, two biases": recipe(**ONE_LAYER, rnn="gru", recurrent_bias=True),
    "rnn_tanh": recipe(**ONE_LAYER, rnn="rnn_tanh"),
    "weights": recipe(**EVERYWHERE, weight_dropout=0.3),
    "weights, explicit steps": recipe(**WEIGHTS, kernel="stepwise"),
    "weights, block": recipe(**WEIGHTS, kernel="block", recurrent_bias=True),
    "weights, sparse kernel": recipe(**WEIGHTS, kept_weights=0.3, kernel="sparse"),
    # Of more weights than elsewhere, so that every unit has a way to the loss.
    "weights, sparse gru": recipe(**WEIGHTS, kept_weights=0.6, rnn="gru", recurrent_bias=True),
    "weights, penalties": recipe(**EVERYWHERE, **AWD, dropout_kind="locked", word_dropout=0.1),
}
CASES = [
    *itertools.product([name for name in RECIPES if "penalties" not in name], IMPLEMENTATIONS, [1]),
    # With more devices each replica may drop words of its own, which the oracle does not.
    ("per step", "stock", 2),
    ("locked", "tuned", 2),
    # but all drop the same weights
    ("weights", "stock", 2),
    ("weights, penalties", "tuned", 2),
]


class OracleWithMasks(Oracle):
    """The oracle, dropping what it is told to."""

    masks: Masks

    def dropout_masks(self, steps: int, batch_size: int) -> Masks:
        assert (steps, batch_size) == (TIME, BATCH)
        return self.masks


def masks_of(backend: Backend, recipe: Recipe) -> Masks:
    """What the backend would drop in its next step.

    With recurrent weights of zero and an LSTM's forget gates or a GRU's update gates shut, nothing
    passes from one time step to another. If the mask then lets one position alone into the loss, a
    dropped unit there has no gradient: in the embedding's row, in its row of the next layer's or
    the head's weights, in its entry of the latents' bias, or, for a previous output, in its row of
    the recurrent weights. As `gradients` changes nothing, all positions can be asked for in turn.
    """
    parameters = backend.parameters()
    shut = {name: array.copy() for name, array in parameters.items()}
    for layer in range(recipe.layers):
        shut[f"rnn.{layer}.recurrent"][:] = 0
        if recipe.recurrent_bias:
            shut[f"rnn.{layer}.recurrent_bias"][:] = 0
        gates = shut[f"rnn.{layer}.bias"].reshape(len(GATES[recipe.rnn]), -1)
        gates[:] = 1  # an output other than zero even for a word that is dropped
        gates[1:2] = -200  # forget or update, if the cell has them; the sigmoid of this is 0
    state = backend.initial_state(BATCH, training=True)
    gradient = backend.gradients(distinct_batch(), state)  # without one where a weight is dropped
    weights = [gradient[f"rnn.{layer}.recurrent"] != 0 for layer in range(recipe.layers)]
    backend.load_parameters(shut)
    state = backend.initial_state(BATCH, training=True)
    inputs, targets, everything = distinct_batch()
    head = "latent.weight" if recipe.mixtures else "softmax.weight"
    rows: dict[str, list[Any]] = {}
    for position in np.ndindex(TIME, BATCH):
        mask = np.zeros_like(everything)
        mask[position] = 1
        gradient = {
            n: np.abs(g) for n, g in backend.gradients(Batch(inputs, targets, mask), state).items()
        }
        at_position = {"units 0": gradient["embedding"][inputs[position]]}
        for layer in range(1, recipe.layers):
            at_position[f"units {layer}"] = gradient[f"rnn.{layer}.input"].sum(axis=1)
        at_position[f"units {recipe.layers}"] = gradient[head].sum(axis=1 if recipe.mixtures else 0)
        if recipe.mixtures:
            at_position["latents"] = gradient["latent.bias"]
        for layer in range(recipe.layers):
            at_position[f"recurrent {layer}"] = gradient[f"rnn.{layer}.recurrent"].sum(axis=1)
        for place, row in at_position.items():
            rows.setdefault(place, []).append(row > 1e-6 * row.max())
    kept = {place: np.array(each).reshape(TIME, BATCH, -1) for place, each in rows.items()}

    words = np.ones((VOCABULARY, 1), bool)
    if recipe.word_dropout:
        # A word whose every unit is dropped has lost its row; ask for the other words too.
        others = (inputs + TIME * BATCH).astype(np.int32)
        for asked in (inputs, others):
            gradient = backend.gradients(Batch(asked, targets, everything), state)
            words[asked.ravel()] = gradient["embedding"][asked.ravel()].any(axis=1, keepdims=True)
    backend.load_parameters(parameters)
    latents = kept.get("latents", np.ones((TIME, BATCH, 1), bool))
    return Masks(
        words=words / (1 - recipe.word_dropout),
        units=[
            kept[f"units {place}"] / (1 - rate) for place, rate in enumerate(recipe.unit_dropout)
        ],
        # The previous output at the first step is the zero state, whose mask cannot be seen.
        # Without that dropout, a row without gradient is one whose weights are all dropped.
        recurrent=[
            kept[f"recurrent {layer}"][1:] / (1 - recipe.recurrent_dropout)
            if recipe.recurrent_dropout
            else np.ones((TIME - 1, BATCH, 1))
            for layer in range(recipe.layers)
        ],
        weights=[
            mask / (1 - recipe.weight_dropout) if recipe.weight_dropout else np.ones(1)
            for mask in weights
        ],
        latents=latents.reshape(TIME, BATCH, recipe.mixtures or 1, -1)
        / (1 - (recipe.latent_dropout if recipe.mixtures else 0)),
    )


class Observed:
    """A recipe's masks of successive steps in one framework."""

    def __init__(self, backends: Backends, framework: str, recipe: Recipe, devices: int) -> None:
        self.recipe, self.devices = recipe, devices
        self.masks = []
        backend = backends.get(framework, recipe, devices)
        for _ in range(STEPS):
            self.masks.append(masks_of(backend, recipe))
            train(backend, [random_batch(0)], [1.0])

    def draws(self, masks: Masks) -> list[tuple[float, Any]]:
        """Rate and kept units of every independent draw of a step: [time or 1, batch, ...]."""
        recipe = self.recipe
        locked = recipe.dropout_kind == "locked"
        units = masks.units[1:] if recipe.word_dropout else masks.units
        rates = recipe.unit_dropout[1:] if recipe.word_dropout else recipe.unit_dropout
        found = [
            (rate, unit[:1] if locked else unit) for rate, unit in zip(rates, units, strict=True)
        ]
        if recipe.mixtures:
            found.append((recipe.latent_dropout, masks.latents[:1] if locked else masks.latents))
        if recipe.recurrent_dropout:
            found += [(recipe.recurrent_dropout, mask[:1]) for mask in masks.recurrent]
        return [(rate, mask > 0) for rate, mask in found]


@pytest.fixture(scope="session", params=CASES, ids=lambda case: "-".join(map(str, case)))
def observed(request: pytest.FixtureRequest, backends: Backends, framework: str) -> Observed:
    name, implementation, devices = request.param
    changed = RECIPES[name].model_copy(update={"implementation": implementation})
    if framework != "numpy" and changed.kernel not in FRAMEWORKS[framework].kernels:
        pytest.skip(f"{framework} has no {changed.kernel} kernel")
    return Observed(backends, framework, changed, devices)


def test_a_step_is_that_of_the_oracle_which_drops_the_same_and_scales_by_1_over_keep(
    backends: Backends, framework: str, observed: Observed
) -> None:
    recipe = observed.recipe
    backend = backends.get(framework, recipe, observed.devices)
    oracle = OracleWithMasks(Setup(recipe, VOCABULARY))
    oracle.load_parameters(backend.parameters())
    state = backend.initial_state(BATCH, training=True)
    oracle_state = oracle.initial_state(BATCH, training=True)
    for masks in observed.masks[:3]:
        oracle.masks = Masks(
            masks.words,
            masks.units,
            [m[0] for m in masks.recurrent],
            masks.weights,
            masks.latents,
        )
        batch = distinct_batch()  # of a dropped word's units no more is known
        error, name = largest_error(
            backend.gradients(batch, state), oracle.gradients(batch, oracle_state)
        )
        assert error < 1e-5, name
        step = backend.train_step(batch, state, 0.1)
        expected = oracle.train_step(batch, oracle_state, 0.1)
        assert float(step.nll) == pytest.approx(expected.nll, rel=1e-5)
        assert float(step.gradient_norm) == pytest.approx(expected.gradient_norm, rel=1e-5)
        state, oracle_state = step.state, expected.state


def test_units_are_kept_with_the_keep_probability(observed: Observed) -> None:
    steps = [observed.draws(masks) for masks in observed.masks]
    for place in zip(*steps, strict=True):
        rate = place[0][0]
        kept = np.array([mask for _, mask in place])
        low, high = stats.binom.interval(1 - 1e-6, kept.size, 1 - rate)
        assert low <= kept.sum() <= high


def test_weights_are_kept_with_the_keep_probability_anew_for_each_step_and_layer(
    observed: Observed,
) -> None:
    recipe = observed.recipe
    if not recipe.weight_dropout:
        pytest.skip("drops no weights")
    there = kept_weights(recipe, VOCABULARY, seed=0)
    draws = []
    for masks in observed.masks:
        for layer, mask in enumerate(masks.weights):
            places = there.get(f"rnn.{layer}.recurrent", np.ones(mask.shape, bool))
            assert not mask[~places].any()
            draws.append(mask[places] > 0)
    keep = 1 - recipe.weight_dropout
    kept = np.concatenate(draws)
    low, high = stats.binom.interval(1 - 1e-6, kept.size, keep)
    assert low <= kept.sum() <= high
    chance = keep**2 + (1 - keep) ** 2  # that two independent draws agree
    for one, other in itertools.combinations(draws, 2):
        agreement = np.mean(one == other)
        assert abs(agreement - chance) < 6 * math.sqrt(chance * (1 - chance) / len(one))


def test_words_are_kept_with_the_keep_probability(observed: Observed) -> None:
    kept = np.array([masks.words > 0 for masks in observed.masks])
    low, high = stats.binom.interval(1 - 1e-6, kept.size, 1 - observed.recipe.word_dropout)
    assert low <= kept.sum() <= high


def test_masks_differ_between_batch_elements_and_between_time_steps_unless_locked(
    observed: Observed,
) -> None:
    for masks in observed.masks:
        units = [*masks.units[1:]]
        if observed.recipe.mixtures:
            units.append(masks.latents.reshape(TIME, BATCH, -1))
        steps = [np.concatenate(units, axis=-1)]
        if observed.recipe.recurrent_dropout:
            steps.append(np.concatenate(masks.recurrent, axis=-1))
        for index, each in enumerate(steps):
            if observed.recipe.dropout_kind == "locked" or index == 1:
                assert (each == each[:1]).all()
                each = each[:1]
            positions = each.reshape(-1, each.shape[-1])
            assert len(np.unique(positions, axis=0)) == len(positions)


def test_masks_of_any_two_steps_places_and_replicas_are_unrelated(observed: Observed) -> None:
    draws = [
        (rate, part.ravel())
        for masks in observed.masks
        for rate, mask in observed.draws(masks)
        for part in np.split(mask, observed.devices, axis=1)
    ]
    for (one_rate, one), (other_rate, other) in itertools.combinations(draws, 2):
        # that two independent draws agree
        chance = (1 - one_rate) * (1 - other_rate) + one_rate * other_rate
        count = min(len(one), len(other))
        agreement = np.mean(one[:count] == other[:count])
        assert abs(agreement - chance) < 6 * math.sqrt(chance * (1 - chance) / count)


def test_masks_depend_on_the_seed(backends: Backends, framework: str) -> None:
    masks = masks_of(backends.get(framework, LOCKED, seed=0), LOCKED)
    other = masks_of(backends.get(framework, LOCKED, seed=1), LOCKED)
    for one, another in zip(
        [*masks.units, *masks.recurrent, masks.latents],
        [*other.units, *other.recurrent, other.latents],
        strict=True,
    ):
        assert not np.array_equal(one, another)


def test_evaluation_drops_nothing(backends: Backends, framework: str) -> None:
    for dropping in (LOCKED, WORDS, RECIPES["weights"]):
        backend = backends.get(framework, dropping)
        oracle = new_oracle(dropping)
        oracle.load_parameters(backend.parameters())
        batch = random_batch(1)
        step = backend.evaluate_step(batch, backend.initial_state(BATCH, training=False))
        expected = oracle.evaluate_step(batch, oracle.initial_state(BATCH, training=False))
        assert float(step.nll) == pytest.approx(expected.nll, rel=1e-5)
