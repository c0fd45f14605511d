"""Speed of matrix products by NumPy and by PyTorch, each in an environment that has it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ptbench.model.work import Product


def measured_rate(product: Product, multiply: Callable[[], object], seconds: float) -> float:
    """Return the speed of `multiply`, which computes the product once [FLOP/s].

    It is the best of short runs, because other processes can only make one slower and a ceiling is
    wanted.
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


class NumPyProducts:
    """Products by NumPy's BLAS, whose threads the environment sets."""

    def __init__(self, task: dict[str, Any]) -> None:
        """Do nothing."""

    def rate(self, sizes: Sequence[int], seconds: float) -> float:
        """Return the speed of the product of those sizes m, k, n [FLOP/s]."""
        product = Product(*sizes)
        rng = np.random.default_rng(0)
        a = rng.random((product.m, product.k), np.float32)
        b = rng.random((product.k, product.n), np.float32)
        out = np.empty((product.m, product.n), np.float32)
        return measured_rate(product, lambda: np.matmul(a, b, out=out), seconds)


class PyTorchProducts:
    """Products of float32 matrices on the CPU, by the fastest way that keeps their precision."""

    def __init__(self, task: dict[str, Any]) -> None:
        """Choose between oneDNN's products and PyTorch's default."""
        import torch

        from ptbench.backends.pytorch.tuned import onednn_products_are_float32

        torch.set_num_threads(task["threads"])
        torch.set_float32_matmul_precision("medium" if onednn_products_are_float32() else "highest")

    def rate(self, sizes: Sequence[int], seconds: float) -> float:
        """Return the speed of the product of those sizes m, k, n [FLOP/s]."""
        import torch

        product = Product(*sizes)
        generator = torch.Generator().manual_seed(0)
        a = torch.rand(product.m, product.k, generator=generator)
        b = torch.rand(product.k, product.n, generator=generator)
        out = torch.empty(product.m, product.n)
        return measured_rate(product, lambda: torch.mm(a, b, out=out), seconds)
