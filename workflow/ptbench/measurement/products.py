"""Speed of matrix products by NumPy and by PyTorch, each in an environment that has it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ptbench.model.work import Product

AT_ONCE = 50  # products in a GPU's graph


def measured_rate(
    product: Product,
    multiply: Callable[[], object],
    seconds: float,
    synchronize: Callable[[], None] = lambda: None,
) -> float:
    """Return the speed of `multiply`, which computes the product once [FLOP/s].

    It is the best of short runs, because other processes can only make one slower and a ceiling is
    wanted.

    Args:
        synchronize: waits until the product is there.
    """
    multiply()
    count = max(1, math.ceil(2e8 / product.flops))
    best, end = math.inf, time.perf_counter() + seconds
    while True:
        synchronize()
        start = time.perf_counter()
        for _ in range(count):
            multiply()
        synchronize()
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
    """Products of float32 matrices, by the fastest way that keeps their precision."""

    def __init__(self, task: dict[str, Any]) -> None:
        """Choose between oneDNN's products and PyTorch's default."""
        import torch

        from ptbench.backends.pytorch.tuned import onednn_products_are_float32

        self.device = torch.device(task["accelerator"])
        torch.set_num_threads(task["threads"])
        fast = self.device.type == "cpu" and onednn_products_are_float32()
        torch.set_float32_matmul_precision("medium" if fast else "highest")

    def rate(self, sizes: Sequence[int], seconds: float) -> float:
        """Return the speed of the product of those sizes m, k, n [FLOP/s]."""
        import torch

        product = Product(*sizes)
        a = torch.rand(product.m, product.k, device=self.device)
        b = torch.rand(product.k, product.n, device=self.device)
        out = torch.empty(product.m, product.n, device=self.device)
        if self.device.type == "cpu":
            return measured_rate(product, lambda: torch.mm(a, b, out=out), seconds)
        graph = self.as_graph(lambda: torch.mm(a, b, out=out))
        single = measured_rate(product, graph.replay, seconds, self.synchronize)
        return AT_ONCE * single

    def synchronize(self) -> None:
        """Wait for a GPU."""
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def settings(self) -> dict[str, float]:
        """Return what limits a GPU besides its products; {} for a CPU.

        Memory is copied to memory, and counts as read and as written. A dependent step is one of
        many small sums, each of which needs the one before.
        """
        import torch

        if self.device.type == "cpu":
            return {}
        source = torch.rand(2**28, device=self.device)  # 1 GiB
        target, small = torch.empty_like(source), torch.zeros(20, 200, device=self.device)
        copy = seconds_each(lambda: target.copy_(source), 20, self.synchronize)
        started = seconds_each(lambda: small.add_(1.0), 2000, self.synchronize)
        graph = self.as_graph(lambda: small.add_(1.0))
        step = seconds_each(graph.replay, 20, self.synchronize) / AT_ONCE
        return {
            "bytes_per_second": 2 * source.nbytes / copy,
            "seconds_to_start_a_kernel": started,
            "seconds_of_a_dependent_step": step,
        }

    def as_graph(self, work: Callable[[], object]) -> Any:
        """Return a graph of `AT_ONCE` repetitions: a GPU's own time, without Python's."""
        import torch

        work()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(AT_ONCE):
                work()
        return graph


def seconds_each(work: Callable[[], object], count: int, synchronize: Callable[[], None]) -> float:
    """Return the best mean time of `count` calls, over a few tries [s]."""
    best = math.inf
    for _ in range(5):
        synchronize()
        start = time.perf_counter()
        for _ in range(count):
            work()
        synchronize()
        best = min(best, (time.perf_counter() - start) / count)
    return best
