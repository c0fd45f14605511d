"""The commands that users are told to type."""

from __future__ import annotations

import json
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


def study_command(results: Path) -> list[str]:
    """Return what runs the workflow, without targets: as the newest run was begun.

    Args:
        results: the results folder, where a run writes study.json.
    """
    try:
        return shlex.split(json.loads((results / "study.json").read_text("utf-8"))["command"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ["uv", "run", "snakemake", "--cores", "1"]


def run_again(command: Sequence[str], target: Path) -> str:
    """Return the command line that runs one cell alone.

    Args:
        command: what runs the workflow.
        target: the cell's metrics.json.
    """
    # Snakemake sees no reason to make a file again that is there but cannot be read.
    return shlex.join([*command, *(["--force"] if target.exists() else []), "--", str(target)])
