"""The commands that users are told to type do what they say."""

from __future__ import annotations

import pytest
from snakemake.cli import get_argument_parser

from ptbench.report.commands import command_without_targets

PARSER = get_argument_parser()


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (["/p/.venv/bin/snakemake", "--cores", "2"], "uv run snakemake --cores 2"),
        (["/usr/bin/snakemake", "--profile", "slurm"], "snakemake --profile slurm"),
        (["s", "--cores", "1", "partial"], "snakemake --cores 1"),
        (
            ["s", "--cores", "all", "all", "--config", "a=all"],
            "snakemake --cores all --config a=all",
        ),
        (["s", "-call", "all"], "snakemake -call"),
        (["s", "-c", "2", "-R", "report", "report"], "snakemake -c 2"),
        (["s", "-F", "--forcerun=train", "-c1", "--until", "train", "-k"], "snakemake -c1 -k"),
        (["s", "--configfile", "x", "y", "-j", "3", "--", "x"], "snakemake --configfile x y -j 3"),
        (
            ["s", "--config", 'mirrors={ptb: "file:a b"}', "--", "x/metrics.json"],
            "snakemake --config 'mirrors={ptb: \"file:a b\"}'",
        ),
    ],
)
def test_a_command_is_repeated_without_its_targets_and_with_its_quotes(
    typed: list[str], expected: str
) -> None:
    assert command_without_targets(typed, PARSER.parse_args) == expected
