"""Checks that run in the process of a backend, such as those of shared memory and of files.

`remote.probe` runs them. This module imports only what every framework's environment has. Arguments
and results are numbers, arrays, lists and mappings of them.
"""

from __future__ import annotations

import contextlib
import importlib
import os
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
from ptbench.training import cell, dynamic, inference
from ptbench.training.clocks import Clocks
from ptbench.training.loop import evaluate, train


def shared_parameters(backend: Backend, seed: int) -> Parameters:
    """Return the initial parameters as this environment's NumPy draws them."""
    return initial_parameters(backend.recipe, backend.setup.vocabulary_size, seed)


def largest_values_in_new_torch_layers(
    backend: Backend,  # noqa: ARG001
    rnn: str,
    inputs: int,
    width: int,
    outputs: int,
) -> dict[str, float]:
    """Return the largest absolute value in each parameter of a new torch.nn layer and Linear."""
    torch = importlib.import_module("torch")
    torch.manual_seed(0)
    layer = getattr(torch.nn, rnn.upper())(inputs, width)
    linear = torch.nn.Linear(width, outputs)
    parameters = [*layer.named_parameters(), *linear.named_parameters()]
    return {name: float(parameter.abs().max()) for name, parameter in parameters}


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


def operators_of_a_step(backend: Backend, batch: Batch) -> list[Any]:
    """Return the calls of operators in a step by their names, and whether /dev/null is itself."""
    state = backend.initial_state(batch.inputs.shape[1], training=True)

    def work() -> None:
        backend.train_step(batch, state, 0.0)
        backend.synchronize()

    calls = {each.name: each.calls for each in backend.operators(work)}
    return [calls, Path(os.devnull).is_char_device()]


def evaluate_split(
    backend: Backend, tokens: Any, batch_size: int, sequence_length: int
) -> dict[str, float]:
    """Return mean nll [nats/token], perplexity and number of tokens, by the training loop."""
    streams = ParallelStreams(tokens, batch_size, sequence_length)
    return evaluate(backend, streams).model_dump()


def save_parameters(backend: Backend, path: str) -> None:
    """Write the parameters to a file of safetensors."""
    save_file(backend.parameters(), path)


def load_saved_parameters(backend: Backend, path: str) -> None:
    """Load parameters from a file of safetensors."""
    backend.load_parameters(load_file(path))


def score_of_checkpoint(backend: Backend, path: str, split: str) -> dict[str, float]:
    """Return the score of a trained model on disk, in the backend's framework."""
    checkpoint = inference.read_checkpoint(Path(path))
    corpus = inference.open_corpus_of(checkpoint)
    with contextlib.closing(
        inference.build(checkpoint, backend.name, threads=backend.setup.threads)
    ) as model:
        return inference.evaluate_split(model, corpus, cast("Split", split)).model_dump()


def dynamic_score_of_checkpoint(
    backend: Backend, path: str, learning_rate: float, decay: float
) -> dict[str, float]:
    """Return the score of a trained model that learns on, in the backend's framework."""
    checkpoint = inference.read_checkpoint(Path(path))
    corpus = inference.open_corpus_of(checkpoint)
    threads = backend.setup.threads
    with contextlib.closing(
        inference.build(checkpoint, backend.name, threads=threads, changes=dynamic.PLAIN)
    ) as model:
        how = dynamic.Dynamics(learning_rate, decay)
        return dynamic.evaluate_dynamically(model, corpus, "test", how).model_dump()


def predictions_of_checkpoint(backend: Backend, path: str) -> dict[str, list[Any]]:
    """Return what a trained model on disk predicts, in the backend's framework.

    Six words of the test split, each with the most probable one, then eight words that are drawn;
    and the probabilities of the six and of the most probable ones.
    """
    checkpoint = inference.read_checkpoint(Path(path))
    corpus = inference.open_corpus_of(checkpoint)
    with contextlib.closing(
        inference.build(checkpoint, backend.name, threads=backend.setup.threads)
    ) as model:
        stretch = inference.predict_next_words(model, corpus, "test", 0, 6)
        drawn = inference.sample(model, corpus, 8, temperature=1.0, seed=1)
    true = [(each.true, each.true_probability) for each in stretch]
    best = [(each.predicted, each.predicted_probability) for each in stretch]
    words = [int(word) for word, _ in true + best]
    return {
        "words": [*words, *(int(word) for word in drawn)],
        "probabilities": [float(probability) for _, probability in true + best],
    }


def nlls_of_runs(
    backend: Backend, specification: str, corpus: str, seeds: list[int], changes: dict[str, Any]
) -> list[float]:
    """Return test nll [nats/token] of whole runs in the backend's framework, one for each seed.

    Args:
        specification: of the cell, as JSON.
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
            run = train(model, splits, Clocks(model.synchronize), lambda _: None)
        assert run.test is not None
        nlls.append(run.test.nll)
    return nlls


def run_on_corpus(backend: Backend, corpus: str) -> list[Any]:
    """Train by the backend's recipe, and return its losses and its parameters in the end.

    Losses are the training and validation nll of each epoch and the test nll [nats/token].

    Args:
        corpus: folder of the prepared corpus.
    """
    splits = cell.feed(open_corpus(Path(corpus)), backend.recipe, devices=1)
    run = train(backend, splits, Clocks(backend.synchronize), lambda _: None)
    assert run.test is not None
    nlls = [nll for epoch in run.history for nll in (epoch.train_nll, epoch.valid_nll)]
    return [[*nlls, run.test.nll], backend.parameters()]


def parameters_after_overwriting_a_copy(backend: Backend) -> Parameters:
    """Return the parameters after writing to the arrays that `parameters()` returned before."""
    for array in backend.parameters().values():
        array += 1
    return backend.parameters()


def copy_of_parameters_after_step(backend: Backend, batch: Any, learning_rate: float) -> Parameters:
    """Return what `parameters()` returned before a step, as it is after the step."""
    copy = backend.parameters()
    backend.train_step(Batch(*batch), backend.initial_state(batch[0].shape[1], True), learning_rate)
    backend.synchronize()
    return copy


def parameters_after_overwriting_what_was_loaded(
    backend: Backend, parameters: Parameters
) -> Parameters:
    """Return the parameters after writing to the arrays that they were loaded from."""
    loaded = {name: aligned(array) for name, array in parameters.items()}
    backend.load_parameters(loaded)
    for array in loaded.values():
        array += 1
    return backend.parameters()


def snapshot_after_use(backend: Backend, batches: Any, learning_rate: float) -> list[Any]:
    """Return a snapshot as it was taken and after two trainings from it, and the nll of both."""
    state = backend.initial_state(batches[0][0].shape[1], training=True)
    for batch in batches:
        state = backend.train_step(Batch(*batch), state, learning_rate).state
    snapshot = {name: aligned(array) for name, array in backend.snapshot(state).items()}
    before = {name: array.copy() for name, array in snapshot.items()}
    nll = []
    for _ in range(2):
        state = backend.restore(snapshot)
        for batch in batches:
            step = backend.train_step(Batch(*batch), state, learning_rate)
            state = step.state
        nll.append(float(step.nll))
    return [before, snapshot, nll]


def train_from_one_buffer(backend: Backend, batches: Any, learning_rate: float) -> list[float]:
    """Return each step's nll when all batches use the same memory, which is wiped after a step."""
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
    """Return the same as `train_from_one_buffer` for evaluation steps."""
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
    """Return a copy at a multiple of 64 bytes, which JAX may use without copying it."""
    memory = np.empty(array.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def error_of_an_mxnet_lstm_in_bfloat16(backend: Backend) -> str:  # noqa: ARG001
    """Return what the RNN operator says to bfloat16, after a cast has read such an array.

    FullyConnected computes with it on CPUs with AVX-512 alone.
    """
    mx = importlib.import_module("mxnet")

    def low(*shape: int) -> Any:
        # what MXNet has for the type, which NumPy lacks
        return mx.nd.amp_cast(mx.nd.ones(shape), dtype=np.dtype([("bfloat16", np.uint16)]))

    assert (mx.nd.amp_cast(low(2, 3), dtype="float32").asnumpy() == 1).all()
    state = [low(1, 2, 4), low(1, 2, 4)]
    weights = low(4 * 4 * (3 + 4 + 2))
    try:
        mx.nd.RNN(low(5, 2, 3), weights, *state, state_size=4, num_layers=1, mode="lstm")
        mx.nd.waitall()
    except mx.MXNetError as error:
        return str(error)
    return ""


def said_to_mistakes(backend: Backend) -> dict[str, dict[str, Any]]:
    """Return what the framework says to each classic mistake."""
    from ptbench.measurement.mistakes import mistakes

    return {name: each.model_dump() for name, each in mistakes(backend.name).items()}
