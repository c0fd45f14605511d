"""The commands that users are told to type."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

# What Snakemake is asked for, and what it is to make again: by the name of the parsed argument, and
# by the option. A cell is asked for in place of them.
ASKED = {"targets", "forcerun", "until", "omit_from"}
OPTIONS = ("-R", "--forcerun", "-U", "--until", "-O", "--omit-from")
FLAGS = ("--", "-f", "--force", "-F", "--forceall")


def command_without_targets(argv: Sequence[str], parse: Callable[[list[str]], Any]) -> str:
    """Return the command line that runs this workflow as it was run, without what it asked for.

    Args:
        argv: arguments of the running Snakemake.
        parse: Snakemake's own parser, which alone knows that of `--cores all all` the second `all`
            is a target.
    """
    program, *words = argv
    # `uv run` uses the project's own environment.
    start = ["uv", "run", "snakemake"] if ".venv" in Path(program).parts else ["snakemake"]
    return shlex.join([*start, *_kept(words, parse)])


def _kept(words: list[str], parse: Callable[[list[str]], Any]) -> Iterator[str]:
    for index, word in enumerate(words):
        option = word.partition("=")[0]
        if word in FLAGS or option in OPTIONS:
            continue
        if word.startswith("-") and "--" not in words[:index]:
            yield word
            continue
        mark = f"\0{index}"
        parsed: dict[str, Any] = {}
        # Where a mark is refused, the word is the value of an option that is kept.
        with contextlib.suppress(Exception, SystemExit), contextlib.redirect_stderr(io.StringIO()):
            parsed = vars(parse([*words[:index], mark, *words[index + 1 :]]))
        if not any(mark in (parsed.get(name) or ()) for name in ASKED):
            yield word


def study_command(results: Path) -> list[str]:
    """Return what runs the workflow, without targets: as the newest run was begun.

    Args:
        results: the results folder, where a run writes study.json.
    """
    try:
        return shlex.split(json.loads((results / "study.json").read_text("utf-8"))["command"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ["uv", "run", "snakemake", "--cores", "1"]


def renewing_command(results: Path) -> list[str] | None:
    """Return what renews the runs of a report; None if they are not of this project's workflow.

    It writes into `results` alone, so no command of it makes runs of another folder.
    """
    own = results.resolve() == Path("results").resolve() or (results / "study.json").exists()
    return study_command(results) if own else None


def run_again(command: Sequence[str], target: Path | str) -> str:
    """Return the command line that makes one target.

    Args:
        command: what runs the workflow.
        target: such as a cell's metrics.json.
    """
    return shlex.join([*command, "--", str(target)])


def plan_command(files: Iterable[Path | str], values: Sequence[str]) -> str:
    """Return the command line that says what a run of these configuration files and values takes.

    Args:
        files: as Snakemake reads them.
        values: of its --config.
    """
    paths = [os.path.relpath(file) for file in files]
    named = [path for path in paths if path != "config.yaml"]  # which is read by itself
    given = ["--config", *values] if values else []
    return shlex.join(["uv", "run", "ptbench", "plan", *named, *given])
