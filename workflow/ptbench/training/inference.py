"""What a trained model predicts, in any framework: a split's perplexity, next words, text.

A model is read from the `best.safetensors` of a finished run, whichever framework wrote it.
`cli.py` prints the answers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ptbench.backends import FRAMEWORKS, create
from ptbench.backends.base import Backend, Setup
from ptbench.configuration.specification import Cell, Specification, parse_cell_path
from ptbench.corpus.definitions import Split
from ptbench.corpus.store import Corpus, open_corpus
from ptbench.errors import PtbenchError
from ptbench.files import folders_above
from ptbench.model.parameters import Parameters, check_parameters, parameter_shapes
from ptbench.model.recipe import Accelerator, Recipe
from ptbench.training.cell import feed_split, read_specification
from ptbench.training.checkpoints import RejectedError, read_arrays, unpacked
from ptbench.training.loop import evaluate
from ptbench.training.records import Score


class Checkpoint(NamedTuple):
    """A trained model, and what is needed to build it."""

    path: Path
    cell: Cell
    specification: Specification
    vocabulary_size: int
    vocabulary_sha256: str  # of the corpus' vocabulary.txt
    parameters: Parameters

    @property
    def recipe(self) -> Recipe:
        """The recipe that it was trained with."""
        return self.specification.recipe.model_copy(update={"budget": "full"})


class NextWord(NamedTuple):
    """A word, the one that followed it in the text, and the one that the model predicted."""

    given: int
    true: int
    predicted: int  # the most probable
    true_probability: float
    predicted_probability: float


def read_checkpoint(path: Path) -> Checkpoint:
    """Return a trained model and what its header says.

    Raises:
        PtbenchError: if it is not there, or is not the whole `best.safetensors` of a run.
    """
    wanted = "name the best.safetensors of a finished run"
    if path.is_dir():
        raise PtbenchError(f"{path} is a folder; {wanted}")
    try:
        arrays, metadata = read_arrays(path)
    except FileNotFoundError:
        raise PtbenchError(f"there is no checkpoint {path}; {wanted}") from None
    except RejectedError as reason:
        raise PtbenchError(f"{path} is not a checkpoint: {reason}; {wanted}") from None
    try:
        specification = read_specification(metadata["specification"])
        cell = parse_cell_path(metadata["cell"])
        size = int(metadata["vocabulary_size"])
        vocabulary = metadata["vocabulary_sha256"]
    except KeyError as error:
        raise PtbenchError(f"{path} is no trained model: it has no {error}; {wanted}") from None
    except ValueError as error:
        raise PtbenchError(f"{path} has a damaged header ({error}); {wanted}") from error
    except PtbenchError as error:
        why = str(error).splitlines()[0]
        raise PtbenchError(f"{path} cannot be used: {why}; {wanted}") from error
    try:
        shapes = parameter_shapes(specification.recipe, size)
        arrays = unpacked(arrays, shapes)
        check_parameters(arrays, shapes)
    except ValueError as error:
        raise PtbenchError(f"{path} is no trained model: {error}; {wanted}") from None
    return Checkpoint(path, cell, specification, size, vocabulary, arrays)


def open_corpus_of(checkpoint: Checkpoint, folder: Path | None = None) -> Corpus:
    """Open the corpus that a model was trained on, or another with the same vocabulary.

    Args:
        checkpoint: the model.
        folder: the corpus' own; None: in `corpora/` of the results that the checkpoint is in.

    Raises:
        PtbenchError: if it is not there, or its vocabulary is not the model's.
    """
    if folder is None:
        name = checkpoint.recipe.corpus_folder
        results = [parent / "corpora" / name for parent in folders_above(checkpoint.path)]
        folder = next((path for path in results if (path / "corpus.json").exists()), None)
        if folder is None:
            raise PtbenchError(
                f"{checkpoint.path} has no prepared corpus {name} near it; name its folder with "
                "--corpus"
            )
    corpus = open_corpus(folder, checkpoint.recipe.source)
    if corpus.vocabulary_size != checkpoint.vocabulary_size:
        raise PtbenchError(
            f"the corpus in {folder} has {corpus.vocabulary_size} words and the model in "
            f"{checkpoint.path} knows {checkpoint.vocabulary_size}; it was trained on "
            f"{checkpoint.recipe.corpus_folder}"
        )
    if corpus.vocabulary_sha256 != checkpoint.vocabulary_sha256:
        raise PtbenchError(
            f"the corpus in {folder} has other words than the model in {checkpoint.path} knows; "
            f"it was trained on {checkpoint.recipe.corpus_folder}"
        )
    return corpus


def build(
    checkpoint: Checkpoint,
    framework: str,
    accelerator: Accelerator = "cpu",
    threads: int = 1,
    changes: Mapping[str, Any] | None = None,
) -> Backend:
    """Build the model in a framework, whichever trained it.

    Its layers are the framework's own (`kernel: fused`) where it lacks the kernel that the model
    was trained with; they compute the same. Where it lacks the precision, it computes in float32,
    so that results differ by the rounding. `changes` are of keys that concern training alone.
    """
    recipe = checkpoint.recipe.model_copy(update=changes)
    row = FRAMEWORKS.get(framework)
    lacking = ["kernel", "precision"] if row is None else row.lacks(recipe)
    usual = {key: Recipe.model_fields[key].default for key in lacking}
    recipe = recipe.model_copy(update=usual)
    seed = checkpoint.cell.seed  # which weights a sparse model has depends on it
    size = checkpoint.vocabulary_size
    backend = create(framework, Setup(recipe, size, 1, seed, accelerator, threads))
    backend.load_parameters(checkpoint.parameters)
    return backend


def evaluate_split(backend: Backend, corpus: Corpus, split: Split) -> Score:
    """Return the score of a split, read as a run reads it: every predicted token counts once."""
    recipe = backend.recipe
    batch_size = recipe.test_batch_size if split == "test" else recipe.evaluation_batch_size
    feed = feed_split(corpus, recipe, split, batch_size)
    return evaluate(backend, feed)


def predict_next_words(
    backend: Backend, corpus: Corpus, split: Split, start: int = 0, count: int = 20
) -> list[NextWord]:
    """Return true and predicted next words in a stretch of a split.

    The model reads the split from its beginning, as it was trained to: with its state carried on,
    or from a zero state for each window or sentence.

    Args:
        backend: the model.
        corpus: in its vocabulary.
        split: of the corpus.
        start: predictions to leave out.
        count: predictions to return; fewer if the split ends.

    Raises:
        PtbenchError: if the split has none there.
    """
    feed = feed_split(corpus, backend.recipe, split, 1)
    if start >= feed.predicted_tokens:
        raise PtbenchError(
            f"the {split} split has {feed.predicted_tokens} words to predict, and none after "
            f"the first {start}"
        )
    words: list[NextWord] = []
    before = 0
    zero_state = state = backend.initial_state(1, training=False)
    with contextlib.closing(feed.epoch(1)) as batches:
        for batch in batches:
            log_p, after = backend.next_token_log_probabilities(batch.inputs, state)
            state = after if feed.carries_state else zero_state
            real = int(batch.mask.sum())  # padding is at the end
            for time in range(max(start - before, 0), real):
                given, true = batch.inputs[time, 0], batch.targets[time, 0]
                words.append(_next_word(given, true, log_p[time, 0]))
                if len(words) == count:
                    return words
            before += real
    return words


def _next_word(given: np.int32, true: np.int32, log_p: npt.NDArray[np.float32]) -> NextWord:
    best = int(log_p.argmax())
    return NextWord(
        int(given), int(true), best, float(np.exp(log_p[true])), float(np.exp(log_p[best]))
    )


def sample(
    backend: Backend, corpus: Corpus, count: int, temperature: float = 1.0, seed: int = 0
) -> list[int]:
    """Draw words after an `<eos>`, each from the model's distribution after those before it.

    Args:
        backend: the model.
        corpus: in its vocabulary.
        count: words to draw.
        temperature: log-probabilities are divided by it; 0: always the most probable word.
        seed: of the draws.
    """
    random = np.random.default_rng(seed)
    zero_state = state = backend.initial_state(1, training=False)
    words: list[int] = []
    for _ in range(count):
        word = words[-1] if words else corpus.end_of_sentence
        if word == corpus.end_of_sentence and backend.recipe.feeding == "sentences":
            state = zero_state  # as each sentence was trained
        given = np.full((1, 1), word, np.int32)
        log_p, state = backend.next_token_log_probabilities(given, state)
        words.append(_draw(log_p[0, 0].astype(np.float64), temperature, random.random()))
    return words


def _draw(log_p: npt.NDArray[np.float64], temperature: float, uniform: float) -> int:
    """Return the word at which the cumulative distribution passes a number in [0, 1)."""
    if temperature == 0:
        return int(log_p.argmax())
    p = np.exp((log_p - log_p.max()) / temperature).cumsum()
    return int(np.searchsorted(p, uniform * p[-1], side="right"))
