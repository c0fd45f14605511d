"""What a cell asks a cluster for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ptbench.backends import FRAMEWORKS
from ptbench.configuration.specification import Specification
from ptbench.model import work
from ptbench.model.parameters import parameter_count
from ptbench.model.recipe import Recipe
from ptbench.model.work import CorpusSize, corpus_size, weights_per_token

PTB = CorpusSize({"train": 929_589, "valid": 73_760, "test": 82_430}, vocabulary_size=10_000)
ZAREMBA_SMALL = Recipe(
    corpus="ptb", layers=2, hidden_size=200, embedding_size=200, batch_size=20, sequence_length=20
)


def memory_megabytes(
    spec: Specification, framework: str, devices: int, size: CorpusSize, times: int = 1
) -> int:
    libraries = FRAMEWORKS[framework].memory_megabytes
    return work.memory_megabytes(spec.recipe, spec.accelerator, libraries, devices, size, times)


def runtime_minutes(spec: Specification, devices: int, size: CorpusSize, times: int = 1) -> int:
    return work.runtime_minutes(spec.recipe, spec.accelerator, devices, size, times)


def specification(accelerator: str = "cuda", **changes: object) -> Specification:
    recipe = Recipe.model_validate(ZAREMBA_SMALL.model_dump() | changes)
    return Specification(variant="x", recipe=recipe, corpus_definition={}, accelerator=accelerator)


def test_the_weights_of_a_token_are_those_of_zaremba_s_small_model() -> None:
    """4,651,600 parameters, of which 2,000,000 are in the embedding (Zhang 2018, Table 5.1)."""
    assert parameter_count(ZAREMBA_SMALL, 10_000) == 4_651_600
    assert weights_per_token(ZAREMBA_SMALL, 10_000) == 2_651_600


def test_every_mixture_multiplies_by_the_output_matrix_and_a_tied_one_counts_too() -> None:
    plain = weights_per_token(ZAREMBA_SMALL, 10_000)
    output = 10_000 * 200 + 10_000
    mixed = ZAREMBA_SMALL.model_copy(update={"mixtures": 3})
    latents_and_prior = 200 * 600 + 600 + 200 * 3
    assert weights_per_token(mixed, 10_000) == plain + 2 * output + latents_and_prior
    tied = ZAREMBA_SMALL.model_copy(update={"tie_weights": True})
    assert weights_per_token(tied, 10_000) == plain


def test_a_sparse_product_is_given_time_for_what_it_keeps_and_memory_for_the_whole_matrix() -> None:
    def wide(**changes: object) -> Specification:
        return specification(hidden_size=5000, embedding_size=5000, kept_weights=0.001, **changes)

    masked, sparse = wide(), wide(kernel="sparse")
    assert runtime_minutes(sparse, 1, PTB) < runtime_minutes(masked, 1, PTB) / 2
    asked = [memory_megabytes(spec, "jax", 1, PTB) for spec in (masked, sparse)]
    assert asked[0] == asked[1]


@pytest.mark.parametrize("accelerator", ["cpu", "cuda"])
def test_time_and_memory_are_so_many_times_the_estimate(accelerator: str) -> None:
    spec = specification(accelerator)
    minutes = [runtime_minutes(spec, 1, PTB, times) for times in (1, 2, 3)]
    assert minutes[1] == pytest.approx(2 * minutes[0], abs=1)
    assert minutes[2] == pytest.approx(3 * minutes[0], abs=2)
    memory = [memory_megabytes(spec, "jax", 1, PTB, times) for times in (1, 2, 3)]
    assert memory[1] == pytest.approx(2 * memory[0], abs=1)
    assert memory[2] == pytest.approx(3 * memory[0], abs=2)


@pytest.mark.parametrize("accelerator", ["cpu", "cuda"])
@pytest.mark.parametrize(
    "larger",
    [{"hidden_size": 1500, "embedding_size": 1500}, {"layers": 8}, {"batch_size": 2000}],
)
def test_a_larger_model_or_batch_gets_more_memory(
    accelerator: str, larger: dict[str, object]
) -> None:
    base = memory_megabytes(specification(accelerator), "pytorch", 1, PTB)
    assert memory_megabytes(specification(accelerator, **larger), "pytorch", 1, PTB) > base


@pytest.mark.parametrize("accelerator", ["cpu", "cuda"])
@pytest.mark.parametrize("longer", [{"epochs": 26}, {"hidden_size": 1500}, {"layers": 8}])
def test_more_epochs_or_a_larger_model_get_more_time(
    accelerator: str, longer: dict[str, object]
) -> None:
    base = runtime_minutes(specification(accelerator), 1, PTB)
    assert runtime_minutes(specification(accelerator, **longer), 1, PTB) > base


def test_replicas_one_after_another_are_given_the_time_they_take() -> None:
    assert runtime_minutes(specification(), 4, PTB) > runtime_minutes(specification(), 1, PTB)


def test_every_framework_has_its_memory() -> None:
    for framework in FRAMEWORKS:
        assert memory_megabytes(specification(), framework, 1, PTB) > 900


def test_the_size_of_a_corpus_is_read_from_what_prepare_wrote(tmp_path: Path) -> None:
    facts = tmp_path / "corpus.json"
    with pytest.raises(FileNotFoundError) as raised:
        corpus_size(str(facts))
    assert raised.value.filename == str(facts)  # by which Snakemake knows that it is yet to come
    facts.write_text(
        json.dumps({"tokens": {"train": 3, "valid": 2, "test": 1}, "vocabulary_size": 9})
    )
    assert corpus_size(str(facts)) == CorpusSize({"train": 3, "valid": 2, "test": 1}, 9)
