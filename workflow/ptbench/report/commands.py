"""The commands that users are told to type."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Sequence
from pathlib import Path


def command_without_targets(argv: Sequence[str], targets: Collection[str]) -> str:
    """The command line that runs this workflow as it was run, but for its targets.

    Args:
        argv: of the Snakemake that runs.
        targets: that it was asked for.
    """
    program = Path(argv[0])
    words = [word for word in argv[1:] if word not in targets and word != "--"]
    # `uv run` uses the project's own environment
    start = ["uv", "run", "snakemake"] if ".venv" in program.parts else ["snakemake"]
    return shlex.join([*start, *words])
