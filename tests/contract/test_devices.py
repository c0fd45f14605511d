"""A backend uses the devices that it is asked to use, or says in one sentence why it cannot."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.problems import BATCH, SUM, random_batch
from tests.support.remote import Backends, RemoteBackend

from ptbench.backends import FRAMEWORKS
from ptbench.errors import PtbenchError

GPU = Path("/dev/nvidiactl").exists()
with_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")
without_gpu = pytest.mark.skipif(GPU, reason="needs a machine without a GPU")


@pytest.mark.parametrize("devices", [1, 2])
def test_each_replica_has_a_named_device(backends: Backends, framework: str, devices: int) -> None:
    names = backends.get(framework, SUM, devices).device_names()
    assert len(names) == devices
    assert all(names)


def test_a_cpu_has_no_device_memory(backends: Backends, framework: str) -> None:
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
