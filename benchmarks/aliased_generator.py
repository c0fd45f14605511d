"""Run Keras 2.1.3's generator queue again, and count the rows whose inputs and targets disagree.

`fit_generator` of Keras 2.1.3 has one thread that calls the generator while fewer than ten batches
wait, and looks again after 10 ms where ten do (`GeneratorEnqueuer`). The generator of Singh 2018
fills the same two arrays for every batch, row by row. TensorFlow 1.4 copies what it is fed to
float32: the inputs, then the targets. Here are that thread, that generator and that copy; a sleep
stands for the GPU. Everything is measured three times: with glibc's `malloc` as it is, which takes
new pages from the system for every copy of more than 32 MiB; with pages of 2 MiB instead of 4 KiB;
and with that bound at 1 GiB.

    uv run python benchmarks/aliased_generator.py --output queue.csv
"""

from __future__ import annotations

import argparse
import csv
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

# Before NumPy is imported: NumPy of 2018 did not ask for huge pages.
os.environ.setdefault("NUMPY_MADVISE_HUGEPAGE", "0")

import numpy as np

VOCABULARY = 10_000
WAITING = 10  # batches, `max_queue_size`
POLL = 0.01  # s, `wait_time`


class Buffers:
    """The generator: two arrays, filled again for every batch; the word is the batch's number."""

    def __init__(self, batch_size: int, length: int) -> None:
        self.inputs = np.zeros((batch_size, length))
        self.targets = np.zeros((batch_size, length, VOCABULARY))
        self.number = 0
        self.fill_seconds: list[float] = []

    def batches(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        while True:
            begin = time.perf_counter()
            for row in range(len(self.inputs)):
                self.inputs[row, :] = self.number
                one_hot = np.zeros((self.inputs.shape[1], VOCABULARY))  # to_categorical
                one_hot[:, self.number % VOCABULARY] = 1
                self.targets[row, :, :] = one_hot
            self.number += 1
            self.fill_seconds.append(time.perf_counter() - begin)
            yield self.inputs, self.targets


def measure(batch_size: int, length: int, gpu_seconds: float, steps: int) -> dict[str, float]:
    """Return how often rows disagree, and the times of filling and of copying [s]."""
    buffers = Buffers(batch_size, length)
    batches = buffers.batches()
    waiting: queue.Queue[tuple[np.ndarray, np.ndarray]] = queue.Queue(WAITING)
    stop = threading.Event()

    def enqueue() -> None:
        while not stop.is_set():
            if waiting.qsize() < WAITING:
                waiting.put(next(batches))
            else:
                time.sleep(POLL)

    thread = threading.Thread(target=enqueue, daemon=True)
    thread.start()
    while waiting.qsize() < WAITING:
        time.sleep(POLL)
    disagree, copies, lags, full = [], [], [], []
    seen = steps // 5  # settle first
    for step in range(seen + steps):
        while waiting.empty():
            time.sleep(POLL)
        full.append(waiting.qsize() == WAITING)
        inputs, targets = waiting.get()
        begin = time.perf_counter()
        fed_inputs = np.asarray(inputs, np.int32)
        fed_targets = np.asarray(targets, np.float32)
        copies.append(time.perf_counter() - begin)
        numbers = fed_inputs[:, 0] % VOCABULARY
        # which batch each row's targets are of: at its first and at its last word
        right = fed_targets[np.arange(batch_size), 0, numbers] == 1
        right &= fed_targets[np.arange(batch_size), -1, numbers] == 1
        disagree.append(1 - right.mean())
        lags.append(float(fed_inputs[:, 0].mean()) - step)
        del fed_targets
        time.sleep(gpu_seconds)
    stop.set()
    thread.join()
    return {
        "batch_size": batch_size,
        "length": length,
        "tokens": batch_size * length,
        "gpu_milliseconds": 1e3 * gpu_seconds,
        "fill_milliseconds": 1e3 * float(np.median(buffers.fill_seconds)),
        "copy_milliseconds": 1e3 * float(np.median(copies[seen:])),
        "queue_full": float(np.mean(full[seen:])),
        "batches_ahead": float(np.mean(lags[seen:])),
        "steps_mixed": float(np.mean(np.array(disagree[seen:]) > 0)),
        "rows_mixed": float(np.mean(disagree[seen:])),
    }


SHAPES = [(5, 35), (10, 35), (20, 25), (20, 35), (24, 35), (20, 45), (20, 55), (50, 35)]
MEMORY = {
    "new pages": {},
    "new huge pages": {"NUMPY_MADVISE_HUGEPAGE": "1"},
    "used again": {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**32)},
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--gpu", type=float, default=1e-4, help="of a step [s/token]")
    parser.add_argument("--memory", choices=MEMORY, help="measure with this alone")
    asked = parser.parse_args()
    if not asked.memory:
        asked.output.unlink(missing_ok=True)
        for memory, variables in MEMORY.items():
            command = [sys.executable, *sys.argv, "--memory", memory]
            subprocess.run(command, check=True, env=os.environ | variables)
        sys.exit()
    rows = []
    for batch_size, length in SHAPES:
        row = measure(batch_size, length, asked.gpu * batch_size * length, asked.steps)
        rows.append(
            {"memory": asked.memory} | {name: round(value, 4) for name, value in row.items()}
        )
        print(rows[-1], flush=True)
    new = not asked.output.exists()
    with asked.output.open("a", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)
