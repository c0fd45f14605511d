"""Parameters of the model: how they are stored, and which weights of a sparse model exist.

Their names and shapes are in `shapes.py`, which needs no NumPy; their initial values are in
`initialization.py`. Nothing here knows a framework.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ptbench.model.recipe import Recipe
from ptbench.model.shapes import GATES as GATES
from ptbench.model.shapes import is_sparse, kept_count
from ptbench.model.shapes import parameter_count as parameter_count
from ptbench.model.shapes import parameter_shapes as parameter_shapes
from ptbench.model.shapes import state_widths as state_widths

Parameters = dict[str, npt.NDArray[np.float32]]  # by canonical name

KEPT_WEIGHTS_STREAM = 1  # separates the draw of kept weights from that of initial values


def kept_weights(
    recipe: Recipe, vocabulary_size: int, seed: int
) -> dict[str, npt.NDArray[np.bool_]]:
    """Draw which weights a sparse model has, for every `rnn.{l}.input` and `rnn.{l}.recurrent`.

    There are exactly `kept_count` of them, as many in each gate's matrix. They are a function of
    the recipe's shapes and the seed alone, so they are the same in every framework. A dense model
    gets an empty mapping.
    """
    masks: dict[str, npt.NDArray[np.bool_]] = {}
    gates = len(GATES[recipe.rnn])
    rng = np.random.default_rng([seed, KEPT_WEIGHTS_STREAM])
    for name, shape in parameter_shapes(recipe, vocabulary_size).items():
        if not is_sparse(recipe, name):
            continue
        inputs, width = shape[0], shape[1] // gates
        masks[name] = np.zeros(shape, np.bool_)
        for gate in range(gates):
            drawn = smallest_draws(rng, inputs * width, kept_count(recipe, name, shape) // gates)
            rows, columns = np.divmod(drawn, width)
            masks[name][rows, gate * width + columns] = True
    return masks


def smallest_draws(
    rng: np.random.Generator, size: int, count: int, chunk: int = 1 << 20
) -> npt.NDArray[np.int64]:
    """Return where the `count` smallest of `size` uniform draws are: a random set of that size.

    Of equal draws the first counts as the smaller one. Memory is needed for `count` and for `chunk`
    numbers, not for `size`: a sparse model's matrix may be much larger than what it keeps.
    """
    places = np.zeros(0, np.int64)
    numbers = np.zeros(0)
    for start in range(0, size, chunk):
        # every NumPy version draws the same numbers with rng.random
        drawn = rng.random(min(chunk, size - start))
        below = (
            np.flatnonzero(drawn < numbers[-1]) if len(numbers) == count else np.arange(len(drawn))
        )
        numbers = np.concatenate([numbers, drawn[below]])
        places = np.concatenate([places, start + below])
        order = np.argsort(numbers, kind="stable")[:count]
        numbers, places = numbers[order], places[order]
    return places


def check_parameters(
    parameters: Mapping[str, npt.NDArray[Any]], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise ValueError unless `parameters` has exactly these names and shapes."""
    if missing := sorted(shapes.keys() - parameters.keys()):
        raise ValueError(f"parameters lack {', '.join(missing)}")
    if unknown := sorted(parameters.keys() - shapes.keys()):
        raise ValueError(f"parameters have {', '.join(unknown)}, which the model does not")
    for name, shape in shapes.items():
        if parameters[name].shape != shape:
            raise ValueError(f"{name} has shape {parameters[name].shape}; the model has {shape}")


@dataclass(frozen=True)
class Layout:
    """How a framework stores one parameter, its gradient and its optimizer's slots.

    Attributes:
        transposed: the framework has [outputs, inputs].
        gate_order: which canonical gate comes first, second, ... in the framework; empty: the
            order of `GATES`.
        kept: which weights exist, in the canonical shape; None: all.
        packed: the weights that exist are stored alone, as a vector, row after row of the matrix
            as the framework would store it.
    """

    transposed: bool = False
    gate_order: tuple[int, ...] = ()
    kept: npt.NDArray[np.bool_] | None = None
    packed: bool = False

    def arranged(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return a canonical array with gates and axes as the framework has them, not packed."""
        if self.gate_order:
            gates = np.split(array, len(self.gate_order), axis=-1)
            array = np.concatenate([gates[gate] for gate in self.gate_order], axis=-1)
        return array.T if self.transposed else array

    def stored(self, canonical: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return a new, C-contiguous array as the framework stores it."""
        array = canonical
        if self.packed:
            assert self.kept is not None
            return self.arranged(array)[self.arranged(self.kept)]
        if self.kept is not None:
            array = array * self.kept
        return np.array(self.arranged(array), order="C")

    def canonical(self, stored: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return a new, C-contiguous array of the canonical shape; the reverse of `stored`."""
        array = np.asarray(stored)
        if self.packed:
            assert self.kept is not None
            places = self.arranged(self.kept)
            whole = np.zeros(places.shape, array.dtype)
            whole[places] = array
            array = whole
        if self.transposed:
            array = array.T
        if self.gate_order:
            gates = np.split(array, len(self.gate_order), axis=-1)
            order = np.argsort(self.gate_order)
            array = np.concatenate([gates[gate] for gate in order], axis=-1)
        return np.array(array, order="C")
