"""From the last layer's output to losses: the plain softmax, the mixture, and their gradients.

A head makes of v [time, batch, width] the features that the output matrix multiplies, one row for
each token, or one for each token and latent, token by token; a mixture also its log-prior. A loss
takes what the head gives, and a penalty the last layer's output itself.
"""

from __future__ import annotations

from typing import Any

import mxnet as mx
from mxnet import autograd, gluon
from mxnet.gluon import nn

from ptbench.backends.mxnet.devices import CHUNK_ROWS
from ptbench.backends.mxnet.layers import Array, drop
from ptbench.model.recipe import Recipe


class PlainHead(gluon.HybridBlock):
    """Features [tokens, features]: v, behind the projection if there is one."""

    def __init__(self, recipe: Recipe, rank: int | None, weight: Any) -> None:
        super().__init__()
        with self.name_scope():
            self.projection = projection(rank, recipe.widths[-1], weight)

    def hybrid_forward(self, F: Any, v: Array) -> list[Array]:  # noqa: ARG002, N803 - Gluon's name
        v = v.reshape((-3, 0))
        return [self.projection(v) if self.projection is not None else v]


class MixtureHead(gluon.HybridBlock):
    """Features of each latent [tokens x mixtures, features] and log-prior [tokens, mixtures]."""

    def __init__(self, recipe: Recipe, rank: int | None, weight: Any) -> None:
        super().__init__()
        self.rate, self.locked = recipe.latent_dropout, recipe.dropout_kind == "locked"
        width = recipe.widths[-1]
        self.latent_size = width if recipe.latent_size is None else recipe.latent_size
        with self.name_scope():
            self.latent = nn.Dense(
                recipe.mixtures * self.latent_size,
                activation="tanh",
                flatten=False,
                in_units=width,
                weight_initializer=weight,
            )
            self.prior = nn.Dense(
                recipe.mixtures,
                use_bias=False,
                flatten=False,
                in_units=width,
                weight_initializer=weight,
            )
            self.projection = projection(rank, self.latent_size, weight)

    def hybrid_forward(self, F: Any, v: Array) -> list[Array]:  # noqa: N803
        latents = drop(F, self.latent(v), self.rate, self.locked).reshape((-1, self.latent_size))
        prior = self.prior(v).reshape((-3, 0))
        log_prior = F.broadcast_sub(prior, log_sum_exp(F, prior).expand_dims(1))
        return [self.projection(latents) if self.projection is not None else latents, log_prior]


def projection(rank: int | None, features: int, weight: Any) -> nn.Dense | None:
    if rank is None:
        return None
    return nn.Dense(
        rank, use_bias=False, flatten=False, in_units=features, weight_initializer=weight
    )


class PlainLoss(gluon.HybridBlock):
    """The output layer and its summed negative log-likelihood."""

    def __init__(self, output: nn.Dense) -> None:
        super().__init__()
        self.output = output

    def hybrid_forward(self, F: Any, features: Array, targets: Array, mask: Array) -> Array:  # noqa: N803
        """Nats [1] of the real tokens; targets and mask are [tokens]."""
        return -(F.pick(self.log_probabilities(F, features), targets) * mask).sum()

    def log_probabilities(self, F: Any, features: Array) -> Array:  # noqa: N803
        """[tokens, vocabulary]."""
        return F.log_softmax(self.output(features))


class MixtureLoss(gluon.HybridBlock):
    """The same for a mixture, in log space, where training looks at the target's column alone."""

    def __init__(self, output: nn.Dense, mixtures: int) -> None:
        super().__init__()
        self.output, self.mixtures = output, mixtures

    def hybrid_forward(
        self,
        F: Any,  # noqa: N803
        features: Array,
        log_prior: Array,
        targets: Array,
        mask: Array,
    ) -> Array:
        targets = F.repeat(targets, repeats=self.mixtures)
        log_components = log_probability(F, self.output(features), targets)
        log_joint = log_prior + log_components.reshape((-1, self.mixtures))
        return -(log_sum_exp(F, log_joint) * mask).sum()

    def log_probabilities(self, F: Any, features: Array, log_prior: Array) -> Array:  # noqa: N803
        log_components = F.log_softmax(self.output(features)).reshape((-4, -1, self.mixtures, 0))
        return log_sum_exp(F, F.broadcast_add(log_prior.expand_dims(-1), log_components))


class ActivationPenalty(gluon.HybridBlock):
    """What activation regularisations add to the summed nll."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.of_outputs = recipe.activation_regularization
        self.of_changes = recipe.temporal_activation_regularization

    def hybrid_forward(self, F: Any, h: Array, v: Array, mask: Array) -> Array:  # noqa: N803
        """[1], summed over the real tokens.

        Args:
            h: [time, batch, width], the last layer's output; v: the same, dropped;
            mask: [time, batch].
        """
        change = F.square(h - previous(F, h)).mean(axis=-1)
        both_real = F.minimum(mask, previous(F, mask))
        of_changes = self.of_changes * (change * both_real).sum()
        return self.of_outputs * (F.square(v).mean(axis=-1) * mask).sum() + of_changes


def previous(F: Any, x: Array) -> Array:  # noqa: N803
    """x one time step before; at the first step x itself."""
    first = F.slice_axis(x, axis=0, begin=0, end=1)
    return F.slice_axis(F.concat(first, x, dim=0), axis=0, begin=0, end=-1)


def log_probability(F: Any, logits: Array, targets: Array) -> Array:  # noqa: N803
    """Log-softmax of each row's target, to the last digit.

    oneDNN 2.4's log-softmax is wrong by up to 4e-6, which is much to a mixture: the gradient of its
    prior is made of differences between components. Its softmax is right, but may underflow; where
    it does the logarithm is so large that its last digit is no smaller than that error.
    """
    approximate = F.pick(F.log_softmax(logits), targets)
    p = F.BlockGrad(F.pick(F.softmax(logits), targets))
    exact = F.where(p > 1e-30, F.log(F.maximum(p, 1e-30)), F.BlockGrad(approximate))
    return approximate + (exact - F.BlockGrad(approximate))


def log_sum_exp(F: Any, x: Array) -> Array:  # noqa: N803
    """log sum exp over the second axis."""
    largest = F.BlockGrad(F.max(x, axis=1))
    return largest + F.log(F.sum(F.exp(F.broadcast_sub(x, largest.expand_dims(1))), axis=1))


class ChunkedLoss:
    """A loss that takes a few tokens at a time, and forms their gradients before the next ones.

    So no more than `CHUNK_ROWS` rows of logits exist at once, or those of one token.
    """

    def __init__(self, loss: gluon.HybridBlock, mixtures: int) -> None:
        self.loss, self.rows_per_token = loss, max(mixtures, 1)

    def needed(self, tokens: int) -> bool:
        """Whether that many tokens have more rows."""
        return tokens * self.rows_per_token > CHUNK_ROWS

    def __call__(self, outputs: list[Array], targets: Array, mask: Array) -> Array:
        """Summed nll [1] in nats."""
        parts = [
            self.loss(*[a[rows] for a, rows in zip((*outputs, targets, mask), chunk, strict=True)])
            for chunk in self.chunks(outputs, targets.size)
        ]
        return mx.nd.add_n(*parts)

    def with_gradients(
        self, outputs: list[Array], targets: Array, mask: Array, divisor: float
    ) -> tuple[Array, list[Array]]:
        """The same, and the gradient of nll / divisor for each of the head's outputs.

        Adds those of the output layer's parameters to their `grad`.
        """
        gradients = [mx.nd.empty(a.shape, ctx=a.context) for a in outputs]
        parts = []
        for chunk in self.chunks(outputs, targets.size):
            leaves = [a.detach()[rows] for a, rows in zip(outputs, chunk, strict=False)]
            autograd.mark_variables(
                leaves, [g[rows] for g, rows in zip(gradients, chunk, strict=False)]
            )
            tokens = chunk[-1]
            with autograd.record():
                nll = self.loss(*leaves, targets[tokens], mask[tokens])
                objective = nll / divisor
            objective.backward()
            parts.append(nll.detach())
        return mx.nd.add_n(*parts), gradients

    def chunks(self, outputs: list[Array], tokens: int) -> list[list[slice]]:
        """For each chunk the rows of every output, of the targets and of the mask.

        All of one size, for which one plan of execution is made.
        """
        size = max(
            n
            for n in range(1, tokens + 1)
            if tokens % n == 0 and (n == 1 or n * self.rows_per_token <= CHUNK_ROWS)
        )
        rows_per_token = [a.shape[0] // tokens for a in outputs] + [1, 1]
        return [
            [slice(start * rows, (start + size) * rows) for rows in rows_per_token]
            for start in range(0, tokens, size)
        ]
