"""The commands that users are told to type."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Sequence
from pathlib import Path


def command_without_targets(argv: Sequence[str], targets: Collection[str]) -> str:
    """Return the command line that runs this workflow as it was run, without its targets.

    Args:
        argv: arguments of the running Snakemake.
        targets: what it was asked for.
    """
    program, *words = argv
    # `uv run` uses the project's own environment.
    start = ["uv", "run", "snakemake"] if ".venv" in Path(program).parts else ["snakemake"]
    return shlex.join([*start, *(word for word in words if word not in {*targets, "--"})])
