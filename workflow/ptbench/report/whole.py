"""Everything that the report is made of, in one process: analyses, answers, searches and pages.

The workflow makes the same in a job for each experiment, document and search.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ptbench.analysis.plan import plan_experiment
from ptbench.configuration.specification import Cell
from ptbench.configuration.study import Study
from ptbench.report.experiment import analyse_experiment
from ptbench.report.experiment_page import write_experiment_page
from ptbench.report.overview import write_overview
from ptbench.report.paper import answer_paper
from ptbench.report.paper_page import write_paper_page
from ptbench.report.search import write_search
from ptbench.report.site import Site


def write_everything(
    study: Study,
    site: Site,
    papers: Path,
    answering: Mapping[str, Sequence[str]],
    output: Path,
    only_current: bool = False,
) -> set[str]:
    """Write tables, figures and pages of a whole study, and return the cells that have results.

    Args:
        study: what was planned.
        site: the report.
        papers: folder of the documents.
        answering: the experiments that answer each document.
        output: `experiments`, `papers` and `searches` are made in it.
        only_current: whether a cell whose recipe has changed since, or that cannot be read, counts
            as missing.

    Raises:
        AnalysisError: if results cannot be read or must not be averaged.
    """
    folders, done = [], set()

    def fingerprint(cell: Cell) -> str | None:
        return study.fingerprint(cell.path)

    for name in study.experiments:
        folders.append(output / "experiments" / name)
        plan = plan_experiment(study, name)
        analysis = analyse_experiment(
            plan, site.results, papers, folders[-1], fingerprint if only_current else None
        )
        write_experiment_page(site, analysis, folders[-1])
        cells = (cell for row in analysis.rows for cell in row.cells)
        done |= {cell.path for cell in cells if cell.state != "missing"}
    documents = []
    for paper, names in answering.items():
        documents.append(output / "papers" / paper)
        of_experiments = [output / "experiments" / name for name in names]
        write_paper_page(
            site, answer_paper(papers / paper, of_experiments, documents[-1]), documents[-1]
        )
    searched = []
    for name in study.searches:
        searched.append(output / "searches" / name)
        write_search(site, study.shown(name), site.results, searched[-1], only_current)
    write_overview(site, folders, documents, searched)
    return done
