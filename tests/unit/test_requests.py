"""What jobs ask for follows what runs like them have used."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from tests.support.fake_results import metrics, score_of, write_cell

from ptbench.analysis.collect import CorpusFacts, collect_rows
from ptbench.analysis.experiment import analyse
from ptbench.analysis.plan import plan_experiment
from ptbench.configuration.requests import SEEDS, SMOKE
from ptbench.configuration.specification import Cell
from ptbench.configuration.study import Study, load_study
from ptbench.model.work import START_UP
from ptbench.report.runs import asked_over_used, runs_of
from ptbench.training.records import Seconds

TOKENS = {"train": 929_589, "valid": 73_760, "test": 82_430}
CLOCKS = {"training": 1000.0, "validation": 130.0, "test": 50.0, "total": 1220.0}
PATH = "zaremba-small/jax/devices-1/seed-1"


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    """Nothing has been run yet, but the corpus is there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus.json").write_text(json.dumps({"tokens": TOKENS, "vocabulary_size": 10_000}))
    return load_study({"experiments": ["zaremba-small"]})


def asked(study: Study, times: int = 1) -> tuple[int, int]:
    """Return what the cell asks for, as a new Snakemake would find it."""
    study.__dict__.pop("_requests", None)
    return (
        study.memory_megabytes(PATH, "corpus.json", times),
        study.runtime_minutes(PATH, "corpus.json", times),
    )


def finish(study: Study, seed: int = 2, budget: str = "", **changes: Any) -> None:
    """Write the result of another seed, or of the same in a budget."""
    cell = Cell(variant=f"zaremba-small{budget}", framework="jax", devices=1, seed=seed)
    fields = {"fingerprint": study.fingerprint(cell.path), "seconds": Seconds(**CLOCKS)}
    write_cell(Path("results"), metrics(cell, 4.7, **(fields | changes)))


def test_before_anything_has_finished_it_is_the_bound(study: Study) -> None:
    bound = asked(study)
    for changes in ({"fingerprint": "0" * 12}, {"status": "diverged"}):
        finish(study, **changes)  # of another recipe, and one that ended early
        assert asked(study) == bound
    Path("results/cells/zaremba-small/jax/devices-1/seed-2/metrics.json").write_text("{")
    assert asked(study) == bound


def test_other_seeds_say_what_is_used_and_the_largest_counts(study: Study) -> None:
    bound = asked(study)
    finish(study, peak_memory_bytes=800_000_000)
    finish(study, seed=3, peak_memory_bytes=900_000_000)
    assert asked(study) == (SEEDS.memory * 900, math.ceil((START_UP + SEEDS.time * 1220) / 60))
    assert asked(study)[0] < bound[0]
    assert asked(study)[1] < bound[1]
    # One that stopped after 10 of 13 epochs, which are all that another may take.
    finish(study, seed=4, epochs=10, best_epoch=9)
    seconds = 1220 + 3 / 10 * 1130
    assert asked(study)[1] == math.ceil((START_UP + SEEDS.time * seconds) / 60)


def test_a_job_that_ran_out_asks_for_the_bound_at_least(study: Study) -> None:
    twice = asked(study, times=2)
    finish(study, peak_memory_bytes=100_000_000)
    assert asked(study, times=2) == twice
    finish(study, peak_memory_bytes=50_000_000_000)
    assert asked(study, times=2)[0] == 2 * SEEDS.memory * 50_000


def test_a_smoke_run_is_scaled_to_the_epochs_and_the_corpus(study: Study) -> None:
    used = {"total": 30.0, "training": 2.0, "validation": 1.0, "test": 0.5, "accuracy": 0.3}
    finish(
        study, seed=1, budget="+budget=smoke", seconds=Seconds(**used), epochs=1, best_epoch=1,
        valid=score_of(5, 1000), test=score_of(5, 100), tokens_per_second=2000.0,
        peak_memory_bytes=600_000_000,
    )  # fmt: skip
    epoch = TOKENS["train"] / 2000 + TOKENS["valid"] / 1000 * 1.0
    seconds = 26.2 + 13 * epoch + (0.5 + 0.3) * TOKENS["test"] / 100
    expected = SMOKE.memory * 600, math.ceil((START_UP + SMOKE.time * seconds) / 60)
    assert asked(study) == expected
    finish(study)  # a whole run knows better
    assert asked(study) != expected


@pytest.mark.parametrize("budget", ["quick", "smoke"])
def test_a_smoke_run_tells_nothing_of_other_budgets(study: Study, budget: str) -> None:
    finish(study, seed=1, budget="+budget=smoke")
    reduced = load_study({"experiments": ["zaremba-small"], "budget": budget, "seeds": [2]})
    path = f"zaremba-small+budget={budget}/jax/devices-1/seed-2"
    minutes = reduced.runtime_minutes(path, "corpus.json")
    if budget == "smoke":  # it is its own row
        assert minutes == math.ceil((START_UP + SEEDS.time * (90 + 1130 / 13)) / 60)
    else:
        Path("results/cells").rename("elsewhere")
        again = load_study({"experiments": ["zaremba-small"], "budget": budget, "seeds": [2]})
        assert again.runtime_minutes(path, "corpus.json") == minutes


def test_a_smoke_run_of_what_a_search_has_yet_to_find_is_left_aside(study: Study) -> None:
    """A study knows the winner of a search under its name once there is one."""
    row = "singh-search-lstm2-winner-1+budget=smoke/keras/devices-1"
    Path("results/cells", row, "seed-1").mkdir(parents=True)
    assert study.used_by(row) == []


def test_no_job_asks_for_more_than_the_configuration_allows(study: Study) -> None:
    finish(study)
    limited = load_study({"experiments": ["zaremba-small"], "max_memory": 700, "max_runtime": 20})
    assert asked(limited) == (700, 20)


def test_the_report_says_how_many_times_as_much_as_they_used_jobs_asked_for(study: Study) -> None:
    for seed, attempts in ((2, 1), (3, 2)):
        finish(study, seed=seed, peak_memory_bytes=500_000_000, attempts=attempts)
        folder = Path(f"results/cells/zaremba-small/jax/devices-1/seed-{seed}")
        facts = json.loads((folder / "provenance.json").read_text())
        facts |= {"asked_megabytes": 1000 * seed, "asked_minutes": 61}
        (folder / "provenance.json").write_text(json.dumps(facts))
    plan = plan_experiment(study, "zaremba-small")
    analysis = analyse(plan, collect_rows(plan, Path("results")), CorpusFacts(), [])
    found = asked_over_used(runs_of(analysis.rows, Path("results")).values())
    assert found["memory"] == (2, 5.0, 4.0, 6.0)
    assert found["time"] == (1, 3.0, 3.0, 3.0)  # an attempt's time is not that of several
    assert asked_over_used([]) == {}
