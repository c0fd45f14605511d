"""A search: its draws, its samplers, its selection and its page, and what it says of bad input."""

from __future__ import annotations

import csv
import json
import math
import random
import re
import sys
from pathlib import Path
from statistics import median
from typing import Any

import optuna
import pytest
import yaml
from tests.support.fake_results import metrics, score_of, write_cell
from tests.unit.test_configuration import folder_with

from ptbench.analysis import search as searching
from ptbench.analysis.collect import AnalysisError, collect_rows
from ptbench.analysis.plan import plan_experiment
from ptbench.analysis.search import Trial, next_points, propose, read_search, select, study_of
from ptbench.configuration.experiments import load_library
from ptbench.configuration.search import Question, draw_points, is_whole
from ptbench.configuration.specification import parse_cell_path
from ptbench.configuration.study import PlannedSearch, Study, load_study, read_study
from ptbench.environments import PYTHON
from ptbench.errors import ConfigurationError
from ptbench.files import write_atomically
from ptbench.model.recipe import Recipe
from ptbench.report.closing import print_results
from ptbench.report.opening import answers_to
from ptbench.report.search import write_search
from ptbench.report.site import RunFacts, Site
from ptbench.sharing.archive import run_cells
from ptbench.training.attempts import Attempt, has_failed
from ptbench.training.records import Metrics

ROOT = Path(__file__).parents[2]

SPACE = """{
  hidden_size: {low: 8, high: 64, log: true},
  embedding_size: {same_as: hidden_size},
  mixtures: {choices: [0, 2, 4]},
  latent_size: {low: 4, high: 16, when: {mixtures: [2, 4]}},
  learning_rate: {low: 0.1, high: 10, log: true},
  batch_size: {low: 10, high: 40, step: 10},
  dropout: {low: 0.2, high: 0.6, step: 0.05}}"""
LONG_SPACE = """{
  hidden_size: {low: 100, high: 999}, embedding_size: {low: 100, high: 999},
  learning_rate: {low: 0.1, high: 0.9}, dropout: {low: 0.1, high: 0.5},
  clip_norm: {low: 0.1, high: 0.9}, initialization_scale: {low: 0.01, high: 0.09},
  batch_size: {low: 10, high: 60}, sequence_length: {low: 10, high: 60},
  weight_decay: {low: 0.001, high: 0.009}, layers: {low: 3, high: 9}}"""
CONSTRAINT = "{product: [batch_size, sequence_length, hidden_size], at_most: 20000}"


def study_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, search: str, **config: Any
) -> Study:
    """Return the study of one search, `s`, of the recipe `r`."""
    (tmp_path / "workflow").mkdir()
    folder_with(
        tmp_path / "workflow", monkeypatch, f"recipes: {{r: {{}}}}\nsearch:\n  s: {search}\n"
    )
    return load_study({"experiments": ["s"], **config})


def usual(method: str = "random", trials: int = 20, full: int = 2, more: str = "") -> str:
    return (
        f"{{title: T, recipe: r, space: {SPACE}, constraint: {CONSTRAINT}, method: {method}, "
        f"trials: {trials}, generation: 10, full: {full}, short: {{budget: quick}}, "
        f"frameworks: [jax, pytorch], seed: 3{more}}}"
    )


BAD_SEARCHES = [
    ("{title: T, recipe: r, space: {}, trials: 3}", r"own.yaml, line 3: search.s.space: {} is not"),
    (
        "{title: T, recipe: r, space: {layers: {low: 1, high: 4}}, trials: 2}",
        r"own.yaml, line 3: search.s: full=3 winners are more than trials=2; run more trials",
    ),
    (
        "{title: T, recipe: r, trials: 3, space: {\n   hiden_size: {low: 1, high: 4}}}",
        r"own.yaml, line 4: search s: space: there is no recipe key \"hiden_size\"; did you mean h",
    ),
    (
        "{title: T, recipe: r, trials: 9, space: {layers: {low: 5, high: 9}},\n"
        "    constraint: {product: [layers, hidden_size], at_most: 900}}",
        r"own.yaml, line 3: search s: space: 1000 draws found no point that can be a trial, so .*; "
        r"the last one: layers × hidden_size = 1,\d+ is above 900",
    ),
    (
        "{title: T, recipe: r, trials: 9, space: {layers: {low: 1, high: 4}}}",
        r"search s: space: 1000 draws found no other point .*so there are 4 different trials of t",
    ),
    (
        "{title: T, recipe: r, trials: 3, space: {layers: {low: 4, high: 1}}}",
        r"own.yaml, line 3: search.s.space.layers: low=4 must not exceed high=1",
    ),
    (
        "{title: T, recipe: r, trials: 3, space: {layers: {low: 4}}}",
        r"own.yaml, line 3: search.s.space.layers: must have low and high, or choices, or same_as",
    ),
    (
        "{title: T, recipe: r, trials: 3, space: {dropout: {low: 0, high: 1, log: true}}}",
        r"search.s.space.dropout: log needs low above 0, and has no step",
    ),
    (
        "{title: T, recipe: r, trials: 3, space: {dropout: {low: 0.5, high: 1.5}}}",
        r"own.yaml, line 3: search s: space: dropout: 1.5 is not allowed: .*less than 1",
    ),
    (
        "{title: T, recipe: r, trials: 3, space: {layers: {low: 1, high: 3.5}}}",
        r"search s: space: layers: is a whole number; low, high and step must be too",
    ),
    (
        "{title: T, recipe: r, trials: 3, space: {rnn: {low: 1, high: 3}}}",
        r"search s: space: rnn: is no number; give its choices",
    ),
    (
        "{title: T, recipe: r, trials: 3, space: {rnn: {choices: [lstm, gur]}}}",
        r"search s: space: rnn: \"gur\" is not allowed: .*'gru'",
    ),
    (
        "{title: T, recipe: r, trials: 2, full: 1, space: {kernel: {choices: [fused, block]}}}",
        r"search s: frameworks: .* has kernel=block, which pytorch does not have",
    ),
    (
        "{title: T, recipe: r, trials: 3, set: {layers: 1}, space: {layers: {low: 1, high: 4}}}",
        r"search s: space: layers: is in set too; leave it in one",
    ),
    (
        "{title: T, recipe: r, trials: 3, space: {subset: {low: 1, high: 4}}}",
        r"search s: space: subset: must be the same in all runs; put it in set",
    ),
    (
        "{title: T, recipe: r, trials: 3, space: {embedding_size: {same_as: hidden_size}, "
        "hidden_size: {low: 1, high: 9}}}",
        r"space: embedding_size: depends on hidden_size, which must come before it",
    ),
    (
        "{title: T, recipe: r, trials: 3, short: {epoch: 1}, space: {layers: {low: 1, high: 4}}}",
        r"search s: short: r: there is no recipe key \"epoch\"; did you mean epochs",
    ),
    (
        "{title: T, recipe: r, trials: 3, set: {epoch: 1}, space: {layers: {low: 1, high: 4}}}",
        r"search s: set: r: there is no recipe key \"epoch\"; did you mean epochs",
    ),
    (
        "{title: T, recipe: q, trials: 3, space: {layers: {low: 1, high: 4}}}",
        r"own.yaml, line 3: search s: recipe: there is no recipe \"q\"",
    ),
    (
        "{title: T, recipe: r, trials: 3, methd: tpe, space: {layers: {low: 1, high: 4}}}",
        r"own.yaml, line 3: search.s.methd: there is no such key",
    ),
    (
        "{title: T, recipe: r, trials: 3, space: {layers: {low: 1, high: 4}},\n"
        "    constraint: {product: [rnn], at_most: 3}}",
        r"search s: constraint: rnn is no number in the recipe",
    ),
    (
        "{title: T, recipe: r, trials: 3, space: {clip_norm: {choices: [null, 1]}, "
        "layers: {low: 1, high: 4}},\n    constraint: {product: [clip_norm], at_most: 3}}",
        r"search s: constraint: clip_norm has the choice null, which is no number",
    ),
    (
        "{title: T, recipe: r, trials: 3, space: {layers: {low: 1, high: 4}},\n"
        "    short: {sequence_length: 70}, constraint: {product: [sequence_length], at_most: 60}}",
        r"found no point that can be a trial.*: sequence_length = 70 is above 60",
    ),
    (
        "{title: T, recipe: r, trials: 3, "
        "space: {dropout: {low: 0, high: 0.5, when: {rnn: [gruu]}}}}",
        r"search s: space: dropout: when: rnn: \"gruu\" is not allowed: .*'gru'",
    ),
    (
        "{title: T, recipe: r, trials: 3, space: {rnn: {choices: [lstm, gru]}, "
        "dropout: {low: 0, high: 0.5, when: {rnn: [rnn_tanh, gru]}}}}",
        r"search s: space: dropout: when: \"rnn_tanh\" is not among the choices of rnn",
    ),
    (
        "{title: T, recipe: r, trials: 3, space: {adam_beta1: {low: 0.5, high: 0.9}}}",
        r"search s: space: adam_beta1 has no effect with optimizer=sgd; leave it out",
    ),
    (
        "{title: T, recipe: r, trials: 3, space: {layers: {low: 1, high: 4}}, "
        "published: r+corpus=ptb}",
        r"search s: published: r\+corpus=ptb has corpus ptb, and the search synthetic, so perplex",
    ),
    (
        f"{{title: T, recipe: r, trials: 300, space: {LONG_SPACE}}}",
        r"search s: trials: a command that names them all would have 1\d\d,\d+ bytes, and Linux",
    ),
    (
        f"{{title: T, recipe: r, trials: 3, space: {LONG_SPACE}, short: {{budget: quick, "
        "constant_epochs: 1, epochs: 2}}",
        r"the name has 2\d\d characters and may have 200; put set and short into its recipe, sear",
    ),
]


@pytest.mark.parametrize(("search", "message"), BAD_SEARCHES)
def test_a_bad_search_is_refused_in_a_sentence_with_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, search: str, message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message) as refused:
        study_with(tmp_path, monkeypatch, search)
    assert "\n" not in str(refused.value)


def test_random_trials_are_planned_variants_within_the_space_and_the_constraint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_with(tmp_path, monkeypatch, usual())
    search = study.searches["s"]
    recipes = [study.specification(trial).recipe for trial in search.trials]
    assert len(set(search.trials)) == 20
    assert all(
        trial.startswith("r+batch_size=") or "+budget=quick" in trial for trial in search.trials
    )
    for recipe in recipes:
        assert recipe.batch_size * recipe.sequence_length * recipe.hidden_size <= 20_000
        assert 8 <= recipe.hidden_size == recipe.embedding_size <= 64
        assert 0.1 <= recipe.learning_rate <= 10
        assert recipe.batch_size in (10, 20, 30, 40)
        assert round(recipe.dropout / 0.05, 9).is_integer()
        assert (recipe.latent_size is not None) == (recipe.mixtures > 0)  # conditional
        assert recipe.budget == "quick"
    assert {recipe.mixtures for recipe in recipes} == {0, 2, 4}
    assert [cell.path for cell in study.experiments["s"].cells] == [
        f"{trial}/jax/devices-1/seed-1" for trial in search.trials
    ]
    winners = study.experiments["s-winners"].cells
    assert len(winners) == 2 * 2 * 3  # winners, frameworks and seeds
    assert study.specification("s-winner-1").recipe.budget == "full"


def test_more_trials_of_a_random_search_begin_with_the_same_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = study_with(tmp_path, monkeypatch, usual(trials=5)).searches["s"].trials
    text = (tmp_path / "workflow/experiments/own.yaml").read_text()
    file = tmp_path / "workflow/experiments/own.yaml"
    file.write_text(text.replace("trials: 5", "trials: 9"))
    assert load_study({"experiments": ["s"]}).searches["s"].trials[:5] == few
    file.write_text(text.replace("seed: 3", "seed: 4"))
    assert load_study({"experiments": ["s"]}).searches["s"].trials != few


def test_a_logarithmic_range_is_drawn_by_ratios(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = study_with(tmp_path, monkeypatch, usual()).searches["s"].space
    generator = random.Random(1)
    rates = [float(str(space.draw(generator)["learning_rate"])) for _ in range(2000)]
    assert abs(sum(rate < 1 for rate in rates) / 2000 - 0.5) < 0.05  # 4.5 standard errors


def test_a_search_is_run_only_if_it_is_asked_for_by_name() -> None:
    library = load_library()
    assert {"singh-search-lstm2", "singh-search-mos", "zhang-search"} <= library.searches.keys()
    for everything in ({"experiments": "all"}, {"papers": list(library.papers)}):
        assert not load_study(everything).searches


@pytest.mark.parametrize("name", load_library().searches)
def test_every_search_of_a_document_can_be_planned(name: str) -> None:
    study = load_study({"experiments": [name]})
    planned = study.experiments[name]
    asked = load_library().searches[name]
    assert len(planned.cells) == asked.trials + (asked.published is not None)


def test_what_a_configuration_changes_is_part_of_a_search_s_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_with(tmp_path, monkeypatch, usual("tpe"), budget="smoke", frameworks=["pytorch"])
    search = study.searches["s+budget=smoke"]
    assert search.trials[0] == "s-trial-1+budget=smoke"
    assert search.selection == "results/searches/s+budget=smoke/selection.json"
    assert search.framework == "pytorch"
    assert study.specification(search.trials[0]).recipe.budget == "smoke"
    assert study.specification(search.winners[0]).recipe.budget == "smoke"


@pytest.fixture
def learning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Study, PlannedSearch, Path]:
    """A search of two generations, and its results folder in the working directory."""
    study = study_with(tmp_path, monkeypatch, usual("tpe"))
    monkeypatch.chdir(tmp_path)
    return study, study.searches["s"], tmp_path / "results"


def law(point: Any) -> float:
    """A made-up validation nll: wide layers and rates near 1 are good."""
    rate = float(point["learning_rate"])
    return 4.0 + 0.5 * abs(rate - 1) / (rate + 1) - 0.01 * float(point["hidden_size"])


def write_result(study: Study, cell: str, nll: float | None) -> None:
    """Write a run's metrics.json; None: it diverged."""
    made = metrics(parse_cell_path(cell), nll or 9.0, fingerprint=study.fingerprint(cell))
    changes: dict[str, Any] = {"valid": score_of(nll) if nll else None}
    if nll is None:
        changes |= {"status": "diverged", "reason": "not finite", "test": None}
    made = made.model_copy(update=changes)
    write_cell(Path("results"), made, () if nll is None else None)


def fail(study: Study, cell: str) -> None:
    """Write the record of an attempt that failed."""
    fingerprint = study.fingerprint(cell)
    assert fingerprint
    attempt = Attempt(Path("results/attempts") / cell, cell, fingerprint, "d")
    assert attempt.open(Path("results/cells") / cell) is None
    attempt.close("failed", "MemoryError: no room")


def finish_generation(study: Study, number: int, results: Path) -> dict[str, Any]:
    """Propose a generation and write what its trials came to."""
    search = study.searches["s"]
    found = propose(search.question(number), results)
    write_atomically(Path(search.generation(number)), json.dumps(found))
    for trial, point in zip(search.generations[number - 1], found["points"], strict=True):
        write_result(study, search.cell(trial), law(point))
    return found


def test_a_learned_trial_is_read_from_the_file_of_its_generation(
    learning: tuple[Study, PlannedSearch, Path],
) -> None:
    study, search, results = learning
    trial = search.trials[0]
    with pytest.raises(FileNotFoundError) as missing:
        study.text(trial, "pytorch")
    assert missing.value.filename == search.generation(1) == study.found_in(trial)
    stand_in = study.specification(trial)
    assert stand_in.variant == trial  # for estimates
    found = finish_generation(study, 1, results)
    assert json.loads(study.text(trial, "pytorch"))["variant"] == trial
    recipe = study.specification(trial).recipe
    assert {key: getattr(recipe, key) for key in found["points"][0]} == found["points"][0]
    assert study.is_answered(search.generation(1))
    assert not study.is_answered(search.generation(2))
    study.write(results / "study.json", [], "snakemake")
    again = read_study(results / "study.json")
    assert again.text(trial, "pytorch") == study.text(trial, "pytorch")
    assert again.question("s", 2) == study.question("s", 2)


def import_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this test use Optuna's Gaussian process."""
    environment = ROOT / "results/environments/pytorch-cpu"
    if not (environment / PYTHON).exists():
        pytest.skip("the environment of PyTorch is not built")
    monkeypatch.setattr("sys.path", [*sys.path])
    searching.import_torch_from(environment)


def test_a_gaussian_process_keeps_away_from_points_that_break_the_constraint(
    learning: tuple[Study, PlannedSearch, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, search, _ = learning
    import_torch(monkeypatch)
    question = search.question(2).model_copy(update={"method": "gp", "variants": ["a", "b"]})
    told = [
        Trial(number=n, variant="v", cell="c", point=point, state="ok", nll=6 - size(point) / 1000)
        for n, point in enumerate(draw_points(search.space, 12, 3, "s"), start=1)
    ]
    asks: list[None] = []
    ask = optuna.Study.ask
    monkeypatch.setattr(optuna.Study, "ask", lambda study: (asks.append(None), ask(study))[1])
    points = next_points(question, told)
    assert len(asks) <= 8
    assert min(map(size, points)) > median(size(trial.point) for trial in told)  # not by chance


def size(point: Any) -> float:
    """The product that the constraint bounds, but for the sequence length."""
    return float(point["batch_size"] * point["hidden_size"])


@pytest.mark.parametrize("method", ["tpe", "gp"])
def test_the_same_results_give_the_same_next_trials_and_others_give_others(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_with(tmp_path, monkeypatch, usual(method))
    search, results = study.searches["s"], tmp_path / "results"
    monkeypatch.chdir(tmp_path)
    if method == "gp":
        import_torch(monkeypatch)
    first = finish_generation(study, 1, results)
    few = list(search.generations[1][: 2 if method == "gp" else 10])
    question = search.question(2).model_copy(update={"variants": few})
    second = propose(question, results)
    assert second == propose(question, results)
    assert len(second["told"]) == 10
    space = question.space
    for point in second["points"]:
        space.specification("trial", point, short=True)  # meets the constraint
    points = [*first["points"], *second["points"]]
    assert all(point not in points[:index] for index, point in enumerate(points))
    for trial in search.generations[0]:  # turned round
        cell = search.cell(trial)
        old = Metrics.model_validate_json((results / "cells" / cell / "metrics.json").read_bytes())
        assert old.valid
        write_result(study, cell, 8.0 - old.valid.nll)
    assert propose(question, results)["points"] != second["points"]


def test_diverged_and_failed_trials_are_told_as_the_worst(
    learning: tuple[Study, PlannedSearch, Path],
) -> None:
    study, search, results = learning
    found = finish_generation(study, 1, results)
    diverged, failed = search.generations[0][:2]
    write_result(study, search.cell(diverged), None)
    (results / "cells" / search.cell(failed) / "metrics.json").unlink()
    packed = run_cells(study, results)
    assert search.cell(diverged) in packed
    assert search.cell(failed) not in packed  # an archive needs no result of it
    question = search.question(2)
    told = propose(question, results)["told"]
    assert [trial["state"] for trial in told][:2] == ["diverged", "failed"]
    trials = [Trial.model_validate(trial) for trial in told]
    values = [trial.value for trial in study_of(question.space, trials).trials]
    others = [law(point) for point in found["points"][2:]]
    assert values == pytest.approx([max(others)] * 2 + others)


def test_a_sampler_that_is_told_results_finds_better_points_than_chance(
    learning: tuple[Study, PlannedSearch, Path],
) -> None:
    study, search, results = learning
    finish_generation(study, 1, results)
    question = search.question(2)
    told = [
        Trial(number=n, variant="v", cell="c", point=point, state="ok", nll=law(point))
        for n, point in enumerate(draws(question, 40), start=1)
    ]
    drawn = sum(law(point) for point in draws(question, 400)) / 400
    proposed = next_points(question, told)
    assert sum(map(law, proposed)) / len(proposed) < drawn


def draws(question: Question, count: int) -> list[Any]:
    generator = random.Random(5)
    return [question.space.draw(generator) for _ in range(count)]


def test_the_best_trials_go_on_in_full_and_the_winner_can_be_pasted(
    learning: tuple[Study, PlannedSearch, Path],
) -> None:
    study, search, results = learning
    points = [p for n in (1, 2) for p in finish_generation(study, n, results)["points"]]
    write_result(study, search.cell(search.trials[0]), None)
    selected = select(search.contest, results)
    ranking = sorted(range(1, 20), key=lambda index: law(points[index]))[:2]
    assert [winner["number"] for winner in selected["winners"].values()] == [
        index + 1 for index in ranking
    ]
    write_atomically(Path(search.selection), json.dumps(selected))
    recipe = study.specification("s-winner-1").recipe
    assert recipe.budget == "full"
    assert recipe.learning_rate == points[ranking[0]]["learning_rate"]
    for variant, cells in search.full.items():  # in full, the second is better
        for cell in cells:
            write_result(study, cell, 3.0 if variant == "s-winner-1" else 2.9)
    result = read_search(study.shown("s"), results, partial=True)
    assert result.winner
    assert (result.winner.variant, result.winner.trial) == ("s-winner-2", ranking[1] + 1)
    pasted = yaml.safe_load(result.recipe or "")["recipes"]["s-best"]
    assert pasted.pop("extends") == "r"
    assert Recipe.model_validate(pasted) == study.specification("s-winner-2").recipe


def test_there_is_a_winner_when_all_full_runs_have_finished_and_at_most_one_of_its_own_failed(
    learning: tuple[Study, PlannedSearch, Path],
) -> None:
    study, search, results = learning
    for number in (1, 2):
        finish_generation(study, number, results)
    write_atomically(Path(search.selection), json.dumps(select(search.contest, results)))
    first, second = (search.full[f"s-winner-{number}"] for number in (1, 2))

    def winner() -> str | None:
        found = read_search(study.shown("s"), results, partial=True)
        return found.winner.variant if found.winner else found.undecided

    assert winner() == "not decided yet: 12 of 12 full runs have no result"
    for cell in (*first, *second[1:]):
        write_result(study, cell, 3.0 if cell in first else 2.9)
    assert winner() == "not decided yet: 1 of 12 full runs have no result"
    fail(study, second[0])
    assert winner() == "s-winner-2"  # one of six failed
    write_result(study, second[0], None)
    assert winner() == "s-winner-2"  # or diverged
    write_result(study, second[1], None)
    assert winner() == "s-winner-1"
    for cell in first[:2]:
        write_result(study, cell, None)
    assert winner() == "none: of each candidate, two or more full runs diverged or failed"


def edited(before: str, after: str, **config: Any) -> Study:
    """Return the study after an edit of its search."""
    import ptbench.configuration.experiments as experiments

    file = experiments.WORKFLOW / "experiments/own.yaml"
    text = file.read_text()
    assert before in text
    file.write_text(text.replace(before, after))
    return load_study({"experiments": ["s"], **config})


def test_what_a_search_found_before_it_was_edited_is_none_of_its_results(
    learning: tuple[Study, PlannedSearch, Path],
) -> None:
    study, search, results = learning
    for number in (1, 2):
        finish_generation(study, number, results)
    (results / "cells" / search.cell("s-trial-1") / "metrics.json").unlink()
    fail(study, search.cell("s-trial-1"))
    write_atomically(Path(search.selection), json.dumps(select(search.contest, results)))
    for cell in search.full["s-winner-1"]:
        write_result(study, cell, 3.0)
    found = read_search(study.shown("s"), results, partial=True)
    assert [found.count(state) for state in ("ok", "failed", "missing")] == [19, 1, 0]
    assert [runs.finished for runs in found.full] == [6, 0]
    renamed = edited("title: T", "title: Another")  # is no other search
    assert renamed.is_answered(search.generation(2))
    assert renamed.is_answered(search.selection)
    assert renamed.fingerprint(search.cell("s-trial-1")) is not None
    for before, after in (("seed: 3", "seed: 4"), ("dropout: {low", "weight_decay: {low")):
        study = edited(before, after)
        assert not study.is_answered(search.generation(1))
        for cell in (search.cell("s-trial-1"), search.full["s-winner-1"][0]):
            # so that no failure under the old search counts: the trial is waited for
            assert study.fingerprint(cell) is None
            assert not has_failed(results / "attempts" / cell, study.fingerprint(cell))
        with pytest.raises(FileNotFoundError):
            study.text("s-trial-1", "jax")
        found = read_search(study.shown("s"), results, partial=True)
        assert found.count("missing") == 20
        assert found.undecided == "not decided yet: no trial has been trained in full"
        with pytest.raises(AnalysisError, match=r"0 trials of 10 are in .*generation-1.json"):
            propose(study.searches["s"].question(2), results)


def test_a_winner_is_named_without_a_framework_that_cannot_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = usual().replace("[jax, pytorch]", "[jax, mxnet]")
    study = study_with(tmp_path, monkeypatch, asked, accelerator="cuda", cuda_capability=9.0)
    monkeypatch.chdir(tmp_path)
    search, results = study.searches["s"], tmp_path / "results"
    for trial, point in zip(search.trials, draw_points(search.space, 20, 3, "s"), strict=True):
        write_result(study, search.cell(trial), law(point))
    write_atomically(Path(search.selection), json.dumps(select(search.contest, results)))
    for cells in search.full.values():
        for cell in cells:
            if "/jax/" in cell:
                write_result(study, cell, 3.0)
    site = Site(tmp_path / "report", results, RunFacts(created="now", version="0", machine="m"))
    page = write_search(site, study.shown("s"), results, tmp_path / "out").read_text()
    assert "is the winner" in page
    assert "the last build of MXNet knows no GPU" in page
    # A result from elsewhere counts in the experiment, if it is of the recipe that was selected.
    cell = next(cell for cell in search.full["s-winner-1"] if "/mxnet/" in cell)
    plan = plan_experiment(study, "s-winners")

    def states() -> set[str]:
        rows = collect_rows(plan, results)
        return {each.state for row in rows if row.framework == "mxnet" for each in row.cells}

    write_result(study, cell, 3.0)
    assert states() == {"ok", "missing"}
    content = json.loads(Path(search.selection).read_bytes())
    content["specifications"]["s-winner-1"]["recipe"]["dropout"] = 0.35
    write_atomically(Path(search.selection), json.dumps(content))
    assert states() == {"missing"}
    with pytest.raises(ConfigurationError, match=r"trials run in mxnet, .*; put another fram"):
        edited("[jax, mxnet]", "[mxnet, jax]", accelerator="cuda", cuda_capability=9.0)


@pytest.mark.usefixtures("learning")
def test_the_budget_of_trials_is_short_s_unless_the_configuration_has_one() -> None:
    for method in ("method: tpe", "method: random"):
        study = edited("method: tpe", method + ", set: {budget: smoke}")
        trial, winner = study.searches["s"].trials[0], study.searches["s"].winners[0]
        assert study.specification(trial).recipe.budget == "quick"
        assert study.specification(winner).recipe.budget == "smoke"
        edited(method + ", set: {budget: smoke}", "method: tpe")


def test_too_few_good_trials_for_the_winners_are_a_sentence(
    learning: tuple[Study, PlannedSearch, Path],
) -> None:
    study, search, results = learning
    for number in (1, 2):
        finish_generation(study, number, results)
    for trial in search.trials[1:]:
        write_result(study, search.cell(trial), None)
    with pytest.raises(AnalysisError, match="search s: 1 of 20 trials ended well, and full: 2 are"):
        select(search.contest, results)


def test_only_what_failed_or_was_killed_often_counts_as_failed(tmp_path: Path) -> None:
    from ptbench.training.attempts import Record
    from ptbench.training.holders import this_process

    statuses = ("killed", "interrupted", "killed", "interrupted", "killed", "failed")
    for number, status in enumerate(statuses, start=1):
        record = Record(
            attempt=number, cell="c", fingerprint="f", corpus="d", status=status,  # type: ignore[arg-type]
            holder=this_process(), started="2026-01-01T00:00:00+00:00",
        )  # fmt: skip
        write_atomically(tmp_path / f"attempt-{number}.json", record.model_dump_json())
        assert has_failed(tmp_path, "f") == (number >= 5)
        assert not has_failed(tmp_path, "another recipe's")
    assert not has_failed(tmp_path / "none", "f")


def test_the_page_shows_trials_the_published_recipe_among_them_and_what_matters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study = study_with(tmp_path, monkeypatch, usual(more=", published: r+hidden_size=32"))
    monkeypatch.chdir(tmp_path)
    search, results = study.searches["s"], tmp_path / "results"
    points = draw_points(search.space, 20, 3, "s")
    for trial, point in zip(search.trials, points, strict=True):
        write_result(study, search.cell(trial), law(point))
    write_result(study, search.cell(search.trials[4]), None)
    published = search.shown_trials[0]
    write_result(study, published, 3.0)
    site = Site(tmp_path / "report", results, RunFacts(created="now", version="0", machine="m"))
    page = write_search(site, study.shown("s"), results, tmp_path / "partial")
    assert "This page is partial" not in page.read_text()  # no trial is missing
    assert "The winner is not decided yet: no trial has been trained" in page.read_text()
    write_atomically(Path(search.selection), json.dumps(select(search.contest, results)))
    for cells in search.full.values():
        for cell in cells:
            write_result(study, cell, 3.1)
    output = tmp_path / "out"
    text = write_search(site, study.shown("s"), results, output).read_text()
    for folder in (tmp_path / "partial", output):
        print_results([], Path("report/index.html"), [folder])
    undecided, _, _, won, *_ = capsys.readouterr().out.splitlines()
    assert undecided.startswith("T: the winner is not decided yet: no trial has been trained")
    perplexity = f"{math.exp(3.1):.2f}"
    assert re.fullmatch(
        r"T: of 20 trials, number \d+ wins, with a validation perplexity of "
        rf"{perplexity} when trained in full\. See report/searches/s\.html",
        won,
    )
    with (output / "trials.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["trial"] for line in lines] == [*map(str, range(1, 21)), "published"]
    assert lines[4]["state"] == "diverged"
    assert lines[4]["valid_nll"] == ""
    result = read_search(study.shown("s"), results, partial=True)
    assert result.winner
    [said] = answers_to([result], [], [])
    assert said.text.startswith(f"T: of 20 trials, number {result.winner.trial} wins, with a")
    assert said.link == "searches/s.html"
    asked = result.model_copy(
        update={"contest": result.contest.model_copy(update={"title": "What is best?"})}
    )
    assert answers_to([asked], [], [])[0].text.startswith("What is best? Of 20 trials, number")
    assert next(iter(result.importances)) in ("hidden_size", "learning_rate")  # what the law has
    assert 0 < sum(result.importances.values()) < 1  # the rest is of keys together
    assert result.ranked[0].number == 0  # the published one
    for name in ("best-so-far", "parallel-coordinates", "importance"):
        assert (output / "figures" / f"{name}.svg").exists()
    assert "s-best:" in text
    assert "1 diverged" in text
    assert "The published recipe, run as a trial, is number 1 of the 20 that ended well." in text


def test_whole_numbers_are_told_by_the_recipe() -> None:
    whole = ("hidden_size", "latent_size", "patience")
    assert [is_whole(key) for key in (*whole, "dropout", "clip_norm", "rnn")] == [True] * 3 + [
        False
    ] * 3
