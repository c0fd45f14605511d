"""Jobs of an earlier run; tests/slurm/ asks a real queue."""

from __future__ import annotations

from pathlib import Path

import pytest

from ptbench.errors import PtbenchError
from ptbench.slurm import queued, refuse_duplicates


def test_jobs_of_this_folder_alone_stand_in_the_way(tmp_path: Path) -> None:
    here, elsewhere = tmp_path / "a clone", tmp_path / "another"
    here.mkdir()
    link = tmp_path / "link"
    link.symlink_to(here)
    queue = "\n".join(
        [
            f"7 R rule_train_wildcards_tiny_jax_1_1 {here}",
            f"8 PD rule_train_wildcards_tiny_jax_1_2 {link}",  # as a login node may see it
            f"9 R rule_train_wildcards_tiny_jax_1_3 {elsewhere}",
            f"10 R (null) {here}",  # the user's own
        ]
    )
    assert queued(here, lambda: queue) == {
        "7": "rule_train_wildcards_tiny_jax_1_1",
        "8": "rule_train_wildcards_tiny_jax_1_2",
    }
    with pytest.raises(PtbenchError, match=r"^2 jobs of an earlier run .* scancel 7 8$"):
        refuse_duplicates(here, lambda: queue)
    refuse_duplicates(tmp_path, lambda: queue)
    refuse_duplicates(here, lambda: "")


def test_where_there_is_no_slurm_there_are_no_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    refuse_duplicates(tmp_path)
    broken = tmp_path / "squeue"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    refuse_duplicates(tmp_path)  # the cells' locks still stand
