"""The LSTM language model of pytorch/examples (word_language_model), to compare speeds with.

What a PyTorch user would start from: nn.LSTM over all layers, log_softmax and NLLLoss, gradients
clipped by norm, SGD by hand, and the loss fetched at every step.
"""

from __future__ import annotations

import itertools
import os
import time
from typing import Any

import torch
from torch import Tensor, nn

from ptbench.errors import PtbenchError
from ptbench.measurement.backend_speed import LEARNING_RATE, random_batches
from ptbench.model.recipe import Recipe
from ptbench.training.provenance import peak_of


class RNNModel(nn.Module):
    """Embedding, LSTM and linear decoder, with dropout between them."""

    def __init__(self, recipe: Recipe, vocabulary_size: int) -> None:
        super().__init__()
        rate = recipe.dropout
        width = recipe.hidden_size
        self.drop = nn.Dropout(rate)
        self.encoder = nn.Embedding(vocabulary_size, recipe.embedding_size)
        self.rnn = nn.LSTM(recipe.embedding_size, width, recipe.layers, dropout=rate)
        self.decoder = nn.Linear(width, vocabulary_size)
        nn.init.uniform_(self.encoder.weight, -0.1, 0.1)
        nn.init.uniform_(self.decoder.weight, -0.1, 0.1)
        nn.init.zeros_(self.decoder.bias)

    def forward(
        self, inputs: Tensor, hidden: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        output, hidden = self.rnn(self.drop(self.encoder(inputs)), hidden)
        decoded = self.decoder(self.drop(output))
        return nn.functional.log_softmax(decoded.flatten(0, 1), dim=1), hidden


class PyTorchExample:
    """The model, and batches on its device."""

    def __init__(self, task: dict[str, Any]) -> None:
        """Build the model that a task describes.

        Raises:
            PtbenchError: if the example has no such model.
        """
        recipe = Recipe.model_validate(task["recipe"])
        if recipe.mixtures or recipe.rnn != "lstm" or recipe.tie_weights:
            raise PtbenchError("the example of PyTorch is for the LSTM of one width")
        torch.set_num_threads(task["threads"])
        # as in our own models: float32 throughout
        torch.backends.cudnn.allow_tf32 = False
        torch.set_float32_matmul_precision("highest")
        self.device = torch.device(task["accelerator"])
        torch.manual_seed(0)
        self.model = RNNModel(recipe, task["vocabulary_size"]).to(self.device)
        self.clip_norm = recipe.clip_norm
        batches = [
            tuple(torch.from_numpy(array).long().to(self.device) for array in batch[:2])
            for batch in random_batches(recipe, task["vocabulary_size"])
        ]
        self.stream = itertools.cycle(batches)
        shape = recipe.layers, recipe.batch_size, recipe.hidden_size
        self.hidden: tuple[Tensor, ...] = (
            torch.zeros(shape, device=self.device), torch.zeros(shape, device=self.device)
        )  # fmt: skip

    def train(self, seconds: float) -> dict[str, float]:
        """Take steps for at least that long; return tokens, seconds, and the last nll per token."""
        self.model.train()
        tokens, start = 0, time.perf_counter()
        for inputs, targets in self.stream:
            self.model.zero_grad()
            self.hidden = tuple(each.detach() for each in self.hidden)
            output, self.hidden = self.model(inputs, self.hidden)
            loss = nn.functional.nll_loss(output, targets.flatten())
            loss.backward()
            if self.clip_norm is not None:
                nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
            for p in self.model.parameters():
                assert p.grad is not None
                p.data.add_(p.grad, alpha=-LEARNING_RATE)
            nll = loss.item()  # waits for the device
            tokens += targets.numel()
            spent = time.perf_counter() - start
            if spent >= seconds:
                return {"tokens": tokens, "seconds": spent, "nll": nll}
        raise AssertionError("the stream has no end")

    def peak_memory(self) -> int:
        """Return the largest memory of the device, or of this process on CPUs [bytes]."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        return peak_of(os.getpid())
