"""What a backend's dropout drops, read from gradients, and an oracle that drops the same."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
from tests.support.cases import Case
from tests.support.problems import BATCH, VOCABULARY
from tests.support.remote import Backends

from ptbench.backends.base import Backend
from ptbench.backends.oracle import Masks, Oracle
from ptbench.corpus.batching import Batch
from ptbench.model.parameters import GATES, Parameters
from ptbench.model.recipe import Recipe

STEPS = 4  # of which masks are observed
# Relative size of a gradient that is zero. In float64 gates that are shut let 1e-87 through; the
# gradients of units that are kept can be as small as 1e-8.
UNDERFLOW = 1e-20


class OracleWithMasks(Oracle):
    """The oracle, but what it drops in each step is given to it."""

    masks: list[Masks]  # of each step, as `masks_of` returns them

    def dropout_masks(self, steps: int, batch_size: int) -> Masks:
        masks = self.masks[self.step]
        assert masks.units[0].shape[:2] == (steps, batch_size)
        return dataclasses.replace(masks, recurrent=[mask[0] for mask in masks.recurrent])


def observed_masks(backends: Backends, framework: str, case: Case) -> list[Masks]:
    """Return what a case drops in its first steps on `words_batch`; observed once in a session."""
    key = framework, case
    if key not in backends.masks:
        backend = backends.get(framework, case.recipe, case.devices)
        start = backend.snapshot(backend.initial_state(BATCH, training=True))
        backends.masks[key] = []
        for step, time in zip(range(STEPS), itertools.cycle(case.times)):
            backend.restore({**start, "step": np.array(step)})
            backends.masks[key].append(masks_of(backend, case.recipe, time))
    return backends.masks[key]


def words_batch(time: int, first: int = 0) -> Batch:
    """Return a batch whose every position has an input of its own, and a target of its own.

    Args:
        time: time steps.
        first: the smallest input, 0 or half of the vocabulary. Targets are from the other half.
    """
    words = np.arange(time * BATCH, dtype=np.int32).reshape(time, BATCH)
    half = VOCABULARY // 2
    assert words.size <= half
    targets = words[::-1].copy() + (half - first)
    return Batch(words + first, targets, np.ones((time, BATCH), np.float32))


def masks_of(backend: Backend, recipe: Recipe, time: int) -> Masks:
    """Return what the backend would drop in its next step on `words_batch(time)`.

    A dropped unit has no gradient in the weights that it is multiplied by: its embedding's row, its
    row of the next layer's or the head's weights, its latent's bias or, for a previous output, its
    row of the recurrent weights. For this to show one position, the loss is masked elsewhere, and
    nothing may pass from one time step to another: recurrent weights are zero, and an LSTM's
    forget gates and a GRU's update gates are shut. `gradients` changes nothing, so that each
    position can be asked for in turn.
    """
    parameters = backend.parameters()
    backend.load_parameters(_parameters_for_weights(parameters, recipe))
    state = backend.initial_state(BATCH, training=True)
    gradient = backend.gradients(words_batch(time), state)
    weights = [gradient[f"rnn.{layer}.recurrent"] != 0 for layer in range(recipe.layers)]

    backend.load_parameters(_parameters_for_units(parameters, recipe))
    rows: dict[str, list[Any]] = {}
    inputs, targets, everything = words_batch(time)
    for position in np.ndindex(time, BATCH):
        mask = np.zeros_like(everything)
        mask[position] = 1
        gradient = backend.gradients(Batch(inputs, targets, mask), state)
        for place, row in _rows(gradient, recipe, inputs[position]).items():
            rows.setdefault(place, []).append(row > UNDERFLOW * row.max())

    def scaled(place: str, rate: float) -> Any:
        """Return what a place's units are multiplied by, 1 where none are dropped."""
        kept = np.array(rows[place]).reshape(time, BATCH, -1)
        return kept / (1 - rate) if rate else np.ones(kept.shape)

    words = np.ones((VOCABULARY, 1), bool)
    if recipe.word_dropout:
        # A word whose every unit is dropped has no gradient either; those that are not in the
        # batch show how many words are dropped.
        for first in (0, VOCABULARY // 2):
            backend.load_parameters(_parameters_for_units(parameters, recipe, first))
            batch = words_batch(time, first)
            gradient = backend.gradients(batch, state)
            asked = batch.inputs.ravel()
            words[asked] = gradient["embedding"][asked].any(axis=1, keepdims=True)
    backend.load_parameters(parameters)
    latents = np.ones((time, BATCH, 1))
    if recipe.mixtures:
        latents = scaled("latents", recipe.latent_dropout)
    return Masks(
        words=words / (1 - recipe.word_dropout),
        units=[scaled(f"units {place}", rate) for place, rate in enumerate(recipe.unit_dropout)],
        # One mask for all time steps, which `test_dropout` checks. The previous output at the first
        # one is the zero state, whose mask cannot be seen.
        recurrent=[
            scaled(f"recurrent {layer}", recipe.recurrent_dropout)[1:]
            for layer in range(recipe.layers)
        ],
        weights=[
            mask / (1 - recipe.weight_dropout) if recipe.weight_dropout else np.ones(1)
            for mask in weights
        ],
        latents=latents.reshape(time, BATCH, recipe.mixtures or 1, -1),
    )


def _parameters_for_weights(parameters: Parameters, recipe: Recipe) -> Parameters:
    """Return small weights and biases of 1, with which no unit is at rest or saturated."""
    changed = {name: array.copy() for name, array in parameters.items()}
    for layer in range(recipe.layers):
        changed[f"rnn.{layer}.input"] *= 0.2
        changed[f"rnn.{layer}.recurrent"] *= 0.2
        changed[f"rnn.{layer}.bias"][:] = 1
        if recipe.recurrent_bias:
            changed[f"rnn.{layer}.recurrent_bias"][:] = 0
    if recipe.mixtures:
        changed["latent.weight"] *= 0.2
    return changed


def _parameters_for_units(parameters: Parameters, recipe: Recipe, first: int = 0) -> Parameters:
    """Return such parameters with which time steps are independent, and inputs are no outputs.

    Args:
        first: the smallest input. The probability of every input as a target is zero, so that a
            tied embedding's rows have gradients either as inputs or as outputs.
    """
    changed = _parameters_for_weights(parameters, recipe)
    for layer in range(recipe.layers):
        changed[f"rnn.{layer}.recurrent"][:] = 0
        gates = changed[f"rnn.{layer}.bias"].reshape(len(GATES[recipe.rnn]), -1)
        gates[1:2] = -200  # forget or update, if the layer has one; the sigmoid of this is 0
    if recipe.softmax_bias:
        changed["softmax.bias"][first : first + VOCABULARY // 2] = -10_000
    return changed


def _rows(gradient: Parameters, recipe: Recipe, word: int) -> dict[str, Any]:
    """Return, for each place where units are dropped, numbers that are 0 for dropped units.

    Args:
        gradient: of the loss at one position.
        word: the input there.
    """
    size = {name: np.abs(array) for name, array in gradient.items()}
    rows = {"units 0": size["embedding"][word]}
    for layer in range(recipe.layers):
        if layer:
            rows[f"units {layer}"] = size[f"rnn.{layer}.input"].sum(axis=1)
        rows[f"recurrent {layer}"] = size[f"rnn.{layer}.recurrent"].sum(axis=1)
    if recipe.mixtures:
        head = size["latent.weight"].sum(axis=1)
        rows["latents"] = size["latent.bias"]
    elif "softmax.projection" in size:
        head = size["softmax.projection"].sum(axis=1)
    elif recipe.tie_weights:
        head = np.delete(size["embedding"], word, axis=0).sum(axis=0)
    else:
        head = size["softmax.weight"].sum(axis=0)
    return rows | {f"units {recipe.layers}": head}
