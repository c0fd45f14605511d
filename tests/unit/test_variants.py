"""Variants against variants: their labels, sweeps, baseline, trends and best values."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.support.fake_results import (
    metrics,
    plan,
    score_of,
    write_cell,
    write_diverged,
    write_unknown,
)

from ptbench.analysis.collect import CorpusFacts, collect_rows
from ptbench.analysis.experiment import Analysis, analyse
from ptbench.analysis.plan import PlannedVariant, plan_experiment
from ptbench.analysis.variants import find_sweeps, is_geometric, variant_labels
from ptbench.configuration import experiments
from ptbench.configuration.study import Study, load_study
from ptbench.errors import ConfigurationError
from ptbench.report import words

WIDTHS = (100, 200, 400, 800)


@pytest.fixture(scope="module")
def study() -> Study:
    return load_study({"experiments": "all"})


def settings_of(study: Study, name: str) -> dict[str, dict[str, object]]:
    return {v: known.settings for v, known in plan_experiment(study, name).variants.items()}


def test_the_plan_has_the_values_in_which_its_variants_differ(study: Study) -> None:
    settings = settings_of(study, "greatti-hidden")
    assert list(settings)[:2] == ["greatti-lstm", "greatti-lstm+hidden_size=400"]
    assert settings["greatti-lstm"] == {"rnn": "lstm", "hidden_size": 200}
    assert settings["greatti-gru+hidden_size=600"] == {"rnn": "gru", "hidden_size": 600}
    assert settings_of(study, "zaremba-small") == {"zaremba-small": {}}


def test_every_variant_of_the_study_has_a_label_of_its_own(study: Study) -> None:
    for name in study.experiments:
        labels = variant_labels(settings_of(study, name))
        assert len(set(labels.values())) == len(labels), name
        assert all(labels.values()), name


@pytest.mark.parametrize(
    ("experiment", "variant", "label"),
    [
        ("zaremba-small", "zaremba-small", "zaremba-small"),
        ("zhang-mos", "zaremba-large+mixtures=15", "zaremba-large, mixtures 15"),
        ("singh-hidden", "singh-lstm2-sgd", "hidden size 650"),
        ("singh-kernel", "singh-mos-best+epochs=5", "fused"),
        ("awd-lstm-parts", "awd-lstm", "awd-lstm"),
        ("awd-lstm-parts", "awd-lstm+word_dropout=0", "word dropout 0"),
        ("zhang-tricks", "zaremba-medium+mixtures=10+softmax_bias=false+tie_weights=true",
         "mixtures 10, tie weights"),
    ],
)  # fmt: skip
def test_a_label_says_what_tells_a_variant_from_the_others(
    study: Study, experiment: str, variant: str, label: str
) -> None:
    assert variant_labels(settings_of(study, experiment))[variant] == label


@pytest.mark.parametrize(
    ("experiment", "sweeps"),
    [
        # key, those that change with it, logarithmic, lines and how many variants each has
        ("singh-lstm1-rate", [("learning_rate", (), True, {"": 7})]),
        ("singh-lstm2-context", [("sequence_length", (), False, {"": 5})]),
        ("singh-hidden", [("hidden_size", ("embedding_size",), False, {"": 10})]),
        ("singh-depth", [("layers", (), False, {
            "singh-lstm2, batch size 5": 4, "singh-lstm2, batch size 20": 4, "singh-lstm2-sgd": 4,
        })]),
        ("singh-mos-rate", [
            ("learning_rate", (), False, {
                "batch size 5, layers 2": 8, "batch size 20, layers 2": 8,
            }),
            ("batch_size", (), False, {"layers 2, learning rate 1": 6}),
        ]),
        ("greatti-hidden", [("hidden_size", (), False, {"greatti-lstm": 3, "greatti-gru": 3})]),
        ("zhang-mos-number", [("mixtures", (), False, {"": 21})]),
        ("zhang-mos", []),  # three recipes that differ in ten keys, and one key of two values
        ("zhang-mos-schedule", []),
        ("awd-lstm-parts", []),
        ("zaremba-small", []),
    ],
)  # fmt: skip
def test_sweeps_are_found_in_what_the_variants_differ_in(
    study: Study, experiment: str, sweeps: list[tuple[str, tuple[str, ...], bool, dict[str, int]]]
) -> None:
    found = find_sweeps(settings_of(study, experiment))
    assert [
        (s.key, s.together, s.logarithmic, {line.label: len(line.values) for line in s.lines})
        for s in found
    ] == sweeps
    for sweep in found:
        for line in sweep.lines:
            assert list(line.values) == sorted(set(line.values))


@pytest.mark.parametrize(
    ("values", "geometric"),
    [
        ([1e-4, 1e-3, 1e-2], True),
        ([5, 10, 20, 50, 100], True),
        ([0.01, 0.5, 1, 3, 5, 7, 10, 100], True),
        (range(1, 16), False),
        ([0, 1, 10, 100], False),  # zero has no logarithm
        ([200, 400, 800], False),  # less than a decade
    ],
)
def test_an_axis_is_logarithmic_where_the_values_are(values: list[float], geometric: bool) -> None:
    assert is_geometric(values) == geometric


def swept(
    results: Path, nll: Callable[[int, int], float], frameworks: tuple[str, ...] = ("jax",)
) -> Analysis:
    """Return the analysis of a sweep of the width, whose seeds' nlls are a function of both."""
    names = {f"tiny+hidden_size={width}": width for width in WIDTHS}
    known = {n: PlannedVariant(settings={"hidden_size": width}) for n, width in names.items()}
    experiment = plan(variants=tuple(names), frameworks=frameworks)
    experiment = experiment.model_copy(update={"variants": known})
    for cell in experiment.cells:
        value = nll(names[cell.variant], cell.seed)
        if math.isfinite(value):
            faster = metrics(cell, value, tokens_per_second=1e6 / names[cell.variant] + cell.seed)
            write_cell(results, faster)
        else:
            write_diverged(results, cell, epochs=1)
    return analyse(experiment, collect_rows(experiment, results), CorpusFacts(), [])


def test_variants_are_set_against_the_first(tmp_path: Path) -> None:
    found = swept(tmp_path, lambda width, seed: 5 - 0.1 * WIDTHS.index(width) + 0.001 * seed)
    assert found.baseline == "tiny+hidden_size=100"
    assert [c.variant for c in found.comparisons] == [f"tiny+hidden_size={w}" for w in WIDTHS[1:]]
    last = found.comparisons[-1]
    assert last.outcome.difference == pytest.approx(-0.3)
    assert last.outcome.verdict == "different"
    assert last.improvement == pytest.approx(1 - math.exp(-0.3))
    # Welch's interval of two samples with s = 0.001 and n = 3: t(4) 0.001 sqrt(2 / 3)
    half = 2.776445 * 0.001 * math.sqrt(2 / 3)
    assert last.improvement_low == pytest.approx(1 - math.exp(-0.3 + half))
    assert last.improvement_high == pytest.approx(1 - math.exp(-0.3 - half))
    assert last.speed == pytest.approx(100 / 800, rel=2e-3)
    assert last.speed_low is not None
    assert last.speed_high is not None
    assert last.speed_low < last.speed < last.speed_high


def test_a_falling_sweep_falls_and_its_best_value_is_its_last(tmp_path: Path) -> None:
    found = swept(tmp_path, lambda width, seed: 5 - 0.1 * WIDTHS.index(width) + 0.001 * seed)
    [trend] = found.trends
    assert (trend.key, trend.direction) == ("hidden_size", "falls")
    # Of 12! / 3!^4 ways to share out the values, one is in this order, and one in the other.
    assert trend.p == pytest.approx(2 / (math.factorial(12) / 6**4))
    [best] = found.best
    assert best.variant == "tiny+hidden_size=800"
    assert best.probability == pytest.approx(1, abs=1e-3)
    assert sum(best.probabilities.values()) == pytest.approx(1)


def test_equal_variants_show_no_trend_and_share_the_best_place(tmp_path: Path) -> None:
    found = swept(tmp_path, lambda width, seed: 5 + 0.01 * ((width // 100 * seed) % 3))
    assert [trend.direction for trend in found.trends] == [None]
    assert found.best[0].probability < 0.95


def test_a_diverged_variant_is_never_the_best_and_counts_in_the_trend(tmp_path: Path) -> None:
    def nll(width: int, seed: int) -> float:
        return math.inf if width >= 400 else 5 + 0.1 * (width == 200) + 0.001 * seed

    found = swept(tmp_path, nll)
    assert found.trends[0].direction == "rises"
    assert found.best[0].variant == "tiny+hidden_size=100"
    diverged = found.comparisons[-1]
    assert diverged.improvement is None
    assert diverged.outcome.reason == "no valid result on one side"


def test_speeds_of_runs_that_may_have_shared_their_machine_are_not_set_against_each_other(
    tmp_path: Path,
) -> None:
    names = ("a", "b")
    experiment = plan(variants=names, frameworks=("jax",))
    for cell in experiment.cells:
        write_cell(tmp_path, metrics(cell, 5, tokens_per_second=1e4 + cell.seed))
    [fair] = analyse(experiment, collect_rows(experiment, tmp_path), CorpusFacts(), []).comparisons
    write_unknown(tmp_path)
    [shared] = analyse(
        experiment, collect_rows(experiment, tmp_path), CorpusFacts(), []
    ).comparisons
    assert (shared.speed, shared.speed_low) == (None, None)
    assert fair.speed == pytest.approx(1)


def test_the_best_variant_is_chosen_by_validation_and_named_with_its_devices(
    tmp_path: Path,
) -> None:
    """By the test text it would be the other one; on two devices too."""
    experiment = plan(variants=("a", "b"), frameworks=("jax",), devices=(1, 2))
    for cell in experiment.cells:
        better = (cell.variant == "a") == (cell.devices == 1)
        valid = 4.5 + 0.001 * cell.seed - (0.1 if better else 0.0)
        test = 4.5 + 0.001 * cell.seed + (0.1 if better else 0.0)
        write_cell(tmp_path, metrics(cell, test, valid=score_of(valid)))
    found = analyse(experiment, collect_rows(experiment, tmp_path), CorpusFacts(), [])
    assert found.metric == "test_perplexity"
    assert [(best.devices, best.variant) for best in found.best] == [(1, "a"), (2, "b")]
    assert words.variants_sentence(found) == (
        "Best by validation perplexity, with a probability of at least 0.95: a in JAX on 1 device; "
        "b in JAX on 2 devices."
    )


def test_each_framework_has_its_own_comparisons(tmp_path: Path) -> None:
    found = swept(tmp_path, lambda width, seed: 5 + 0.001 * seed * width, ("pytorch", "jax"))
    assert [c.framework for c in found.comparisons] == ["pytorch"] * 3 + ["jax"] * 3
    assert [trend.framework for trend in found.trends] == ["pytorch", "jax"]
    assert [best.framework for best in found.best] == ["pytorch", "jax"]


def test_a_single_variant_is_compared_with_none(tmp_path: Path) -> None:
    experiment = plan(frameworks=("jax",))
    for cell in experiment.cells:
        write_cell(tmp_path, metrics(cell, 5))
    found = analyse(experiment, collect_rows(experiment, tmp_path), CorpusFacts(), [])
    assert (found.comparisons, found.trends, found.best) == ((), (), ())


@pytest.fixture
def named_baseline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Study]:
    def load(baseline: str) -> Study:
        text = (
            "experiments:\n  mine:\n    title: Mine\n"
            "    variants: [zaremba-small, zaremba-small+mixtures=5]\n"
            f"    baseline: {baseline}\n"
        )
        own = tmp_path / "own.yaml"
        own.write_text(text)
        files = [*experiments.experiment_files(), own]
        monkeypatch.setattr(experiments, "experiment_files", lambda: files)
        return load_study({"experiments": ["mine"]})

    return load


def test_an_experiment_may_name_its_baseline(named_baseline: Callable[[str], Study]) -> None:
    found = plan_experiment(named_baseline("zaremba-small+mixtures=5+layers=2"), "mine")
    assert found.baseline_variant == "zaremba-small+mixtures=5"


def test_a_baseline_that_is_no_variant_is_refused(named_baseline: Callable[[str], Study]) -> None:
    with pytest.raises(ConfigurationError, match='mine: baseline: there is no variant "zaremba-l'):
        named_baseline("zaremba-large")
