"""From the last layer's output to the next words: softmax and mixture of softmaxes, and their loss.

All arrays here have the positions of a batch, in whatever order, as their first axes.
"""

from __future__ import annotations

import math
from typing import Any

import keras
from keras import ops

from ptbench.backends.keras.parameters import Initializers, Stored, as_it_is, transposed
from ptbench.model.recipe import Recipe


class Softmax(keras.layers.Layer):
    """The plain softmax; `Mixture` is the other head.

    The output matrix is a Dense layer of its own, or the embedding in reverse.
    """

    def __init__(
        self,
        recipe: Recipe,
        vocabulary_size: int,
        embedding: keras.layers.Embedding,
        initializers: Initializers,
    ) -> None:
        super().__init__()
        self.recipe, self.embedding = recipe, embedding
        self.vocabulary_size, self.initializers = vocabulary_size, initializers
        self.features = recipe.widths[-1]
        self.projection: Any = None
        self.output_layer: Any = None  # None: the embedding in reverse
        self.bias: Any = None

    def build(self, input_shape: Any) -> None:  # noqa: ARG002 - the recipe says it
        recipe, initializers, features = self.recipe, self.initializers, self.features
        rank = recipe.embedding_size if recipe.tie_weights else recipe.output_rank
        if recipe.output_rank is not None or (recipe.tie_weights and rank != features):
            self.projection = keras.layers.Dense(
                rank, use_bias=False, kernel_initializer=initializers.kernel(), name="projection"
            )
            self.projection.build((None, features))
            assert rank is not None
            features = rank
        if not recipe.tie_weights:
            self.output_layer = keras.layers.Dense(
                self.vocabulary_size,
                use_bias=recipe.softmax_bias,
                kernel_initializer=initializers.kernel(),
                bias_initializer=initializers.softmax_bias(),
                name="softmax",
            )
            self.output_layer.build((None, features))
            self.bias = self.output_layer.bias
        elif recipe.softmax_bias:
            self.bias = self.add_weight(
                shape=(self.vocabulary_size,), initializer=initializers.softmax_bias(), name="bias"
            )

    def stored(self) -> list[Stored]:
        parameters = []
        if self.projection is not None:
            parameters.append(as_it_is("softmax.projection", self.projection.kernel))
        if self.output_layer is not None:
            parameters.append(transposed("softmax.weight", self.output_layer.kernel))
        if self.bias is not None:
            parameters.append(as_it_is("softmax.bias", self.bias))
        return parameters

    def projected(self, features: Any) -> Any:
        return features if self.projection is None else self.projection(features)

    def logits(self, features: Any) -> Any:
        """Of each word, [..., vocabulary]."""
        features = self.projected(features)
        if self.output_layer is not None:
            return self.output_layer(features)
        logits = self.embedding(features, reverse=True)
        return logits if self.bias is None else logits + self.bias

    def nll(self, v: Any, targets: Any, mask: Any, training: bool) -> Any:  # noqa: ARG002
        """Summed negative log-likelihood of the targets where the mask is 1."""
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="sum")
        return loss(targets, self.logits(v), sample_weight=mask)

    def log_probabilities(self, v: Any) -> Any:
        """Of each next word, [..., vocabulary]."""
        return ops.log_softmax(self.logits(v))


class Mixture(Softmax):
    """K softmaxes of one output matrix, each of a latent of its own, mixed by a prior."""

    def __init__(self, latent_dropout: keras.layers.Dropout, recipe: Recipe, *others: Any) -> None:
        super().__init__(recipe, *others)
        self.features = recipe.latent_size or recipe.widths[-1]
        self.latent_dropout = latent_dropout

    def build(self, input_shape: Any) -> None:
        recipe, initializers, width = self.recipe, self.initializers, self.recipe.widths[-1]
        self.latent = keras.layers.Dense(
            recipe.mixtures * self.features,
            activation="tanh",
            kernel_initializer=initializers.kernel(),
            name="latent",
        )
        self.prior = keras.layers.Dense(
            recipe.mixtures, use_bias=False, kernel_initializer=initializers.kernel(), name="prior"
        )
        self.latent.build((None, width))
        self.prior.build((None, width))
        super().build(input_shape)

    def stored(self) -> list[Stored]:
        return [
            as_it_is("latent.weight", self.latent.kernel),
            as_it_is("latent.bias", self.latent.bias),
            as_it_is("prior.weight", self.prior.kernel),
            *super().stored(),
        ]

    def latents(self, v: Any, training: bool) -> Any:
        """The mixtures' features, [..., mixtures, features]."""
        latents = ops.reshape(self.latent(v), (*v.shape[:-1], self.recipe.mixtures, self.features))
        return self.latent_dropout(latents, training=training)

    def log_prior(self, v: Any) -> Any:
        return ops.log_softmax(self.prior(v))

    def nll(self, v: Any, targets: Any, mask: Any, training: bool) -> Any:
        logits = self.logits(self.latents(v, training))
        targets = ops.broadcast_to(targets[..., None], logits.shape[:-1])
        nll = ops.sparse_categorical_crossentropy(targets, logits, from_logits=True)
        return -ops.sum(mask * ops.logsumexp(self.log_prior(v) - nll, axis=-1))

    def log_probabilities(self, v: Any) -> Any:
        log_components = ops.log_softmax(self.logits(self.latents(v, training=False)))
        return ops.logsumexp(self.log_prior(v)[..., None] + log_components, axis=-2)


# The tuned heads.


class TunedSoftmax(Softmax):
    """The same with the loss of `chunked_nll`, of one mixture."""

    def nll(self, v: Any, targets: Any, mask: Any, training: bool) -> Any:
        return self.tuned_nll(v[..., None, :], None, targets, mask, training)

    def tuned_nll(
        self, features: Any, log_prior: Any, targets: Any, mask: Any, training: bool
    ) -> Any:
        """Args: features: [..., mixtures, features]; log_prior: [..., mixtures]; None: of one."""
        features = self.projected(features)
        positions, mixtures = math.prod(targets.shape), features.shape[-2]
        if log_prior is None:
            log_prior = ops.zeros((positions, mixtures))
        if self.output_layer is None:
            matrix = ops.transpose(self.embedding.embeddings)
        else:
            matrix = ops.convert_to_tensor(self.output_layer.kernel)
        return chunked_nll(
            ops.reshape(features, (positions, mixtures, features.shape[-1])),
            ops.reshape(log_prior, (positions, mixtures)),
            matrix,
            [] if self.bias is None else [ops.convert_to_tensor(self.bias)],
            ops.reshape(targets, (positions,)),
            ops.reshape(mask, (positions,)),
            differentiated=training,
        )


class TunedMixture(Mixture, TunedSoftmax):
    """The same with the loss of `chunked_nll`."""

    def nll(self, v: Any, targets: Any, mask: Any, training: bool) -> Any:
        latents = self.latents(v, training)
        return self.tuned_nll(latents, self.log_prior(v), targets, mask, training)


LARGEST_CHUNK = 2**23  # logits that exist at one time: 34 MB, and three times that in all
FEWEST_CHUNKS = 3  # of mixtures, so that small models, too, go through the loop


def chunked_nll(
    latents: Any,
    log_prior: Any,
    matrix: Any,
    bias: list[Any],
    targets: Any,
    weights: Any,
    differentiated: bool,
) -> Any:
    """Sum of weights times each target's nll under a mixture, in bounded memory.

    Goes through the positions in chunks, and forms each chunk's part of the gradient with its loss,
    so that logits are neither kept nor formed again. With the posterior of a mixture the share of
    the target's probability that it gives, d nll / d logits = posterior (softmax - one-hot) and
    d nll / d log prior = -posterior.

    Args:
        latents: [positions, mixtures, features].
        log_prior: [positions, mixtures].
        matrix: [features, vocabulary].
        bias: [vocabulary], or none.
        targets, weights: [positions]; no gradient is formed with respect to the weights.
        differentiated: whether the gradient will be asked for.
    """
    positions, mixtures = log_prior.shape
    vocabulary = matrix.shape[1]
    chunks = math.ceil(positions * mixtures * vocabulary / LARGEST_CHUNK)
    if mixtures > 1:
        chunks = max(chunks, FEWEST_CHUNKS)
    size = math.ceil(positions / chunks)

    def in_chunks(array: Any) -> Any:
        padding = [(0, chunks * size - positions)] + [(0, 0)] * (len(array.shape) - 1)
        padded = ops.pad(array, padding) if padding[0][1] else array
        return ops.reshape(padded, (chunks, size, *array.shape[1:]))

    def joined(array: Any) -> Any:
        return ops.reshape(array, (chunks * size, *array.shape[2:]))[:positions]

    @ops.custom_gradient
    def total(latents: Any, log_prior: Any, matrix: Any, *biases: Any) -> Any:
        bias = list(biases)

        def chunk(sums: list[Any], data: list[Any]) -> tuple[list[Any], None]:
            nll, *parts = nll_and_gradients(matrix, bias, differentiated, *data[1:])
            if not differentiated:
                return [sums[0] + nll], None
            place = ops.reshape(data[0], (1, 1))
            return [
                sums[0] + nll,
                *(
                    ops.scatter_update(whole, place, part[None])
                    for whole, part in zip(sums[1:3], parts[:2], strict=True)
                ),
                *(whole + part for whole, part in zip(sums[3:], parts[2:], strict=True)),
            ], None

        data = [latents, log_prior, targets, weights]
        if chunks == 1:
            sums = nll_and_gradients(matrix, bias, differentiated, *data)
        else:
            data = [in_chunks(array) for array in data]
            sums = [ops.zeros(())]
            if differentiated:
                sums += [ops.zeros_like(array) for array in (*data[:2], matrix, *bias)]
            sums, _ = ops.scan(chunk, sums, [ops.arange(chunks), *data])

        def gradient(*arguments: Any, upstream: Any = None) -> Any:
            scale = arguments[0] if upstream is None else upstream
            by_position, others = sums[1:3], sums[3:]
            if chunks > 1:
                by_position = [joined(array) for array in by_position]
            return tuple(scale * array for array in (*by_position, *others))

        return sums[0], gradient

    return total(latents, log_prior, matrix, *bias)


def nll_and_gradients(
    matrix: Any,
    bias: list[Any],
    differentiated: bool,
    latents: Any,
    log_prior: Any,
    targets: Any,
    weights: Any,
) -> list[Any]:
    """The sum of `chunked_nll`, and if asked for its gradient by latents, log prior, matrix, bias.

    The softmax is Keras', a single pass over the logits. The logarithm of its denominator is taken
    at the largest logit, where the probability is at least 1 / vocabulary.
    """
    positions, mixtures, features = latents.shape
    rows, vocabulary = positions * mixtures, matrix.shape[1]
    latents = ops.reshape(latents, (rows, features))
    logits = ops.matmul(latents, matrix)
    if bias:
        logits = logits + bias[0]
    # where the targets are among all rows' words
    at_target = ops.arange(rows) * vocabulary + ops.repeat(targets, mixtures)
    target_logits = ops.take(ops.reshape(logits, (-1,)), at_target)
    probabilities = ops.softmax(logits)
    log_denominator = ops.max(logits, axis=1) - ops.log(ops.max(probabilities, axis=1))
    log_components = ops.reshape(target_logits - log_denominator, (positions, mixtures))
    log_joint = log_prior + log_components
    log_p = ops.logsumexp(log_joint, axis=1)
    nll = -ops.sum(weights * log_p)
    if not differentiated:
        return [nll]
    posterior = weights[:, None] * ops.exp(log_joint - log_p[:, None])
    share = ops.reshape(posterior, (rows, 1))
    d_logits = ops.scatter_update(
        ops.reshape(probabilities * share, (-1,)), at_target[:, None], -share[:, 0], reduction="add"
    )
    d_logits = ops.reshape(d_logits, (rows, vocabulary))
    d_latents = ops.matmul(d_logits, ops.transpose(matrix))
    return [
        nll,
        ops.reshape(d_latents, (positions, mixtures, features)),
        -posterior,
        ops.matmul(ops.transpose(latents), d_logits),
        *(ops.sum(d_logits, axis=0) for _ in bias),
    ]
