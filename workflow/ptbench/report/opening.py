"""The report's first sentences: what the study was asked, and what is known of the frameworks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from ptbench.analysis.experiment import Analysis, RowResult
from ptbench.analysis.headline import Comparison, Perplexities
from ptbench.analysis.metrics import METRICS
from ptbench.analysis.search import SearchResult
from ptbench.configuration.specification import is_smoke
from ptbench.report import words

if TYPE_CHECKING:
    from ptbench.report.overview import Document

MOST_ANSWERS = 3  # at the head of the first page; its tables have all


class Said(NamedTuple):
    """A sentence, without its full stop."""

    text: str
    link: str = ""  # to the page with the grounds for it
    decided: bool = True


def opening(
    speeds: Comparison | None,
    rows: Sequence[RowResult],
    perplexities: Perplexities,
    answers: Sequence[Said] = (),
) -> list[Said]:
    """Return the headline and the sentences below it.

    Where speeds cannot be compared, what was asked comes first, and what is known of perplexities.

    Args:
        speeds: of the frameworks.
        rows: those that speeds were looked for in.
        perplexities: of the frameworks.
        answers: to what was asked.
    """
    on_speed = [words.speed_title(speeds, rows), words.speed_sentence(speeds, rows)]
    on_perplexity = words.perplexity_sentence(perplexities)
    found = [*on_speed, on_perplexity]
    first: list[Said] = []
    if speeds is None:
        first = list(answers[:MOST_ANSWERS])
        if perplexities.verdicts["equivalent"] or perplexities.verdicts["different"]:
            found = [on_perplexity, *on_speed]
    return first + [Said(text.removesuffix(".")) for text in found if text]


def answers_to(
    searches: Sequence[SearchResult], documents: Sequence[Document], analyses: Sequence[Analysis]
) -> list[Said]:
    """Return the answers to what was asked: of searches, documents, and variants of the rest.

    Those that decide something come first. A document of which nothing can be judged has none, if
    there is any other answer. Smoke runs answer nothing.
    """
    if any(is_smoke(row.variant) for analysis in analyses for row in analysis.rows):
        return []
    found = [
        Said(
            _on(each.contest.title, _winner(each)),
            f"searches/{each.contest.name}.html",
            each.winner is not None,
        )
        for each in searches
    ]
    unjudged = []
    names = {each.contest.name for each in searches}
    apart = {*names, *(f"{name}-winners" for name in names)}
    for answers, short in documents:
        page = f"papers/{answers.paper}.html"
        counts = (
            ("printed numbers reproduced or close", answers.numbers_reproduced),
            ("findings upheld", answers.findings_upheld),
        )
        if said := [f"{held} of {judged} {what}" for what, (held, judged) in counts if judged]:
            found.append(Said(_on(short, ", ".join(said)), page))
            apart.update(answers.experiments)
        elif not answers.reductions:
            unjudged.append(Said(_on(short, "nothing can be judged yet"), page, decided=False))
    for analysis in analyses:
        if analysis.name not in apart and (sentence := words.variants_sentence(analysis)):
            page = f"experiments/{analysis.name}.html"
            decided = any(words.is_surely_best(each) for each in analysis.best)
            found.append(Said(_on(analysis.title, sentence.removesuffix(".")), page, decided))
    return sorted(found, key=lambda said: not said.decided) or unjudged


def _on(title: str, said: str) -> str:
    """Set what is said behind a title, which may be a question."""
    if title.endswith("?"):
        return f"{title} {said[0].upper()}{said[1:]}"
    return f"{title}: {said[0].lower()}{said[1:]}"


def _winner(search: SearchResult) -> str:
    if not search.winner:
        return f"the winner is {search.undecided}"
    perplexity = METRICS["valid_perplexity"].text(search.winner.valid_perplexity)
    return (
        f"of {words.count(len(search.trials), 'trial')}, number {search.winner.trial} wins, "
        f"with a validation perplexity of {perplexity} when trained in full"
    )
