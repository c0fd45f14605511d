"""The initial draw that is the same in every framework (`initialization: shared`)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ptbench.backends.contract import GATES, Parameters, kept_weights, parameter_shapes
from ptbench.configuration.models import Recipe

KERAS_EMBEDDING_SCALE = 0.05


def draw_parameters(recipe: Recipe, vocabulary_size: int, seed: int) -> Parameters:
    """The parameters that `initialization_scheme` says; `framework_defaults` is not for NumPy.

    - uniform: weights and softmax bias in ±initialization_scale; other biases zero. As in the
      TensorFlow PTB tutorial, where every variable but the cells' biases is drawn by the scope's
      uniform initialiser.
    - keras_defaults: the embedding uniform in ±0.05, recurrent kernels orthogonal (Saxe et al.
      2014, arXiv:1312.6120), all other kernels Glorot-uniform, biases zero.

    The forget gates' biases start at `forget_bias`. Weights that a sparse model leaves out are 0.
    """
    rng = np.random.default_rng(seed)
    kept = kept_weights(recipe, vocabulary_size, seed)
    parameters: Parameters = {}
    for name, shape in parameter_shapes(recipe, vocabulary_size).items():
        if is_zero_at_first(recipe, name):
            value = np.zeros(shape)
            if recipe.rnn == "lstm" and name.startswith("rnn.") and name.endswith(".bias"):
                forget = GATES["lstm"].index("forget")
                value.reshape(len(GATES["lstm"]), -1)[forget] = recipe.forget_bias
        elif recipe.initialization_scheme == "uniform":
            value = uniform(rng, shape, recipe.initialization_scale)
        elif name == "embedding":
            value = uniform(rng, shape, KERAS_EMBEDDING_SCALE)
        elif name.endswith(".recurrent"):
            value = orthogonal(rng, shape)
        else:
            value = uniform(rng, shape, np.sqrt(6 / sum(shape)))
        parameters[name] = (value * kept.get(name, 1)).astype(np.float32)
    return parameters


def is_zero_at_first(recipe: Recipe, name: str) -> bool:
    """Whether the parameter is a bias that starts at zero (save the forget gates)."""
    if name == "softmax.bias":
        return recipe.initialization_scheme != "uniform"
    return name.endswith("bias")


def uniform(
    rng: np.random.Generator, shape: tuple[int, ...], scale: float
) -> npt.NDArray[np.float64]:
    # rng.random is the one draw that every NumPy version gives alike
    return (2 * rng.random(shape) - 1) * scale


def orthogonal(rng: np.random.Generator, shape: tuple[int, ...]) -> npt.NDArray[np.float64]:
    """A matrix of no more rows than columns whose rows are orthonormal, uniformly distributed.

    From the QR decomposition of normal numbers, which Box and Muller's formula makes of uniform
    ones, with the signs that make it unique (Mezzadri 2007, arXiv:math-ph/0609050).
    """
    rows, columns = shape
    radius = np.sqrt(-2 * np.log1p(-rng.random((columns, rows))))
    normal = radius * np.cos(2 * np.pi * rng.random((columns, rows)))
    q, r = np.linalg.qr(normal)
    return np.ascontiguousarray((q * np.sign(np.diag(r))).T)
