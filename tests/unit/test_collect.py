"""Reading cells, and refusing to average what must not be averaged."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
from tests.support.fake_results import (
    metrics,
    plan,
    score_of,
    write_cell,
    write_corpus,
    write_diverged,
    write_results,
)

from ptbench.analysis.collect import (
    OUTDATED,
    AnalysisError,
    CorpusFacts,
    collect_rows,
    read_corpus_facts,
)
from ptbench.analysis.experiment import analyse
from ptbench.analysis.metrics import METRICS
from ptbench.analysis.plan import PlannedVariant, plan_experiment, read_plan
from ptbench.configuration.specification import Specification
from ptbench.configuration.study import load_study
from ptbench.model.recipe import Recipe
from ptbench.report import tables
from ptbench.training.cell import recipe_yaml
from ptbench.training.records import Hardware, Metrics, Seconds


def test_runs_of_a_variant_are_pairs_exactly_if_it_has_no_dropout() -> None:
    study = load_study({"experiments": ["zaremba-small", "zaremba-medium"]})
    small, medium = (plan_experiment(study, name) for name in ("zaremba-small", "zaremba-medium"))
    assert small.variants["zaremba-small"] == PlannedVariant(paired=True)
    assert medium.variants["zaremba-medium"] == PlannedVariant(paired=False)
    assert small.equivalence_margin == study.config.equivalence_margin


def test_a_plan_read_from_its_axes_has_every_combination() -> None:
    made = plan(variants=("a", "b"), frameworks=("jax", "pytorch"), devices=(1, 2), seeds=(1, 2))
    content = made.model_dump(exclude={"cells", "variants"}) | {
        "variants": {"a": {"paired": True}, "b": {}},
        "frameworks": ["jax", "pytorch"],
        "devices": [1, 2],
        "seeds": [1, 2],
    }
    found = read_plan(content)
    assert set(found.cells) == set(made.cells)
    assert len(found.cells) == 16
    assert (found.variant("a").paired, found.variant("b").paired) == (True, False)


def test_every_number_that_a_run_records_is_a_metric() -> None:
    clocks = {f"{clock}_seconds" for clock in Seconds.model_fields}
    scores = {f"{split}_perplexity" for split in ("train", "valid", "test")}
    not_measured = {"protocol", "fingerprint", "cell", "status", "reason", "stopped", "attempts"}
    given = {"vocabulary_size"}  # by the corpus
    recorded = Metrics.model_fields.keys() - {"train", "valid", "test", "seconds", "hardware"}
    sampled = Hardware.model_fields.keys() - {"seconds", "cores", "threads", "sampling_seconds"}
    sampled -= {"gpu_memory_bytes", "cells_at_once"}  # beside the framework's own; a condition
    assert set(METRICS) >= clocks | scores | sampled | (recorded - not_measured - given)


def test_rows_follow_the_plans_variants_then_devices_then_frameworks(tmp_path: Path) -> None:
    experiment = plan(
        variants=("b", "a"), frameworks=("jax", "pytorch"), devices=(2, 1), seeds=(1,)
    )
    rows = collect_rows(experiment, tmp_path)
    assert [(row.variant, row.devices, row.framework) for row in rows] == [
        ("b", 1, "pytorch"),
        ("b", 1, "jax"),
        ("b", 2, "pytorch"),
        ("b", 2, "jax"),
        ("a", 1, "pytorch"),
        ("a", 1, "jax"),
        ("a", 2, "pytorch"),
        ("a", 2, "jax"),
    ]


def test_the_numbers_of_a_row_are_those_of_its_cells(tmp_path: Path) -> None:
    experiment = plan(frameworks=("jax",), seeds=(3, 1, 2))
    for cell, nll in zip(experiment.cells, (4.3, 4.1, 4.2), strict=True):
        write_cell(tmp_path, metrics(cell, nll, tokens_per_second=1000.0 * nll))
    (row,) = collect_rows(experiment, tmp_path)
    assert [cell.cell.seed for cell in row.cells] == [1, 2, 3]
    assert list(row.values("test_perplexity").values()) == pytest.approx([4.1, 4.2, 4.3])
    (result,) = analyse(experiment, [row], CorpusFacts(), []).rows
    assert result.value("test_perplexity") == pytest.approx(math.exp(4.2))
    assert result.value("tokens_per_second") == pytest.approx(4200)
    assert result.value("train_perplexity") == pytest.approx(math.exp(4.2 - 0.8))
    assert [result.value(name) for name in ("epochs", "seconds_per_epoch", "load_seconds")] == [
        13, 93.0, 0.4,
    ]  # fmt: skip
    assert result.framework_versions == ("1.2.3",)
    assert result.commits == ("0123456789ab",)


def test_a_missing_cell_stays_in_its_row(tmp_path: Path) -> None:
    experiment = plan(frameworks=("jax",))
    write_cell(tmp_path, metrics(experiment.cells[0], 4.2))
    (row,) = collect_rows(experiment, tmp_path)
    assert [cell.state for cell in row.cells] == ["ok", "missing", "missing"]


@pytest.mark.parametrize(
    ("diverged", "missing", "usable", "problem"),
    [
        (0, 0, True, None),
        (1, 0, True, "seed 1 diverged"),
        (0, 1, True, "seed 5 has no result"),
        (1, 1, False, "invalid: seed 1 diverged, seed 5 has no result"),
        (2, 0, False, "invalid: seed 1 diverged, seed 2 diverged"),
        (0, 5, False, "no seed has a result"),
    ],
)
def test_two_failed_seeds_make_a_row_invalid(
    tmp_path: Path, diverged: int, missing: int, usable: bool, problem: str | None
) -> None:
    experiment = plan(frameworks=("jax",), seeds=(1, 2, 3, 4, 5))
    write_results(tmp_path, experiment)
    for cell in experiment.cells[:diverged]:
        write_diverged(tmp_path, cell)
    for cell in experiment.cells[5 - missing :]:
        (tmp_path / "cells" / cell.path / "metrics.json").unlink()
    (row,) = collect_rows(experiment, tmp_path)
    assert row.usable is usable
    assert row.problem == problem
    assert len(list(row.values("test_perplexity").values())) == 5 - diverged - missing


def test_an_invalid_row_is_left_out_of_every_verdict(tmp_path: Path) -> None:
    experiment = plan(frameworks=("pytorch", "jax"), seeds=(1, 2, 3, 4))
    write_results(tmp_path, experiment)
    for cell in experiment.cells[:2]:
        write_diverged(tmp_path, cell)
    analysis = analyse(experiment, collect_rows(experiment, tmp_path), CorpusFacts(), [])
    (pair,) = analysis.pairs
    assert (pair.outcome.n_a, pair.outcome.n_b) == (0, 4)
    assert pair.outcome.verdict == "inconclusive"
    assert analysis.all_equivalent_p is None
    row = analysis.rows[0]
    assert (row.n_ok, row.n_diverged, row.n_planned) == (2, 2, 4)


@pytest.mark.parametrize("which", [1, 4])  # of the same row, and of the other framework
def test_different_fingerprints_are_never_averaged_or_compared(tmp_path: Path, which: int) -> None:
    experiment = plan(frameworks=("pytorch", "jax"))
    write_results(tmp_path, experiment)
    odd = experiment.cells[which]
    write_cell(tmp_path, metrics(odd, 4.7, fingerprint="ffffffffffff"))
    with pytest.raises(AnalysisError) as error:
        collect_rows(experiment, tmp_path)
    message = str(error.value)
    assert f"ffffffffffff in {odd.path}" in message
    assert all(cell.path in message for cell in experiment.cells)
    assert "\n" not in message


def test_a_partial_report_counts_cells_of_the_present_recipe_alone(tmp_path: Path) -> None:
    experiment = plan(variants=("a", "b"), frameworks=("jax",))
    write_results(tmp_path, experiment)
    renewed = experiment.cells[1]
    write_cell(tmp_path, metrics(renewed, 4.7, fingerprint="ffffffffffff"))
    with pytest.raises(AnalysisError, match="different settings"):
        collect_rows(experiment, tmp_path)
    present = {"a": "ffffffffffff", "b": "eeeeeeeeeeee"}
    a, b = collect_rows(experiment, tmp_path, lambda cell: present[cell.variant])
    assert [cell.state for cell in a.cells] == ["missing", "ok", "missing"]
    assert list(a.values("test_perplexity").values()) == pytest.approx([4.7])
    assert a.problem == (
        f"incomplete: seed 1 has no result ({OUTDATED}), seed 3 has no result ({OUTDATED})"
    )
    assert b.problem == f"no seed has a result ({OUTDATED})"
    analysis = analyse(experiment, [a, b], CorpusFacts(), [])
    assert [cell.reason for cell in analysis.rows[0].cells] == [OUTDATED, None, OUTDATED]
    assert analysis.rows[1].fingerprint is None


@pytest.mark.parametrize("name", ["metrics.json", "history.csv"])
def test_a_partial_report_counts_what_cannot_be_read_as_missing_and_says_why(
    tmp_path: Path, name: str
) -> None:
    experiment = plan(frameworks=("jax",))
    write_results(tmp_path, experiment)
    path = tmp_path / "cells" / experiment.cells[0].path / name
    path.write_text("{\n1\n")
    (row,) = collect_rows(experiment, tmp_path, lambda _: "0123456789ab")
    assert [cell.state for cell in row.cells] == ["missing", "ok", "ok"]
    assert row.problem is not None
    assert row.problem.startswith(f"seed 1 has no result ({path} cannot be read")


def test_kinds_of_device_may_differ_between_frameworks_and_tables_say_so(tmp_path: Path) -> None:
    kinds = {"jax": "cuda", "mxnet": "cpu"}
    experiment = plan(frameworks=kinds, accelerators=kinds)
    for cell in experiment.cells:
        fingerprint = {"jax": "a" * 12, "mxnet": "b" * 12}[cell.framework]
        write_cell(tmp_path, metrics(cell, 4.7, fingerprint=fingerprint))
    analysis = analyse(experiment, collect_rows(experiment, tmp_path), CorpusFacts(), [])
    assert {row.framework: row.accelerator for row in analysis.rows} == kinds
    for text in (tables.markdown(analysis), tables.latex(analysis)):
        assert "JAX on GPUs" in text
        assert "MXNet on CPUs" in text
    lines = list(csv.DictReader(tables.results_csv(analysis).splitlines()))
    assert [line["accelerator"] for line in lines] == [kinds[line["framework"]] for line in lines]
    alike = analysis.model_copy(update={"rows": analysis.rows[:1]})
    assert " on " not in tables.markdown(alike).splitlines()[4]
    # Within one kind they must still be alike.
    write_cell(tmp_path, metrics(experiment.cells[0], 4.7, fingerprint="c" * 12))
    with pytest.raises(AnalysisError, match="different settings"):
        collect_rows(experiment, tmp_path)


def test_the_rate_of_a_model_s_products_is_its_speed_times_their_operations(tmp_path: Path) -> None:
    """Of zaremba-small: 8 h^2 multiplications in each of two layers, and h for each word."""
    recipe = Recipe(layers=2, hidden_size=200, embedding_size=200, batch_size=20)
    specification = Specification(variant="tiny", recipe=recipe, corpus_definition={})
    experiment = plan(frameworks=("jax",), seeds=(1, 2))
    write_results(tmp_path, experiment)
    known = tmp_path / "cells" / experiment.cells[0].path / "recipe.yaml"
    known.write_text(recipe_yaml(specification))
    (row,) = collect_rows(experiment, tmp_path)
    found = row.values("flops_per_second")
    speed = row.values("tokens_per_second")[1]
    products = 3 * 2 * (2 * 8 * 200**2 + 200 * 10_000)
    assert found == {1: pytest.approx(speed * products)}  # of the other it is not known


def test_different_variants_may_have_different_fingerprints(tmp_path: Path) -> None:
    experiment = plan(variants=("a", "b"), frameworks=("jax",), seeds=(1,))
    for cell, fingerprint in zip(experiment.cells, ("aaaaaaaaaaaa", "bbbbbbbbbbbb"), strict=True):
        write_cell(tmp_path, metrics(cell, 4.7, fingerprint=fingerprint))
    assert len(collect_rows(experiment, tmp_path)) == 2


def test_scores_on_different_tokens_are_never_compared(tmp_path: Path) -> None:
    experiment = plan(frameworks=("pytorch", "jax"), seeds=(1,))
    write_results(tmp_path, experiment)
    write_cell(tmp_path, metrics(experiment.cells[1], 4.7, test=score_of(4.7, tokens=9_999)))
    with pytest.raises(AnalysisError, match="different numbers of tokens"):
        collect_rows(experiment, tmp_path)


def test_a_result_in_another_cells_folder_is_refused(tmp_path: Path) -> None:
    experiment = plan(frameworks=("jax",), seeds=(1, 2))
    write_cell(tmp_path, metrics(experiment.cells[0], 4.7))
    folder = tmp_path / "cells" / experiment.cells[0].path
    folder.rename(tmp_path / "cells" / experiment.cells[1].path)
    with pytest.raises(AnalysisError, match="result of another cell, tiny/jax/devices-1/seed-1"):
        collect_rows(experiment, tmp_path)


@pytest.mark.parametrize("text", ["", "{", '{"protocol": 1}', "\udcff"])
@pytest.mark.parametrize("name", ["metrics.json", "history.csv"])
def test_an_unreadable_file_is_named(tmp_path: Path, name: str, text: str) -> None:
    experiment = plan(frameworks=("jax",), seeds=(1,))
    write_results(tmp_path, experiment)
    path = tmp_path / "cells" / experiment.cells[0].path / name
    content = text if name == "metrics.json" else f"epoch\n{text}x\n"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(AnalysisError) as error:
        collect_rows(experiment, tmp_path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_finished_run_without_history_is_named(tmp_path: Path) -> None:
    experiment = plan(frameworks=("jax",), seeds=(1,))
    write_results(tmp_path, experiment)
    (tmp_path / "cells" / experiment.cells[0].path / "history.csv").unlink()
    with pytest.raises(AnalysisError, match=r"history\.csv is missing"):
        collect_rows(experiment, tmp_path)


def test_an_ok_run_without_a_test_score_is_refused(tmp_path: Path) -> None:
    experiment = plan(frameworks=("jax",), seeds=(1,))
    write_cell(tmp_path, metrics(experiment.cells[0], 4.7, test=None))
    with pytest.raises(AnalysisError, match="lacks a finite score"):
        collect_rows(experiment, tmp_path)


def test_the_floor_of_a_synthetic_corpus_is_read(tmp_path: Path) -> None:
    write_corpus(tmp_path, floor_perplexity=18.5, best_bigram_nll_nats=math.log(30), tokens={})
    facts = read_corpus_facts(tmp_path, "synthetic")
    assert facts.floor_perplexity == 18.5
    assert facts.best_bigram_perplexity == pytest.approx(30)


def test_n_grams_are_read_for_the_split_of_the_metric(tmp_path: Path) -> None:
    nll = {"3": {"valid": math.log(40), "test": math.log(50)}, "5": {"test": math.log(45)}}
    write_corpus(tmp_path, kneser_ney_nll_nats=nll)
    facts = read_corpus_facts(tmp_path, "synthetic")
    assert facts.ngram_perplexities("test_perplexity") == pytest.approx({3: 50, 5: 45})
    assert facts.ngram_perplexities("valid_perplexity") == pytest.approx({3: 40})
    assert facts.ngram_perplexities("train_perplexity") == {}


def test_a_real_corpus_has_no_floor(tmp_path: Path) -> None:
    write_corpus(tmp_path, "ptb", types=10_000)
    assert read_corpus_facts(tmp_path, "ptb") == CorpusFacts()
    assert read_corpus_facts(tmp_path, "elsewhere") == CorpusFacts()


def test_an_unreadable_corpus_is_named(tmp_path: Path) -> None:
    write_corpus(tmp_path, floor_perplexity="high")
    with pytest.raises(AnalysisError, match=r"corpus\.json cannot be read \(floor_perplexity"):
        read_corpus_facts(tmp_path, "synthetic")


def test_a_run_without_provenance_is_still_a_result(tmp_path: Path) -> None:
    experiment = plan(frameworks=("jax",), seeds=(1,))
    write_results(tmp_path, experiment)
    (tmp_path / "cells" / experiment.cells[0].path / "provenance.json").unlink()
    (row,) = collect_rows(experiment, tmp_path)
    assert row.usable


def test_changes_that_were_not_committed_are_marked(tmp_path: Path) -> None:
    experiment = plan(frameworks=("jax",), seeds=(1,))
    write_results(tmp_path, experiment)
    path = tmp_path / "cells" / experiment.cells[0].path / "provenance.json"
    known = {"git_commit": "a" * 40, "git_dirty": True, "cpu": "X", "gpus": [{"name": "Y"}]}
    path.write_text(json.dumps(known))
    (row,) = analyse(experiment, collect_rows(experiment, tmp_path), CorpusFacts(), []).rows
    assert row.commits == ("a" * 12 + "+changes",)
    assert row.machines == ("X + Y",)


@pytest.mark.parametrize(
    ("attempts", "sampled", "known"),
    [(1, None, 1), (2, None, None), (2, 3, 3)],
)
def test_a_run_that_went_on_knows_what_was_beside_it_only_if_it_looked_all_the_time(
    tmp_path: Path, attempts: int, sampled: int | None, known: int | None
) -> None:
    """The provenance of older runs has the count of the last attempt alone."""
    experiment = plan(
        frameworks=("jax",), seeds=(1,), accelerators={"jax": "cuda"}, rents={"jax": 3.6}
    )
    [cell] = experiment.cells
    hardware = Hardware(
        seconds=9, cores=2, threads=2, own_cores=1, other_cores=0, memory_bytes=1,
        sampling_seconds=0, cells_at_once=sampled, gpu_utilization=0.9, gpu_joules=5.0,
    )  # fmt: skip
    write_cell(tmp_path, metrics(cell, 4.7, attempts=attempts, hardware=hardware))
    [row] = collect_rows(experiment, tmp_path)
    assert row.cells_at_once == known
    of_the_gpu = [row.values(name) for name in ("gpu_joules", "gpu_utilization", "rent")]
    assert all(of_the_gpu) == any(of_the_gpu) == (known == 1)  # nothing of a GPU that was shared
