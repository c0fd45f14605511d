"""Which framework is faster, by what factor, and whether perplexities differ: from drawn rows."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from scipy import stats
from tests.support.fake_results import metrics, plan, write_cell, write_diverged, write_results

from ptbench.analysis.collect import CorpusFacts, collect_rows
from ptbench.analysis.experiment import Analysis, analyse
from ptbench.analysis.headline import (
    Comparison,
    compare,
    compare_perplexities,
    compare_speeds,
    groups_of,
)
from ptbench.analysis.plan import ExperimentPlan
from ptbench.configuration.specification import Cell
from ptbench.report import words
from ptbench.report.opening import opening
from ptbench.training.records import Hardware

Speed = Callable[[Cell], float]


def analysed(results: Path, experiment: ExperimentPlan) -> Analysis:
    return analyse(experiment, collect_rows(experiment, results), CorpusFacts(), [])


def of_speeds(results: Path, experiment: ExperimentPlan, speed: Speed, **facts: object) -> Analysis:
    """An experiment whose runs have these training speeds; each had its machine to itself."""
    for cell in experiment.cells:
        write_cell(results, metrics(cell, 4.7 + 1e-4 * cell.seed, tokens_per_second=speed(cell)))
        path = results / "cells" / cell.path / "provenance.json"
        path.write_text(json.dumps({"cpu": "A", "cells_at_once": 1, **facts}))
    return analysed(results, experiment)


def speeds_of(*analyses: Analysis) -> Comparison:
    found = compare_speeds(groups_of(analyses))
    assert found is not None
    return found


TWO = ("pytorch", "jax")
FACTORS = {("a", 1): 2.0, ("a", 2): 8.0, ("b", 1): 1.0, ("b", 2): 1.0}  # of JAX over PyTorch


def planted(cell: Cell) -> float:
    """A variant's own speed, times the planted factor; seeds agree."""
    own = {"a": 500.0, "b": 9000.0}[cell.variant] * cell.devices
    return own * (FACTORS[cell.variant, cell.devices] if cell.framework == "jax" else 1.0)


def test_speeds_on_different_kinds_of_device_are_not_compared(tmp_path: Path) -> None:
    kinds = {"pytorch": "cuda", "jax": "cuda", "mxnet": "cpu"}
    experiment = plan(frameworks=tuple(kinds), accelerators=kinds)
    found = speeds_of(of_speeds(tmp_path, experiment, lambda _: 1000.0))
    assert set(found.ratios) == {"pytorch", "jax"}


def test_the_factor_is_a_geometric_mean_over_recipes_on_the_fewest_devices(
    tmp_path: Path,
) -> None:
    found = speeds_of(of_speeds(tmp_path, plan("x", ("a", "b"), TWO, (1, 2)), planted))
    ratio = found.ratios["jax"]
    assert (found.reference, ratio.n, ratio.over) == ("pytorch", 2, "recipes")
    assert ratio.value == pytest.approx(math.sqrt(2))  # of 2 and 1; on two devices it is another
    logs = [math.log(2), 0.0]
    half = stats.t.ppf(0.975, 1) * math.dist(logs[:1], logs[1:]) / math.sqrt(2) / math.sqrt(2)
    assert ratio.low == pytest.approx(math.exp(math.log(2) / 2 - half))
    assert ratio.high == pytest.approx(math.exp(math.log(2) / 2 + half))
    back = found.pairs["pytorch", "jax"]
    assert (back.value, back.low) == pytest.approx((1 / ratio.value, 1 / ratio.high))


def test_devices_on_which_more_frameworks_compare_go_before_fewer_devices(tmp_path: Path) -> None:
    """On one device MXNet's runs shared their machine."""
    experiment = plan("x", ("a",), ("pytorch", "jax", "mxnet"), (1, 2))
    of_speeds(tmp_path, experiment, planted)
    for cell in experiment.cells:
        if (cell.framework, cell.devices) == ("mxnet", 1):
            path = tmp_path / "cells" / cell.path / "provenance.json"
            path.write_text(json.dumps({"cpu": "A", "cells_at_once": 2}))
    found = speeds_of(analysed(tmp_path, experiment))
    assert (found.ratios.keys(), found.apart) == ({"jax", "pytorch", "mxnet"}, ())
    assert found.ratios["jax"].value == pytest.approx(8.0)  # that on two devices


def test_a_recipe_counts_once_however_many_of_its_settings_are_tried(tmp_path: Path) -> None:
    """JAX is 4 times as fast in fourteen variants of one recipe, and as fast in another."""
    rates = [f"a+learning_rate={rate}" for rate in range(2, 15)]

    def speed(cell: Cell) -> float:
        return 4e3 if cell.framework == "jax" and cell.variant.startswith("a") else 1e3

    found = speeds_of(of_speeds(tmp_path, plan("x", ("a", *rates, "b"), TWO), speed))
    ratio = found.ratios["jax"]
    assert (ratio.n, ratio.over) == (2, "recipes")
    assert ratio.value == pytest.approx(2)  # not 4^(14/15)
    half = math.tan(0.475 * math.pi) * math.log(2)  # Cauchy's quantile, and s / sqrt(2)
    assert (ratio.low, ratio.high) == pytest.approx((2 * math.exp(-half), 2 * math.exp(half)))
    assert words.over_text(found) == "2 recipes"


def test_variants_of_one_recipe_have_an_interval_over_the_seeds_that_all_have(
    tmp_path: Path,
) -> None:
    """Seed 3 has no speed in one of the variants, so two seeds are left."""
    experiment = plan("x", ("a", "a+layers=3"), TWO)
    factors = {("a", 1): 2.0, ("a", 2): 3.0, ("a+layers=3", 1): 8.0, ("a+layers=3", 2): 3.0}

    def speed(cell: Cell) -> float:
        factor = factors.get((cell.variant, cell.seed), 100.0)
        return 1e3 * (factor if cell.framework == "jax" else 1.0)

    of_speeds(tmp_path, experiment, speed)
    [lost] = [c for c in experiment.cells if (c.framework, c.variant, c.seed) == ("jax", "a", 3)]
    (tmp_path / "cells" / lost.path / "metrics.json").unlink()
    ratio = speeds_of(analysed(tmp_path, experiment)).ratios["jax"]
    assert (ratio.n, ratio.over) == (2, "seeds")
    assert ratio.value == pytest.approx(math.sqrt(4 * 3))  # of sqrt(2 * 8) and sqrt(3 * 3)


def test_a_run_that_experiments_share_counts_once(tmp_path: Path) -> None:
    both = of_speeds(tmp_path, plan("x", ("a", "b"), TWO), planted)
    one = of_speeds(tmp_path, plan("y", ("a",), TWO), planted)
    assert speeds_of(both, one, one).ratios == speeds_of(both).ratios


def test_of_one_variant_the_interval_is_over_its_seeds(tmp_path: Path) -> None:
    factors = {1: 2.0, 2: 2.2, 3: 1.9}

    def speed(cell: Cell) -> float:
        return 1000.0 * (factors[cell.seed] if cell.framework == "jax" else cell.seed)

    ratio = speeds_of(of_speeds(tmp_path, plan("x", ("a",), TWO), speed)).ratios["jax"]
    logs = [math.log(factor / seed) for seed, factor in factors.items()]
    low, high = stats.t.interval(0.95, 2, sum(logs) / 3, stats.sem(logs))
    assert (ratio.n, ratio.over) == (3, "seeds")
    assert (ratio.low, ratio.high) == pytest.approx((math.exp(low), math.exp(high)))


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        (
            {"cells_at_once": 3},
            "Up to 3 runs, those of other studies included, shared a machine, so",
        ),
        ({"cells_at_once": None}, "It was not recorded whether runs shared their machine, so"),
    ],
)
def test_speeds_of_runs_that_shared_their_machine_give_no_factor(
    tmp_path: Path, facts: Mapping[str, object], said: str
) -> None:
    found = of_speeds(tmp_path, plan("x", ("a",), TWO), planted, **facts)
    assert compare_speeds(groups_of([found])) is None
    assert words.speed_sentence(None, found.rows).startswith(said)
    perplexities = compare_perplexities([found])
    assert perplexities.all_equivalent
    known, title, why = (each.text for each in opening(None, found.rows, perplexities))
    assert known.startswith("Perplexity depends on the framework by less than 2.0 %: the one pair")
    assert title == "No two frameworks have speeds that can be compared"
    assert why.startswith(said)
    assert "folders of these runs under results/cells and run them again with --cores 1" in why


@pytest.mark.parametrize(
    ("job", "accelerator", "fair"),
    [("7", "cuda", True), (None, "cuda", False), ("7", "cpu", False)],
)
def test_gpus_that_slurm_gave_to_one_job_are_shared_with_nobody(
    tmp_path: Path, job: str | None, accelerator: str, fair: bool
) -> None:
    """The node's GPUs are recorded with runs on its CPUs, too, which do share those."""
    facts = {"cells_at_once": 4, "gpus": [{"name": "H100"}], "slurm_job": job}
    experiment = plan("x", ("a",), TWO, accelerators=dict.fromkeys(TWO, accelerator))
    found = compare_speeds(groups_of([of_speeds(tmp_path, experiment, planted, **facts)]))
    assert (found is not None) is fair


def test_speeds_beside_other_processes_give_no_factor(tmp_path: Path) -> None:
    experiment = plan("x", ("a",), TWO)
    of_speeds(tmp_path, experiment, planted)
    disturbed = experiment.cells[0]
    hardware = Hardware(
        seconds=9, cores=2, threads=1, own_cores=0.7, other_cores=1.3, memory_bytes=1,
        sampling_seconds=0,
    )  # fmt: skip
    path = tmp_path / "cells" / disturbed.path / "provenance.json"
    machine = path.read_text()
    write_cell(tmp_path, metrics(disturbed, 4.7, tokens_per_second=9.0, hardware=hardware))
    path.write_text(machine)
    found = analysed(tmp_path, experiment)
    lines = {line.path: line.note for row in found.rows for line in row.cells}
    assert {path for path, note in lines.items() if note} == {disturbed.path}
    assert str(lines[disturbed.path]).endswith("used 1.3 of 2 cores, and the run had 1 thread")
    assert compare_speeds(groups_of([found])) is None
    assert "Other processes took cores that 1 run could" in words.speed_sentence(None, found.rows)


def test_a_run_that_had_its_machine_to_itself_outvotes_those_that_shared(tmp_path: Path) -> None:
    alone = of_speeds(tmp_path, plan("x", ("b",), TWO), planted)
    shared = of_speeds(tmp_path, plan("y", ("a",), TWO), planted, cells_at_once=2)
    found = speeds_of(alone, shared)
    assert found.ratios["jax"].value == pytest.approx(1.0)


@pytest.mark.parametrize(
    "other", [{"cpu": "B", "cells_at_once": 1}, {"cpu": "A", "cells_at_once": 3}], ids=str
)
def test_speeds_on_other_machines_or_beside_more_runs_do_not_compare(
    tmp_path: Path, other: dict[str, object]
) -> None:
    experiment = plan("x", ("a",), TWO)
    of_speeds(tmp_path, experiment, planted)
    for cell in experiment.cells:
        if cell.framework == "jax":
            path = tmp_path / "cells" / cell.path / "provenance.json"
            path.write_text(json.dumps(other))
    found = analysed(tmp_path, experiment)
    assert compare_speeds(groups_of([found])) is None
    assert "To compare speeds, remove the folders" in words.speed_sentence(None, found.rows)


def test_frameworks_on_another_machine_are_named_as_apart(tmp_path: Path) -> None:
    """Three on one machine are compared; two slower ones on another are no reference."""
    experiment = plan("x", ("a",), ("pytorch", "tensorflow", "jax", "mxnet", "keras"))
    slow = {"mxnet": 3.0, "keras": 1.0}
    of_speeds(tmp_path, experiment, lambda cell: slow.get(cell.framework, 50.0 + cell.seed))
    for cell in experiment.cells:
        if cell.framework in slow:
            path = tmp_path / "cells" / cell.path / "provenance.json"
            path.write_text(json.dumps({"cpu": "B", "cells_at_once": 1}))
    found = speeds_of(analysed(tmp_path, experiment))
    assert found.ratios.keys() == {"pytorch", "tensorflow", "jax"}
    assert found.apart == ("keras", "mxnet")
    assert "same kind of machine, alone: Keras and MXNet." in words.speed_sentence(found, [])
    assert "of 3 frameworks that can be compared" in words.speed_title(found, [])


def test_a_framework_that_does_not_compare_with_the_slowest_is_apart(tmp_path: Path) -> None:
    """Keras ran beside JAX alone, and JAX beside MXNet, the slowest."""
    first = of_speeds(
        tmp_path,
        plan("x", ("a",), ("keras", "jax")),
        lambda c: 3e3 if c.framework == "jax" else 2e3,
    )
    second = of_speeds(
        tmp_path,
        plan("y", ("b",), ("mxnet", "jax")),
        lambda c: 3e3 if c.framework == "jax" else 1e3,
    )
    found = speeds_of(first, second)
    assert found.reference == "mxnet"
    assert found.ratios.keys() == {"jax", "mxnet"}
    assert found.apart == ("keras",)


def test_rows_whose_seeds_all_diverged_have_no_result_to_compare(tmp_path: Path) -> None:
    experiment = plan("x", ("a",), TWO)
    for cell in experiment.cells:
        if cell.framework == "jax":
            write_diverged(tmp_path, cell)
        else:
            write_cell(tmp_path, metrics(cell, 4.7))
    found = compare_perplexities([analysed(tmp_path, experiment)])
    assert (sum(found.verdicts.values()), found.missing, found.p) == (0, 1, None)


def test_a_framework_without_a_result_is_missing_and_not_inconclusive(tmp_path: Path) -> None:
    experiment = plan("x", ("a",), ("pytorch", "jax", "mxnet"))
    for cell in experiment.cells:
        if cell.framework != "mxnet":
            write_cell(tmp_path, metrics(cell, 4.7 + 1e-4 * cell.seed))
    found = compare_perplexities([analysed(tmp_path, experiment)])
    assert (found.verdicts["equivalent"], found.missing) == (1, 2)
    assert not found.all_equivalent  # the claim is of all
    assert words.perplexity_sentence(found).endswith("and 2 more have no result.")


def test_a_lead_within_its_interval_is_shared(tmp_path: Path) -> None:
    def speed(cell: Cell) -> float:
        seed = cell.seed if cell.framework == "keras" else 4 - cell.seed
        noise = 1 + 0.01 * seed
        return 1000.0 * noise * (1.5 if cell.framework != "mxnet" else 1.0)

    found = speeds_of(of_speeds(tmp_path, plan("x", ("a",), ("keras", "mxnet", "jax")), speed))
    assert sorted(found.leaders()) == ["jax", "keras"]
    assert found.reference == "mxnet"
    title = words.speed_title(found, [])
    assert "JAX" in title
    assert "Keras" in title
    assert "train fastest, up to 1.5" in title


def test_one_seed_proves_nothing_and_says_so(tmp_path: Path) -> None:
    found = speeds_of(of_speeds(tmp_path, plan("x", ("a",), TWO, seeds=(1,)), planted))
    assert words.speed_title(found, []) == "No framework is proven faster than all others"
    assert words.speed_sentence(found, []) == (
        "JAX trained 2.00 times as fast as PyTorch, by 1 seed alone, which gives no interval."
    )


def test_frameworks_that_never_ran_the_same_variant_are_not_compared(tmp_path: Path) -> None:
    analyses = [
        of_speeds(tmp_path, plan("x", ("a",), ("pytorch",)), planted),
        of_speeds(tmp_path, plan("y", ("b",), ("jax",)), planted),
    ]
    assert compare_speeds(groups_of(analyses)) is None
    assert words.speed_title(None, []) == "No two frameworks have speeds that can be compared"


def test_memory_is_compared_alike(tmp_path: Path) -> None:
    experiment = plan("x", ("a", "b"), TWO)
    for cell in experiment.cells:
        size = 3e8 if cell.framework == "jax" else 6e8
        write_cell(tmp_path, metrics(cell, 4.7, peak_memory_bytes=int(size)))
    found = compare(groups_of([analysed(tmp_path, experiment)]), "peak_memory_bytes")
    assert found is not None
    assert found.reference == "jax"
    assert found.ratios["pytorch"].value == pytest.approx(2.0)


def test_perplexities_of_one_law_do_not_differ_and_others_do(tmp_path: Path) -> None:
    law = {"pytorch": 4.7, "mxnet": 4.7, "jax": 4.9}
    alike = plan("alike", ("a",), ("pytorch", "mxnet"))
    unlike = plan("unlike", ("b",), tuple(law))
    for experiment in (alike, unlike):
        write_results(tmp_path, experiment, law, noise=0.001)
    first, second = analysed(tmp_path, alike), analysed(tmp_path, unlike)
    same = compare_perplexities([first, first])
    assert sum(same.verdicts.values()) == 1
    assert same.all_equivalent
    said = words.perplexity_sentence(same)
    assert said.startswith("Perplexity depends on the framework by less than 2.0 %: the one")
    assert re.search(r"\(tested together, p (= 0\.0\d\d|< 0\.001)\)\.$", said)
    both = compare_perplexities([first, second])
    assert both.verdicts == {"equivalent": 2, "different": 2}
    assert both.couples["pytorch", "mxnet"].verdicts == {"equivalent": 2}
    assert both.couples["pytorch", "jax"].difference == pytest.approx(-0.2, abs=0.01)
    assert {analysis.name for analysis, _ in both.different} == {"unlike"}
    assert words.perplexity_sentence(both) == (
        "Of 4 comparisons of frameworks, 3 pairs by variants and devices, 2 are equivalent "
        "within 2.0 % and 2 differ after Holm's correction within each experiment (PyTorch and "
        "JAX; MXNet and JAX)."
    )
