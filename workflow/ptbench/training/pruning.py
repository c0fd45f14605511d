"""Pruning of a trained model: the smallest weights of its recurrent layers become zero."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from ptbench.errors import PtbenchError
from ptbench.model.parameters import Parameters
from ptbench.training.checkpoints import packed, read_arrays, write_arrays
from ptbench.training.inference import read_checkpoint


class Pruned(NamedTuple):
    """How many weights of the gate matrices are left."""

    weights: int
    left: int  # that are not zero


def prune(checkpoint: Path, keep: float, output: Path) -> Pruned:
    """Write a copy of a trained model whose gate matrices have their largest weights alone.

    Any framework evaluates it, as a dense model with zeros.

    Args:
        checkpoint: the `best.safetensors` of a run.
        keep: share of the weights of each `rnn.{l}.input` and `rnn.{l}.recurrent` that stay.
        output: the new file.

    Raises:
        PtbenchError: if the checkpoint cannot be used, or the output is the checkpoint.
    """
    model = read_checkpoint(checkpoint)
    if output.resolve() == checkpoint.resolve():
        raise PtbenchError(f"--output {output} is the checkpoint itself; name another file")
    parameters = largest(model.parameters, keep)
    _, metadata = read_arrays(checkpoint)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_arrays(output, packed(parameters, model.recipe), metadata | {"pruned_to": f"{keep:g}"})
    matrices = [array for name, array in parameters.items() if is_gate_matrix(name)]
    return Pruned(
        sum(array.size for array in matrices), sum(map(int, map(np.count_nonzero, matrices)))
    )


def largest(parameters: Parameters, keep: float) -> Parameters:
    """Return parameters whose gate matrices have that share of their weights, the largest."""
    pruned = dict(parameters)
    for name, array in parameters.items():
        if is_gate_matrix(name):
            flat = array.ravel()
            order = np.argsort(-np.abs(flat), kind="stable")  # of equal ones the first stays
            pruned[name] = array.copy()
            pruned[name].ravel()[order[round(keep * array.size) :]] = 0
    return pruned


def is_gate_matrix(name: str) -> bool:
    """Return whether a parameter is a recurrent layer's matrix of all gates."""
    return name.startswith("rnn.") and name.endswith((".input", ".recurrent"))
