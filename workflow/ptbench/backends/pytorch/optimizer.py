"""torch.optim's optimizers, whose own definitions are the contract's, and their slots."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor, nn

from ptbench.backends.pytorch.model import LanguageModel
from ptbench.model.optimizers import OPTIMIZER_SLOTS
from ptbench.model.parameters import Parameters
from ptbench.model.recipe import Recipe

# torch.optim's names of the contract's slots
SLOTS = {
    "first_moment": "exp_avg",
    "second_moment": "exp_avg_sq",
    "mean_square": "square_avg",
    "average": "ax",  # torch.optim.ASGD's name
}


def optimizer_of(recipe: Recipe, parameters: list[Any]) -> torch.optim.Optimizer:
    """The recipe's; tuned ones pass over each parameter once, where torch.optim has such a loop."""
    common: dict[str, Any] = {"lr": recipe.learning_rate, "weight_decay": recipe.weight_decay}
    if recipe.optimizer == "rmsprop":
        eps = recipe.optimizer_epsilon
        return torch.optim.RMSprop(parameters, alpha=recipe.rmsprop_decay, eps=eps, **common)
    common["fused"] = recipe.implementation == "tuned"
    if recipe.optimizer in ("sgd", "asgd"):
        return torch.optim.SGD(parameters, **common)
    betas = recipe.adam_beta1, recipe.adam_beta2
    return torch.optim.Adam(parameters, betas=betas, eps=recipe.optimizer_epsilon, **common)


def update(
    optimizer: torch.optim.Optimizer, parameters: list[Any], recipe: Recipe, learning_rate: float,
    averaged: int,
) -> Tensor:  # fmt: skip
    """One clipped update; the gradients' norm before clipping."""
    group = optimizer.param_groups[0]
    group["lr"] = learning_rate
    limit = math.inf if recipe.clip_norm is None else recipe.clip_norm
    on_cpu = parameters[0].device.type == "cpu"
    if recipe.implementation == "tuned" and recipe.optimizer in ("sgd", "asgd") and on_cpu:
        norm = nn.utils.get_total_norm([p.grad for p in parameters])
        if (
            limit < norm < math.inf
        ):  # rate (s g + decay p) = s rate (g + decay / s p) spares scaling all g
            clipped = limit / float(norm)
            group["lr"] = learning_rate * clipped
            group["weight_decay"] = recipe.weight_decay / clipped
        else:
            group["weight_decay"] = recipe.weight_decay
    else:
        norm = nn.utils.clip_grad_norm_(parameters, limit)
    optimizer.step()
    if recipe.optimizer == "asgd":
        average(optimizer, parameters, averaged)
    return norm


@torch.no_grad()
def average(optimizer: torch.optim.Optimizer, parameters: list[Any], averaged: int) -> None:
    """asgd's mean of so many steps' parameters, in the state of the SGD that made them.

    torch.optim.ASGD counts those steps itself, and has no fused loop.
    """
    for p in parameters:
        state = optimizer.state[p]
        if "ax" not in state:
            state["ax"] = torch.zeros_like(p)
        if averaged == 1:
            state["ax"].copy_(p)  # lerp_ may give 0 for -0
        else:
            state["ax"].lerp_(p, 1 / averaged)


def slots(optimizer: torch.optim.Optimizer, model: LanguageModel) -> Parameters:
    """The optimizer's arrays, `{slot}.{parameter}`, each a copy in canonical shape.

    They are made, zero, in the first step.
    """
    arrays: Parameters = {}
    for slot in OPTIMIZER_SLOTS[model.recipe.optimizer]:
        kept = {
            name: optimizer.state[p].get(SLOTS[slot], torch.zeros_like(p))
            for name, p in model.canonical_parameters().items()
        }
        arrays |= {f"{slot}.{name}": array for name, array in model.arrays(kept).items()}
    return arrays


def load_slots(
    optimizer: torch.optim.Optimizer, model: LanguageModel,
    arrays: Mapping[str, npt.NDArray[Any]], step: int,
) -> None:  # fmt: skip
    """Replace the optimizer's arrays, named as `slots` does, and its count of steps."""
    if not arrays:
        return
    state: dict[int, dict[str, Any]] = {}
    for index, (name, stored) in enumerate(model.canonical().items()):
        state[index] = {
            SLOTS[slot]: stored.stored(arrays[f"{slot}.{name}"])
            for slot in OPTIMIZER_SLOTS[model.recipe.optimizer]
        }
        state[index]["step"] = torch.tensor(float(step))
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
