"""Initial values of the parameters, drawn in NumPy, so that every framework starts the same."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from ptbench.model.parameters import GATES, Parameters, kept_weights, parameter_shapes
from ptbench.model.recipe import Recipe

KERAS_EMBEDDING_SCALE = 0.05  # keras.initializers.RandomUniform


def initial_parameters(recipe: Recipe, vocabulary_size: int, seed: int) -> Parameters:
    """Draw the parameters as the recipe's `initialization` says.

    - uniform: weights and softmax bias in ±initialization_scale, other biases zero. This is what
      the TensorFlow PTB tutorial does: its scope's uniform initialiser draws every variable except
      the biases of the cells.
    - keras: the embedding uniform in ±0.05, recurrent kernels orthogonal (Saxe et al. 2014,
      arXiv:1312.6120), all other kernels Glorot-uniform, biases zero.
    - pytorch: recurrent layers, biases too, uniform in ±1/sqrt(width), as torch.nn.LSTM starts;
      latents, prior and projection uniform in ±1/sqrt(inputs), as torch.nn.Linear starts; embedding
      and output matrix in ±initialization_scale and the output's bias zero, as
      `init_weights` of pytorch/examples/word_language_model has them.

    An LSTM's forget gates start with a bias of `forget_bias` where biases start at zero. Weights
    that a sparse model does not have are zero.
    """
    rng = np.random.default_rng(seed)
    kept = kept_weights(recipe, vocabulary_size, seed)
    shapes = parameter_shapes(recipe, vocabulary_size)
    parameters: Parameters = {}
    for name in shapes:
        value = _initial_value(recipe, name, shapes, rng)
        if recipe.rnn == "lstm" and name.startswith("rnn.") and name.endswith(".bias"):
            forget = GATES["lstm"].index("forget")
            value.reshape(len(GATES["lstm"]), -1)[forget] += recipe.forget_bias
        parameters[name] = (value * kept.get(name, 1)).astype(np.float32)
    return parameters


def _initial_value(
    recipe: Recipe, name: str, shapes: dict[str, tuple[int, ...]], rng: np.random.Generator
) -> npt.NDArray[np.float64]:
    shape, scheme = shapes[name], recipe.initialization
    if scheme == "pytorch":
        if name in ("embedding", "softmax.weight"):
            return _uniform(rng, shape, recipe.initialization_scale)
        if name == "softmax.bias":
            return np.zeros(shape)
        owner = name.rpartition(".")[0]
        if owner.startswith("rnn."):
            return _uniform(rng, shape, 1 / math.sqrt(shapes[f"{owner}.recurrent"][0]))
        inputs = shapes["latent.weight" if owner == "latent" else name][0]
        return _uniform(rng, shape, 1 / math.sqrt(inputs))
    if name.endswith("bias") and not (name == "softmax.bias" and scheme == "uniform"):
        return np.zeros(shape)
    if scheme == "uniform":
        return _uniform(rng, shape, recipe.initialization_scale)
    if name == "embedding":
        return _uniform(rng, shape, KERAS_EMBEDDING_SCALE)
    if name.endswith(".recurrent"):
        return _orthogonal(rng, shape)
    return _uniform(rng, shape, math.sqrt(6 / sum(shape)))  # Glorot and Bengio 2010, equation 16


def _uniform(
    rng: np.random.Generator, shape: tuple[int, ...], scale: float
) -> npt.NDArray[np.float64]:
    # every NumPy version draws the same numbers with rng.random
    return (2 * rng.random(shape) - 1) * scale


def _orthogonal(rng: np.random.Generator, shape: tuple[int, ...]) -> npt.NDArray[np.float64]:
    """Draw a matrix with orthonormal rows, uniformly distributed; it has no more rows than columns.

    It comes from the QR decomposition of normal numbers, which Box and Muller's formula makes of
    uniform ones, with the signs that make it unique (Mezzadri 2007, arXiv:math-ph/0609050).
    """
    rows, columns = shape
    radius = np.sqrt(-2 * np.log1p(-rng.random((columns, rows))))
    normal = radius * np.cos(2 * np.pi * rng.random((columns, rows)))
    q, r = np.linalg.qr(normal)
    return np.ascontiguousarray((q * np.sign(np.diag(r))).T)
