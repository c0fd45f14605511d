"""Environments are made by the workflow when a cell needs one, and never cost a finished cell."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.workflow.conftest import Project

from ptbench.environments import marker_path

FRAMEWORK = "jax"  # the quickest to build
RUN = (
    "--config",
    f"frameworks={FRAMEWORK}",
    "devices=1",
    "seeds=[1,2]",
    "subset=40",
    "--cores",
    "2",
)
CELLS = [
    f"results/cells/demo-lstm+subset=40/{FRAMEWORK}/devices-1/seed-{seed}/metrics.json"
    for seed in (1, 2)
]


@pytest.fixture(scope="module")
def own(project: Project) -> Project:
    """The project with environments of its own, none of which is built."""
    (project.folder / "results/environments").unlink()
    return project


@pytest.fixture(scope="module")
def finished(own: Project) -> Project:
    """A finished study of two cells, with the environment that the tests share."""
    folder = own.folder / f"results/environments/{FRAMEWORK}-cpu"
    shared = Path(__file__).parents[2] / f"results/environments/{FRAMEWORK}-cpu"
    if shared.exists():
        folder.parent.mkdir()
        subprocess.run(["cp", "-al", shared, folder], check=True)  # a build removes the links first
        for marker in folder.glob("lock-*"):
            marker.unlink()
    own.snakemake(*RUN)
    return own


def environments(planned: list[str]) -> list[str]:
    """The frameworks whose environments are among planned files."""
    return [path.split("/")[2].partition("-")[0] for path in planned if "/environments/" in path]


def cells(planned: list[str]) -> list[str]:
    return [path for path in planned if path.startswith("results/cells/")]


def test_a_cell_needs_the_environment_of_its_framework_alone(own: Project) -> None:
    assert environments(own.planned(CELLS[0], *RUN)) == [FRAMEWORK]


def test_a_cell_of_a_framework_that_the_configuration_leaves_out_has_its_environment_made(
    own: Project,
) -> None:
    cell = CELLS[0].replace(FRAMEWORK, "mxnet")
    assert environments(own.planned(cell, *RUN)) == ["mxnet"]


def test_a_study_needs_those_of_its_frameworks(own: Project) -> None:
    assert set(environments(own.planned("--cores", "1"))) == {
        "pytorch", "tensorflow", "keras", "mxnet", "jax"
    }  # fmt: skip


def test_a_corpus_and_conda_need_none(own: Project) -> None:
    corpus = "results/corpora/synthetic/corpus.json"
    assert own.planned(corpus, "--cores", "1") == [corpus]
    planned = own.snakemake("-n", *RUN, "--sdm", "conda", "--conda-frontend", "conda", expect=None)
    assert "rule environment" not in planned.stdout


@pytest.fixture
def lock(finished: Project) -> Iterator[Path]:
    """The framework's lock with a line more; as it was in the end."""
    path = finished.folder / f"envs/{FRAMEWORK}.cpu.txt"
    content = path.read_bytes()
    path.write_bytes(content + b"# changed\n")
    yield path
    path.write_bytes(content)


@pytest.mark.usefixtures("lock")
def test_a_changed_lock_and_a_missing_environment_are_nothing_to_a_finished_study(
    finished: Project,
) -> None:
    assert finished.planned(*RUN) == []
    kept = finished.folder / "kept"
    (finished.folder / "results/environments").rename(kept)
    try:
        assert finished.planned(*RUN) == []
    finally:
        kept.rename(finished.folder / "results/environments")


@pytest.mark.usefixtures("lock")
def test_a_changed_lock_builds_anew_for_a_missing_cell_and_trains_no_finished_one_again(
    finished: Project,
) -> None:
    """A job behind `ancient` inputs is not looked at if what makes them is out of date."""
    missing, other = (finished.folder / cell for cell in CELLS)
    facts = finished.folder / f"results/environments/{FRAMEWORK}-cpu/environment.json"
    before = other.stat().st_mtime_ns, json.loads(facts.read_text())["lock_sha256"]
    missing.unlink()
    planned = finished.planned(*RUN)
    assert cells(planned) == CELLS[:1]
    assert environments(planned) == [FRAMEWORK]
    assert "results/report/index.html" in planned
    finished.snakemake(*RUN)
    assert missing.exists()
    after = other.stat().st_mtime_ns, json.loads(facts.read_text())["lock_sha256"]
    assert after[0] == before[0]
    assert after[1] != before[1]
    assert finished.planned(*RUN) == []


def test_a_finished_cell_that_has_to_be_trained_again_has_its_environment_built(
    finished: Project,
) -> None:
    """Because its recipe changed or somebody asked for it; a newer corpus is no reason."""
    kept = finished.folder / "kept"
    (finished.folder / "results/environments").rename(kept)
    recipe = finished.folder / "workflow/experiments/demo.yaml"
    content = recipe.read_text()
    corpus = finished.folder / "results/corpora/synthetic-first-40-lines/corpus.json"
    older = shutil.copy2(corpus, finished.folder / "older")
    try:
        forced = finished.planned(CELLS[0], "--force", *RUN)
        assert (cells(forced), environments(forced)) == (CELLS[:1], [FRAMEWORK])
        recipe.write_text(content.replace("epochs: 8", "epochs: 7"))
        assert environments(finished.planned(*RUN)) == [FRAMEWORK]
        recipe.write_text(content)
        corpus.write_text(corpus.read_text() + " ")  # Snakemake knows the checksum
        assert finished.planned(*RUN) == []
    finally:
        recipe.write_text(content)
        shutil.copy2(older, corpus)
        kept.rename(finished.folder / "results/environments")


def test_an_environment_without_its_interpreter_is_named(finished: Project) -> None:
    folder = finished.folder / f"results/environments/{FRAMEWORK}-cpu"
    (finished.folder / marker_path(FRAMEWORK, "cpu")).touch()
    (folder / "bin").rename(folder / "kept")
    try:
        said = finished.snakemake("-n", CELLS[0].replace("seed-1", "seed-3"), *RUN, expect=1).stderr
        assert f"{FRAMEWORK}-cpu has no bin/python: remove it" in said
        finished.snakemake("-n", CELLS[1], *RUN)
    finally:
        (folder / "kept").rename(folder / "bin")
