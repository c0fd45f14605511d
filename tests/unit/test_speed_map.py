"""The map of speeds holds shares of the fastest framework, formed from what all of them ran."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.fake_results import metrics, plan, write_cell, write_unknown

from ptbench.analysis.experiment import Analysis
from ptbench.report.experiment import analyse_experiment
from ptbench.report.speed_map import draw_speed_map, relative_speeds

# By variant and framework [tokens/s]; JAX has not run the second variant of `second`.
SPEEDS = {
    "first": {"a": {"pytorch": 100.0, "jax": 200.0}, "b": {"pytorch": 100.0, "jax": 50.0}},
    "second": {
        "c": {"pytorch": 300.0, "jax": 100.0, "keras": 150.0},
        "d": {"pytorch": 900.0, "keras": 90.0},
    },
}


def analyses_of(results: Path, alone: bool = True) -> list[Analysis]:
    found = []
    for name, variants in SPEEDS.items():
        experiment = plan(name, list(variants), ["pytorch", "keras", "jax"], seeds=[1, 2])
        for cell in experiment.cells:
            if speed := variants[cell.variant].get(cell.framework):
                write_cell(results, metrics(cell, 4.6, tokens_per_second=speed))
        if not alone:
            write_unknown(results)
        folder = results / "experiments" / name
        found.append(analyse_experiment(experiment, results, results / "none", folder))
    return found


def test_shares_are_geometric_means_over_what_all_frameworks_ran(tmp_path: Path) -> None:
    first, second = analyses_of(tmp_path)
    shares = relative_speeds([first, second])
    assert list(shares.columns) == ["pytorch", "keras", "jax"]
    assert shares.loc["first", ["pytorch", "jax"]].tolist() == pytest.approx([1, 1])
    # of variant c alone, which JAX ran too
    assert shares.loc["second"].tolist() == pytest.approx([1, 1 / 2, 1 / 3])
    assert shares.loc["first"].isna().tolist() == [False, True, False]


def test_speeds_that_do_not_compare_are_left_out(tmp_path: Path) -> None:
    """Runs that may have shared their machine; and an unusable row, of which two seeds failed."""
    assert relative_speeds(analyses_of(tmp_path / "shared", alone=False)).empty
    first, second = analyses_of(tmp_path)
    rows = [row.model_copy(update={"usable": row.framework != "jax"}) for row in second.rows]
    shares = relative_speeds([first, second.model_copy(update={"rows": tuple(rows)})])
    assert shares.loc["second", ["pytorch", "keras"]].tolist() == pytest.approx(
        [1, (1 / 2 * 1 / 10) ** 0.5]
    )
    assert shares.loc["second"].isna().tolist() == [False, False, True]
    rows = [
        row.model_copy(update={"machines": ("B",)}) if row.framework == "keras" else row
        for row in second.rows
    ]
    shares = relative_speeds([first, second.model_copy(update={"rows": tuple(rows)})])
    assert list(shares.index) == ["first"]


def test_one_experiment_has_a_row_for_each_variant(tmp_path: Path) -> None:
    shares = relative_speeds(analyses_of(tmp_path)[:1])
    assert shares.to_numpy().ravel().tolist() == pytest.approx([0.5, 1, 1, 0.5])


def test_the_drawing_says_who_is_fastest_and_there_is_none_of_one_row(tmp_path: Path) -> None:
    first, second = analyses_of(tmp_path)
    drawn = draw_speed_map([first, second])
    assert drawn is not None
    assert "0.33" in drawn.svg
    assert drawn.words == "Of 2 rows, PyTorch is fastest in 2 (not tested)."
    single = first.model_copy(update={"rows": [r for r in first.rows if r.variant == "a"]})
    assert draw_speed_map([single]) is None


def test_without_any_speed_there_is_no_drawing(tmp_path: Path) -> None:
    first, _ = analyses_of(tmp_path)
    assert draw_speed_map([first.model_copy(update={"rows": ()})]) is None


def test_long_labels_leave_room_for_the_map(tmp_path: Path) -> None:
    first, second = analyses_of(tmp_path)
    drawn = draw_speed_map([first.model_copy(update={"name": "x" * 150}), second])
    assert drawn is not None
    assert "x" * 33 + "…" in drawn.svg
