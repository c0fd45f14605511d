"""The speed benchmark's arithmetic, and the processes that it measures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ptbench import environments
from ptbench.configuration.experiments import load_library
from ptbench.errors import PtbenchError
from ptbench.measurement.benchmark import (
    BACKEND,
    MODELS,
    PRODUCTS,
    VOCABULARY_SIZE,
    Benchmark,
    Competitor,
    Result,
    Worker,
    all_competitors,
)
from ptbench.model.recipe import Recipe
from ptbench.model.work import Product, bound, flops_per_token, training_products

ROOT = Path(__file__).parents[2]
TINY = Recipe(batch_size=2, sequence_length=3, embedding_size=4, hidden_size=5, layers=1)


# By hand: each weight takes part in three products of 2 operations for each token.
@pytest.mark.parametrize(
    ("model", "megaflops"),
    [
        ("small", 6 * (2 * 2 * 200 * 800 + 200 * 10_000) / 1e6),
        ("medium", 6 * (2 * 2 * 650 * 2600 + 650 * 10_000) / 1e6),
        ("mos", 6 * (2 * 2 * 650 * 2600 + 650 * 6510 + 10 * 650 * 10_000) / 1e6),
    ],
)
def test_a_token_costs_six_operations_for_each_weight_that_it_meets(
    model: str, megaflops: float
) -> None:
    recipe = load_library().recipes[MODELS[model]]
    assert flops_per_token(recipe, VOCABULARY_SIZE) / 1e6 == pytest.approx(megaflops)


def test_recurrent_products_are_counted_step_by_step_and_their_weights_gradient_at_once() -> None:
    assert training_products(TINY, 7) == {
        Product(6, 4, 20): 1, Product(6, 20, 4): 1, Product(4, 6, 20): 1,  # the layer's input
        Product(2, 5, 20): 3, Product(2, 20, 5): 3, Product(5, 6, 20): 1,  # its recurrence
        Product(6, 5, 7): 1, Product(6, 7, 5): 1, Product(5, 6, 7): 1,  # the softmax
    }  # fmt: skip


def test_a_factorised_or_tied_output_has_its_projection_s_products() -> None:
    for changes in ({"output_rank": 3}, {"tie_weights": True}):
        recipe = TINY.model_copy(update=changes)
        rank = 3 if "output_rank" in changes else 4
        products = training_products(recipe, 7)
        assert Product(6, 5, rank) in products
        assert Product(6, rank, 7) in products


def test_the_bound_is_the_tokens_of_a_step_over_the_time_of_its_products() -> None:
    rates = dict.fromkeys(training_products(TINY, 7), 1e6)
    assert bound(TINY, 7, rates) == pytest.approx(1e6 / flops_per_token(TINY, 7))
    slow = rates | {Product(6, 5, 7): 1e3}
    seconds = 6 / bound(TINY, 7, rates) + Product(6, 5, 7).flops * (1e-3 - 1e-6)
    assert bound(TINY, 7, slow) == pytest.approx(6 / seconds)


def test_a_row_has_medians_and_the_bound_s_fraction_is_taken_within_rounds() -> None:
    speeds, bounds = [90.0, 100.0, 140.0], [360.0, 500.0, 200.0]  # 0.25, 0.2, 0.7
    result = Result(
        "small", Competitor("jax", "tuned"), {}, speeds, bounds, [0.02, 0.01, 0.04], 2 * 10**6
    )
    row = result.row()
    assert (row["lowest"], row["tokens_per_second"], row["highest"]) == (90, 100, 140)
    assert row["fraction_of_bound"] == 0.25
    assert (row["peak_memory_mb"], row["millijoules_per_token"]) == (2, 20)


def test_the_table_has_a_line_for_each_competitor_and_leaves_unknown_energy_empty(
    tmp_path: Path,
) -> None:
    benchmark = Benchmark(Path(), "cpu", threads=1, rounds=1, seconds=1.0, output=tmp_path)
    competitor = Competitor("jax", "tuned")
    results = [
        Result("small", competitor, {}, [100.0], [400.0], energy, 2 * 10**6)
        for energy in ([0.02], [])
    ]
    benchmark.write(results)
    assert (tmp_path / "speed.csv").read_text() == (
        "model,framework,implementation,tokens_per_second,lowest,highest,fraction_of_bound,"
        "peak_memory_mb,millijoules_per_token,rounds\n"
        "small,jax,tuned,100.0,100.0,100.0,0.25,2,20.0,1\n"
        "small,jax,tuned,100.0,100.0,100.0,0.25,2,,1\n"
    )


def test_the_command_says_what_it_will_do_and_writes_what_it_found(tmp_path: Path) -> None:
    for framework in ("jax", "pytorch"):
        environments.build(framework, "cpu", ROOT / f"results/environments/{framework}-cpu")
    # in a process of its own, because this one has imported NumPy
    answer = subprocess.run(
        [sys.executable, "-m", "ptbench", "benchmark", "--models", "small", "--frameworks", "jax",
         "--implementations", "stock", "--rounds", "1", "--seconds", "0", "--output", tmp_path],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.startswith(
        "Models: small. On each in turn: jax stock. Rounds: 1, with 0 s for each. "
        "This takes about 1 min.\n"
    )
    found = json.loads((tmp_path / "speed.json").read_text())
    assert found["facts"]["framework_package"] == "numpy"
    assert [each["framework"] for each in found["results"]] == ["jax"]


def test_what_users_of_a_framework_write_is_measured_beside_it() -> None:
    labels = [c.label for c in all_competitors(["keras", "jax", "pytorch"], ["stock"])]
    assert labels == ["keras stock", "jax stock", "pytorch stock", "keras fit", "pytorch example"]
    assert [c.label for c in all_competitors(["jax"], ["stock"])] == ["jax stock"]


@pytest.mark.parametrize("peer", [Competitor("keras", "fit"), Competitor("pytorch", "example")])
def test_a_peer_is_left_out_where_it_has_no_such_model(peer: Competitor) -> None:
    recipes = load_library().recipes
    able = {model for model, name in MODELS.items() if peer.can_train(recipes[name])}
    assert able == {"small", "medium", "large"}
    assert all(Competitor("keras", "tuned").can_train(recipes[name]) for name in MODELS.values())


def test_bfloat16_is_every_model_s_stock_implementation_in_that_precision() -> None:
    for name in MODELS.values():
        task = Competitor("jax", "bfloat16").task(load_library().recipes[name], "cpu")
        recipe = Recipe.model_validate(task["recipe"])  # as the worker does
        assert (recipe.implementation, recipe.precision) == ("stock", "bfloat16")


def test_a_worker_trains_for_as_long_as_it_is_told_and_says_how_many_tokens(tmp_path: Path) -> None:
    task = {
        "class": BACKEND, "framework": "oracle", "accelerator": "cpu", "threads": 1,
        "vocabulary_size": 7, "recipe": TINY.model_dump(mode="json"),
    }  # fmt: skip
    with Worker(Path(sys.executable), task, tmp_path / "log") as worker:
        assert worker.answer() == {}
        measured = worker.ask(seconds=0.2)
    assert measured["seconds"] >= 0.2
    assert measured["tokens"] > 0
    assert measured["tokens"] % 6 == 0
    assert 0 < measured["nll"] < 3  # nats; log 7 = 1.95 for a uniform guess
    assert measured["peak_memory_bytes"] > 10**7


def test_a_worker_measures_products(tmp_path: Path) -> None:
    task = {
        "framework": "jax", "threads": 1, "accelerator": "cpu", "class": PRODUCTS["NumPy"][1]
    }  # fmt: skip
    with Worker(Path(sys.executable), task, tmp_path / "log") as worker:
        worker.answer()
        rate = worker.ask(product=Product(64, 64, 64), seconds=0.05)
    assert 1e6 < rate < 1e14


def test_a_worker_that_fails_says_why_in_one_sentence(tmp_path: Path) -> None:
    task = {"framework": "jax", "threads": 1, "class": "no_such:Thing"}
    with (
        Worker(Path(sys.executable), task, tmp_path / "log") as worker,
        pytest.raises(PtbenchError, match=r"benchmark of jax ended with status 1: .*no_such"),
    ):
        worker.answer()


def test_a_missing_environment_is_named_with_the_command_that_builds_it(tmp_path: Path) -> None:
    with pytest.raises(PtbenchError, match=r"no environment jax-cpu: build it with .*environments"):
        Benchmark(tmp_path, "cpu", 1, 1, 1.0, tmp_path / "out").run(
            ["small"], [Competitor("jax", "stock")]
        )
    assert not (tmp_path / "out").exists()
