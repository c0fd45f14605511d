"""A prepared corpus, opened: memory-mapped tokens and what is known of them.

Runs in every framework's environment: NumPy and the standard library alone. `prepare.py` writes
what is read here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ptbench.corpus import CorpusError
from ptbench.corpus.vocabulary import END_OF_SENTENCE

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Corpus:
    """Three splits of token identifiers, each [tokens]."""

    train: npt.NDArray[np.int32]
    valid: npt.NDArray[np.int32]
    test: npt.NDArray[np.int32]
    vocabulary_size: int
    end_of_sentence: int  # identifier of `<eos>`
    description: dict[str, Any]  # the content of corpus.json


def open_corpus(folder: Path) -> Corpus:
    """The corpus that was prepared in a folder; its tokens are read from disk as they are used.

    Raises:
        CorpusError: if it is not there, or its parts do not belong together.
    """
    again = f"remove {folder / 'corpus.json'} and run the workflow again to prepare it anew"
    try:
        description = json.loads((folder / "corpus.json").read_text(encoding="utf-8"))
        size, tokens = description["vocabulary_size"], description["tokens"]
        end_of_sentence = read_vocabulary(folder).index(END_OF_SENTENCE)
        splits = [np.load(folder / f"{split}.npy", mmap_mode="r") for split in SPLITS]
    except FileNotFoundError as error:
        raise CorpusError(f"there is no prepared corpus in {folder}: no {error.filename}") from None
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise CorpusError(f"the corpus in {folder} is damaged ({error}); {again}") from error
    for split, array in zip(SPLITS, splits, strict=True):
        if array.dtype != np.int32 or array.shape != (tokens[split],):
            raise CorpusError(
                f"{folder / f'{split}.npy'} holds {array.dtype} {list(array.shape)} where "
                f"corpus.json has int32 [{tokens[split]}]; {again}"
            )
    train, valid, test = splits
    return Corpus(train, valid, test, size, end_of_sentence, description)


def read_vocabulary(folder: Path) -> list[str]:
    """Words of a prepared corpus by identifier."""
    return (folder / "vocabulary.txt").read_text(encoding="utf-8").split("\n")[:-1]
