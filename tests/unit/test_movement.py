"""Two results folders: rows that moved are told from rows that did not."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from tests.support.fake_results import plan, write_results, write_unknown

from ptbench.analysis.collect import CorpusFacts, collect_rows
from ptbench.analysis.experiment import Analysis, analyse
from ptbench.analysis.movement import Comparison, compare_folders
from ptbench.report.movement import show

FRAMEWORKS = ("pytorch", "mxnet", "jax")
SEEDS = tuple(range(1, 6))


def folder(
    results: Path, nll: float | Mapping[str, float], speed: Mapping[str, float], seed: int
) -> list[Analysis]:
    experiment = plan("x", ("a", "b"), FRAMEWORKS, seeds=SEEDS)
    write_results(results, experiment, nll, noise=0.002, speed=speed, seed=seed)
    write_unknown(results)
    return [analyse(experiment, collect_rows(experiment, results), CorpusFacts(), [])]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """MXNet became worse, JAX slower, and PyTorch stayed."""
    tmp_path = tmp_path_factory.mktemp("folders")
    first = folder(tmp_path / "first", 4.7, {}, 1)
    law = {"pytorch": 4.7, "mxnet": 4.75, "jax": 4.7}
    return compare_folders(first, folder(tmp_path / "second", law, {"jax": 5000.0}, 2))


def test_planted_movements_are_found_and_nothing_else(found: Comparison) -> None:
    moved = {change.framework: change for change in found.changes if change.moved}
    assert moved.keys() == {"mxnet", "jax"}
    assert moved["mxnet"].verdict == "different"
    assert moved["mxnet"].change == pytest.approx(0.05, abs=0.01)
    assert not moved["mxnet"].slower_or_faster
    assert moved["jax"].verdict == "equivalent"
    assert moved["jax"].speed == pytest.approx(0.5, rel=0.1)
    assert moved["jax"].speed_low is not None
    assert moved["jax"].speed_high is not None
    assert moved["jax"].speed_low < 0.5 < moved["jax"].speed_high
    assert all(change.seeds == len(SEEDS) for change in found.changes)


def test_a_speed_and_its_interval_are_of_geometric_means(tmp_path: Path) -> None:
    first = folder(tmp_path / "first", 4.7, {}, 1)
    second = folder(tmp_path / "second", 4.7, {"jax": 5000.0}, 2)
    for change in compare_folders(first, second).changes:
        old, new = (
            np.log(row.seeds("tokens_per_second"))
            for [analysis] in (first, second)
            for row in analysis.rows
            if (row.variant, row.framework) == (change.variant, change.framework)
        )
        assert change.speed == pytest.approx(math.exp(new.mean() - old.mean()))
        assert change.speed_low is not None
        assert change.speed_high is not None
        assert change.speed == pytest.approx(math.sqrt(change.speed_low * change.speed_high))


def test_a_folder_beside_itself_is_the_same_and_what_one_lacks_is_named(tmp_path: Path) -> None:
    first = folder(tmp_path, 4.7, {}, 1)
    rows = tuple(row for row in first[0].rows if row.framework != "jax")
    found = compare_folders(first, [first[0].model_copy(update={"rows": rows})])
    assert {change.verdict for change in found.changes} == {"same"}
    assert not [change for change in found.changes if change.moved]
    assert found.only_first == ("a/jax/devices-1", "b/jax/devices-1")
    assert found.only_second == ()


def test_what_is_printed_has_the_rows_that_moved(
    found: Comparison, capsys: pytest.CaptureFixture[str]
) -> None:
    show(found, every=False, console=Console(width=120))
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "6 rows in both. Test perplexity: 0 the same, 4 equivalent within 2.0 %, 2 differ" in said
    )
    assert "a, MXNet, 1 device" in said
    assert "a, PyTorch" not in said
    assert "no fair comparison" in said  # the drawn runs do not say that they had a machine alone
