"""The update rules."""

from __future__ import annotations

import math
from typing import Any

import keras

from ptbench.model.recipe import Recipe


class Adam(keras.optimizers.Optimizer):
    """Kingma and Ba's algorithm 1, with an L2 penalty.

    keras.optimizers.Adam adds epsilon to the root of the moment that is not corrected yet, forms
    1 - beta^t in float32, where it loses five digits, and decouples weight decay (AdamW).
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe.learning_rate, global_clipnorm=recipe.clip_norm)
        self.beta_1, self.beta_2 = recipe.adam_beta1, recipe.adam_beta2
        self.epsilon, self.penalty = recipe.optimizer_epsilon, recipe.weight_decay

    def build(self, variables: list[keras.Variable]) -> None:
        if not self.built:
            super().build(variables)
            self.first_moments = self.add_optimizer_variables(variables, "first_moment")
            self.second_moments = self.add_optimizer_variables(variables, "second_moment")

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        index = self._get_variable_index(variable)
        m, v = self.first_moments[index], self.second_moments[index]
        gradient = gradient + self.penalty * variable
        self.assign(m, self.beta_1 * m + (1 - self.beta_1) * gradient)
        self.assign(v, self.beta_2 * v + (1 - self.beta_2) * keras.ops.square(gradient))
        steps = keras.ops.cast(self.iterations + 1, "float32")
        m_hat = m / -keras.ops.expm1(steps * math.log(self.beta_1))  # 1 - beta_1^steps
        v_hat = v / -keras.ops.expm1(steps * math.log(self.beta_2))
        self.assign_sub(variable, learning_rate * m_hat / (keras.ops.sqrt(v_hat) + self.epsilon))


class RMSProp(keras.optimizers.Optimizer):
    """RMSProp as Keras 2.1.3 had it, epsilon added to the root, with an L2 penalty.

    keras.optimizers.RMSprop adds epsilon under the root, and decouples weight decay.
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe.learning_rate, global_clipnorm=recipe.clip_norm)
        self.decay = recipe.rmsprop_decay
        self.epsilon, self.penalty = recipe.optimizer_epsilon, recipe.weight_decay

    def build(self, variables: list[keras.Variable]) -> None:
        if not self.built:
            super().build(variables)
            self.mean_squares = self.add_optimizer_variables(variables, "mean_square")

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        s = self.mean_squares[self._get_variable_index(variable)]
        gradient = gradient + self.penalty * variable
        self.assign(s, self.decay * s + (1 - self.decay) * keras.ops.square(gradient))
        self.assign_sub(variable, learning_rate * gradient / (keras.ops.sqrt(s) + self.epsilon))


class AveragedSGD(keras.optimizers.SGD):
    """SGD that keeps the mean of its last parameters (Polyak and Juditsky 1992).

    `share` is that of the next step's parameters in the mean: one over how many it is of.
    """

    def build(self, variables: list[keras.Variable]) -> None:
        if not self.built:
            super().build(variables)
            self.averages = self.add_optimizer_variables(variables, "average")
            self.share = self.add_variable((), initializer="ones", name="share")

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        super().update_step(gradient, variable, learning_rate)
        average = self.averages[self._get_variable_index(variable)]
        self.assign(average, (1 - self.share) * average + self.share * variable)


def clips_by_rate(recipe: Recipe) -> bool:
    """Whether gradients are clipped by scaling the learning rate: a pass less over all of them."""
    plain = recipe.optimizer in ("sgd", "asgd") and not recipe.weight_decay
    return recipe.implementation == "tuned" and plain and recipe.clip_norm is not None


def optimizer_of(recipe: Recipe) -> keras.optimizers.Optimizer:
    """The recipe's optimizer. Without moments, Keras' decoupled weight decay is an L2 penalty."""
    if recipe.optimizer in ("sgd", "asgd"):
        kind = keras.optimizers.SGD if recipe.optimizer == "sgd" else AveragedSGD
        return kind(
            recipe.learning_rate,
            weight_decay=recipe.weight_decay or None,
            global_clipnorm=None if clips_by_rate(recipe) else recipe.clip_norm,
        )
    return Adam(recipe) if recipe.optimizer == "adam" else RMSProp(recipe)
