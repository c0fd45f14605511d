"""Clipping and the update rules, defined in `Backend.train_step`.

All but SGD by hand, because TensorFlow's own RMSProp adds epsilon under the root.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from ptbench.configuration.models import Recipe

Tensor = Any  # tf.Tensor


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
    rate: Tensor,
    epsilon: Tensor,
    g: Tensor,
    factor: Tensor,
    *slots: tf.Variable,
) -> None:
    """One parameter's update on one device.

    Args:
        rate, epsilon: as `rate_and_epsilon` gives them.
        g, factor: the clipped gradient is their product.
        slots: in the order of `OPTIMIZER_SLOTS`.
    """
    if recipe.optimizer != "sgd" or recipe.weight_decay:
        g, factor = factor * g, tf.constant(1.0)
    if recipe.weight_decay:
        g += recipe.weight_decay * p
    if recipe.optimizer == "sgd":
        # What tf.compat.v1.train.GradientDescentOptimizer applies: one pass over memory.
        tf.raw_ops.ResourceApplyGradientDescent(var=p.handle, alpha=rate * factor, delta=g)
    elif recipe.optimizer == "adam":
        m, v = slots
        new_m = m.assign(recipe.adam_beta1 * m + (1 - recipe.adam_beta1) * g)
        new_v = v.assign(recipe.adam_beta2 * v + (1 - recipe.adam_beta2) * g**2)
        p.assign_sub(rate * new_m / (tf.sqrt(new_v) + epsilon))
    else:
        (s,) = slots
        new_s = s.assign(recipe.rmsprop_decay * s + (1 - recipe.rmsprop_decay) * g**2)
        p.assign_sub(rate * g / (tf.sqrt(new_s) + epsilon))
