"""The tests' own machinery: a backend in another process is the backend in this one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.problems import DROPOUT, VOCABULARY, random_batch, train
from tests.support.remote import RemoteBackend, Worker

from ptbench.backends.numpy_oracle import NumpyOracle


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    import sys

    worker = Worker(sys.executable, tmp_path / "log")
    yield worker
    worker.close()


def test_x(worker: Worker) -> None:
    remote = RemoteBackend(worker, "numpy", DROPOUT, VOCABULARY, devices=1, seed=3, accelerator="cpu")
    here = NumpyOracle(DROPOUT, VOCABULARY, seed=3)
    batches = [random_batch(seed) for seed in range(3)]
    assert train(remote, batches, 0.5)[:2] == train(here, batches, 0.5)[:2]
