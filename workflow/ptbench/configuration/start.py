"""What is checked before Snakemake's own start, because its words for it would name no file.

Snakemake reads every `--configfile` and makes a folder in the user's home before it reads the
Snakefile. Before both it reads `profiles/default/config.yaml`, which calls `check`.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

from snakemake.common import get_appdirs

from ptbench.errors import ConfigurationError, PtbenchError, or_exit
from ptbench.yaml import read_mapping


def check() -> None:
    """Exit with a sentence if this Snakemake cannot start."""
    or_exit(check_configuration_files, sys.argv[1:])
    or_exit(check_home, Path(get_appdirs().user_cache_dir))


def check_configuration_files(words: Sequence[str]) -> None:
    """Read what follows `--configfile` in a command line.

    Raises:
        ConfigurationError: if a file cannot be read, or holds nothing.
    """
    for index, word in enumerate(words):
        option, _, value = word.partition("=")
        if option not in ("--configfile", "--configfiles"):
            continue
        after = itertools.takewhile(lambda each: not each.startswith("-"), words[index + 1 :])
        for name in [value] if value else after:
            if not read_mapping(Path(name)):
                raise ConfigurationError(
                    f"{name} is empty, which Snakemake refuses; leave it out, or write {{}} in it"
                )


def check_home(cache: Path) -> None:
    """Make the folder where Snakemake keeps sources.

    Raises:
        PtbenchError: if that is not possible; it says what to set.
    """
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PtbenchError(
            f"{cache} cannot be made: {error.strerror}. Snakemake keeps files there: set HOME to a "
            "folder that is there, or XDG_CACHE_HOME to one that you can write to"
        ) from error
