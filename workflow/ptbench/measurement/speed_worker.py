"""A process in a framework's environment that measures whenever it is asked to.

    python -m ptbench.measurement.speed_worker '{"class": "...", "framework": "...", "threads": 2}'

`benchmark.py` is the other end. Requests are lines of JSON on standard input, answers lines of JSON
on what was standard output; everything else that is printed goes to standard error. This module
imports the standard library alone until NumPy's number of threads is set.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from typing import Any

from ptbench.isolation import isolate

WARM_UP_STEPS = 3


def main() -> None:
    """Make what the task names, say its settings, and answer requests until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(content: Any) -> None:
        print(json.dumps(content), file=answers, flush=True)

    task = json.loads(sys.argv[1])
    isolate(task["framework"], task["threads"])
    module, _, name = task["class"].partition(":")
    worker = getattr(importlib.import_module(module), name)(task)
    if hasattr(worker, "train"):
        for _ in range(WARM_UP_STEPS):
            worker.train(0.0)
    answer(worker.settings() if hasattr(worker, "settings") else {})
    for line in sys.stdin:
        request = json.loads(line)
        if "product" in request:
            answer(worker.rate(request["product"], request["seconds"]))
        else:
            measured = worker.train(request["seconds"])
            answer(measured | {"peak_memory_bytes": worker.peak_memory()})


if __name__ == "__main__":
    main()
