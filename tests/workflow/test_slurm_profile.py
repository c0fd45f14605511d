"""What `snakemake --profile slurm` would submit, by dry runs; tests/slurm/ submits it."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest
import yaml
from tests.workflow.conftest import ROOT, Project

from ptbench.configuration.experiments import load_library
from ptbench.configuration.study import load_study
from ptbench.yaml import read_yaml

PROFILE = ROOT / "slurm" / "profile.yaml"
REPRODUCTION = ROOT / "slurm" / "reproduction.yaml"
CORPORA = ("ptb", "wikitext2")  # of the documents


def test_the_two_profiles_share_no_key() -> None:
    """Snakemake loads the default one on top of any other, and its keys win."""
    default = yaml.safe_load((ROOT / "profiles" / "default" / "config.yaml").read_text())
    assert not default.keys() & yaml.safe_load(PROFILE.read_text()).keys()


def test_the_full_study_has_every_experiment_that_a_document_ran() -> None:
    """None of them ran AWD-LSTM, which they name as what they would add."""
    assert set(read_yaml(REPRODUCTION)["papers"]) == load_library().papers.keys() - {
        "merity2017",
        "yang2018",
    }


def test_the_readme_says_how_many_cells_the_full_study_has() -> None:
    cells = load_study(read_yaml(REPRODUCTION)).cells
    assert f" {len(cells):,} cells " in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def plan(project: Project) -> str:
    """The dry run of the full study, with a corpus in place, so that sizes are known."""
    for name in CORPORA:
        corpus = project.folder / f"results/corpora/{name}/corpus.json"
        corpus.parent.mkdir(parents=True)
        tokens = '{"train": 929589, "valid": 73760, "test": 82430}'
        corpus.write_text(f'{{"tokens": {tokens}, "vocabulary_size": 10000}}')
    return project.snakemake("--profile", "slurm", "-n", "--quiet", "host").stdout


@pytest.mark.usefixtures("plan")
def test_a_dry_run_of_many_jobs_is_a_line_for_each_experiment(project: Project) -> None:
    """Of the full study, each job in full would be fifty thousand lines."""
    changes = ("papers=zaremba2014", "repeats=10")
    said = project.snakemake("--profile", "slurm", "-n", "--config", *changes).stdout
    assert "--quiet host lists every job" in said
    study = load_study({"papers": "zaremba2014", "repeats": 10})
    for name, planned in study.experiments.items():
        count = len(planned.cells)
        assert re.search(rf"^{name} +{count}  {count}$", said, re.MULTILINE)
    assert re.search(rf"^train +{len(study.cells)}$", said, re.MULTILINE)
    assert len(said.splitlines()) < 60 + len(study.experiments)


def test_in_a_path_with_a_space_nothing_is_submitted(tmp_path: Path) -> None:
    project = Project(tmp_path / "a folder")
    answer = project.snakemake("--profile", "slurm", expect=1)
    assert "a folder: jobs cannot run in a path with a space" in answer.stderr
    assert not (project.folder / "results/study.json").exists()
    assert not (project.folder / "results/corpora").exists()


def jobs(plan: str) -> dict[str, str]:
    """What a dry run says of every cell."""
    return {
        match[1]: block
        for block in plan.split("\n\n")
        if (match := re.search(r"output: results/cells/(\S+)/metrics.json", block))
    }


def test_the_profile_runs_the_full_study(plan: str) -> None:
    planned = jobs(plan)
    assert len(planned) == len(load_study(read_yaml(REPRODUCTION)).cells)
    assert "zaremba-large/mxnet/devices-1/seed-5" in planned


def test_every_cell_asks_for_its_gpus_its_time_and_its_memory(plan: str) -> None:
    for cell, block in jobs(plan).items():
        resources = dict(re.findall(r"(\w+)=([^,\n]+)", block.partition("resources: ")[2]))
        assert resources["gpu"] == re.search(r"/devices-(\d+)/", cell)[1]
        assert resources["nodes"] == "1"
        devices = int(resources["gpu"])
        assert f"    threads: {max(4, devices)}\n" in block  # of a node, not of the login node
        assert resources["slurm_extra"].startswith("--signal=USR1@120")
        assert 4000 < int(resources["mem_mb"]) <= 300_000
        assert 15 < int(resources["runtime"]) <= 2880


def test_larger_models_ask_for_more(plan: str) -> None:
    planned = jobs(plan)
    for key in ("mem_mb", "runtime"):
        asked = [
            int(re.search(rf"\b{key}=(\d+)", planned[f"{recipe}/jax/devices-1/seed-1"])[1])
            for recipe in ("zaremba-small", "zaremba-medium", "zaremba-large")
        ]
        assert asked == sorted(set(asked))


def test_before_the_corpus_is_there_the_sizes_are_yet_to_be_told(
    project: Project, plan: str, tmp_path: Path
) -> None:
    assert "runtime=<TBD>" not in plan
    kept = shutil.move(project.folder / "results/corpora", tmp_path)
    target = "results/cells/zaremba-small/jax/devices-1/seed-1/metrics.json"
    assert "runtime=<TBD>" in project.snakemake("--profile", "slurm", "-n", target).stdout
    shutil.move(kept, project.folder / "results")


def test_another_configuration_may_be_run_on_the_cluster(project: Project) -> None:
    """As for a quick look before the full study."""
    answer = project.snakemake(
        "--profile", "slurm", "--configfile", "config.yaml", "--config", "seeds=1", "-n"
    )
    planned = jobs(answer.stdout)
    assert len(planned) == 10
    assert all(cell.startswith("demo-lstm/") for cell in planned)


CELL = "demo-lstm/jax/devices-1/seed-1"
MADE = f"results/cells/{CELL}/metrics.json results/benchmarks/cells/{CELL}.tsv"
# What a Slurm says that refuses so many jobs and then finishes each at once.
PROGRAMS = {
    "sbatch": f"""
echo >> calls
if [ $(wc -l < calls) -le $REFUSALS ]; then
    printf 'sbatch: error: %s\\n' "$REFUSED" >&2
    exit 1
fi
for file in {MADE}; do mkdir -p $(dirname $file); touch $file; done
echo 7
""",
    "squeue": 'case "$*" in *--states=all*) echo "7|COMPLETED";; esac',
    "sinfo": "printf 'PARTITION\\ngpu*\\n'",
    **dict.fromkeys(("sacct", "sacctmgr", "scontrol"), "exit 1"),
}


@pytest.mark.parametrize(
    ("refused", "refusals", "calls"),
    [
        ("AssocMaxSubmitJobLimit", 4, 5),
        ("QOSMaxSubmitJobPerUserLimit", 4, 5),
        ("Batch job submission failed: Invalid qos specification", 9, 3),
    ],
)
def test_where_too_many_jobs_are_queued_sbatch_is_asked_again_and_no_try_is_spent(
    project: Project, monkeypatch: pytest.MonkeyPatch, refused: str, refusals: int, calls: int
) -> None:
    """A job has three tries; where sbatch never takes it, they are all that it is asked."""
    folder = project.folder / "bin"
    folder.mkdir(exist_ok=True)
    for name, script in PROGRAMS.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    for name in ("calls", *MADE.split()):
        (project.folder / name).unlink(missing_ok=True)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    monkeypatch.setenv("REFUSED", refused)
    monkeypatch.setenv("REFUSALS", str(refusals))
    never = refused.endswith("specification")
    answer = project.snakemake(
        "--profile", "slurm", "--configfile", "config.yaml", "--seconds-between-status-checks",
        "0", "--max-jobs-per-timespan", "99/1s", "--", MADE.split()[0], expect=int(never),
    )  # fmt: skip
    said = answer.stdout + answer.stderr
    assert (project.folder / "calls").read_text() == "\n" * calls
    assert ("Trying again until it takes the job" in said) is not never
    assert (f"failed: not submitted: sbatch: error: {refused}" in said) is never
    assert ("sbatch refused 3 jobs in a row" in said) is never
