"""The commands that users are told to type do what they say."""

from __future__ import annotations

import pytest

from ptbench.report.commands import command_without_targets


@pytest.mark.parametrize(
    ("argv", "targets", "expected"),
    [
        (["/p/.venv/bin/snakemake", "--cores", "2"], set(), "uv run snakemake --cores 2"),
        (["/usr/bin/snakemake", "--profile", "slurm"], set(), "snakemake --profile slurm"),
        (
            ["snakemake", "--cores", "1", "partial"],
            {"partial"},
            "snakemake --cores 1",
        ),
        (
            ["snakemake", "--config", 'mirrors={ptb: "file:a b"}', "--", "x/metrics.json"],
            {"x/metrics.json"},
            "snakemake --config 'mirrors={ptb: \"file:a b\"}'",
        ),
    ],
)
def test_a_command_is_repeated_without_its_targets_and_with_its_quotes(
    argv: list[str], targets: set[str], expected: str
) -> None:
    assert command_without_targets(argv, targets) == expected
