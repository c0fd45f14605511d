"""The cases that every framework is compared with the oracle on: a recipe, devices and a feeding.

By default they are a pairwise covering design over `FACTORS`. `--exhaustive` adds `named_cases`,
the products of kinds of model, kernels, implementations, optimizers and devices.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tests.support.covering import covering_design
from tests.support.problems import AWD, IMPLEMENTATIONS, TIME, recipe

from ptbench.backends import FRAMEWORKS, ORACLE
from ptbench.model.recipe import Recipe

MOS: dict[str, Any] = {"mixtures": 3, "latent_size": 6}
PENALTIES = {"activation_regularization": 2.0, "temporal_activation_regularization": 3.0}
# An epsilon of the size of gradients shows where it is added; betas and decay are not the defaults,
# nor so close to 1 that only the last moments count.
MOMENTS = {"adam_beta1": 0.8, "adam_beta2": 0.99, "rmsprop_decay": 0.7, "optimizer_epsilon": 1e-2}
# Rates other than one half, to tell what is kept from what is dropped, and all different, to tell
# one place from another.
UNIT_DROPOUT: dict[str, Any] = {"input_dropout": 0.35, "hidden_dropout": 0.3, "output_dropout": 0.4}
LATENT_DROPOUT: dict[str, Any] = {"mixtures": 2, "latent_size": 10, "latent_dropout": 0.2}
LOCKED_DROPOUT: dict[str, Any] = {
    **UNIT_DROPOUT, **LATENT_DROPOUT, "dropout_kind": "locked", "recurrent_dropout": 0.25
}  # fmt: skip

# Each factor's levels, the plainest first: the name, and what it changes in `recipe`.
FACTORS: dict[str, dict[str, dict[str, Any]]] = {
    "kernel": {"fused": {}, "stepwise": {"kernel": "stepwise"}, "block": {"kernel": "block"},
               "sparse kernel": {"kernel": "sparse"}},
    "implementation": {"stock": {}, "tuned": {"implementation": "tuned"}},
    "rnn": {"lstm": {}, "gru": {"rnn": "gru"}, "rnn_tanh": {"rnn": "rnn_tanh"},
            "rnn_relu": {"rnn": "rnn_relu"}},
    "biases": {"one bias": {}, "two biases": {"recurrent_bias": True}},
    "layers": {"two layers": {}, "one layer": {"layers": 1, "hidden_size": 32},
               "wider last layer": {"last_hidden_size": 20}},
    "weights": {"all weights": {}, "few weights": {"kept_weights": 0.3}},
    "softmaxes": {"one softmax": {}, "mixture": MOS},
    "output": {"own output": {}, "tied": {"tie_weights": True},
               "tied, projected": {"tie_weights": True}, "factorised": {"output_rank": 5}},
    "softmax bias": {"softmax bias": {}, "no softmax bias": {"softmax_bias": False}},
    "penalties": {"no penalties": {}, "penalties": PENALTIES},
    "dropout": {"no dropout": {},
                "units dropped": UNIT_DROPOUT | {"latent_dropout": 0.2},
                "locked units dropped": UNIT_DROPOUT
                | {"latent_dropout": 0.2, "recurrent_dropout": 0.25, "dropout_kind": "locked"},
                "words dropped": UNIT_DROPOUT | {"word_dropout": 0.25, "recurrent_dropout": 0.25},
                "weights dropped": UNIT_DROPOUT | {"weight_dropout": 0.3}},
    "optimizer": {name: {"optimizer": name} | MOMENTS
                  for name in ("sgd", "adam", "rmsprop", "asgd")},
    "decay": {"no decay": {}, "decay": {"weight_decay": 0.02}},
    "clipping": {"clipped": {}, "not clipped": {"clip_norm": None}},
    "objective": {"sum": {}, "mean": {"objective": "mean_per_token"}},
    "feeding": {"streams": {}, "windows": {"feeding": "windows"},
                "sentences": {"feeding": "sentences"}},
    "devices": {"one device": {}, "two devices": {}},
}  # fmt: skip


# Models by name, without dropout: changes to `recipe`.
MODELS: dict[str, dict[str, Any]] = {
    "lstm": {},
    "lstm, two biases": {"recurrent_bias": True},
    "lstm, last layer wider": {"last_hidden_size": 20},
    "gru": {"rnn": "gru"},
    "gru, two biases": {"rnn": "gru", "recurrent_bias": True, "last_hidden_size": 8},
    "lstm, penalties": PENALTIES,
    "rnn_tanh": {"rnn": "rnn_tanh"},
    "rnn_relu, two biases": {"rnn": "rnn_relu", "recurrent_bias": True},
    "few weights, lstm": {"kept_weights": 0.3, "weight_decay": 0.1},
    "few weights, gru": {"kept_weights": 0.3, "rnn": "gru"},
    "tied": {"tie_weights": True, "last_hidden_size": 12, "softmax_bias": False, "clip_norm": 0.3},
    "tied, projected": {"tie_weights": True},
    "factorised": {"output_rank": 5},
    "mixture": {"mixtures": 3},
    "mixture, mean per token": MOS
    | {"objective": "mean_per_token", "clip_norm": 0.1, "learning_rate": 5.0},
    "mixture, tied": MOS | {"latent_size": 12, "tie_weights": True, "softmax_bias": False},
    "mixture, tied, projected": MOS | {"tie_weights": True},
    "mixture, factorised": MOS | {"output_rank": 5},
    "mixture over a gru, penalties, mean per token": MOS
    | {
        "rnn": "gru", "objective": "mean_per_token", "clip_norm": 0.1, "learning_rate": 5.0,
        "activation_regularization": 5.0, "temporal_activation_regularization": 3.0,
    },
}  # fmt: skip
# The same with a kernel that is not the usual one.
KERNEL_MODELS: dict[str, dict[str, Any]] = {
    "stepwise, lstm": {"kernel": "stepwise", "last_hidden_size": 20},
    "stepwise, lstm, two biases": {"kernel": "stepwise", "recurrent_bias": True},
    "stepwise, gru": {"kernel": "stepwise", "rnn": "gru"},
    "stepwise, gru, two biases": {"kernel": "stepwise", "rnn": "gru", "recurrent_bias": True},
    "stepwise, rnn_tanh": {"kernel": "stepwise", "rnn": "rnn_tanh"},
    "stepwise, rnn_relu": {"kernel": "stepwise", "rnn": "rnn_relu"},
    "stepwise, few weights": {"kernel": "stepwise", "kept_weights": 0.3},
    "block, lstm": {"kernel": "block", "last_hidden_size": 20},
    "block, lstm, two biases": {"kernel": "block", "recurrent_bias": True},
    "block, few weights": {"kernel": "block", "kept_weights": 0.3},
    "sparse, lstm": {"kernel": "sparse", "kept_weights": 0.3, "weight_decay": 0.1},
    "sparse, lstm, adam": {
        "kernel": "sparse", "kept_weights": 0.1, "optimizer": "adam", "learning_rate": 0.01
    },
}  # fmt: skip
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd, decay": {"weight_decay": 0.1},
    "sgd, decay, not clipped": {"weight_decay": 0.1, "clip_norm": None},
    "adam": {"optimizer": "adam", "learning_rate": 0.01},
    "adam, decay, not clipped": {
        "optimizer": "adam", "learning_rate": 0.05, "weight_decay": 0.1, "clip_norm": None,
        **MOMENTS,
    },
    "rmsprop": {"optimizer": "rmsprop", "learning_rate": 0.01},
    "rmsprop, decay, not clipped": {
        "optimizer": "rmsprop", "learning_rate": 0.05, "weight_decay": 0.1, "clip_norm": None,
        **MOMENTS,
    },
    # At this rate parameters move far more than float32 rounds them.
    "asgd": {"optimizer": "asgd", "learning_rate": 4.0},
    "asgd, decay, not clipped": {"optimizer": "asgd", "weight_decay": 0.1, "clip_norm": None},
}  # fmt: skip
# Where dropout is implemented by other code. One wide layer compiles faster than two, and its masks
# are as unlikely to be equal by chance.
ONE_LAYER = UNIT_DROPOUT | {"recurrent_dropout": 0.25, "layers": 1, "hidden_size": 32}
WEIGHTS = UNIT_DROPOUT | {"weight_dropout": 0.3, "layers": 1, "hidden_size": 32}
DROPPING: dict[str, dict[str, Any]] = {
    "units": UNIT_DROPOUT,
    "locked": LOCKED_DROPOUT,
    "latents": UNIT_DROPOUT | LATENT_DROPOUT,
    "words": UNIT_DROPOUT
    | {"word_dropout": 0.25, "recurrent_dropout": 0.25, "kernel": "stepwise"},
    "recurrent, lstm, two biases": ONE_LAYER | {"recurrent_bias": True},
    "recurrent, few weights": ONE_LAYER | {"kept_weights": 0.3},
    "recurrent, sparse kernel": ONE_LAYER | {"kept_weights": 0.3, "kernel": "sparse"},
    "recurrent, gru, two biases": ONE_LAYER | {"rnn": "gru", "recurrent_bias": True},
    "recurrent, rnn_tanh": ONE_LAYER | {"rnn": "rnn_tanh"},
    "weights": UNIT_DROPOUT | {"weight_dropout": 0.3},
    "weights, stepwise": WEIGHTS | {"kernel": "stepwise"},
    "weights, block": WEIGHTS | {"kernel": "block", "recurrent_bias": True},
    "weights, sparse kernel": WEIGHTS | {"kept_weights": 0.3, "kernel": "sparse"},
    # With fewer weights than that, some units would not reach the loss.
    "weights, few weights, gru": WEIGHTS
    | {"kept_weights": 0.6, "rnn": "gru", "recurrent_bias": True},
}  # fmt: skip
MEAN = {"objective": "mean_per_token", "clip_norm": 0.1, "learning_rate": 5.0}
# What is compared on one device and on two.
REPLICATED: dict[str, dict[str, Any]] = {
    "sum over time": {},
    "mean per token": MEAN,
    "mean per token, one layer": {**MEAN, "layers": 1},
    "not clipped": {"clip_norm": None, "layers": 1},
    "units dropped": UNIT_DROPOUT,
    "locked units dropped, tuned": LOCKED_DROPOUT | {"implementation": "tuned"},
    "weights dropped": UNIT_DROPOUT | {"weight_dropout": 0.3},
    "awd": UNIT_DROPOUT
    | AWD
    | {"dropout_kind": "locked", "word_dropout": 0.1, "implementation": "tuned"},
}


@dataclass(frozen=True)
class Case:
    """A recipe, and the number of devices that it is trained on."""

    name: str
    recipe: Recipe
    devices: int = 1

    @property
    def times(self) -> tuple[int, ...]:
        """Return the time steps of successive batches, again and again.

        Sentences come in several lengths, for each of which a framework may compile a model. Whole
        runs on them are in `parity/test_feeding.py`, so here only those cases have two lengths
        whose masks are for all time steps.
        """
        several = self.recipe.feeding == "sentences" and self.recipe.dropout_kind == "locked"
        return (TIME, 3) if several else (TIME,)

    @property
    def carried(self) -> bool:
        """Return whether a batch starts from the state after the one before."""
        return self.recipe.feeding == "parallel_streams"


def allowed(levels: Mapping[str, str]) -> bool:
    """Return whether these levels can meet, in a case that may not have all factors yet."""
    kernel = levels.get("kernel")
    if kernel in ("block", "sparse kernel") and levels.get("rnn", "lstm") != "lstm":
        return False
    if kernel == "sparse kernel" and levels.get("weights") == "all weights":
        return False
    # `masks_of` tells the inputs from the outputs of a tied embedding by the bias.
    tied = levels.get("output", "own output").startswith("tied")
    unbiased = levels.get("softmax bias") == "no softmax bias"
    return not (tied and unbiased and levels.get("dropout", "no dropout") != "no dropout")


def kernels_of(framework: str) -> tuple[str, ...]:
    """Return the kernels that a framework has; of the oracle, those that it is tested with."""
    return ("fused", "stepwise", "sparse") if framework == ORACLE else FRAMEWORKS[framework].kernels


def levels_of(framework: str) -> dict[str, list[str]]:
    """Return the names of the factors' levels that a framework has."""
    kernels = kernels_of(framework)
    names = {factor: list(levels) for factor, levels in FACTORS.items()}
    names["kernel"] = [
        name
        for name, changes in FACTORS["kernel"].items()
        if changes.get("kernel", "fused") in kernels
    ]
    return names


@functools.cache
def covering_cases(framework: str) -> list[Case]:
    """Return cases in which every pair of levels that can meet does meet."""
    return [case_of(levels) for levels in covering_design(levels_of(framework), allowed)]


def case_of(levels: Mapping[str, str]) -> Case:
    """Return the case with one level of each factor."""
    changes: dict[str, Any] = {}
    for factor, level in levels.items():
        changes |= FACTORS[factor][level]
    # At these rates steps move parameters far more than float32 rounds them, and nothing diverges.
    summed, clipped = levels["objective"] == "sum", levels["clipping"] == "clipped"
    if clipped:
        changes["clip_norm"] = 0.2 if summed else 0.1
    if levels["optimizer"] in ("adam", "rmsprop"):
        rate = 0.05
    elif clipped:
        rate = 1 / changes["clip_norm"]
    else:
        rate = 0.4 if summed else 1.0
    changes["learning_rate"] = rate
    if levels["output"] == "tied":
        made = recipe(**changes)
        changes["embedding_size"] = made.latent_size if made.mixtures else made.widths[-1]
    if levels["weights"] == "few weights" and levels["dropout"] != "no dropout":
        changes["kept_weights"] = 0.9  # with fewer, not every unit reaches the loss at each step
    special = [level for factor, level in levels.items() if level != next(iter(FACTORS[factor]))]
    devices = 2 if levels["devices"] == "two devices" else 1
    return Case(", ".join(special) or "plain", recipe(**changes), devices)


@functools.cache
def named_cases(framework: str) -> list[Case]:
    """Return the products that `--exhaustive` tests beside the covering design."""
    cases = []
    for (name, changes), implementation in itertools.product(
        (MODELS | KERNEL_MODELS | DROPPING).items(), IMPLEMENTATIONS
    ):
        changed = recipe(**changes, implementation=implementation)
        cases.append(Case(f"{name}, {implementation}", changed))
    for (name, changes), implementation, devices in itertools.product(
        OPTIMIZERS.items(), IMPLEMENTATIONS, (1, 2)
    ):
        changed = recipe(**changes, implementation=implementation)
        cases.append(Case(f"{name}, {implementation}, devices {devices}", changed, devices))
    for (name, changes), devices in itertools.product(REPLICATED.items(), (1, 2)):
        cases.append(Case(f"{name}, devices {devices}", recipe(**changes), devices))
    kernels = kernels_of(framework)
    return [case for case in cases if case.recipe.kernel in kernels]
