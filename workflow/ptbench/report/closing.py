"""What the workflow prints when all has ended well: what came out, in a screen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ptbench.analysis import headline
from ptbench.analysis.experiment import Analysis
from ptbench.analysis.metrics import METRICS
from ptbench.log import replace_unshowable
from ptbench.report import words
from ptbench.report.formatting import format_std, framework_name, kind_of_device
from ptbench.report.opening import answers_to, opening
from ptbench.report.overview import read_analysis, read_document, read_search_result

COLUMNS = ("test_perplexity", "tokens_per_second")
MOST_ROWS = 30  # of the table; beyond, the sentences alone
MOST_ANSWERS = 8  # of searches, documents and experiments; the report has the others


def print_results(
    experiments: Sequence[Path],
    report: Path,
    searches: Sequence[Path] = (),
    documents: Sequence[Path] = (),
    console: Console | None = None,
) -> None:
    """Print the answers of a study, a table if it is small, and where its report is.

    Args:
        experiments: their folders.
        report: its first page.
        searches: folders of the searches.
        documents: folders of what the study answers to documents.
        console: where to print; None: standard output.
    """
    replace_unshowable()
    console = console or Console(highlight=False, markup=False)
    analyses = [read_analysis(folder) for folder in experiments]
    rows = [row for analysis in analyses for row in analysis.rows]
    if 0 < len(rows) <= MOST_ROWS:
        console.print(results_table(analyses))
    found = [read_search_result(folder) for folder in searches]
    answers = answers_to(found, [read_document(folder) for folder in documents], analyses)
    for said in answers[:MOST_ANSWERS]:
        console.print(f"{said.text}. See {report.parent / said.link}", soft_wrap=True)
    for sentence in frameworks_sentences(analyses):
        console.print(sentence if sentence.endswith(".") else f"{sentence}.")
    console.print(f"The report is at {report}", soft_wrap=True)


def frameworks_sentences(analyses: Sequence[Analysis]) -> list[str]:
    """Say how the frameworks of a study compare; of one framework, only what its runs are."""
    rows = [row for analysis in analyses for row in analysis.rows]
    reduced = words.reduced_warning(
        sorted({each for a in analyses for each in a.reductions}),
        any(analysis.published for analysis in analyses),
    )
    if len({row.framework for row in rows}) == 1:
        return [reduced] if reduced else []
    speeds = headline.compare_speeds(headline.groups_of(analyses))
    finished = [row for row in rows if row.n_ok or row.n_diverged]
    perplexities = headline.compare_perplexities(analyses)
    found = [said.text for said in opening(speeds, finished, perplexities)]
    if speeds:
        del found[1]  # the intervals, which the report has
    return [*found, reduced] if reduced else found


def results_table(analyses: Sequence[Analysis]) -> Table:
    """Return the table of all rows: perplexity and speed, and how many seeds they are of."""
    table = Table("variant", "framework", box=None, header_style="bold", pad_edge=False)
    for name in COLUMNS:
        unit = f" [{METRICS[name].unit}]" if METRICS[name].unit else ""
        table.add_column(Text(METRICS[name].title.lower() + unit), justify="right")
    table.add_column("seeds", justify="right")
    for analysis in analyses:
        for row in analysis.rows:
            devices = f" × {row.devices}" if row.devices > 1 else ""
            perplexity, speed = (row.metrics.get(name) for name in COLUMNS)
            spread = format_std(perplexity)
            table.add_row(
                analysis.label(row.variant) + devices,
                framework_name(row.framework)
                + (f" {kind_of_device(row.accelerator)}" if analysis.kinds_of_device else ""),
                f"{METRICS[COLUMNS[0]].write(perplexity.value)} {spread}" if perplexity else "–",
                METRICS[COLUMNS[1]].write(speed.value) if speed else "–",
                f"{row.n_ok} of {len(row.cells)}",
            )
    return table
