"""What frameworks take to a common perplexity, and what runs cost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.support.fake_results import metrics, plan, write_cell

from ptbench.analysis.collect import collect_rows
from ptbench.analysis.reaching import compare_reaching
from ptbench.configuration.specification import Cell
from ptbench.training.records import Epoch, Hardware, perplexity


def epoch(number: int, nll: float, seconds: float) -> Epoch:
    return Epoch(
        epoch=number, learning_rate=1, train_nll=nll, train_perplexity=perplexity(nll),
        valid_nll=nll, valid_perplexity=perplexity(nll), gradient_norm=1, tokens_per_second=10,
        training_seconds=seconds - 1, validation_seconds=1,
    )  # fmt: skip


HISTORIES = {
    "jax": [(5.0, 9.0), (4.0, 10.0), (4.0, 10.0)],  # ends at the highest of the lowest: e^4 = 54.60
    "mxnet": [(4.2, 30.0), (4.1, 30.0), (3.5, 40.0)],
}


def write(folder: Path, cell: Cell) -> None:
    history = [epoch(n + 1, *each) for n, each in enumerate(HISTORIES[cell.framework])]
    machine = Hardware(
        seconds=9, cores=4, threads=5, own_cores=4, other_cores=0, memory_bytes=1,
        sampling_seconds=0,
    )  # fmt: skip
    write_cell(folder, metrics(cell, 4.0, epochs=3, hardware=machine), history)


def test_time_and_rent_are_those_until_every_run_has_reached_the_perplexity(tmp_path: Path) -> None:
    experiment = plan(
        frameworks=("jax", "mxnet"), seeds=(1,), devices=(2,),
        accelerators={"jax": "cuda", "mxnet": "cpu"}, rents={"jax": 36.0, "mxnet": 7.2},
    )  # fmt: skip
    for cell in experiment.cells:
        write(tmp_path, cell)
        facts = tmp_path / "cells" / cell.path / "provenance.json"
        facts.write_text(json.dumps({"threads": 5, "cells_at_once": 1}))
    rows = collect_rows(experiment, tmp_path)
    (found,) = compare_reaching(rows)
    assert (found.devices, found.perplexity) == (2, 54.60)
    mxnet, jax = found.rows
    assert (jax.epochs.value, jax.seconds.value) == (2, 19)
    assert (mxnet.epochs.value, mxnet.seconds.value) == (3, 100)
    assert jax.rent is not None
    assert jax.rent.value == pytest.approx(19 * 2 * 36 / 3600)  # two GPUs
    assert mxnet.rent is not None
    assert mxnet.rent.value == pytest.approx(100 * 4 * 7.2 / 3600)  # five threads on four cores
    total = rows[1].results()[1].metrics.seconds.total
    assert rows[1].values("rent") == {1: pytest.approx(total * 2 * 36 / 3600)}


def test_where_the_cores_of_a_run_are_not_known_there_is_no_rent(tmp_path: Path) -> None:
    experiment = plan(frameworks=("jax", "mxnet"), seeds=(1,), rents={"jax": 1.0, "mxnet": 1.0})
    for cell in experiment.cells:
        write(tmp_path, cell)
    rows = collect_rows(experiment, tmp_path)
    assert [row.values("rent") for row in rows] == [{}, {}]
    assert [row.rent for row in compare_reaching(rows)[0].rows] == [None, None]


def test_one_framework_alone_is_compared_with_none(tmp_path: Path) -> None:
    experiment = plan(frameworks=("jax",), seeds=(1,))
    write(tmp_path, experiment.cells[0])
    assert compare_reaching(collect_rows(experiment, tmp_path)) == ()
