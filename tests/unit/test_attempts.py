"""Attempts: one process at a time, each leaving word of how it ended."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest
from tests.support.fake_results import metrics

from ptbench.configuration.specification import Cell
from ptbench.errors import InterruptionError, PtbenchError
from ptbench.files import write_atomically
from ptbench.training import attempts, holders
from ptbench.training.attempts import Attempt, Failure, look
from ptbench.training.failures import reason_of

CELL = Cell(variant="tiny", framework="jax", devices=1, seed=1)
RESULT = metrics(CELL, 4.7)


def attempt(folder: Path, **changes: Any) -> Attempt:
    log = changes.pop("log", None)
    identity = {"cell": CELL.path, "fingerprint": RESULT.fingerprint, "corpus": "c", **changes}
    return Attempt(folder / "attempts", **identity, log=log)


def content(folder: Path, number: int) -> dict[str, Any]:
    return json.loads((folder / "attempts" / f"attempt-{number}.json").read_text())


def failure(folder: Path, number: int) -> Failure:
    path = folder / "attempts" / f"attempt-{number}.failure.json"
    return Failure.model_validate_json(path.read_bytes())


def die(folder: Path, number: int) -> None:
    """Make a record look as one whose process was killed."""
    path = folder / "attempts" / f"attempt-{number}.json"
    record = json.loads(path.read_text())
    record["holder"]["started"] = "1"
    path.write_text(json.dumps(record))


def run_into(error: Exception, folder: Path, log: Path | None = None, **changes: Any) -> int:
    """Open an attempt that ends with an error; how many attempts there were by then."""
    count = 0
    try:
        with attempt(folder, log=log, **changes) as one:
            assert one.open(folder / "cell") is None
            count = one.count
            raise error
    except type(error):
        return count
    raise AssertionError("the error was swallowed")


def finish(folder: Path, number: int = 1) -> None:
    """Leave what a finished attempt leaves."""
    with attempt(folder) as one:
        assert one.open(folder / "cell") is None
        for name in ("history.csv", "recipe.yaml", "provenance.json"):
            write_atomically(folder / "cell" / name, "")
        write_atomically(folder / "cell" / "metrics.json", RESULT.model_dump_json())
        one.finish(RESULT)
    assert content(folder, number)["status"] == "finished"


def test_a_second_process_is_refused_in_a_sentence_that_names_the_first(tmp_path: Path) -> None:
    with attempt(tmp_path) as first, attempt(tmp_path) as second:
        first.open(tmp_path)
        with pytest.raises(
            PtbenchError,
            match=rf"^{CELL.path} is being run by process {os.getpid()} on \S+ \(attempt 1, since "
            r"[\d:+T-]+, last sign of life \d+ s ago\); let it finish or end it, then run the same "
            "command again$",
        ):
            second.open(tmp_path)
        assert second.record is None
        assert content(tmp_path, 1)["status"] == "running"
        first.finish(RESULT)
    assert attempts.numbers(tmp_path / "attempts") == [1]


def test_a_failed_attempt_leaves_its_reason_and_the_tail_of_its_log(tmp_path: Path) -> None:
    log = tmp_path / "cell.log"
    log.write_text("".join(f"line {number}\n" for number in range(100)))
    run_into(RuntimeError("the loss\nis gone"), tmp_path, log)
    assert content(tmp_path, 1)["status"] == "failed"
    left = failure(tmp_path, 1)
    assert left.reason == "RuntimeError: the loss is gone"
    assert left.log_tail == [f"line {number}" for number in range(60, 100)]
    assert left.log == "attempt-1.log"
    assert (left.attempt, left.cell, left.fingerprint) == (1, CELL.path, RESULT.fingerprint)
    assert left.started <= (left.ended or "")


@pytest.mark.parametrize("links", [True, False], ids=["by another name", "by a copy"])
def test_each_attempts_log_is_kept_though_the_rules_own_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    if not links:
        real = Path.hardlink_to

        def other_file_system(self: Path, target: Path) -> None:
            if self.suffix == ".log":
                raise OSError(errno.EXDEV, "Invalid cross-device link")
            real(self, target)

        monkeypatch.setattr(Path, "hardlink_to", other_file_system)
    log = tmp_path / "cell.log"
    for number in (1, 2):
        log.unlink(missing_ok=True)
        log.write_text(f"this is {number}\n")
        run_into(ZeroDivisionError(), tmp_path, log)
    for number in (1, 2):
        kept = tmp_path / "attempts" / f"attempt-{number}.log"
        assert kept.read_text() == f"this is {number}\n"
        assert failure(tmp_path, number).log_tail == [f"this is {number}"]


def test_an_attempt_whose_log_is_gone_still_says_why_it_failed(tmp_path: Path) -> None:
    run_into(ZeroDivisionError("by 0"), tmp_path, tmp_path / "gone.log")
    assert content(tmp_path, 1)["status"] == "failed"
    assert failure(tmp_path, 1).reason == "ZeroDivisionError: by 0"
    assert failure(tmp_path, 1).log is None


def test_a_killed_attempt_is_told_apart_and_buried_by_the_next(tmp_path: Path) -> None:
    folder, log = tmp_path / "attempts", tmp_path / "cell.log"
    log.write_text("epoch 1\n")
    attempt(tmp_path, log=log).open(tmp_path)
    seen = look(folder)
    assert seen is not None
    assert (seen.status, seen.lives) == ("running", True)
    die(tmp_path, 1)
    seen = look(folder)
    assert seen is not None
    assert (seen.status, seen.record.status) == ("killed", "running")
    assert not (folder / "attempt-1.failure.json").exists(), "looking changes nothing"

    with attempt(tmp_path) as second:
        second.open(tmp_path)
        assert content(tmp_path, 1)["status"] == "killed"
        left = failure(tmp_path, 1)
        assert left.reason.startswith("killed (signal 9")
        assert left.log_tail == ["epoch 1"]
        assert left.ended is not None
        second.finish(RESULT)


def test_a_crash_that_python_could_still_tell_of_is_its_reason(tmp_path: Path) -> None:
    log = tmp_path / "cell.log"
    log.write_text("epoch 1\nFatal Python error: Segmentation fault\n\nThread 0x1 ...\n")
    attempt(tmp_path, log=log).open(tmp_path)
    die(tmp_path, 1)
    attempt(tmp_path).open(tmp_path)
    assert failure(tmp_path, 1).reason == "Fatal Python error: Segmentation fault"


def test_an_interrupted_attempt_is_no_failure(tmp_path: Path) -> None:
    run_into(InterruptionError("told to end, after epoch 3"), tmp_path)
    assert content(tmp_path, 1)["status"] == "interrupted"
    assert content(tmp_path, 1)["reason"] == "told to end, after epoch 3"
    assert not list((tmp_path / "attempts").glob("*.failure.json"))


def test_attempts_at_one_run_are_counted(tmp_path: Path) -> None:
    """Those at another specification, or before it had finished once, are not of this run."""

    def counted(**changes: Any) -> int:
        return run_into(ZeroDivisionError(), tmp_path, **changes)

    assert [counted(), counted(fingerprint="f"), counted(), counted()] == [1, 1, 1, 2]
    finish(tmp_path, 5)
    (tmp_path / "cell" / "metrics.json").unlink()
    assert [counted(), counted()] == [1, 2]


class Kinds:
    """Errors as the frameworks raise them when memory is short."""

    class OutOfMemoryError(RuntimeError): ...  # torch.OutOfMemoryError

    class ResourceExhaustedError(Exception): ...  # tensorflow.errors

    class JaxRuntimeError(RuntimeError): ...

    class MXNetError(RuntimeError): ...


@pytest.mark.parametrize(
    "error",
    [
        Kinds.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu] DefaultCPUAllocator: can't allocate memory"),
        Kinds.ResourceExhaustedError("{{function_node ...}} failed"),
        Kinds.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 137438953472 bytes."),
        Kinds.MXNetError("cudaMalloc retry failed: out of memory"),
        Kinds.MXNetError("std::bad_alloc"),
        MemoryError("Unable to allocate 7.28 TiB for an array with shape (1000000, 1000000)"),
        MemoryError(),
    ],
)  # fmt: skip
def test_memory_that_ran_out_is_named_so_in_every_framework(error: Exception) -> None:
    assert reason_of(error).startswith(f"out of memory ({type(error).__name__}")
    assert "\n" not in reason_of(error)


def test_other_reasons_are_kind_and_message_in_one_line() -> None:
    assert reason_of(ValueError("a\n  b")) == "ValueError: a b"
    assert reason_of(ZeroDivisionError()) == "ZeroDivisionError"
    assert reason_of(PtbenchError("the corpus is damaged")) == "the corpus is damaged"


def test_a_finished_cell_is_not_run_again(tmp_path: Path) -> None:
    finish(tmp_path)
    assert attempt(tmp_path).open(tmp_path / "cell") == RESULT
    assert attempts.numbers(tmp_path / "attempts") == [1]


@pytest.mark.parametrize("linked", [False, True], ids=["", "on another disk"])
@pytest.mark.parametrize(
    ("planned", "removed", "given_back"),
    [
        pytest.param(-10, "metrics.json", True, id="it finished after this study was planned"),
        pytest.param(+10, "metrics.json", False, id="somebody removed it, and started a study"),
        pytest.param(None, "metrics.json", False, id="somebody removed it; there is no study"),
        pytest.param(0, "metrics.json", True, id="it was there when the study began, unreadable"),
        pytest.param(-10, "history.csv", False, id="more than Snakemake deletes was removed"),
    ],
)
def test_what_snakemake_deletes_in_error_is_given_back(
    tmp_path: Path, planned: float | None, removed: str, given_back: bool, linked: bool
) -> None:
    """As of a job that ran on when its Snakemake was killed, and ended after a second had begun."""
    if linked:
        disk = tmp_path / "disk/deep/cell"
        disk.mkdir(parents=True)
        tmp_path = tmp_path / "results"
        tmp_path.mkdir()
        (tmp_path / "cell").symlink_to(disk)
    finish(tmp_path)
    (tmp_path / "cell" / "metrics.json").unlink()
    (tmp_path / "cell" / removed).unlink(missing_ok=True)
    if planned is not None:
        study = tmp_path / "study.json"
        study.write_text(json.dumps({"replaced": [] if planned else [CELL.path]}))
        at = study.stat().st_mtime + (planned or 10)
        os.utime(study, (at, at))
    with attempt(tmp_path) as second:
        assert second.open(tmp_path / "cell") == (RESULT if given_back else None)


def test_on_a_full_disk_an_attempt_still_says_why_it_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the room that its record has already; a new file would need more."""
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def refuse(*_: object) -> None:
        raise full

    one = attempt(tmp_path)
    one.open(tmp_path / "cell")
    monkeypatch.setattr(attempts, "write_atomically", refuse)
    with pytest.raises(OSError, match="No space left"), one:
        raise full
    assert content(tmp_path, 1)["status"] == "failed"
    assert "No space left on device" in content(tmp_path, 1)["reason"]


@pytest.mark.parametrize("change", [{"fingerprint": "another"}, {"corpus": "another"}])
def test_a_finished_cell_is_run_again_if_it_would_mean_something_else(
    tmp_path: Path, change: dict[str, str]
) -> None:
    finish(tmp_path)
    with attempt(tmp_path, **change) as second:
        assert second.open(tmp_path / "cell") is None
        assert second.count == 1
        second.finish(RESULT)


def test_who_waits_gets_the_result_of_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts, "POLL_SECONDS", 0.02)
    first, said = attempt(tmp_path), list[str]()
    first.open(tmp_path / "cell")

    def end() -> None:
        time.sleep(0.3)
        for name in ("history.csv", "recipe.yaml", "provenance.json", "metrics.json"):
            text = RESULT.model_dump_json() if name == "metrics.json" else ""
            write_atomically(tmp_path / "cell" / name, text)
        first.finish(RESULT)

    thread = threading.Thread(target=end)
    thread.start()
    second = attempt(tmp_path)
    assert second.open(tmp_path / "cell", wait=60, say=said.append) == RESULT
    thread.join()
    assert 0.2 < second.waited < 30
    assert len(said) == 1
    assert "is at it; waiting" in said[0]


def test_who_waits_takes_over_from_one_that_died(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts, "POLL_SECONDS", 0.02)
    attempt(tmp_path).open(tmp_path)
    with pytest.raises(PtbenchError, match="is being run by"):
        attempt(tmp_path).open(tmp_path, wait=0.1, say=lambda _: None)
    timer = threading.Timer(0.2, die, (tmp_path, 1))
    timer.start()
    with attempt(tmp_path) as second:
        assert second.open(tmp_path, wait=60, say=lambda _: None) is None
        assert content(tmp_path, 2)["status"] == "running"
        second.finish(RESULT)


def test_one_that_was_taken_for_dead_writes_nothing_more(tmp_path: Path) -> None:
    """Stopped for long, or cut off from the file system, and then back."""
    first = attempt(tmp_path)
    first.open(tmp_path)
    first.check()
    die(tmp_path, 1)
    second = attempt(tmp_path)
    second.open(tmp_path)
    with pytest.raises(PtbenchError, match="was taken over by process"):
        first.check()
    first.close("failed", "too late")
    assert content(tmp_path, 1)["status"] == "killed"
    second.check()
    second.finish(RESULT)


def test_a_living_holder_touches_its_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holders, "HEARTBEAT_SECONDS", 0.05)
    with attempt(tmp_path) as one:
        one.open(tmp_path)
        os.utime(one.path, (1, 1))
        while one.path.stat().st_mtime == 1:
            time.sleep(0.02)
        one.finish(RESULT)
        os.utime(one.path, (1, 1))
        time.sleep(0.2)
        assert one.path.stat().st_mtime == 1, "a closed record is left alone"


@pytest.mark.parametrize("text", ["", "{", '{"attempt": 1}'])
def test_a_record_that_cannot_be_read_holds_the_cell_while_it_is_touched(
    tmp_path: Path, text: str
) -> None:
    path = tmp_path / "attempts" / "attempt-1.json"
    write_atomically(path, text)
    with pytest.raises(PtbenchError, match="process 0 on an unknown host"):
        attempt(tmp_path).open(tmp_path)
    long_ago = time.time() - holders.SILENCE_SECONDS - 5
    os.utime(path, (long_ago, long_ago))
    with attempt(tmp_path) as one:
        one.open(tmp_path)
        assert one.path.name == "attempt-2.json"
        assert path.read_text() == text, "what cannot be read is kept"
        one.finish(RESULT)


def test_a_folder_that_cannot_be_written_to_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "attempts").write_text("")
    with pytest.raises(PtbenchError, match="cannot be recorded there: File exists"):
        attempt(tmp_path).open(tmp_path)


ROUNDS, TAKERS = 30, 4


def take(folder: Path, barrier: Barrier, won: Callable[[int], None]) -> None:
    for number in range(ROUNDS):
        one = attempt(folder / str(number))
        barrier.wait()
        try:
            one.open(folder)
            won(number)
        except PtbenchError:
            pass
        barrier.wait()  # the winner lives until all have tried


def test_of_several_that_take_over_at_once_exactly_one_wins(tmp_path: Path) -> None:
    """Processes, from a dead holder in every second round and from none in the others."""
    context = multiprocessing.get_context("fork")
    for number in range(0, ROUNDS, 2):
        attempt(tmp_path / str(number)).open(tmp_path)
        die(tmp_path / str(number), 1)
    barrier, wins = context.Barrier(TAKERS), context.Queue()
    takers = [
        context.Process(target=take, args=(tmp_path, barrier, wins.put)) for _ in range(TAKERS)
    ]
    for taker in takers:
        taker.start()
    winners = [wins.get(timeout=60) for _ in range(ROUNDS)]
    for taker in takers:
        taker.join(60)
        assert taker.exitcode == 0
    assert sorted(winners) == list(range(ROUNDS))
    assert wins.empty()
    for number in range(ROUNDS):
        expected = [1, 2] if number % 2 == 0 else [1]
        assert attempts.numbers(tmp_path / str(number) / "attempts") == expected
