"""Learning rate, averaging, fine-tuning and stopping: functions of recipe and history alone.

Nothing here has a state of its own, so a resumed run needs only its history.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from ptbench.model.recipe import Recipe
from ptbench.training.records import Epoch

Stop = Literal["epochs", "patience", "target_perplexity", "maximum_seconds", "fine_tuning"]


def learning_rate(recipe: Recipe, history: Sequence[Epoch], fraction: float = 1.0) -> float:
    """Return the learning rate of a step in the epoch after those of `history`.

    - `constant` never changes it.
    - `constant_then_decay` multiplies it by `learning_rate_decay` at every epoch after the first
      `constant_epochs` (Zaremba et al. 2014, section 4.1; TensorFlow's PTB tutorial).
    - `roll_back_then_decay` has the same rates; `rolls_back` says what else it does.
    - `plateau` multiplies it when the validation nll has stopped falling, see `plateau_decays`.
    - `warm_up_then_decay` raises it linearly from 0 over `warm_up_epochs`, step by step, and then
      multiplies it by `learning_rate_decay` per epoch, also step by step.

    Fine-tuning has a constant rate of its own.

    Args:
        recipe: names the schedule.
        history: the epochs before this one.
        fraction: of this epoch's steps, the one about to be taken included; above 0, at most 1.
    """
    epoch = len(history) + 1
    initial, decay = recipe.learning_rate, recipe.learning_rate_decay
    if fine_tunes(recipe, history):
        return float(recipe.fine_tuning_learning_rate or initial)
    if recipe.schedule in ("constant_then_decay", "roll_back_then_decay"):
        return float(initial * decay ** max(epoch - recipe.constant_epochs, 0))
    if recipe.schedule == "plateau":
        return float(initial * decay ** plateau_decays(recipe, history))
    if recipe.schedule == "warm_up_then_decay":
        passed = len(history) + fraction
        if passed < recipe.warm_up_epochs:
            return float(initial * passed / recipe.warm_up_epochs)
        return float(initial * decay ** (passed - recipe.warm_up_epochs))
    return initial


def plateau_decays(recipe: Recipe, history: Sequence[Epoch]) -> int:
    """Return how often `plateau` has decayed the rate.

    Keras 2.1.3's ReduceLROnPlateau, without cooldown or a least rate: an epoch improves if its
    validation nll is below the best by more than `plateau_threshold`. After an improvement,
    `plateau_patience` epochs without one are forgiven; the next is answered by a decay, and so is
    every further `max(plateau_patience, 1)`-th until there is an improvement.

    With a patience and a threshold of 0 and a decay of 0.25 it is the rule of PyTorch's
    word_language_model example, which divides by 4 whenever validation does not improve.
    """
    best, waited, decays = float("inf"), 0, 0
    for epoch in history:
        if epoch.valid_nll < best - recipe.plateau_threshold:
            best, waited = epoch.valid_nll, 0
            continue
        if waited >= recipe.plateau_patience:
            decays += 1
            waited = 0
        waited += 1  # as Keras does, after a decay too
    return decays


def averages_since(recipe: Recipe, history: Sequence[Epoch]) -> int | None:
    """Return how many epochs had passed when asgd's mean began; None if it has not begun.

    It is of every step after the epoch that `non_monotone` names, and begins anew with fine-tuning.
    """
    if recipe.optimizer != "asgd":
        return None
    if fine_tunes(recipe, history):
        return recipe.epochs - recipe.fine_tuning_epochs
    if recipe.averaging_interval is None:
        return 0
    return non_monotone(history, recipe.averaging_interval)


def non_monotone(history: Sequence[Epoch], interval: int) -> int | None:
    """Return the first epoch that is worse than an old one; None if there is none yet.

    The trigger of NT-ASGD (Merity et al. 2017, algorithm 1, as their code has it): an epoch whose
    validation nll is above the lowest of those more than `interval` epochs before it.
    """
    lowest = float("inf")
    for index, epoch in enumerate(history):
        if index > interval:
            lowest = min(lowest, history[index - interval - 1].valid_nll)
        if epoch.valid_nll > lowest:
            return index + 1
    return None


def fine_tunes(recipe: Recipe, history: Sequence[Epoch]) -> bool:
    """Return whether the next epoch is one of the last `fine_tuning_epochs`.

    Those are the second run of Merity et al. 2017 (section 5, and their code): from the best
    parameters, with asgd's mean from its first step, until `non_monotone` says of it what had begun
    the mean of the first run.
    """
    tuned = recipe.fine_tuning_epochs
    return tuned > 0 and len(history) >= recipe.epochs - tuned


def rolls_back(recipe: Recipe, history: Sequence[Epoch]) -> bool:
    """Return whether the next epoch starts from the best parameters so far, not from the last.

    `roll_back_then_decay` does so once, after `constant_epochs` (Zhang 2018, strategy 1: train at
    the initial rate, return to the epoch of lowest validation perplexity, decay from there). The
    optimizer's own arrays are not rolled back; plain SGD, which the thesis uses, has none.

    Fine-tuning starts so, too; asgd's only array is its mean, which begins anew.
    """
    if fine_tunes(recipe, history) and not fine_tunes(recipe, history[:-1]):
        return True
    staged = recipe.schedule == "roll_back_then_decay"
    return staged and len(history) == recipe.constant_epochs > 0


def stop(recipe: Recipe, history: Sequence[Epoch]) -> Stop | None:
    """Return why training ends after these epochs; None if it goes on.

    `patience` counts as Keras' EarlyStopping does with min_delta 0: it ends after that many epochs
    in a row none of which is below the best before them.
    """
    last = history[-1]
    if recipe.target_perplexity is not None and last.valid_perplexity <= recipe.target_perplexity:
        return "target_perplexity"
    if recipe.patience is not None:
        best = min(range(len(history)), key=lambda index: history[index].valid_nll)
        if len(history) - 1 - best >= recipe.patience:
            return "patience"
    if recipe.maximum_seconds is not None:
        spent = sum(epoch.training_seconds for epoch in history)
        if spent >= recipe.maximum_seconds:
            return "maximum_seconds"
    tuned = history[recipe.epochs - recipe.fine_tuning_epochs :]
    if recipe.averaging_interval and non_monotone(tuned, recipe.averaging_interval):
        return "fine_tuning"
    return "epochs" if len(history) >= recipe.epochs else None
