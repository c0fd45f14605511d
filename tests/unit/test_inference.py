"""Trained models, read from disk and put to use: scores, next words, samples, and bad input."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from safetensors.numpy import save_file
from tests.support.checkpoints import save_model, small_corpus
from tests.support.problems import VOCABULARY, new_oracle, random_parameters, recipe
from tests.support.sentences import assert_no_frames

from ptbench.backends.oracle import Oracle
from ptbench.cli import main
from ptbench.configuration.specification import Cell, Specification
from ptbench.corpus.store import Corpus, open_corpus
from ptbench.errors import PtbenchError
from ptbench.model.recipe import Keep, Recipe
from ptbench.model.shapes import kept_count, parameter_shapes, stored_bytes
from ptbench.training import inference
from ptbench.training.cell import Paths, run_cell
from ptbench.training.checkpoints import PLACES, packed, read_arrays, unpacked, write_arrays

SMALL = recipe(layers=1, embedding_size=4, hidden_size=4, test_batch_size=3, corpus="small")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of results with a corpus and a model on it."""
    folder = tmp_path_factory.mktemp("results")
    corpus = small_corpus(folder)
    parameters = random_parameters(SMALL, seed=1)
    save_model(folder / "checkpoints/mine/best.safetensors", SMALL, parameters, corpus)
    return folder


@pytest.fixture(scope="module")
def path(results: Path) -> Path:
    return results / "checkpoints/mine/best.safetensors"


@pytest.fixture(scope="module")
def corpus(results: Path) -> Corpus:
    return open_corpus(results / "corpora/small")


def model(changes: dict[str, Any], parameters_of: Recipe = SMALL) -> Oracle:
    """The oracle with the parameters of the model on disk."""
    backend = new_oracle(recipe(**SMALL.model_dump() | changes))
    backend.load_parameters(random_parameters(parameters_of, seed=1))
    return backend


def tokens_of(corpus: Corpus) -> list[int]:
    tokens: list[int] = corpus.test.reader().read(len(corpus.test)).tolist()
    return tokens


@pytest.mark.parametrize(
    ("keep", "files"),
    [
        ("best", {"best.safetensors"}),
        ("all", {"best.safetensors", "last.safetensors", "previous.safetensors"}),
        ("none", set()),
    ],
)
def test_the_best_model_of_a_run_scores_what_the_run_said(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: Keep, files: set[str]
) -> None:
    """Through the files alone: the corpus is found beside the checkpoints."""

    def create(cell: Cell, specification: Specification, size: int, *_: int) -> Oracle:
        return new_oracle(specification.recipe, seed=cell.seed, vocabulary_size=size)

    monkeypatch.setattr("ptbench.training.cell.create_backend", create)
    trained = recipe(
        **SMALL.model_dump() | {"epochs": 3, "constant_epochs": 3, "kept_weights": 0.2}
    )
    specification = Specification(variant="mine", recipe=trained, corpus_definition={})
    cell = Cell(variant="mine", framework="pytorch", devices=1, seed=4)
    (tmp_path / "corpora").symlink_to(results / "corpora")
    folder = tmp_path / "checkpoints" / cell.path
    paths = Paths(results / "corpora/small", tmp_path / "cell", tmp_path / "attempts", folder)
    metrics = run_cell(cell, specification, paths, threads=1, say=lambda _: None, keep=keep)
    assert {file.name for file in folder.iterdir()} == files
    if keep == "none":
        return
    stored, _ = read_arrays(folder / "best.safetensors")  # of a sparse matrix, its weights alone
    shape = parameter_shapes(trained, VOCABULARY)["rnn.0.recurrent"]
    assert stored["rnn.0.recurrent"].size == kept_count(trained, "rnn.0.recurrent", shape)
    assert sum(array.nbytes for array in stored.values()) == stored_bytes(trained, VOCABULARY)

    checkpoint = inference.read_checkpoint(folder / "best.safetensors")
    assert checkpoint.recipe == trained
    assert checkpoint.cell == cell
    found = inference.open_corpus_of(checkpoint)
    backend = inference.build(checkpoint, "oracle")
    assert inference.evaluate_split(backend, found, "test") == metrics.test
    assert metrics.valid is not None  # scored in training with the oracle's float64 parameters
    valid = inference.evaluate_split(backend, found, "valid")
    assert valid.nll == pytest.approx(metrics.valid.nll, rel=1e-5)


def test_places_that_no_matrix_has_are_refused() -> None:
    sparse = SMALL.model_copy(update={"kept_weights": 0.1})
    name, shape = "rnn.0.input", parameter_shapes(sparse, VOCABULARY)["rnn.0.input"]
    matrix = np.zeros(shape, np.float32)
    matrix[1, 2] = 7.0
    arrays = packed({name: matrix}, sparse)
    assert arrays[name].tolist() == [7.0]
    assert np.array_equal(unpacked(arrays, {name: shape})[name], matrix)
    with pytest.raises(ValueError, match=rf"{name}\.places has a place outside {name}"):
        unpacked(arrays, {name: (1, 2)})
    with pytest.raises(ValueError, match=rf"it has {name}\.places and no {name}"):
        unpacked({name + PLACES: arrays[name + PLACES]}, {name: shape})


@pytest.mark.parametrize("feeding", ["parallel_streams", "windows", "sentences"])
def test_next_words_follow_the_text_and_multiply_to_its_probability(
    corpus: Corpus, feeding: str
) -> None:
    backend = model({"feeding": feeding, "test_batch_size": 1})
    words = inference.predict_next_words(backend, corpus, "test", count=10_000)
    tokens = tokens_of(corpus)
    if feeding == "sentences":  # the first word follows an <eos> of its own
        tokens = [corpus.end_of_sentence, *tokens]
    assert [word.given for word in words] == tokens[:-1]
    assert [word.true for word in words] == tokens[1:]
    score = inference.evaluate_split(backend, corpus, "test")
    nll = -np.log([word.true_probability for word in words]).sum()
    assert nll == pytest.approx(score.nll * score.tokens, rel=1e-5)
    for word in words:
        assert word.predicted_probability >= word.true_probability
        assert (word.predicted == word.true) == (
            word.predicted_probability == word.true_probability
        )


def test_a_stretch_of_next_words_is_that_of_the_whole_split(corpus: Corpus) -> None:
    backend = model({})
    words = inference.predict_next_words(backend, corpus, "test", count=10_000)
    for start, count in ((0, 4), (3, 9), (len(words) - 2, 5)):
        stretch = inference.predict_next_words(backend, corpus, "test", start, count)
        assert stretch == words[start : start + count]
    with pytest.raises(PtbenchError, match=f"{len(words)} words to predict, and none after"):
        inference.predict_next_words(backend, corpus, "test", len(words), 1)


def test_samples_have_the_model_s_own_probabilities(corpus: Corpus) -> None:
    """The nll of a long sample under its model estimates the model's entropy, which is known."""
    backend = model({})
    count, expected, nll = 2000, 0.0, 0.0
    drawn = inference.sample(backend, corpus, count, seed=3)
    state = backend.initial_state(1, training=False)
    squares = 0.0
    for given, word in zip([corpus.end_of_sentence, *drawn[:-1]], drawn, strict=True):
        log_p, state = backend.next_token_log_probabilities(np.full((1, 1), given), state)
        p = np.exp(log_p[0, 0].astype(np.float64))
        entropy = -float(p @ log_p[0, 0])
        expected += entropy
        squares += float(p @ (log_p[0, 0] + entropy) ** 2)
        nll -= float(log_p[0, 0, word])
    assert abs(nll - expected) < 4 * np.sqrt(squares)


def test_sampling_is_repeatable_and_the_temperature_sharpens_it(corpus: Corpus) -> None:
    backend = model({})

    def sample(**options: Any) -> list[int]:
        return inference.sample(backend, corpus, 60, **options)

    assert sample(seed=1) == sample(seed=1) != sample(seed=2)
    coldest = sample(temperature=0.0)
    assert sample(temperature=1e-4, seed=5) == coldest
    words = inference.predict_next_words(backend, corpus, "test", count=1)
    assert len(set(sample(temperature=100.0))) > len(set(coldest))
    assert words  # the model is left as it was
    assert sample(temperature=0.0) == coldest


@pytest.mark.parametrize("feeding", ["parallel_streams", "windows", "sentences"])
def test_each_sentence_is_drawn_from_a_zero_state_if_it_was_trained_so(
    corpus: Corpus, feeding: str
) -> None:
    seen: list[tuple[int, bool]] = []

    class Recorder(Oracle):
        def next_token_log_probabilities(self, inputs: Any, state: Any) -> Any:
            seen.append((int(inputs[0, 0]), not any(part.any() for part in state.values())))
            return super().next_token_log_probabilities(inputs, state)

    backend = new_oracle(recipe(**SMALL.model_dump() | {"feeding": feeding}), kind=Recorder)
    inference.sample(backend, corpus, 300)
    begins = [word == corpus.end_of_sentence for word, _ in seen]
    assert sum(begins) > 1
    zero = [is_zero for _, is_zero in seen]
    assert zero == (begins if feeding == "sentences" else [True] + [False] * 299)


def test_files_that_are_no_checkpoint_are_one_sentence_each(path: Path, tmp_path: Path) -> None:
    cases = {
        "there is no checkpoint": tmp_path / "nothing.safetensors",
        "cut.safetensors is not a checkpoint: it cannot be read": tmp_path / "cut.safetensors",
        "flipped.safetensors is not a checkpoint: its checksum": tmp_path / "flipped.safetensors",
        "model.pt is not a checkpoint: it cannot be read": tmp_path / "model.pt",
        "empty.safetensors is not a checkpoint": tmp_path / "empty.safetensors",
        "bare.safetensors is not a checkpoint": tmp_path / "bare.safetensors",
        "is a folder": tmp_path,
    }
    content = path.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[: len(content) // 2])
    (tmp_path / "flipped.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    (tmp_path / "empty.safetensors").write_bytes(b"")
    (tmp_path / "model.pt").write_bytes(pickle.dumps(Loaded()))
    save_file({"embedding": np.zeros((2, 2), np.float32)}, tmp_path / "bare.safetensors")
    for sentence, file in cases.items():
        with pytest.raises(PtbenchError, match=re.escape(sentence)) as caught:
            inference.read_checkpoint(file)
        assert "\n" not in str(caught.value)
        assert "best.safetensors" in str(caught.value)
    assert not Loaded.ran


class Loaded:
    """Says so if somebody unpickles it."""

    ran = False

    def __reduce__(self) -> Any:
        return setattr, (Loaded, "ran", True)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"vocabulary_size": "41"}, "embedding has shape"),
        ({"vocabulary_size": "many"}, "damaged header"),
        ({"cell": "mine"}, "damaged header"),
        ({"specification": "{}"}, "the specification cannot be read"),
    ],
)
def test_a_header_that_does_not_fit_is_said(
    results: Path, tmp_path: Path, changes: dict[str, str], sentence: str
) -> None:
    parameters = random_parameters(SMALL, seed=1)
    file = save_model(
        tmp_path / "best.safetensors", SMALL, parameters, results / "corpora/small", **changes
    )
    with pytest.raises(PtbenchError, match=sentence) as caught:
        inference.read_checkpoint(file)
    assert "best.safetensors" in str(caught.value)


def test_a_checkpoint_of_an_unfinished_run_is_no_model(tmp_path: Path) -> None:
    write_arrays(tmp_path / "last.safetensors", {"step": np.zeros(1)}, {"checkpoint": "{}"})
    with pytest.raises(PtbenchError, match=r"last\.safetensors is no trained model"):
        inference.read_checkpoint(tmp_path / "last.safetensors")


def test_a_corpus_that_does_not_fit_is_said(path: Path, tmp_path: Path) -> None:
    checkpoint = inference.read_checkpoint(path)
    larger = small_corpus(tmp_path / "larger", VOCABULARY + 1)
    with pytest.raises(PtbenchError, match=r"has 41 words and the model in .* knows 40"):
        inference.open_corpus_of(checkpoint, larger)
    others = " ".join(f"other{n}" for n in range(VOCABULARY - 1)) + "\n"
    different = small_corpus(tmp_path / "different", train=others, valid=others, test=others)
    with pytest.raises(PtbenchError, match="has other words than the model"):
        inference.open_corpus_of(checkpoint, different)
    with pytest.raises(PtbenchError, match="there is no prepared corpus in"):
        inference.open_corpus_of(checkpoint, tmp_path / "nowhere")
    alone = tmp_path / "best.safetensors"
    alone.write_bytes(path.read_bytes())
    with pytest.raises(PtbenchError, match="no prepared corpus small near it"):
        inference.open_corpus_of(inference.read_checkpoint(alone))


def test_the_corpus_is_found_though_the_models_were_moved_to_another_disk(
    results: Path, tmp_path: Path
) -> None:
    shutil.copytree(results, tmp_path / "results")
    checkpoints = tmp_path / "results/checkpoints"
    checkpoints.rename(tmp_path / "disk")
    checkpoints.symlink_to(tmp_path / "disk")
    moved = inference.read_checkpoint(checkpoints / "mine/best.safetensors")
    assert inference.open_corpus_of(moved).vocabulary_size == VOCABULARY


def ptbench(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ptbench", *arguments], capture_output=True, text=True
    )


def test_evaluate_prints_the_score(path: Path, corpus: Corpus) -> None:
    expected = inference.evaluate_split(model({}), corpus, "valid")
    arguments = ["--framework", "oracle", "--checkpoint", path, "--split", "valid"]
    answer = ptbench("evaluate", *arguments, "--json")
    assert answer.returncode == 0, answer.stderr
    said = {"framework": "oracle", "split": "valid"} | expected.model_dump()
    assert json.loads(answer.stdout) == said
    text = ptbench("evaluate", *arguments).stdout
    assert text.startswith(f"valid perplexity {expected.perplexity:.4f}, {expected.nll:.6f} nats")


def test_predict_prints_words_and_a_sample(path: Path, corpus: Corpus) -> None:
    words = inference.predict_next_words(model({}), corpus, "test", 5, 7)
    drawn = inference.sample(model({}), corpus, 9, temperature=0.5, seed=2)
    options = ["--start", "5", "--words", "7", "--sample", "9", "--temperature", "0.5"]
    arguments = ["--framework", "oracle", "--checkpoint", path, *options, "--seed", "2"]
    answer = ptbench("predict", *arguments, "--json")
    assert answer.returncode == 0, answer.stderr
    said = json.loads(answer.stdout)
    assert [each["true"] for each in said["predictions"]] == [corpus.words[w.true] for w in words]
    assert said["sample"].split() == [corpus.words[word] for word in drawn]
    lines = ptbench("predict", *arguments).stdout.splitlines()
    assert [line.split()[0] for line in lines[1:8]] == [corpus.words[w.true] for w in words]
    assert lines[-1].split() == said["sample"].split()


@pytest.fixture
def refused(path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must fail with a message alone; return the message."""

    def run(command: str, *arguments: str) -> str:
        words = [command, "--framework", "oracle", "--checkpoint", str(path), *arguments]
        # The command removes settings from its environment, which is this process'.
        with mock.patch.dict(os.environ), pytest.raises(SystemExit) as exit_:
            main(words)
        assert exit_.value.code == 2
        said, error = capfd.readouterr()
        assert said == ""
        assert_no_frames(error)
        return error

    return run


@pytest.mark.parametrize("command", ["evaluate", "predict"])
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--framework", "theano"], "invalid choice: 'theano'"),
        (["--checkpoint", "nothing"], "ptbench: there is no checkpoint nothing"),
        (["--split", "dev"], "invalid choice: 'dev'"),
        (["--corpus", "nowhere"], "ptbench: there is no prepared corpus in nowhere"),
        (["--threads", "0"], "0 is not a whole number above 0"),
        (
            ["--framework", "mxnet", "--environments", "nowhere"],
            "ptbench: mxnet cannot be imported here, and nowhere/mxnet-cpu is not built; run "
            "`uv run ptbench environments mxnet --accelerator cpu --output nowhere`",
        ),
    ],
)
def test_what_cannot_be_done_is_a_sentence(
    refused: Callable[..., str], command: str, arguments: list[str], sentence: str
) -> None:
    assert sentence in refused(command, *arguments)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--start", "100000"], "words to predict, and none after the first 100000"),
        (["--temperature", "-1"], "-1 is not a number from 0"),
        (["--temperature", "nan"], "nan is not a number from 0"),
        (["--words", "0"], "0 is not a whole number above 0"),
    ],
)
def test_a_prediction_that_cannot_be_made_is_a_sentence(
    refused: Callable[..., str], arguments: list[str], sentence: str
) -> None:
    assert sentence in refused("predict", *arguments)
