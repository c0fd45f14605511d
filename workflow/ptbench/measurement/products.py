"""The matrix products of a training step, and the speed that they alone would allow.

A step of training can be no faster than its products on the same machine. What a framework reaches
of that bound says how much of its time goes elsewhere.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from ptbench.backends.contract import GATES
from ptbench.configuration.models import Recipe


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


def measured_rate(product: Product, multiply: Callable[[], object], seconds: float) -> float:
    """Speed of `multiply`, which computes the product once [FLOP/s]: the best of short runs.

    The best, because a ceiling is asked for, and whatever else runs only takes away from it.
    """
    multiply()
    count = max(1, math.ceil(2e8 / product.flops))
    best, end = math.inf, time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        for _ in range(count):
            multiply()
        now = time.perf_counter()
        best = min(best, (now - start) / count)
        if now >= end:
            return product.flops / best


class NumpyProducts:
    """Products by NumPy's BLAS."""

    def __init__(self, threads: int) -> None:
        """Args: threads: for information; BLAS reads its own setting before the import."""

    def rate(self, product: Product, seconds: float) -> float:
        rng = np.random.default_rng(0)
        a = rng.random((product.m, product.k), np.float32)
        b = rng.random((product.k, product.n), np.float32)
        out = np.empty((product.m, product.n), np.float32)
        return measured_rate(product, lambda: np.matmul(a, b, out=out), seconds)
