"""Settings of the process that change speed or rounding: threads, product kernels, allocator.

`implementation: stock` leaves them as PyTorch starts, but for what a reproducible run needs.
"""

from __future__ import annotations

import os

import torch

from ptbench.backends.allocator import keep_memory
from ptbench.model.recipe import Accelerator, Recipe


class Settings:
    """What one replica wants of its process."""

    def __init__(
        self, recipe: Recipe, accelerator: Accelerator, threads: int, devices: int
    ) -> None:
        # for deterministic cuBLAS; read when its first handle is made
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # costs time, guards nothing
        torch.backends.cudnn.allow_tf32 = False
        self.accelerator = accelerator
        self.threads = max(threads // devices, 1)
        tuned = recipe.implementation == "tuned" and accelerator == "cpu"
        self.onednn = tuned and onednn_products_are_float32()
        self.memory_is_kept = tuned and keep_memory()
        self.apply()

    def apply(self) -> None:
        """Set what another replica in this process may have set otherwise."""
        torch.set_num_threads(self.threads)
        torch.set_float32_matmul_precision("medium" if self.onednn else "highest")

    def report(self) -> dict[str, str]:
        """For provenance."""
        if self.accelerator == "cuda":
            matmul, allocator = "cuBLAS, TF32 off", "PyTorch's for CUDA"
        else:
            matmul = "oneDNN float32" if self.onednn else "default float32"
            allocator = "glibc" + (", memory kept between steps" if self.memory_is_kept else "")
        return {
            "matmul": matmul,
            "threads per replica": str(self.threads),
            "allocator": allocator,
        }


def onednn_products_are_float32() -> bool:
    """Whether PyTorch's way to oneDNN's products keeps their precision on this CPU.

    They are about twice as fast as MKL's on AMD, but reached by the setting that also permits
    bfloat16 on a CPU that has it in its matrix units; so the error is measured.
    """
    torch.set_float32_matmul_precision("medium")
    a, b = torch.rand(256, 256, generator=torch.Generator().manual_seed(0)).split(128)
    exact = a.double() @ b.double().T
    error = ((a @ b.T).double() - exact).norm() / exact.norm()
    return bool(error < 1e-6)  # float32 rounds at 6e-8, bfloat16 at 4e-3
