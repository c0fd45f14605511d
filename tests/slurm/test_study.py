"""A study through a real Slurm, from the login node to the report."""

from __future__ import annotations

import datetime
import itertools
import shutil

import pytest
from tests.slurm.conftest import Study
from tests.slurm.testbed import GPUS, NODES, Testbed, wait_until

from ptbench.training.records import read_metrics

pytestmark = pytest.mark.slurm
EPOCHS = 12  # so that runs last long enough to be side by side, or cancelled


@pytest.fixture(scope="module")
def study(testbed: Testbed, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Six cells that want twelve GPUs, run to the report on the partition's eight."""
    folder = tmp_path_factory.mktemp("study")
    made = Study(folder, ["pytorch", "mxnet"], [2], [1, 2, 3], epochs=EPOCHS)
    made.run()
    assert testbed.ask("squeue", "-h") == ""
    return made


def test_every_cell_ends_in_the_report(study: Study) -> None:
    assert all(read_metrics(study.file(cell)).status == "ok" for cell in study.cells)
    page = (study.folder / "results/report/runs.html").read_text()
    for cell in study.cells:
        assert f"cells/{cell}/" in page


def test_cells_ran_as_jobs_and_the_rest_where_snakemake_did(study: Study) -> None:
    jobs = {study.facts(cell)["slurm_job"] for cell in study.cells}
    assert len(jobs) == len(study.cells)
    assert None not in jobs
    assert {study.facts(cell)["slurm_node"] for cell in study.cells} == set(NODES)
    assert study.said().count("has been submitted with SLURM jobid") == len(study.cells)


def test_jobs_queue_for_gpus_and_see_disjoint_devices(study: Study) -> None:
    """Two jobs on one node at one time share no device, and each sees what it asked for."""
    runs = []
    for cell in study.cells:
        facts = study.facts(cell)
        devices = set(facts["cuda_visible_devices"].split(","))
        assert len(devices) == 2
        assert devices <= {str(index) for index in range(GPUS)}
        times = [datetime.datetime.fromisoformat(facts[key]) for key in ("started", "finished")]
        runs.append((facts["slurm_node"], *times, devices))
    overlapping = 0
    for (node, began, ended, devices), other in itertools.combinations(runs, 2):
        if node == other[0] and began < other[2] and other[1] < ended:
            overlapping += 1
            assert not devices & other[3]
    assert overlapping  # or nothing was shown
    assert max(began for _, began, _, _ in runs) >= min(ended for _, _, ended, _ in runs)


def test_when_all_is_done_nothing_is_submitted(study: Study) -> None:
    before = study.finished()
    said = study.run()
    assert "Nothing to be done" in said
    assert "submitted" not in said
    assert study.finished() == before


def test_one_cell_by_its_path_refuses_other_devices_and_runs_alone_with_its_own(
    study: Study,
) -> None:
    """As where a site's way to ask for GPUs was mistaken, and then is mended in the other way."""
    cell = study.cells[0]
    target = f"results/cells/{cell}/metrics.json"
    shutil.rmtree(study.file(cell).parent)
    before = study.finished()
    asked = "gpu: int(wildcards.devices)"
    study.profile("retries: 2", 0)
    study.replace("slurm/profile.yaml", asked, f"{asked} + 1")
    said = study.run(target, expect=1)
    assert not study.file(cell).exists()
    log = (study.folder / f"results/logs/cells/{cell}.log").read_text()
    assert "was given 3 GPUs" in log + said

    study.replace("slurm/profile.yaml", f"{asked} + 1", 'gres: f"gpu:{wildcards.devices}"')
    said = study.run(target)
    assert "\n1 of 1  " in said  # one job, for this cell alone
    assert len(study.facts(cell)["cuda_visible_devices"].split(",")) == 2
    assert {other: study.finished()[other] for other in before} == before


def test_a_run_on_two_nodes_ends_as_on_one_machine_though_it_was_cancelled(
    testbed: Testbed, tmp_path_factory: pytest.TempPathFactory
) -> None:
    frameworks = ["pytorch", "jax", "mxnet"]
    study = Study(tmp_path_factory.mktemp("nodes"), frameworks, [4], [1], epochs=EPOCHS)
    with (study.folder / "slurm/reproduction.yaml").open("a") as configuration:
        configuration.write("devices_per_node: 2\n")
    impossible = study.cells.pop()
    targets = [f"results/cells/{cell}/metrics.json" for cell in study.cells]
    cancelled, *_ = study.cells
    with study.start(*targets) as snakemake:
        checkpoint = study.folder / "results/checkpoints" / cancelled / "last.safetensors"
        wait_until(lambda: checkpoint.exists() or snakemake.poll() is not None, "training", 300)
        assert checkpoint.exists(), study.said()
        queue = [line.split() for line in testbed.ask("squeue", "-h", "-o", "%k %i").splitlines()]
        testbed.ask("scancel", *(job for comment, job in queue if "pytorch" in comment))
        assert snakemake.wait(300) == 0, study.said()
    said = study.said()
    assert "1 of 3 runs cannot run here: a run in MXNet is on one node here" in said
    assert not study.file(impossible).exists()
    for cell in study.cells:
        facts = study.facts(cell)
        assert (facts["nodes"], facts["attempts"]) == (2, 1 + (cell == cancelled))
        assert len(facts["cuda_visible_devices"].split(",")) == 2  # of the first node

    on_two = study.histories()
    shutil.rmtree(study.folder / "results/cells")
    study.snakemake("--cores", "2", "--configfile", "slurm/reproduction.yaml", "--", *targets)
    assert {study.facts(cell)["nodes"] for cell in study.cells} == {1}
    # More than two gradients are added in an order that depends on where a run went on.
    for rows, expected in zip(study.histories(), on_two, strict=True):
        assert len(rows) == len(expected) == EPOCHS
        for row, other in zip(rows, expected, strict=True):
            assert row == pytest.approx(other, rel=1e-6)
