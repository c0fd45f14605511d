"""The network from words to losses and penalties, its dropout, and its initial parameters."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.sparse import BCOO

from ptbench.backends.jax.devices import DATA, random_generator
from ptbench.backends.jax.heads import (
    Features,
    Output,
    chunked_nll,
    log_probabilities,
    weighted_nll,
)
from ptbench.backends.jax.layers import CELLS, LayerState, Weights, cell_layer, fused_layer
from ptbench.model.initialization import KERAS_EMBEDDING_SCALE
from ptbench.model.parameters import GATES, Parameters, parameter_shapes
from ptbench.model.recipe import Recipe
from ptbench.training.initialization__LEFT import is_zero_at_first

Array = Any  # jax.Array, or a tracer of one
Tree = dict[str, Array]  # an array for each name
State = Tree  # as in `state_widths`


# -------------------------------------------------------------------------------------- dropout


# Tells the key of the dropped weights from the two into which a step's key is split.
WEIGHTS_STREAM = 2


class Keys(NamedTuple):
    """Keys of the masks of one training step."""

    words: Array
    units: Array  # [1 + layers]
    recurrent: Array  # [layers]
    weights: Array  # [layers]
    latents: Array


def dropout_keys(recipe: Recipe, seed: int, step: Array) -> Keys | None:
    """Functions of (seed, step, replica) alone; the same on all replicas for words and weights.

    None if nothing is dropped. To be called on every replica at once.
    """
    if not recipe.drops:
        return None
    key = jax.random.key(seed, impl=random_generator(recipe))
    of_step = jax.random.fold_in(key, step)
    words, others = jax.random.split(of_step)
    weights = jax.random.split(jax.random.fold_in(of_step, WEIGHTS_STREAM), recipe.layers)
    others = jax.random.fold_in(others, jax.lax.axis_index(DATA))
    keys = jax.random.split(others, 2 * recipe.layers + 2)
    units, recurrent = keys[: recipe.layers + 1], keys[recipe.layers + 1 : -1]
    return Keys(words, units, recurrent, weights, keys[-1])


def mask(key: Array, rate: float, shape: tuple[int, ...]) -> Array:
    """Zero with probability `rate`, else 1 / (1 - rate), which keeps the mean."""
    return jnp.where(jax.random.bernoulli(key, 1 - rate, shape), 1 / (1 - rate), 0)


def drop(recipe: Recipe, x: Array, rate: float, key: Array) -> Array:
    """Units or latents [time, batch, ...], dropped anew at each time step or not."""
    if not rate:
        return x
    times = 1 if recipe.dropout_kind == "locked" else len(x)
    return x * mask(key, rate, (times, *x.shape[1:]))


# -------------------------------------------------------------------------------------- network


def network(
    recipe: Recipe, parameters: Tree, kept: Tree, inputs: Array, state: State, keys: Keys | None
) -> tuple[Array, Array, State]:
    """Embedding and recurrent layers.

    Args:
        kept: with `kernel: sparse`, the indices [kept weights, 2] of the kept weights, whose values
            are the parameters of those names.
        inputs: [time, batch].
        keys: of the dropout masks; None for no dropout.

    Returns:
        The last layer's output before dropout and after it, both [time, batch, width]; and the
        state after the last step.
    """
    x = parameters["embedding"][inputs]
    if keys is not None:
        if recipe.word_dropout:
            words = mask(keys.words, recipe.word_dropout, (len(parameters["embedding"]), 1))
            x = x * words[inputs]
        x = drop(recipe, x, recipe.unit_dropout[0], keys.units[0])
    final: State = {}
    for layer, width in enumerate(recipe.widths):
        names = [f"state.{layer}.h", *([f"state.{layer}.c"] if recipe.rnn == "lstm" else [])]
        recurrent_mask = None
        if keys is not None and recipe.recurrent_dropout:
            shape = (inputs.shape[1], width)
            recurrent_mask = mask(keys.recurrent[layer], recipe.recurrent_dropout, shape)
        weights = layer_weights(recipe, parameters, kept, layer, x.shape[-1], keys)
        before = tuple(state[name] for name in names)
        h, after = run_layer(recipe, x, weights, before, recurrent_mask)
        final |= dict(zip(names, after, strict=True))
        x = h
        if keys is not None:
            x = drop(recipe, h, recipe.unit_dropout[layer + 1], keys.units[layer + 1])
    return h, x, final


def layer_weights(
    recipe: Recipe, parameters: Tree, kept: Tree, layer: int, inputs: int, keys: Keys | None
) -> Weights:
    """A layer's weights, the recurrent ones dropped; of sparse matrices, the values are."""
    name = f"rnn.{layer}"
    matrices = {"input": inputs, "recurrent": recipe.widths[layer]}
    bias = parameters[f"{name}.bias"]

    def matrix(kind: str) -> Any:
        values = parameters[f"{name}.{kind}"]
        if kind == "recurrent" and keys is not None and recipe.weight_dropout:
            values = values * mask(keys.weights[layer], recipe.weight_dropout, values.shape)
        if recipe.kernel != "sparse":
            return values
        return BCOO(
            (values, kept[f"{name}.{kind}"]),
            shape=(matrices[kind], len(bias)),
            indices_sorted=True,
            unique_indices=True,
        )

    return Weights(
        matrix("input"), matrix("recurrent"), bias, parameters.get(f"{name}.recurrent_bias")
    )


def run_layer(
    recipe: Recipe, x: Array, weights: Weights, state: LayerState, recurrent_mask: Array | None
) -> tuple[Array, LayerState]:
    """The layer by the recipe's kernel and implementation."""
    cell = CELLS[recipe.rnn]
    if recipe.kernel == "fused":
        tuned = recipe.implementation == "tuned"
        return fused_layer(cell, x, weights, state, recurrent_mask, tuned)
    return cell_layer(cell, x, weights, state, recurrent_mask)


def output_features(recipe: Recipe, parameters: Tree, v: Array, keys: Keys | None) -> Features:
    """What the output layer is applied to.

    Args:
        v: [time, batch, width].
    """
    mixtures, log_prior = max(recipe.mixtures, 1), None
    if recipe.mixtures:
        tokens = v.reshape(-1, v.shape[-1])
        log_prior = jax.nn.log_softmax(tokens @ parameters["prior.weight"])
        latents = jnp.tanh(tokens @ parameters["latent.weight"] + parameters["latent.bias"])
        v = latents.reshape(*v.shape[:2], -1)
        if keys is not None:
            v = drop(recipe, v, recipe.latent_dropout, keys.latents)
    v = v.reshape(-1, v.shape[-1] // mixtures)
    if "softmax.projection" in parameters:
        v = v @ parameters["softmax.projection"]
    return Features(v.reshape(-1, mixtures, v.shape[-1]), log_prior)


def output_layer(recipe: Recipe, parameters: Tree) -> Output:
    matrix = parameters["embedding" if recipe.tie_weights else "softmax.weight"]
    return Output(matrix, parameters.get("softmax.bias"))


def loss(
    recipe: Recipe, parameters: Tree, v: Array, targets: Array, weights: Array, keys: Keys | None
) -> Array:
    """Sum of weights times each target's negative log-likelihood [nats].

    Args:
        v: the network's output, [time, batch, width].
        targets: [time, batch].
        weights: [time, batch].
    """
    nll = chunked_nll if recipe.implementation == "tuned" else weighted_nll
    features = output_features(recipe, parameters, v, keys)
    return nll(output_layer(recipe, parameters), features, targets.ravel(), weights.ravel())


def penalties(recipe: Recipe, h: Array, v: Array, weights: Array) -> Array:
    """Sum of weights times each token's activation regularisations.

    Args:
        h: the last layer's output before dropout, [time, batch, width].
        v: the same, dropped.
        weights: [time, batch]; a change of h counts with the lesser one of its two tokens.
    """
    both = jnp.minimum(weights[1:], weights[:-1])
    activation = jnp.vdot(jnp.mean(v**2, axis=-1), weights)
    change = jnp.vdot(jnp.mean((h[1:] - h[:-1]) ** 2, axis=-1), both)
    return (
        recipe.activation_regularization * activation
        + recipe.temporal_activation_regularization * change
    )


def next_word_log_probabilities(recipe: Recipe, parameters: Tree, v: Array) -> Array:
    """[time, batch, vocabulary], without dropout."""
    features = output_features(recipe, parameters, v, None)
    log_p = log_probabilities(output_layer(recipe, parameters), features)
    return log_p.reshape(*v.shape[:2], -1)


# --------------------------------------------------------------------------- initial parameters


def native_parameters(recipe: Recipe, vocabulary_size: int, seed: int) -> Parameters:
    """The recipe's initialisation scheme by JAX's own draw.

    JAX has no layers of its own that would set defaults, but two collections of functions that do:
    `framework_defaults` are, for the recurrent layers, jax.experimental.rnn's (uniform within
    1 / sqrt(width), biases too), and for all others those of Dense in jax.example_libraries.stax
    (weights Glorot-normal, biases normal of deviation 0.01). The embedding counts as a dense layer,
    of which a word selects one row.
    """
    shapes = parameter_shapes(recipe, vocabulary_size)
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return {
        name: np.array(first_value(recipe, name, shape, key))
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def first_value(recipe: Recipe, name: str, shape: tuple[int, ...], key: Array) -> Array:
    def uniform(scale: float) -> Array:
        return jax.random.uniform(key, shape, minval=-scale, maxval=scale)

    initializers = jax.nn.initializers
    if recipe.initialization_scheme == "framework_defaults":
        if name.startswith("rnn."):
            width = recipe.widths[int(name.split(".")[1])]
            return uniform(width**-0.5)
        return (initializers.normal if len(shape) == 1 else initializers.glorot_normal)()(
            key, shape
        )
    if is_zero_at_first(recipe, name):
        value = np.zeros(shape, np.float32)
        if recipe.rnn == "lstm" and name.startswith("rnn.") and name.endswith(".bias"):
            forget = GATES["lstm"].index("forget")
            value.reshape(len(GATES["lstm"]), -1)[forget] = recipe.forget_bias
        return value
    if recipe.initialization_scheme == "uniform":
        return uniform(recipe.initialization_scale)
    if name == "embedding":
        return uniform(KERAS_EMBEDDING_SCALE)
    if name.endswith(".recurrent"):
        return initializers.orthogonal()(key, shape)
    return initializers.glorot_uniform()(key, shape)
