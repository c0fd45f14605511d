"""The initial draw that is the same in every framework (`initialization: shared`)."""

from __future__ import annotations

import numpy as np

from ptbench.backends.contract import Parameters, parameter_shapes
from ptbench.configuration.models import Recipe


def draw_parameters(recipe: Recipe, vocabulary_size: int, seed: int) -> Parameters:
    """Weights and softmax bias uniform in ±initialization_scale; recurrent biases zero.

    The forget gates' biases start at `forget_bias`. As in the TensorFlow PTB tutorial, where every
    variable but the cells' biases is drawn by the scope's uniform initialiser.
    """
    rng = np.random.default_rng(seed)
    scale, hidden = recipe.initialization_scale, recipe.hidden_size
    parameters: Parameters = {}
    for name, shape in parameter_shapes(recipe, vocabulary_size).items():
        if name.startswith("rnn.") and name.endswith(".bias"):
            bias = np.zeros(shape, np.float32)
            bias[hidden : 2 * hidden] = recipe.forget_bias
            parameters[name] = bias
        else:
            # rng.random is the one draw that every NumPy version gives alike
            parameters[name] = ((2 * rng.random(shape) - 1) * scale).astype(np.float32)
    return parameters
