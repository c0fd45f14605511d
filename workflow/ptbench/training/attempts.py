"""The attempts at a cell: who is at it, who was, and how each ended.

A cell's folder under `results/attempts` keeps for its N-th attempt

- `attempt-N.json`, opened at its start with status `running` and closed at its end,
- `attempt-N.log`, all that it printed,
- `attempt-N.failure.json`, if it failed or was killed.

The newest record is also the cell's lock. Who wants to run the cell makes the next one, which one
process alone can do, and may do so only if the newest is closed or its process dead; numbers are
never used again, so that nobody can mistake a new holder for the dead one. Since Snakemake
deletes `metrics.json` before it runs a job, be it a duplicate of one that has just finished, the
record of a finished attempt keeps the metrics too; see `Attempt.finished`.
"""

from __future__ import annotations

import contextlib
import datetime
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field, ValidationError

from ptbench.errors import InterruptionError, PtbenchError
from ptbench.model.recipe import Model
from ptbench.training import holders
from ptbench.training.holders import Holder, this_process
from ptbench.training.records import Metrics, write_atomically

TAIL_LINES = 40  # of the log that a failure quotes
TAIL_BYTES = 32_768  # and no more than this, for a line may be long
POLL_SECONDS = 5.0  # between two looks at another's attempt
KILLED = "killed (signal 9, out of memory, or its machine failed): it left no word of its own"

Status = Literal["running", "finished", "failed", "interrupted", "killed"]

# What frameworks, CUDA, NumPy and C++ say when memory is short: kinds of error, and messages.
OUT_OF_MEMORY_KINDS = {"MemoryError", "OutOfMemoryError", "ResourceExhaustedError"}
OUT_OF_MEMORY_MESSAGES = re.compile(
    r"out of memory|RESOURCE_EXHAUSTED|can(?:not|'t) allocate memory|unable to allocate"
    r"|failed to allocate|OOM when allocating|bad_alloc|cudaErrorMemoryAllocation"
    r"|CUDNN_STATUS_ALLOC_FAILED|CUBLAS_STATUS_ALLOC_FAILED",
    re.IGNORECASE,
)
UNKNOWN = "an unknown host"
FATAL = re.compile(r"^Fatal Python error: (.+)$", re.MULTILINE)  # as faulthandler writes it


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
        """As in the record, save that `running` without a living process is `killed`."""
        return (
            "killed" if self.record.status == "running" and not self.lives else self.record.status
        )


def newest(folder: Path) -> int:
    """Number of a cell's newest attempt; 0 if there is none."""
    return max(numbers(folder), default=0)


def numbers(folder: Path) -> list[int]:
    """The attempts that have a record."""
    pattern = re.compile(r"attempt-(\d+)\.json")
    try:
        names = [path.name for path in folder.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(int(match[1]) for name in names if (match := pattern.fullmatch(name)))


def look(folder: Path, number: int | None = None) -> Seen | None:
    """An attempt at a cell, changing nothing; None if there is none.

    Args:
        folder: the cell's, under `results/attempts`.
        number: of the attempt; None: the newest.
    """
    number = newest(folder) if number is None else number
    path = folder / f"attempt-{number}.json"
    try:
        record = Record.model_validate_json(path.read_bytes())
        if record.status != "running":
            return Seen(record, False, 0.0)
        silence = holders.silence_of(path)
        record = Record.model_validate_json(path.read_bytes())  # it may have ended meanwhile
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValidationError:  # a damaged disk, or another version: who touched it last may live
        nobody = Holder(host=UNKNOWN, pid=0, machine=None, started=None)
        record = Record(
            attempt=number, cell="", fingerprint="", corpus="", status="running", holder=nobody,
            started="",
        )  # fmt: skip
        silence = holders.silence_of(path)
    running = record.status == "running"
    return Seen(record, running and holders.lives(record.holder, silence, this_process()), silence)


class Attempt:
    """This process's attempt at a cell. As a context it is closed as its block ends."""

    def __init__(
        self, folder: Path, cell: str, fingerprint: str, corpus: str, log: Path | None = None
    ) -> None:
        """Changes nothing; see `open`.

        Args:
            folder: the cell's, under `results/attempts`.
            cell: its path.
            fingerprint: of the specification.
            corpus: of the corpus' tokens.
            log: being written by this process; kept as the attempt's own.
        """
        self.folder, self.cell, self.fingerprint, self.corpus = folder, cell, fingerprint, corpus
        self.record: Record | None = None  # once it is open
        self.log: Path | None = None  # the attempt's own
        self.waited = 0.0  # for another process [s]
        self._written = log
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
    def path(self) -> Path:
        assert self.record is not None
        return self.folder / f"attempt-{self.record.attempt}.json"

    def finished(self, output: Path) -> Metrics | None:
        """The result of this very run if it is there, or was and Snakemake has deleted it since.

        Snakemake deletes `metrics.json` before it runs a job. If the cell was finished after this
        Snakemake had planned the job, by another's, then it is deleted in error and the record's
        copy counts. If it was finished before, somebody has removed it to have it made again.
        """
        seen = look(self.folder)
        record = seen.record if seen and seen.record.status == "finished" else None
        if record and record.corpus != self.corpus:
            return None
        metrics = None
        with contextlib.suppress(OSError, ValueError):
            metrics = Metrics.model_validate_json((output / "metrics.json").read_bytes())
        if metrics is None and record and self._finished_since_planned(record, output):
            with contextlib.suppress(ValueError):
                metrics = Metrics.model_validate(record.metrics)
        ours = metrics and (metrics.cell.path, metrics.fingerprint) == (self.cell, self.fingerprint)
        return metrics if ours else None

    def _finished_since_planned(self, record: Record, output: Path) -> bool:
        """Whether an attempt ended after the study that this process belongs to had begun."""
        others = ("history.csv", "recipe.yaml", "provenance.json")
        if not all((output / name).exists() for name in others):
            return False
        if self.waited:
            return True
        ended = (self.folder / f"attempt-{record.attempt}.json").stat().st_mtime
        studies = (folder / "study.json" for folder in output.resolve().parents)
        planned = next((study for study in studies if study.exists()), None)
        return planned is not None and planned.stat().st_mtime < ended

    def open(
        self,
        output: Path,
        wait: float = 0.0,
        say: Callable[[str], None] = print,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> Metrics | None:
        """Begin, if nobody else is at it.

        Args:
            output: the cell's folder of results.
            wait: longest time to wait for another process [s].
            say: is told whom this waits for.
            interrupted: whether this process has been told to end.

        Returns:
            The metrics, if there is nothing to do: another attempt at this run has finished.

        Raises:
            PtbenchError: if another process is at it, and was not done in time.
        """
        began, told = time.monotonic(), False
        while True:
            seen = look(self.folder)
            if seen is None or not seen.lives:
                if metrics := self.finished(output):
                    return metrics
                if self._make(seen.record.attempt + 1 if seen else 1):
                    self._keep_log()
                    self._bury()
                    threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()
                    return None
                continue  # another process was faster: look again
            holder = seen.record.holder
            if wait and not told:
                say(f"[{self.cell}] {holder} is at it; waiting for that to end")
            told = True
            self.waited = time.monotonic() - began
            if interrupted():
                raise InterruptionError(f"{self.cell}: told to end while {holder} was at it")
            if self.waited >= wait:
                raise PtbenchError(
                    f"{self.cell} is being run by {holder} (attempt {seen.record.attempt}, since "
                    f"{seen.record.started}, last sign of life {seen.silence:.0f} s ago); let it "
                    "finish or end it, then run the same command again"
                )
            time.sleep(min(POLL_SECONDS, wait - self.waited))

    def _make(self, number: int) -> bool:
        record = Record(
            attempt=number, cell=self.cell, fingerprint=self.fingerprint, corpus=self.corpus,
            status="running", holder=this_process(), started=now(),
        )  # fmt: skip
        try:
            made = holders.write_new(self.folder / f"attempt-{number}.json", text_of(record))
        except OSError as error:
            raise PtbenchError(
                f"{self.folder}: attempts at {self.cell} cannot be recorded there: {error.strerror}"
            ) from error
        if made:
            self.record = record
        return made

    def _bury(self) -> None:
        """Close the records of those that could not do it themselves."""
        assert self.record is not None
        for number in numbers(self.folder):
            seen = look(self.folder, number) if number < self.record.attempt else None
            if seen and seen.record.status == "running" and seen.record.holder.host != UNKNOWN:
                ended = datetime.datetime.fromtimestamp(time.time() - seen.silence, datetime.UTC)
                log = self.folder / f"attempt-{number}.log"
                tail = tail_of(log)
                fatal = FATAL.findall("\n".join(tail))
                record = seen.record.model_copy(
                    update={
                        "status": "killed",
                        "reason": f"Fatal Python error: {fatal[-1]}" if fatal else KILLED,
                        "ended": ended.isoformat(timespec="seconds"),
                    }
                )
                write_failure(self.folder, record, log, tail)
                write_atomically(self.folder / f"attempt-{number}.json", text_of(record))

    def _beat(self) -> None:
        while not self._ended.wait(holders.HEARTBEAT_SECONDS):
            with self._lock:  # or it would make the record look younger than its end
                if not self._ended.is_set():
                    holders.touch(self.path)

    def check(self) -> None:
        """Make sure that this process may still write the cell's files.

        Raises:
            PtbenchError: if another has taken over, after this one seemed dead: stopped, or cut off
                from the file system for minutes.
        """
        if self.record is not None and newest(self.folder) > self.record.attempt:
            seen = look(self.folder)
            by = f" by {seen.record.holder}" if seen else ""
            raise PtbenchError(
                f"{self.cell} was taken over{by} after this process had given no sign of life for "
                f"{holders.SILENCE_SECONDS:.0f} s; this one ends, the other goes on"
            )

    def _keep_log(self) -> None:
        """Give the log a second name, which stays when the first is deleted for the next attempt.

        Where it cannot have one, on another file system, it is copied as the attempt is closed.
        """
        if self._written and self.record:
            self.log = self.folder / f"attempt-{self.record.attempt}.log"
            with contextlib.suppress(OSError):
                self.log.hardlink_to(self._written)
                self._written = None

    def abandon(self, reason: str) -> None:
        """Close the record of an attempt that is about to end without a chance to save."""
        self.close("interrupted", reason)

    def finish(self, metrics: Metrics) -> None:
        """Close the record with the result."""
        self.close("finished", metrics=metrics)

    def close(
        self, status: Status, reason: str | None = None, metrics: Metrics | None = None
    ) -> None:
        """Close the record, once; says on the terminal what cannot be written, and goes on."""
        with self._lock:
            if self.record is None or self._ended.is_set():
                return
            self._ended.set()
            result = metrics and metrics.model_dump(mode="json")
            update = {"status": status, "reason": reason, "ended": now(), "metrics": result}
            self.record = self.record.model_copy(update=update)
            try:
                if newest(self.folder) > self.record.attempt:
                    return  # taken over, and closed by who did
                if self.log and self._written:
                    shutil.copyfile(self._written, self.log)
                if status == "failed":
                    write_failure(self.folder, self.record, self.log, tail_of(self.log))
                write_atomically(self.path, text_of(self.record))
            except OSError as error:
                print(f"ptbench: {self.path} cannot be written: {error.strerror}", flush=True)

    @property
    def count(self) -> int:
        """Attempts at this very run so far, this one counted."""
        assert self.record is not None
        count = 1
        for number in reversed(numbers(self.folder)):
            if number >= self.record.attempt:
                continue
            seen = look(self.folder, number)
            if seen is None or seen.record.status == "finished":
                break
            if (seen.record.fingerprint, seen.record.corpus) != (self.fingerprint, self.corpus):
                break
            count += 1
        return count


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def text_of(model: Model) -> str:
    return model.model_dump_json(indent=1) + "\n"


def reason_of(error: BaseException) -> str:
    """Why an attempt failed, in one line."""
    message = " ".join(str(error).split())[:500]
    if isinstance(error, PtbenchError):
        return message
    kinds = {kind.__name__ for kind in type(error).__mro__}
    text = f"{type(error).__name__}: {message}" if message else type(error).__name__
    if kinds & OUT_OF_MEMORY_KINDS or OUT_OF_MEMORY_MESSAGES.search(message):
        return f"out of memory ({text})"
    return text


def tail_of(log: Path | None) -> list[str]:
    """The last lines of a log; none where there is none."""
    if log is None or not log.exists():
        return []
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - TAIL_BYTES))
        return file.read().decode(errors="replace").splitlines()[-TAIL_LINES:]


def write_failure(folder: Path, record: Record, log: Path | None, tail: list[str]) -> None:
    """Write `attempt-N.failure.json`."""
    failure = Failure(
        attempt=record.attempt,
        cell=record.cell,
        fingerprint=record.fingerprint,
        reason=record.reason or "",
        log=log.name if log and log.exists() else None,
        log_tail=tail,
        host=record.holder.host,
        slurm_job=record.holder.slurm_job,
        started=record.started,
        ended=record.ended,
    )
    write_atomically(folder / f"attempt-{record.attempt}.failure.json", text_of(failure))


def failures(folder: Path) -> Iterator[Failure]:
    """A cell's failures, the newest first."""
    for number in reversed(numbers(folder)):
        with contextlib.suppress(OSError, ValueError):
            path = folder / f"attempt-{number}.failure.json"
            yield Failure.model_validate_json(path.read_bytes())
