"""Whatever is malformed ends in one clear message, a status other than zero, and no change.

Configurations, recipes and experiments have their exact sentences tested in test_configuration.py;
here everything goes through the command line, and what is on the disk is compared before and after.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.support.fake_results import plan, write_corpus, write_results
from tests.support.sentences import assert_no_frames
from tests.unit.test_configuration import (
    BAD_CONFIGURATIONS,
    BAD_EXPERIMENTS,
    BAD_RECIPES,
    folder_with,
)

from ptbench.analysis.collect import OUTDATED
from ptbench.cli import main
from ptbench.configuration.experiments import read_papers
from ptbench.configuration.specification import Specification
from ptbench.configuration.study import load_study
from ptbench.model.recipe import Recipe
from ptbench.training import signals

Files = dict[str, bytes]


def files(folder: Path) -> Files:
    """Everything under a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def refused(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    """Run a command that must fail with a message, no traceback, and all files as they were.

    What may be new is its log and the record of a failed attempt.
    """
    # The signals of this process, and of those it starts, stay what they are for other tests.
    monkeypatch.setattr(signals, "ProcessSignals", signals.Signals)

    def kept(before_or_after: Files) -> Files:
        return {
            name: content
            for name, content in before_or_after.items()
            if name != "log" and not name.startswith("attempts/")
        }

    def run(*arguments: str | Path) -> str:
        before = files(tmp_path)
        with pytest.raises(SystemExit) as exit_:
            main([str(argument) for argument in arguments])
        assert exit_.value.code not in (0, None)
        said = capfd.readouterr().err
        assert said.startswith("ptbench: ") or "error: " in said, said
        assert_no_frames(said)
        assert len(said) < 2000
        assert "arguments are required" not in said  # all are given; what is wrong is their content
        assert kept(files(tmp_path)) == kept(before)
        return said

    return run


# ------------------------------------------------------------------------------- configurations


@pytest.mark.parametrize(("change", "message"), BAD_CONFIGURATIONS)
def test_a_bad_configuration(
    tmp_path: Path,
    refused: Callable[..., str],
    change: dict[str, Any],
    message: str,  # noqa: ARG001
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"experiments": ["demo"], **change}))
    refused("validate", path)


@pytest.mark.parametrize(("recipe", "message"), BAD_RECIPES)
def test_a_bad_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str],
    recipe: str, message: str,  # noqa: ARG001
) -> None:  # fmt: skip
    indented = recipe if recipe[0] in "{[" else f"{{{recipe}}}"
    text = f"recipes: {{r: {indented}}}\nexperiments: {{e: {{title: T, variants: [r]}}}}\n"
    folder_with(tmp_path, monkeypatch, text)
    (tmp_path / "config.yaml").write_text("experiments: [e]\n")
    refused("validate", tmp_path / "config.yaml")


@pytest.mark.parametrize(("experiment", "message"), BAD_EXPERIMENTS)
def test_a_bad_experiment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str],
    experiment: str, message: str,  # noqa: ARG001
) -> None:  # fmt: skip
    folder_with(tmp_path, monkeypatch, f"recipes: {{r: {{}}}}\nexperiments: {{e: {experiment}}}\n")
    (tmp_path / "config.yaml").write_text("experiments: [e]\n")
    refused("validate", tmp_path / "config.yaml")


def test_bad_published_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    folder_with(
        tmp_path, monkeypatch, "recipes: {r: {}}\nexperiments: {e: {title: T, variants: [r]}}\n"
    )
    paper = tmp_path / "papers" / "somebody2020"
    paper.mkdir(parents=True)
    (paper / "published.csv").write_text("experiment,value\n")
    (tmp_path / "config.yaml").write_text("experiments: [e]\n")
    assert "published.csv: the first line must be" in refused("validate", tmp_path / "config.yaml")


YAML_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.dictionaries(
        st.sampled_from([*sorted(load_study({}).config.model_dump()), "no_such_key"]),
        YAML_VALUES,
        min_size=1,
        max_size=3,
    )
)
def test_any_configuration_is_either_run_or_refused_in_words(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], content: dict[str, Any]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(content, allow_unicode=True))
    with contextlib.suppress(SystemExit):
        main(["validate", str(path)])
        return
    said = capfd.readouterr().err
    assert said.startswith("ptbench: ")
    assert_no_frames(said)


@pytest.mark.parametrize(
    "content",
    [b"[]", b"- demo", b"experiments: [", b"\xff\xfe\x00", b"a: !!python/object:os.system {}",
     b"experiments: *nothing", b"{a: 1, a: 2}", b"\t: x", b"42", b"? [1]\n: 2\n"],
)  # fmt: skip
def test_a_configuration_that_is_no_mapping_of_known_keys(
    tmp_path: Path, refused: Callable[..., str], content: bytes
) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    refused("validate", path)


@pytest.mark.parametrize("content", ["", "null", "# seeds: 1\n"])
def test_an_empty_configuration_is_one_of_defaults(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], content: str
) -> None:
    (tmp_path / "config.yaml").write_text(content)
    main(["validate", str(tmp_path / "config.yaml")])
    said = capfd.readouterr().out
    assert "demo: " in said
    assert re.search(
        r"^Checked \d+ documents with \d+ findings and [\d,]+ printed numbers: ", said, re.M
    )
    assert said.endswith(", ".join(read_papers()) + "\n")


# ------------------------------------------------------------------------- specifications, cells


CELL = "tiny/jax/devices-1/seed-1"
TINY = Recipe(
    batch_size=2, sequence_length=3, layers=1, embedding_size=4, hidden_size=4, epochs=1,
    constant_epochs=1, evaluation_batch_size=2,
)  # fmt: skip


def specification(**changes: Any) -> dict[str, Any]:
    made = Specification(variant="tiny", recipe=TINY, corpus_definition={}).model_dump(mode="json")
    return made | changes


def of_folder(texts: Path) -> dict[str, Any]:
    """A configuration whose corpus is a folder of texts."""
    definition = {"kind": "folder", "folder": str(texts)}
    return {"corpora": {"mine": definition}, "corpus": "mine"}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A prepared corpus of seven words."""
    texts = tmp_path / "texts"
    texts.mkdir()
    rng = np.random.default_rng(1)
    words = np.array(["a", "b", "c", "d", "e", "f", "<unk>"])
    for split, lines in (("train", 40), ("valid", 20), ("test", 20)):
        text = "".join(" ".join(rng.choice(words, 6)) + "\n" for _ in range(lines))
        (texts / f"{split}.txt").write_text(text)
    folder = tmp_path / "corpora" / "mine"
    places = ["--downloads", str(tmp_path), "--output", str(folder)]
    main(["corpus", *corpus_arguments(texts), *places])
    return folder


def corpus_arguments(texts: Path) -> list[str]:
    """What the workflow passes of a folder of texts that it has not read."""
    content = {"name": "mine", "content": {"kind": "folder"}, "subset": None}
    fetching = {"mine": {"folder": str(texts)}}
    return ["--corpus", json.dumps(content), "--fetching", json.dumps(fetching)]


def train_arguments(
    folder: Path, spec: Any, cell: str = CELL, corpus: Path | None = None
) -> list[Any]:
    text = spec if isinstance(spec, str) else json.dumps(spec)
    return [
        "train", "--cell", cell, "--specification", text, "--corpus", corpus or folder / "corpus",
        "--output", folder / "cell", "--attempts", folder / "attempts",
        "--checkpoints", folder / "checkpoints",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "cell",
    ["", "tiny", "tiny/jax", "tiny/jax/devices-0/seed-1", "tiny/jax/devices-1/seed--1",
     "tiny/torch/devices-1/seed-1", "tiny/jax/devices-1/seed-99999999999",
     "../jax/devices-1/seed-1",
     "tiny;rm -rf/jax/devices-1/seed-1", "tiny/jax/devices-x/seed-1", "tiny/jax/devices-1/seed-1/x",
     "tiny/jax/devices-9999/seed-1", "$(id)/jax/devices-1/seed-1", "ti ny/jax/devices-1/seed-1"],
)  # fmt: skip
def test_a_bad_cell(tmp_path: Path, refused: Callable[..., str], cell: str) -> None:
    said = refused(*train_arguments(tmp_path, specification(), cell))
    assert "--cell" in said


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "specification"),
        ("{", "specification"),
        ("[]", "specification"),
        ("null", "specification"),
        ('{"variant": "tiny"}', "recipe"),
        (specification(protocol=99), "protocol 99"),
        (specification(variant="other"), "is of other, not tiny"),
        (specification(accelerator="tpu"), "accelerator"),
        (specification(recipe={"layers": 0}), "layers"),
        (specification(recipe={"layers": "two"}), "layers"),
        (specification(recipe={"no_such": 1}), "no_such"),
        (specification(recipe={"dropout": -0.1}), "dropout"),
        (specification(recipe={"learning_rate": 0}), "learning_rate"),
        (specification(recipe={"kernel": "block", "rnn": "gru"}), "kernel=block"),
        (specification(recipe={"learning_rate": float("nan")}), "learning_rate"),
        (specification(extra=1), "extra"),
    ],
)
def test_a_bad_specification(
    tmp_path: Path, refused: Callable[..., str], spec: Any, message: str
) -> None:
    assert message in refused(*train_arguments(tmp_path, spec))


# ------------------------------------------------------------------------------------- corpora


def damage(corpus: Path, name: str, how: str) -> None:
    path = corpus / name
    if how == "missing":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif how == "garbage":
        path.write_bytes(os.urandom(300))
    elif how == "a folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(b"{}")


PARTS = ["corpus.json", "vocabulary.txt", "train.npy", "valid.npy", "test.npy"]


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize(
    "how", ["missing", "empty", "truncated", "garbage", "a folder", "something else"]
)
def test_a_damaged_corpus(
    tmp_path: Path, refused: Callable[..., str], corpus: Path, name: str, how: str
) -> None:
    assert (corpus / name).is_file()
    damage(corpus, name, how)
    said = refused(*train_arguments(tmp_path, specification(), corpus=corpus))
    assert "corpus" in said


def test_no_corpus(tmp_path: Path, refused: Callable[..., str]) -> None:
    assert "no prepared corpus" in refused(*train_arguments(tmp_path, specification()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"feeding": "windows", "sequence_length": 1000}, "1000"),
        ({"feeding": "windows", "batch_size": 1000}, "1000"),
    ],
)
def test_a_corpus_too_short_for_the_recipe(
    tmp_path: Path, refused: Callable[..., str], corpus: Path, changes: dict[str, Any], message: str
) -> None:
    recipe = TINY.model_dump(mode="json") | changes
    said = refused(*train_arguments(tmp_path, specification(recipe=recipe), corpus=corpus))
    assert message in said


@pytest.mark.parametrize(
    ("split", "content", "message"),
    [
        ("train", None, "train.txt"),
        ("valid", None, "valid.txt"),
        ("test", b"", "test.txt"),
        ("train", b"\n\n", "train.txt"),
        ("train", b"a b\xff\n", "UTF-8"),
        ("valid", b"a b", "valid.txt"),  # no newline at the end
        ("valid", b"a unknown\n", "unknown"),  # and the corpus has no <unk>
        ("test", b"a\x00b\n", "test.txt"),
    ],
)
def test_a_bad_text(
    tmp_path: Path, refused: Callable[..., str], split: str, content: bytes | None, message: str
) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for each in ("train", "valid", "test"):
        (texts / f"{each}.txt").write_bytes(b"a b\nb a\n")
    path = texts / f"{split}.txt"
    path.unlink() if content is None else path.write_bytes(content)
    said = refused(
        "corpus", *corpus_arguments(texts), "--downloads", tmp_path / "downloads",
        "--output", tmp_path / "corpora" / "mine",
    )  # fmt: skip
    assert message in said


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"config": 3}', b"\xff", b"null"])
def test_a_bad_study(tmp_path: Path, refused: Callable[..., str], content: bytes) -> None:
    (tmp_path / "study.json").write_bytes(content)
    refused("status", "--study", tmp_path / "study.json", "--results", tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "null", '{"name": "mine", "content": 3}'])
def test_bad_json_from_the_workflow(
    tmp_path: Path, refused: Callable[..., str], content: str
) -> None:
    output = ("--output", tmp_path / "out")
    refused(
        "analyse", "--plan", content, "--results", tmp_path, *output, "--report", tmp_path / "r"
    )
    refused("corpus", "--corpus", content, "--downloads", tmp_path, *output)
    if content != "{}":
        refused("partial", "--configuration", content, "--results", tmp_path, *output)


# -------------------------------------------------------------------------------- cell folders


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Results of the demo, as if it had run."""
    planned = plan("demo", ("demo-lstm",), seeds=(1, 2))
    write_results(tmp_path, planned)
    write_corpus(tmp_path)
    return tmp_path


STUDY = load_study({"experiments": ["demo"], "seeds": [1, 2], "devices": [1]})


def analyse_arguments(results: Path) -> list[Any]:
    return [
        "analyse", "--plan", STUDY.plan("demo"), "--results", results, "--output", results / "out",
        "--report", results / "report",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["metrics.json", "history.csv", "provenance.json"])
@pytest.mark.parametrize("how", ["empty", "truncated", "garbage", "a folder"])
def test_a_damaged_cell(results: Path, refused: Callable[..., str], name: str, how: str) -> None:
    cell = results / "cells" / "demo-lstm" / "jax" / "devices-1" / "seed-1"
    if not (cell / name).exists():
        (cell / name).write_text("{}")
    damage(cell, name, how)
    said = refused(*analyse_arguments(results))
    assert name in said


def changed(results: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = results / "cells" / "demo-lstm" / "jax" / "devices-1" / "seed-1" / "metrics.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(fingerprint="feedfeedfeed"), "different settings"),
        (lambda m: m["cell"].update(seed=7), "another cell"),
        (lambda m: m["test"].update(tokens=5), "different numbers of tokens"),
        (lambda m: m.update(test=None), "lacks a finite score"),
        (lambda m: m["valid"].update(nll="Infinity"), "lacks a finite score"),
        (lambda m: m.update(status="fine"), "status"),
        (lambda m: m.update(unheard_of=1), "unheard_of"),
        (lambda m: m.pop("cell"), "cell"),
        (lambda m: m.update(parameters="many"), "parameters"),
        (lambda m: m["seconds"].update(total="long"), "total"),
    ],
)
def test_a_cell_that_contradicts_itself_or_the_others(
    results: Path, refused: Callable[..., str], change: Callable[[Any], Any], message: str
) -> None:
    changed(results, change)
    assert message in refused(*analyse_arguments(results))


def test_a_partial_report_is_made_all_the_same_and_says_what_does_not_count(
    results: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fingerprint = STUDY.specification("demo-lstm").fingerprint
    cells = results / "cells" / "demo-lstm"
    for path in cells.glob("jax/**/metrics.json"):  # the others are of an older recipe
        path.write_text(path.read_text().replace("0123456789ab", fingerprint, 1))
    (cells / "jax" / "devices-1" / "seed-2" / "metrics.json").write_text("{")
    arguments = ["--configuration", STUDY.configuration, "--results", results]
    main([str(word) for word in ("partial", *arguments, "--output", results / "partial")])
    assert "The report on 1 of 10 cells" in capfd.readouterr().out
    page = (results / "partial" / "experiments" / "demo.html").read_text()
    assert page.count(f"no seed has a result ({OUTDATED})") >= 4
    assert "seed-2/metrics.json cannot be read" in page


def test_a_results_folder_that_may_not_be_written_to(
    results: Path, refused: Callable[..., str]
) -> None:
    (results / "out").write_text("a file where a folder should be")
    assert "out" in refused(*analyse_arguments(results))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"name": 1}', b"\xff\xfe"])
def test_a_bad_analysis(tmp_path: Path, refused: Callable[..., str], content: bytes) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "analysis.json").write_bytes(content)
    refused(
        "report", tmp_path / "experiment", "--results", tmp_path, "--report", tmp_path / "report"
    )


def test_a_full_disk_leaves_no_analysis_and_no_half_of_a_file(
    results: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(descriptor: int) -> None:  # noqa: ARG001
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", no_room)
    before = files(results)
    with pytest.raises(SystemExit, match="2"):
        main([str(argument) for argument in analyse_arguments(results)])
    assert "No space left on device" in capfd.readouterr().err
    after = files(results)
    assert "out/analysis.json" not in after
    assert not [name for name in after if Path(name).name.startswith(".")]
    assert {name: content for name, content in after.items() if name in before} == before
