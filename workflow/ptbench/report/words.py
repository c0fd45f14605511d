"""The sentences of the report's first page, from the numbers of `analysis/headline.py`."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ptbench.analysis.collect import is_alone, most_at_once
from ptbench.analysis.experiment import Analysis, RowResult
from ptbench.analysis.headline import Comparison, Couple, Perplexities, Ratio
from ptbench.analysis.metrics import METRICS
from ptbench.analysis.statistics import CONFIDENCE
from ptbench.analysis.variants import CHOSEN_BY, BestVariant
from ptbench.configuration.specification import is_smoke
from ptbench.model.recipe import BUDGETS
from ptbench.report.formatting import format_devices, format_p, format_percent, framework_name


def listed(words: Sequence[str]) -> str:
    """Write `a`, `a and b` or `a, b and c`."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def count(number: int, noun: str) -> str:
    """Write `1 run` or `2 runs`."""
    plural = "es" if noun.endswith(("tch", "rch")) else "s"
    return f"{number:,} {noun}" + ("" if number == 1 else plural)


def factor(value: float) -> str:
    """Write a factor with three significant digits, at most two of them after the point."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def speed_title(speeds: Comparison | None, rows: Sequence[RowResult]) -> str:
    """Say in a line which framework is fastest; `rows` are those that speeds were looked for in."""
    if speeds is None and any(is_smoke(row.variant) for row in rows):
        return "A smoke run, from which nothing is concluded"
    if speeds is None and len(with_results := {row.framework for row in rows}) == 1:
        [name] = with_results
        return f"Only {framework_name(name)} has results, so frameworks are not compared"
    if speeds is None:
        return "No two frameworks have speeds that can be compared"
    leaders = [framework_name(name) for name in speeds.leaders()]
    slowest = framework_name(speeds.reference)
    ratio = next(iter(speeds.ratios.values()))
    among = f" of {len(speeds.ratios)} frameworks that can be compared" if speeds.apart else ""
    if len(leaders) == len(speeds.ratios):
        return f"No framework is proven faster than all others{among}"
    times = f"{factor(ratio.value)} times as fast as {slowest}"
    if len(leaders) == 1:
        return f"{leaders[0]} trains fastest{among}, {times}"
    return f"{listed(leaders)} train fastest{among}, up to {times}"


def speed_sentence(speeds: Comparison | None, rows: Sequence[RowResult]) -> str:
    """Say how sure the factor of `speed_title` is, and how far the second framework is behind.

    Without a factor, say why there is none.
    """
    if speeds is None:
        with_speed = {row.framework for row in rows if row.value("tokens_per_second")}
        if len(with_speed) < 2 or any(is_smoke(row.variant) for row in rows):
            return ""
        why = fairness(rows)
        if all(map(is_alone, rows)):
            why = "No two frameworks ran the same on one kind of machine."
        return (
            f"{why} To compare speeds, remove the folders of these runs under results/cells and "
            "run them again with --cores 1 on one quiet machine."
        )
    (first, ratio), (second, _), *_ = speeds.ratios.items()
    over = _units([ratio])
    slowest = framework_name(speeds.reference)
    if ratio.low is None or ratio.high is None:
        return (
            f"{framework_name(first)} trained {factor(ratio.value)} times as fast as {slowest}, "
            f"by {over} alone, which gives no interval." + _apart(speeds)
        )
    said = (
        f"The factor of {framework_name(first)} over {slowest} is {factor(ratio.value)}, with a "
        f"95 % interval of {factor(ratio.low)} to {factor(ratio.high)} over {over}"
    )
    lead = speeds.pairs.get((first, second))
    if second != speeds.reference and lead and lead.low is not None and lead.high is not None:
        said += (
            f"; over {framework_name(second)}, the second, it is {factor(lead.value)} "
            f"({factor(lead.low)} to {factor(lead.high)})"
        )
    return said + "." + _apart(speeds)


def over_text(found: Comparison) -> str:
    """Write what the ratios to the reference are over: `12 recipes`, or `5 to 12 recipes`."""
    return _units([ratio for ratio in found.ratios.values() if ratio.n])


def _units(ratios: Sequence[Ratio]) -> str:
    parts = []
    for over in dict.fromkeys(ratio.over for ratio in ratios):
        sizes = [ratio.n for ratio in ratios if ratio.over == over]
        least = f"{min(sizes)} to " if min(sizes) < max(sizes) else ""
        parts.append(least + count(max(sizes), over.removesuffix("s")))
    return listed(parts)


def _apart(speeds: Comparison) -> str:
    """Say which frameworks could not be compared with the others; nothing if all could."""
    if not speeds.apart:
        return ""
    names = listed([framework_name(name) for name in speeds.apart])
    why = "for want of the same variants on the same kind of machine, alone"
    return f" Not compared with these, {why}: {names}."


def fairness(rows: Sequence[RowResult]) -> str:
    """Say whether the times and speeds of rows that have a result may be compared."""
    most = most_at_once(row.cells_at_once for row in rows)
    busy = sum(row.busy for row in rows)
    if most is None:
        why = "It was not recorded whether runs shared their machine"
    elif most > 1:
        why = f"Up to {most} runs, those of other studies included, shared a machine"
    elif busy:
        why = f"Other processes took cores that {count(busy, 'run')} could have used"
    else:
        return "Every run had its machine to itself."
    return f"{why}, so times and speeds are not a fair comparison."


def reduced_warning(reduced: Sequence[str], of_document: bool = True) -> str:
    """Say that runs were made smaller, or on another text; nothing where none was.

    Args:
        reduced: what made them so.
        of_document: whether a document's experiment is among them.
    """
    if not reduced:
        return ""
    budgets = [BUDGETS[name] for name in BUDGETS if f"budget={name}" in reduced]
    sizes = [
        f"at most {count(each.epochs, 'epoch')} of {count(each.batches, 'batch')}, scored on "
        f"{each.evaluation_batches}"
        for each in budgets
    ]
    least = f" ({listed(sizes)})" if sizes else ""
    said = f"Runs were made with {listed(reduced)}{least}"
    if not of_document:
        return f"{said}."
    return (
        f"{said}, so these are not numbers of the documents, and none of theirs is judged by them."
    )


def no_pairs_sentence(rows: Sequence[RowResult]) -> str:
    """Say why no perplexities of frameworks are compared."""
    if any(is_smoke(row.variant) for row in rows):
        return "Nothing is concluded from runs of the budget smoke."
    return "There are no two frameworks to compare."


def perplexity_sentence(found: Perplexities) -> str:
    """Say whether perplexity depends on the framework; nothing where there is no pair of them."""
    total = sum(found.verdicts.values())
    if not total:
        return "No two frameworks have a perplexity to compare yet." if found.missing else ""
    margin = listed([format_percent(math.expm1(margin))[1:] for margin in found.margins])
    if found.all_equivalent:
        pairs = "the one pair is" if total == 1 else f"all {total:,} pairs are"
        p = format_p(found.p)
        return (
            f"Perplexity depends on the framework by less than {margin}: {pairs} equivalent within "
            f"it (tested together, p {p if p.startswith('<') else f'= {p}'})."
        )
    counts = found.verdicts
    verb = "is" if counts["equivalent"] == 1 else "are"
    parts = [f"{counts['equivalent']:,} {verb} equivalent within {margin}"]
    if counts["different"]:
        parts.append(
            f"{counts['different']:,} {'differs' if counts['different'] == 1 else 'differ'} after "
            f"Holm's correction within each experiment ({_differing(found)})"
        )
    else:
        parts.append("none is shown to differ")
    if counts["inconclusive"]:
        parts.append(f"{counts['inconclusive']:,} cannot be told with these seeds")
    if found.missing:
        parts.append(f"{found.missing:,} more {'has' if found.missing == 1 else 'have'} no result")
    couples = len(found.couples)
    among = "" if couples == total else f", {count(couples, 'pair')} by variants and devices"
    return f"Of {count(total, 'comparison')} of frameworks{among}, {listed(parts)}."


def is_surely_best(variant: BestVariant) -> bool:
    """Return whether a variant is the best with the confidence of the report."""
    return variant.probability >= CONFIDENCE


def variants_sentence(analysis: Analysis) -> str:
    """Say which variant is the best, by framework and devices, where one surely is."""
    if not analysis.best:
        return ""
    several = len({row.devices for row in analysis.rows}) > 1
    surely: dict[str, list[str]] = {}
    for each in analysis.best:
        if is_surely_best(each):
            where = f" on {format_devices(each.devices)}" if several else ""
            surely.setdefault(analysis.label(each.variant), []).append(
                framework_name(each.framework) + where
            )
    metric = METRICS[CHOSEN_BY].title.lower()
    if not surely:
        one = len({row.framework for row in analysis.rows}) == 1
        none = "No variant is" if one else "In no framework is a variant"
        return f"{none} surely the best by {metric}."
    said = "; ".join(f"{label} in {listed(names)}" for label, names in surely.items())
    return f"Best by {metric}, with a probability of at least {CONFIDENCE:g}: {said}."


def rents_sentence(analysis: Analysis) -> str:
    """Say what rents are computed from; nothing where no run has one."""
    kinds = {
        "GPU" if row.accelerator == "cuda" else "CPU core": analysis.rents[row.framework]
        for row in analysis.rows
        if "rent" in row.metrics
    }
    if not kinds:
        return ""
    each = listed([f"a {kind} {hour:g}" for kind, hour in sorted(kinds.items())])
    return f"Rents are in {analysis.currency}: {each} an hour (key prices of the configuration)."


def _differing(found: Perplexities) -> str:
    names = [
        f"{framework_name(couple.a)} and {framework_name(couple.b)}"
        for couple in found.couples.values()
        if couple.verdicts["different"]
    ]
    return "; ".join(names[:3]) + (f"; and {len(names) - 3} more" if len(names) > 3 else "")


def couple_verdict(couple: Couple) -> str:
    """Return the verdict that stands for two frameworks: different if they ever are."""
    for verdict in ("different", "inconclusive"):
        if couple.verdicts[verdict]:
            return verdict
    return "equivalent"


def couple_text(couple: Couple) -> str:
    """Write how often two frameworks have the verdict that stands for them."""
    verdict, total = couple_verdict(couple), sum(couple.verdicts.values())
    if couple.verdicts[verdict] == total:
        return verdict
    return f"{verdict} {couple.verdicts[verdict]}/{total}"
