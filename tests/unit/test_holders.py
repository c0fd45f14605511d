"""Whether the holder of a cell is alive, seen from other processes, machines and Slurm jobs."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ptbench.training import holders
from ptbench.training.holders import Holder, lives, silence_of, this_process

LATELY, LONG_AGO = holders.SILENCE_SECONDS - 1, holders.SILENCE_SECONDS + 1


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.communicate()


def holder_of(pid: int) -> Holder:
    return this_process({}).model_copy(update={"pid": pid, "started": holders.started(pid)})


def elsewhere(**changes: object) -> Holder:
    """A holder on another machine."""
    return this_process({}).model_copy(
        update={"host": "node2", "machine": "another boot", **changes}
    )


def test_a_process_of_this_machine_lives_while_it_runs_however_long_it_was_silent(
    child: subprocess.Popen[bytes],
) -> None:
    holder, me = holder_of(child.pid), this_process({})
    assert lives(me, LONG_AGO, me)
    assert lives(holder, LONG_AGO, me)
    child.kill()
    while holders.started(child.pid):  # a zombie until it is waited for
        time.sleep(0.01)
    assert Path(f"/proc/{child.pid}").exists()
    assert not lives(holder, 0, me)
    child.wait()
    assert not lives(holder, 0, me)


def test_another_process_with_the_same_number_is_not_taken_for_it(
    child: subprocess.Popen[bytes],
) -> None:
    before = holder_of(child.pid).model_copy(update={"started": "1"})
    assert not lives(before, 0, this_process({}))


def test_on_another_machine_or_in_another_container_silence_decides() -> None:
    me = this_process({})
    gone = 2**22 + 1  # no process has this number; over there it would mean nothing
    assert lives(elsewhere(pid=gone), LATELY, me)
    assert not lives(elsewhere(pid=os.getpid()), LONG_AGO, me)
    assert me.machine is not None
    boot = me.machine.split()[0]
    assert lives(elsewhere(host=me.host, machine=f"{boot} pid:[1]", pid=gone), LATELY, me)
    assert lives(elsewhere(machine=None, pid=gone), LATELY, me.model_copy(update={"machine": None}))


def slurm(job: str, restarts: int | None = None, nodes: int = 1, cluster: str = "c") -> Holder:
    environment = {
        "SLURM_JOB_ID": job, "SLURM_CLUSTER_NAME": cluster, "SLURM_JOB_NUM_NODES": str(nodes)
    }  # fmt: skip
    if restarts is not None:
        environment["SLURM_RESTART_COUNT"] = str(restarts)
    return this_process(environment)


def moved(holder: Holder) -> Holder:
    return holder.model_copy(update={"host": "node2", "machine": "another boot"})


def plugin(job: str) -> Holder:
    """As Snakemake's plugin leaves it to its inner srun."""
    environment = {"SLURM_JOB_ID": job, "SLURM_CLUSTER_NAME": "c", "SLURM_NNODES": "1"}
    return this_process(environment)


@pytest.mark.parametrize(
    ("before", "now", "alive"),
    [
        pytest.param(moved(slurm("7")), slurm("7", 1), False, id="requeued"),
        pytest.param(slurm("7", 1), slurm("7", 2), False, id="requeued, on the same node"),
        pytest.param(moved(slurm("7")), slurm("7"), False, id="the job's only node is another"),
        pytest.param(
            moved(plugin("7")), plugin("7"), False, id="the plugin's only node is another"
        ),
        pytest.param(moved(slurm("7", 0, 2)), slurm("7", 0, 2), True, id="two nodes of a job"),
        pytest.param(slurm("7", 1), slurm("7", 1), True, id="two steps on one node"),
        pytest.param(moved(slurm("7", 3)), slurm("8"), True, id="another job"),
        pytest.param(moved(slurm("7")), slurm("7", 1, cluster="d"), True, id="another cluster"),
        pytest.param(moved(slurm("7")), this_process({}), True, id="asked from outside Slurm"),
    ],
)
def test_a_requeued_job_knows_that_what_ran_before_under_its_number_is_gone(
    before: Holder, now: Holder, alive: bool
) -> None:
    assert lives(before, 0, now) is alive


def test_silence_is_told_by_the_file_systems_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "record"
    file.touch()
    assert silence_of(file) == pytest.approx(0, abs=5)
    then = time.time() - 1000
    os.utime(file, (then, then))
    monkeypatch.setattr(time, "time", lambda: 1.0)  # this machine believes it is 1970
    assert silence_of(file) == pytest.approx(1000, abs=5)
    holders.touch(file)
    assert silence_of(file) == pytest.approx(0, abs=5)
    assert [path.name for path in tmp_path.iterdir()] == ["record"]
