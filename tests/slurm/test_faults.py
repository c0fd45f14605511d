"""Every fault of docs/slurm.md, on a real Slurm; after each, the same command finishes the study.

A cell here trains the oracle in place of a framework, so slowly as the test asks for: it spends its
time asleep. A study suffers several faults, and two studies are played side by side, because each
is mostly waiting. What brings down the controller, for all, is played when they are done.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.slurm.conftest import Study
from tests.slurm.testbed import GPUS, SPARE, Testbed, wait_until

from ptbench.files import write_atomically
from ptbench.training.records import read_metrics

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800)]

EPOCHS = 10
PATIENCE = 600  # seconds for anything that is waited for; on a quiet machine some take two minutes

Fault = Callable[[Testbed, Path], "Faulty"]


class Faulty(Study):
    """A study whose cells take some time, on node1 if nothing else is said."""

    def __init__(self, testbed: Testbed, folder: Path, seeds: int) -> None:
        super().__init__(folder, ["pytorch"], [1], [*range(1, seeds + 1)], epochs=EPOCHS)
        self.replace(
            "workflow/rules/training.smk",
            'f"exec {FRAMEWORK_PYTHON} -m ptbench train"',
            'f"TOY_PACE=toy-{{wildcards.seed}} exec {FRAMEWORK_PYTHON}'
            ' -m tests.support.toy_trainer train"',
        )
        # tests/slurm/test_study.py goes on to the report
        self.replace("workflow/rules/common.smk", '        "results/report/index.html",\n', "")
        self.testbed = testbed
        self.takes(0.0, *self.cells)
        self.extra("'--signal=USR1@120 --nodelist=node1'")

    def extra(self, expression: str) -> None:
        """Set the further options of sbatch for cells, to a Python expression in wildcards."""
        path = self.folder / "slurm/profile.yaml"
        lines = path.read_text().splitlines()
        index = lines.index("  train:") + 1
        while not lines[index].startswith("    slurm_extra:"):
            index += 1
        lines[index] = f'    slurm_extra: "{expression}"'
        path.write_text("\n".join(lines) + "\n")

    def takes(self, seconds: float, *cells: str) -> None:
        """Let every training step of these cells sleep, those under way too."""
        for cell in cells:
            write_atomically(self.folder / f"toy-{cell.rpartition('-')[2]}", f"{seconds}\n")

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        """Wait until a condition holds; a failure, or Snakemake's end, tells what it said."""
        running = self.process if self.process and self.process.poll() is None else None

        def over() -> bool:
            return condition() or (running is not None and running.poll() is not None)

        try:
            wait_until(over, what, PATIENCE)
            if not condition():
                raise TimeoutError(f"Snakemake ended before {what}")
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

    def status(self) -> dict[str, str]:
        """What `ptbench status` says of every cell."""
        answer = subprocess.run(
            [sys.executable, "-m", "ptbench", "status", "--json"],
            cwd=self.folder, capture_output=True, text=True, check=True, env=self.environment(),
        )  # fmt: skip
        return {cell["path"]: cell["state"] for cell in json.loads(answer.stdout)["cells"]}

    def went_on(self, cell: str) -> bool:
        """Whether the log of the cell's newest attempt says that it began at a checkpoint."""
        return "goes on" in self.log(cell, len(self.attempts(cell)))

    def job_of(self, cell: str) -> str:
        """The job of a cell."""
        comment = f"rule_train_wildcards_{cell.replace('devices-', '').replace('seed-', '')}"
        queue = self.testbed.ask("squeue", "-h", "-o", "%i %k %Z").splitlines()
        [job] = [
            line.split()[0]
            for line in queue
            if line.split()[1] == comment.replace("/", "_") and line.endswith(str(self.folder))
        ]
        return job

    def was_requeued(self, job: str) -> bool:
        """Whether Slurm has queued a job again, under its number."""
        return " Restarts=1 " in self.testbed.ask("scontrol", "show", "job", job)

    def jobs(self) -> list[str]:
        """Jobs of this study that are in the queue."""
        queue = self.testbed.ask("squeue", "-h", "-o", "%i %Z").splitlines()
        return [line.split()[0] for line in queue if line.endswith(str(self.folder))]

    def finish(self) -> None:
        """Run the same command once more; everything is there then, and nothing was done twice."""
        before = self.finished()
        self.takes(0.0, *self.cells)
        self.run()
        after = self.finished()
        assert after.keys() == set(self.cells)
        assert {cell: after[cell] for cell in before} == before
        for cell in self.cells:
            metrics = read_metrics(self.file(cell))
            assert (metrics.status, metrics.epochs) == ("ok", EPOCHS)


def jobs_are_disturbed(testbed: Testbed, folder: Path) -> Faulty:
    """One job fails, the others are cancelled, out of time, on a node that crashes, preempted."""
    study = Faulty(testbed, folder, seeds=5)
    failing, cancelled, timed, crashed, preempted = study.cells
    study.extra("'--signal=USR1@10' + ' --nodelist=node1' * (int(wildcards.seed) < 4)")
    study.replace(
        "slurm/profile.yaml",
        "    slurm_extra",
        "    slurm_partition: \"'spare' if wildcards.seed == '5' else 'gpu'\"\n    slurm_extra",
    )
    study.profile("retries: 2", 1)
    study.replace("workflow/ptbench/model/work.py", "START_UP = 900.0", "START_UP = 100.0")
    study.replace(
        "workflow/rules/common.smk",
        'times(output, "time"))',
        'times(output, "time")) + 9 * (wildcards.seed != "3")',
    )
    in_the_way = study.folder / "results/checkpoints" / failing
    in_the_way.parent.mkdir(parents=True)
    in_the_way.write_text("not a folder")
    study.takes(2.0, *study.cells)
    with study.start() as snakemake:
        study.wait(lambda: len(study.jobs()) == 5, "five jobs")
        assert set(study.status().values()) <= {"queued", "starting", "running", "failed"}
        study.wait_for_checkpoints(*study.cells[1:])
        jobs = {cell: study.job_of(cell) for cell in study.cells[1:]}
        limits = [testbed.ask("squeue", "-h", "-j", jobs[timed], "-o", "%l").strip()]
        testbed.ask("scancel", jobs[cancelled])
        testbed.crash("node2")
        testbed.ask(
            "sbatch", "--partition=urgent", f"--gpus={GPUS}", f"--nodelist={SPARE}",
            "--output=/dev/null", "--wrap=sleep 10",
        )  # fmt: skip
        study.wait(lambda: study.was_requeued(jobs[preempted]), "the preemption")
        study.wait(lambda: study.was_requeued(jobs[crashed]), "Slurm to see the crash")
        states = study.status()
        assert {states[crashed], states[preempted]} <= {"queued", "starting", "running"}
        study.takes(0.0, cancelled, crashed, preempted)
        study.wait(lambda: len(study.attempts(timed)) == 2, "the attempt after the time limit")
        study.takes(0.0, timed)
        second = study.job_of(timed)
        limits.append(testbed.ask("squeue", "-h", "-j", second, "-o", "%l").strip())
        study.wait(lambda: snakemake.poll() is not None, "the study to end")
    testbed.boot("node2")

    # One failed, for a reason that is told, and the others did not mind.
    assert snakemake.returncode == 1
    assert list(study.finished()) == study.cells[1:]
    said = study.said()
    target = f"results/cells/{failing}/metrics.json"
    assert f"{failing} failed (attempt 2): " in said
    assert "uv run snakemake --profile slurm" in said or "snakemake --profile slurm" in said
    assert said.rstrip().count(f"-- {target}") >= 1

    assert study.submitted() == 5 + 3  # retries of the first three; Slurm requeued the others
    for cell in (cancelled, timed, crashed, preempted):
        assert len(study.attempts(cell)) == 2
        assert study.went_on(cell)
    assert limits == ["2:00", "4:00"]  # more time, and only where time was short
    assert "SIGUSR1: saving" in study.log(timed, 1)
    assert study.attempts(timed)[0]["status"] == "interrupted"
    assert study.attempts(crashed)[0]["status"] == "killed"
    assert study.facts(crashed)["slurm_job"] == jobs[crashed]
    assert study.facts(crashed)["slurm_node"] == "node1"
    assert study.facts(preempted)["slurm_job"] == jobs[preempted]

    in_the_way.unlink()
    before = study.submitted()
    study.finish()
    assert study.submitted() == before + 1
    return study


def snakemake_is_disturbed(testbed: Testbed, folder: Path) -> Faulty:
    """It is interrupted, killed, and told to terminate."""
    study = Faulty(testbed, folder, seeds=3)
    study.replace("slurm/profile.yaml", "    gpu: int(wildcards.devices)", "    # gpu:")
    first, *others = study.cells
    target = f"results/cells/{first}/metrics.json"

    # SIGINT: its jobs are cancelled; what they had is not lost.
    study.takes(2.0, first)
    with study.start(target) as snakemake:
        study.wait_for_checkpoints(first)
        snakemake.send_signal(signal.SIGINT)
        study.wait(lambda: snakemake.poll() is not None, "Snakemake to end")
    assert snakemake.returncode != 0
    study.wait(lambda: not study.jobs(), "its jobs to be gone")
    assert not study.finished()

    # SIGKILL: its jobs run on; another Snakemake does not submit them again.
    with study.start(target) as snakemake:
        study.wait(lambda: len(study.attempts(first)) == 2, "the second attempt")
        snakemake.kill()
    [job] = study.jobs()
    study.snakemake("--unlock")
    said = study.run(expect=1)
    assert "1 job of an earlier run is still in Slurm's queue" in said
    assert f"scancel {job}" in said
    assert study.jobs() == [job]

    # Who submits it again all the same, without Snakemake's hooks, corrupts nothing.
    with study.start("--no-hooks", target) as snakemake:
        log = study.folder / f"results/logs/cells/{first}.log"
        study.wait(
            lambda: log.exists() and "waiting for that to end" in log.read_text(),
            "the second job to wait",
        )
        study.takes(0.0, first)
        study.wait(lambda: snakemake.poll() is not None, "Snakemake to end")
    assert snakemake.returncode == 0
    assert study.submitted() == 3
    study.wait(lambda: not study.jobs(), "the jobs to be done")
    statuses = [attempt["status"] for attempt in study.attempts(first)]
    assert statuses == ["interrupted", "finished"]
    assert study.facts(first)["slurm_job"] == job
    assert study.went_on(first)

    # In the background it ignores SIGINT. SIGTERM: running jobs finish, and no more are submitted.
    study.profile("jobs: 200", 1)
    study.takes(2.0, *others)
    with study.start(background=True) as snakemake:
        study.wait(lambda: len(study.jobs()) == 1, "the first job")
        snakemake.send_signal(signal.SIGINT)
        study.wait(lambda: any(map(study.attempts, others)), "the first attempt")
        assert snakemake.poll() is None
        assert len(study.jobs()) == 1
        snakemake.send_signal(signal.SIGTERM)
        study.takes(0.0, *others)
        study.wait(lambda: snakemake.poll() is not None, "Snakemake to end")
    assert study.submitted() == 4
    assert len(study.finished()) == 2
    study.finish()
    assert study.submitted() == 5
    return study


def the_controller_is_away(testbed: Testbed, folder: Path) -> Faulty:
    """While jobs in a reservation are submitted, and while they end; others it had refused."""
    study = Faulty(testbed, folder, seeds=3)
    refusals = {
        "nosuch": "invalid partition",
        "short": "Batch job submission failed: Requested time",
    }
    before = "# slurm_partition: gpu"
    for partition, words in refusals.items():
        study.replace("slurm/profile.yaml", f"  {before}", f"  slurm_partition: {partition}")
        before = f"slurm_partition: {partition}"
        said = study.run(expect=1)
        assert f"sbatch refused 3 jobs in a row: sbatch: error: {words}" in said
        assert f"failed: not submitted: sbatch: error: {words}" in said
        assert said.count(" failed; see ") <= 5  # and not three for each cell
    assert study.submitted() == 0

    study.replace("slurm/profile.yaml", f"  {before}", "  slurm_partition: gpu")
    study.replace("slurm/profile.yaml", "# ptbench-slurm-reservation", "ptbench-slurm-reservation")
    testbed.ask(
        "scontrol", "create", "reservation", "ReservationName=course-42", "StartTime=now",
        "Duration=60", "Users=root", "Nodes=node1",
    )  # fmt: skip
    study.takes(2.0, *study.cells)
    testbed.stop_controller()
    with study.start() as snakemake:
        study.wait(lambda: "Trying again until it takes the job" in study.said(), "a refusal")
        testbed.start_controller()
        study.wait_for_checkpoints()
        assert testbed.ask("squeue", "-h", "-o", "%v").split() == ["course-42"] * 3
        testbed.stop_controller()
        study.wait(lambda: "Slurm does not answer" in study.said(), "Snakemake to see it")
        study.takes(0.0, *study.cells)
        study.wait(lambda: len(study.finished()) == 3, "the cells to finish all the same")
        testbed.start_controller()
        study.wait(lambda: snakemake.poll() is not None, "the study to end")
    assert snakemake.returncode == 0, study.said()
    assert study.submitted() == 3
    study.finish()
    assert study.submitted() == 3
    # Other tests use this Slurm, and node1 is theirs too.
    testbed.ask("scontrol", "delete", "ReservationName=course-42")
    return study


LANES: list[Fault] = [jobs_are_disturbed, snakemake_is_disturbed]
FAULTS: list[Fault] = [*LANES, the_controller_is_away]


@pytest.fixture(scope="module")
def outcomes(
    testbed: Testbed, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[Fault, Future[Faulty]]]:
    """Every study, played."""
    folders = {fault: tmp_path_factory.mktemp(fault.__name__) for fault in FAULTS}
    with ThreadPoolExecutor(len(LANES)) as pool:
        made = {fault: pool.submit(fault, testbed, folders[fault]) for fault in LANES}
        for outcome in made.values():
            outcome.exception()
        last = FAULTS[-1]
        made[last] = pool.submit(last, testbed, folders[last])
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
    quiet = Faulty(testbed, tmp_path, seeds=5)
    targets = [f"results/cells/{cell}/metrics.json" for cell in quiet.cells]
    quiet.snakemake("--cores", "2", "--configfile", "slurm/reproduction.yaml", "--", *targets)
    for outcome in outcomes.values():
        disturbed = outcome.result().histories()
        assert disturbed == quiet.histories()[: len(disturbed)]
