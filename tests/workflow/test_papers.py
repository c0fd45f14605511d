"""Every experiment of every document, in every framework that it names, to its exhibits.

Each run is a few steps of its recipe (`budget: smoke`), narrower so that two cores can hold all of
them, on the synthetic corpus. `--exhaustive` trains all; otherwise it is a sample in which every
word-valued setting of a recipe is trained.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.workflow.conftest import ROOT

from ptbench import environments
from ptbench.analysis.plan import plan_experiment
from ptbench.backends import FRAMEWORKS
from ptbench.configuration.experiments import load_library
from ptbench.configuration.specification import Cell, Specification
from ptbench.configuration.study import Study, load_study
from ptbench.corpus.prepare import prepare
from ptbench.model.recipe import BUDGETS, Recipe
from ptbench.report.experiment import analyse_experiment
from ptbench.report.experiment_page import write_experiment_page
from ptbench.report.paper import answer_paper
from ptbench.report.paper_page import write_paper_page
from ptbench.report.site import RunFacts, Site
from ptbench.training.provenance import run_facts
from ptbench.training.records import read_metrics

PAPERS = ROOT / "workflow" / "papers"
NARROWER = 25  # times, so that the widest layer has 900 units
LEAST = 4  # units of a layer
WIDTHS = ("embedding_size", "hidden_size", "last_hidden_size", "latent_size", "output_rank")
AT_ONCE = 40  # cells of a process: what a framework has compiled stays in its memory
SECONDS = 600  # that a cell may take


@pytest.fixture(scope="module")
def study() -> Study:
    """All experiments of all documents, one seed of each run."""
    return load_study(
        {"papers": list(load_library().papers), "seeds": [1], "corpus": "synthetic",
         "budget": "smoke"}
    )  # fmt: skip


def stand_in(specification: Specification) -> Specification:
    """Return the same run of a narrower model; what was equally wide stays so."""
    widths = {
        key: max(LEAST, math.ceil(width / NARROWER))
        for key in WIDTHS
        if (width := getattr(specification.recipe, key)) is not None
    }
    values = specification.recipe.model_dump() | widths
    return specification.model_copy(update={"recipe": Recipe.model_validate(values)})


@dataclass
class Failure:
    """A cell that did not end well."""

    path: str
    wrong: str


def train_all(cells: Sequence[Cell], study: Study, results: Path) -> list[Failure]:
    """Train stand-ins of the cells, and return those that failed."""
    corpus = results / "corpora" / "synthetic"
    prepare("synthetic", study.corpora["synthetic"], None, results / "downloads", corpus)
    for framework in {cell.framework for cell in cells}:
        folder = ROOT / "results" / "environments" / f"{framework}-cpu"
        environments.build(framework, "cpu", folder)
    groups: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for cell in cells:
        specification = stand_in(study.specification(cell.variant)).text()
        files = {"results": str(results), "corpus": str(corpus)}
        task = cell.model_dump() | files | {"specification": specification}
        groups[cell.framework, cell.devices].append(task)
    parts = [
        tasks[i : i + AT_ONCE] for tasks in groups.values() for i in range(0, len(tasks), AT_ONCE)
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # each waits for a process of its own
        return list(itertools.chain(*pool.map(train_part, parts)))


def train_part(tasks: list[dict[str, Any]]) -> list[Failure]:
    """Train cells of one framework, in a new process after each that fails; return the failures."""
    failures = []
    while tasks:
        done, wrong = train_in_one_process(tasks)
        if wrong:
            cell = Cell.model_validate({key: tasks[done][key] for key in Cell.model_fields})
            failures.append(Failure(cell.path, wrong))
        tasks = tasks[done + bool(wrong) :]
    return failures


def train_in_one_process(tasks: list[dict[str, Any]]) -> tuple[int, str | None]:
    """Return how many of the first cells were trained, and what was wrong with the one after."""
    framework, results = tasks[0]["framework"], Path(tasks[0]["results"])
    folder = ROOT / "results" / "environments" / f"{framework}-cpu"
    file = Path(tempfile.mkstemp(".json", dir=results)[1])
    errors = file.with_suffix(".stderr")
    file.write_text(json.dumps(tasks))
    # JAX keeps what it compiles: many variants differ by a rate alone.
    settings = {
        "PYTHONPATH": os.pathsep.join([str(ROOT / "workflow"), str(ROOT)]),
        "JAX_COMPILATION_CACHE_DIR": str(results / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    with errors.open("w") as stderr:
        answer = subprocess.run(
            [folder / environments.PYTHON, "-m", "tests.support.smoke", file],
            env=os.environ | settings, stdout=subprocess.PIPE, stderr=stderr,
            text=True, check=False, timeout=SECONDS * len(tasks), cwd=results,
        )  # fmt: skip
    lines = [json.loads(line) for line in answer.stdout.splitlines() if line.startswith("{")]
    wrong = next((line["wrong"] for line in lines if line["wrong"]), None)
    done = sum(not line["wrong"] for line in lines)
    if done < len(tasks) and wrong is None:
        wrong = f"the process ended with {answer.returncode}: {errors.read_text()[-2000:]}"
    return done, wrong


def settings(cell: Cell, study: Study) -> set[tuple[str, Any]]:
    """Return what of a cell's recipe is a word or a switch, and its document's experiment."""
    recipe = study.specification(cell.variant).recipe.model_dump()
    found = {(key, value) for key, value in recipe.items() if isinstance(value, str | bool)}
    drops = {(key, bool(value)) for key, value in recipe.items() if key.endswith("dropout")}
    return found | drops | {("mixtures", bool(recipe["mixtures"]))}


def sample(study: Study) -> list[Cell]:
    """Return cells on one device in which every such setting of any cell is, frameworks in turn."""
    cells = [cell for cell in study.cells if cell.devices == 1]
    wanted = {cell: settings(cell, study) for cell in cells}
    left = set().union(*wanted.values())
    chosen: list[Cell] = []
    for framework in itertools.cycle(FRAMEWORKS):
        if not left:
            return chosen
        own = [cell for cell in cells if cell.framework == framework]
        best = max(own, key=lambda cell: len(wanted[cell] & left))
        if wanted[best] & left:  # some are in one framework alone
            left -= wanted[best]
            chosen.append(best)
    return chosen


def test_a_sample_of_the_documents_runs_trains(study: Study, tmp_path: Path) -> None:
    cells = sample(study)
    assert {cell.framework for cell in cells} == set(FRAMEWORKS)
    assert train_all(cells, study, tmp_path) == []
    for cell in cells:
        metrics = read_metrics(tmp_path / "cells" / cell.path / "metrics.json")
        assert metrics.steps_per_epoch <= BUDGETS["smoke"].batches


@pytest.mark.exhaustive
@pytest.mark.timeout(0)
def test_every_run_of_every_document_trains_and_comes_to_its_exhibits(
    study: Study, tmp_path: Path
) -> None:
    """Takes an hour on two cores."""
    assert train_all(study.cells, study, tmp_path) == []
    site = Site(tmp_path / "report", tmp_path, RunFacts(**run_facts()))
    for name in study.experiments:
        folder = tmp_path / "experiments" / name
        analysis = analyse_experiment(plan_experiment(study, name), tmp_path, PAPERS, folder)
        assert analysis.count("missing") == 0
        assert write_experiment_page(site, analysis, folder).exists()
    for paper, names in study.papers.items():
        folder = tmp_path / "papers" / paper
        answers = answer_paper(
            PAPERS / paper, [tmp_path / "experiments" / name for name in names], folder
        )
        for each in answers.exhibits:
            if each.exhibit.undrawn is None:
                assert each.missing is None, each.exhibit.id
                assert all(line.n_ok + line.n_diverged for line in each.lines), each.exhibit.id
        assert write_paper_page(site, answers, folder).exists()
