"""Write the folder of one experiment: tables, figures and analysis.json, from its cells."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ptbench.analysis.collect import collect_rows, read_corpus_facts
from ptbench.analysis.experiment import Analysis, analyse
from ptbench.analysis.plan import ExperimentPlan
from ptbench.analysis.published import read_published
from ptbench.configuration.specification import Cell
from ptbench.files import write_atomically
from ptbench.report import tables
from ptbench.report.figures import write_figures


def analyse_experiment(
    plan: ExperimentPlan,
    results_folder: Path,
    published_folder: Path,
    output_folder: Path,
    fingerprint: Callable[[Cell], str | None] | None = None,
) -> Analysis:
    """Analyse the planned cells that exist and write everything the report needs of them.

    Writes table.csv, table.md, table.tex, comparison.csv, differences.csv, curves.csv, and
    figures/*.svg. Writes analysis.json last, because it tells that the others are there.

    Args:
        plan: the experiment.
        results_folder: holds cells/ and corpora/.
        published_folder: holds the published numbers as CSV.
        output_folder: made if need be.
        fingerprint: as `collect_rows` takes it.

    Raises:
        AnalysisError: if results cannot be read or must not be averaged; nothing is written then.
    """
    rows = collect_rows(plan, results_folder, fingerprint)
    corpus = read_corpus_facts(results_folder, plan.corpus_folder)
    analysis = analyse(plan, rows, corpus, read_published(published_folder))
    figures = write_figures(analysis, rows, output_folder / "figures")
    analysis = analysis.model_copy(update={"figures": figures})
    for name, text in {
        "table.csv": tables.results_csv(analysis),
        "table.md": tables.markdown(analysis),
        "table.tex": tables.latex(analysis),
        "comparison.csv": tables.comparison_csv(analysis),
        "curves.csv": tables.curves_csv(rows),
        "differences.csv": tables.differences_csv(analysis),
        "variants.csv": tables.variants_csv(analysis),
        "analysis.json": analysis.model_dump_json(indent=1) + "\n",
    }.items():
        write_atomically(output_folder / name, text)
    return analysis
