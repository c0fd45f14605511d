"""A backend uses the devices it was asked for, or says in one sentence why it cannot."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.problems import SUM
from tests.support.remote import Backends, RemoteBackend

from ptbench.errors import PtbenchError

without_gpu = pytest.mark.skipif(
    Path("/dev/nvidiactl").exists(), reason="this machine has a GPU, and the test wants none"
)


@pytest.mark.parametrize("devices", [1, 2])
def test_each_replica_has_a_named_device(backends: Backends, framework: str, devices: int) -> None:
    names = backends.get(framework, SUM, devices).device_names()
    assert len(names) == devices
    assert all(names)


@without_gpu
def test_asking_for_gpus_where_there_are_none_is_an_error_of_one_sentence(
    backends: Backends, framework: str
) -> None:
    if framework == "numpy":
        return  # the oracle has no devices to lack
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
