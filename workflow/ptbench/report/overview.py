"""The pages on the whole study: index, frameworks, runs, methods, and the same in Markdown.

They are made from the analysis.json of each experiment and the answers.json of each document,
whose own pages are written with them.
"""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from ptbench.analysis import headline
from ptbench.analysis.answers import Answers
from ptbench.analysis.collect import AnalysisError, first_line
from ptbench.analysis.experiment import Analysis
from ptbench.analysis.headline import Comparison, Perplexities
from ptbench.analysis.metrics import METRICS
from ptbench.analysis.search import SearchResult
from ptbench.analysis.source import read_source
from ptbench.backends import FRAMEWORKS
from ptbench.backends.features import read_features
from ptbench.configuration.requests import SEEDS, SMOKE
from ptbench.measurement.mistakes import read_mistakes
from ptbench.report import words
from ptbench.report.commands import renewing_command
from ptbench.report.opening import answers_to, opening
from ptbench.report.runs import Run, asked_over_used, missing, runs_of, versions_of
from ptbench.report.site import Site

RUN_METRICS = ("test_perplexity", "tokens_per_second", "total_seconds")  # columns of runs.html
FAILURES_SHOWN = 3  # on index.html; runs.html has all


class Document(NamedTuple):
    """A document in the list of documents."""

    answers: Answers
    short: str  # its authors and year


class Line(NamedTuple):
    """An experiment in the list of experiments."""

    analysis: Analysis
    speeds: Comparison | None
    perplexities: Perplexities
    folder: Path  # with its tables


class Facts(NamedTuple):
    """What a framework ran with, in one of its implementations; from one of its runs."""

    implementation: str
    path: str  # of the run
    settings: dict[str, str]
    about: dict[str, str]


def write_overview(
    site: Site,
    experiment_folders: Sequence[Path],
    paper_folders: Sequence[Path] = (),
    search_folders: Sequence[Path] = (),
) -> Path:
    """Write the pages and return where index.html is.

    Args:
        site: the report.
        experiment_folders: what `analyse_experiment` wrote, in the order of the page.
        paper_folders: with the answers.json of each document.
        search_folders: with the search.json of each search.

    Raises:
        AnalysisError: if a folder has no analysis or answers that can be read; nothing is written
            then.
    """
    # Its libraries take a second, which pages of experiments and documents need not wait for.
    from ptbench.report.speed_map import draw_speed_map

    analyses = [read_analysis(folder) for folder in experiment_folders]
    documents = [read_document(folder) for folder in paper_folders]
    rows = [row for analysis in analyses for row in analysis.rows]
    finished = [row for row in rows if row.n_ok or row.n_diverged]
    groups = headline.groups_of(analyses)
    runs = runs_of(rows, site.results)
    memory = "peak_memory_bytes"
    if any("peak_device_memory_bytes" in row.metrics for row in rows):
        memory = "peak_device_memory_bytes"
    searches = [read_search_result(folder) for folder in search_folders]
    speeds = headline.compare_speeds(groups)
    perplexities = headline.compare_perplexities(analyses)
    study = {
        "analyses": analyses,
        "reductions": sorted({each for analysis in analyses for each in analysis.reductions}),
        "documents": documents,
        "searches": searches,
        "rows": finished,
        "runs": runs,
        "states": Counter(run.state for run in runs.values()),
        "unfinished": [run for run in runs.values() if run.state in ("failed", "interrupted")],
        "versions": versions_of(rows),
        "machines": sorted({machine for row in rows for machine in row.machines}),
        "commits": sorted({commit for row in rows for commit in row.commits}),
        "began": min((row.began for row in rows if row.began), default=None),
        "ended": max((row.ended for row in rows if row.ended), default=None),
        "speeds": speeds,
        "opening": opening(
            speeds, finished, perplexities, answers_to(searches, documents, analyses)
        ),
        "memory": headline.compare(groups, memory),
        "memory_title": METRICS[memory].title,
        "perplexities": perplexities,
        "built_in": {
            framework: (sum(each.built_in for each in features.values()), len(features))
            for framework, features in read_features().items()
        },
        "source": read_source(),
        "words": words,
        "command": shlex.join(renewing_command(site.results) or []),
    }
    lines = [
        Line(
            analysis,
            headline.compare_speeds(headline.groups_of([analysis])),
            headline.compare_perplexities([analysis]),
            folder,
        )
        for analysis, folder in zip(analyses, experiment_folders, strict=True)
    ]
    site.write(
        "methods.html.j2",
        "methods.html",
        margins=sorted({analysis.equivalence_margin for analysis in analyses}),
        seeds_margin=SEEDS,
        smoke_margin=SMOKE,
    )
    site.write(
        "frameworks.html.j2",
        "frameworks.html",
        features=read_features(),
        mistakes=read_mistakes(),
        kernels={name: row.kernels for name, row in FRAMEWORKS.items()},
        run_with=facts_of(runs, site.results),
        speed_map=draw_speed_map(analyses),
        **study,
    )
    site.write(
        "runs.html.j2",
        "runs.html",
        columns=RUN_METRICS,
        batches=missing(runs.values(), site.results),
        asked=asked_over_used(runs.values()),
        **study,
    )
    for name in ("report.md", "index.html"):
        page = site.write(f"{name}.j2", name, lines=lines, shown=FAILURES_SHOWN, **study)
    return page


def read_analysis(folder: Path) -> Analysis:
    """Return the analysis of an experiment.

    Raises:
        AnalysisError: if the folder has none, or it cannot be read.
    """
    try:
        return Analysis.model_validate_json((folder / "analysis.json").read_bytes())
    except (OSError, ValidationError) as error:
        raise AnalysisError(
            f"{folder} is not a whole analysis of an experiment: {first_line(error)}"
        ) from error


def read_analyses(results: Path) -> list[Analysis]:
    """Return the analyses of a results folder.

    Raises:
        AnalysisError: if it has none, or one cannot be read.
    """
    folders = sorted(path.parent for path in results.glob("experiments/*/analysis.json"))
    if not folders:
        raise AnalysisError(f"{results} has no experiments/*/analysis.json: not a results folder")
    return [read_analysis(folder) for folder in folders]


def read_document(folder: Path) -> Document:
    """Return what the study answers to a document.

    Raises:
        AnalysisError: if the folder has no answers.json, or it cannot be read.
    """
    path = folder / "answers.json"
    try:
        answers = Answers.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise AnalysisError(
            f"{path} is not what a study answers to a document: {first_line(error)}"
        ) from error
    title = answers.about.citation
    named = re.match(r"[^0-9]*[0-9]{4}", title)
    return Document(answers, named[0] if named else title)


def read_search_result(folder: Path) -> SearchResult:
    """Return what a search came to.

    Raises:
        AnalysisError: if the folder has no search.json, or it cannot be read.
    """
    try:
        return SearchResult.model_validate_json((folder / "search.json").read_bytes())
    except (OSError, ValidationError) as error:
        raise AnalysisError(f"{folder} is not a whole search: {first_line(error)}") from error


def facts_of(runs: Mapping[str, Run], results: Path) -> dict[str, list[Facts]]:
    """Return what each framework ran with, from the first finished run of each implementation."""
    found: dict[tuple[str, str], Facts] = {}
    for path, run in runs.items():
        key = run.row.framework, run.row.implementation
        file = results / "cells" / path / "provenance.json"
        if key in found or run.line.state == "missing" or not file.exists():
            continue
        content: dict[str, Any] = json.loads(file.read_bytes())
        settings = {k: str(v) for k, v in content.get("settings", {}).items()}
        settings.pop("implementation", None)
        named = {
            "Python": content.get("python"),
            "Threads": content.get("threads"),
            "System": content.get("system"),
            "Lock of its environment": (content.get("lock_sha256") or "")[:12],
        }
        about = {name: str(value) for name, value in named.items() if value}
        found[key] = Facts(run.row.implementation, path, settings, about)
    return {
        name: [facts for (framework, _), facts in found.items() if framework == name]
        for name in FRAMEWORKS
        if any(framework == name for framework, _ in found)
    }
