"""Nothing that a configuration says is run by a shell."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.workflow.conftest import Project

from ptbench.configuration.specification import Specification
from ptbench.corpus.definitions import SPLITS
from ptbench.training.checkpoints import read_arrays

HOSTILE = "a b\"; touch pwned; '$(touch pwned)' `touch pwned` & $HOME"

LINES = 400
# An address that has none of its files, and would make one if a shell read it.
MIRROR = "file:/nowhere'; touch pwned; '$(touch pwned)"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The project in a folder whose name a shell would run, with a corpus in one like it."""
    folder = tmp_path_factory.mktemp("projects") / "it's here; touch pwned"
    folder.mkdir()
    project = Project(folder)
    texts = folder / HOSTILE
    texts.mkdir()
    for split in ("train", "valid", "test"):
        (texts / f"{split}.txt").write_text("a b c <unk>\n" * LINES)
    elsewhere = {"url": "file:nowhere", "format": "plain", "paths": dict.fromkeys(SPLITS, "text")}
    configuration = {
        "corpora": {
            "mine": {"kind": "folder", "folder": HOSTILE},
            "lost": {
                "kind": "download",
                "mirrors": [elsewhere],
                "files": dict.fromkeys(SPLITS, "0" * 64),
            },
        },
        "mirrors": {"lost": MIRROR},
        "corpus": "mine",
        "frameworks": "pytorch",
    }
    (folder / "hostile.json").write_text(json.dumps(configuration))
    return project


def pwned(project: Project) -> list[Path]:
    return [path for path in project.folder.parent.rglob("*pwned*") if path.is_file()]


def run(project: Project, target: str, expect: int = 0) -> str:
    """Make a file for real; what Snakemake said."""
    answer = project.snakemake(
        "--cores", "1", "--configfile", "hostile.json", "--", target, expect=expect
    )
    return answer.stdout + answer.stderr


def test_a_folder_s_name_is_a_name_to_the_trainer_too(hostile: Project) -> None:
    small = "constant_epochs=1+corpus=mine+embedding_size=8+epochs=1+hidden_size=8"
    cell = f"demo-lstm+{small}/pytorch/devices-1/seed-1"
    run(hostile, f"results/cells/{cell}/metrics.json")
    facts = json.loads((hostile.folder / "results/corpora/mine/corpus.json").read_text())
    assert facts["tokens"]["train"] == LINES * 5
    _, given = read_arrays(hostile.folder / "results/checkpoints" / cell / "best.safetensors")
    specification = Specification.model_validate_json(given["specification"])
    assert set(specification.corpus_definition["files"]) == set(SPLITS)
    assert not pwned(hostile)


def test_a_mirror_s_address_is_an_address(hostile: Project) -> None:
    said = run(hostile, "results/corpora/lost/corpus.json", expect=1)
    log = (hostile.folder / "results" / "logs" / "corpora" / "lost.log").read_text()
    assert "corpus lost cannot be fetched from any of its mirrors" in log, said
    assert MIRROR in log, "it was tried"
    assert not pwned(hostile)


def test_what_is_no_name_is_refused(hostile: Project) -> None:
    entries = {
        "experiments": "demo; touch pwned",
        "corpus": "'$(touch pwned)'",
        "frameworks": "jax`touch pwned`",
        "accelerator": "cpu & touch pwned",
    }
    given = [f"{key}={value}" for key, value in entries.items()]
    answer = hostile.snakemake("--cores", "1", "--config", *given, expect=1)
    said = answer.stdout + answer.stderr
    for value in entries.values():
        shown = value.strip("'")  # which Snakemake reads as YAML's
        assert f'"{shown}" is not allowed' in said
    assert not pwned(hostile)
