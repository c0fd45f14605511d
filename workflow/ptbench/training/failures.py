"""Why an attempt failed, in one line: from its error, or from its log if it was killed."""

from __future__ import annotations

import re
from pathlib import Path

from ptbench.errors import PtbenchError

TAIL_LINES = 40  # of the log that a failure quotes
TAIL_BYTES = 32_768  # and no more than this, because a line may be long
REASON_LENGTH = 500  # characters
KILLED = "killed (signal 9, out of memory, or its machine failed) before it could say why"

# What frameworks, CUDA, NumPy and C++ say when memory is short: kinds of error, and messages.
OUT_OF_MEMORY_KINDS = {"MemoryError", "OutOfMemoryError", "ResourceExhaustedError"}
OUT_OF_MEMORY_MESSAGES = re.compile(
    r"out of memory|RESOURCE_EXHAUSTED|can(?:not|'t) allocate memory|unable to allocate"
    r"|failed to allocate|OOM when allocating|bad_alloc|cudaErrorMemoryAllocation"
    r"|CUDNN_STATUS_ALLOC_FAILED|CUBLAS_STATUS_ALLOC_FAILED",
    re.IGNORECASE,
)
FATAL = re.compile(r"^Fatal Python error: .+$", re.MULTILINE)  # as faulthandler writes it


def reason_of(error: BaseException) -> str:
    """Return kind and message of an error; the message alone if it was written for the user."""
    message = " ".join(str(error).split())[:REASON_LENGTH]
    if isinstance(error, PtbenchError):
        return message
    kinds = {kind.__name__ for kind in type(error).__mro__}
    text = f"{type(error).__name__}: {message}" if message else type(error).__name__
    if kinds & OUT_OF_MEMORY_KINDS or OUT_OF_MEMORY_MESSAGES.search(message):
        return f"out of memory ({text})"
    return text


def reason_of_death(log_tail: list[str]) -> str:
    """Return why a process is gone that did not close its own record."""
    fatal = FATAL.findall("\n".join(log_tail))
    return fatal[-1] if fatal else KILLED


def tail_of(log: Path | None) -> list[str]:
    """Return the last lines of a log; none if there is no log."""
    if log is None or not log.exists():
        return []
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - TAIL_BYTES))
        return file.read().decode(errors="replace").splitlines()[-TAIL_LINES:]
