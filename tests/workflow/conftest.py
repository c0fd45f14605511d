"""A throw-away copy of the project, and the real snakemake run in it."""

from __future__ import annotations

import csv
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

Snakemake = Callable[..., subprocess.CompletedProcess[str]]


class Project:
    """A copy of the project's files that a test may change and run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT, capture_output=True, check=True,
        ).stdout.decode()  # fmt: skip
        for name in listed.split("\0"):
            if name and (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)
        # The environments are large and the same: share those of the project's own folder.
        environments = ROOT / "results" / "environments"
        environments.mkdir(parents=True, exist_ok=True)
        (folder / "results").mkdir(exist_ok=True)
        (folder / "results" / "environments").symlink_to(environments)

    def environment(self) -> dict[str, str]:
        """Environment variables of what runs here: the copy's package, not the installed one.

        JAX keeps what it compiles, for a cell that is started several times.
        """
        return {
            **os.environ,
            "PYTHONPATH": str(self.folder / "workflow"),
            "JAX_COMPILATION_CACHE_DIR": str(self.folder.parent / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }

    def snakemake(
        self, *arguments: str, expect: int | None = 0
    ) -> subprocess.CompletedProcess[str]:
        """Run snakemake here; fail the test unless it exits as expected (None: either way)."""
        answer = subprocess.run(
            [sys.executable, "-m", "snakemake", *arguments],
            cwd=self.folder, capture_output=True, text=True, timeout=1500, env=self.environment(),
        )  # fmt: skip
        if expect is not None:
            assert answer.returncode == expect, answer.stdout + answer.stderr
        return answer

    def planned(self, *arguments: str) -> list[str]:
        """The outputs that the next run would make, in order of their names."""
        answer = self.snakemake("--summary", *arguments)
        header, *rows = csv.reader(io.StringIO(answer.stdout), delimiter="\t")
        files = [dict(zip(header, row, strict=True)) for row in rows]
        return sorted(f["output_file"] for f in files if f["plan"] == "update pending")

    def replace(self, file: str, old: str, new: str) -> None:
        """Change a file as an editor would; `old` must be there."""
        path = self.folder / file
        text = path.read_text()
        assert old in text, f"{file} has no {old!r}"
        path.write_text(text.replace(old, new, 1))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """One copy for all tests of a module."""
    return Project(tmp_path_factory.mktemp("project"))
