"""A split is evaluated to the same number of tokens and the same loss in every framework."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.support import probes
from tests.support.problems import (
    SUM,
    TIME,
    VOCABULARY,
    new_oracle,
    random_batch,
    random_parameters,
    train,
)
from tests.support.remote import Backends, probe

# In 20 streams of 13 tokens the last window is incomplete; in one stream of 252 it is too.
SPLIT = np.random.default_rng(1).integers(0, VOCABULARY, 253)


@pytest.mark.parametrize("batch_size", [1, 20])
def test_every_token_but_the_first_counts_once_and_the_loss_is_the_oracle_s(
    backends: Backends, framework: str, batch_size: int
) -> None:
    backend, oracle = backends.get(framework, SUM), new_oracle(SUM)
    parameters = random_parameters(SUM, seed=1)
    backend.load_parameters(parameters)
    oracle.load_parameters(parameters)
    score = probe(probes.evaluate_split, backend, SPLIT, batch_size, TIME)
    expected = probe(probes.evaluate_split, oracle, SPLIT, batch_size, TIME)
    assert score["tokens"] == len(SPLIT) - 1
    # Half of what two frameworks may differ by.
    assert score["nll"] == pytest.approx(expected["nll"], rel=5e-5)


def test_a_model_saved_by_one_framework_has_the_same_perplexity_in_every_other(
    backends: Backends, frameworks: list[str], framework: str, tmp_path: Path
) -> None:
    def perplexity(reader: str) -> float:
        backend = backends.get(reader, SUM)
        probe(probes.load_saved_parameters, backend, str(saved))
        return probe(probes.evaluate_split, backend, SPLIT, 20, TIME)["perplexity"]

    trained = backends.get(framework, SUM)
    train(trained, [random_batch(seed) for seed in range(3)], [1.0] * 3)
    saved = tmp_path / "parameters.safetensors"
    probe(probes.save_parameters, trained, str(saved))
    expected = probe(probes.evaluate_split, trained, SPLIT, 20, TIME)["perplexity"]
    for reader in ["oracle", *frameworks]:
        assert perplexity(reader) == pytest.approx(expected, rel=1e-4), reader
