"""The tables of an experiment: CSV with full precision, Markdown and LaTeX for reading.

The page sets its own tables, from the same `Analysis`.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from ptbench.analysis.experiment import Analysis, RowResult
from ptbench.analysis.statistics import PerplexitySummary, Quartiles
from ptbench.report.formatting import (
    NOTHING,
    align_plus_minus,
    format_bytes,
    format_count,
    format_epoch,
    format_parameters,
    format_perplexity,
    framework_name,
    group_title,
)


def results_csv(analysis: Analysis) -> str:
    """`table.csv`: one line per row, times in seconds, sizes in bytes, an empty field for nothing.

    `*_std` is the sample standard deviation over seeds, `*_low` and `*_high` are the ends of the
    95 % t interval of a perplexity or the quartiles of a time or rate.
    """
    records = [_result_record(row) for row in analysis.rows]
    return _csv(records, list(records[0]))


def _result_record(row: RowResult) -> dict[str, Any]:
    record: dict[str, Any] = {
        "variant": row.variant,
        "framework": row.framework,
        "devices": row.devices,
        "implementation": row.implementation,
        "n_ok": row.n_ok,
        "n_planned": row.n_planned,
        "usable": str(row.usable).lower(),
        "problem": row.problem,
    }
    for split in ("train", "valid", "test"):
        summary: PerplexitySummary | None = getattr(row, split)
        record |= {
            f"{split}_perplexity": summary and summary.perplexity,
            f"{split}_perplexity_std": summary and summary.perplexity_std,
            f"{split}_perplexity_low": summary and summary.low,
            f"{split}_perplexity_high": summary and summary.high,
            f"{split}_nll": summary and summary.nll,
            f"{split}_nll_std": summary and summary.nll_std,
        }
    for name in ("best_epoch", "tokens_per_second", "seconds_per_epoch", "total_seconds"):
        middle: Quartiles | None = getattr(row, name)
        record |= {
            f"{name}_median": middle and middle.median,
            f"{name}_low": middle and middle.low,
            f"{name}_high": middle and middle.high,
        }
    return record | {
        "parameters": row.parameters,
        "peak_memory_bytes": row.peak_memory_bytes,
        "peak_device_memory_bytes": row.peak_device_memory_bytes,
        "framework_version": " ".join(row.framework_versions),
        "fingerprint": row.fingerprint,
    }


DIFFERENCE_COLUMNS = (
    "variant", "devices", "metric", "framework_a", "framework_b", "n_a", "n_b", "difference_nats",
    "difference_low", "difference_high", "t", "degrees_of_freedom", "p", "p_holm", "hedges_g",
    "p_permutation", "margin_nats", "p_equivalence", "verdict", "reason",
)  # fmt: skip


def differences_csv(analysis: Analysis) -> str:
    """`differences.csv`: every two frameworks of a variant and number of devices; a minus b."""
    return _csv(
        [
            {
                "variant": pair.variant,
                "devices": pair.devices,
                "metric": analysis.metric,
                "framework_a": pair.a,
                "framework_b": pair.b,
                "n_a": pair.outcome.n_a,
                "n_b": pair.outcome.n_b,
                "difference_nats": pair.outcome.difference,
                "difference_low": pair.outcome.welch and pair.outcome.welch.low,
                "difference_high": pair.outcome.welch and pair.outcome.welch.high,
                "t": pair.outcome.welch and pair.outcome.welch.t,
                "degrees_of_freedom": pair.outcome.welch and pair.outcome.welch.degrees_of_freedom,
                "p": pair.outcome.welch and pair.outcome.welch.p,
                "p_holm": pair.outcome.p_holm,
                "hedges_g": pair.outcome.hedges_g,
                "p_permutation": pair.outcome.p_permutation,
                "margin_nats": analysis.equivalence_margin,
                "p_equivalence": pair.outcome.p_equivalence,
                "verdict": pair.outcome.verdict,
                "reason": pair.outcome.reason,
            }
            for pair in analysis.pairs
        ],
        DIFFERENCE_COLUMNS,
    )


COMPARISON_COLUMNS = (
    "variant", "framework", "devices", "metric", "published", "published_std", "ours", "ours_low",
    "ours_high", "n_ok", "relative_gap", "inside_interval", "source", "locator", "note",
)  # fmt: skip


def comparison_csv(analysis: Analysis) -> str:
    """`comparison.csv`: each published number beside ours."""
    return _csv(
        [
            {
                "variant": line.published.variant,
                "framework": line.framework,
                "devices": line.published.devices,
                "metric": line.published.metric,
                "published": line.published.value,
                "published_std": line.published.std,
                "ours": line.ours,
                "ours_low": line.low,
                "ours_high": line.high,
                "n_ok": line.n_ok,
                "relative_gap": line.relative_gap,
                "inside_interval": "" if line.inside is None else str(line.inside).lower(),
                "source": line.published.source,
                "locator": line.published.locator,
                "note": line.published.note,
            }
            for line in analysis.published
        ],
        COMPARISON_COLUMNS,
    )


def _csv(records: Sequence[dict[str, Any]], columns: Sequence[str]) -> str:
    """The records as CSV; numbers in their shortest exact form, an empty field for None."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


@dataclass(frozen=True)
class Column:
    """One column of text, ready for Markdown or LaTeX."""

    header: str
    texts: list[str]
    right_aligned: bool = True


def printed_columns(analysis: Analysis) -> list[Column]:
    """The results as people print them; perplexities as mean ± std and 95 % interval."""
    rows = analysis.rows
    seeds = [f"{row.n_ok}/{row.n_planned} {invalid_mark(row)}".rstrip() for row in rows]
    return [
        Column("Variant", [row.variant for row in rows], right_aligned=False),
        Column("Devices", [str(row.devices) for row in rows]),
        Column("Implementation", [row.implementation for row in rows], right_aligned=False),
        Column("Framework", [framework_name(row.framework) for row in rows], right_aligned=False),
        Column("Seeds ok", seeds),
        *_perplexity_columns("Valid", [row.valid for row in rows]),
        *_perplexity_columns("Test", [row.test for row in rows]),
        Column("Tokens/s", [format_count(_median(row.tokens_per_second)) for row in rows]),
        Column("Best epoch", [format_epoch(_median(row.best_epoch)) for row in rows]),
        Column("Parameters", [format_parameters(row.parameters) for row in rows]),
        Column("Peak memory", [format_bytes(row.peak_memory_bytes) for row in rows]),
    ]


def invalid_mark(row: RowResult) -> str:
    """What follows n_ok/n_planned in a row that too many seeds have failed."""
    return "" if row.usable or not row.n_ok else "invalid"


def _perplexity_columns(split: str, summaries: Sequence[PerplexitySummary | None]) -> list[Column]:
    values = [(s.perplexity, s.perplexity_std) if s else (None, None) for s in summaries]
    return [
        Column(f"{split} perplexity", align_plus_minus(values)),
        Column("95 % interval", [format_interval(s) for s in summaries]),
    ]


def format_interval(summary: PerplexitySummary | None) -> str:
    """`118.02 to 119.31`, or why there is none."""
    if summary is None:
        return NOTHING
    if summary.n == 1:
        return "n = 1"
    if summary.low is None or summary.high is None:
        return "no spread"
    return f"{format_perplexity(summary.low)} to {format_perplexity(summary.high)}"


def _median(middle: Quartiles | None) -> float | None:
    return middle.median if middle else None


def markdown(analysis: Analysis) -> str:
    """`table.md`: the printed table, padded so that it reads well as plain text too."""
    columns = printed_columns(analysis)
    cells = [[text.replace("|", "\\|") for text in (c.header, *c.texts)] for c in columns]
    widths = [max(3, *map(len, texts)) for texts in cells]

    def line(texts: Sequence[str]) -> str:
        padded = [
            text.rjust(width) if column.right_aligned else text.ljust(width)
            for text, width, column in zip(texts, widths, columns, strict=True)
        ]
        return f"| {' | '.join(padded)} |"

    rule = [
        "-" * (width - 1) + (":" if column.right_aligned else "-")
        for width, column in zip(widths, columns, strict=True)
    ]
    header, *body = zip(*cells, strict=True)
    notes = "\n".join(f"- {note}" for note in _notes(analysis))
    lines = [line(header), line(rule), *map(line, body)]
    return f"**{analysis.title}**\n\n" + "\n".join(lines) + f"\n\n{notes}\n"


def _notes(analysis: Analysis) -> list[str]:
    notes = [
        "Perplexities are exp of the mean nll over seeds, ± the sample standard deviation of the "
        "seeds' perplexities; intervals are 95 % t intervals of the mean nll, exponentiated.",
        "Seeds ok counts the seeds that ended well of those planned; tokens/s is their median.",
    ]
    return notes + [
        f"{row.variant}, {framework_name(row.framework)}, devices {row.devices}: {row.problem}."
        for row in analysis.rows
        if row.problem
    ]


LATEX_ESCAPES = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "∞": r"$\infty$",
    NOTHING: "--",
}


def escape_latex(text: str) -> str:
    """The text with everything that LaTeX would read as a command made literal."""
    return re.sub("|".join(map(re.escape, LATEX_ESCAPES)), lambda m: LATEX_ESCAPES[m[0]], text)


# What fits the width of a page; the rest is in the CSV.
LATEX_COLUMNS = (
    "Framework",
    "Seeds ok",
    "Valid perplexity",
    "Test perplexity",
    "95 % interval",
    "Tokens/s",
)


def latex(analysis: Analysis) -> str:
    r"""`table.tex`: a `table*` with booktabs rules; needs `\usepackage{booktabs}`.

    Variant and devices head their rows; notes are in the caption.
    """
    columns = [c for c in printed_columns(analysis) if c.header in LATEX_COLUMNS]
    body: list[str] = []
    titles = [group_title(row) for row in analysis.rows]
    for title, indices in groupby(range(len(titles)), key=titles.__getitem__):
        body.append(r"\addlinespace" if body else r"\midrule")
        body.append(rf"\multicolumn{{{len(columns)}}}{{l}}{{\textit{{{escape_latex(title)}}}}} \\")
        for index in indices:
            texts = (" ".join(column.texts[index].split()) for column in columns)
            body.append(" & ".join(map(escape_latex, texts)) + r" \\")
    alignment = "".join("r" if column.right_aligned else "l" for column in columns)
    caption = " ".join([f"{analysis.title}.", *_notes(analysis)])
    return "\n".join(
        [
            "% needs \\usepackage{booktabs}",
            r"\begin{table*}",
            r"\centering",
            r"\small",
            rf"\caption{{{escape_latex(caption)}}}",
            rf"\label{{tab:{analysis.name}}}",
            rf"\begin{{tabular}}{{{alignment}}}",
            r"\toprule",
            " & ".join(escape_latex(column.header) for column in columns) + r" \\",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table*}",
            "",
        ]
    )
