"""The checks that every change must pass. Each prints what is wrong."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WORKFLOW_FILES = ["Snakefile", "workflow/rules"]


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(["ruff", "check"], id="ruff finds nothing"),
        pytest.param(["ruff", "format", "--check"], id="the code is formatted"),
        pytest.param(["mypy"], id="type hints hold"),
        pytest.param(["snakefmt", "--check", *WORKFLOW_FILES], id="the rules are formatted"),
        pytest.param(["snakemake", "--lint"], id="snakemake finds nothing"),
    ],
)
def test_check(command: list[str]) -> None:
    answer = subprocess.run(
        [Path(sys.executable).with_name(command[0]), *command[1:]],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
