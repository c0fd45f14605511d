"""What the workflow would run, and what a change re-runs, by dry runs of the real snakemake."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.sentences import assert_no_frames
from tests.workflow.conftest import Project

from ptbench.measurement.profile import Profile

# Two small variants in one framework, so that one can change without the other.
EXPERIMENT = """
recipes:
  tiny:
    extends: demo-lstm
    subset: 40
    hidden_size: 8
    embedding_size: 8
    epochs: 1
    constant_epochs: 1
  tiny-too:
    extends: tiny
    layers: 2
experiments:
  tiny:
    title: Two tiny models
    variants: [tiny, tiny-too]
    frameworks: [pytorch]
    seeds: [1]
  tiny-alone:
    title: One tiny model
    variants: [tiny]
    frameworks: [pytorch]
    seeds: [1]
"""
CELLS = [
    "results/cells/tiny-too/pytorch/devices-1/seed-1/metrics.json",
    "results/cells/tiny/pytorch/devices-1/seed-1/metrics.json",
]
RUN = ("--config", "experiments=[tiny,tiny-alone]", "--cores", "2")
EDITED = ("config.yaml", "workflow/experiments/tiny.yaml", "workflow/ptbench/training/loop.py")


@pytest.fixture(scope="module")
def finished(project: Project) -> Project:
    """A project whose tiny study has been run to its report."""
    (project.folder / "workflow/experiments/tiny.yaml").write_text(EXPERIMENT)
    project.snakemake(*RUN)
    return project


def test_a_study_runs_from_nothing_to_its_report(finished: Project) -> None:
    page = (finished.folder / "results/report/index.html").read_text()
    assert "Two tiny models" in page
    for cell in CELLS:
        assert (finished.folder / cell).exists()
        for name in ("history.csv", "recipe.yaml", "provenance.json"):
            assert (finished.folder / cell).with_name(name).exists()


def test_a_finished_study_is_packed_and_verified(finished: Project) -> None:
    """Without git, which the copy of the project does not have."""
    finished.snakemake(*RUN, "archive")
    archive = "results/archive/tiny-tiny-alone.crate.zip"
    with zipfile.ZipFile(finished.folder / archive) as opened:
        names = opened.namelist()
    assert {*CELLS, "config.yaml", "workflow/experiments/tiny.yaml", "Snakefile"} < set(names)
    assert not [name for name in names if name.endswith((".npy", ".safetensors"))]
    answer = subprocess.run(
        [sys.executable, "-m", "ptbench", "verify", archive],
        cwd=finished.folder, env=finished.environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    assert "are the same" in answer.stdout


def test_comments_and_an_edited_shell_line_re_run_nothing(finished: Project) -> None:
    for file, old in [
        ("workflow/experiments/tiny.yaml", "recipes:"),
        ("config.yaml", "experiments:"),
        ("workflow/ptbench/training/loop.py", "import math"),
        ("workflow/ptbench/backends/pytorch/model.py", "import torch"),
        ("workflow/rules/training.smk", "rule train:"),
        ("Snakefile", "rule all:"),
    ]:
        finished.replace(file, old, f"# a comment\n{old}")
    finished.replace(
        "workflow/rules/training.smk", "--cell {params.cell:q}", "--cell  {params.cell:q}"
    )
    assert finished.planned(*RUN) == []


def test_a_changed_recipe_key_re_runs_exactly_its_cells_and_the_pages_that_show_them(
    finished: Project,
) -> None:
    finished.replace("workflow/experiments/tiny.yaml", "    layers: 2", "    layers: 3")
    planned = finished.planned(*RUN)
    assert [path for path in planned if "/cells/" in path] == CELLS[:1]
    assert "results/report/index.html" in planned
    assert "results/report/experiments/tiny.html" in planned
    assert not [path for path in planned if "tiny-alone" in path]
    finished.replace("workflow/experiments/tiny.yaml", "    layers: 3", "    layers: 2")
    assert finished.planned(*RUN) == []


def test_another_seed_runs_that_seed_alone(finished: Project) -> None:
    planned = finished.planned("--config", "experiments=tiny", "seeds=[1,2]", "--cores", "2")
    assert [path for path in planned if "/cells/" in path] == [
        cell.replace("seed-1", "seed-2") for cell in CELLS
    ]


def test_a_missing_cell_is_run_again_alone_by_the_same_command_or_by_its_path(
    finished: Project,
) -> None:
    kept = finished.folder / "kept"
    cell = finished.folder / CELLS[0]
    shutil.move(cell, kept)
    planned = finished.planned(*RUN)
    assert [path for path in planned if "/cells/" in path] == CELLS[:1]
    assert finished.planned(CELLS[0], *RUN) == CELLS[:1]
    shutil.copy2(kept, cell)


def test_a_new_published_number_is_set_beside_ours_without_training(finished: Project) -> None:
    with (finished.folder / "workflow/papers/zaremba2014/published.csv").open("a") as file:
        file.write("tiny,tiny,,1,,valid_perplexity,9.5,,,,Table 1,\n")
    planned = finished.planned(*RUN)
    made = {path.rpartition("/")[0] for path in planned if "zaremba2014" not in path}
    assert made == {
        "results/experiments/tiny", "results/experiments/tiny-alone", "results/report/experiments",
        "results/report",
    }  # fmt: skip
    assert {"results/experiments/tiny/comparison.csv", "results/report/index.html"} < set(planned)
    said = finished.snakemake(*RUN).stdout
    assert said.endswith("The report is at results/report/index.html\n")
    assert said.count("The report is at") == 1
    assert "9.5" in (finished.folder / "results/experiments/tiny/comparison.csv").read_text()


def test_a_changed_text_of_ones_own_is_prepared_and_trained_on_again(finished: Project) -> None:
    own = finished.folder / "own"
    own.mkdir()
    for split in ("train", "valid", "test"):
        (own / f"{split}.txt").write_text("a b c d\n" * 60)
    cell = "results/cells/tiny+corpus=own/pytorch/devices-1/seed-1/metrics.json"
    run = (cell, *RUN[-2:], "--config", "corpora={own: {kind: folder, folder: own}}")
    finished.snakemake(*run)
    assert finished.planned(*run) == []
    for file in own.iterdir():
        file.touch()
    (finished.folder / "results/corpora/own-first-40-lines/corpus.json").touch()
    shutil.copytree(own, finished.folder / "moved")
    moved = [word.replace("folder: own", "folder: moved") for word in run]
    assert finished.planned(*run) == []
    assert finished.planned(*moved) == []
    (own / "train.txt").write_text("a b c d d\n" * 60)
    assert finished.planned(*run) == [cell, "results/corpora/own-first-40-lines/corpus.json"]


def test_a_job_trains_what_was_planned_whatever_was_edited_since(finished: Project) -> None:
    """As Slurm runs it, on a cell whose result was removed."""
    finished.snakemake(*RUN)
    cell = finished.folder / CELLS[0]
    before = cell.read_bytes()
    fingerprint = json.loads(before)["fingerprint"]
    job = (
        "--target-jobs", "train:variant=tiny-too,framework=pytorch,devices=1,seed=1",
        "--allowed-rules", "train", "--mode", "remote", "--force", "--nolock", "--cores", "1",
    )  # fmt: skip
    texts = {name: (finished.folder / name).read_text() for name in EDITED}
    try:
        for name, text in texts.items():
            (finished.folder / name).write_text(text.replace("layers: 2", "layers: 3") + "x: [")
            if name.endswith(".py"):
                (finished.folder / name).write_text(text + "# another\n")
                said = finished.snakemake(*job, expect=1)
                assert "the code that trains was changed" in said.stdout + said.stderr
            else:
                cell.unlink()
                finished.snakemake(*job)
                assert json.loads(cell.read_bytes())["fingerprint"] == fingerprint
            (finished.folder / name).write_text(text)
    finally:
        cell.write_bytes(before)
        for name, text in texts.items():
            (finished.folder / name).write_text(text)


def test_profiles_are_made_where_they_are_asked_for(finished: Project) -> None:
    rows = [cell.removeprefix("results/cells/").partition("/seed-")[0] for cell in CELLS]
    profiles = [f"results/profiles/{row}/profile.json" for row in dict.fromkeys(rows)]
    assert not [path for path in finished.planned(*RUN) if "/profiles/" in path]
    for asked in ((*RUN, "profiles"), (*RUN[:2], "profile=true", *RUN[2:])):
        planned = finished.planned(*asked)
        assert sorted(path for path in planned if "/profiles/" in path) == sorted(profiles)
    finished.snakemake(*RUN, profiles[0])
    profile = Profile.model_validate_json((finished.folder / profiles[0]).read_bytes())
    phases = (profile.feed, profile.forward, profile.backward, profile.update)
    assert profile.steps > 9
    assert sum(each.median for each in phases) > 0
    assert profile.operators
    assert [each.batch for each in profile.prediction] == [1, 10, 100]
    assert finished.planned(*RUN, profiles[0]) == []
    finished.replace("workflow/experiments/tiny.yaml", "    layers: 2", "    layers: 3")
    assert profiles[0] in finished.planned(*RUN, profiles[0])
    finished.replace("workflow/experiments/tiny.yaml", "    layers: 3", "    layers: 2")


def test_a_result_of_another_specification_is_made_again(finished: Project) -> None:
    cell = finished.folder / CELLS[0]
    before = cell.read_bytes()
    try:
        for text in (before.replace(b'"fingerprint": "', b'"fingerprint": "0'), b"{"):
            cell.write_bytes(text)
            planned = finished.planned(*RUN)
            assert [path for path in planned if "/cells/" in path] == CELLS[:1]
    finally:
        cell.write_bytes(before)


def test_elsewhere_it_is_said_where_to_be(project: Project) -> None:
    here = f"ptbench: give this command in {project.folder.resolve()}"
    for command in (
        ["snakemake", "-s", "../Snakefile", "-n", "--cores", "1"],
        ["ptbench", "status"],
    ):
        answer = subprocess.run(
            [sys.executable, "-m", *command],
            cwd=project.folder / "docs", env=project.environment(),
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert answer.returncode != 0
        assert here in answer.stderr


def test_without_a_home_it_is_said_what_to_set(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/proc/nowhere")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert "set HOME to a folder that is there, or XDG_CACHE_HOME" in refused(project)


def test_any_variant_of_any_recipe_can_be_asked_for_by_its_path(project: Project) -> None:
    path = "results/cells/zaremba-small+dropout=0.5/jax/devices-2/seed-9/metrics.json"
    assert path in project.planned(path, "--cores", "1")


def test_a_dry_run_beside_a_run_says_what_would_run_and_nothing_else(project: Project) -> None:
    lock = project.folder / ".snakemake/locks/0.output.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    lock.write_text("results/report/index.html\n")
    try:
        said = project.snakemake("-n", "--cores", "1", "--quiet", "rules", "--config", "seeds=7")
    finally:
        lock.unlink()
    assert said.stdout.count("Job stats:") == 1
    for noise in ("Error", "Config MD5", "--cleanup-metadata"):
        assert noise not in said.stdout + said.stderr
    assert re.search(r"^train +10$", said.stdout, re.MULTILINE)


def test_a_cell_that_runs_alone_claims_all_cores(project: Project) -> None:
    def threads(cell: str) -> str:
        plan = project.snakemake("-n", f"results/cells/{cell}/metrics.json", "--cores", "7").stdout
        return "".join(line.strip() for line in plan.splitlines() if "threads: " in line)

    assert threads("speed-small/jax/devices-1/seed-1") == "threads: 7"
    assert threads("demo-lstm+alone=true/jax/devices-2/seed-1") == "threads: 7"
    assert threads("demo-lstm/jax/devices-2/seed-1") == "threads: 2"


def test_a_framework_trains_in_the_environment_of_its_kind_of_device(project: Project) -> None:
    chosen = ("experiments=demo", "seeds=1", "devices=1", "accelerator=cuda")
    said = project.snakemake(
        "-n", "-p", "--cores", "4", "--config", *chosen, "accelerators={mxnet: cpu}"
    ).stdout
    pythons = re.findall(r"results/environments/(\S+)/bin/python -m ptbench train", said)
    others = [f"{framework}-cuda" for framework in ("pytorch", "tensorflow", "keras", "jax")]
    assert sorted(pythons) == sorted([*others, "mxnet-cpu"])
    made = set(re.findall(r"results/environments/([a-z-]+)/lock-", said))
    assert made >= set(others)
    assert "mxnet-cuda" not in made
    # Cells on this machine's GPUs have it to themselves.
    threads = {
        found[1]: block.partition("threads: ")[2][:1]
        for block in said.split("\n\n")
        if (found := re.search(r"output: results/cells/[^/]+/(\w+)/", block))
        and "threads: " in block
    }
    assert threads == dict.fromkeys((f.partition("-")[0] for f in others), "4")


@pytest.fixture(scope="module")
def default_plan(project: Project) -> list[str]:
    return project.planned("--cores", "1")


def test_the_default_study_is_the_demo_in_all_frameworks(default_plan: list[str]) -> None:
    cells = [path for path in default_plan if "/cells/" in path]
    assert len(cells) == 5 * 2 * 3
    for framework in ("pytorch", "tensorflow", "keras", "mxnet", "jax"):
        assert sum(f"/{framework}/" in cell for cell in cells) == 6


# Every way into the workflow has a test here. What else is refused, and in which sentence, is in
# `tests/unit/test_configuration.py`.
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["sedes=[1]"], "--config: sedes: there is no such key; did you mean seeds?"),
        (["seeds=[1"], "--config seeds, line 1: not valid YAML"),
    ],
)
def test_a_bad_configuration_is_one_sentence_and_no_frames(
    project: Project, change: list[str], message: str
) -> None:
    assert message in refused(project, "--config", *change)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"seeds: 1\nseeds: 2\n", "config.yaml, line 2: not valid YAML: seeds is there twice"),
        (None, "cannot read config.yaml: No such file"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused_by_name_and_line(
    configuration: Path, project: Project, content: bytes | None, message: str
) -> None:
    configuration.unlink()
    if content is not None:
        configuration.write_bytes(content)
    assert message in refused(project)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"seeds: 1\nseeds: 2\n", "mine.yaml, line 2: not valid YAML: seeds is there twice"),
        (b"threads: 1:30\n", 'mine.yaml, line 1: threads: "1:30" is not allowed'),
        (b"# caf\xe9\n", "mine.yaml: not UTF-8 at byte 5"),
    ],
)
def test_a_configfile_on_the_command_line_is_refused_by_name_and_line_too(
    project: Project, content: bytes, message: str
) -> None:
    (project.folder / "mine.yaml").write_bytes(content)
    assert message in refused(project, "--configfile", "mine.yaml")


def test_of_several_configurations_the_last_one_wins_and_the_command_line_over_all(
    project: Project,
) -> None:
    (project.folder / "a.yaml").write_text("seeds: 7\nframeworks: jax\ndevices: [1]\n")
    (project.folder / "b.yaml").write_text("seeds: 010\ncorpus: ptb\n")
    files = ("--configfile", "a.yaml", "b.yaml")
    cells = project.planned("--cores", "1", *files, "--config", "corpus=null", "devices=[02]")
    assert [path for path in cells if "/cells/" in path] == [
        "results/cells/demo-lstm/jax/devices-2/seed-10/metrics.json"
    ]


def test_an_empty_configuration_means_the_defaults(
    configuration: Path, project: Project, default_plan: list[str]
) -> None:
    configuration.write_text("")
    assert project.planned("--cores", "1") == default_plan


@pytest.mark.parametrize("content", ["", "# nothing\n"])
def test_an_empty_configfile_on_the_command_line_changes_nothing(
    project: Project, content: str
) -> None:
    (project.folder / "none.yaml").write_text(content)
    (project.folder / "one.yaml").write_text("frameworks: jax\ndevices: 1\n")
    files = ("--configfile", "one.yaml", "none.yaml", "--config", "seeds=3")
    cells = [path for path in project.planned("--cores", "1", *files) if "/cells/" in path]
    assert cells == ["results/cells/demo-lstm/jax/devices-1/seed-3/metrics.json"]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("cells/zaremba-smal/jax/devices-1/seed-1/metrics.json", "did you mean zaremba-small?"),
        ("corpora/ptbb/corpus.json", 'there is no corpus "ptbb"; did you mean ptb?'),
        ("experiments/dmo/analysis.json", 'the study has no experiment "dmo"; it has demo'),
    ],
)
def test_a_target_that_cannot_be_is_refused_in_a_sentence(
    project: Project, target: str, message: str
) -> None:
    assert message in refused(project, f"results/{target}")


@pytest.fixture
def configuration(project: Project) -> Iterator[Path]:
    """The project's config.yaml, which is as it was in the end."""
    path = project.folder / "config.yaml"
    content = path.read_bytes()
    yield path
    path.write_bytes(content)


def refused(project: Project, *arguments: str) -> str:
    """What is said of a run that must be refused in sentences, before anything is done."""
    answer = project.snakemake("-n", "--cores", "1", *arguments, expect=1)
    assert_no_frames(answer.stdout + answer.stderr)
    return answer.stderr
