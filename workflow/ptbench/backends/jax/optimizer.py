"""The update: clipping, weight decay, each optimizer's direction, and averaging."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from ptbench.model.recipe import Recipe

Array = Any  # jax.Array, or a tracer of one
Tree = dict[str, Array]  # an array for each parameter


def sgd(
    recipe: Recipe,  # noqa: ARG001
    gradients: Tree,
    slots: dict[str, Tree],
    epsilon: Array,  # noqa: ARG001
) -> tuple[Tree, dict[str, Tree]]:
    """Stochastic gradient descent."""
    return gradients, slots


def adam(
    recipe: Recipe, gradients: Tree, slots: dict[str, Tree], epsilon: Array
) -> tuple[Tree, dict[str, Tree]]:
    """Adam; the corrections for bias are in `epsilon` and in the rate, see `rate_and_epsilon`."""
    beta1, beta2 = recipe.adam_beta1, recipe.adam_beta2
    m = jax.tree.map(lambda m, g: beta1 * m + (1 - beta1) * g, slots["first_moment"], gradients)
    v = jax.tree.map(lambda v, g: beta2 * v + (1 - beta2) * g**2, slots["second_moment"], gradients)
    direction = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + epsilon), m, v)
    return direction, {"first_moment": m, "second_moment": v}


def rmsprop(
    recipe: Recipe, gradients: Tree, slots: dict[str, Tree], epsilon: Array
) -> tuple[Tree, dict[str, Tree]]:
    """RMSProp, neither centred nor with momentum."""
    decay = recipe.rmsprop_decay
    s = jax.tree.map(lambda s, g: decay * s + (1 - decay) * g**2, slots["mean_square"], gradients)
    direction = jax.tree.map(lambda g, s: g / (jnp.sqrt(s) + epsilon), gradients, s)
    return direction, {"mean_square": s}


# The direction in which gradients move the parameters, and the slots afterwards.
OPTIMIZERS = {"sgd": sgd, "adam": adam, "rmsprop": rmsprop, "asgd": sgd}


def running_mean(average: Tree, parameters: Tree, averaged: Array) -> Tree:
    """The mean of `averaged` steps' parameters, from that of all but the last; of one step, exact.

    By the change, as the two terms' rounded weights would not add up to one.
    """
    return jax.tree.map(
        lambda a, p: jnp.where(averaged == 1, p, a + (p - a) / averaged), average, parameters
    )


def update(
    recipe: Recipe,
    parameters: Tree,
    slots: dict[str, Tree],
    gradients: Tree,
    rate: Array,
    epsilon: Array,
    averaged: Array,
) -> tuple[Tree, dict[str, Tree], Array]:
    """Parameters and slots after one update, and the norm of all gradients before clipping.

    Args:
        averaged: steps of which asgd keeps the mean; no part of any other compiled update.
    """
    norm = jnp.sqrt(sum(jnp.vdot(g, g) for g in gradients.values()))
    if recipe.clip_norm is not None:
        scale = jnp.where(norm > recipe.clip_norm, recipe.clip_norm / norm, 1)
        gradients = jax.tree.map(lambda g: scale * g, gradients)
    if recipe.weight_decay:
        gradients = jax.tree.map(lambda g, p: g + recipe.weight_decay * p, gradients, parameters)
    direction, slots = OPTIMIZERS[recipe.optimizer](recipe, gradients, slots, epsilon)
    parameters = jax.tree.map(lambda p, d: p - rate * d, parameters, direction)
    if recipe.optimizer == "asgd":
        slots = {"average": running_mean(slots["average"], parameters, averaged)}
    return parameters, slots, norm
