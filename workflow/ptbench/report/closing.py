"""What the workflow prints when all has ended well: what came out, in a screen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ptbench.analysis import headline
from ptbench.analysis.answers import Answers
from ptbench.analysis.experiment import Analysis
from ptbench.analysis.metrics import METRICS
from ptbench.analysis.search import SearchResult
from ptbench.log import replace_unshowable
from ptbench.report import words
from ptbench.report.formatting import format_std, framework_name, kind_of_device
from ptbench.report.overview import read_analysis, read_document, read_search_result

COLUMNS = ("test_perplexity", "tokens_per_second")
MOST_ROWS = 30  # of the table; beyond, the sentences alone
MOST_EXPERIMENTS = 8  # whose variants have a sentence each; beyond, the report has them


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
    pages = report.parent
    for search in found:
        page = pages / f"searches/{search.contest.name}.html"
        console.print(f"{search_sentence(search)} See {page}", soft_wrap=True)
    for folder in documents:
        answers = read_document(folder).answers
        page = pages / f"papers/{answers.paper}.html"
        console.print(f"{document_sentence(answers)} See {page}", soft_wrap=True)
    # The winners of a search are compared by it.
    winners = {runs.variant for search in found for runs in search.full}
    several = [each for each in analyses if each.best and winners.isdisjoint(variants_of(each))]
    for analysis in several if len(several) <= MOST_EXPERIMENTS else ():
        console.print(f"{analysis.name}: {words.variants_sentence(analysis)}")
    for sentence in frameworks_sentences(analyses):
        console.print(sentence if sentence.endswith(".") else f"{sentence}.")
    console.print(f"The report is at {report}", soft_wrap=True)


def search_sentence(search: SearchResult) -> str:
    """Say which trial of a search won, or why none has."""
    name = search.contest.name
    if search.winner is None:
        return f"{name}: the winner is {search.undecided}."
    found = search.winner.valid_perplexity
    perplexity = METRICS["valid_perplexity"].write(found) if found else "unknown"
    return (
        f"{name}: of {words.count(len(search.trials), 'trial')}, number {search.winner.trial} is "
        f"the winner; trained in full, its validation perplexity is {perplexity}."
    )


def document_sentence(answers: Answers) -> str:
    """Say how much of a document holds, of what our runs can judge."""
    parts = [
        f"{held} of {judged} {what}"
        for (held, judged), what in (
            (answers.numbers_reproduced, "printed numbers reproduced or close"),
            (answers.findings_upheld, "findings upheld"),
        )
        if judged
    ]
    return f"{answers.paper}: {', '.join(parts) or 'none of it can be judged by these runs'}."


def variants_of(analysis: Analysis) -> set[str]:
    """Return the variants of an experiment."""
    return {row.variant for row in analysis.rows}


def frameworks_sentences(analyses: Sequence[Analysis]) -> list[str]:
    """Say how the frameworks of a study compare; of one framework, only what its runs are."""
    rows = [row for analysis in analyses for row in analysis.rows]
    reduced = words.reduced_warning(sorted({each for a in analyses for each in a.reductions}))
    if len({row.framework for row in rows}) == 1:
        return [reduced] if reduced else []
    speeds = headline.compare_speeds(headline.groups_of(analyses))
    finished = [row for row in rows if row.n_ok or row.n_diverged]
    found = (
        words.speed_title(speeds, finished),
        "" if speeds else words.speed_sentence(speeds, finished),
        reduced,
        words.perplexity_sentence(headline.compare_perplexities(analyses)),
    )
    return [sentence for sentence in found if sentence]


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
            spread = format_std(METRICS[COLUMNS[0]], perplexity)
            table.add_row(
                analysis.label(row.variant) + devices,
                framework_name(row.framework)
                + (f" {kind_of_device(row.accelerator)}" if analysis.kinds_of_device else ""),
                f"{METRICS[COLUMNS[0]].write(perplexity.value)} {spread}" if perplexity else "–",
                METRICS[COLUMNS[1]].write(speed.value) if speed else "–",
                f"{row.n_ok} of {len(row.cells)}",
            )
    return table
