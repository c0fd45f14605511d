"""The errors that are the user's to mend. What is not here is a bug and shows its traceback."""

from typing import ClassVar


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
