"""The commands that users are told to type do what they say."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest
from snakemake.cli import get_argument_parser
from tests.support.fake_results import plan

from ptbench.analysis.collect import CorpusFacts, collect_rows
from ptbench.analysis.experiment import analyse
from ptbench.cli import parser
from ptbench.configuration.study import load_study
from ptbench.report.commands import command_without_targets, plan_command, study_command
from ptbench.report.runs import missing, runs_of

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


def test_a_study_tells_how_it_was_begun(tmp_path: Path) -> None:
    assert study_command(tmp_path) == ["uv", "run", "snakemake", "--cores", "1"]
    command = "snakemake --profile slurm --config 'mirrors={ptb: x}'"
    load_study({}).write(tmp_path / "study.json", [], command)
    assert study_command(tmp_path) == ["snakemake", "--profile", "slurm", "--config",
                                       "mirrors={ptb: x}"]  # fmt: skip


def test_a_dry_run_names_the_plan_of_its_own_study() -> None:
    assert plan_command(["config.yaml"], []) == "uv run ptbench plan"
    files = ["config.yaml", Path("slurm/reproduction.yaml").absolute()]
    typed = plan_command(files, ["papers=[zaremba2014]"])
    assert typed == "uv run ptbench plan slurm/reproduction.yaml --config 'papers=[zaremba2014]'"
    words = parser().parse_args(shlex.split(typed)[3:])
    assert words.configs == [Path("slurm/reproduction.yaml")]
    assert words.config == ["papers=[zaremba2014]"]


def test_a_shell_makes_of_missing_runs_their_paths(tmp_path: Path) -> None:
    experiment = plan("x", ("a+dropout=0.5", "b"), ("jax", "keras"), (1, 2), (1, 3))
    analysis = analyse(experiment, collect_rows(experiment, tmp_path), CorpusFacts(), [])
    batches = missing(runs_of(analysis.rows, tmp_path).values(), tmp_path / "my results")
    assert len(batches) == 8
    script = "printf '%s\\n' " + " ".join(batch.targets for batch in batches)
    paths = subprocess.run(["bash", "-c", script], capture_output=True, text=True).stdout
    assert sorted(paths.splitlines()) == sorted(
        str(tmp_path / "my results" / "cells" / cell.path / "metrics.json")
        for cell in experiment.cells
    )
