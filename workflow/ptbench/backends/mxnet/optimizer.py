"""MXNet's optimizers, with slots that a snapshot can hold and epsilon where the contract has it."""

from __future__ import annotations

from typing import Any

import mxnet as mx

from ptbench.backends.mxnet.devices import AGGREGATED_PARAMETERS
from ptbench.model.recipe import Recipe

Slots = dict[tuple[int, mx.Context], list[mx.nd.NDArray]]


def make_optimizer(recipe: Recipe, slots: Slots) -> mx.optimizer.Optimizer:
    """The recipe's optimizer.

    Args:
        slots: the arrays of the index-th parameter on a context.
    """
    if recipe.optimizer in ("sgd", "asgd"):
        rate_and_decay = {"learning_rate": recipe.learning_rate, "wd": recipe.weight_decay}
        if recipe.optimizer == "asgd":
            sgd = AveragedSGD(slots, **rate_and_decay)
        else:
            sgd = mx.optimizer.SGD(**rate_and_decay)
        if recipe.implementation == "tuned":
            sgd.aggregate_num = AGGREGATED_PARAMETERS
        return sgd
    kind = Adam if recipe.optimizer == "adam" else RMSProp
    return kind(recipe, slots)


class AveragedSGD(mx.optimizer.SGD):
    """MXNet's update, and after it that of the mean of the last `averaged` steps' parameters.

    `averaged` is set before each step.
    """

    def __init__(self, slots: Slots, **keywords: float) -> None:
        super().__init__(**keywords)
        self.slots, self.averaged = slots, 1

    def create_state(self, index: int, weight: mx.nd.NDArray) -> list[mx.nd.NDArray]:
        return self.slots[index, weight.context]

    def update_multi_precision(self, index: Any, weight: Any, grad: Any, state: Any) -> None:
        """What `gluon.Trainer` calls, with one parameter or with lists of several."""
        super().update_multi_precision(index, weight, grad, state)
        if isinstance(index, int):
            weight, state = [weight], [state]
        for p, (average,) in zip(weight, state, strict=True):
            if self.averaged == 1:
                p.copyto(average)
            else:
                average *= 1 - 1 / self.averaged
                average += p / self.averaged


class SlotOptimizer(mx.optimizer.Optimizer):
    """An optimizer whose slots the backend makes, saves and restores."""

    def __init__(self, recipe: Recipe, slots: Slots) -> None:
        super().__init__(learning_rate=recipe.learning_rate, wd=recipe.weight_decay)
        self.recipe, self.slots, self.epsilon = recipe, slots, recipe.optimizer_epsilon

    def create_state(self, index: int, weight: mx.nd.NDArray) -> list[mx.nd.NDArray]:
        return self.slots[index, weight.context]


class Adam(SlotOptimizer):
    """MXNet's update, with a rate and an epsilon that are set before each step.

    `rate_and_epsilon` gives both. mx.optimizer.Adam adds epsilon to the uncorrected moment's root,
    and the count of steps by which it corrects can be restored by unpickling alone.
    """

    def update(self, index: int, weight: Any, grad: Any, state: list[Any]) -> None:  # noqa: ARG002
        mx.nd.adam_update(
            weight,
            grad,
            *state,
            out=weight,
            lr=self.learning_rate,
            beta1=self.recipe.adam_beta1,
            beta2=self.recipe.adam_beta2,
            epsilon=self.epsilon,
            wd=self.wd,
        )


class RMSProp(SlotOptimizer):
    """RMSProp with epsilon added to the root; mx.optimizer.RMSProp adds it under the root."""

    def update(self, index: int, weight: Any, grad: Any, state: list[Any]) -> None:  # noqa: ARG002
        (s,) = state
        g = grad + self.wd * weight
        s[:] = self.recipe.rmsprop_decay * s + (1 - self.recipe.rmsprop_decay) * g**2
        weight -= self.learning_rate * g / (s.sqrt() + self.epsilon)
