"""The frameworks that are compared, one row each. Nothing here imports one of them.

`base.py` defines what a backend must do, `oracle.py` does it in float64 for the tests, and each
framework's folder does it with that framework. `features.yaml` lists what each framework has built
in.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Literal, NamedTuple

from ptbench.errors import PtbenchError
from ptbench.isolation import isolate

if TYPE_CHECKING:
    from ptbench.backends.base import Backend, Setup
    from ptbench.model.recipe import Recipe


class Row(NamedTuple):
    """What the rest of the program needs to know about a framework."""

    title: str  # as its authors write it
    colour: str  # on white
    dark_colour: str  # on black
    marker: str  # as matplotlib names it
    # Memory of a process that trains a small model on the CPU, libraries included: twice what
    # demo-lstm took on one or two replicas, and more for PyTorch, where zaremba-small took 1,790.
    memory_megabytes: int
    own_kernels: tuple[str, ...] = ()  # of its LSTM, beside those that every framework has
    precisions: tuple[str, ...] = ("float32", "bfloat16")
    spans_nodes: bool = False  # whether a run may have devices on several nodes of a cluster

    @property
    def backend(self) -> str:
        """Return its backend's module and class."""
        return f"ptbench.backends.{self.title.lower()}.backend:{self.title}Backend"

    @property
    def kernels(self) -> tuple[str, ...]:
        """Return the kernels of its LSTM; other recurrent layers have fused and stepwise alone."""
        return ("fused", "stepwise", "sparse", *self.own_kernels)

    def lacks(self, recipe: Recipe) -> list[str]:
        """Return the keys of a recipe whose value the framework does not have."""
        has = {"kernel": self.kernels, "precision": self.precisions}
        return [key for key, values in has.items() if getattr(recipe, key) not in values]


FRAMEWORKS: dict[str, Row] = {
    "pytorch": Row("PyTorch", "#c0392b", "#d55e00", "o", 2700, spans_nodes=True),
    "tensorflow": Row("TensorFlow", "#c28100", "#ffc94d", "s", 2800, own_kernels=("block",)),
    "keras": Row("Keras", "#8e2a7d", "#ee99cc", "D", 2800),
    # its recurrent layers do not compute in bfloat16
    "mxnet": Row("MXNet", "#2a5fbf", "#5b8ff9", "^", 900, precisions=("float32",)),
    "jax": Row("JAX", "#10967c", "#2f8f5b", "v", 1500, spans_nodes=True),
}
ORACLE = "oracle"  # the name under which the tests and `ptbench evaluate` reach the float64 oracle

if TYPE_CHECKING:
    Framework = str
else:
    Framework = Literal[tuple(FRAMEWORKS)]


def backend_class(framework: str, threads: int, devices: int = 1) -> type[Backend]:
    """Import a framework, isolated from the user's settings, and return its backend.

    Args:
        framework: a key of `FRAMEWORKS`, or `ORACLE`.
        threads: CPU threads of all replicas together.
        devices: replicas.

    Raises:
        PtbenchError: if this is not the framework's environment.
    """
    isolate(framework, threads, devices)
    where = "ptbench.backends.oracle:Oracle"
    if framework != ORACLE:
        where = FRAMEWORKS[framework].backend
    module, name = where.split(":")
    try:
        found: type[Backend] = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("ptbench"):
            raise
        raise PtbenchError(
            f"{framework} cannot be used here: {sys.executable} has no module {error.name}; run in "
            f"its own environment, results/environments/{framework}-cpu"
        ) from error
    return found


def lack(framework: str, recipe: Recipe, key: str) -> str:
    """Return that a framework does not have a recipe's value of a key, and which frameworks do."""
    having = ", ".join(name for name, row in FRAMEWORKS.items() if key not in row.lacks(recipe))
    return f"{key}={getattr(recipe, key)}, which {framework} does not have; it is in {having}"


def create(framework: str, setup: Setup) -> Backend:
    """Return a framework's backend with the setup's initial parameters on its devices.

    Raises:
        PtbenchError: if this is not the framework's environment, if it does not have the recipe's
            kernel or precision, if there are not exactly as many devices as the setup asks for, or
            if they are on several nodes and may not.
    """
    if framework != ORACLE:
        for key in FRAMEWORKS[framework].lacks(setup.recipe):
            raise PtbenchError(lack(framework, setup.recipe, key))
    if setup.nodes > 1 and not FRAMEWORKS[framework].spans_nodes:
        raise PtbenchError(one_node(framework))
    if setup.devices % setup.nodes:
        raise PtbenchError(f"{setup.devices} devices do not fill {setup.nodes} nodes")
    backend = backend_class(framework, setup.threads, setup.devices)(setup)

    from ptbench.model.initialization import initial_parameters  # loads NumPy: after the isolation

    drawn = initial_parameters(setup.recipe, setup.vocabulary_size, setup.seed)
    backend.load_parameters(drawn)
    return backend


def one_node(framework: Framework) -> str:
    """Return why a framework's run cannot span several nodes."""
    able = " and ".join(row.title for row in FRAMEWORKS.values() if row.spans_nodes)
    return f"a run in {FRAMEWORKS[framework].title} is on one node here; {able} can span several"
