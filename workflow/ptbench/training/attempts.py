"""The attempts at a cell: which process trains it, which did before, and how each attempt ended.

A cell's folder under `results/attempts` keeps for its N-th attempt

- `attempt-N.json`, written at its start with status `running` and again at its end,
- `attempt-N.log`, all that it printed,
- `attempt-N.failure.json`, if it failed or was killed.

The newest record is also the cell's lock. A process that wants the cell makes the next record,
which only one process can do, and may do so only if the newest attempt has ended or its process is
dead. Numbers are never used again, so that a new holder cannot be mistaken for a dead one.

Snakemake deletes `metrics.json` before it runs a job, even if the job repeats one that has just
finished. The record of a finished attempt therefore keeps the metrics too; see `Attempt.finished`.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import re
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field, ValidationError

from ptbench.errors import InterruptionError, PtbenchError
from ptbench.files import folders_above, overwrite, write_atomically, write_new
from ptbench.model.recipe import Model
from ptbench.training import holders
from ptbench.training.failures import reason_of, reason_of_death, tail_of
from ptbench.training.holders import Holder, this_process
from ptbench.training.records import Metrics

POLL_SECONDS = 5.0  # between two looks at another process's attempt
UNKNOWN = "an unknown host"
KILLED_OFTEN = 3  # attempts, that it is no accident: most likely out of memory each time

Status = Literal["running", "finished", "failed", "interrupted", "killed"]


class Record(Model):
    """`attempt-N.json`."""

    attempt: int = Field(description="Counted from 1, over all runs of the cell.")
    cell: str = Field(description="Path of the cell.")
    fingerprint: str = Field(description="Of the specification.")
    corpus: str = Field(description="Of the corpus' tokens.")
    status: Status = Field(description="`running` until it is closed, or found to be killed.")
    reason: str | None = Field(None, description="Why it did not finish, in one line.")
    holder: Holder = Field(description="The process.")
    started: str = Field(description="When it began (UTC).")
    ended: str | None = Field(None, description="When it ended (UTC); killed: last sign of life.")
    metrics: dict[str, Any] | None = Field(
        None, description="Of a finished attempt: the result, as in `metrics.json`."
    )


class Failure(Model):
    """`attempt-N.failure.json`."""

    attempt: int = Field(description="Which one.")
    cell: str = Field(description="Path of the cell.")
    fingerprint: str = Field(description="Of the specification.")
    reason: str = Field(description="Kind and message of the error, in one line.")
    log: str | None = Field(description="Name of the attempt's log, beside this file.")
    log_tail: list[str] = Field(description="The log's last lines.")
    host: str = Field(description="Machine.")
    slurm_job: str | None = Field(description="Its Slurm job.")
    started: str = Field(description="When it began (UTC).")
    ended: str | None = Field(description="When it ended (UTC); killed: last sign of life.")


class Seen(NamedTuple):
    """An attempt as it looks from outside."""

    record: Record
    lives: bool  # its process is at work
    silence: float  # since its last sign of life [s]

    @property
    def status(self) -> Status:
        """As in the record, but `killed` if that says `running` and the process is gone."""
        dead = self.record.status == "running" and not self.lives
        return "killed" if dead else self.record.status


def numbers(folder: Path) -> list[int]:
    """Return the numbers of the attempts that have a record, in ascending order."""
    pattern = re.compile(r"attempt-(\d+)\.json")
    try:
        names = [path.name for path in folder.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(int(match[1]) for name in names if (match := pattern.fullmatch(name)))


def newest(folder: Path) -> int:
    """Return the number of a cell's newest attempt; 0 if there is none."""
    return max(numbers(folder), default=0)


def record_path(folder: Path, number: int) -> Path:
    """Return where an attempt's record is."""
    return folder / f"attempt-{number}.json"


def look(folder: Path, number: int | None = None) -> Seen | None:
    """Look at an attempt, changing nothing; return None if there is none.

    Args:
        folder: the cell's, under `results/attempts`.
        number: of the attempt; None: the newest.
    """
    number = newest(folder) if number is None else number
    path = record_path(folder, number)
    try:
        record = Record.model_validate_json(path.read_bytes())
        if record.status != "running":
            return Seen(record, False, 0.0)
        silence = holders.silence_of(path)
        record = Record.model_validate_json(path.read_bytes())  # it may have ended meanwhile
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValidationError:
        # A damaged disk, or another version of ptbench: whoever touched it last may be alive.
        nobody = Holder(host=UNKNOWN, pid=0, machine=None, started=None)
        record = Record(
            attempt=number, cell="", fingerprint="", corpus="", status="running", holder=nobody,
            started="",
        )  # fmt: skip
        silence = holders.silence_of(path)
    running = record.status == "running"
    return Seen(record, running and holders.lives(record.holder, silence, this_process()), silence)


def has_failed(folder: Path, fingerprint: str | None) -> bool:
    """Return whether a cell's newest attempt failed, or so many were killed that it is no accident.

    Args:
        folder: the cell's, under `results/attempts`.
        fingerprint: of its specification now; attempts at another do not count. None: unknown.
    """
    seen = look(folder)
    if seen is None or seen.record.fingerprint != fingerprint:
        return False
    if seen.status != "killed":
        return seen.status == "failed"
    every = [look(folder, number) for number in numbers(folder)]
    killed = [each for each in every if each and each.status == "killed"]
    return sum(each.record.fingerprint == fingerprint for each in killed) >= KILLED_OFTEN


class Attempt:
    """This process's attempt at a cell. Used as a context, it is closed when its block ends."""

    def __init__(
        self, folder: Path, cell: str, fingerprint: str, corpus: str, log: Path | None = None
    ) -> None:
        """Change nothing on disk; see `open`.

        Args:
            folder: the cell's, under `results/attempts`.
            cell: its path.
            fingerprint: of the specification.
            corpus: of the corpus' tokens.
            log: the file that this process writes its output to; kept as the attempt's own.
        """
        self.folder, self.cell, self.fingerprint, self.corpus = folder, cell, fingerprint, corpus
        self.record: Record | None = None  # once it is open
        self.repeats = False  # once it is open: whether the one before it finished this very run
        self.log: Path | None = None  # the attempt's own
        self.waited = 0.0  # for another process [s]
        self._written = log  # until it has a second name
        self._ended = threading.Event()
        self._lock = threading.Lock()

    def __enter__(self) -> Attempt:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, InterruptionError):
            self.close("interrupted", str(error))
        elif error is not None:
            self.close("failed", reason_of(error))
        self._ended.set()

    @property
    def opened(self) -> Record:
        """The record of the attempt, which has been opened."""
        assert self.record is not None
        return self.record

    @property
    def path(self) -> Path:
        """Where its record is."""
        return record_path(self.folder, self.opened.attempt)

    @property
    def count(self) -> int:
        """Attempts at this very run so far, this one counted."""
        count = 1
        for number in reversed(numbers(self.folder)):
            if number >= self.opened.attempt:
                continue
            seen = look(self.folder, number)
            if seen is None or seen.record.status == "finished":
                break
            if (seen.record.fingerprint, seen.record.corpus) != (self.fingerprint, self.corpus):
                break
            count += 1
        return count

    # ------------------------------------------------------------------------------- its beginning

    def open(
        self,
        output: Path,
        wait: float = 0.0,
        say: Callable[[str], None] = print,
    ) -> Metrics | None:
        """Begin, unless another process has the cell.

        Args:
            output: the cell's folder of results.
            wait: longest time to wait for another process [s].
            say: called with a line that says which process this one waits for.

        Returns:
            The metrics if there is nothing to do: another attempt at this run has finished.

        Raises:
            PtbenchError: if another process had the cell for all that time.
        """
        began, told = time.monotonic(), False
        while True:
            seen = look(self.folder)
            if seen is None or not seen.lives:
                if metrics := self.finished(output):
                    return metrics
                if self._begin(seen.record.attempt + 1 if seen else 1):
                    self.repeats = seen is not None and self._finished_this(seen.record)
                    return None
                continue  # another process was faster: look again
            holder = seen.record.holder
            if wait and not told:
                say(f"[{self.cell}] {holder} is at it; waiting for that to end")
            told = True
            self.waited = time.monotonic() - began
            if self.waited >= wait:
                raise PtbenchError(
                    f"{self.cell} is being run by {holder} (attempt {seen.record.attempt}, since "
                    f"{seen.record.started}, last sign of life {seen.silence:.0f} s ago); let it "
                    "finish or end it, then run the same command again"
                )
            time.sleep(min(POLL_SECONDS, wait - self.waited))

    def _finished_this(self, record: Record) -> bool:
        """Return whether a record is of an attempt that finished this very run."""
        run = record.fingerprint, record.corpus
        return record.status == "finished" and run == (self.fingerprint, self.corpus)

    def finished(self, output: Path) -> Metrics | None:
        """Return the result of this very run if it is there, or was until Snakemake deleted it.

        Snakemake deletes `metrics.json` before it runs a job. The record's copy counts if another
        process finished the cell after this Snakemake had planned the job, or if the file was there
        and did not count. Otherwise the user removed it to have it made again.
        """
        seen = look(self.folder)
        record = seen.record if seen and seen.record.status == "finished" else None
        if record and record.corpus != self.corpus:
            return None
        metrics = None
        with contextlib.suppress(OSError, ValueError):
            metrics = Metrics.model_validate_json((output / "metrics.json").read_bytes())
        if metrics is None and record and self._deleted_in_error(record, output):
            with contextlib.suppress(ValueError):
                metrics = Metrics.model_validate(record.metrics)
        ours = metrics and (metrics.cell.path, metrics.fingerprint) == (self.cell, self.fingerprint)
        return metrics if ours else None

    def _deleted_in_error(self, record: Record, output: Path) -> bool:
        """Return whether Snakemake deleted a result that the user had not removed."""
        others = ("history.csv", "recipe.yaml", "provenance.json")
        if not all((output / name).exists() for name in others):
            return False
        if self.waited:
            return True
        ended = record_path(self.folder, record.attempt).stat().st_mtime
        studies = (folder / "study.json" for folder in folders_above(output))
        planned = next((study for study in studies if study.exists()), None)
        if planned is None:
            return False
        replaced: Any = ()
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            replaced = json.loads(planned.read_bytes())["replaced"]
        return planned.stat().st_mtime < ended or self.cell in replaced

    def _begin(self, number: int) -> bool:
        """Take the cell by making the record of that number; return False if there is one."""
        record = Record(
            attempt=number, cell=self.cell, fingerprint=self.fingerprint, corpus=self.corpus,
            status="running", holder=this_process(), started=now(),
        )  # fmt: skip
        try:
            if not write_new(record_path(self.folder, number), text_of(record)):
                return False
        except OSError as error:
            raise PtbenchError(
                f"{self.folder}: attempts at {self.cell} cannot be recorded there: {error.strerror}"
            ) from error
        self.record = record
        self._keep_log()
        self._close_killed()
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()
        return True

    def _keep_log(self) -> None:
        """Give the log a second name, which stays when the first is deleted for the next attempt.

        Where it cannot have one, on another file system, it is copied when the attempt is closed.
        """
        if self._written:
            self.log = self.folder / f"attempt-{self.opened.attempt}.log"
            with contextlib.suppress(OSError):
                self.log.hardlink_to(self._written)
                self._written = None

    def _close_killed(self) -> None:
        """Close the records of attempts whose processes could not do it themselves."""
        for number in numbers(self.folder):
            seen = look(self.folder, number) if number < self.opened.attempt else None
            if not seen or seen.record.status != "running" or seen.record.holder.host == UNKNOWN:
                continue
            ended = datetime.datetime.fromtimestamp(time.time() - seen.silence, datetime.UTC)
            log = self.folder / f"attempt-{number}.log"
            update = {
                "status": "killed",
                "reason": reason_of_death(tail_of(log)),
                "ended": ended.isoformat(timespec="seconds"),
            }
            record = seen.record.model_copy(update=update)
            write_failure(self.folder, record, log)
            write_atomically(record_path(self.folder, number), text_of(record))

    def _beat(self) -> None:
        """Touch the record now and then, so that other machines see that this process lives."""
        while not self._ended.wait(holders.HEARTBEAT_SECONDS):
            with self._lock:  # a touch after the end would make the record look younger
                if not self._ended.is_set():
                    holders.touch(self.path)

    # ------------------------------------------------------------------------------------- its end

    def check(self) -> None:
        """Make sure that this process may still write the cell's files.

        Raises:
            PtbenchError: if another process has taken over because this one seemed dead: stopped,
                or cut off from the file system for minutes.
        """
        if self.record is not None and newest(self.folder) > self.record.attempt:
            seen = look(self.folder)
            by = f" by {seen.record.holder}" if seen else ""
            raise PtbenchError(
                f"{self.cell} was taken over{by} after this process had given no sign of life for "
                f"{holders.SILENCE_SECONDS:.0f} s; this one ends, the other goes on"
            )

    def abandon(self, reason: str) -> None:
        """Close the record of an attempt that is about to end without a chance to save."""
        self.close("interrupted", reason)

    def finish(self, metrics: Metrics) -> None:
        """Close the record with the result."""
        self.close("finished", metrics=metrics)

    def close(
        self, status: Status, reason: str | None = None, metrics: Metrics | None = None
    ) -> None:
        """Close the record, once. If it cannot be written, print why and go on."""
        with self._lock:
            if self.record is None or self._ended.is_set():
                return
            self._ended.set()
            result = metrics and metrics.model_dump(mode="json")
            update = {"status": status, "reason": reason, "ended": now(), "metrics": result}
            self.record = self.record.model_copy(update=update)
            try:
                if newest(self.folder) > self.record.attempt:
                    return  # taken over, and closed by the process that did
                if self.log and self._written:
                    with contextlib.suppress(OSError):  # the record matters more
                        shutil.copyfile(self._written, self.log)
                try:
                    write_atomically(self.path, text_of(self.record))
                except OSError as error:
                    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                        raise
                    overwrite(self.path, text_of(self.record))
                if status == "failed":
                    write_failure(self.folder, self.record, self.log)
            except OSError as error:
                print(f"ptbench: {self.path} cannot be written: {error.strerror}", flush=True)


def now() -> str:
    """Return the time (UTC)."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def text_of(model: Model) -> str:
    """Return the text of a record's file."""
    return model.model_dump_json(indent=1) + "\n"


def write_failure(folder: Path, record: Record, log: Path | None) -> None:
    """Write `attempt-N.failure.json`."""
    failure = Failure(
        attempt=record.attempt,
        cell=record.cell,
        fingerprint=record.fingerprint,
        reason=record.reason or "",
        log=log.name if log and log.exists() else None,
        log_tail=tail_of(log),
        host=record.holder.host,
        slurm_job=record.holder.slurm_job,
        started=record.started,
        ended=record.ended,
    )
    write_atomically(folder / f"attempt-{record.attempt}.failure.json", text_of(failure))
