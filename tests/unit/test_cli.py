"""The command line: one sentence and no traceback for what is not ptbench's fault."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.sentences import assert_no_frames

from ptbench import cli
from ptbench.report.closing import print_results


def ptbench(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ptbench", *arguments], capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["train", "--cell", "nonsense"], 2, "the following arguments are required"),
        (["nonsense"], 2, "invalid choice"),
        (["validate", "no-such.yaml"], 2, "cannot read no-such.yaml: No such file"),
        (["environments", "torch", "--output", "x"], 2, "invalid choice: 'torch'"),
        (["compare", "here", "there"], 2, "here has no experiments/*/analysis.json"),
        (["benchmark", "--seconds", "nan"], 2, "nan is not a number from 0"),
        (["plan", "--config", "seeds=1", "mine.yaml"], 2, "mine.yaml is not KEY=VALUE; files come"),
        (["status", "--study", "nope"], 2, "nope: cannot be read: No such file"),
        (
            ["corpus", "--corpus", "{}", "--downloads", "y", "--output", "z"],
            2, "--corpus is not what the workflow passes",
        ),
        (
            ["train", "--cell", "a/b", "--specification", "{}", "--corpus", "c", "--output", "o",
             "--attempts", "a", "--checkpoints", "p"],
            2, "--cell a/b is not variant/framework/devices-N/seed-N",
        ),
        (
            ["train", "--cell", "v/jax/devices-1/seed-1", "--specification", "{}", "--corpus", "c",
             "--output", "o", "--attempts", "a", "--checkpoints", "p"],
            2, "the specification cannot be read",
        ),
    ],
)  # fmt: skip
def test_a_bad_command_is_a_sentence(arguments: list[str], status: int, message: str) -> None:
    answer = ptbench(*arguments)
    assert answer.returncode == status
    assert message in answer.stderr
    assert_no_frames(answer.stderr)


def test_what_a_terminal_cannot_show_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii"))
    monkeypatch.setitem(cli.COMMANDS, "show", cli.Command(lambda: print("grün"), "Show.", ()))
    cli.main(["show"])
    sys.stdout.flush()
    assert shown.getvalue() == b"gr?n\n"
    # Snakemake prints the results in its own process.
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown := io.BytesIO(), encoding="ascii"))
    print_results([], Path("grün/index.html"))
    sys.stdout.flush()
    assert shown.getvalue().endswith(b"The report is at gr?n/index.html\n")


def test_a_place_that_cannot_be_written_to_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    answer = ptbench("generate", "--output", tmp_path / "file" / "folder")
    assert answer.returncode == 2
    assert "file/folder/workflow/schemas: Not a directory" in answer.stderr
    assert_no_frames(answer.stderr)
