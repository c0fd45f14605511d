"""What follows the last recurrent layer: latents and prior, output matrix, and the loss.

Stock computes all logits and lets autograd differentiate; tuned goes through them in chunks of
tokens and forms the gradients on the way, so that no more than one chunk's logits exist at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from ptbench.backends.pytorch.layers import Stored
from ptbench.model.parameters import parameter_shapes
from ptbench.model.recipe import Recipe

IGNORED = -100  # target that cross_entropy leaves out (its default ignore_index)
CHUNK = 2**23  # logits at a time: few enough for memory, enough for products at full speed


class Dropout(nn.Dropout):
    """Drops units of [time, batch, ...] anew at every time step, or the same at all (locked)."""

    def __init__(self, rate: float, kind: str) -> None:
        super().__init__(rate)
        self.locked = kind == "locked"

    def forward(self, x: Tensor) -> Tensor:
        if not self.locked:
            return super().forward(x)
        return x * super().forward(torch.ones_like(x[:1])) if self.training and self.p else x


class Head(nn.Module):
    """From the last layer's output to the next word.

    Args:
        embedding: the matrix that is the output matrix, too, if the recipe ties them.
    """

    def __init__(self, recipe: Recipe, vocabulary_size: int, embedding: nn.Parameter) -> None:
        super().__init__()
        self.recipe = recipe
        shapes = parameter_shapes(recipe, vocabulary_size)

        def linear(name: str, bias: bool) -> Any:
            return nn.Linear(*shapes[name], bias=bias) if name in shapes else None

        self.latent = linear("latent.weight", bias=True)
        self.prior = linear("prior.weight", bias=False)
        self.latent_dropout = Dropout(recipe.latent_dropout, recipe.dropout_kind)
        self.projection = linear("softmax.projection", bias=False)
        features = shapes.get("softmax.weight", shapes["embedding"])[1]
        self.softmax = nn.Linear(features, vocabulary_size, bias=recipe.softmax_bias)
        if recipe.tie_weights:
            self.softmax.weight = embedding

    def canonical(self) -> dict[str, Stored]:
        names = {}
        if self.latent is not None:
            names["latent.weight"] = Stored(self.latent.weight, transposed=True)
            names["latent.bias"] = Stored(self.latent.bias)
        if self.prior is not None:
            names["prior.weight"] = Stored(self.prior.weight, transposed=True)
        if self.projection is not None:
            names["softmax.projection"] = Stored(self.projection.weight, transposed=True)
        if not self.recipe.tie_weights:
            names["softmax.weight"] = Stored(self.softmax.weight)
        if self.softmax.bias is not None:
            names["softmax.bias"] = Stored(self.softmax.bias)
        return names

    def features(self, v: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the output matrix multiplies, [time, batch, mixtures or 1, features], and the
        logarithm of the prior, [time, batch, mixtures], if there are mixtures.
        """
        if self.latent is None:
            features, log_prior = v[:, :, None], None
        else:
            latents = torch.tanh(self.latent(v)).unflatten(-1, (self.recipe.mixtures, -1))
            features = self.latent_dropout(latents)
            log_prior = functional.log_softmax(self.prior(v), dim=-1)
        return (features if self.projection is None else self.projection(features)), log_prior

    def loss(self, v: Tensor, targets: Tensor, scale: float) -> Tensor:
        """`scale` times the summed negative log-likelihood of the targets [time, batch] that are
        not IGNORED.
        """
        features, log_prior = self.features(v)
        features, targets = features.flatten(0, 1), targets.flatten()
        log_prior = None if log_prior is None else log_prior.flatten(0, 1)
        weight, bias = self.softmax.weight, self.softmax.bias
        if self.recipe.implementation == "stock":
            return scale * nll(features, log_prior, targets, weight, bias)
        differentiate = torch.is_grad_enabled()
        return FusedLoss.apply(features, log_prior, targets, weight, bias, scale, differentiate)

    def log_probabilities(self, v: Tensor) -> Tensor:
        """[time, batch, vocabulary]; one time step at a time, for mixtures are large."""
        features, log_prior = self.features(v)
        steps = []
        for t, x in enumerate(features):
            log_p = functional.log_softmax(self.softmax(x), dim=-1)
            if log_prior is not None:
                log_p = log_prior[t, :, :, None] + log_p
            steps.append(torch.logsumexp(log_p, dim=1))
        return torch.stack(steps)


def nll(
    features: Tensor, log_prior: Tensor | None, targets: Tensor, weight: Tensor,
    bias: Tensor | None,
) -> Tensor:  # fmt: skip
    """Args: features: [tokens, mixtures or 1, features]; log_prior: [tokens, mixtures]."""
    logits = functional.linear(features, weight, bias)
    if log_prior is None:
        return functional.cross_entropy(
            logits[:, 0], targets, reduction="sum", ignore_index=IGNORED
        )
    mixtures = logits.shape[1]
    nll_of_components = functional.cross_entropy(
        logits.flatten(0, 1), targets.repeat_interleave(mixtures), reduction="none",
        ignore_index=IGNORED,
    )  # fmt: skip
    log_p = torch.logsumexp(log_prior - nll_of_components.unflatten(0, (-1, mixtures)), dim=-1)
    return -(log_p * (targets != IGNORED)).sum()


class FusedLoss(torch.autograd.Function):
    """`scale` times `nll`, in chunks of tokens, the gradients formed while a chunk's logits exist.

    d nll / d logits_k = posterior_k (softmax_k - one_hot(target)), and d nll / d log prior =
    - posterior, the posterior of a mixture being its share of the target's probability. What
    multiplies the rows of d logits goes to the products' other, smaller factors.
    """

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, log_prior: Tensor | None, targets: Tensor, weight: Tensor,
        bias: Tensor | None, scale: float, differentiate: bool,
    ) -> Tensor:  # fmt: skip
        tokens, mixtures, _ = features.shape
        scales = (targets != IGNORED) * scale
        targets = targets.clamp(min=0)
        loss = features.new_zeros(())
        d_features: Any = None
        d_log_prior: Any = None
        d_weight: Any = None
        d_bias: Any = None
        if differentiate:
            d_features = torch.empty_like(features)
            d_log_prior = None if log_prior is None else torch.empty_like(log_prior)
            d_weight = torch.empty_like(weight)
            d_bias = None if bias is None else torch.empty_like(bias)
        size = max(CHUNK // (mixtures * len(weight)), 1)
        for start in range(0, tokens, size):
            chunk = slice(start, start + size)
            x = features[chunk].flatten(0, 1)
            column = targets[chunk].repeat_interleave(mixtures)[:, None]
            z = x @ weight.T
            if bias is not None:
                z += bias
            log_components = z.gather(1, column) - z.amax(1, keepdim=True)
            # The largest probability is exp(largest logit - log sum exp), which spares the
            # exponentials of a log_softmax.
            p = torch.softmax(z, 1, out=z)
            log_components += p.amax(1, keepdim=True).log_()
            log_joint = log_components.view(-1, mixtures)
            if log_prior is not None:
                log_joint = log_joint + log_prior[chunk]
            log_p = torch.logsumexp(log_joint, 1)
            loss -= log_p @ scales[chunk]
            if not differentiate:
                continue
            share = (log_joint - log_p[:, None]).exp_().mul_(scales[chunk, None])
            if d_log_prior is not None:
                torch.neg(share, out=d_log_prior[chunk])
            share = share.view(-1, 1)
            d_z = p.scatter_(1, column, log_components.expm1())  # times share
            torch.mm(d_z, weight, out=d_features[chunk].flatten(0, 1)).mul_(share)
            # beta = 0 ignores what is there
            d_weight.addmm_(d_z.T, x * share, beta=min(start, 1))
            if d_bias is not None:
                d_bias.addmv_(d_z.T, share[:, 0], beta=min(start, 1))
        ctx.gradients = d_features, d_log_prior, None, d_weight, d_bias, None, None
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.gradients
        ctx.gradients = None  # or they would be copied, as somebody else's
        if d_loss.is_cpu and d_loss == 1:
            return gradients
        return tuple(None if each is None else each * d_loss for each in gradients)
