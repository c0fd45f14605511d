"""Replicas that are processes, here or on another node: how a run ends with them and without them.

The other node is this machine, too: `two_nodes` has a program in the place of srun.
"""

from __future__ import annotations

import signal
from pathlib import Path

import psutil
import pytest
from tests.faults.harness import RECIPE, ROOT, Trainer, make_corpus, two_nodes

from ptbench.backends import FRAMEWORKS
from ptbench.errors import InterruptionError

SPANNING = [name for name, row in FRAMEWORKS.items() if row.spans_nodes]
ENDLESS = {"schedule": "constant", "patience": None, "epochs": 10_000}
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
        pytest.skip("PyTorch alone has a process for each replica on one machine")
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
    trainer.recipe = RECIPE.model_copy(update=ENDLESS)
    process = trainer.start()
    assert trainer.wait_for_checkpoint(process)
    children = psutil.Process(process.pid).children()
    (replica,) = [p for p in children if "--multiprocessing-fork" in p.cmdline()]
    replica.kill()
    said, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 2, said
    assert "replica 1 ended with exit status -9" in said


@pytest.mark.frameworks(*SPANNING)
def test_a_run_on_two_nodes_that_is_interrupted_ends_as_one_on_one_machine(
    framework: str, tmp_path: Path
) -> None:
    corpus = make_corpus(tmp_path)
    recipe = RECIPE.model_copy(update={"epochs": 4, "patience": None})
    one, two = (Trainer(framework, 2, corpus, tmp_path / name, recipe) for name in ("one", "two"))
    others = two_nodes(two)
    process = two.start()
    assert two.wait_for_checkpoint(process)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == InterruptionError.status, said
    assert "goes on" in two.finish()
    one.finish()
    assert two.result() == one.result()
    started = [int(number) for number in others.read_text().split()]
    assert len(started) == 2  # one for each attempt
    wait_for_end(started)


@pytest.mark.frameworks(*SPANNING)
@pytest.mark.parametrize("killed", ["the other node's", "the first"])
def test_of_replicas_on_two_nodes_none_outlives_another(
    framework: str, killed: str, tmp_path: Path
) -> None:
    recipe = RECIPE.model_copy(update=ENDLESS)
    trainer = Trainer(framework, 2, make_corpus(tmp_path), tmp_path / "results", recipe)
    others = two_nodes(trainer)
    process = trainer.start()
    assert trainer.wait_for_checkpoint(process)
    (other,) = map(int, others.read_text().split())
    if killed == "the first":
        process.kill()
        process.communicate()
    else:
        psutil.Process(other).kill()
        said, _ = process.communicate(timeout=SECONDS)
        assert process.returncode == 2, said
        assert f"{framework}: replica 1 ended on second; the reason is in what it printed" in said
    wait_for_end([other])


def wait_for_end(numbers: list[int]) -> None:
    """Wait a few seconds until processes have ended, some of which may have by now."""
    alive = [psutil.Process(number) for number in numbers if psutil.pid_exists(number)]
    _, alive = psutil.wait_procs(alive, timeout=10)
    assert not alive
