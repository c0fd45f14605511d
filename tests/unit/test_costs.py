"""What a study takes: from finished runs where there are any, and from bounds elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.support.checkpoints import small_corpus
from tests.support.fake_results import metrics, write_cell

from ptbench.analysis.costs import LINE_TOKENS, Costs, Estimator, planned_size
from ptbench.backends import FRAMEWORKS as FIVE
from ptbench.cli import load, main
from ptbench.configuration.specification import Cell
from ptbench.configuration.study import Study, load_study
from ptbench.corpus import CorpusError
from ptbench.corpus.definitions import CORPUS_DEFINITION
from ptbench.corpus.prepare import prepare
from ptbench.model import work
from ptbench.model.work import CorpusSize
from ptbench.report.costs import costs_of, left_sentence, time_left, too_large
from ptbench.report.status import CellStatus
from ptbench.training.records import Seconds, score

PTB = {"train": 929_589, "valid": 73_760, "test": 82_430}
SECONDS = Seconds(
    load=1, start_up=9, compile=10, training=1000, validation=130, test=50, accuracy=10,
    checkpointing=10, total=1270,
)  # fmt: skip


@pytest.fixture
def study() -> Study:
    return load_study({"experiments": ["zaremba-small", "zaremba-medium"], "seeds": [1, 2]})


def finish(study: Study, results: Path, variant: str, seed: int, **changes: Any) -> Cell:
    """Write the result of a run on one device in PyTorch."""
    cell = Cell(variant=variant, framework="pytorch", devices=1, seed=seed)
    fields = {
        "fingerprint": study.specification(variant).fingerprint,
        "seconds": SECONDS,
        "train": score(5e6, PTB["train"] - 1),
        "valid": score(5e5, PTB["valid"] - 1),
        "test": score(5e5, PTB["test"] - 1),
        "tokens_per_second": (PTB["train"] - 1) * 13 / 1000,
    }
    write_cell(results, metrics(cell, 4.7, **(fields | changes)))
    return cell


def cell_of(variant: str, seed: int) -> Cell:
    return Cell(variant=variant, framework="pytorch", devices=1, seed=seed)


def test_nothing_finished_leaves_the_bound_of_the_job(study: Study, tmp_path: Path) -> None:
    cell = cell_of("zaremba-small", 1)
    run = Estimator(study, tmp_path).run(cell)
    recipe = study.specification("zaremba-small").recipe
    minutes = work.runtime_minutes(recipe, "cpu", 1, CorpusSize(PTB, 10_000))
    assert (run.seconds, run.source) == (60 * minutes, "bound")
    assert run.disk_bytes == 4 * 4_651_600  # float32
    every = load_study(study.config.model_dump() | {"keep_checkpoints": "all"})
    assert Estimator(every, tmp_path).run(cell).disk_bytes == 3 * 4 * 4_651_600  # SGD has no slots


def test_finished_runs_and_other_seeds_take_what_was_measured(study: Study, tmp_path: Path) -> None:
    cell = finish(study, tmp_path, "zaremba-small", 1)
    estimator = Estimator(study, tmp_path)
    assert estimator.run(cell)[1:3] == (1270, "finished")
    assert estimator.run(cell_of("zaremba-small", 2))[1:3] == (1270, "other seeds")
    diverged = finish(study, tmp_path, "zaremba-medium", 1, status="diverged", test=None)
    estimator = Estimator(study, tmp_path)
    assert estimator.run(diverged)[1:3] == (1270, "finished")  # and is never run again
    total = costs_of(study.cells, estimator)
    assert len(total.left.runs) == len(total.runs) - 2
    assert left_sentence(Costs([], total.prices, "cpu"), 1) == "Nothing is left to run."


def test_another_model_takes_longer_by_its_products(study: Study, tmp_path: Path) -> None:
    finish(study, tmp_path, "zaremba-small", 1)
    run = Estimator(study, tmp_path).run(cell_of("zaremba-medium", 1))
    # Products of a token: 8 h^2 for each layer of h = e, and h words for the output.
    small = 2 * 8 * 200**2 + 200 * 10_000
    medium = 2 * 8 * 650**2 + 650 * 10_000
    assert run.source == "speeds"
    # 39 epochs for 13, and one token more in each split than can be predicted.
    # What is left: loading, start-up, compiling and checkpointing.
    expected = 80 + medium / small * (3 * (1000 + 130) + 50 + 10)
    assert run.seconds == pytest.approx(expected, rel=1e-3)
    # In a smaller budget too, of 2 epochs and few batches.
    quick = "zaremba-medium+budget=quick"
    recipe = study.specification(quick).recipe
    assert recipe.within_budget().epochs < 39
    bound = 60 * work.runtime_minutes(recipe, "cpu", 1, CorpusSize(PTB, 10_000))
    run = Estimator(study, tmp_path).run(cell_of(quick, 1))
    assert run.source == "speeds"
    assert run.seconds < bound
    kernel = "zaremba-small+kernel=stepwise"  # as fast as it is, and not as its products are
    assert Estimator(study, tmp_path).run(cell_of(kernel, 1)).source == "bound"


def test_the_same_model_in_other_frameworks_tells_more_than_other_models_do(
    study: Study, tmp_path: Path
) -> None:
    for seconds, framework in ((100, "jax"), (300, "mxnet"), (200, "keras")):
        cell = Cell(variant="zaremba-small", framework=framework, devices=1, seed=1)
        fingerprint = study.specification("zaremba-small").fingerprint
        measured = metrics(cell, 4.7, fingerprint=fingerprint, seconds=Seconds(total=seconds))
        write_cell(tmp_path, measured)
    finish(study, tmp_path, "zaremba-medium", 1)
    estimator = Estimator(study, tmp_path)
    assert estimator.run(cell_of("zaremba-small", 1))[1:3] == (200, "frameworks")
    two = cell_of("zaremba-small", 1).model_copy(update={"devices": 2})
    assert estimator.run(two).source == "bound"
    config = study.config.model_dump() | {"accelerators": {"pytorch": "cuda"}}
    assert (
        Estimator(load_study(config), tmp_path).run(cell_of("zaremba-small", 1)).source == "bound"
    )


def test_a_smoke_run_of_the_same_row_tells_what_the_whole_takes(
    study: Study, tmp_path: Path
) -> None:
    small = load_study({"experiments": ["zaremba-small"], "seeds": [1], "budget": "smoke"})
    tokens = {"train": score(5e4, 2400), "valid": score(5e3, 400), "test": score(5e2, 40)}
    seconds = Seconds(start_up=9, training=3, validation=2, test=1, accuracy=1, total=16)
    finish(
        small, tmp_path, "zaremba-small+budget=smoke", 1, seconds=seconds, epochs=1,
        tokens_per_second=1000.0, **tokens,
    )  # fmt: skip
    estimator = Estimator(study, tmp_path)
    run = estimator.run(cell_of("zaremba-small", 2))
    assert run.source == "smoke"
    assert run.memory_bytes == 1.5 * metrics(run.cell, 4.7).peak_memory_bytes
    # Six steps tell nothing of other models.
    assert estimator.run(cell_of("zaremba-medium", 2)).source == "bound"
    epoch = PTB["train"] / 1000 + 2 * PTB["valid"] / 400
    assert run.seconds == pytest.approx(9 + 13 * epoch + 2 * PTB["test"] / 40)


@pytest.mark.parametrize(
    "changes", [{"fingerprint": "0" * 12}, {"status": "diverged", "test": None}]
)
def test_other_recipes_and_diverged_runs_are_no_measure(
    study: Study, tmp_path: Path, changes: dict[str, Any]
) -> None:
    finish(study, tmp_path, "zaremba-small", 1, **changes)
    assert Estimator(study, tmp_path).run(cell_of("zaremba-small", 2)).source == "bound"


def test_the_error_is_that_of_the_speeds_of_other_models(study: Study, tmp_path: Path) -> None:
    finish(study, tmp_path, "zaremba-small", 1)
    assert Estimator(study, tmp_path).error() == []
    medium = finish(study, tmp_path, "zaremba-medium", 1, epochs=39)
    estimator = Estimator(study, tmp_path)
    recipe = study.specification("zaremba-medium").recipe
    seconds, _ = estimator.without_its_row(medium, recipe, estimator.size(recipe))
    assert 1270 / seconds in estimator.error()
    assert len(estimator.error()) == 2
    finish(study, tmp_path, "zaremba-large", 1)  # of no experiment here
    assert len(Estimator(study, tmp_path).error()) == 2


def test_gpus_and_cores_are_counted_and_paid_apart(tmp_path: Path) -> None:
    config = {"experiments": ["zaremba-small"], "seeds": 1, "accelerator": "cuda", "threads": 4}
    study = load_study(config | {"accelerators": {"mxnet": "cpu"}})
    total = costs_of(study.cells, Estimator(study, tmp_path))
    cores = [run for run in total.runs if run.accelerator == "cpu"]
    assert [(run.cell.framework, run.units) for run in cores] == [("mxnet", 4)]
    assert total.other_hours == cores[0].unit_hours
    gpus = sum(run.unit_hours for run in total.runs if run not in cores)
    assert total.unit_hours == pytest.approx(gpus)
    assert left_sentence(total, 4).endswith(
        f", and {total.other_hours:,.1f} core-hours beside them."
    )
    on_gpus = load_study(
        config | {"accelerator": "cpu", "accelerators": dict.fromkeys(FIVE, "cuda")}
    )
    assert Estimator(on_gpus, tmp_path).accelerator == "cuda"
    [mxnet] = cores
    under_way = [CellStatus(r.cell.path, r.cell, "running") for r in (mxnet, total.runs[0])]
    assert time_left(under_way, Estimator(study, tmp_path)).at_once == 1  # GPU, whatever cores
    assert total.money == pytest.approx(3.0 * gpus + 0.05 * total.other_hours)
    assert total.kilowatt_hours == pytest.approx((350 * gpus + 6 * total.other_hours) / 1000)


def test_runs_that_may_need_more_memory_than_there_is_are_named(
    study: Study, tmp_path: Path
) -> None:
    total = costs_of(study.cells, Estimator(study, tmp_path))
    sizes = sorted({run.memory_bytes for run in total.runs})
    assert too_large(total, 10**6) == []
    between = (sizes[-1] + sizes[-2]) // 2 // 10**6
    (sentence,) = too_large(total, between)
    most = [run for run in total.runs if run.memory_bytes == sizes[-1]]
    assert sentence.startswith(f"{len(most)} runs may need up to ")
    assert sentence.endswith(f"{most[0].cell.path}.")
    # A finished run tells what its row needs.
    finish(study, tmp_path, "zaremba-medium", 1, peak_memory_bytes=int(9e12))
    (sentence,) = too_large(costs_of(study.cells, Estimator(study, tmp_path)), 10**6)
    assert sentence.startswith(
        "1 run may need up to 9000.00 GB of main memory, and a node has (max_me"
    )


def test_no_schedule_is_shorter_than_its_longest_run(study: Study, tmp_path: Path) -> None:
    total = costs_of(study.cells, Estimator(study, tmp_path))
    longest = max(run.seconds for run in total.runs) / 3600
    assert total.hours(1) == pytest.approx(total.unit_hours)
    assert total.hours(10_000) == longest
    assert Costs([], total.prices, "cpu").hours(4) == 0


@pytest.mark.parametrize("process", ["markov", "high-rank", "zipf"])
def test_a_synthetic_corpus_has_about_the_size_that_its_definition_says(
    process: str, tmp_path: Path
) -> None:
    sizes: dict[str, dict[str, Any]] = {
        "markov": {"topics": 2, "openers_per_topic": 2, "content_words_per_topic": 4,
                   "function_words": 5, "topic_loyalty": 0.9, "closing_probability": 0.2},
        "high-rank": {"words": 20, "logit_deviation": 1.0},
        "zipf": {"words": 30},
    }  # fmt: skip
    definition = CORPUS_DEFINITION.validate_python(
        {"kind": "synthetic", "process": process, "train_tokens": 5000, "valid_tokens": 500,
         "test_tokens": 500} | sizes[process]
    )  # fmt: skip
    prepare("mine", definition, None, tmp_path / "downloads", tmp_path / "mine")
    prepared = work.corpus_size(str(tmp_path / "mine" / "corpus.json"))
    planned = planned_size("mine", definition)
    assert planned.vocabulary_size == prepared.vocabulary_size
    for split, count in planned.tokens.items():
        assert count <= prepared.tokens[split] < count + 250


def test_a_text_of_ones_own_is_counted_as_preparing_it_counts(tmp_path: Path) -> None:
    small_corpus(tmp_path)
    prepared = work.corpus_size(str(tmp_path / "corpora" / "small" / "corpus.json"))
    definition = CORPUS_DEFINITION.validate_python({"kind": "folder", "folder": tmp_path / "raw"})
    assert planned_size("mine", definition) == prepared
    assert planned_size("mine", definition, 2).tokens["train"] == 2 * LINE_TOKENS
    assert planned_size("mine", definition, 10**6) == prepared


def test_a_corpus_of_unknown_size_is_named() -> None:
    study = load_study({"experiments": ["zaremba-small"]})
    unknown = study.corpora["ptb"].model_copy(update={"size": None})
    with pytest.raises(CorpusError, match="corpus mine: its size is not known"):
        planned_size("mine", unknown)


def test_the_command_counts_every_run_once(capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "slurm/reproduction.yaml", "--gpus", "32", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["runs"] == len(load([Path("slurm/reproduction.yaml")]).cells)
    assert found["sources"] == {"bound": found["runs"]}
    assert sum(each["runs"] for each in found["experiments"].values()) > found["runs"]
    assert found["left_hours"] == pytest.approx(found["unit_hours"] / 32)


def test_the_plan_says_of_what_it_is_and_lists_dear_rows_while_there_is_something_to_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["experiments=demo", "frameworks=pytorch", "devices=1", "seeds=1"]
    command = ["plan", "--results", str(tmp_path), "--config", *asked]
    main(command)
    said = capsys.readouterr().out
    assert said.startswith(f"The study of config.yaml --config {' '.join(asked)}: demo.\n")
    assert "The dearest rows" not in said  # it takes less than an hour
    main([*command[:4], *asked[:1]])
    assert "The dearest rows" in capsys.readouterr().out
    seconds = SECONDS.model_copy(update={"total": 90})
    cell = load([], asked).cells[0]
    finish(load([], asked), tmp_path, cell.variant, 1, seconds=seconds)
    main(command)
    said = capsys.readouterr().out
    assert "2 min" in said
    assert "Nothing is left to run." in said


def test_a_study_is_planned_as_snakemake_would_run_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text("seeds: [1, 2, 3, 4]\nprices: {gpu_hour: 9}\n")
    Path("mine.yaml").write_text("seeds: 7\n")
    config = load([Path("mine.yaml")], ["frameworks=jax"]).config
    assert (config.prices.gpu_hour, config.seeds, config.frameworks) == (9, [7], ["jax"])
    Path("config.yaml").unlink()
    assert load([Path("mine.yaml")]).config.prices.gpu_hour == 3
