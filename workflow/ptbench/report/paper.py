"""Write the folder of one document: its answers, tables and figures, from its experiments'."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from ptbench.analysis.answers import Answers, answer, best_rows
from ptbench.analysis.experiment import Analysis
from ptbench.configuration.papers import NamedRow
from ptbench.files import write_atomically
from ptbench.report.exhibits import Curve, Curves, curve_rows, write_exhibits
from ptbench.report.overview import read_analysis


def answer_paper(folder: Path, experiment_folders: Sequence[Path], output: Path) -> Answers:
    """Answer a document and write everything the report needs of it.

    Writes exhibits/*.svg and *.csv, and tables/*.tex. Writes answers.json last, because it
    tells that the others are there.

    Args:
        folder: of the document.
        experiment_folders: what `analyse_experiment` wrote of the experiments that answer it.
        output: made if need be.

    Raises:
        AnalysisError: if an analysis cannot be read.
        ConfigurationError: if a file of the document is malformed.
    """
    analyses = [read_analysis(each) for each in experiment_folders]
    answers = answer(folder, analyses)
    # A configuration's own variants, such as m+budget=quick, stand for the document's.
    rows = best_rows(analyses)
    wanted = {
        row._replace(variant=rows[row].variant): row
        for row in curve_rows(answers.exhibits)
        if row in rows
    }
    curves: Curves = {
        row: found
        for each, analysis in zip(experiment_folders, analyses, strict=True)
        for row, found in _read_curves(each, analysis, wanted).items()
    }
    write_exhibits(answers.exhibits, curves, output)
    write_atomically(output / "answers.json", answers.model_dump_json(indent=1) + "\n")
    return answers


def _read_curves(
    folder: Path, analysis: Analysis, wanted: Mapping[NamedRow, NamedRow]
) -> dict[NamedRow, list[Curve]]:
    """Return the curves of rows from an experiment's curves.csv.

    Args:
        folder: of the experiment.
        analysis: of the same.
        wanted: the document's row, by that of ours.
    """
    states = {
        (NamedRow(row.variant, row.framework, row.devices), line.cell.seed): line.state
        for row in analysis.rows
        for line in row.cells
    }
    if wanted.keys().isdisjoint(row for row, _ in states):
        return {}
    runs: dict[tuple[NamedRow, int], Curve] = {}
    with (folder / "curves.csv").open(encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            row = NamedRow(line["variant"], line["framework"], int(line["devices"]))
            if row not in wanted:
                continue
            key = row, int(line["seed"])
            if key not in runs:
                empty: dict[str, list[float]] = {"train_perplexity": [], "valid_perplexity": []}
                runs[key] = Curve(states[key] == "diverged", [], empty)
            runs[key].epochs.append(int(line["epoch"]))
            for metric, values in runs[key].values.items():
                values.append(float(line[metric]))
    curves: dict[NamedRow, list[Curve]] = {}
    for (row, _), curve in runs.items():
        curves.setdefault(wanted[row], []).append(curve)
    return curves
