"""How the learning rate moves: pure functions of the recipe and the epoch."""

from __future__ import annotations

from ptbench.configuration.models import Recipe


def learning_rate(recipe: Recipe, epoch: int) -> float:
    """Rate for all steps of an epoch, counted from 1.

    `constant_then_decay` keeps the initial rate for `constant_epochs` and multiplies it by
    `learning_rate_decay` at every epoch after them (Zaremba et al. 2014, section 4.1; TensorFlow's
    PTB tutorial: decay ** max(epoch - constant_epochs, 0)).
    """
    if recipe.schedule == "constant":
        return recipe.learning_rate
    decays = max(epoch - recipe.constant_epochs, 0)
    return float(recipe.learning_rate * recipe.learning_rate_decay**decays)
