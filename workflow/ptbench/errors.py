"""Errors that the user can fix. Any other error is a bug and shows its traceback."""

import sys
from collections.abc import Callable
from typing import ClassVar, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class PtbenchError(Exception):
    """An error whose message says what is wrong, where, and what would be right.

    The command line prints the message without a traceback and exits with `status`.
    """

    status: ClassVar[int] = 2


class ConfigurationError(PtbenchError):
    """A configuration, recipe or experiment that cannot be run."""


class InterruptionError(PtbenchError):
    """A run that was stopped before it finished. The same command continues it."""

    status = 75  # EX_TEMPFAIL of sysexits.h: try again later


def in_words(error: PtbenchError | OSError) -> str:
    """Return the message for the user, also of errors such as a full disk."""
    if isinstance(error, PtbenchError) or error.strerror is None:
        return str(error)
    return f"{error.filename}: {error.strerror}" if error.filename else error.strerror


def or_exit(function: Callable[P, T], *arguments: P.args, **keywords: P.kwargs) -> T:
    """Call a function and return its result; print an error that the user can fix, and exit.

    The Snakefile uses this, because Snakemake would add where the error was raised.
    """
    try:
        return function(*arguments, **keywords)
    except (PtbenchError, OSError) as error:
        sys.exit(f"ptbench: {in_words(error)}")
