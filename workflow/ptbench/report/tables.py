"""The tables of an experiment: CSV with full precision, Markdown and LaTeX for reading.

The page sets its own tables, from the same `Analysis`. Not with pandas, whose import takes longer
than all of them.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Sequence
from typing import Any

from tabulate import tabulate

from ptbench.analysis.collect import Row
from ptbench.analysis.experiment import Analysis, PublishedResult, RowResult
from ptbench.analysis.metrics import LARGEST, METRICS, NOTHING, PERPLEXITY, Metric
from ptbench.report.formatting import (
    format_header,
    format_seeds,
    format_std,
    framework_name,
    group_title,
    grouped,
    kind_of_device,
)

LATEX_METRICS = {"test_perplexity", "valid_perplexity", "seconds_per_epoch"}
MOST_LATEX_METRICS = 6  # fit a page's width


def results_csv(analysis: Analysis) -> str:
    """Return `table.csv`: one line for each row, times in seconds, sizes in bytes.

    `*_std` is the sample standard deviation over seeds, `*_low` and `*_high` are the ends of the
    95 % t interval of a perplexity or the quartiles of a time or rate, of fewer than five seeds
    the range.
    """
    return _csv([_result_record(row) for row in analysis.rows])


def _result_record(row: RowResult) -> dict[str, Any]:
    record: dict[str, Any] = {
        "variant": row.variant,
        "framework": row.framework,
        "devices": row.devices,
        "accelerator": row.accelerator,
        "implementation": row.implementation,
        "n_ok": row.n_ok,
        "n_diverged": row.n_diverged,
        "n_planned": row.n_planned,
        "usable": row.usable,
        "problem": row.problem,
    }
    for name, metric in METRICS.items():
        summary = row.metrics.get(name)
        value = summary and summary.value
        record[name + metric.kind.column] = (
            int(value) if value and metric.kind is LARGEST else value
        )
        if metric.kind.spread:
            record[f"{name}_low"] = summary and summary.low
            record[f"{name}_high"] = summary and summary.high
        if metric.kind is PERPLEXITY:
            record[f"{name}_std"] = summary and summary.std
            record[name.replace("perplexity", "nll")] = summary and summary.nll
            record[name.replace("perplexity", "nll_std")] = summary and summary.nll_std
    record["framework_version"] = " ".join(row.framework_versions)
    record["fingerprint"] = row.fingerprint
    return record


DIFFERENCE_COLUMNS = (
    "variant", "devices", "metric", "framework_a", "framework_b", "n_a", "n_b", "difference_nats",
    "difference_low", "difference_high", "test", "t", "degrees_of_freedom", "p", "p_holm",
    "hedges_g", "p_permutation", "margin_nats", "p_equivalence", "p_equivalence_holm",
    "all_equivalent_p", "verdict", "reason",
)  # fmt: skip


def differences_csv(analysis: Analysis) -> str:
    """Return `differences.csv`: every two frameworks of a variant and device count; a minus b."""
    records = []
    for pair in analysis.pairs:
        outcome = pair.outcome.model_dump()
        test = outcome.pop("test") or {}
        renamed = {"low": "difference_low", "high": "difference_high", "kind": "test"}
        records.append(
            {
                **{renamed.get(key, key): value for key, value in test.items()},
                **outcome,
                "variant": pair.variant,
                "devices": pair.devices,
                "metric": analysis.metric,
                "framework_a": pair.a,
                "framework_b": pair.b,
                "difference_nats": pair.outcome.difference,
                "margin_nats": analysis.equivalence_margin,
                "all_equivalent_p": analysis.all_equivalent_p,
            }
        )
    return _csv(records, DIFFERENCE_COLUMNS)


COMPARISON_COLUMNS = (
    "variant", "framework", "devices", "over", "metric", "kind", "published", "published_std",
    "runs", "ours", "ours_low", "ours_high", "n_ok", "relative_gap", "verdict", "expected_low",
    "expected_high", "seeds", "cv", "source", "locator", "note",
)  # fmt: skip


def comparison_csv(analysis: Analysis) -> str:
    """Return `comparison.csv`: each published number beside ours."""

    def record(line: PublishedResult) -> dict[str, Any]:
        return {
            **line.published.model_dump(),
            "framework": line.framework,
            "over": line.published.over and str(line.published.over),
            "published": line.published.value,
            "published_std": line.published.std,
            "ours": line.ours,
            "ours_low": line.low,
            "ours_high": line.high,
            "n_ok": line.n_ok,
            "relative_gap": line.relative_gap,
            "verdict": line.verdict,
            "expected_low": line.expected_low,
            "expected_high": line.expected_high,
            "seeds": line.seeds,
            "cv": line.cv,
        }

    return _csv([record(line) for line in analysis.published], COMPARISON_COLUMNS)


VARIANT_COLUMNS = (
    "variant", "label", "baseline", "framework", "devices", "metric", "n", "n_baseline",
    "difference_nats", "difference_low", "difference_high", "improvement", "improvement_low",
    "improvement_high", "speed", "speed_low", "speed_high", "p", "p_holm", "p_equivalence",
    "p_equivalence_holm", "best_probability", "verdict", "reason",
)  # fmt: skip


def variants_csv(analysis: Analysis) -> str:
    """Return `variants.csv`: each variant and the baseline, in each framework.

    `improvement` is 1 - perplexity / that of the baseline, `speed` the ratio of the speeds.
    """
    best = {(each.framework, each.devices): each.probabilities for each in analysis.best}
    records = []
    for each in analysis.comparisons:
        outcome = each.outcome.model_dump()
        test = outcome.pop("test") or {}
        records.append(
            {
                **test,
                **outcome,
                **each.model_dump(exclude={"outcome"}),
                "label": analysis.label(each.variant),
                "metric": analysis.metric,
                "n": each.outcome.n_a,
                "n_baseline": each.outcome.n_b,
                "difference_nats": each.outcome.difference,
                "difference_low": test.get("low"),
                "difference_high": test.get("high"),
                "best_probability": best.get((each.framework, each.devices), {}).get(each.variant),
            }
        )
    return _csv(records, VARIANT_COLUMNS)


CURVE_COLUMNS = (
    "variant", "framework", "devices", "seed", "epoch", "hours", "train_perplexity",
    "valid_perplexity",
)  # fmt: skip


def curves_csv(rows: Sequence[Row]) -> str:
    """Return `curves.csv`: a line for each epoch of each run, of those that diverged too.

    `hours` are of training and validation, from the first epoch's begin to this one's end.
    """
    lines = [",".join(CURVE_COLUMNS)]
    for row in rows:
        for cell in row.cells:
            seconds = 0.0
            for epoch in cell.result.history if cell.result else ():
                seconds += epoch.training_seconds + epoch.validation_seconds
                lines.append(
                    f"{row.variant},{row.framework},{row.devices},{cell.cell.seed},{epoch.epoch},"
                    f"{seconds / 3600:.6g},{epoch.train_perplexity!r},{epoch.valid_perplexity!r}"
                )
    return "\n".join(lines) + "\n"


def _csv(records: list[dict[str, Any]], columns: Collection[str] | None = None) -> str:
    """Write records as CSV: numbers in their shortest exact form, true and false, empty for None.

    Args:
        records: one for each line.
        columns: those to write, in order; None: all of the records'.
    """

    def plain(value: object) -> object:
        return str(value).lower() if isinstance(value, bool) else value

    text = io.StringIO()
    names = list(columns or records[0])
    writer = csv.DictWriter(text, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: plain(value) for name, value in record.items()} for record in records)
    return text.getvalue()


def printed_metrics(analysis: Analysis) -> list[Metric]:
    """Return the metrics that have a column in printed tables and a number in any row."""
    return [
        metric
        for name, metric in METRICS.items()
        if metric.header and any(name in row.metrics for row in analysis.rows)
    ]


def _printed(analysis: Analysis, row: RowResult, metrics: Collection[Metric]) -> dict[str, str]:
    """Return a row's texts by column; perplexities with their ±, the compared one's interval."""
    texts = {}
    for metric in metrics:
        summary = row.metrics.get(metric.name)
        header = format_header(metric, analysis.currency)
        texts[header] = metric.text(row.value(metric.name))
        if metric.kind is PERPLEXITY:
            texts[f"± {header.split()[0].lower()}"] = format_std(summary)
        if metric.name == analysis.metric:
            texts["95 % interval"] = metric.spread_text(summary)
    return texts


def _row_name(analysis: Analysis, row: RowResult) -> str:
    """Return a row's framework, and its kind of device where rows differ in it."""
    kind = f" {kind_of_device(row.accelerator)}" if analysis.kinds_of_device else ""
    return framework_name(row.framework) + kind


def markdown(analysis: Analysis) -> str:
    """Return `table.md`: the printed table, padded so that it reads well as plain text too."""
    lines = [
        {
            "Variant": row.variant,
            "Devices": str(row.devices),
            "Implementation": row.implementation,
            "Framework": _row_name(analysis, row),
            "Seeds ok": format_seeds(row),
            **_printed(analysis, row, printed_metrics(analysis)),
        }
        for row in analysis.rows
    ]
    left = {"Variant", "Implementation", "Framework"}
    table = tabulate(
        [[text.replace("|", "\\|") for text in line.values()] for line in lines],
        headers=list(lines[0]),
        tablefmt="pipe",
        disable_numparse=True,
        colalign=["left" if column in left else "right" for column in lines[0]],
    )
    notes = "\n".join(f"- {note}" for note in _notes(analysis))
    return f"**{analysis.title}**\n\n{table}\n\n{notes}\n"


def _notes(analysis: Analysis) -> list[str]:
    notes = [
        "Perplexities are exp of the mean nll over seeds, ± the sample standard deviation of the "
        f"seeds' perplexities; the interval of the {METRICS[analysis.metric].title.lower()} is the "
        "95 % t interval of the mean nll, exponentiated.",
        "Seeds ok counts the seeds that ended well out of those planned; times, speeds and epochs "
        "are medians, parameters and memory the largest.",
    ]
    return notes + [
        f"{row.variant}, {framework_name(row.framework)}, devices {row.devices}: {row.problem}."
        for row in analysis.rows
        if row.problem
    ]


LATEX = str.maketrans(
    {
        **{special: rf"\{special}" for special in "&%$#_{}"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "±": r"$\pm$",
        "∞": r"$\infty$",
        NOTHING: "--",
    }
)


def latex(analysis: Analysis) -> str:
    r"""Return `table.tex`: a `table*` with booktabs rules; needs `\usepackage{booktabs}`.

    Its columns are the metrics of which a document published a number for the experiment, or the
    usual ones. Variant and devices head their rows; notes are in the caption.
    """
    wanted = {line.published.metric for line in analysis.published} or LATEX_METRICS
    metrics = [
        metric
        for name, metric in METRICS.items()
        if name in {*wanted, analysis.metric} and any(name in r.metrics for r in analysis.rows)
    ][:MOST_LATEX_METRICS]
    lines = []
    columns = ["Framework", "Seeds ok"]
    for group in grouped(analysis.rows):
        title = group_title(group[0]).translate(LATEX)
        lines.append([rf"\rlap{{\textit{{{title}}}}}"])  # as wide as nothing
        for row in group:
            texts = _printed(analysis, row, metrics)
            columns = ["Framework", "Seeds ok", *texts]
            cells = [_row_name(analysis, row), format_seeds(row), *texts.values()]
            lines.append([text.translate(LATEX) for text in cells])
    caption = " ".join([f"{analysis.title}.", *_notes(analysis)]).translate(LATEX)

    def set_line(cells: list[str]) -> str:
        return " & ".join([*cells, *[""] * (len(columns) - len(cells))]) + r" \\"

    return "\n".join(
        [
            r"% needs \usepackage{booktabs}",
            r"\begin{table*}",
            r"\centering",
            rf"\caption{{{caption}}}",
            rf"\label{{tab:{analysis.name}}}",
            rf"\begin{{tabular}}{{l{'r' * (len(columns) - 1)}}}",
            r"\toprule",
            set_line([column.translate(LATEX) for column in columns]),
            r"\midrule",
            *map(set_line, lines),
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table*}",
            "",
        ]
    )
