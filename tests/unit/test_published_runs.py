"""The runs under results/published are what the README says they are."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import yaml

from ptbench.backends import FRAMEWORKS
from ptbench.configuration.study import load_study
from ptbench.model.recipe import Recipe
from ptbench.report.formatting import framework_name
from ptbench.training.records import read_history, read_metrics

ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT / "results" / "published"
CELLS = sorted(path.parent for path in (PUBLISHED / "zaremba-small").rglob("metrics.json"))


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.parents[1].name)
def test_a_published_run_is_of_the_recipe_and_reproduces_the_published_perplexities(
    cell: Path,
) -> None:
    """Zhang 2018, Table 5.1, small: valid 118.5 to 120.2, test 113.3 to 114.4; Zaremba's 115."""
    metrics = read_metrics(cell / "metrics.json")
    assert metrics.status == "ok"
    assert metrics.valid is not None
    assert metrics.test is not None
    assert 116 <= metrics.valid.perplexity <= 123
    assert 111 <= metrics.test.perplexity <= 118
    assert (metrics.valid.tokens, metrics.test.tokens) == (73_759, 82_429)
    assert len(read_history(cell / "history.csv")) == metrics.epochs == 13
    recipe = yaml.safe_load((cell / "recipe.yaml").read_text())
    ours = load_study({"experiments": ["zaremba-small"]}).specification("zaremba-small").recipe
    assert Recipe(**{k: v for k, v in recipe.items() if k in Recipe.model_fields}) == ours
    assert json.loads((cell / "provenance.json").read_text())["git_dirty"] is False


def test_there_is_one_of_every_framework() -> None:
    assert sorted(cell.parents[1].name for cell in CELLS) == sorted(FRAMEWORKS)


def test_the_frameworks_agree_within_three_perplexity() -> None:
    for split in ("valid", "test"):
        values = [getattr(read_metrics(c / "metrics.json"), split).perplexity for c in CELLS]
        assert max(values) - min(values) < 3


def test_the_readme_has_every_published_run() -> None:
    readme = (ROOT / "README.md").read_text()
    for cell in CELLS:
        metrics = read_metrics(cell / "metrics.json")
        assert metrics.valid is not None
        assert metrics.test is not None
        last = read_history(cell / "history.csv")[-1]
        version = json.loads((cell / "provenance.json").read_text())["framework_version"]
        row = (
            f"| {framework_name(metrics.cell.framework)} {version.partition('+')[0]} "
            f"| {metrics.valid.perplexity:.1f} | {metrics.test.perplexity:.1f} "
            f"| {last.train_perplexity:.1f} | {metrics.best_epoch} | {metrics.parameters:,} |"
        )
        assert row in readme, f"README.md lacks {row}"


def test_the_readme_has_every_published_speed() -> None:
    readme = (ROOT / "README.md").read_text()
    with (PUBLISHED / "benchmark" / "speed.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["framework"] for row in rows} == set(FRAMEWORKS)
    for row in rows:
        speed, fraction = float(row["tokens_per_second"]), float(row["fraction_of_bound"])
        assert f"| {speed:,.0f} | {fraction:.2f} |" in readme, row


def test_a_mixture_closes_more_than_half_of_the_softmax_bottleneck_in_every_framework() -> None:
    """As the experiment's description has it; the true process has 2.6923 nats on the test text."""
    with (PUBLISHED / "softmax-bottleneck" / "table.csv").open() as file:
        nll = {(r["variant"], r["framework"]): float(r["test_nll"]) for r in csv.DictReader(file)}
    for framework in FRAMEWORKS:
        softmax, mixture = (nll[f"bottleneck-{head}", framework] for head in ("softmax", "mixture"))
        assert (softmax - mixture) / (softmax - 2.6923) > 0.5
