"""The hardware sampler: cores, memory, GPUs, energy and busy machines."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest

from ptbench.training.hardware import Gpus, Rapl, Sampler, visible_gpus
from ptbench.training.records import Hardware

MIB = 2**20


def work(seconds: float) -> None:
    """Keep one core busy."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def test_a_process_that_works_and_then_sleeps_used_its_share_of_a_core() -> None:
    sampler = Sampler(threads=1, interval=0.05)
    with sampler:
        work(0.3)
        time.sleep(0.3)
    found = sampler.hardware()
    assert found is not None
    assert found.seconds > 0.6
    assert found.own_cores * found.seconds == pytest.approx(0.3, abs=0.1)
    assert found.memory_bytes > 5 * MIB
    assert 0 < found.sampling_seconds < 0.1
    assert found.gpu_utilization is None
    assert found.gpu_joules is None


def test_a_block_shorter_than_the_interval_is_sampled() -> None:
    sampler = Sampler(threads=1)
    assert sampler.hardware() is None
    with sampler:
        time.sleep(0.02)
    found = sampler.hardware()
    assert found is not None
    assert 0.02 <= found.seconds < 0.5


def test_an_attempt_adds_what_the_ones_before_it_found() -> None:
    sampler = Sampler(threads=1)
    sampler.totals |= {"seconds": 2.0, "own_seconds": 2.0, "gpu_memory_bytes": 5.0}
    sampler.totals["cells_at_once"] = 1.0
    before = {"seconds": 6.0, "own_seconds": 18.0, "gpu_memory_bytes": 3.0, "cells_at_once": 4.0}
    sampler.add(before)
    found = sampler.hardware()
    assert found is not None
    assert (found.seconds, found.own_cores) == (8, 2.5)
    assert sampler.totals["gpu_memory_bytes"] == 5
    assert found.cells_at_once == 4


def test_what_was_beside_a_run_is_unknown_if_one_of_its_attempts_did_not_look() -> None:
    sampler = Sampler(threads=1)
    with sampler:
        pass
    alone = sampler.hardware()
    sampler.add({"seconds": 6.0})  # from a checkpoint of an older version
    found = sampler.hardware()
    assert alone is not None
    assert alone.cells_at_once is not None
    assert found is not None
    assert found.cells_at_once is None


@pytest.mark.parametrize(
    ("threads", "others", "busy"),
    [
        (1, 2.9, False),
        (1, 3.2, True),
        (4, 0.1, False),
        (4, 1.0, True),
        (2, 1.9, False),
        (8, 0.1, False),
        (8, 0.5, True),
    ],
)
def test_a_machine_is_busy_if_others_take_cores_that_the_run_could_use(
    threads: int, others: float, busy: bool
) -> None:
    measured = Hardware(
        seconds=1, cores=4, threads=threads, own_cores=1, other_cores=others,
        memory_bytes=1, sampling_seconds=0,
    )  # fmt: skip
    assert measured.busy is busy


def test_an_energy_counter_goes_on_past_its_limit(tmp_path: Path) -> None:
    def zone(name: str, kind: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "name").write_text(f"{kind}\n")
        (folder / "max_energy_range_uj").write_text("10000000\n")
        (folder / "energy_uj").write_text("9000000\n")
        return folder / "energy_uj"

    package, memory = zone("intel-rapl:0", "package-0"), zone("intel-rapl:0:2", "dram")
    zone("intel-rapl:0:0", "core")  # is part of the package
    counters = Rapl(tmp_path)
    assert counters.joules() == 0
    package.write_text("1000000\n")  # 2 J later
    memory.write_text("9500000\n")
    assert counters.joules() == pytest.approx(2.5)
    assert Rapl(tmp_path / "nothing").joules() is None


class Library:
    """NVIDIA's library with two GPUs, one of which cannot count its energy."""

    NVMLError = RuntimeError
    used: ClassVar = {"a": 3 * MIB, "b": MIB}

    def __init__(self, counts: bool) -> None:
        self.counts = counts

    def nvmlInit(self) -> None: ...  # noqa: N802

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:  # noqa: N802
        return "ab"[index]

    def nvmlDeviceGetHandleByUUID(self, name: str) -> str:  # noqa: N802
        return name.removeprefix("GPU-")

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(gpu={"a": 90, "b": 50}[handle])

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(used=self.used[handle])

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:  # noqa: N802
        if not self.counts:
            raise RuntimeError("not supported")
        return {"a": 2000, "b": 500}[handle]


@pytest.mark.parametrize("counts", [True, False])
def test_gpus_tell_load_memory_and_energy(monkeypatch: pytest.MonkeyPatch, counts: bool) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Library(counts))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-b,GPU-a")
    gpus = Gpus(2)
    assert gpus.now() == (pytest.approx(0.7), 4 * MIB)
    assert gpus.joules() == (2.5 if counts else None)
    assert Gpus(1).now() == (pytest.approx(0.5), MIB)
    assert Gpus(0).now() is None


def test_the_gpus_are_those_that_cuda_may_use() -> None:
    assert visible_gpus(2, {}) == ["0", "1"]
    assert visible_gpus(1, {"CUDA_VISIBLE_DEVICES": "3,5"}) == ["3"]
