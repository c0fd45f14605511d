"""The written tables: full precision for machines, aligned and honest for people."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path

import pytest
from tests.support.fake_results import metrics, plan, write_cell, write_diverged, write_results

from ptbench.analysis.collect import CorpusFacts, collect_rows
from ptbench.analysis.experiment import Analysis, analyse
from ptbench.analysis.plan import ExperimentPlan
from ptbench.report import formatting, tables


def analysis_of(experiment: ExperimentPlan, results: Path) -> Analysis:
    return analyse(experiment, collect_rows(experiment, results), CorpusFacts(), [])


def records(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


@pytest.fixture
def analysis(tmp_path: Path) -> Analysis:
    """PyTorch with three seeds of nll 4.6, 4.7, 4.8; JAX with one diverged; Keras with none."""
    experiment = plan(frameworks=("pytorch", "keras", "jax"), variants=("tiny+dropout=0.5",))
    for cell in experiment.cells:
        if cell.framework == "pytorch":
            write_cell(tmp_path, metrics(cell, 4.5 + 0.1 * cell.seed))
        if cell.framework == "jax":
            write_cell(tmp_path, metrics(cell, 6.9 + 0.01 * cell.seed))
    write_diverged(tmp_path, experiment.cells[-1])
    return analysis_of(experiment, tmp_path)


def test_the_csv_holds_every_row_in_full_precision(analysis: Analysis) -> None:
    pytorch, keras, jax = records(tables.results_csv(analysis))
    assert float(pytorch["test_nll"]) == pytest.approx(4.7, rel=1e-12)
    assert float(pytorch["test_perplexity"]) == pytest.approx(math.exp(4.7), rel=1e-12)
    assert pytorch["parameters"] == "4651600"
    assert pytorch["problem"] == ""
    assert (keras["n_ok"], keras["n_planned"], keras["usable"]) == ("0", "3", "false")
    assert keras["test_perplexity"] == ""
    assert (jax["n_ok"], jax["n_planned"], jax["usable"]) == ("2", "3", "true")
    assert jax["problem"] == "seed 3 diverged"


def test_the_differences_are_a_minus_b(analysis: Analysis) -> None:
    rows = records(tables.differences_csv(analysis))
    assert [(row["framework_a"], row["framework_b"]) for row in rows] == [
        ("pytorch", "keras"),
        ("pytorch", "jax"),
        ("keras", "jax"),
    ]
    assert rows[0]["verdict"] == "inconclusive"
    assert rows[0]["difference_nats"] == ""
    assert float(rows[1]["difference_nats"]) == pytest.approx(4.7 - 6.915)
    assert rows[1]["verdict"] == "different"


def test_tables_without_rows_keep_their_header(tmp_path: Path) -> None:
    experiment = plan(frameworks=("jax",), seeds=(1,))
    analysis = analysis_of(experiment, tmp_path)
    for text in (tables.differences_csv(analysis), tables.comparison_csv(analysis)):
        assert len(text.splitlines()) == 1
        assert text.startswith("variant,")


def test_the_plus_minus_signs_stand_below_one_another(analysis: Analysis) -> None:
    lines = [line for line in tables.markdown(analysis).splitlines() if line.startswith("|")]
    places = [[i for i, c in enumerate(line) if c == "±"] for line in lines[2:]]
    assert len(places[0]) == 2
    assert places[0] == places[2]
    assert {len(line) for line in lines} == {len(lines[0])}


def test_people_see_every_row_its_seeds_and_what_failed(analysis: Analysis) -> None:
    for text in (tables.markdown(analysis), tables.latex(analysis)):
        assert "3/3" in text
        assert "0/3" in text
        assert "2/3" in text
        assert "no seed has a result" in text
        assert "seed 3 diverged" in text


def test_an_invalid_row_is_marked(tmp_path: Path) -> None:
    experiment = plan(frameworks=("jax",), seeds=(1, 2, 3))
    write_results(tmp_path, experiment)
    for cell in experiment.cells[:2]:
        write_diverged(tmp_path, cell)
    text = tables.markdown(analysis_of(experiment, tmp_path))
    assert "1/3 invalid" in text


def test_one_seed_shows_no_interval(tmp_path: Path) -> None:
    experiment = plan(frameworks=("jax",), seeds=(1,))
    write_results(tmp_path, experiment)
    text = tables.markdown(analysis_of(experiment, tmp_path))
    assert "n = 1" in text
    assert "±" not in text.splitlines()[4]


def test_latex_has_booktabs_rules_and_escapes_names(analysis: Analysis) -> None:
    text = tables.latex(analysis)
    for rule in (r"\toprule", r"\midrule", r"\bottomrule"):
        assert rule in text
    header, *body = [line for line in text.splitlines() if line.endswith(r"\\")]
    group, *body = body
    assert group == r"\multicolumn{7}{l}{\textit{tiny+dropout=0.5, 1 device, stock}} \\"
    assert len(body) == 3
    assert {line.count(" & ") for line in [header, *body]} == {6}
    assert r"95 \% interval" in header
    # 99.484, 109.947 and 121.510: geometric mean exp(4.7), standard deviation sqrt(242.8 / 2)
    assert r"109.95 $\pm$ 11.02" in body[0]


def test_latex_escapes_every_special_character() -> None:
    assert tables.escape_latex(r"a_b & 5% {x} \y ~ ^ # $") == (
        r"a\_b \& 5\% \{x\} \textbackslash{}y \textasciitilde{} \textasciicircum{} \# \$"
    )


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (formatting.format_perplexity(118.4567), "118.46"),
        (formatting.format_perplexity(1234.5), "1,234.50"),
        (formatting.format_perplexity(31479922593.0), "31,479,922,593"),
        (formatting.format_perplexity(math.inf), "∞"),
        (formatting.format_perplexity(None), formatting.NOTHING),
        (formatting.format_parameters(4_651_600), "4.652 M"),
        (formatting.format_parameters(52_300), "52,300"),
        (formatting.format_bytes(663e6), "663 MB"),
        (formatting.format_bytes(4.83e9), "4.83 GB"),
        (formatting.format_seconds(3.21), "3.2 s"),
        (formatting.format_seconds(300), "5 min"),
        (formatting.format_seconds(17604), "4 h 53 min"),
        (formatting.format_percent(0.0123), "+1.2 %"),
        (formatting.format_percent(-0.5), "\N{MINUS SIGN}50.0 %"),
        (formatting.format_percent(-0.0001), "0.0 %"),
        (formatting.format_p(0.0004), "< 0.001"),
        (formatting.format_p(0.04947), "0.049"),
        (formatting.format_epoch(12.5), "12.5"),
    ],
)
def test_numbers_are_written_as_people_read_them(written: str, expected: str) -> None:
    assert written == expected


def test_every_table_says_which_implementation_it_shows(tmp_path: Path) -> None:
    variants = ("tiny", "tiny+implementation=tuned")
    experiment = plan(variants=variants, implementations={variants[1]: "tuned"})
    write_results(tmp_path, experiment)
    analysis = analysis_of(experiment, tmp_path)
    for record in records(tables.results_csv(analysis)):
        assert record["implementation"] == ("tuned" if "tuned" in record["variant"] else "stock")
    assert "tiny, 1 device, stock" in tables.latex(analysis)
    assert "1 device, tuned" in tables.latex(analysis)
    assert "| tuned" in tables.markdown(analysis)
