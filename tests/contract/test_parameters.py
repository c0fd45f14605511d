"""Parameters go in and come out under their canonical names, exactly and by copy."""

from __future__ import annotations

import numpy as np
import pytest
from tests.support import probes
from tests.support.problems import SUM, VOCABULARY, random_batch, random_parameters, same
from tests.support.remote import Backends, probe

from ptbench.model.parameters import parameter_shapes


def test_parameters_have_the_canonical_names_and_shapes_in_float32(
    backends: Backends, framework: str
) -> None:
    parameters = backends.get(framework, SUM).parameters()
    shapes = {name: array.shape for name, array in parameters.items()}
    assert list(shapes.items()) == list(parameter_shapes(SUM, VOCABULARY).items())
    assert {array.dtype for array in parameters.values()} == {np.dtype(np.float32)}


def test_loaded_parameters_come_back_exactly(backends: Backends, framework: str) -> None:
    backend = backends.get(framework, SUM)
    parameters = random_parameters(SUM, seed=1)
    backend.load_parameters(parameters)
    assert same(backend.parameters(), parameters)


def test_writing_to_returned_parameters_does_not_change_the_model(
    backends: Backends, framework: str
) -> None:
    backend = backends.get(framework, SUM)
    before = backend.parameters()
    assert same(probe(probes.parameters_after_overwriting_a_copy, backend), before)


def test_a_step_does_not_change_parameters_that_were_returned_before_it(
    backends: Backends, framework: str
) -> None:
    backend = backends.get(framework, SUM)
    before = backend.parameters()
    copy = probe(probes.copy_of_parameters_after_step, backend, random_batch(1), 1.0)
    assert same(copy, before)
    assert not same(backend.parameters(), before)


def test_writing_to_arrays_that_were_loaded_does_not_change_the_model(
    backends: Backends, framework: str
) -> None:
    parameters = random_parameters(SUM, seed=1)
    backend = backends.get(framework, SUM)
    after = probe(probes.parameters_after_overwriting_what_was_loaded, backend, parameters)
    assert same(after, parameters)


@pytest.mark.parametrize("wrong", ["missing", "unknown", "transposed"])
def test_parameters_of_another_model_are_refused_and_change_nothing(
    backends: Backends, framework: str, wrong: str
) -> None:
    backend = backends.get(framework, SUM)
    before = backend.parameters()
    parameters = random_parameters(SUM, seed=1)
    if wrong == "missing":
        named = "rnn.1.recurrent"
        del parameters[named]
    elif wrong == "unknown":
        named = "rnn.2.bias"
        parameters[named] = parameters["rnn.1.bias"]
    else:
        named = "softmax.weight"
        parameters[named] = parameters[named].T.copy()
    with pytest.raises(ValueError, match=named):
        backend.load_parameters(parameters)
    assert same(backend.parameters(), before)
