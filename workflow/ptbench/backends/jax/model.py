"""The language model in stock JAX: dropout, recurrent layers, head, losses and update.

What it computes is in the docstring of `ptbench.backends.base.Backend`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.sparse import BCOO

from ptbench.backends.base import PARAMETER
from ptbench.corpus.batching import Batch
from ptbench.model.parameters import state_widths
from ptbench.model.recipe import Recipe

Array = Any  # jax.Array, or a tracer of one
Tree = dict[str, Array]  # by canonical name

DATA = "data"  # the mesh axis of the replicas, which share the batch
RANDOM_GENERATOR = "threefry2x32"  # JAX's default


def lowered(recipe: Recipe, arrays: Any) -> Any:
    """Return a tree of arrays and numbers, rounded to bfloat16 if that is the precision."""
    if recipe.precision == "float32":
        return arrays
    return jax.tree.map(lambda array: jnp.asarray(array, jnp.bfloat16), arrays)


def product(x: Array, w: Array) -> Array:
    """Return x [rows, inputs], float32, times w [inputs, outputs], in the precision of w."""
    return (x.astype(w.dtype) @ w).astype(x.dtype)


WEIGHTS_STREAM = 2  # jax.random.split of the same key gives streams 0 and 1


class Dropout:
    """The masks of one training step: 0 or 1 / (1 - rate), and 1.0 where nothing is dropped.

    Masks of words and weights are the same on all replicas; each replica draws the others itself.
    """

    def __init__(self, recipe: Recipe, key: Array | None = None) -> None:
        """Derive a key for each mask.

        Args:
            key: a function of (seed, step) alone; None: nothing is dropped, as in evaluation.
        """
        self.recipe = recipe
        self.keys: Tree = {}
        if key is None:
            return
        layers = recipe.layers
        words, others = jax.random.split(key)
        own = jax.random.fold_in(others, jax.lax.axis_index(DATA))
        own = jax.random.split(own, 2 * layers + 2)
        self.keys = {
            "words": words[None],
            "units": own[: layers + 1],
            "recurrent": own[layers + 1 : -1],
            "weights": jax.random.split(jax.random.fold_in(key, WEIGHTS_STREAM), layers),
            "latents": own[-1:],
        }

    def words(self, vocabulary_size: int) -> Array:
        """Return the mask [vocabulary, 1] of the embedding's rows."""
        return self._mask("words", 0, self.recipe.word_dropout, (vocabulary_size, 1))

    def units(self, place: int, x: Array) -> Array:
        """Return the mask of the embedding's output (place 0) or of the layer before `place`."""
        return self._mask("units", place, self.recipe.unit_dropout[place], self._times(x))

    def recurrent(self, layer: int, h: Array) -> Array:
        """Return the mask of a layer's previous output in the recurrent product."""
        return self._mask("recurrent", layer, self.recipe.recurrent_dropout, h.shape)

    def weights(self, layer: int, u: Array) -> Array:
        """Return the mask of a layer's recurrent weights."""
        return self._mask("weights", layer, self.recipe.weight_dropout, u.shape)

    def latents(self, latents: Array) -> Array:
        """Return the mask of a mixture's latents."""
        return self._mask("latents", 0, self.recipe.latent_dropout, self._times(latents))

    def _times(self, x: Array) -> tuple[int, ...]:
        """Return the shape of the mask of x [time, batch, width]: [time or 1, batch, width]."""
        return (1 if self.recipe.dropout_kind == "locked" else len(x), *x.shape[1:])

    def _mask(self, kind: str, index: int, rate: float, shape: tuple[int, ...]) -> Array:
        if not self.keys or not rate:
            return 1.0
        kept = jax.random.bernoulli(self.keys[kind][index], 1 - rate, shape)
        return jnp.where(kept, 1 / (1 - rate), 0)


LayerState = tuple[Array, ...]  # (h, c) of an LSTM, (h,) of the others, each [batch, width]
Rnn = Callable[..., LayerState]


# A time step of each kind of layer: from the part of the gates that comes from the input, the part
# that comes from the previous output, both [batch, gates x width], and the state before the step.


def lstm(z_input: Array, z_recurrent: Array, _h: Array, c: Array) -> LayerState:
    i, f, g, o = jnp.split(z_input + z_recurrent, 4, axis=-1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c


def gru(z_input: Array, z_recurrent: Array, h: Array) -> LayerState:
    x_r, x_z, x_n = jnp.split(z_input, 3, axis=-1)
    u_r, u_z, u_n = jnp.split(z_recurrent, 3, axis=-1)
    z = jax.nn.sigmoid(x_z + u_z)
    n = jnp.tanh(x_n + jax.nn.sigmoid(x_r + u_r) * u_n)
    return ((1 - z) * n + z * h,)


def rnn_tanh(z_input: Array, z_recurrent: Array, _h: Array) -> LayerState:
    return (jnp.tanh(z_input + z_recurrent),)


def rnn_relu(z_input: Array, z_recurrent: Array, _h: Array) -> LayerState:
    return (jax.nn.relu(z_input + z_recurrent),)


RNNS: dict[str, Rnn] = {"lstm": lstm, "gru": gru, "rnn_tanh": rnn_tanh, "rnn_relu": rnn_relu}


class Weights(NamedTuple):
    """The weights of one recurrent layer; the matrices are arrays or `BCOO`."""

    input: Any  # [inputs, gates x width]
    recurrent: Any  # [width, gates x width]
    bias: Array  # [gates x width]
    recurrent_bias: Array  # [gates x width], or 0.0 where the recipe has none


def layer_weights(
    parameters: Tree, layer: int, inputs: int, width: int, dropout: Dropout
) -> Weights:
    """Return a layer's weights after weight dropout, those of a sparse kernel as `BCOO`."""
    name = f"rnn.{layer}"
    w, u, bias = (parameters[f"{name}.{kind}"] for kind in ("input", "recurrent", "bias"))
    u = u * dropout.weights(layer, u)
    if f"{name}.input.places" in parameters:
        sparse = partial(BCOO, indices_sorted=True, unique_indices=True)
        w = sparse((w, parameters[f"{name}.input.places"]), shape=(inputs, len(bias)))
        u = sparse((u, parameters[f"{name}.recurrent.places"]), shape=(width, len(bias)))
    return Weights(w, u, bias, parameters.get(f"{name}.recurrent_bias", 0.0))


def scanned_layer(
    rnn: Rnn, hoists: bool, x: Array, weights: Weights, state: LayerState, mask: Array
) -> tuple[Array, LayerState]:
    """Run a layer over all time steps; its products are dense or sparse.

    Args:
        rnn: one of `RNNS`.
        hoists: whether the inputs of all time steps are multiplied at once, before the first.
        x: the layer's input, [time, batch, inputs].
        weights: of this layer.
        state: before the first step.
        mask: what the previous output is multiplied by in the recurrent product.

    Returns:
        The outputs [time, batch, width], and the state after the last step.
    """

    def of_input(x: Array) -> Array:
        return x @ weights.input + weights.bias

    def step(state: LayerState, x: Array) -> tuple[LayerState, Array]:
        z_input = x if hoists else of_input(x)
        z_recurrent = (state[0] * mask) @ weights.recurrent + weights.recurrent_bias
        state = rnn(z_input, z_recurrent, *state)
        return state, state[0]

    final, outputs = jax.lax.scan(step, state, of_input(x) if hoists else x)
    return outputs, final


def recurrent_layer(
    recipe: Recipe, x: Array, weights: Weights, state: LayerState, mask: Array
) -> tuple[Array, LayerState]:
    """Run a layer with the recipe's kernel; `scanned_layer` has the arguments and results."""
    given = lowered(recipe, (x, weights, state, mask))
    results = scanned_layer(RNNS[recipe.rnn], recipe.kernel == "fused", *given)
    return jax.tree.map(lambda array: array.astype(x.dtype), results)


class Head(NamedTuple):
    """The output layer and what it is applied to; K is the number of mixtures, 1 without any."""

    components: Array  # [tokens, K, features]
    log_prior: Array  # [tokens, K]
    matrix: Array  # [vocabulary, features]
    bias: Array  # [vocabulary], or 0.0 where the recipe has none

    @classmethod
    def on_top(cls, recipe: Recipe, parameters: Tree, v: Array, dropout: Dropout) -> Head:
        """Form the features from the last layer's output v [time, batch, width], after dropout.

        Products are in the recipe's precision; what is computed from them is float32.
        """
        parameters = lowered(recipe, parameters)
        mixtures = max(recipe.mixtures, 1)
        tokens = v.reshape(-1, v.shape[-1])
        log_prior = jnp.zeros((len(tokens), 1), v.dtype)
        if recipe.mixtures:
            log_prior = jax.nn.log_softmax(product(tokens, parameters["prior.weight"]))
            latents = product(tokens, parameters["latent.weight"]) + parameters["latent.bias"]
            latents = jnp.tanh(latents)
            latents = latents.reshape(*v.shape[:2], -1)
            v = latents * dropout.latents(latents)
        components = v.reshape(-1, v.shape[-1] // mixtures)
        if "softmax.projection" in parameters:
            components = product(components, parameters["softmax.projection"])
        components = components.reshape(len(tokens), mixtures, -1)
        matrix = parameters["embedding" if recipe.tie_weights else "softmax.weight"]
        return cls(components, log_prior, matrix, parameters.get("softmax.bias", 0.0))

    def logits(self) -> Array:
        """Return the logits [tokens, K, vocabulary]."""
        tokens, mixtures, width = self.components.shape
        # XLA multiplies three-dimensional arrays a tenth slower than matrices.
        logits = product(self.components.reshape(-1, width), self.matrix.T) + self.bias
        return logits.reshape(tokens, mixtures, -1)


def nll(head: Head, targets: Array, weights: Array) -> Array:
    """Return the sum of weights times each target's negative log-likelihood [nats].

    Only the target's column of each softmax is normalised.

    Args:
        targets: [tokens].
        weights: [tokens].
    """
    logits = head.logits()
    at_target = jnp.take_along_axis(logits, targets[:, None, None], axis=-1)[..., 0]
    log_p = at_target - jax.nn.logsumexp(logits, axis=-1)
    return -jnp.vdot(jax.nn.logsumexp(head.log_prior + log_p, axis=-1), weights)


def log_probabilities(head: Head) -> Array:
    """Return the log-probability of every word, [tokens, vocabulary]."""
    log_p = jax.nn.log_softmax(head.logits())
    return jax.nn.logsumexp(head.log_prior[..., None] + log_p, axis=1)


def penalty(recipe: Recipe, h: Array, v: Array, weights: Array) -> Array:
    """Return the sum of weights times each token's activation regularisations.

    Args:
        h: the last layer's output before dropout, [time, batch, width].
        v: the same after dropout.
        weights: [time, batch]; a change of h counts with the lesser weight of its two tokens.
    """
    both = jnp.minimum(weights[1:], weights[:-1])
    activation = jnp.vdot(jnp.mean(v**2, axis=-1), weights)
    change = jnp.vdot(jnp.mean((h[1:] - h[:-1]) ** 2, axis=-1), both)
    return (
        recipe.activation_regularization * activation
        + recipe.temporal_activation_regularization * change
    )


@dataclass(frozen=True)
class LanguageModel:
    """The model from words to losses. It has no parameters of its own: each method takes them.

    Of a sparse kernel's matrices, the parameters are the weights that exist. Beside them is where
    they are in their matrix, such as `rnn.0.input.places` [weights, 2].
    """

    recipe: Recipe
    recurrent_layer: Callable[..., tuple[Array, LayerState]]  # the one above, or a faster one
    nll: Callable[[Head, Array, Array], Array]  # the one above, or a faster one

    def run(
        self, parameters: Tree, inputs: Array, state: Tree, dropout: Dropout
    ) -> tuple[Array, Array, Tree]:
        """Run the embedding and the recurrent layers.

        Args:
            parameters: by canonical name.
            inputs: [time, batch].
            state: before the first step, named as in `state_widths`.
            dropout: what is dropped.

        Returns:
            The last layer's output before dropout and after it, both [time, batch, width]; and
            the state after the last step.
        """
        embedding = parameters["embedding"]
        x = (embedding * dropout.words(len(embedding)))[inputs]
        x = x * dropout.units(0, x)
        final: Tree = {}
        for layer, width in enumerate(self.recipe.widths):
            prefix = f"state.{layer}."
            names = [name for name in state_widths(self.recipe) if name.startswith(prefix)]
            before = tuple(state[name] for name in names)
            weights = layer_weights(parameters, layer, x.shape[-1], width, dropout)
            mask = dropout.recurrent(layer, before[0])
            h, after = self.recurrent_layer(self.recipe, x, weights, before, mask)
            final |= dict(zip(names, after, strict=True))
            x = h * dropout.units(layer + 1, h)
        return h, x, final

    def objective(
        self, parameters: Tree, batch: Batch, state: Tree, dropout: Dropout
    ) -> tuple[Array, tuple[Array, Tree]]:
        """Return what is differentiated, and beside it the nll alone and the final state.

        Each token's loss is multiplied by its entry of the batch's mask.
        """
        h, v, final = self.run(parameters, batch.inputs, state, dropout)
        head = Head.on_top(self.recipe, parameters, v, dropout)
        loss = self.nll(head, batch.targets.ravel(), batch.mask.ravel())
        if not self.recipe.penalizes:
            return loss, (loss, final)
        return loss + penalty(self.recipe, h, v, batch.mask), (loss, final)

    def predict(self, parameters: Tree, inputs: Array, state: Tree) -> tuple[Array, Tree]:
        """Return log-probabilities [time, batch, vocabulary] without dropout, and the state."""
        nothing = Dropout(self.recipe)
        _, v, final = self.run(parameters, inputs, state, nothing)
        log_p = log_probabilities(Head.on_top(self.recipe, parameters, v, nothing))
        return log_p.reshape(*inputs.shape, -1), final


def clip(gradients: Tree, norm: float | None) -> tuple[Tree, Array]:
    """Return gradients of at most that global norm, and the norm that they had."""
    before = jnp.sqrt(sum(jnp.vdot(g, g) for g in gradients.values()))
    if norm is None:
        return gradients, before
    scale = jnp.where(before > norm, norm / before, 1)
    return {name: scale * g for name, g in gradients.items()}, before


def direction(recipe: Recipe, g: Array, slots: Tree, epsilon: Array) -> tuple[Array, Tree]:
    """Return what a rate of 1 subtracts from a parameter with gradient g, and its new slots.

    Adam's corrections of bias are in the rate and in `epsilon`; see `rate_and_epsilon`.
    """
    if recipe.optimizer == "adam":
        beta1, beta2 = recipe.adam_beta1, recipe.adam_beta2
        m = beta1 * slots["first_moment"] + (1 - beta1) * g
        v = beta2 * slots["second_moment"] + (1 - beta2) * g**2
        return m / (jnp.sqrt(v) + epsilon), {"first_moment": m, "second_moment": v}
    if recipe.optimizer == "rmsprop":
        decay = recipe.rmsprop_decay
        s = decay * slots["mean_square"] + (1 - decay) * g**2
        return g / (jnp.sqrt(s) + epsilon), {"mean_square": s}
    return g, slots


def running_mean(mean: Array, p: Array, count: Array) -> Array:
    """Return the mean of `count` values from that of all but the last, p; of one it is p exactly.

    It is formed by the change, because the rounded weights of two terms would not add up to one.
    """
    return jnp.where(count == 1, p, mean + (p - mean) / count)


def update(
    recipe: Recipe, arrays: dict[str, Tree], gradients: Tree, rate: Array, epsilon: Array,
    averaged: Array,
) -> tuple[dict[str, Tree], Array]:  # fmt: skip
    """Return parameters and slots after one step, and the norm of the gradients before clipping.

    Args:
        arrays: by kind, `PARAMETER` or a slot of the optimizer, and by canonical name.
        gradients: by canonical name.
        rate, epsilon: as `rate_and_epsilon` gives them.
        averaged: number of steps that asgd's mean is of; not used by other optimizers.
    """
    gradients, norm = clip(gradients, recipe.clip_norm)
    updated: dict[str, Tree] = {kind: {} for kind in arrays}
    for name, p in arrays[PARAMETER].items():
        slots = {kind: arrays[kind][name] for kind in arrays if kind != PARAMETER}
        g = gradients[name]
        if recipe.weight_decay:
            g = g + recipe.weight_decay * p
        step, slots = direction(recipe, g, slots, epsilon)
        p = p - rate * step
        if recipe.optimizer == "asgd":
            slots = {"average": running_mean(slots["average"], p, averaged)}
        for kind, array in {PARAMETER: p, **slots}.items():
            updated[kind][name] = array
    return updated, norm
