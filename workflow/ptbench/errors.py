"""The errors that are the user's to mend. What is not here is a bug and shows its traceback."""

import sys
from collections.abc import Callable
from typing import ClassVar, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class PtbenchError(Exception):
    """What is wrong, where, and what would be right, in one sentence.

    The command line prints it without a traceback and exits with `status`.
    """

    status: ClassVar[int] = 2


class ConfigurationError(PtbenchError):
    """A configuration, recipe or experiment that cannot be run."""


class InterruptionError(PtbenchError):
    """A run that was told to end before it had finished. The same command goes on from there."""

    status = 75  # EX_TEMPFAIL of sysexits.h: try again later


def in_words(error: PtbenchError | OSError) -> str:
    """What a user is told of an error: a full disk, say, or a folder that may not be written to."""
    if isinstance(error, PtbenchError) or error.strerror is None:
        return str(error)
    return f"{error.filename}: {error.strerror}" if error.filename else error.strerror


def or_exit(function: Callable[P, T], *arguments: P.args, **keywords: P.kwargs) -> T:
    """What a function returns; if its error is the user's to mend, the sentence and the end.

    For the Snakefile: Snakemake would show where in it the error was raised.
    """
    try:
        return function(*arguments, **keywords)
    except (PtbenchError, OSError) as error:
        sys.exit(f"ptbench: {in_words(error)}")
