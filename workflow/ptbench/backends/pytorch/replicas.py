"""How PyTorch's replicas, a process for each, meet in torch.distributed."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from ptbench.backends.nodes import interface_towards
from ptbench.backends.replicas import Group


def gathered(part: Tensor) -> Tensor:
    """Return every replica's part, one after the other along the first axis."""
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, part)
    return torch.cat(parts)


def join_group(rendezvous: str, rank: int, group: Group) -> None:
    """Meet the other replicas."""
    if group.nodes > 1:
        os.environ["GLOO_SOCKET_IFNAME"] = interface_towards(rendezvous)
    dist.init_process_group(
        "nccl" if group.accelerator == "cuda" else "gloo", rendezvous,
        timedelta(minutes=10), group.size, rank,
    )  # fmt: skip


def leave_group() -> None:
    """Forget the other replicas."""
    if dist.is_initialized():
        dist.destroy_process_group()
