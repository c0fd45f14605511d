"""Names and shapes of the model's parameters, and how many numbers there are.

Needs no NumPy, so that the workflow can ask for them whenever it is parsed.
"""

from __future__ import annotations

import math

from ptbench.model.recipe import Recipe

# kind of recurrent layer: its gates, in the order in which parameters hold them
GATES = {
    "lstm": ("input", "forget", "candidate", "output"),
    "gru": ("reset", "update", "candidate"),
    "rnn_tanh": ("candidate",),
    "rnn_relu": ("candidate",),
}


def parameter_shapes(recipe: Recipe, vocabulary_size: int) -> dict[str, tuple[int, ...]]:
    """Return canonical names and shapes, in canonical order.

    - `embedding` [vocabulary, embedding]
    - for each layer l from 0, its gates side by side in the order of `GATES`:
      `rnn.{l}.input` [inputs, gates x width], `rnn.{l}.recurrent` [width, gates x width],
      `rnn.{l}.bias` [gates x width], and with `recurrent_bias` `rnn.{l}.recurrent_bias`
    - with mixtures: `latent.weight` [width, mixtures x latent] and `latent.bias`, one mixture after
      the other, and `prior.weight` [width, mixtures]
    - `softmax.projection` [width or latent, rank], where the output matrix is factorised, or tied
      to an embedding of another width
    - `softmax.weight` [vocabulary, width, latent or rank], unless the embedding is in its place
    - `softmax.bias` [vocabulary], if the recipe has one
    """
    shapes: dict[str, tuple[int, ...]] = {"embedding": (vocabulary_size, recipe.embedding_size)}
    inputs = recipe.embedding_size
    for layer, width in enumerate(recipe.widths):
        gates = len(GATES[recipe.rnn]) * width
        shapes[f"rnn.{layer}.input"] = (inputs, gates)
        shapes[f"rnn.{layer}.recurrent"] = (width, gates)
        shapes[f"rnn.{layer}.bias"] = (gates,)
        if recipe.recurrent_bias:
            shapes[f"rnn.{layer}.recurrent_bias"] = (gates,)
        inputs = width
    features = inputs
    if recipe.mixtures:
        features = inputs if recipe.latent_size is None else recipe.latent_size
        shapes["latent.weight"] = (inputs, recipe.mixtures * features)
        shapes["latent.bias"] = (recipe.mixtures * features,)
        shapes["prior.weight"] = (inputs, recipe.mixtures)
    rank = recipe.embedding_size if recipe.tie_weights else recipe.output_rank
    if recipe.output_rank is not None or (recipe.tie_weights and rank != features):
        assert rank is not None
        shapes["softmax.projection"] = (features, rank)
        features = rank
    if not recipe.tie_weights:
        shapes["softmax.weight"] = (vocabulary_size, features)
    if recipe.softmax_bias:
        shapes["softmax.bias"] = (vocabulary_size,)
    return shapes


def state_widths(recipe: Recipe) -> dict[str, int]:
    """Return the names of the recurrent state's arrays [batch, width] and the width of each.

    They are `state.{layer}.h` for every layer, each followed by `state.{layer}.c` in an LSTM.
    """
    kinds = ("h", "c") if recipe.rnn == "lstm" else ("h",)
    return {f"state.{n}.{k}": width for n, width in enumerate(recipe.widths) for k in kinds}


def is_sparse(recipe: Recipe, name: str) -> bool:
    """Return whether only a share of the parameter's weights exists."""
    return recipe.kept_weights < 1 and name.rpartition(".")[2] in ("input", "recurrent")


def kept_count(recipe: Recipe, name: str, shape: tuple[int, ...]) -> int:
    """Return how many trainable numbers the parameter of that name and shape has."""
    count = math.prod(shape)
    if not is_sparse(recipe, name):
        return count
    gates = len(GATES[recipe.rnn])
    return gates * max(round(recipe.kept_weights * count / gates), 1)


def place_bytes(recipe: Recipe, name: str, shape: tuple[int, ...]) -> int | None:
    """Return the size of a kept weight's place in its matrix, where the kept ones are stored alone.

    None: the whole array is stored, because it is not sparse enough, or not at all.
    """
    size = math.prod(shape)
    if not is_sparse(recipe, name) or 3 * kept_count(recipe, name, shape) >= size:
        return None
    return 4 if size < 2**32 else 8


def stored_bytes(recipe: Recipe, vocabulary_size: int) -> int:
    """Return the size of the trained parameters on disk [bytes], float32."""
    total = 0
    for name, shape in parameter_shapes(recipe, vocabulary_size).items():
        place = place_bytes(recipe, name, shape)
        if place is None:
            total += 4 * math.prod(shape)
        else:
            total += (4 + place) * kept_count(recipe, name, shape)
    return total


def parameter_count(recipe: Recipe, vocabulary_size: int) -> int:
    """Return how many trainable numbers the model has."""
    shapes = parameter_shapes(recipe, vocabulary_size)
    return sum(kept_count(recipe, name, shape) for name, shape in shapes.items())
