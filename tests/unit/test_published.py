"""The published numbers: their form, and what is said of malformed ones."""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.support.fake_results import metrics, plan, score_of, write_cell, write_diverged

from ptbench.analysis.claims import Claim
from ptbench.analysis.collect import AnalysisError, CorpusFacts, collect_rows
from ptbench.analysis.experiment import PublishedResult, analyse
from ptbench.analysis.metrics import METRICS, MetricName
from ptbench.analysis.published import (
    COLUMNS,
    LeftOut,
    PublishedValue,
    ratios_within,
    read_left_out,
    read_published,
    readings,
)
from ptbench.configuration.papers import NamedRow, parse_row
from ptbench.configuration.study import load_study
from ptbench.training.records import Seconds

ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT / "workflow" / "papers"
PRINTED = ROOT / "tests" / "support" / "printed_numbers.csv"
HEADER = ",".join(COLUMNS)
ROW = "zaremba-small,zaremba-small,tensorflow,1,,test_perplexity,113.304,,,,Table 5.1,block"


def write(folder: Path, *lines: str) -> Path:
    path = folder / "zhang2018tensorflow" / "published.csv"
    path.parent.mkdir()
    path.write_text("\n".join(lines) + "\n")
    return path


def test_every_file_of_published_numbers_can_be_read_and_none_is_empty() -> None:
    values = read_published(PUBLISHED)
    assert {value.source for value in values} == {path.name for path in PUBLISHED.iterdir()}


def test_every_published_number_is_within_what_its_metric_can_be() -> None:
    # A perplexity left in nats, a time in hours or a count in millions would fall outside.
    seconds = (300, 10**6)
    limits = {
        "train_perplexity": (20, 10_000),
        "valid_perplexity": (20, 10_000),
        "test_perplexity": (20, 10_000),
        "tokens_per_second": (100, 10**7),
        "seconds_per_epoch": (60, 3600),
        "seconds_per_batch": (0.01, 10),
        "training_and_validation_seconds": seconds,
        "test_seconds": (60, 3600),
        "total_seconds": seconds,
        "load_seconds": (0.1, 10),
        "epochs": (1, 1000),
        "best_epoch": (1, 1000),
        "steps_per_epoch": (100, 10**5),
        "parameters": (10**5, 10**9),
        "peak_device_memory_bytes": (10**7, 10**11),
    }
    numbers = [v for v in read_published(PUBLISHED) if v.kind == "number" and v.over is None]
    assert [
        value
        for value in numbers
        if not limits[value.metric][0] < value.value < limits[value.metric][1]
        and "iverged" not in value.note
    ] == []


def test_every_row_that_a_document_names_is_planned() -> None:
    study = load_study({"experiments": "all"})
    planned = {
        (name, NamedRow(cell.variant, framework, cell.devices))
        for name, experiment in study.experiments.items()
        for cell in experiment.cells
        for framework in (cell.framework, None)
    }
    anywhere = {row for _, row in planned}
    values = read_published(PUBLISHED)
    assert {(value.experiment, value.row) for value in values} <= planned
    assert {value.over for value in values if value.over} <= anywhere
    for path in PUBLISHED.glob("*/claims.yaml"):
        for claim in yaml.safe_load(path.read_text(encoding="utf-8"))["claims"]:
            for test in Claim.model_validate(claim).tests:
                assert set(test.rows) <= anywhere, claim["id"]
    for exhibit in exhibits():
        named = {parse_row(row) for row in exhibit.get("rows", {}).values()}
        assert named <= anywhere, exhibit["id"]


def exhibits() -> list[dict[str, Any]]:
    return [
        {**exhibit, "document": path.parent.name}
        for path in sorted(PUBLISHED.glob("*/exhibits.yaml"))
        for exhibit in yaml.safe_load(path.read_text(encoding="utf-8"))["exhibits"]
    ]


def test_every_exhibit_draws_metrics_of_runs_relative_to_one_of_its_rows_if_to_any() -> None:
    for exhibit in exhibits():
        assert set(exhibit.get("metrics", [])) <= METRICS.keys(), exhibit["id"]
        assert exhibit.get("relative_to") in (None, *exhibit.get("rows", {})), exhibit["id"]


def test_what_was_printed_in_a_table_or_figure_is_found_by_the_exhibit_s_number() -> None:
    numbers = {(exhibit["document"], exhibit["number"]) for exhibit in exhibits()}
    drawn = {document for document, _ in numbers}
    located = {(value.source, value.locator) for value in read_published(PUBLISHED)}
    assert {
        (document, locator)
        for document, locator in located - numbers
        if document in drawn and locator.startswith(("Table", "Figure", "Appendix"))
    } == set()


def printed_numbers() -> Iterator[tuple[str, str, str, str, int]]:
    """Yield document, locator, metric, value and count of what the documents print.

    All but the logs of single runs in the Keras thesis' repository, which one row leaves out.
    """
    with PRINTED.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            yield row["source"], row["locator"], row["metric"], row["value"], int(row["count"])


def test_every_printed_number_is_published_or_left_out_with_a_reason() -> None:
    published: dict[tuple[str, str, str], list[PublishedValue]] = defaultdict(list)
    for value in read_published(PUBLISHED):
        published[value.source, value.locator, value.metric].append(value)
    left_out = read_left_out(PUBLISHED)
    forgotten = []
    for source, locator, metric, text, count in printed_numbers():
        found = {
            (value.row, value.over)
            for value in published[source, locator, metric]
            if is_printed_as(value, text)
        }
        if len(found) < count and not any(
            covers(each, source, locator, metric, text) for each in left_out
        ):
            forgotten.append((source, locator, metric, text))
    assert forgotten == []


def covers(left_out: LeftOut, source: str, locator: str, metric: str, value: str) -> bool:
    """Return whether a printed number is among those that are left out."""
    patterns = (
        (locator, left_out.locator), (metric, left_out.metric), (value, left_out.value)
    )  # fmt: skip
    return source == left_out.source and all(fnmatchcase(*each) for each in patterns)


def is_printed_as(value: PublishedValue, text: str) -> bool:
    if value.kind == "diverges":
        return text == "diverges"
    sign = {"above": ">", "below": "<", "number": ""}[value.kind]
    number = text.removeprefix(sign)
    return number.replace(".", "").isdigit() and math.isclose(
        value.value, float(number), rel_tol=1e-5
    )


def test_every_reason_is_that_of_some_printed_number() -> None:
    numbers = [number[:4] for number in printed_numbers()]
    assert [
        each
        for each in read_left_out(PUBLISHED)
        if each.locator != "exp_results/*" and not any(covers(each, *number) for number in numbers)
    ] == []


def test_no_published_number_is_there_twice() -> None:
    values = [value.model_dump_json(exclude={"note"}) for value in read_published(PUBLISHED)]
    assert len(set(values)) == len(values)


@pytest.mark.parametrize(
    ("locator", "variant", "devices", "metric", "value", "std"),
    [
        # Singh 2018; 47 minutes, 16 million parameters, 3 hours
        ("Table 4.1", "singh-lstm1+epochs=20+learning_rate=0.0001+schedule=constant", 1,
         "training_and_validation_seconds", 2820, None),
        ("Table 4.2", "singh-lstm1+sequence_length=45", 1, "valid_perplexity", 692, 126),
        ("Table 4.6", "singh-lstm2-sgd+learning_rate=1", 1, "epochs", 41, None),
        ("Table 4.7", "singh-lstm2-sgd+embedding_size=1500+hidden_size=1500", 1,
         "seconds_per_epoch", 640, None),
        ("Table 4.8", "singh-lstm1+batch_size=5", 1, "parameters", 16_000_000, None),
        ("Figure 4.4, upper", "singh-mos-clipped", 1, "valid_perplexity", 104, 1),
        ("Figure 4.6, right", "singh-mos-best+batch_scope=per_device+epochs=5+source=stream", 3,
         "seconds_per_epoch", 290, None),
        ("Section 4.4", "singh-mos-best", 1, "test_perplexity", 90.91, None),
        ("Chapter 5", "singh-mos-best", 1,
         "training_and_validation_seconds", 10_800, None),
        # Zhang 2018; 5.295 and 16.461 hours, 26.132 and 17.503 million parameters, 4.830 GB
        ("Table 5.1", "zaremba-large+kernel=block", 1, "total_seconds", 19_062, None),
        ("Table 5.1", "zaremba-large", 1, "peak_device_memory_bytes", 4_830_000_000, None),
        ("Table 6.1", "zaremba-small+mixtures=15", 1, "train_perplexity", 29.020, None),
        ("Table 6.1", "zaremba-medium+mixtures=15", 1, "parameters", 26_132_000, None),
        ("Section 6.3.2", "zhang-bm+mixtures=3", 1, "valid_perplexity", 531.063, None),
        ("Section 6.3.2", "zhang-bm+constant_epochs=5+epochs=5", 1,
         "seconds_per_epoch", 243.6, None),
        ("Table 7.1", "zhang-bm", 2, "valid_perplexity", 80.960, None),
        ("Table 7.1", "zhang-bm", 2, "training_and_validation_seconds", 59_259.6, None),
        ("Table 7.2", "zaremba-medium+mixtures=10+softmax_bias=false+tie_weights=true", 1,
         "parameters", 17_503_000, None),
        ("Table 8.1", "zhang-bmlg-mean", 1, "tokens_per_second", 4860, None),
        # SparseLang 2018; 183.95 minutes
        ("Appendix, Experiment 2",
         "sparselang-sparse+embedding_size=7115+hidden_size=7115+kept_weights=0.001+kernel=sparse",
         1, "training_and_validation_seconds", 11_037, None),
        # Greatti 2019
        ("Section 2(e) 1, 400 hidden units, second table", "greatti-lstm+hidden_size=400", 1,
         "valid_perplexity", 147.99, None),
        ("Section 2(e) 2, 75 bptt, second table", "greatti-gru+sequence_length=75", 1,
         "seconds_per_epoch", 125.95, None),
    ],
)  # fmt: skip
def test_published_numbers_are_those_of_the_documents(
    locator: str,
    variant: str,
    devices: int,
    metric: MetricName,
    value: float,
    std: float | None,
) -> None:
    """Typed by hand, apart from the files."""
    found = {
        (number.value, number.std)
        for number in read_published(PUBLISHED)
        if (number.locator, number.variant, number.devices, number.metric)
        == (locator, variant, devices, metric)
    }
    assert (value, std) in found


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        (ROW.replace("test_perplexity", "test_ppl"), "metric='test_ppl'"),
        (ROW.replace("113.304", "many"), "value='many'"),
        (ROW.replace("113.304", "-1"), "value='-1'"),
        (ROW.replace("113.304", "nan"), "value='nan'"),
        (ROW.replace("113.304", "inf"), "value='inf'"),
        (ROW.replace("113.304", ">"), "value=''"),
        (ROW.replace(",1,,", ",1,zaremba-small [cntk],"), "over='zaremba-small [cntk]'"),
        (ROW.replace(",,,,Table", ",,0,,Table"), "runs='0'"),
        (ROW.replace("113.304", ""), "value=''"),
        (ROW.replace("tensorflow", "theano"), "framework='theano'"),
        (ROW.replace("113.304,,", "113.304,-2,"), "std='-2'"),
        (ROW.replace(",1,", ",0,"), "devices='0'"),
        (ROW.replace(",1,", ",,"), "devices=''"),
        (ROW.replace("Table 5.1", ""), "locator=''"),
        (ROW.replace("zaremba-small", "Zaremba Small"), "experiment='Zaremba Small'"),
    ],
)
def test_a_malformed_row_is_named_by_file_line_and_column(
    tmp_path: Path, bad: str, named: str
) -> None:
    path = write(tmp_path, HEADER, ROW, bad)
    with pytest.raises(AnalysisError) as error:
        read_published(tmp_path)
    assert str(error.value).startswith(f"{path}, line 3: {named}")


@pytest.mark.parametrize(
    ("text", "kind", "value", "rounding"),
    [
        ("113.304", "number", 113.304, 0.0005),
        ("16e6", "number", 16_000_000, 500_000),
        (">3000", "above", 3000, 0.5),
        ("<130", "below", 130, 0.5),
        ("diverges", "diverges", math.inf, 0),
    ],
)
def test_a_value_is_a_number_a_bound_or_that_it_diverges(
    tmp_path: Path, text: str, kind: str, value: float, rounding: float
) -> None:
    write(tmp_path, HEADER, ROW.replace("113.304", text))
    [read] = read_published(tmp_path)
    assert (read.kind, read.value, read.rounding) == (kind, value, pytest.approx(rounding))


def test_a_number_with_several_readings_counts_once(tmp_path: Path) -> None:
    write(
        tmp_path,
        HEADER,
        ROW.replace(",,,,Table", ",,,small,Table"),
        ROW.replace(",,,,Table", ",,,small,Table").replace("zaremba-small,zaremba-small", "z,z"),
        ROW.replace("zaremba-small,z", "zhang-mos,z").replace("113.304", "5"),
        ROW.replace("zaremba-small,z", "zhang-cells,z").replace("113.304", "5"),
        ROW.replace("Table 5.1", "Table 6.1"),
    )
    assert [len(each) for each in readings(read_published(tmp_path))] == [2, 2, 1]


def test_times_of_a_table_become_ratios_to_its_first_row(tmp_path: Path) -> None:
    speeds = ROW.replace("test_perplexity", "tokens_per_second")
    write(
        tmp_path,
        HEADER,
        speeds.replace("113.304", "1000"),
        speeds.replace("113.304", "400").replace(",zaremba-small", ",zaremba-large"),
        speeds.replace("113.304", "100").replace("Table 5.1", "Table 6.1"),
        ROW,
    )
    [ratio] = ratios_within(read_published(tmp_path))
    assert (ratio.variant, ratio.value, str(ratio.over)) == (
        "zaremba-large", 0.4, "zaremba-small [tensorflow]"
    )  # fmt: skip


def test_a_repeated_row_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, HEADER, ROW, ROW.replace("113.304", "113.3"))
    with pytest.raises(AnalysisError, match=rf"{path}, line 3 repeats {path}, line 2"):
        read_published(tmp_path)


@pytest.mark.parametrize("header", ["", "value,std", HEADER + ",more"])
def test_a_wrong_header_is_refused(tmp_path: Path, header: str) -> None:
    write(tmp_path, header, ROW)
    with pytest.raises(AnalysisError, match="the first line must be experiment,variant"):
        read_published(tmp_path)


@pytest.fixture
def beside(tmp_path: Path) -> list[PublishedResult]:
    """Three seeds of test perplexity exp(4.7 ± 0.01), on one and two devices, beside four rows."""
    experiment = plan("zaremba-small", ("zaremba-small",), ("pytorch", "tensorflow"), (1, 2))
    for cell in experiment.cells:
        nll = 4.7 + 0.01 * (cell.seed - 2)
        write_cell(tmp_path, metrics(cell, nll, train=score_of(4.0), parameters=4_651_600))
    write(
        tmp_path,
        HEADER,
        ROW.replace("113.304", "109.947"),  # exp(4.7) = 109.947
        ROW.replace("tensorflow", "").replace("113.304", "220"),
        ROW.replace("tensorflow", "").replace("test_perplexity,113.304", "parameters,4.652e6"),
        ROW.replace(",1,", ",2,"),
        ROW.replace("zaremba-small,zaremba-small", "zaremba-small,zaremba-small+epochs=2"),
        ROW.replace("zaremba-small,zaremba-small", "zaremba-medium,zaremba-small"),
        ROW.replace(",1,,", ",1,zaremba-small [pytorch],").replace("113.304", "0.5"),
        ROW.replace("113.304", ">3000").replace("Table 5.1", "Table 5.2"),
    )
    rows = collect_rows(experiment, tmp_path)
    return list(analyse(experiment, rows, CorpusFacts(), read_published(tmp_path)).published)


def test_a_number_is_set_beside_its_framework_or_all_on_its_number_of_devices(
    beside: list[PublishedResult],
) -> None:
    assert [
        (line.published.metric, line.published.value, line.framework, line.published.devices)
        for line in beside
    ] == [
        ("test_perplexity", 109.947, "tensorflow", 1),
        ("test_perplexity", 220, "pytorch", 1),
        ("test_perplexity", 220, "tensorflow", 1),
        ("parameters", 4_652_000, "pytorch", 1),
        ("parameters", 4_652_000, "tensorflow", 1),
        ("test_perplexity", 113.304, "tensorflow", 2),
        ("test_perplexity", 0.5, "tensorflow", 1),
        ("test_perplexity", 3000, "tensorflow", 1),
    ]


def test_the_gap_is_ours_over_the_published_less_one(beside: list[PublishedResult]) -> None:
    assert beside[0].relative_gap == pytest.approx(0, abs=1e-5)
    assert beside[0].verdict == "reproduced"
    assert beside[1].relative_gap == pytest.approx(109.947 / 220 - 1, abs=1e-5)
    assert beside[1].verdict == "not reproduced"
    assert beside[3].relative_gap == pytest.approx(4_651_600 / 4_652_000 - 1)


def test_a_ratio_is_set_beside_ours_and_a_bound_has_no_gap(
    beside: list[PublishedResult],
) -> None:
    assert beside[6].ours == pytest.approx(1)
    assert beside[6].relative_gap == pytest.approx(1)
    assert (beside[7].ours, beside[7].relative_gap) == (beside[0].ours, None)


@pytest.mark.parametrize(
    ("metric", "ours", "low", "high"),
    [
        ("tokens_per_second", 2000, 1000, 3000),
        ("seconds_per_epoch", 20, 10, 30),
        ("training_seconds", 200, 100, 300),
        ("total_seconds", 300, 200, 400),
        ("epochs", 2, 1, 3),
        ("peak_device_memory_bytes", 3_000_000, None, None),
    ],
)
def test_a_time_is_set_beside_our_median_and_range_and_a_size_beside_the_largest(
    tmp_path: Path, metric: str, ours: float, low: float | None, high: float | None
) -> None:
    experiment = plan("zaremba-small", ("zaremba-small",), ("tensorflow",))
    for cell in experiment.cells:
        result = metrics(
            cell,
            4.7,
            tokens_per_second=1000 * cell.seed,
            seconds_per_epoch=10 * cell.seed,
            seconds=Seconds(training=100 * cell.seed, total=100 * cell.seed + 100),
            epochs=cell.seed,
            peak_device_memory_bytes=1_000_000 * cell.seed,
        )
        write_cell(tmp_path, result)
    write(tmp_path, HEADER, ROW.replace("test_perplexity,113.304", f"{metric},1000"))
    rows = collect_rows(experiment, tmp_path)
    [line] = analyse(experiment, rows, CorpusFacts(), read_published(tmp_path)).published
    assert (line.ours, line.low, line.high) == (ours, low, high)
    assert line.relative_gap == pytest.approx(ours / 1000 - 1)
    assert line.verdict == ("not reproduced" if metric == "epochs" else "other hardware")


def verdicts(results: Path, variant: str, *rows: str, diverged: bool = False) -> list[str]:
    experiment = plan("zaremba-small", (variant,), ("tensorflow",))
    for cell in experiment.cells:
        if diverged:
            write_diverged(results, cell)
        else:
            write_cell(results, metrics(cell, 4.7 + 0.01 * cell.seed))
    write(results, HEADER, *rows)
    found = collect_rows(experiment, results)
    published = analyse(experiment, found, CorpusFacts(), read_published(results)).published
    return [line.verdict for line in published]


def test_a_run_of_a_part_of_the_corpus_judges_no_published_number(tmp_path: Path) -> None:
    assert verdicts(tmp_path, "zaremba-small+budget=smoke", ROW) == ["reduced budget"]


def test_a_number_is_judged_by_runs_that_diverged_too(tmp_path: Path) -> None:
    rows = [ROW, ROW.replace("113.304", "diverges"), ROW.replace("113.304", ">3000")]
    found = verdicts(tmp_path, "zaremba-small", *rows, diverged=True)
    assert found == ["not reproduced", "reproduced", "reproduced"]
