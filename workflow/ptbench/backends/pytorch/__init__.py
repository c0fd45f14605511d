"""The language model in PyTorch: nn.LSTM and its kin, torch.optim, DistributedDataParallel.

From the inside out: `settings` of the process, `layers`, `heads`, the `model` made of both, the
`optimizer`, a `replica` of model and optimizer on one device, the `devices` of all replicas, and
the `backend` that drives them.
"""

from ptbench.backends.pytorch.backend import PyTorchBackend

__all__ = ["PyTorchBackend"]
