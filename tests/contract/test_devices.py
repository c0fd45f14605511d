"""A backend uses the devices that it is asked to use, or says in one sentence why it cannot."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.support.problems import (
    BATCH,
    SUM,
    TIME,
    VOCABULARY,
    largest_error,
    new_oracle,
    random_batch,
)
from tests.support.remote import Backends, RemoteBackend

from ptbench.backends import FRAMEWORKS
from ptbench.corpus.batching import Batch
from ptbench.errors import PtbenchError

GPU = Path("/dev/nvidiactl").exists()
with_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")
without_gpu = pytest.mark.skipif(GPU, reason="needs a machine without a GPU")


@pytest.mark.parametrize("devices", [1, 2])
def test_each_replica_has_a_named_device(backends: Backends, framework: str, devices: int) -> None:
    names = backends.get(framework, SUM, devices).device_names()
    assert len(names) == devices
    assert all(names)


@pytest.mark.parametrize(
    ("devices", "batch"), [(4, 12), pytest.param(8, 8, marks=pytest.mark.exhaustive)]
)
def test_many_replicas_take_the_oracle_s_step(
    backends: Backends, framework: str, devices: int, batch: int
) -> None:
    """Some with padding alone, and one sequence each where there are as many as replicas."""
    model = SUM.model_copy(update={"batch_size": batch})
    rng = np.random.default_rng(0)
    inputs, targets = rng.integers(0, VOCABULARY, (2, TIME, batch), np.int32)
    mask = np.ones((TIME, batch), np.float32)
    mask[:, -batch // 3 :] = 0
    fed = Batch(inputs, targets, mask)
    backend, oracle = backends.get(framework, model, devices), new_oracle(model)
    step = backend.train_step(fed, backend.initial_state(batch, training=True), 0.5)
    expected = oracle.train_step(fed, oracle.initial_state(batch, training=True), 0.5)
    assert float(step.nll) == pytest.approx(expected.nll, rel=1e-5)
    assert float(step.gradient_norm) == pytest.approx(expected.gradient_norm, rel=1e-5)
    error, name = largest_error(backend.parameters(), oracle.parameters())
    assert error < 1e-5, name


def test_a_cpu_has_no_device_memory(backends: Backends, framework: str) -> None:
    if backends.accelerator == "cpu":
        assert backends.get(framework, SUM).peak_device_memory() is None


@with_gpu
@pytest.mark.frameworks(*FRAMEWORKS)
def test_peak_memory_of_a_gpu_is_at_least_that_of_the_parameters(
    backends: Backends, framework: str
) -> None:
    worker = backends.start(framework, "cuda")
    try:
        backend = RemoteBackend(worker, framework, SUM, accelerator="cuda")
        state = backend.initial_state(BATCH, training=True)
        backend.train_step(random_batch(0), state, 0.1)
        peak = backend.peak_device_memory()
        assert peak is not None
        assert peak >= sum(array.nbytes for array in backend.parameters().values())
    finally:
        worker.close()


@without_gpu
@pytest.mark.frameworks(*FRAMEWORKS)
def test_asking_for_gpus_where_there_are_none_is_an_error_of_one_sentence(
    backends: Backends, framework: str
) -> None:
    worker = backends.start(framework)
    try:
        with pytest.raises(PtbenchError) as error:
            RemoteBackend(worker, framework, SUM, devices=2, accelerator="cuda")
    finally:
        worker.close()
    sentence = str(error.value)
    assert "\n" not in sentence
    assert ". " not in sentence
    assert "GPU" in sentence or "cuda" in sentence
    assert "2" in sentence
