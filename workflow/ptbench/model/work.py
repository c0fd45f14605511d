"""What a model's training takes: its matrix products, and estimates of memory and time.

A step of training can be no faster than its products on the same machine. What a framework reaches
of that bound says how much of its time goes elsewhere.

The estimates are what a run asks a cluster for, on the safe side for the slowest framework on the
slowest device that one would use. Asking for too much costs a wait in the queue; too little costs
an attempt. The next one asks for more of what ran out, and goes on from the run's checkpoint.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from ptbench.model.recipe import Accelerator, Recipe
from ptbench.model.shapes import GATES, kept_count, parameter_shapes

# Multiplications and additions a second that a cell reaches at least. On one thread of a busy
# processor zaremba-small reached 20e9 to 50e9; a GTX 1060 of 2016 has a peak of 4e12.
FLOPS: dict[Accelerator, float] = {"cpu": 10e9, "cuda": 1e12}
# Seconds for one time step of one layer, forwards and backwards, in which a small model does little
# but start kernels: some fifty, at 10 microseconds each, and Python around them.
STEP_LATENCY: dict[Accelerator, float] = {"cpu": 0.2e-3, "cuda": 1e-3}
# Weights of a dense matrix that take as long as one of a sparse product, which nothing shares: an
# estimate, from 24 bytes of gathered inputs and scattered sums a token, at 200 GB/s on a GTX 1060.
SPARSE_COST = 100
BACKWARD = 2  # a backward pass is twice the work of a forward pass
START_UP = 900.0  # seconds: imports from a shared file system, and compiling with XLA

CUDA_LIBRARIES = 4000  # MB: those of CUDA, and what its context takes of main memory
# Arrays as large as the parameters: these, gradients, two slots of adam, the best parameters, and
# what a checkpoint holds while it is written.
COPIES = 8
# Arrays as large as a batch's logits: exponentials, gradients, what a framework keeps of both.
LOGITS = 6


@dataclass(frozen=True)
class CorpusSize:
    """What the estimates need to know of a prepared corpus."""

    tokens: Mapping[str, int]  # of train, valid and test
    vocabulary_size: int


@lru_cache
def corpus_size(corpus_json: str) -> CorpusSize:
    """Sizes of the corpus that a `corpus.json` describes.

    Raises:
        FileNotFoundError: if it has not been prepared yet; Snakemake then asks again later.
    """
    with open(corpus_json, encoding="utf-8") as file:  # noqa: PTH123 Snakemake compares its name
        description = json.load(file)
    return CorpusSize(description["tokens"], description["vocabulary_size"])


def memory_megabytes(
    recipe: Recipe,
    accelerator: Accelerator,
    libraries: int,
    devices: int,
    size: CorpusSize,
    times: int = 1,
    devices_here: int | None = None,
) -> int:
    """Return the main memory to ask for on each node [MB].

    Args:
        libraries: memory of a process that trains a small model, libraries included [MB].
        times: ask for so many times the estimate.
        devices_here: of one node, each with its copies of the parameters; None: all of them.
    """
    copies = COPIES * (devices_here or devices)
    libraries += CUDA_LIBRARIES if accelerator == "cuda" else 0
    shapes = parameter_shapes(recipe, size.vocabulary_size)
    parameters = sum(map(math.prod, shapes.values()))  # the zeros of a sparse model too
    batch = max(
        recipe.global_batch_size(devices), recipe.evaluation_batch_size, recipe.test_batch_size
    )
    logits = batch * recipe.sequence_length * size.vocabulary_size * max(recipe.mixtures, 1)
    arrays = 4 * (copies * parameters + LOGITS * logits + 2 * sum(size.tokens.values()))
    return math.ceil((libraries + arrays / 1e6) * times)


def units_held(
    accelerator: Accelerator, devices: int, threads: int, cores: int | None = None
) -> int:
    """Return how many GPUs or CPU cores a run holds.

    Args:
        accelerator: which of the two.
        devices: that it trains on.
        threads: that it is given on CPUs.
        cores: of its machine, where that is known; more replicas than cores share them.
    """
    if accelerator == "cuda":
        return devices
    held = max(threads, devices)
    return held if cores is None else min(held, cores)


def budgeted(recipe: Recipe, devices: int, size: CorpusSize) -> CorpusSize:
    """Return how much of a corpus a pass over each split reads within the recipe's budget."""
    batches = {
        "train": recipe.global_batch_size(devices),
        "valid": recipe.evaluation_batch_size,
        "test": recipe.test_batch_size,
    }
    tokens = {
        split: int(min(size.tokens[split], recipe.budget_tokens(split, batch)))
        for split, batch in batches.items()
    }
    return CorpusSize(tokens, size.vocabulary_size)


def runtime_minutes(
    recipe: Recipe, accelerator: Accelerator, devices: int, size: CorpusSize, times: int = 1
) -> int:
    """Return the time limit to ask for [minutes], so many times the estimate.

    A pass over n tokens in batches takes n times the multiplications of one token, and the latency
    of every time step of every layer, on the replicas one after another in the worst case. The
    latter counts for batches of one sequence, as when the test split is scored.
    """

    recipe, size = recipe.within_budget(), budgeted(recipe, devices, size)

    def seconds(split: str, batch_size: int, work: int) -> float:
        tokens = size.tokens[split]
        multiplications = 2 * weights_per_token(recipe, size.vocabulary_size) * tokens
        latency = STEP_LATENCY[accelerator] * recipe.layers * devices * tokens / batch_size
        return work * (multiplications / FLOPS[accelerator]) + latency

    epoch = seconds("train", recipe.global_batch_size(devices), 1 + BACKWARD)
    epoch += seconds("valid", recipe.evaluation_batch_size, 1)
    test = seconds("test", recipe.test_batch_size, 1)
    # for its perplexity, and for its accuracy
    return math.ceil((START_UP + recipe.epochs * epoch + 2 * test) * times / 60)


def weights_per_token(recipe: Recipe, vocabulary_size: int) -> int:
    """Weights that a token is multiplied by: the output's in every mixture, the embedding's not.

    Dense ones, or as many of them as take the time of a sparse product.
    """
    shapes = parameter_shapes(recipe, vocabulary_size)
    work = {name: math.prod(shape) for name, shape in shapes.items()}
    if recipe.kernel == "sparse":
        for name, shape in shapes.items():
            if name.endswith((".input", ".recurrent")):
                work[name] = SPARSE_COST * kept_count(recipe, name, shape)
    embedding = work.pop("embedding")
    output = sum(count for name, count in work.items() if name.startswith("softmax."))
    others = sum(work.values()) - output
    tied = embedding if recipe.tie_weights else 0
    return others + (output + tied) * max(recipe.mixtures, 1)


class Product(NamedTuple):
    """A product of float32 matrices, [m, k] by [k, n]."""

    m: int
    k: int
    n: int

    @property
    def flops(self) -> int:
        return 2 * self.m * self.k * self.n


def training_products(recipe: Recipe, vocabulary_size: int) -> dict[Product, int]:
    """The products of one training step on one device and how often each is needed.

    Forward and backward, every weight's gradient formed in one product; what is elementwise, the
    embedding's look-up and the optimizer are left out, so the bound is on the generous side.
    """
    counts: dict[Product, int] = {}

    def add(product: Product, times: int = 1) -> None:
        counts[product] = counts.get(product, 0) + times

    def linear(rows: int, inputs: int, outputs: int) -> None:
        add(Product(rows, inputs, outputs))  # outputs
        add(Product(rows, outputs, inputs))  # the inputs' derivatives
        add(Product(inputs, rows, outputs))  # the weights' gradient

    tokens = recipe.batch_size * recipe.sequence_length
    inputs = recipe.embedding_size
    for width in recipe.widths:
        gates = len(GATES[recipe.rnn]) * width
        linear(tokens, inputs, gates)
        add(Product(recipe.batch_size, width, gates), recipe.sequence_length)
        add(Product(recipe.batch_size, gates, width), recipe.sequence_length)
        add(Product(width, tokens, gates))
        inputs = width
    features, rows = inputs, tokens
    if recipe.mixtures:
        features = recipe.latent_size or inputs
        linear(tokens, inputs, recipe.mixtures * features)
        linear(tokens, inputs, recipe.mixtures)
        rows = tokens * recipe.mixtures
    rank = recipe.embedding_size if recipe.tie_weights else recipe.output_rank
    if rank is not None and not (recipe.tie_weights and rank == features):
        linear(rows, features, rank)
        features = rank
    linear(rows, features, vocabulary_size)
    return counts


def flops_per_token(recipe: Recipe, vocabulary_size: int) -> float:
    """Operations of a training step's products for each of its tokens."""
    total = sum(p.flops * n for p, n in training_products(recipe, vocabulary_size).items())
    return total / (recipe.batch_size * recipe.sequence_length)


def bound(recipe: Recipe, vocabulary_size: int, rates: Mapping[Product, float]) -> float:
    """Training speed if nothing but the products took time [tokens/s].

    Args:
        rates: of each product [FLOP/s].
    """
    products = training_products(recipe, vocabulary_size)
    seconds = sum(count * product.flops / rates[product] for product, count in products.items())
    return recipe.batch_size * recipe.sequence_length / seconds
