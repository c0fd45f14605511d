"""What a run does to its machine: cores, memory, GPUs and energy, sampled about once a second.

One sampler for all frameworks: a thread of the training process that asks the system (psutil), the
GPUs (NVML), and the processor's energy counters (RAPL, where they may be read).
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import psutil

from ptbench.training.devices import LISTS, device_list
from ptbench.training.records import Hardware

INTERVAL = 1.0  # seconds between two samples
PROCESSES_EVERY = 30  # samples between two looks at the list of processes, which take the longest
MAXIMA = ("gpu_memory_bytes", "cells_at_once")  # the other totals are sums over time
POWERCAP = Path("/sys/class/powercap")


class Sampler:
    """Samples while its block runs: `with sampler: ...`; `hardware` says what it found.

    All that it keeps are sums over time and maxima, in `totals`. An attempt that goes on from a
    checkpoint adds those of the attempts before it.
    """

    def __init__(self, threads: int, gpus: int = 0, interval: float = INTERVAL) -> None:
        """Take what is known of the run.

        Args:
            threads: CPU threads that it was given.
            gpus: how many it trains on.
            interval: between two samples [s].
        """
        self.threads, self.interval = threads, interval
        self.totals: dict[str, float] = defaultdict(float)
        self.processes = [psutil.Process()]
        self.gpus, self.energy = Gpus(gpus), Rapl()
        self.samples = 0
        self.stopped = threading.Event()
        self.last: Reading | None = None
        self.cells_known = True  # whether all attempts looked for other cells

    def __enter__(self) -> Sampler:
        self.last = self.read()
        self.thread = threading.Thread(target=self.work, name="hardware", daemon=True)
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.stopped.set()
        self.thread.join()
        self.maximum("cells_at_once", cells_at_once())

    def work(self) -> None:
        """Sample until the block has ended, and once more."""
        ended = False
        while not ended:
            ended = self.stopped.wait(self.interval)
            before = time.thread_time()
            self.sample()
            self.totals["sampling_seconds"] += time.thread_time() - before

    def sample(self) -> None:
        """Add what happened since the last sample."""
        assert self.last is not None
        before, now, totals = self.last, self.read(), self.totals
        self.last = now
        seconds = now.time - before.time
        own = sum(
            max(spent - before.own.get(pid, spent), 0.0) for pid, spent in now.own.items()
        )  # a process that is new or has ended counts from its second reading to its last
        totals["seconds"] += seconds
        totals["own_seconds"] += own
        totals["other_seconds"] += max(now.machine - before.machine - own, 0.0)
        totals["byte_seconds"] += seconds * now.memory
        for counter in now.joules.keys() & before.joules.keys():
            totals[counter] += now.joules[counter] - before.joules[counter]
        if gpus := self.gpus.now():
            totals["gpu_seconds"] += seconds * gpus.utilization
            self.maximum("gpu_memory_bytes", gpus.memory)

    def read(self) -> Reading:
        """Return the counters as they are now."""
        if self.samples % PROCESSES_EVERY == 0:
            own = psutil.Process()
            with contextlib.suppress(psutil.Error):  # a system that hides processes
                self.processes = [own, *own.children(recursive=True)]
            self.maximum("cells_at_once", cells_at_once())
        self.samples += 1
        spent, memory = {}, 0
        for process in self.processes:
            with contextlib.suppress(psutil.Error):  # it has ended
                times = process.cpu_times()
                spent[process.pid] = times.user + times.system
                memory += process.memory_info().rss
        joules = {"gpu_joules": self.gpus.joules(), "cpu_joules": self.energy.joules()}
        known = {name: value for name, value in joules.items() if value is not None}
        return Reading(time.perf_counter(), spent, busy_seconds(), memory, known)

    def add(self, totals: Mapping[str, float]) -> None:
        """Add what the attempts before this one found."""
        self.cells_known &= "cells_at_once" in totals
        for name, value in totals.items():
            if name in MAXIMA:
                self.maximum(name, value)
            else:
                self.totals[name] += value

    def maximum(self, name: str, value: float) -> None:
        """Keep the largest of a total's values."""
        self.totals[name] = max(self.totals[name], value)

    def hardware(self) -> Hardware | None:
        """Return what was found; None if nothing was sampled."""
        totals = self.totals
        seconds = totals.get("seconds", 0.0)
        if not seconds:
            return None
        has_gpus = "gpu_seconds" in totals
        return Hardware(
            seconds=seconds,
            cores=psutil.cpu_count() or 1,
            threads=self.threads,
            own_cores=totals["own_seconds"] / seconds,
            other_cores=totals["other_seconds"] / seconds,
            memory_bytes=round(totals["byte_seconds"] / seconds),
            sampling_seconds=totals["sampling_seconds"],
            cells_at_once=round(totals["cells_at_once"]) if self.cells_known else None,
            gpu_utilization=totals["gpu_seconds"] / seconds if has_gpus else None,
            gpu_memory_bytes=round(totals["gpu_memory_bytes"]) if has_gpus else None,
            gpu_joules=totals.get("gpu_joules"),
            cpu_joules=totals.get("cpu_joules"),
        )


def cells_at_once() -> int:
    """Return how many cells this machine is training now, this one counted."""
    count = 0
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        # as the workflow calls it: python -m ptbench train ...
        count += words[1:4] == ["-m", "ptbench", "train"]
    return max(count, 1)


class Reading(NamedTuple):
    """Counters at one time."""

    time: float  # [s]
    own: dict[int, float]  # processor time of the run's processes [s]
    machine: float  # processor time of all processes, and what a hypervisor took [s]
    memory: int  # resident memory of the run's processes [bytes]
    joules: dict[str, float]  # of the energy counters that there are


def busy_seconds() -> float:
    """Return the time that all of the machine's cores were busy so far [s]."""
    times: dict[str, float] = psutil.cpu_times()._asdict()
    idle = ("idle", "iowait", "guest", "guest_nice")  # guests are part of user and nice
    return sum(seconds for kind, seconds in times.items() if kind not in idle)


class GpuReading(NamedTuple):
    """The run's GPUs at one time."""

    utilization: float  # mean share of the last interval in which they had work
    memory: int  # in use on all of them [bytes]


class Gpus:
    """A run's GPUs, as NVIDIA's library sees them; without them it has nothing to say."""

    def __init__(self, count: int) -> None:
        """Find the first `count` GPUs of those that the process may use."""
        self.handles: list[Any] = []
        if count:
            with quietly():
                import pynvml

                pynvml.nvmlInit()
                self.nvml = pynvml
                self.handles = [self.handle(name) for name in visible_gpus(count)]

    def handle(self, name: str) -> Any:
        """Return the library's own name of a GPU that CUDA_VISIBLE_DEVICES names."""
        if name.isdecimal():
            return self.nvml.nvmlDeviceGetHandleByIndex(int(name))
        return self.nvml.nvmlDeviceGetHandleByUUID(name)

    def now(self) -> GpuReading | None:
        """Return their load and memory; None if they do not tell."""
        with quietly():
            if self.handles:
                loads = [self.nvml.nvmlDeviceGetUtilizationRates(h).gpu for h in self.handles]
                used = [self.nvml.nvmlDeviceGetMemoryInfo(h).used for h in self.handles]
                return GpuReading(sum(loads) / len(loads) / 100, sum(used))
        return None

    def joules(self) -> float | None:
        """Return their energy since the driver was loaded [J]; None if they do not tell."""
        with quietly():
            if self.handles:
                counters = map(self.nvml.nvmlDeviceGetTotalEnergyConsumption, self.handles)
                return float(sum(counters)) / 1e3
        return None


def visible_gpus(count: int, environment: Mapping[str, str] = os.environ) -> list[str]:
    """Return the indices or identifiers of the first `count` GPUs that CUDA may use."""
    name = next((name for name in LISTS if name in environment), None)
    found = device_list(environment[name]) if name else []
    return found[:count] or [str(index) for index in range(count)]


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Leave a block if NVIDIA's library is not there, or cannot tell something."""
    known: list[type[Exception]] = [ImportError]
    with contextlib.suppress(ImportError):
        from pynvml import NVMLError

        known.append(NVMLError)
    with contextlib.suppress(*known):
        yield


class Rapl:
    """The energy counters of the processor's packages and of their memory, all processes' use."""

    def __init__(self, folder: Path = POWERCAP) -> None:
        """Find the counters that this user may read."""
        self.counters = []
        for zone in sorted(folder.glob("intel-rapl:*")):
            with contextlib.suppress(OSError, ValueError):
                name = (zone / "name").read_text().strip()
                if name.startswith("package") or name == "dram":
                    self.counters.append(Counter(zone))

    def joules(self) -> float | None:
        """Return what was used since the counters were found [J]; None without counters."""
        try:
            return sum(counter.joules() for counter in self.counters) if self.counters else None
        except (OSError, ValueError):
            return None


class Counter:
    """One energy counter, which begins again at its limit."""

    def __init__(self, zone: Path) -> None:
        """Read it for the first time.

        Raises:
            OSError: if this user may not.
        """
        self.file = zone / "energy_uj"
        self.limit = int((zone / "max_energy_range_uj").read_text())
        self.last, self.total = self.microjoules(), 0

    def microjoules(self) -> int:
        """Return what it shows."""
        return int(self.file.read_text())

    def joules(self) -> float:
        """Return what was added since the first reading [J]."""
        now = self.microjoules()
        self.total += now - self.last if now >= self.last else now + self.limit - self.last
        self.last = now
        return self.total / 1e6
