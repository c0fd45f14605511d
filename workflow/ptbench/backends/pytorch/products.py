"""Products of matrices by PyTorch, for the ceiling that training speeds are compared with."""

from __future__ import annotations

import torch

from ptbench.backends.pytorch.settings import onednn_products_are_float32
from ptbench.model.work import Product, measured_rate


class TorchProducts:
    """Products of float32 matrices on the CPU, by the fastest way that keeps their precision."""

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision("medium" if onednn_products_are_float32() else "highest")

    def rate(self, product: Product, seconds: float) -> float:
        """Speed of a product [FLOP/s]."""
        generator = torch.Generator().manual_seed(0)
        a = torch.rand(product.m, product.k, generator=generator)
        b = torch.rand(product.k, product.n, generator=generator)
        out = torch.empty(product.m, product.n)
        return measured_rate(product, lambda: torch.mm(a, b, out=out), seconds)
