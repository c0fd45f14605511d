"""Is AWD-LSTM the authors' own? `benchmarks/authors.py AWD MOS`, in the PyTorch environment.

AWD and MOS are clones of the authors' published code (salesforce/awd-lstm-lm and zihangdai/mos);
none of it is in this project. From equal parameters and without dropout, their models and ours, the
float64 oracle's, take ten steps of SGD on windows of varying length, and then ten of averaged SGD.
Prints the largest relative differences; ends with status 1 if one is above 1e-5.

What they do otherwise is kept out:

- their mean change of the last layer's output leaves out the first token of a window (the factor in
  `step`);
- PyTorch's clipping adds 1e-6 to the norm, which their rate of 30 (3 here) would make visible;
- PyTorch's ASGD takes each step at the rate set before the last one, so averaged steps are on
  windows of one length; and its mean leaves out its first step;
- with PyTorch 0.4 and later their embedding takes the last word of the vocabulary for padding (-1)
  and gives it no gradient, so that word is not in the text.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ptbench.backends import ORACLE, create
from ptbench.backends.base import Arrays, Setup
from ptbench.corpus.batching import Batch
from ptbench.model.recipe import Recipe

VOCABULARY, BATCH, LENGTH, STEPS = 50, 4, 12, 10
LARGEST = 1e-5  # their mixture adds 1e-8 to each probability
RATE, CLIP, DECAY = 3.0, 0.25, 1.2e-6
SMALL: dict[str, Any] = {
    "layers": 3, "embedding_size": 8, "hidden_size": 11, "recurrent_bias": True,
    "tie_weights": True, "initialization": "pytorch", "batch_size": BATCH,
    "sequence_length": LENGTH, "objective": "mean_per_token", "optimizer": "asgd",
    "activation_regularization": 2.0, "temporal_activation_regularization": 1.0,
    "weight_decay": DECAY, "clip_norm": CLIP, "learning_rate": RATE,
}  # fmt: skip
RECIPES = {
    "awd": Recipe(**SMALL, last_hidden_size=8),
    "mos": Recipe(**SMALL, last_hidden_size=9, mixtures=3, latent_size=8),
}


class Authors:
    """A model of the authors, and a step of their training loop."""

    def __init__(self, name: str, folder: Path, parameters: Arrays) -> None:
        """Import their code from `folder` and give it our parameters."""
        for module in ("model", "embed_regularize", "locked_dropout", "weight_drop"):
            sys.modules.pop(module, None)
        sys.path.insert(0, str(folder))
        code = importlib.import_module("model")
        self.mixture = name == "mos"
        widths = (VOCABULARY, 8, 11)
        widths += (9,) if self.mixture else ()
        dropouts = (0.0,) * 5
        rest = (True, 0.0, 3) if self.mixture else (True,)
        self.model = code.RNNModel("LSTM", *widths, 3, *dropouts, *rest).double()
        sys.path.remove(str(folder))
        for ours, theirs in self.names().items():
            value = torch.tensor(parameters[ours], dtype=torch.float64)
            theirs.data.copy_(value.T if value.ndim > 1 and ours != "embedding" else value)
        self.optimizer: torch.optim.Optimizer = torch.optim.SGD(
            self.model.parameters(), lr=RATE, weight_decay=DECAY
        )

    def names(self) -> dict[str, torch.Tensor]:
        """Return their parameters by our names; matrices are the transposes of ours."""
        model = self.model
        found = {"embedding": model.encoder.weight, "softmax.bias": model.decoder.bias}
        for layer, rnn in enumerate(model.rnns):
            found |= {
                f"rnn.{layer}.input": rnn.weight_ih_l0,
                f"rnn.{layer}.recurrent": rnn.weight_hh_l0,
                f"rnn.{layer}.bias": rnn.bias_ih_l0,
                f"rnn.{layer}.recurrent_bias": rnn.bias_hh_l0,
            }
        if self.mixture:
            found["prior.weight"] = model.prior.weight
            found |= {"latent.weight": model.latent[0].weight, "latent.bias": model.latent[0].bias}
        return found

    def average(self) -> None:
        """Turn to averaged SGD, as they do."""
        self.optimizer = torch.optim.ASGD(
            self.model.parameters(), lr=RATE, t0=0, lambd=0.0, weight_decay=DECAY
        )

    def step(self, batch: Batch, hidden: Any) -> tuple[float, Any]:
        """Return the nll [nats/token] and the next state."""
        inputs, targets = (torch.tensor(each, dtype=torch.long) for each in batch[:2])
        steps = len(inputs)
        self.optimizer.param_groups[0]["lr"] = RATE * steps / LENGTH
        self.optimizer.zero_grad()
        output, hidden, raw, dropped = self.model(inputs, hidden, return_h=True)
        # a mixture's output is log-probabilities, whose softmax is themselves
        logits = output.view(-1, VOCABULARY) if self.mixture else self.model.decoder(output)
        nll = torch.nn.functional.cross_entropy(logits, targets.view(-1))
        loss = nll + 2.0 * dropped[-1].pow(2).mean()
        loss = loss + (steps - 1) / steps * (raw[-1][1:] - raw[-1][:-1]).pow(2).mean()
        loss.backward()
        self.gradients = {name: each.grad.clone() for name, each in self.names().items()}
        norm = torch.nn.utils.get_total_norm([each.grad for each in self.model.parameters()])
        for each in self.model.parameters():
            each.grad *= min(1.0, CLIP / float(norm))
        self.optimizer.step()
        return float(nll.detach()), [tuple(part.detach() for part in layer) for layer in hidden]

    def mean(self) -> dict[str, torch.Tensor]:
        """Return averaged SGD's mean."""
        return {name: self.optimizer.state[each]["ax"] for name, each in self.names().items()}


def difference(ours: Arrays, theirs: dict[str, torch.Tensor]) -> float:
    """Return the largest difference of a parameter, in shares of its largest element."""
    worst = 0.0
    for name, theirs_ in theirs.items():
        value = theirs_.detach().numpy()
        value = value.T if value.ndim > 1 and name != "embedding" else value
        worst = max(worst, float(np.abs(ours[name] - value).max() / np.abs(value).max()))
    return worst


def compare(name: str, folder: Path) -> dict[str, float]:
    """Return the largest differences between a model of the authors and ours."""
    recipe = RECIPES[name]
    oracle = create(ORACLE, Setup(recipe, VOCABULARY, seed=1))
    authors = Authors(name, folder, oracle.parameters())
    rng = np.random.default_rng(2)
    state, hidden = oracle.initial_state(BATCH, training=True), authors.model.init_hidden(BATCH)
    worst = {"nll": 0.0, "gradients": 0.0, "parameters after SGD": 0.0}
    for step in range(2 * STEPS):
        steps = int(rng.integers(5, 20)) if step < STEPS else LENGTH
        if step == STEPS:
            worst["parameters after SGD"] = difference(oracle.parameters(), authors.names())
            authors.average()
        if step == STEPS + 1:
            oracle.average_from = oracle.step
        inputs, targets = rng.integers(0, VOCABULARY - 1, (2, steps, BATCH)).astype(np.int32)
        batch = Batch(inputs, targets, np.ones((steps, BATCH), np.float32))
        gradients = oracle.gradients(batch, state)
        result = oracle.train_step(batch, state, RATE * steps / LENGTH)
        nll, hidden = authors.step(batch, hidden)
        state = result.state
        ours = float(result.nll) / (steps * BATCH)
        worst["nll"] = max(worst["nll"], abs(ours - nll) / nll)
        worst["gradients"] = max(worst["gradients"], difference(gradients, authors.gradients))
    snapshot = oracle.snapshot(state)
    mean = {each: snapshot[f"optimizer.average.{each}"] for each in oracle.shapes}
    worst["parameters after ASGD"] = difference(oracle.parameters(), authors.names())
    worst["their mean"] = difference(mean, authors.mean())
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("awd", type=Path, help="clone of salesforce/awd-lstm-lm")
    parser.add_argument("mos", type=Path, help="clone of zihangdai/mos")
    arguments = parser.parse_args()
    good = True
    for name, folder in vars(arguments).items():
        for what, error in compare(name, folder.resolve()).items():
            good &= error <= LARGEST
            print(f"{name}: {what}: {error:.1e}")
    sys.exit(not good)


if __name__ == "__main__":
    main()
