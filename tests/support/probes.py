"""What must be tried in the process where a backend lives: aliasing of memory, and files.

Run by `remote.probe`. Imports what every framework's environment has, and no more. Arguments and
results are numbers, arrays, lists and mappings of them.
"""

from __future__ import annotations

import contextlib
import importlib
from pathlib import Path
from typing import Any, cast

import numpy as np
from safetensors.numpy import load_file, save_file

from ptbench.backends.base import Backend
from ptbench.configuration.specification import Cell
from ptbench.corpus.batching import Batch, ParallelStreams
from ptbench.corpus.definitions import Split
from ptbench.corpus.store import open_corpus
from ptbench.model.initialization import initial_parameters
from ptbench.model.parameters import Parameters
from ptbench.training import cell, inference
from ptbench.training.clocks import Clocks
from ptbench.training.loop import evaluate, train


def shared_parameters(backend: Backend, seed: int) -> Parameters:
    """The shared initial draw as this environment's NumPy makes it."""
    return initial_parameters(backend.recipe, backend.setup.vocabulary_size, seed)


def missing_names(backend: Backend, names: list[str], package: str) -> list[str]:  # noqa: ARG001
    """Return those dotted names that cannot be found, relative to a package or absolute."""
    return [name for name in names if not exists(f"{package}.{name}".lstrip("."))]


def exists(name: str) -> bool:
    """Return whether a dotted name is a module, or an attribute of one."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:count]))
        except ImportError:
            continue
        if all((found := getattr(found, part, None)) is not None for part in parts[count:]):
            return True
    return False


def evaluate_split(
    backend: Backend, tokens: Any, batch_size: int, sequence_length: int
) -> dict[str, float]:
    """Mean nll [nats/token], perplexity and number of tokens of a split, by the training loop."""
    streams = ParallelStreams(tokens, batch_size, sequence_length)
    return evaluate(backend, streams, Clocks(backend.synchronize))[0].model_dump()


def save_parameters(backend: Backend, path: str) -> None:
    save_file(backend.parameters(), path)


def load_saved_parameters(backend: Backend, path: str) -> None:
    backend.load_parameters(load_file(path))


def score_of_checkpoint(backend: Backend, path: str, split: str) -> dict[str, float]:
    """The score of a trained model on disk, built anew in the backend's framework."""
    checkpoint = inference.read_checkpoint(Path(path))
    corpus = inference.open_corpus_of(checkpoint)
    with contextlib.closing(
        inference.build(checkpoint, backend.name, threads=backend.setup.threads)
    ) as model:
        return inference.evaluate_split(model, corpus, cast("Split", split)).model_dump()


def nlls_of_runs(
    backend: Backend, specification: str, corpus: str, seeds: list[int], changes: dict[str, Any]
) -> list[float]:
    """Test nll [nats/token] of whole runs in the backend's framework, one for each seed.

    Args:
        specification: as a cell is given it.
        corpus: folder of the prepared corpus.
        changes: of the recipe.
    """
    given = cell.read_specification(specification)
    recipe = given.recipe.model_copy(update=changes)
    specified = given.model_copy(update={"recipe": recipe})
    opened = open_corpus(Path(corpus))
    splits = cell.feed(opened, recipe, devices=1)
    nlls = []
    for seed in seeds:
        name = Cell(variant=given.variant, framework=backend.name, devices=1, seed=seed)
        model = cell.create_backend(name, specified, opened.vocabulary_size, backend.setup.threads)
        with contextlib.closing(model):
            run = train(model, recipe, splits, Clocks(model.synchronize), lambda _: None)
        assert run.test is not None
        nlls.append(run.test.nll)
    return nlls


def run_on_corpus(backend: Backend, corpus: str) -> list[Any]:
    """Train and validation nll [nats/token] of each epoch of the backend's recipe, test nll, and
    the parameters in the end.

    Args:
        corpus: folder of the prepared corpus.
    """
    splits = cell.feed(open_corpus(Path(corpus)), backend.recipe, devices=1)
    run = train(backend, backend.recipe, splits, Clocks(backend.synchronize), lambda _: None)
    assert run.test is not None
    nlls = [nll for epoch in run.history for nll in (epoch.train_nll, epoch.valid_nll)]
    return [[*nlls, run.test.nll], backend.parameters()]


def parameters_after_overwriting_a_copy(backend: Backend) -> Parameters:
    """The parameters, once the arrays of a former `parameters()` have been written to."""
    for array in backend.parameters().values():
        array += 1
    return backend.parameters()


def copy_of_parameters_after_step(backend: Backend, batch: Any, learning_rate: float) -> Parameters:
    """A copy of the parameters, read again once a step has changed the parameters."""
    copy = backend.parameters()
    batch = Batch(*batch)
    backend.train_step(batch, backend.initial_state(batch[0].shape[1], True), learning_rate)
    backend.synchronize()
    return copy


def parameters_after_overwriting_what_was_loaded(
    backend: Backend, parameters: Parameters
) -> Parameters:
    """The parameters, once the arrays given to `load_parameters` have been written to."""
    loaded = {name: aligned(array) for name, array in parameters.items()}
    backend.load_parameters(loaded)
    for array in loaded.values():
        array += 1
    return backend.parameters()


def snapshot_after_use(backend: Backend, batches: Any, learning_rate: float) -> list[Any]:
    """A snapshot when it was taken, and again after training from it, twice, with each nll."""
    batches = [Batch(*batch) for batch in batches]
    state = backend.initial_state(batches[0][0].shape[1], training=True)
    for batch in batches:
        state = backend.train_step(batch, state, learning_rate).state
    snapshot = {name: aligned(array) for name, array in backend.snapshot(state).items()}
    before = {name: array.copy() for name, array in snapshot.items()}
    nll = []
    for _ in range(2):
        state = backend.restore(snapshot)
        for batch in batches:
            step = backend.train_step(batch, state, learning_rate)
            state = step.state
        nll.append(float(step.nll))
    return [before, snapshot, nll]


def train_from_one_buffer(backend: Backend, batches: Any, learning_rate: float) -> list[float]:
    """Each step's nll, when all batches come in the same memory, wiped after each step."""
    buffer = [aligned(array) for array in batches[0]]
    state, nll = backend.initial_state(buffer[0].shape[1], training=True), []
    for batch in batches:
        for array, content in zip(buffer, batch, strict=True):
            array[:] = content
        step = backend.train_step(Batch(*buffer), state, learning_rate)
        for array in buffer:
            array[:] = 0
        state = step.state
        nll.append(step.nll)  # not waited for: the step may still be running
    return [float(value) for value in nll]


def evaluate_from_one_buffer(backend: Backend, batches: Any) -> list[float]:
    """The same for evaluation."""
    buffer = [aligned(array) for array in batches[0]]
    state, nll = backend.initial_state(buffer[0].shape[1], training=False), []
    for batch in batches:
        for array, content in zip(buffer, batch, strict=True):
            array[:] = content
        step = backend.evaluate_step(Batch(*buffer), state)
        for array in buffer:
            array[:] = 0
        state = step.state
        nll.append(step.nll)
    return [float(value) for value in nll]


def gradients_that_differ(backend: Backend, batch: Any, calls: int) -> list[str]:
    """Return the parameters whose gradient is not the same in every one of so many calls."""
    batch = Batch(*batch)
    state = backend.initial_state(batch.inputs.shape[1], training=True)
    first, differ = backend.gradients(batch, state), set()
    for _ in range(calls):
        again = backend.gradients(batch, state)
        differ |= {name for name in first if not np.array_equal(first[name], again[name])}
    return sorted(differ)


def aligned(array: Any) -> Any:
    """A copy that begins at a multiple of 64 bytes: such memory JAX may use without copying."""
    memory = np.empty(array.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy
