"""A process in a framework's environment that trains many cells, one after another.

    PYTHONPATH=workflow python -m tests.support.smoke TASKS

Starting a framework takes seconds, and a cell of a few steps hardly any, so cells that a study
would train in processes of their own share one here. TASKS is a JSON file: a list of cells' fields,
each with its `specification`, and the folders `results` and `corpus`. A line of JSON says of each
cell how long it took and what was wrong. The process ends after a failed cell, which may have left
replicas behind.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any


def train(task: dict[str, Any]) -> None:
    """Train one cell as `ptbench train` does."""
    from ptbench.configuration.specification import Cell
    from ptbench.training.cell import Paths, read_specification, run_cell

    fields = ("variant", "framework", "devices", "seed")
    cell = Cell.model_validate({field: task[field] for field in fields})
    results = Path(task["results"])
    paths = Paths(
        Path(task["corpus"]),
        *(results / kind / cell.path for kind in ("cells", "attempts", "checkpoints")),
    )
    run_cell(
        cell, read_specification(task["specification"]), paths, cell.devices,
        say=lambda _: None, keep="none",
    )  # fmt: skip


def main(tasks: list[dict[str, Any]]) -> None:
    """Train the cells, all of one framework on as many devices."""
    from ptbench.isolation import isolate

    isolate(tasks[0]["framework"], tasks[0]["devices"], tasks[0]["devices"])
    for task in tasks:
        began, wrong = time.monotonic(), None
        try:
            train(task)
        except Exception:
            wrong = traceback.format_exc()
        print(json.dumps({"seconds": time.monotonic() - began, "wrong": wrong}), flush=True)
        if wrong:
            break


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
