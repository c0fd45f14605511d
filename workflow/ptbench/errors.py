"""The errors that are the user's to mend. What is not here is a bug and shows its traceback."""


class PtbenchError(Exception):
    """What is wrong, where, and what would be right, in one sentence.

    The command line prints it without a traceback and exits with status 2.
    """


class ConfigurationError(PtbenchError):
    """A configuration, recipe or experiment that cannot be run."""
