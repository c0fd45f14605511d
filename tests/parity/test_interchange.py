"""A model on disk has the same perplexity in every framework, whichever trained it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.support import probes
from tests.support.cases import MODELS
from tests.support.checkpoints import save_model, small_corpus
from tests.support.problems import AWD, new_oracle, random_batch, random_parameters, recipe, train
from tests.support.remote import ROOT, Backends, probe

from ptbench.corpus.store import open_corpus
from ptbench.model.recipe import Recipe
from ptbench.training.inference import evaluate_split

HALF = 5e-5  # two frameworks that are this close to the oracle are within 1e-4 of each other


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of results with a corpus."""
    folder = tmp_path_factory.mktemp("interchange")
    small_corpus(folder)
    return folder


def model(changes: dict[str, Any]) -> Recipe:
    return recipe(**changes, evaluation_batch_size=4, test_batch_size=4)


def oracle_s_perplexity(folder: Path, saved: Recipe, parameters: Any, seed: int) -> float:
    oracle = new_oracle(saved, seed=seed)
    oracle.load_parameters(parameters)
    return evaluate_split(oracle, open_corpus(folder / "corpora/small"), "test").perplexity


# The cases of `test_cases.py` show that the same parameters give the same loss. This is about what
# is saved: names and shapes, and the seed that says which weights there are.
SAVED = ("lstm, two biases", "few weights, gru", "mixture, tied, projected", "mixture, factorised")


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(changes, marks=[] if name in SAVED else pytest.mark.exhaustive, id=name)
        for name, changes in MODELS.items()
    ],
)
def test_every_framework_gives_a_model_the_oracle_s_perplexity(
    backends: Backends, framework: str, folder: Path, changes: dict[str, Any]
) -> None:
    saved = model(changes)
    parameters = random_parameters(saved, seed=1)
    path = save_model(folder / "any.safetensors", saved, parameters, folder / "corpora/small", 3)
    anyone = backends.get(framework, recipe())  # a process in the framework's environment
    score = probe(probes.score_of_checkpoint, anyone, str(path), "test")
    expected = oracle_s_perplexity(folder, saved, parameters, seed=3)
    assert score["perplexity"] == pytest.approx(expected, rel=HALF)
    assert score["tokens"] == len(open_corpus(folder / "corpora/small").test) - 1


def test_a_model_trained_with_a_kernel_that_others_lack_is_read_by_all(
    backends: Backends, framework: str, folder: Path
) -> None:
    """TensorFlow's BlockLSTM; and weights that a sparse product skips."""
    for changes in ({"kernel": "block"}, {"kernel": "sparse", "kept_weights": 0.3}):
        saved = model(changes)
        parameters = random_parameters(saved, seed=2)
        path = save_model(folder / "k.safetensors", saved, parameters, folder / "corpora/small", 3)
        anyone = backends.get(framework, recipe())
        score = probe(probes.score_of_checkpoint, anyone, str(path), "test")
        expected = oracle_s_perplexity(folder, saved, parameters, seed=3)
        assert score["perplexity"] == pytest.approx(expected, rel=HALF)


@pytest.mark.parametrize("kind", ["lstm", "mixture, tied, projected"])
def test_a_model_trained_in_a_framework_is_the_same_in_the_oracle(
    backends: Backends, framework: str, folder: Path, kind: str
) -> None:
    trained = model(MODELS[kind])
    backend = backends.get(framework, trained)
    train(backend, [random_batch(seed) for seed in range(3)], [1.0] * 3)
    path = save_model(
        folder / "t.safetensors", trained, backend.parameters(), folder / "corpora/small"
    )
    score = probe(probes.score_of_checkpoint, backend, str(path), "valid")
    oracle = new_oracle(trained)
    expected = probe(probes.score_of_checkpoint, oracle, str(path), "valid")
    assert score["perplexity"] == pytest.approx(expected["perplexity"], rel=HALF)


def test_a_model_that_goes_on_learning_has_the_oracle_s_perplexity(
    backends: Backends, framework: str, folder: Path
) -> None:
    """Dynamic evaluation, of a model that was trained with dropout and penalties."""
    saved = model({**AWD, "layers": 1, "dropout": 0.35})
    parameters = random_parameters(saved, seed=1)
    path = save_model(folder / "awd.safetensors", saved, parameters, folder / "corpora/small")
    anyone = backends.get(framework, recipe())
    how = (0.02, 0.1)
    score = probe(probes.dynamic_score_of_checkpoint, anyone, str(path), *how)
    expected = probe(probes.dynamic_score_of_checkpoint, new_oracle(saved), str(path), *how)
    assert score["perplexity"] == pytest.approx(expected["perplexity"], rel=HALF)
    unchanged = probe(probes.dynamic_score_of_checkpoint, new_oracle(saved), str(path), 0.0, 0.1)
    assert abs(expected["perplexity"] / unchanged["perplexity"] - 1) > 100 * HALF


def test_next_words_and_a_sample_are_the_oracle_s(
    backends: Backends, framework: str, folder: Path
) -> None:
    path = small_model(folder)
    anyone = backends.get(framework, recipe())
    said = probe(probes.predictions_of_checkpoint, anyone, str(path))
    expected = probe(probes.predictions_of_checkpoint, new_oracle(recipe()), str(path))
    assert said["words"] == expected["words"]
    assert said["probabilities"] == pytest.approx(expected["probabilities"], rel=1e-4)


# Every framework is entered in the same way, which starts it twice, for seconds; what each of them
# answers is in the tests above.
@pytest.mark.one_framework
def test_the_command_line_answers_in_the_framework_s_own_environment(
    backends: Backends, framework: str, folder: Path
) -> None:
    """Called with this interpreter, which has no framework."""
    path = small_model(folder)
    anyone = backends.get(framework, recipe())  # its environment is built

    def ask(command: str, *options: str) -> Any:
        answer = subprocess.run(
            [sys.executable, "-m", "ptbench", command, "--framework", framework,
             "--checkpoint", path, "--json", *options],
            cwd=ROOT, env=os.environ, capture_output=True, text=True,
        )  # fmt: skip
        assert answer.returncode == 0, answer.stderr
        return json.loads(answer.stdout)

    expected = probe(probes.score_of_checkpoint, anyone, str(path), "test")
    assert ask("evaluate")["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-6)
    said = ask("predict", "--words", "6", "--sample", "8", "--seed", "1")
    probabilities = [each["true_probability"] for each in said["predictions"]]
    expected = probe(probes.predictions_of_checkpoint, anyone, str(path))
    assert probabilities == pytest.approx(expected["probabilities"][:6], rel=1e-6)
    words = open_corpus(folder / "corpora/small").words
    assert said["sample"].split() == [words[word] for word in expected["words"][-8:]]


def small_model(folder: Path) -> Path:
    """Return a saved model on the folder's corpus."""
    saved = model({})
    parameters = random_parameters(saved, seed=4)
    return save_model(folder / "small.safetensors", saved, parameters, folder / "corpora/small")
