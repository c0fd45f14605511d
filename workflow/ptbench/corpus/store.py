"""Open a prepared corpus: its tokens, its vocabulary and its facts.

Every framework's environment imports this, so it needs NumPy and pydantic alone.
`prepare.py` writes what is read here.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ptbench.corpus import CorpusError
from ptbench.corpus.definitions import SPLITS
from ptbench.corpus.sources import Integers, Source, Text
from ptbench.corpus.vocabulary import END_OF_SENTENCE, Encoder
from ptbench.model.recipe import TokenSource


@dataclass(frozen=True)
class Corpus:
    """Three splits and their vocabulary."""

    train: Source
    valid: Source
    test: Source
    words: list[str]  # by identifier
    end_of_sentence: int  # identifier of `<eos>`
    description: dict[str, Any]  # the content of corpus.json

    @property
    def vocabulary_size(self) -> int:
        """Number of word types."""
        return len(self.words)

    @property
    def vocabulary_sha256(self) -> str:
        """Checksum of the vocabulary: equal where identifiers mean the same words."""
        return hashlib.sha256("".join(f"{word}\n" for word in self.words).encode()).hexdigest()


def open_corpus(folder: Path, source: TokenSource = "memory") -> Corpus:
    """Open the corpus that was prepared in a folder.

    Args:
        folder: holds corpus.json.
        source: where tokens are read from, as the recipe says.

    Raises:
        CorpusError: if it does not exist, or its parts do not fit together.
    """
    again = f"remove {folder / 'corpus.json'} and run the workflow again to prepare it"
    try:
        description = json.loads((folder / "corpus.json").read_text(encoding="utf-8"))
        size, tokens = description["vocabulary_size"], description["tokens"]
        words = read_vocabulary(folder)
        if len(words) != size:
            raise ValueError(f"vocabulary.txt has {len(words)} words, corpus.json {size}")
        end_of_sentence = words.index(END_OF_SENTENCE)
        splits: list[Source]
        if source == "stream":
            encoder = Encoder(words)
            splits = [_text(folder, split, tokens[split], encoder) for split in SPLITS]
        else:
            splits = [_integers(folder, split, tokens[split], source) for split in SPLITS]
    except FileNotFoundError as error:
        if (folder / "corpus.json").exists():
            raise CorpusError(f"the corpus in {folder} lacks {error.filename}; {again}") from None
        raise CorpusError(f"there is no prepared corpus in {folder}: no {error.filename}") from None
    except (OSError, ValueError, LookupError, TypeError, EOFError) as error:
        raise CorpusError(f"the corpus in {folder} is damaged ({error}); {again}") from error
    train, valid, test = splits
    return Corpus(train, valid, test, words, end_of_sentence, description)


def _integers(folder: Path, split: str, tokens: int, source: TokenSource) -> Integers:
    path = folder / f"{split}.npy"
    array = np.load(path, mmap_mode="r")
    if array.dtype != np.int32 or array.shape != (tokens,):
        raise ValueError(
            f"{path} holds {array.dtype} {list(array.shape)} where corpus.json has int32 [{tokens}]"
        )
    return Integers(np.array(array) if source == "memory" else array)


def _text(folder: Path, split: str, tokens: int, encoder: Encoder) -> Text:
    path, index = folder / f"{split}.txt", np.load(folder / f"{split}.index.npy", mmap_mode="r")
    size = path.stat().st_size
    if index.dtype != np.int64 or index.ndim != 2 or index[-1].tolist() != [size, tokens]:
        raise ValueError(f"{path} has {size} bytes, and its index and corpus.json do not fit them")
    return Text(path, index, encoder)


def read_vocabulary(folder: Path) -> list[str]:
    """Return the words of a prepared corpus by identifier."""
    return (folder / "vocabulary.txt").read_text(encoding="utf-8").split("\n")[:-1]
