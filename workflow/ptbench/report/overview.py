"""The pages on the whole study: index, frameworks, runs, methods.

They are made from the analysis.json of each experiment, whose own page `experiment_page.py` writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from ptbench.analysis.collect import AnalysisError, first_line
from ptbench.analysis.experiment import Analysis
from ptbench.backends import FRAMEWORKS
from ptbench.report.runs import runs_of
from ptbench.report.site import Site


def write_overview(site: Site, experiment_folders: Sequence[Path]) -> Path:
    """Write the pages and return where index.html is.

    Args:
        site: the report.
        experiment_folders: what `analyse_experiment` wrote, in the order of the page.

    Raises:
        AnalysisError: if a folder has no readable analysis.json; nothing is written then.
    """
    analyses = [read_analysis(folder) for folder in experiment_folders]
    rows = [row for analysis in analyses for row in analysis.rows]
    versions = {
        name: sorted({v for row in rows if row.framework == name for v in row.framework_versions})
        for name in FRAMEWORKS
        if any(row.framework == name for row in rows)
    }
    site.write(
        "methods.html.j2",
        "methods.html",
        margins=sorted({analysis.equivalence_margin for analysis in analyses}),
        cells_at_once=max((row.cells_at_once for row in rows if row.cells_at_once), default=None),
    )
    site.write("frameworks.html.j2", "frameworks.html", versions=versions)
    site.write("runs.html.j2", "runs.html", runs=runs_of(rows, site.results))
    return site.write("index.html.j2", "index.html", analyses=analyses, versions=versions)


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
