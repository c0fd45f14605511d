"""The model and its optimizer on one device: what a training step does there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ptbench.backends.base import TrainStep
from ptbench.backends.contract__LEFT import Mask, Tokens, device_columns, objective_divisor
from ptbench.backends.pytorch.heads import IGNORED
from ptbench.backends.pytorch.layers import LayerState
from ptbench.backends.pytorch.model import LanguageModel, ParameterMasks
from ptbench.backends.pytorch.optimizer import load_slots, optimizer_of, slots, update
from ptbench.backends.pytorch.settings import Settings
from ptbench.model.parameters import Parameters, state_widths
from ptbench.model.recipe import Accelerator, Recipe


class Replica:
    """Rank 0 of 1 where there is but one device."""

    def __init__(
        self, recipe: Recipe, vocabulary_size: int, seed: int, accelerator: Accelerator,
        threads: int, rank: int, devices: int,
    ) -> None:  # fmt: skip
        self.recipe, self.vocabulary_size = recipe, vocabulary_size
        self.seed, self.rank, self.devices = seed, rank, devices
        self.step = 0
        self.settings = Settings(recipe, accelerator, threads, devices)
        self.device = (
            torch.device(accelerator, rank) if accelerator == "cuda" else torch.device("cpu")
        )
        self.model = LanguageModel(recipe, vocabulary_size, seed, accelerator).to(self.device)
        self.trained = list(self.model.canonical_parameters().values())
        self.shared_draws = torch.Generator(self.device)
        self.parallel: nn.Module = self.model
        if devices > 1:
            device_ids = [self.device] if accelerator == "cuda" else None
            self.parallel = DistributedDataParallel(  # buffers never change
                self.model, device_ids=device_ids, forward_sync_buffers=False
            )
        self.optimizer = optimizer_of(recipe, self.trained)

    def initial_state(self, batch_size: int) -> list[LayerState]:
        names = state_widths(self.recipe)
        return self.load_state({n: np.zeros((batch_size, w), np.float32) for n, w in names.items()})

    def loss(
        self, model: nn.Module, inputs: Tokens, targets: Tokens, mask: Mask,
        state: list[LayerState], scale: float, masks: ParameterMasks,
    ) -> tuple[Tensor, Tensor | None, list[LayerState]]:  # fmt: skip
        """`scale` times the summed nll of the real tokens, `scale` times what training adds to it,
        if anything, and the last state.
        """
        real_targets = self.tensor(np.where(mask > 0, targets, IGNORED))
        return model(self.tensor(inputs), real_targets, state, scale, masks)

    def backward(
        self, inputs: Tokens, targets: Tokens, mask: Mask, state: list[LayerState]
    ) -> tuple[Tensor, list[LayerState]]:
        """Put the objective's gradient, summed over replicas, into every parameter's grad."""
        self.settings.apply()
        masks = self.draw_masks()
        # DistributedDataParallel averages over the replicas; the objective is their sum.
        scale = self.devices / objective_divisor(self.recipe, mask)
        mine = device_columns(mask.shape[1], self.devices)[self.rank]
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        loss, penalty, state = self.loss(
            self.parallel, inputs[:, mine], targets[:, mine], mask[:, mine], state, scale, masks
        )
        (loss if penalty is None else loss + penalty).backward()
        nll = loss.detach() / scale
        if self.devices > 1:
            torch.distributed.all_reduce(nll)
        return nll, state

    def draw_masks(self) -> ParameterMasks:
        """Seed the step's dropout; draw which words and weights all replicas drop."""
        recipe = self.recipe
        if recipe.drops:
            entropy = np.random.SeedSequence([self.seed, self.step, self.rank])
            torch.manual_seed(int(entropy.generate_state(1, np.uint64)[0]))
        if recipe.word_dropout or recipe.weight_dropout:
            entropy = np.random.SeedSequence([self.seed, self.step], spawn_key=(1,))
            self.shared_draws.manual_seed(int(entropy.generate_state(1, np.uint64)[0]))
        masks = {}
        if recipe.word_dropout:
            masks["embedding"] = self.draw_mask(recipe.word_dropout, (self.vocabulary_size, 1))
        if recipe.weight_dropout:
            for name, parameter in self.model.canonical_parameters().items():
                if name.endswith(".recurrent"):
                    masks[name] = self.draw_mask(recipe.weight_dropout, parameter.shape)
        return masks

    def draw_mask(self, rate: float, shape: tuple[int, ...]) -> Tensor:
        """0 or 1 / keep probability, the same on all replicas."""
        mask = torch.empty(shape, device=self.device)
        return mask.bernoulli_(1 - rate, generator=self.shared_draws).div_(1 - rate)

    def train_step(
        self, inputs: Tokens, targets: Tokens, mask: Mask, state: list[LayerState],
        learning_rate: float, averaged: int,
    ) -> TrainStep:  # fmt: skip
        nll, state = self.backward(inputs, targets, mask, state)
        norm = update(self.optimizer, self.trained, self.recipe, learning_rate, averaged)
        self.step += 1
        return TrainStep(nll, norm, state)

    def gradients(self) -> Parameters:
        """What `backward` has left."""
        parameters = self.model.canonical_parameters()
        return self.model.arrays({name: p.grad for name, p in parameters.items()})

    def parameters(self) -> Parameters:
        return self.model.arrays(self.model.canonical_parameters())

    def slots(self) -> Parameters:
        return slots(self.optimizer, self.model)

    def load_slots(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        load_slots(self.optimizer, self.model, arrays, self.step)

    def state_arrays(self, state: list[LayerState]) -> dict[str, npt.NDArray[np.float32]]:
        """A copy of this replica's state under the contract's names."""
        tensors = [tensor for layer in state for tensor in layer]
        names = state_widths(self.recipe)
        return {n: t.cpu().numpy().copy() for n, t in zip(names, tensors, strict=True)}

    def load_state(self, arrays: Mapping[str, npt.NDArray[Any]]) -> list[LayerState]:
        """The state from arrays that are this replica's columns."""
        kinds = ("h", "c") if self.recipe.rnn == "lstm" else ("h",)
        return [
            tuple(torch.from_numpy(arrays[f"state.{n}.{k}"].copy()).to(self.device) for k in kinds)
            for n in range(self.recipe.layers)
        ]

    def peak_memory(self) -> int:
        """Largest allocation on this replica's GPU so far [bytes]."""
        return torch.cuda.max_memory_allocated(self.device)

    def tensor(self, tokens: npt.NDArray[Any]) -> Tensor:
        """A copy on the device, as the integers that PyTorch's losses want."""
        return torch.from_numpy(tokens).to(self.device, torch.int64, non_blocking=True)
