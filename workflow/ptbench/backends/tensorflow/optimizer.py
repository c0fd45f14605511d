"""Clipping and the update rules, defined in `Backend.train_step`.

All but SGD by hand, because TensorFlow's own RMSProp adds epsilon under the root.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from ptbench.model.optimizers import rate_and_epsilon
from ptbench.model.recipe import Recipe

Tensor = Any  # tf.Tensor


def step_numbers(
    recipe: Recipe, learning_rate: float, step: int, averaged: int
) -> tuple[float, ...]:
    """What an update has of its own: rate, epsilon and, for asgd, the past's share of the mean.

    Args:
        step: steps taken before this one.
        averaged: steps whose parameters the mean is of, this one's included.
    """
    rates = rate_and_epsilon(recipe, learning_rate, step)
    return (*rates, 1 - 1 / averaged) if recipe.optimizer == "asgd" else rates


def clip(recipe: Recipe, gradients: list[Tensor], norm: Tensor) -> tuple[list[Tensor], Tensor]:
    """Clipped gradients over a factor, and the factor: tuned, the update multiplies by it."""
    one = tf.constant(1.0)
    if recipe.clip_norm is None:
        return gradients, one
    if recipe.implementation == "tuned":
        return gradients, recipe.clip_norm / tf.maximum(norm, recipe.clip_norm)
    return tf.clip_by_global_norm(gradients, recipe.clip_norm, norm)[0], one


def update_variable(
    recipe: Recipe,
    p: tf.Variable,
    numbers: tuple[Tensor, ...],
    g: Tensor,
    factor: Tensor,
    *slots: tf.Variable,
) -> None:
    """One parameter's update on one device.

    Args:
        numbers: as `step_numbers` gives them.
        g, factor: the clipped gradient is their product.
        slots: in the order of `OPTIMIZER_SLOTS`.
    """
    rate, epsilon, *shares = numbers
    descends = recipe.optimizer in ("sgd", "asgd")
    if recipe.weight_decay or not descends:
        g, factor = factor * g, tf.constant(1.0)
    if recipe.weight_decay:
        g += recipe.weight_decay * p
    if descends:
        # What tf.compat.v1.train.GradientDescentOptimizer applies: one pass over memory.
        tf.raw_ops.ResourceApplyGradientDescent(var=p.handle, alpha=rate * factor, delta=g)
        if recipe.optimizer == "asgd":
            (a,), (past,) = slots, shares
            now = tf.convert_to_tensor(p)
            a.assign(now + past * (a - now))  # p exactly, if the past has no share
    elif recipe.optimizer == "adam":
        m, v = slots
        new_m = m.assign(recipe.adam_beta1 * m + (1 - recipe.adam_beta1) * g)
        new_v = v.assign(recipe.adam_beta2 * v + (1 - recipe.adam_beta2) * g**2)
        p.assign_sub(rate * new_m / (tf.sqrt(new_v) + epsilon))
    else:
        (s,) = slots
        new_s = s.assign(recipe.rmsprop_decay * s + (1 - recipe.rmsprop_decay) * g**2)
        p.assign_sub(rate * g / (tf.sqrt(new_s) + epsilon))
