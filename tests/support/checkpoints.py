"""Small corpora and trained models on disk, as a run leaves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from tests.support.problems import VOCABULARY

from ptbench.configuration.specification import Specification
from ptbench.corpus.definitions import FolderCorpus
from ptbench.corpus.prepare import prepare
from ptbench.corpus.store import open_corpus
from ptbench.model.parameters import Parameters
from ptbench.model.recipe import Recipe
from ptbench.training.checkpoints import write_arrays


def small_corpus(folder: Path, words: int = VOCABULARY, **changes: str) -> Path:
    """Prepare a corpus in `folder/corpora/small`, and return that folder.

    Args:
        folder: where the raw text goes too.
        words: size of the vocabulary, `<eos>` included.
        changes: texts of splits, in place of random ones.
    """
    raw = folder / "raw"
    raw.mkdir(parents=True)
    for seed, (split, lines) in enumerate({"train": 60, "valid": 9, "test": 12}.items()):
        rng = np.random.default_rng(seed)
        names = [f"word{n}" for n in range(words - 1)]
        text = "".join(
            " ".join(rng.choice(names, rng.integers(1, 20))) + "\n" for _ in range(lines)
        )
        (raw / f"{split}.txt").write_text(" ".join(names) + "\n" + text)
    for split, text in changes.items():
        (raw / f"{split}.txt").write_text(text)
    output = folder / "corpora" / "small"
    corpus = FolderCorpus(kind="folder", folder=raw)
    prepare("small", corpus, None, folder / "downloads", output)
    return output


def save_model(
    path: Path, recipe: Recipe, parameters: Parameters, corpus: Path, seed: int = 0, **changes: Any
) -> Path:
    """Write a `best.safetensors` with these parameters, and return its path."""
    recipe = recipe.model_copy(update={"corpus": "small"})
    specification = Specification(variant="mine", recipe=recipe, corpus_definition={})
    opened = open_corpus(corpus)
    metadata = {
        "cell": f"mine/pytorch/devices-1/seed-{seed}",
        "specification": specification.text(),
        "vocabulary_size": str(opened.vocabulary_size),
        "vocabulary_sha256": opened.vocabulary_sha256,
    }
    write_arrays(path, parameters, metadata | changes)
    return path
