"""Nothing that a configuration says is run by a shell."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.workflow.conftest import Project

HOSTILE = "a b\"; touch pwned; '$(touch pwned)' `touch pwned` & $HOME"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The project in a folder whose name a shell would run, with a corpus in one like it."""
    folder = tmp_path_factory.mktemp("projects") / "it's here; touch pwned"
    folder.mkdir()
    project = Project(folder)
    texts = folder / HOSTILE
    texts.mkdir()
    for split in ("train", "valid", "test"):
        (texts / f"{split}.txt").write_text("a b c <unk>\n" * 40)
    configuration = {"corpora": {"mine": {"kind": "folder", "folder": HOSTILE}}, "corpus": "mine"}
    (folder / "hostile.json").write_text(json.dumps(configuration))
    return project


def pwned(project: Project) -> list[Path]:
    return [path for path in project.folder.parent.rglob("*pwned*") if path.is_file()]


def test_a_folder_s_name_is_a_name(hostile: Project) -> None:
    target = "results/corpora/mine/corpus.json"
    hostile.snakemake("--cores", "1", "--configfile", "hostile.json", "--", target)
    facts = json.loads((hostile.folder / target).read_text())
    assert facts["tokens"]["train"] == 40 * 5
    assert not pwned(hostile)


@pytest.mark.parametrize(
    "entry",
    [
        "experiments=demo; touch pwned",
        "experiments=$(touch pwned)",
        "corpus='; touch pwned; '",
        "frameworks=jax`touch pwned`",
        "accelerator=cpu & touch pwned",
        "mirrors={ptb: \"file:/x'; touch pwned; '\"}",
    ],
)
def test_a_configured_value_is_refused_or_quoted(hostile: Project, entry: str) -> None:
    hostile.snakemake("-n", "--cores", "1", "--config", entry, expect=None)
    assert not pwned(hostile)
