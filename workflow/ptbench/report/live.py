"""What a run of the workflow shows: how far it is, what is running, what failed.

On a terminal it is a display that changes in place; elsewhere, a line for each job that has ended.
What a running cell says is read from the end of its log, so that it is the same on a cluster.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ptbench.training.attempts import look

REFRESH = 2.0  # pictures a second
SHOWN = 12  # running jobs in the display
TAIL = 4096  # bytes of a log's end
PACE = 10.0  # seconds between two looks at how far all runs are
FEW = 0.02  # share of each running run, from which on their pace is known
EPOCH = re.compile(r"\] epoch (\d+)/(\d+)  (?:(\d+)%)?")  # of a line that a cell says
SAYS = 50  # columns that such a line takes
NOISE = (  # what Snakemake says of itself
    "Assuming unrestricted", "Building DAG", "Using shell", "Provided ", "Rules claiming",
    "Conda environments", "Select jobs", "Complete log", "Job stats", "no more jobs", "Singularity",
    "Trying to restart", "SLURM run ID", "Cleaning up SLURM", "Unable to guess SLURM account",
    "Touching output", "MinJobAge", "Checking that storage", "host:",
)  # fmt: skip
# How Snakemake repeats the whole command of a job that it has just reported as failed.
REPEATED = "RuleException:\nCalledProcessError"
SUBMITTED = "has been submitted with SLURM"
# Of one job of each rule, and of several.
NAMES = {
    "train": ("run", "runs"),
    "profile": ("profile", "profiles"),
    "environment": ("environment", "environments"),
    "corpus": ("corpus", "corpora"),
    "analyse": ("experiment to analyse", "experiments to analyse"),
    "answer": ("document to answer", "documents to answer"),
}
DONE = {
    "environment": "the environment of {framework} is ready",
    "corpus": "corpus {corpus_folder} is ready",
    "analyse": "experiment {experiment} is analysed",
    "answer": "document {paper} is answered",
    "profile": "{variant} in {framework}, devices {devices}, is profiled",
    "report": "the report is made",
}


@dataclass
class Job:
    """A job that Snakemake has started or submitted."""

    rule: str
    wildcards: Mapping[str, str]
    outputs: Sequence[str]
    logs: Sequence[str]
    began: float  # monotonic clock [s]
    started: float = field(default_factory=time.time)  # seconds since 1970
    short: str = ""  # what its variant is called, if that is not its name

    @property
    def name(self) -> str:
        """What it is called: a cell by its variant, framework, devices and seed."""
        own = self.wildcards
        if self.rule != "train":
            return " ".join([self.rule, *(own[key] for key in own if key != "digest")])
        devices = "" if own["devices"] == "1" else f" devices {own['devices']}"
        return f"{self.short or own['variant']} {own['framework']}{devices} seed {own['seed']}"

    @property
    def has_log(self) -> bool:
        """Whether it has begun to write a log."""
        return bool(self.logs) and Path(self.logs[0]).exists()

    @property
    def cell(self) -> str:
        """Path of the cell that it trains, relative to `results/cells`."""
        return "/".join(Path(self.outputs[0]).parts[-5:-1])

    @property
    def was_interrupted(self) -> bool:
        """Whether it is a cell whose newest attempt was told to end, and saved."""
        if self.rule != "train":
            return False
        seen = look(Path(self.outputs[0]).parents[5] / "attempts" / self.cell)
        if seen is None or seen.status != "interrupted" or not seen.record.ended:
            return False
        # One that ended before this job began says nothing of it.
        return datetime.fromisoformat(seen.record.ended).timestamp() >= self.started - 1

    def said(self) -> str:
        """Return the newest line of its log, without its name."""
        # Frameworks write lines of their own beside those that name the cell.
        mark = f"[{self.wildcards['variant']}" if self.rule == "train" else ""
        lines = newest_lines(Path(self.logs[0])) if self.logs else []
        newest = next((line for line in lines if line.startswith(mark) and line.strip()), "")
        return newest.partition("] ")[2] if newest.startswith("[") else newest


def newest_lines(log: Path) -> list[str]:
    """Return the whole lines at the end of a log, the newest first; none if it cannot be read."""
    with contextlib.suppress(OSError), log.open("rb") as file:
        file.seek(max(file.seek(0, os.SEEK_END) - TAIL, 0))
        return re.split(r"[\r\n]", file.read().decode(errors="replace"))[-2::-1]
    return []


def share_done(log: Path) -> float:
    """Return which share of its epochs a run has trained, by its log."""
    return _first_said(newest_lines(log))


def first_share(log: Path) -> float:
    """Return the share of its epochs that a run's log says first: where the attempt began."""
    try:
        with log.open(errors="replace") as file:
            return _first_said(file)
    except OSError:
        return 0.0


def _first_said(lines: Iterable[str]) -> float:
    """Return the share of the first line that says one."""
    for line in lines:
        if found := EPOCH.search(line):
            epoch, epochs, percent = found.groups()
            return (int(epoch) - (1 - int(percent) / 100 if percent else 0)) / int(epochs)
    return 0.0


@dataclass
class Progress:
    """How far a run of the workflow is."""

    total: Counter[str] = field(default_factory=Counter)  # jobs by rule
    done: Counter[str] = field(default_factory=Counter)
    running: dict[int, Job] = field(default_factory=dict)  # by Snakemake's number
    failed: dict[str, Job] = field(default_factory=dict)  # by name
    began: float = field(default_factory=time.monotonic)
    first: tuple[float, float] | None = None  # when a run first said how far it is; runs done then
    look_again: float = 0.0  # when the time left is to be estimated again
    estimate: float | None = None  # of the time left [s]

    def summary(self) -> str:
        """Say what there is to do."""
        parts = []
        for rule, (one, several) in NAMES.items():
            if count := self.total[rule]:
                parts.append(f"{count:,} {one if count == 1 else several}")
        return "To do: " + (", ".join(parts) or "one step")

    def left(self) -> float | None:
        """Return the seconds that the runs still take at the pace so far; None: unknown.

        Running ones count by their share done. The pace is taken from when the first of them said
        how far it is, so waiting in a queue and building environments are no part of it.
        """
        now, total = time.monotonic(), self.total["train"]
        if now < self.look_again:
            return self.estimate
        self.look_again = now + PACE
        logs = [Path(job.logs[0]) for job in self.running.values() if job.rule == "train"]
        shares = list(filter(None, map(share_done, logs)))
        done = self.done["train"] + sum(shares)
        if self.first is None and done:
            self.first = now, done
        began, before = self.first or (now, done)
        known = total > done >= before + FEW * max(len(shares), 1)
        self.estimate = (now - began) / (done - before) * (total - done) if known else None
        return self.estimate

    def ended(self, job: Job) -> str:
        """Return the line of a job that ended well; empty for one that nobody waits for."""
        seconds = duration(time.monotonic() - job.began)
        if job.rule == "train":
            count = f"{self.done['train']:,} of {self.total['train']:,}"
            return f"{count}  {job.name}: {result(Path(job.outputs[0]))}, {seconds}"
        if job.rule in DONE:
            return f"{DONE[job.rule].format(**job.wildcards)}, {seconds}"
        return ""


def result(metrics: Path) -> str:
    """Say in a few words what came out of a cell."""
    try:
        found = json.loads(metrics.read_bytes())
        if found["status"] == "diverged":
            return "diverged"
        speed = found["tokens_per_second"]
        said = f"test perplexity {found['test']['perplexity']:,.2f}"
    except (OSError, ValueError, KeyError, TypeError):
        return "done"
    return said + (f", {speed:,.0f} tokens/s" if speed else "")


def duration(seconds: float) -> str:
    """Write a time as people read it: 8 s, 3 min 20 s, 5 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60} min"


class Display(logging.Handler):
    """A handler of Snakemake's log that shows progress."""

    current: Display | None = None  # that of this process, for `finish`

    def __init__(self, stream: TextIO, quiet: set[str], colours: bool = True) -> None:
        """Show nothing yet.

        Args:
            stream: where to show it.
            quiet: what Snakemake's --quiet names: `all` leaves errors, `progress` leaves out what
                has ended.
            colours: whether they may be used.
        """
        super().__init__()
        self.console = Console(file=stream, highlight=False, no_color=not colours)
        self.progress = Progress()
        self.trials: Mapping[str, str] = {}  # what they are called, by cell
        self.silent = bool(quiet & {"all", "progress"})
        self.seen = threading.Event()  # set when `finish`'s record has come through
        self.live: Live | None = None
        Display.current = self

    def emit(self, record: logging.LogRecord) -> None:
        """Take in one of Snakemake's records, and say what there is to say."""
        try:
            event = str(getattr(record, "event", None) or "")
            act = getattr(self, f"on_{event}", None)
            if act is not None:
                act(record)
            elif record.getMessage().startswith(REPEATED):
                pass
            elif record.levelno >= logging.WARNING or event == "error":
                self.say(record.getMessage(), style="red" if record.levelno >= 40 else "yellow")
            elif not event and not self.silent:
                self.on_words(record.getMessage())
        except Exception:
            self.handleError(record)

    def on_words(self, words: str) -> None:
        """Pass on what Snakemake says, but for its noise."""
        if words and not words.startswith(NOISE) and SUBMITTED not in words and words != "None":
            self.say(words)

    def on_workflow_started(self, _: logging.LogRecord) -> None:
        """Leave out versions and paths, which the full log has."""

    on_progress = on_job_started = on_resources_info = on_shellcmd = on_debug_dag = on_rulegraph = (
        on_workflow_started
    )

    def on_run_info(self, record: logging.LogRecord) -> None:
        """Begin: it is known what there is to do."""
        stats: dict[str, int] = record.__dict__["stats"]
        self.progress.total = Counter({k: v for k, v in stats.items() if k != "total"})
        if self.silent:
            return
        self.say(self.progress.summary())
        if self.console.is_terminal and not self.live:
            self.live = Live(
                get_renderable=self.picture, console=self.console, refresh_per_second=REFRESH,
                transient=True,
            )  # fmt: skip
            self.live.start()

    def on_job_info(self, record: logging.LogRecord) -> None:
        """Note a job that begins."""
        facts = record.__dict__
        wildcards = dict(facts["wildcards"].items()) if facts["wildcards"] else {}
        job = Job(facts["rule_name"], wildcards, facts["output"], facts["log"], time.monotonic())
        if job.rule == "train":
            job.short = self.trials.get(job.cell, "")
        self.progress.running[facts["jobid"]] = job
        self.progress.failed.pop(job.name, None)  # it is tried again

    def on_job_finished(self, record: logging.LogRecord) -> None:
        """Say what came of a job."""
        job = self.progress.running.pop(record.__dict__["job_id"], None)
        if job is None:
            return
        self.progress.done[job.rule] += 1
        line = self.progress.ended(job)
        if line and not self.silent:
            self.say(line)

    def on_job_error(self, record: logging.LogRecord) -> None:
        """Say that a job failed, and where to read why."""
        facts = record.__dict__
        job = self.progress.running.pop(facts["jobid"], None)
        if job is None:
            self.say(f"{facts['rule_name']} failed", style="red")
            return
        if job.was_interrupted:
            self.say(f"{job.name} was interrupted; it goes on from its last checkpoint")
            return
        self.progress.failed[job.name] = job
        log = f"; see {job.logs[0]}" if job.logs else ""
        self.say(f"{job.name} failed{log}", style="red")

    def on_ptbench_end(self, _: logging.LogRecord) -> None:
        """Take the display away: the rest of the run prints by itself."""
        try:
            self.close()
        finally:
            self.seen.set()

    def say(self, words: str, style: str = "") -> None:
        """Print a line, above the display where there is one."""
        self.console.print(Text(words, style=style), soft_wrap=True)

    def picture(self) -> Group:
        """Return the display as it is now."""
        progress = self.progress
        done, total = progress.done["train"], progress.total["train"]
        head = f"{done:,} of {total:,} runs" if total else "no runs"
        if progress.failed:
            head += f", {len(progress.failed):,} failed"
        head += f", {duration(time.monotonic() - progress.began)} gone"
        if (left := progress.left()) is not None:
            head += f", about {duration(left)} left"
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True, overflow="ellipsis")
        table.add_column(no_wrap=True, overflow="ellipsis", style="dim")
        # Snakemake calls a job of Slurm's running once it is queued: those with a log come first.
        jobs = sorted(progress.running.values(), key=lambda job: not job.has_log)
        half = max(self.console.width - SAYS, 20) // 2  # of the room that a name has
        for job in jobs[:SHOWN]:
            said = job.said() or duration(time.monotonic() - job.began)
            long = len(job.name) > 2 * half
            name = f"{job.name[: half - 1]}…{job.name[-half:]}" if long else job.name
            table.add_row(Text(name), Text(said))
        if len(jobs) > SHOWN:
            table.add_row(f"and {len(jobs) - SHOWN:,} more", "")
        bar = Table.grid()
        bar.add_row(ProgressBar(total=max(total, 1), completed=done, width=60))
        return Group(Text(head, style="bold"), bar, table)

    def close(self) -> None:
        """Take the display away."""
        if self.live:
            self.live.stop()
            self.live = None
        super().close()


def name_trials(names: Mapping[str, str]) -> None:
    """Call the trials of searches by short names in what is shown from now on.

    Args:
        names: by cell.
    """
    if Display.current:
        Display.current.trials = names


def finish(logger: logging.Logger) -> None:
    """End the display once it has shown all that was logged, and return then.

    Snakemake hands records over in a queue, so the last ones may still be on their way.
    """
    display = Display.current
    if display is None:
        return
    logger.info("", extra={"event": "ptbench_end"})
    display.seen.wait(timeout=5)
