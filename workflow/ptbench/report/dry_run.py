"""What a dry run of a large study prints: a line for each experiment, not a page for each job."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from ptbench.configuration.specification import Cell

FEW = 100  # jobs that are listed one by one
LISTED = "A line for each experiment, because the jobs are many; --quiet host lists every job."


class Summary(logging.Filter):
    """A filter of Snakemake's log that takes out the paragraphs of jobs, and counts them."""

    def __init__(self, experiments: Mapping[str, Sequence[Cell]]) -> None:
        """Take the cells of each experiment."""
        super().__init__()
        self.experiments = experiments
        self.jobs = 0
        self.cells: set[str] = set()  # their outputs

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether to print a record; the last table of Snakemake's gets one more."""
        event = getattr(record, "event", None)
        if event == "run_info":
            if self.cells:
                record.msg = f"{record.msg}\n{self.table()}"
            self.jobs = record.__dict__["stats"].get("total", 0)
        elif self.jobs <= FEW:
            return True
        elif event == "job_info":
            self.cells |= {file for file in record.__dict__["output"] if "/cells/" in file}
            return False
        return event != "shellcmd"

    def table(self) -> str:
        """Return how many cells of each experiment would run."""
        width = max(map(len, self.experiments))
        lines = [LISTED, "", f"{'experiment':{width}}  cells to run  of"]
        for name, cells in self.experiments.items():
            left = sum(f"results/cells/{cell.path}/metrics.json" in self.cells for cell in cells)
            lines.append(f"{name:{width}}  {left:12}  {len(cells)}")
        return "\n".join(lines) + "\n"
