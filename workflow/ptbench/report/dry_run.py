"""What a dry run prints: no banner, and of a large study a line for each experiment."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from snakemake.settings.enums import Quietness

from ptbench.configuration.specification import Cell

FEW = 100  # jobs that are listed one by one
# What Snakemake says, and nobody needs: a dry run locks no folder, and why a run trains again is in
# the reasons of its job.
LEFT_OUT = (
    "Error: Directory cannot be locked", "Some jobs were triggered by provenance",
    "Rules with provenance triggered jobs",
)  # fmt: skip
LISTED = "A line for each experiment, because the jobs are many; --quiet host lists every job."


class Brief(logging.Filter):
    """A filter that leaves out of a dry run Snakemake's banner, and what else nobody needs."""

    def __init__(self, counted_once: bool) -> None:
        """Say whether the numbers of jobs are printed once, because there is no list of jobs."""
        super().__init__()
        self.counted_once, self.counted = counted_once, False

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a record is printed."""
        event = getattr(record, "event", None)
        if event == "run_info":
            again, self.counted = self.counted, True
            return not (again and self.counted_once)
        return event != "workflow_started" and not record.getMessage().startswith(LEFT_OUT)


class Summary(logging.Filter):
    """A filter of Snakemake's log that sums up the jobs, and ends a dry run that has many.

    Snakemake counts the jobs when it has found them all. To print them one by one takes it as long
    again as to find them.
    """

    def __init__(self, workflow: Any, experiments: Mapping[str, Sequence[Cell]]) -> None:
        """Take Snakemake's workflow and the cells of each experiment."""
        super().__init__()
        self.workflow = workflow
        self.experiments = experiments

    def filter(self, record: logging.LogRecord) -> bool:
        """Return True: all is printed, the numbers of jobs with what this says of them."""
        if getattr(record, "event", None) == "run_info":
            jobs = list(self.workflow.dag.needrun_jobs())
            if len(jobs) > FEW:
                record.msg = f"{record.msg}\n{self.table(jobs)}\n{self.reasons(jobs)}"
                # With these, Snakemake ends a dry run here.
                self.workflow.output_settings.quiet = {Quietness.RULES, Quietness.PROGRESS}
        return True

    def table(self, jobs: Sequence[Any]) -> str:
        """Return how many cells of each experiment would run."""
        outputs = {str(file) for job in jobs for file in job.output}
        width = max(map(len, self.experiments))
        lines = [LISTED, "", f"{'experiment':{width}}  cells to run  of"]
        for name, cells in self.experiments.items():
            left = sum(f"results/cells/{cell.path}/metrics.json" in outputs for cell in cells)
            lines.append(f"{name:{width}}  {left:12}  {len(cells)}")
        return "\n".join(lines) + "\n"

    def reasons(self, jobs: Sequence[Any]) -> str:
        """Return how many jobs run for each reason that Snakemake has."""
        dag = self.workflow.dag
        counts = Counter(reason for job in jobs for reason in dag.reason(job).get_names())
        lines = [f"{count:7}  {reason}" for reason, count in counts.most_common()]
        return "\n".join(["reasons, and jobs that have them", *lines, "", "Nothing was run."])
