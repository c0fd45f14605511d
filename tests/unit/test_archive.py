"""An archive holds a study and nothing else, and one that was changed is refused in a sentence."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import stat
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
from rocrate.rocrate import ROCrate
from tests.support.fake_results import metrics, write_cell, write_corpus, write_diverged

from ptbench.configuration.study import load_study
from ptbench.files import sha256, write_atomically
from ptbench.report.site import RunFacts, Site
from ptbench.report.whole import write_everything
from ptbench.sharing.archive import MANIFEST, RUN_FILES, without_paths, write_archive
from ptbench.sharing.crate import METADATA, PROFILES
from ptbench.sharing.verify import ArchiveError, code_note, differences, verify
from ptbench.training.cell import recipe_yaml

ROOT = Path(__file__).parents[2]
STUDY = load_study(
    {"experiments": ["zaremba-small"], "frameworks": ["pytorch", "jax"], "seeds": [1, 2, 3]}
)
CELL = "results/cells/zaremba-small/jax/devices-1/seed-2"
TABLE = "results/experiments/zaremba-small/table.csv"
TEXT = "the words of a licensed corpus\n"
FACTS = RunFacts(created="1 January 2030, 12:00 UTC", version="0.0.0", machine="a machine")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study that nothing was trained for, with all that a results folder has."""
    results = tmp_path_factory.mktemp("project") / "results"
    random = np.random.default_rng(0)
    for cell in STUDY.cells:
        fingerprint = STUDY.fingerprint(cell.path)
        if cell == STUDY.cells[0]:
            write_diverged(results, cell, fingerprint=fingerprint)
        else:
            nll = float(random.normal(4.745, 0.004))
            write_cell(results, metrics(cell, nll, fingerprint=fingerprint))
        specification = STUDY.on(STUDY.specification(cell.variant), cell.framework)
        write_atomically(results / "cells" / cell.path / "recipe.yaml", recipe_yaml(specification))
        write_atomically(results / "checkpoints" / cell.path / "best.safetensors", "parameters")
    digest = hashlib.sha256(TEXT.encode()).hexdigest()
    write_corpus(results, "ptb", sha256={"train.txt": digest}, raw_sha256={"train": "0" * 64})
    for name in ("train.txt", "train.npy", "vocabulary.txt"):
        (results / "corpora" / "ptb" / name).write_text(TEXT)
    STUDY.write(results / "study.json", [], "snakemake --configfile /home/someone/own/mine.yaml")
    with contextlib.chdir(results.parent):  # as the workflow, which says `results` on its pages
        site = Site(Path("results/report"), Path("results"), FACTS)
        write_everything(STUDY, site, ROOT / "workflow/papers", STUDY.papers, Path("results"))
    return results


@pytest.fixture(scope="module")
def archive(results: Path) -> Path:
    """Its archive. What is said to be its configuration here is a copy of its corpus' text."""
    copy = results.parent / "mine.yaml"
    copy.write_text(TEXT)
    return write_archive(STUDY, [copy, ROOT / "config.yaml"], results, results / "archive", print)


def content(archive: Path) -> dict[str, bytes]:
    """The files of an archive."""
    with zipfile.ZipFile(archive) as opened:
        return {name: opened.read(name) for name in opened.namelist()}


def changed(
    archive: Path, path: Path, changes: Mapping[str, bytes | None], listed: bool = False
) -> Path:
    """Write an archive with other files, None for no such file; `listed`: in its manifest too."""
    files = content(archive) | changes
    kept = {name: data for name, data in files.items() if data is not None}
    if listed:
        lines = (
            f"{hashlib.sha256(data).hexdigest()}  {name}\n"
            for name, data in kept.items()
            if name != MANIFEST
        )
        kept[MANIFEST] = "".join(lines).encode()
    with zipfile.ZipFile(path, "w") as opened:
        for name, data in kept.items():
            opened.writestr(name, data)
    return path


def refused(path: Path, **options: Any) -> list[str]:
    """The sentences with which an archive is refused."""
    with pytest.raises(ArchiveError) as error:
        verify(path, **options)
    return str(error.value).split("\n")


def test_an_archive_holds_the_study_and_no_corpus_no_parameters_and_no_path(archive: Path) -> None:
    files = content(archive)
    assert archive.name == "zaremba-small.crate.zip"
    for cell in STUDY.cells:
        assert {f"results/cells/{cell.path}/{name}" for name in RUN_FILES} < files.keys()
    assert {
        TABLE, "Snakefile", "config.yaml", "envs/jax.cpu.txt", "workflow/ptbench/cli.py",
        "results/corpora/ptb/corpus.json", "results/papers/zaremba2014/answers.json",
        "results/report/index.html", "results/report/experiments/zaremba-small.html",
        "results/study.json", MANIFEST, METADATA,
    } < files.keys()  # fmt: skip
    for name, data in files.items():
        assert Path(name).suffix not in (".npy", ".safetensors")
        assert data.decode(errors="replace") != TEXT
        assert not name.startswith(("results/published", "results/environments"))
        if not name.startswith("tests/"):
            assert b"/home/someone" not in data
        assert str(ROOT).encode() not in data
    assert b"elsewhere/mine.yaml" in files["results/study.json"]


@pytest.mark.parametrize(
    ("text", "shortened"),
    [
        (f'"{ROOT}/results/x.csv"', '"results/x.csv"'),
        ("--configfile=/home/me/own.yaml --cores 2", "--configfile=elsewhere/own.yaml --cores 2"),
        ("mirrors: {ptb: file:///data/ptb}", "mirrors: {ptb: file:elsewhere/ptb}"),
        ("https://example.org/a/b and 3/4/5", "https://example.org/a/b and 3/4/5"),
        (
            '<a href="../../cells/a/b">x</a></p></main>',
            '<a href="../../cells/a/b">x</a></p></main>',
        ),
    ],
)
def test_paths_of_this_machine_are_shortened(text: str, shortened: str) -> None:
    assert without_paths(text) == shortened


def test_equal_results_make_equal_archives(results: Path, archive: Path, tmp_path: Path) -> None:
    again = write_archive(STUDY, [ROOT / "config.yaml"], results, tmp_path, print)
    assert again.read_bytes() == archive.read_bytes()


def test_a_study_that_is_not_finished_makes_no_archive(results: Path, tmp_path: Path) -> None:
    more = load_study({"experiments": ["zaremba-small"], "frameworks": ["pytorch"], "seeds": [9]})
    with pytest.raises(Exception, match=r"metrics.json is missing: an archive is made of a finish"):
        write_archive(more, [], results, tmp_path, print)
    assert list(tmp_path.iterdir()) == []


def test_an_archive_that_would_be_refused_takes_no_place(results: Path, tmp_path: Path) -> None:
    def check(file: Path) -> None:
        raise ArchiveError(file.name)

    (tmp_path / "zaremba-small.crate.zip").write_text("an earlier one")
    with pytest.raises(ArchiveError):
        write_archive(STUDY, [], results, tmp_path, check)
    [kept] = tmp_path.iterdir()
    assert kept.read_text() == "an earlier one"


def test_the_metadata_have_what_the_profiles_of_workflow_runs_demand(
    archive: Path, tmp_path: Path
) -> None:
    """Their MUSTs, by hand: the validator of RO-Crates fetches a context from the web."""
    with zipfile.ZipFile(archive) as opened:
        opened.extractall(tmp_path)
    listed = subprocess.run(["sha256sum", "--check", "--quiet", MANIFEST], cwd=tmp_path)
    assert listed.returncode == 0
    crate = ROCrate(tmp_path)
    root, workflow = crate.root_dataset, crate.mainEntity
    for entity in crate.data_entities:
        assert (tmp_path / unquote(entity.id)).exists()
    assert {profile.id for profile in root["conformsTo"]} == PROFILES.keys()
    assert all(profile.type == "CreativeWork" for profile in root["conformsTo"])
    assert root["license"].id.startswith("https://spdx.org/")
    assert root["datePublished"] == "2030-01-01T12:21:30+00:00"
    assert root["name"]
    assert root["description"]
    assert workflow.id == "Snakefile"
    assert set(workflow.type) == {"File", "SoftwareSourceCode", "ComputationalWorkflow"}
    assert workflow["programmingLanguage"]["name"] == "Snakemake"
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    assert commit.stdout.strip() in workflow["version"]
    for slot in (workflow["input"], workflow["output"]):
        assert slot.type == "FormalParameter"
        assert slot["additionalType"] in ("File", "Dataset")
        assert slot["workExample"]["exampleOfWork"] == slot
    actions = crate.get_by_type("CreateAction")
    assert set(root["mentions"]) == set(actions)
    [whole] = [action for action in actions if action["instrument"] == workflow]
    assert whole["startTime"] < whole["endTime"]
    runs = {action.id: action for action in actions if action != whole}
    assert {f"#{cell.path}" for cell in STUDY.cells} == runs.keys()
    tools = {action["instrument"] for action in runs.values()}
    assert set(workflow["hasPart"]) == tools
    assert all(tool.type == "SoftwareApplication" for tool in tools)
    for cell in STUDY.cells:
        action = runs[f"#{cell.path}"]
        failed = cell == STUDY.cells[0]
        assert action["actionStatus"].endswith("Failed" * failed + "ActionStatus")
        assert action.get("error", "").startswith("the training perplexity") == failed
        assert [each.id for each in action["object"]][1] == "results/corpora/ptb/corpus.json"
        assert f"results/cells/{cell.path}/metrics.json" in {each.id for each in action["result"]}


def test_an_untouched_archive_is_verified(archive: Path) -> None:
    found = verify(archive)
    assert found.files == len(content(archive))
    assert found.runs == 6
    assert found.compared > 20
    assert found.note is None
    assert found.sha256 == sha256(archive)


# Each is refused before anything is made again, which would take seconds.
@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {f"{CELL}/metrics.json": b"{}"},
            rf"{CELL}/metrics.json was changed: its SHA-256 is 44136fa355b3…, not \w{{12}}… as "
            "manifest-sha256.txt says",
        ),
        ({TABLE: None}, f"{TABLE} is missing: manifest-sha256.txt lists it"),
        ({"more.txt": b"x"}, "more.txt was added: manifest-sha256.txt does not list it"),
        (
            {MANIFEST: b"nothing"},
            r"manifest-sha256.txt, line 1, is no SHA-256, two spaces and a path",
        ),
        (
            {MANIFEST: None},
            "it has no manifest-sha256.txt, so it was not made by `uv run snakemake archive`",
        ),
        *(
            ({name: b"x"}, rf"the path '{re.escape(name)}' leads out of its folder, or is not .*")
            for name in ("../out.txt", "/out.txt", "a/../../out.txt", "C:out.txt", "a//b", "a/")
        ),
        ({"README.MD": b"x"}, "README.md and README.MD would be one file"),
        ({"README.md/x": b"x"}, "README.md is a file, and a folder of README.md/x"),
    ],
)
def test_a_changed_archive_is_refused_in_one_sentence(
    archive: Path, tmp_path: Path, changes: dict[str, bytes | None], sentence: str
) -> None:
    path = changed(archive, tmp_path / "x.zip", changes)
    [said] = refused(path)
    assert re.fullmatch(sentence, said)
    assert [file.name for file in tmp_path.iterdir()] == ["x.zip"]


def entries(path: Path, *named: tuple[zipfile.ZipInfo | str, bytes]) -> Path:
    """Write a zip file of these entries, as they are."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as opened:
        for name, data in named:
            opened.writestr(name, data)
    return path


def test_a_link_is_refused(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("results")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    path = entries(tmp_path / "x.zip", (link, b"/etc"), ("results/x", b"x"))
    assert refused(path)[0] == "results is a link or a device; an archive has plain files alone"


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    path = entries(tmp_path / "x.zip", ("a", b"x"), ("a", b"y"))
    assert refused(path) == ["a and a would be one file"]


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    path = entries(tmp_path / "x.zip", *((f"{i}.csv", bytes(3_000_000)) for i in range(4)))
    [said] = refused(path, most_bytes=10_000_000)
    assert said.startswith("unpacked it has 0.0 GiB, and at most 0.00931")
    # one that lies about its size is cut off there
    path = entries(tmp_path / "x.zip", ("x.csv", bytes(3_000_000)), (MANIFEST, b""))
    path.write_bytes(path.read_bytes().replace((3_000_000).to_bytes(4, "little"), b"\1\0\0\0"))
    [said] = refused(path)
    assert said == "it is no whole zip file: Bad CRC-32 for file 'x.csv'"


@pytest.mark.parametrize("data", [b"", b"PK\3\4 and so on", b"#!/bin/sh\n"])
def test_what_is_no_zip_file_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.zip").write_bytes(data)
    assert refused(tmp_path / "x.zip") == ["it is no whole zip file: File is not a zip file"]


def test_half_an_archive_is_refused(archive: Path, tmp_path: Path) -> None:
    data = bytearray(archive.read_bytes())
    data[len(data) // 3 : len(data) // 3 + 64] = bytes(64)
    (tmp_path / "x.zip").write_bytes(data)
    [said] = refused(tmp_path / "x.zip")
    assert said.startswith("it is no whole zip file: ")


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ('"zaremba-small": {"name"', '"../out": {"name"', "has '../out' where only a plain name"),
        (
            '"variant": "zaremba-small"',
            '"variant": "../../out"',
            "has '../../out/pytorch/devices-1/seed-1' where only a run can be",
        ),
        ('"study"', '"story"', "no study that this version of ptbench can read"),
        ("[", "[" * 100_000, "no study that this version of ptbench can read"),
    ],
)
def test_a_plan_that_would_lead_elsewhere_is_refused(
    archive: Path, tmp_path: Path, old: str, new: str, sentence: str
) -> None:
    plan = content(archive)["results/study.json"].decode()
    assert old in plan
    plan = plan.replace(old, new, 1)
    path = changed(archive, tmp_path / "x.zip", {"results/study.json": plan.encode()}, listed=True)
    [said] = refused(path)
    assert sentence in said
    assert [file.name for file in tmp_path.iterdir()] == ["x.zip"]


@pytest.mark.parametrize(
    ("name", "data", "sentence"),
    [
        (f"{CELL}/metrics.json", b"[]", rf"{CELL}/metrics.json cannot be read \(.*\).*"),
        (f"{CELL}/history.csv", b"\xff\n", rf"{CELL}/history.csv cannot be read \('utf-8' .*"),
        (
            f"{CELL}/history.csv",
            None,
            f"{CELL}/history.csv is missing although the run has finished",
        ),
    ],
)
def test_runs_that_cannot_be_read_are_refused_by_name(
    archive: Path, tmp_path: Path, name: str, data: bytes | None, sentence: str
) -> None:
    [said] = refused(changed(archive, tmp_path / "x.zip", {name: data}, listed=True))
    assert re.fullmatch(f"its tables cannot be made from its runs: {sentence}", said)


def test_what_its_runs_do_not_say_is_found_though_the_checksums_are_right(
    archive: Path, tmp_path: Path
) -> None:
    """A table, a page, a figure and the metadata were changed; and the code, which is not run."""
    files = content(archive)
    page, figure = "results/report/index.html", "results/experiments/zaremba-small/figures/x.svg"
    code = "workflow/ptbench/analysis/statistics.py"
    run = json.loads(files[f"{CELL}/metrics.json"])
    memory = str(run["peak_memory_bytes"])
    table = files[TABLE].decode()
    assert table.count(memory) == 2
    mark = tmp_path / "executed"
    path = changed(
        archive,
        tmp_path / "x.zip",
        {
            TABLE: table.replace(memory, "1", 1).encode(),
            page: files[page].replace(b"Zaremba", b"Mikolov", 1),
            figure: b"<svg/>",
            METADATA: files[METADATA].replace(b"Completed", b"Failed", 1),
            code: b"import pathlib\npathlib.Path('%s').touch()\n" % str(mark).encode(),
        },
        listed=True,
    )
    said = refused(path)
    assert said[0] == f"{METADATA} is not what the archive's files say"
    assert said[1] == f"{figure} is not made from the runs"
    assert said[2] == (
        f"{TABLE}, line 2 (zaremba-small, pytorch, 1): peak_memory_bytes is 1, and {memory} if "
        "made from the runs"
    )
    assert said[3].startswith(f"{page}, line ")
    assert "Mikolov" in said[3]
    assert said[4:] == [
        "The workflow here is not the archive's, which may be why something differs: "
        "ptbench/analysis/statistics.py."
    ]
    assert not mark.exists()


def test_a_better_result_of_one_run_is_found_in_every_table(archive: Path, tmp_path: Path) -> None:
    run = json.loads(content(archive)[f"{CELL}/metrics.json"])
    run["test"] = {"nll": 4.0, "perplexity": 54.598, "tokens": run["test"]["tokens"]}
    data = json.dumps(run).encode()
    said = refused(
        changed(archive, tmp_path / "x.zip", {f"{CELL}/metrics.json": data}, listed=True)
    )
    assert any(
        line.startswith(f"{TABLE}, line 3 (zaremba-small, jax, 1): test_perplexity is ")
        for line in said
    )
    changed_files = {line.partition(",")[0] for line in said}
    assert "results/experiments/zaremba-small/differences.csv" in changed_files
    assert "results/report/index.html" in changed_files


def test_runs_that_are_not_those_of_the_study_are_refused(archive: Path, tmp_path: Path) -> None:
    """Its tables and pages may say the same: none of this is in them."""
    files = content(archive)
    runs = [f"results/cells/{cell.path}" for cell in STUDY.cells]
    changes: dict[str, bytes | None] = {}
    for run in runs:
        metrics = json.loads(files[f"{run}/metrics.json"]) | {"fingerprint": "0" * 12}
        changes[f"{run}/metrics.json"] = json.dumps(metrics).encode()
    recipe, history = f"{runs[1]}/recipe.yaml", f"{runs[2]}/history.csv"
    changes[f"{runs[0]}/recipe.yaml"] = b"corpus: synthetic"
    changes[recipe] = files[recipe].replace(b"layers: 2", b"layers: 3")
    changes[history] = files[history].replace(b",4.", b",3.")
    assert all(files[name] != data for name, data in changes.items())
    changes |= {f"{CELL}0/{name}": files[f"{CELL}/{name}"] for name in RUN_FILES}
    said = refused(changed(archive, tmp_path / "x.zip", changes, listed=True))
    for run in runs:
        planned = STUDY.fingerprint(run.removeprefix("results/cells/"))
        assert (
            f"{run}/metrics.json is of a run with the fingerprint 000000000000, and the study "
            f"plans {planned}"
        ) in said
    assert f"{runs[0]}/recipe.yaml is not the recipe of the study" in said
    assert f"{recipe} is not the recipe of the study" in said
    assert (
        f"{runs[2]}/metrics.json has another validation score than the best epoch of history.csv"
    ) in said
    assert f"{CELL}0/recipe.yaml is of no run of the study" in said
    [missing] = refused(
        changed(
            archive,
            tmp_path / "x.zip",
            dict.fromkeys(f"{CELL}/{name}" for name in RUN_FILES),
            listed=True,
        )
    )
    assert f"{CELL}/metrics.json is missing" in missing


def test_nothing_hides_behind_what_is_said_of_the_making(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text("<td>114.5Made by ptbench : wrong, really 80.1</td>")
    (tmp_path / "b.html").write_text("<td>114.5</td>")
    [said] = differences("a.html", tmp_path / "a.html", tmp_path / "b.html")
    assert said.startswith("a.html, line 1: ")
    (tmp_path / "a.html").write_text("<p>Made by ptbench 1, in May</p>")
    (tmp_path / "b.html").write_text("<p>Made by ptbench 2, in June</p>")
    assert differences("a.html", tmp_path / "a.html", tmp_path / "b.html") == []


def test_files_of_which_nothing_is_known_are_named(archive: Path, tmp_path: Path) -> None:
    unknown = {"install.sh": b"x", "results/corpora/ptb/train.txt": b"x"}
    found = verify(changed(archive, tmp_path / "x.zip", unknown, listed=True))
    assert found.note == (
        "Neither of the study nor of the workflow here: install.sh, results/corpora/ptb/train.txt."
    )


def test_the_command_says_it_in_a_sentence_and_fails(tmp_path: Path) -> None:
    path = entries(tmp_path / "x.zip", ("../x", b"x"))
    answer = subprocess.run(
        [sys.executable, "-m", "ptbench", "verify", path], capture_output=True, text=True
    )
    assert answer.returncode == 2
    assert answer.stderr == (
        f"ptbench: {path} is refused: the path '../x' leads out of its folder, or is not written "
        "plainly\n"
    )


def test_a_document_that_is_not_the_installed_one_is_named(tmp_path: Path) -> None:
    """Its numbers and findings are what verdicts are made with."""
    workflow = ROOT / "workflow"
    for part in ("ptbench", "papers"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(workflow / part, tmp_path / "workflow" / part, ignore=ignored)
    assert code_note(tmp_path) is None
    changed = tmp_path / "workflow" / "papers" / "zaremba2014" / "published.csv"
    changed.write_text(changed.read_text().replace("82.7", "83.4"))
    assert "papers/zaremba2014/published.csv" in str(code_note(tmp_path))
