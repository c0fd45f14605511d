"""What the workflow prints when all has ended well: what came out, in a screen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ptbench.analysis import headline
from ptbench.analysis.experiment import Analysis
from ptbench.analysis.metrics import METRICS
from ptbench.log import replace_unshowable
from ptbench.report import words
from ptbench.report.formatting import framework_name, kind_of_device
from ptbench.report.overview import read_analysis

COLUMNS = ("test_perplexity", "tokens_per_second")
MOST_ROWS = 30  # of the table; beyond, the sentences alone


def print_results(folders: Sequence[Path], report: Path, console: Console | None = None) -> None:
    """Print the answers of a study, a table if it is small, and where its report is.

    Args:
        folders: of the experiments.
        report: its first page.
        console: where to print; None: standard output.
    """
    replace_unshowable()
    console = console or Console(highlight=False, markup=False)
    analyses = [read_analysis(folder) for folder in folders]
    rows = [row for analysis in analyses for row in analysis.rows]
    if 0 < len(rows) <= MOST_ROWS:
        console.print(results_table(analyses))
    speeds = headline.compare_speeds(headline.groups_of(analyses))
    finished = [row for row in rows if row.n_ok or row.n_diverged]
    found = (
        words.speed_title(speeds, finished),
        "" if speeds else words.speed_sentence(speeds, finished),
        words.reduced_warning(sorted({each for a in analyses for each in a.reductions})),
        words.perplexity_sentence(headline.compare_perplexities(analyses)),
    )
    for sentence in filter(None, found):
        console.print(sentence if sentence.endswith(".") else f"{sentence}.")
    console.print(f"The report is at {report}", soft_wrap=True)


def results_table(analyses: Sequence[Analysis]) -> Table:
    """Return the table of all rows: perplexity and speed, and how many seeds they are of."""
    table = Table("variant", "framework", box=None, header_style="bold", pad_edge=False)
    for name in COLUMNS:
        table.add_column(METRICS[name].title.lower(), justify="right")
    table.add_column("seeds", justify="right")
    for analysis in analyses:
        for row in analysis.rows:
            devices = f" × {row.devices}" if row.devices > 1 else ""
            perplexity, speed = (row.metrics.get(name) for name in COLUMNS)
            spread = f" ± {perplexity.std:.2f}" if perplexity and perplexity.std else ""
            table.add_row(
                analysis.label(row.variant) + devices,
                framework_name(row.framework)
                + (f" {kind_of_device(row.accelerator)}" if analysis.kinds_of_device else ""),
                METRICS[COLUMNS[0]].write(perplexity.value) + spread if perplexity else "–",
                METRICS[COLUMNS[1]].write(speed.value) if speed else "–",
                f"{row.n_ok} of {len(row.cells)}",
            )
    return table
