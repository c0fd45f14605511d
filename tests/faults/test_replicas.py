"""PyTorch's replicas are processes: what the trainer says when one of them ends before its time."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
from tests.faults.harness import RECIPE, ROOT, Trainer, make_corpus

SECONDS = 120  # to import PyTorch on a busy machine; torch.distributed would wait for 600
# Python imports this module first of all, in the processes that multiprocessing starts too.
BEFORE_IT_JOINS = """
import os, sys
if "--multiprocessing-fork" in sys.orig_argv:
    os._exit(7)
"""
AFTER_IT_JOINED = """
import os, sys
if "--multiprocessing-fork" in sys.orig_argv:
    import ptbench.model.parameters as parameters
    parameters.kept_weights = lambda *_: os._exit(7)  # a backend needs them
"""


@pytest.fixture
def trainer(frameworks: list[str], tmp_path: Path) -> Trainer:
    if "pytorch" not in frameworks:
        pytest.skip("PyTorch alone has a process for each replica")
    return Trainer("pytorch", 2, make_corpus(tmp_path), tmp_path / "results")


@pytest.mark.parametrize("module", [BEFORE_IT_JOINS, AFTER_IT_JOINED], ids=["before", "after"])
def test_a_replica_that_ends_before_the_first_step_is_named(
    module: str, trainer: Trainer, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(module)
    process = trainer.start(PYTHONPATH=f"{tmp_path}:{ROOT / 'workflow'}")
    said, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 2, said
    assert "replica 1 ended with exit status 7" in said
    assert "Traceback" not in said


def test_a_replica_that_is_killed_while_it_trains_is_named(trainer: Trainer) -> None:
    endless = {"schedule": "constant", "patience": None, "epochs": 10_000}
    trainer.recipe = RECIPE.model_copy(update=endless)
    process = trainer.start()
    assert trainer.wait_for_checkpoint(process)
    children = psutil.Process(process.pid).children()
    (replica,) = [p for p in children if "--multiprocessing-fork" in p.cmdline()]
    replica.kill()
    said, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 2, said
    assert "replica 1 ended with exit status -9" in said
