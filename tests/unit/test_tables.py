"""The written tables: full precision for machines, aligned and honest for people."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path

import pytest
from tests.support.fake_results import (
    metrics,
    plan,
    write_cell,
    write_diverged,
    write_results,
)

from ptbench.analysis.collect import CorpusFacts, collect_rows
from ptbench.analysis.experiment import Analysis, analyse
from ptbench.analysis.metrics import METRICS, NOTHING, Summary
from ptbench.analysis.plan import ExperimentPlan, PlannedVariant
from ptbench.analysis.published import PublishedValue
from ptbench.report import formatting, tables
from ptbench.report.formatting import format_header, format_std


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


def test_the_csv_has_every_metric_and_what_diverged(analysis: Analysis) -> None:
    pytorch, _, jax = records(tables.results_csv(analysis))
    for name, metric in METRICS.items():
        assert name + metric.kind.column in pytorch
    assert float(pytorch["load_seconds_median"]) == 0.4
    assert float(pytorch["train_perplexity"]) == pytest.approx(math.exp(3.9), rel=1e-12)
    assert (pytorch["n_diverged"], jax["n_diverged"]) == ("0", "1")


def test_the_plus_minus_signs_stand_below_one_another(analysis: Analysis) -> None:
    lines = [line for line in tables.markdown(analysis).splitlines() if line.startswith("|")]
    places = [[i for i, c in enumerate(line) if c == "|"] for line in lines]
    assert all(place == places[0] for place in places)
    columns = [text.strip() for text in lines[0].split("|")]
    for split in ("test", "valid", "train"):
        texts = [line.split("|")[columns.index(f"± {split}")] for line in lines[2:]]
        assert texts[0].strip().startswith("± ")
        assert not texts[1].strip()


def test_what_was_recorded_is_printed(analysis: Analysis) -> None:
    header = tables.markdown(analysis).splitlines()[2]
    for words in ("Train perplexity", "Time per epoch", "Epochs", "Total time", "Load time"):
        assert f" {words} " in header
    assert "GPU" not in header  # no run had one


def test_numbers_for_people_have_digits_that_mean_something() -> None:
    assert format_std(Summary(n=3, value=10_582, std=44_620.34)) == "± 44,620"
    assert format_std(Summary(n=3, value=10_582, std=1.5)) == "± 2"
    assert format_std(Summary(n=3, value=9_999, std=10_234.5)) == "± 10,234.50"
    rent = METRICS["rent"]
    assert [rent.write(x) for x in (0, 0.00012, 0.0451, 1234.5)] == [
        *("0.00", "< 0.01", "0.045", "1,234.50"),
    ]
    assert format_header(rent, "USD") == "Rent [USD]"


def test_people_see_every_row_its_seeds_and_what_failed(analysis: Analysis) -> None:
    for text in (tables.markdown(analysis), tables.latex(analysis)):
        assert "3/3" in text
        assert "0/3" in text
        assert "2/3" in text
        assert "no seed has a result" in text
        assert "2/3, 1 diverged" in text
        assert "seed 3 diverged" in text


def test_an_invalid_row_is_marked(tmp_path: Path) -> None:
    experiment = plan(frameworks=("jax",), seeds=(1, 2, 3))
    write_results(tmp_path, experiment)
    for cell in experiment.cells[:2]:
        write_diverged(tmp_path, cell)
    text = tables.markdown(analysis_of(experiment, tmp_path))
    assert "1/3, 2 diverged, invalid" in text


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
    header, group, *body = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert group.startswith(r"\rlap{\textit{tiny+dropout=0.5, 1 device, stock}} & ")
    assert len(body) == 3
    assert len({line.count(" & ") for line in [header, group, *body]}) == 1
    assert r"95 \% interval" in header
    assert r"\caption{The demo experiment. Perplexities are" in text
    assert r"\label{tab:demo}" in text
    # 99.484, 109.947 and 121.510: geometric mean exp(4.7), standard deviation sqrt(242.8 / 2)
    assert r"PyTorch & 3/3 & 109.95 & $\pm$ 11.02 & " in body[0]


def test_latex_escapes_every_special_character() -> None:
    assert r"a_b & 5% {x} \y ~ ^ # $".translate(tables.LATEX) == (
        r"a\_b \& 5\% \{x\} \textbackslash{}y \textasciitilde{} \textasciicircum{} \# \$"
    )


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (METRICS["test_perplexity"].text(118.4567), "118.46"),
        (METRICS["test_perplexity"].text(1234.5), "1,234.50"),
        (METRICS["test_perplexity"].text(31479922593.0), "31,479,922,593"),
        (METRICS["test_perplexity"].text(math.inf), "∞"),
        (METRICS["test_perplexity"].text(None), NOTHING),
        (METRICS["tokens_per_second"].text(9876.5), "9,876"),
        (METRICS["parameters"].text(4_651_600), "4.652 M"),
        (METRICS["parameters"].text(52_300), "52,300"),
        (METRICS["peak_memory_bytes"].text(663e6), "663 MB"),
        (METRICS["peak_memory_bytes"].text(4.83e9), "4.83 GB"),
        (METRICS["seconds_per_epoch"].text(3.21), "3.2 s"),
        (METRICS["total_seconds"].text(323.4), "323 s"),
        (METRICS["total_seconds"].text(744), "12.4 min"),
        (METRICS["total_seconds"].text(17604), "4 h 53 min"),
        (METRICS["best_epoch"].text(12.5), "12.5"),
        (formatting.format_percent(0.0123), "+1.2 %"),
        (formatting.format_percent(-0.5), "\N{MINUS SIGN}50.0 %"),
        (formatting.format_percent(-0.0001), "0.0 %"),
        (formatting.format_p(0.0004), "< 0.001"),
        (formatting.format_p(0.04947), "0.049"),
    ],
)
def test_numbers_are_written_as_people_read_them(written: str, expected: str) -> None:
    assert written == expected


def test_every_table_says_which_implementation_it_shows(tmp_path: Path) -> None:
    variants = ("tiny", "tiny+implementation=tuned")
    tuned = {variants[1]: PlannedVariant(implementation="tuned")}
    experiment = plan(variants=variants).model_copy(update={"variants": tuned})
    write_results(tmp_path, experiment)
    analysis = analysis_of(experiment, tmp_path)
    for record in records(tables.results_csv(analysis)):
        assert record["implementation"] == ("tuned" if "tuned" in record["variant"] else "stock")
    assert "tiny, 1 device, stock" in tables.latex(analysis)
    assert "1 device, tuned" in tables.latex(analysis)
    assert "| tuned" in tables.markdown(analysis)


def test_variants_are_written_with_what_the_baseline_differs_by(tmp_path: Path) -> None:
    variants = ("tiny", "tiny+layers=3")
    known = {name: PlannedVariant(settings={"layers": n}) for n, name in enumerate(variants, 2)}
    experiment = plan(variants=variants, frameworks=("jax",))
    experiment = experiment.model_copy(update={"variants": known})
    for cell in experiment.cells:
        lower = 0.1 if cell.variant != "tiny" else 0.0
        write_cell(tmp_path, metrics(cell, 4.7 - lower + 0.001 * cell.seed))
    [record] = records(tables.variants_csv(analysis_of(experiment, tmp_path)))
    assert (record["variant"], record["baseline"]) == (variants[1], "tiny")
    assert record["label"] == "layers 3"
    assert float(record["difference_nats"]) == pytest.approx(-0.1)
    assert float(record["improvement"]) == pytest.approx(1 - math.exp(-0.1))
    assert float(record["speed"]) == 1
    assert float(record["best_probability"]) == 1
    assert record["verdict"] == "different"


def test_latex_has_the_columns_of_the_published_table(tmp_path: Path) -> None:
    experiment = plan(frameworks=("jax",))
    write_results(tmp_path, experiment)
    value = PublishedValue(
        experiment="demo", variant="tiny", framework=None, devices=1, metric="epochs", value=12,
        source="paper", locator="Table 1", note="",
    )  # fmt: skip
    rows = collect_rows(experiment, tmp_path)
    text = tables.latex(analyse(experiment, rows, CorpusFacts(), [value]))
    [header] = [line for line in text.splitlines() if line.startswith("Framework")]
    assert (
        header
        == r"Framework & Seeds ok & Test perplexity & $\pm$ test & 95 \% interval & Epochs \\"
    )
