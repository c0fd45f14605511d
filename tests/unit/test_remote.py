"""A backend in another process, as the tests use it, is like a backend in this one."""

from __future__ import annotations

import io
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support import probes, wire
from tests.support.problems import BATCH, DROPOUT, new_oracle, random_batch, same, train
from tests.support.remote import ROOT, RemoteBackend, Worker, WorkerError, probe

from ptbench.corpus.batching import Batch


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    worker = Worker(sys.executable, tmp_path_factory.mktemp("worker") / "log")
    yield worker
    worker.close()
    assert worker.process.returncode == 0


@pytest.fixture
def remote(worker: Worker) -> RemoteBackend:
    return RemoteBackend(worker, "oracle", DROPOUT, seed=3)


def test_a_batch_arrives_as_a_batch() -> None:
    stream = io.BytesIO()
    batch = random_batch(0)
    wire.send(stream, [batch, 1])
    stream.seek(0)
    arrived, one = wire.receive(stream)
    assert isinstance(arrived, Batch)
    assert one == 1
    for array, expected in zip(arrived, batch, strict=True):
        np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize(
    "message",
    [
        None,
        0.1 + 0.2,
        "text",
        {"list": [1, {"array": [2]}], "": []},
        np.arange(6, dtype=np.float32).reshape(2, 3),
        np.arange(6).reshape(2, 3).T,
        np.array(3),
        np.zeros((0, 4), np.uint8),
        wire.Handle(7),
    ],
    ids=str,
)
def test_a_message_arrives_as_it_was_sent(message: Any) -> None:
    stream = io.BytesIO()
    wire.send(stream, message)
    wire.send(stream, "next")
    stream.seek(0)
    arrived = wire.receive(stream)
    if isinstance(message, np.ndarray):
        np.testing.assert_array_equal(arrived, message)
        assert (arrived.dtype, arrived.shape) == (message.dtype, message.shape)
        assert arrived.flags.writeable
    else:
        assert arrived == message
    assert wire.receive(stream) == "next"


def test_objects_that_would_have_to_be_pickled_are_not_sent() -> None:
    with pytest.raises(TypeError):
        wire.send(io.BytesIO(), object())
    with pytest.raises(AssertionError):
        wire.send(io.BytesIO(), np.array([object()]))


def test_a_remote_oracle_gives_the_local_oracle_s_numbers_bit_for_bit(
    remote: RemoteBackend,
) -> None:
    here = new_oracle(DROPOUT, seed=3)
    batches = [random_batch(seed) for seed in range(3)]
    assert train(remote, batches, [0.5] * 3)[:2] == train(here, batches, [0.5] * 3)[:2]
    assert same(remote.parameters(), here.parameters())
    assert remote.step == here.step == 3
    state, other = (b.initial_state(BATCH, training=False) for b in (remote, here))
    log_p, _ = remote.next_token_log_probabilities(batches[0].inputs, state)
    expected, _ = here.next_token_log_probabilities(batches[0].inputs, other)
    np.testing.assert_array_equal(log_p, expected)


def test_a_snapshot_survives_the_way_there_and_back(remote: RemoteBackend) -> None:
    batches = [random_batch(seed) for seed in range(3)]
    _, _, state = train(remote, batches, [0.5] * 3)
    snapshot = remote.snapshot(state)
    expected = train(remote, batches, [0.5] * 3, state)[0]
    assert train(remote, batches, [0.5] * 3, remote.restore(snapshot))[0] == expected


def test_a_probe_runs_beside_the_backend(remote: RemoteBackend) -> None:
    here = new_oracle(DROPOUT, seed=3)
    for backend in (remote, here):
        assert same(probe(probes.shared_parameters, backend, 3), here.parameters())


def test_an_error_in_the_worker_is_raised_here_with_its_type_text_and_traceback(
    worker: Worker, remote: RemoteBackend
) -> None:
    with pytest.raises(ValueError, match=r"parameters lack embedding") as error:
        remote.load_parameters({})
    assert "check_parameters" in error.value.__notes__[0]
    with pytest.raises(AttributeError):
        worker.ask("no_such_method", remote.handle)
    assert remote.step == 0  # it goes on serving


def test_the_death_of_a_worker_is_reported_with_what_it_said_last(tmp_path: Path) -> None:
    nonsense = tmp_path / "python"
    nonsense.write_text("#!/bin/sh\necho last words >&2\nexit 3\n")
    nonsense.chmod(0o755)
    worker = Worker(nonsense, tmp_path / "log")
    with pytest.raises(WorkerError, match=r"status 3:\nlast words"):
        worker.ask("create")
    worker.close()


def test_children_of_a_test_run_that_ignores_ctrl_c_do_not_ignore_it() -> None:
    child = "import signal; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    run = (
        "import subprocess, sys\n"
        "from tests.support.interrupts import let_interrupts_through\n"
        "let_interrupts_through()\n"
        f"subprocess.run([sys.executable, '-c', {child!r}])\n"
    )
    in_background = f'trap "" INT; exec {shlex.join([sys.executable, "-c", run])}'
    said = subprocess.run(["sh", "-c", in_background], cwd=ROOT, capture_output=True, text=True)
    assert said.stdout == "True\n", said.stderr


def test_what_a_framework_prints_does_not_get_between_the_messages(tmp_path: Path) -> None:
    noisy = tmp_path / "python"
    # The worker's own main, with a framework that prints, and has a child that prints.
    noisy.write_text(
        f"#!{sys.executable}\n"
        "import os, sys\n"
        "sys.path.insert(0, os.getcwd())\n"
        "from tests.support import worker\n"
        "perform = worker.Objects.perform\n"
        "def chatter(self, *request):\n"
        "    print('noise', flush=True)\n"
        "    os.system('echo noise')\n"
        "    return perform(self, *request)\n"
        "worker.Objects.perform = chatter\n"
        "worker.main()\n"
    )
    noisy.chmod(0o755)
    worker = Worker(noisy, tmp_path / "log")
    assert RemoteBackend(worker, "oracle", DROPOUT).step == 0
    worker.close()
    assert worker.log.read_text().count("noise") == 4
