"""Every fault of docs/slurm.md, on a real Slurm; after each, the same command finishes the study.

A cell here trains the oracle in place of a framework, so slowly as the test asks for: it spends its
time asleep. Faults are played side by side, in lanes, because each is mostly waiting; the tests
wait for the outcomes. Only the faults of the first lane begin on the node that they bring down.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.slurm.conftest import Study
from tests.slurm.testbed import GPUS, Testbed, wait_until

from ptbench.training.records import read_history, read_metrics

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(3600)]

EPOCHS = 20
CLOCKED = {"tokens_per_second", "training_seconds", "validation_seconds"}
PATIENCE = 900  # seconds for anything that is waited for; on a quiet machine some are two minutes

Fault = Callable[[Testbed, Path], "Faulty"]


class Faulty(Study):
    """A study of two cells that take some time."""

    def __init__(
        self, testbed: Testbed, folder: Path, node: str | None = "node1", seeds: int = 2
    ) -> None:
        super().__init__(folder, ["pytorch"], [1], [*range(1, seeds + 1)], epochs=EPOCHS)
        self.replace(
            "workflow/rules/training.smk", "-m ptbench train", "-m tests.support.toy_trainer train"
        )
        self.testbed = testbed
        self.step_seconds = 0.0  # that every training step sleeps
        if node:
            self.replace("slurm/profile.yaml", "=USR1@120", f"=USR1@120 --nodelist={node}")

    def environment(self) -> dict[str, str]:
        return super().environment() | {"TOY_SECONDS": str(self.step_seconds)}

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        """Wait until a condition holds; a failure tells what Snakemake said."""
        try:
            wait_until(condition, what, PATIENCE)
        except TimeoutError as error:
            raise TimeoutError(f"{error}; Snakemake said:\n{self.said()[-6000:]}") from None

    def wait_for_checkpoints(self, *cells: str) -> None:
        """Wait until these cells, or all, have something to lose."""
        for cell in cells or self.cells:
            checkpoint = self.folder / "results/checkpoints" / cell / "last.safetensors"
            self.wait(checkpoint.exists, f"a checkpoint of {cell}")

    def submitted(self) -> int:
        """Jobs that Snakemake has submitted so far."""
        return self.said().count("has been submitted with SLURM jobid")

    def attempts(self, cell: str) -> list[dict[str, object]]:
        """The records of a cell's attempts."""
        folder = self.folder / "results/attempts" / cell
        return [
            json.loads((folder / f"attempt-{number}.json").read_text())
            for number in range(1, 1 + len(list(folder.glob("attempt-*[0-9].json"))))
        ]

    def log(self, cell: str, attempt: int) -> str:
        """What an attempt at a cell printed."""
        return (self.folder / f"results/attempts/{cell}/attempt-{attempt}.log").read_text()

    def went_on(self, cell: str) -> bool:
        """Whether the log of the cell's newest attempt says that it began at a checkpoint."""
        return "goes on" in self.log(cell, len(self.attempts(cell)))

    def job_of(self, cell: str) -> str:
        """The newest job of a cell that runs."""
        comment = f"rule_train_wildcards_{cell.replace('devices-', '').replace('seed-', '')}"
        queue = self.testbed.ask("squeue", "-h", "-t", "running", "-o", "%i %k %Z").splitlines()
        [job] = [
            line.split()[0]
            for line in queue
            if line.split()[1] == comment.replace("/", "_") and line.endswith(str(self.folder))
        ]
        return job

    def jobs(self) -> list[str]:
        """Jobs of this study that are in the queue."""
        queue = self.testbed.ask("squeue", "-h", "-o", "%i %Z").splitlines()
        return [line.split()[0] for line in queue if line.endswith(str(self.folder))]

    def finish(self) -> None:
        """Run the same command once more; everything is there then, and nothing was done twice."""
        before = self.finished()
        self.step_seconds = 0.0
        self.run()
        assert (self.folder / "results/report/index.html").exists()
        after = self.finished()
        assert after.keys() == set(self.cells)
        assert {cell: after[cell] for cell in before} == before
        for cell in self.cells:
            metrics = read_metrics(self.file(cell))
            assert (metrics.status, metrics.epochs) == ("ok", EPOCHS)

    def histories(self) -> list[list[dict[str, float]]]:
        """What every cell went through, without the columns that a clock wrote."""
        return [
            [
                row.model_dump(exclude=CLOCKED)
                for row in read_history(self.file(cell, "history.csv"))
            ]
            for cell in self.cells
        ]


def a_job_fails(testbed: Testbed, folder: Path) -> Faulty:
    """Exits non-zero: the others finish; the same command runs that one alone."""
    study = Faulty(testbed, folder)
    study.profile("retries: 2", 0)
    bad, good = study.cells
    in_the_way = study.folder / "results/checkpoints" / bad
    in_the_way.parent.mkdir(parents=True)
    in_the_way.write_text("not a folder")
    said = study.run(expect=1)
    assert f"results/cells/{bad}/metrics.json" in said
    assert list(study.finished()) == [good]
    in_the_way.unlink()
    before = study.submitted()
    study.finish()
    assert study.submitted() == before + 1
    return study


def a_job_is_cancelled(testbed: Testbed, folder: Path) -> Faulty:
    """scancel: the cell saves; Snakemake submits it again, and it goes on."""
    study = Faulty(testbed, folder)
    study.step_seconds = 0.5
    with study.start() as snakemake:
        study.wait_for_checkpoints()
        cancelled, other = study.cells
        testbed.ask("scancel", study.job_of(cancelled))
        study.wait(lambda: snakemake.poll() is not None, "the study to end")
    assert snakemake.returncode == 0, study.said()
    assert study.submitted() == 3
    assert study.went_on(cancelled)
    assert len(study.attempts(other)) == 1
    study.finish()
    return study


def a_job_runs_out_of_time(testbed: Testbed, folder: Path) -> Faulty:
    """Slurm warns, the cell saves, and the next attempt has more time and goes on."""
    study = Faulty(testbed, folder, seeds=1)
    study.replace("slurm/profile.yaml", "=USR1@120", "=USR1@10")
    study.replace(
        "slurm/profile.yaml",
        "  train:\n",
        "  train:\n    runtime: 3 if attempt == 1 else 20  # minutes\n",
    )
    [cell] = study.cells
    study.step_seconds = 2.5
    with study.start() as snakemake:
        study.wait_for_checkpoints()
        first = study.job_of(cell)
        limits = [testbed.ask("squeue", "-h", "-j", first, "-o", "%l").strip()]
        study.wait(lambda: len(study.attempts(cell)) == 2, "the second attempt")
        assert study.attempts(cell)[0]["status"] == "interrupted"
        second = study.job_of(cell)
        limits.append(testbed.ask("squeue", "-h", "-j", second, "-o", "%l").strip())
        study.wait(lambda: snakemake.poll() is not None, "the study to end")
    assert limits == ["3:00", "20:00"]
    assert "SIGUSR1: saving" in study.log(cell, 1)
    assert snakemake.returncode == 0, study.said()
    assert study.went_on(cell)
    study.finish()
    return study


def a_node_crashes(testbed: Testbed, folder: Path) -> Faulty:
    """Slurm starts the job again elsewhere, under the same number."""
    study = Faulty(testbed, folder, node=None, seeds=1)
    study.step_seconds = 0.5
    with study.start() as snakemake:
        study.wait_for_checkpoints()
        jobs = study.jobs()
        testbed.crash("node2")
        study.wait(lambda: snakemake.poll() is not None, "the study to end")
    testbed.boot("node2")
    testbed.wait_for_idle("node2")
    assert snakemake.returncode == 0, study.said()
    assert study.submitted() == 1  # no retry was used
    assert sorted(study.facts(cell)["slurm_job"] for cell in study.cells) == sorted(jobs)
    for cell in study.cells:
        assert study.facts(cell)["slurm_node"] == "node1"
        assert study.attempts(cell)[0]["status"] == "killed"
        assert study.went_on(cell)
    study.finish()
    return study


def a_job_is_preempted(testbed: Testbed, folder: Path) -> Faulty:
    """Another's job takes the GPUs: the cell saves, is queued again, and goes on."""
    study = Faulty(testbed, folder, node=None)
    study.step_seconds = 0.5
    with study.start() as snakemake:
        study.wait_for_checkpoints()
        jobs = study.jobs()
        testbed.ask(
            "sbatch", "--partition=urgent", f"--gpus={GPUS}", "--nodelist=node2",
            "--output=/dev/null", "--wrap=sleep 10",
        )  # fmt: skip
        study.wait(lambda: snakemake.poll() is not None, "the study to end")
    assert snakemake.returncode == 0, study.said()
    assert study.submitted() == 2
    assert sorted(study.facts(cell)["slurm_job"] for cell in study.cells) == sorted(jobs)
    for cell in study.cells:
        assert len(study.attempts(cell)) == 2
        assert study.went_on(cell)
    study.finish()
    return study


def snakemake_is_interrupted(testbed: Testbed, folder: Path) -> Faulty:
    """SIGINT: its jobs are cancelled; what they had is not lost."""
    study = Faulty(testbed, folder)
    study.step_seconds = 4.0  # none ends before it is cancelled
    with study.start() as snakemake:
        study.wait_for_checkpoints()
        snakemake.send_signal(signal.SIGINT)
        study.wait(lambda: snakemake.poll() is not None, "Snakemake to end")
    assert snakemake.returncode != 0
    study.wait(lambda: not study.jobs(), "its jobs to be gone")
    assert not study.finished()
    study.finish()
    assert all(study.went_on(cell) for cell in study.cells)
    return study


def snakemake_is_terminated(testbed: Testbed, folder: Path) -> Faulty:
    """SIGTERM: running jobs finish, and no more are submitted."""
    study = Faulty(testbed, folder)
    study.profile("jobs: 200", 1)
    study.step_seconds = 0.5
    with study.start() as snakemake:
        study.wait(lambda: len(study.jobs()) == 1, "the first job")
        time.sleep(2)
        snakemake.send_signal(signal.SIGTERM)
        study.wait(lambda: snakemake.poll() is not None, "Snakemake to end")
    assert study.submitted() == 1
    assert len(study.finished()) == 1
    study.finish()
    assert study.submitted() == 2
    return study


def snakemake_is_killed(testbed: Testbed, folder: Path) -> Faulty:
    """SIGKILL: its jobs run on; another Snakemake does not submit them again."""
    study = Faulty(testbed, folder, seeds=1)
    study.step_seconds = 2.0
    with study.start() as snakemake:
        study.wait_for_checkpoints()
        snakemake.kill()
    [job] = study.jobs()
    study.snakemake("--unlock")
    said = study.run(expect=1)
    assert "1 job of an earlier run is still in Slurm's queue" in said
    assert f"scancel {job}" in said
    assert study.jobs() == [job]

    # Who submits it again all the same, without Snakemake's hooks, corrupts nothing.
    [cell] = study.cells
    study.run("--no-hooks", f"results/cells/{cell}/metrics.json")
    assert study.submitted() == 2
    study.wait(lambda: not study.jobs(), "the jobs to be done")
    assert [attempt["status"] for attempt in study.attempts(cell)] == ["finished"]
    assert study.facts(cell)["slurm_job"] == job
    study.finish()
    assert study.submitted() == 2
    return study


LANES: list[list[Fault]] = [
    [a_node_crashes, a_job_is_preempted],
    [a_job_runs_out_of_time],
    [a_job_is_cancelled, snakemake_is_interrupted, a_job_fails],
    [snakemake_is_killed, snakemake_is_terminated],
]
FAULTS = [fault for lane in LANES for fault in lane]


@pytest.fixture(scope="module")
def outcomes(
    testbed: Testbed, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[Fault, Future[Faulty]]]:
    """Every fault, played in its lane."""
    made = {fault: Future[Faulty]() for fault in FAULTS}
    folders = {fault: tmp_path_factory.mktemp(fault.__name__) for fault in FAULTS}

    def play(lane: list[Fault]) -> None:
        for fault in lane:
            try:
                made[fault].set_result(fault(testbed, folders[fault]))
            except BaseException as error:
                made[fault].set_exception(error)

    with ThreadPoolExecutor(len(LANES)) as pool:
        for lane in LANES:
            pool.submit(play, lane)
        yield made


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_the_same_command_finishes_the_study_after(
    fault: Fault, outcomes: dict[Fault, Future[Faulty]]
) -> None:
    outcomes[fault].result()


def test_a_study_that_was_disturbed_ends_as_one_that_was_not(
    outcomes: dict[Fault, Future[Faulty]], testbed: Testbed, tmp_path: Path
) -> None:
    """Bit for bit, whatever became of it on the way."""
    quiet = Faulty(testbed, tmp_path)
    quiet.run()
    for outcome in outcomes.values():
        disturbed = outcome.result().histories()
        assert disturbed == quiet.histories()[: len(disturbed)]
