"""What is faster on a CPU than torch.nn's own and keeps its precision: loss, products, allocator.

Recurrent layers are those of `model.py`: nothing here beats oneDNN's and cuDNN's LSTM. On GPUs the
loss is that of `model.py`, too: in chunks it reached 0.65 to 0.98 of the speed on an H100.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

CHUNK = 2**23  # logits at a time: few enough for memory, enough for products at full speed


def nll(
    features: Tensor, log_prior: Tensor, softmax: nn.Linear, targets: Tensor, weights: Tensor
) -> Tensor:
    """Do what `model.nll` does, with no more than a chunk's logits in memory at a time."""
    return ChunkedLoss.apply(
        features.flatten(0, 1), log_prior.flatten(0, 1), softmax.weight, softmax.bias,
        targets.flatten(), weights.flatten(), torch.is_grad_enabled(),
    )  # fmt: skip


class ChunkedLoss(torch.autograd.Function):
    """The loss in chunks of tokens; gradients are formed while a chunk's logits exist.

    The posterior of a mixture is its share of the target's probability. By the chain rule,
    d nll / d logits_k = posterior_k (softmax_k - one_hot(target)), and
    d nll / d log_prior = -posterior. What multiplies the rows of d logits goes to the other,
    smaller factors of the products.
    """

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, log_prior: Tensor, weight: Tensor, bias: Tensor | None,
        targets: Tensor, weights: Tensor, differentiate: bool,
    ) -> Tensor:  # fmt: skip
        tokens, mixtures, _ = features.shape
        loss = features.new_zeros(())
        given = features, log_prior, weight, bias
        gradients: list[Any] = [None] * len(given)
        if differentiate:
            gradients = [None if each is None else torch.empty_like(each) for each in given]
        d_features, d_log_prior, d_weight, d_bias = gradients
        size = max(CHUNK // (mixtures * len(weight)), 1)
        for start in range(0, tokens, size):
            chunk = slice(start, start + size)
            x = features[chunk].flatten(0, 1)
            column = targets[chunk].repeat_interleave(mixtures)[:, None]
            z = nn.functional.linear(x, weight, bias)
            # The largest probability is exp(largest logit - log sum exp), which makes the
            # exponentials of a log_softmax unnecessary.
            log_components = z.gather(1, column) - z.amax(1, keepdim=True)
            p = torch.softmax(z, 1, out=z)
            log_components += p.amax(1, keepdim=True).log_()
            log_joint = log_components.view(-1, mixtures) + log_prior[chunk]
            log_p = torch.logsumexp(log_joint, 1)
            loss -= log_p @ weights[chunk]
            if not differentiate:
                continue
            posterior = (log_joint - log_p[:, None]).exp_().mul_(weights[chunk, None])
            torch.neg(posterior, out=d_log_prior[chunk])
            share = posterior.view(-1, 1)
            d_z = p.scatter_(1, column, log_components.expm1())  # times share
            torch.mm(d_z, weight, out=d_features[chunk].flatten(0, 1)).mul_(share)
            # beta = 0 ignores what is there
            d_weight.addmm_(d_z.T, x * share, beta=min(start, 1))
            if d_bias is not None:
                d_bias.addmv_(d_z.T, share[:, 0], beta=min(start, 1))
        ctx.gradients = gradients
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.gradients
        ctx.gradients = None  # else autograd would copy them, as somebody else has them too
        if d_loss.is_cuda or d_loss != 1:
            gradients = [None if each is None else each * d_loss for each in gradients]
        return (*gradients, None, None, None)


@torch.no_grad()
def clip(parameters: list[nn.Parameter], limit: float | None) -> Tensor:
    """Clip all gradients together, exactly, and return their norm before."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    if limit is not None:
        scale = (limit / norm).clamp(max=1)
        if scale.is_cuda or scale < 1:
            for gradient in gradients:
                gradient.mul_(scale)
    return norm


def onednn_products_are_float32() -> bool:
    """Return whether PyTorch's way to oneDNN's products keeps their precision on this CPU.

    They are about twice as fast as MKL's on AMD. The setting that leads to them also permits
    bfloat16 on a CPU that has it in its matrix units, so the error is measured.
    """
    torch.set_float32_matmul_precision("medium")
    a, b = torch.rand(256, 256, generator=torch.Generator().manual_seed(0)).split(128)
    exact = a.double() @ b.double().T
    error = ((a @ b.T).double() - exact).norm() / exact.norm()
    return bool(error < 1e-6)  # float32 rounds at 6e-8, bfloat16 at 4e-3
