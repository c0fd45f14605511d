"""What optimizers keep, and the numbers of an update that are the same in every framework."""

from __future__ import annotations

import math

from ptbench.model.recipe import Recipe

# optimizer: the arrays it keeps for each parameter, of the parameter's shape; zero at first
OPTIMIZER_SLOTS = {
    "sgd": (),
    "adam": ("first_moment", "second_moment"),
    "rmsprop": ("mean_square",),
    "asgd": ("average",),
}


def rate_and_epsilon(recipe: Recipe, learning_rate: float, step: int) -> tuple[float, float]:
    """Return the rate and the epsilon of an update p -= rate m / (sqrt(v) + epsilon).

    For Adam both contain the corrections of the moments' bias (Kingma and Ba 2015, the end of
    section 2), so that the update is that of algorithm 1. They are computed here in double
    precision, because 1 - beta2^t loses five digits in single precision.

    Args:
        step: steps taken before this one.
    """
    if recipe.optimizer != "adam":
        return learning_rate, recipe.optimizer_epsilon
    first = 1 - recipe.adam_beta1 ** (step + 1)
    second = math.sqrt(1 - recipe.adam_beta2 ** (step + 1))
    return learning_rate * second / first, recipe.optimizer_epsilon * second
