"""Write the folder of one document: answers.json, from the analyses of its experiments."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from ptbench.analysis.answers import Answers, answer
from ptbench.analysis.collect import AnalysisError, first_line
from ptbench.analysis.experiment import Analysis
from ptbench.files import write_atomically


def answer_paper(folder: Path, experiment_folders: Sequence[Path], output: Path) -> Answers:
    """Judge a document's findings and write everything the report needs of it.

    Writes answers.json last, because it tells that the others are there.

    Args:
        folder: of the document.
        experiment_folders: what `analyse_experiment` wrote of the experiments that answer it.
        output: made if need be.

    Raises:
        AnalysisError: if an analysis cannot be read.
        ConfigurationError: if a file of the document is malformed.
    """
    answers = answer(folder, [read_analysis(each) for each in experiment_folders])
    write_atomically(output / "answers.json", answers.model_dump_json(indent=1) + "\n")
    return answers


def read_analysis(folder: Path) -> Analysis:
    """Return the analysis of an experiment.

    Raises:
        AnalysisError: if the folder has none that can be read.
    """
    try:
        return Analysis.model_validate_json((folder / "analysis.json").read_bytes())
    except (OSError, ValidationError) as error:
        raise AnalysisError(
            f"{folder} is not a whole analysis of an experiment: {first_line(error)}"
        ) from error
