"""Text to words and words to integers: tokens, the vocabulary and its order.

Values in, values out; `prepare.py` reads and writes the files.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from ptbench.corpus import CorpusError

END_OF_SENTENCE = "<eos>"
UNKNOWN = "<unk>"

Identifiers = npt.NDArray[np.int32]


def tokenize(text: str) -> list[str]:
    """The words of a text, each newline a word of its own, `<eos>`.

    Words are separated by white space as `str.split` knows it. An empty line is a lone `<eos>`, as
    in PyTorch's word_language_model, whose WikiText-2 has 2,088,628 training tokens.
    """
    return text.replace("\n", f" {END_OF_SENTENCE} ").split()


def build_vocabulary(train: Iterable[str], known: Iterable[str] = ()) -> list[str]:
    """Words by identifier: sorted by (-count in train, word).

    Args:
        train: tokens of the training split.
        known: words to include even if train has none of them.
    """
    counts = Counter(dict.fromkeys(known, 0))
    counts.update(train)
    return sorted(counts, key=lambda word: (-counts[word], word))


class Encoder:
    """Words to identifiers and back, under one vocabulary."""

    def __init__(self, vocabulary: Sequence[str]) -> None:
        self.vocabulary = vocabulary
        self._identifiers = {word: identifier for identifier, word in enumerate(vocabulary)}

    def encode(self, words: Sequence[str], source: str) -> tuple[Identifiers, int]:
        """Identifiers of the words [tokens], and how many words were outside the vocabulary.

        Args:
            words: tokens as `tokenize` gives them.
            source: what errors call the text, such as the path of its file.

        Raises:
            CorpusError: for a word outside a vocabulary that has no `<unk>`.
        """
        identifiers = np.fromiter(
            map(self._identifiers.get, words, itertools.repeat(-1)), np.int32, len(words)
        )
        outside = identifiers < 0
        if not outside.any():
            return identifiers, 0
        if UNKNOWN not in self._identifiers:
            first = int(outside.argmax())
            line = 1 + words[:first].count(END_OF_SENTENCE)
            raise CorpusError(
                f"{source}, line {line}: the word {words[first]!r} is not in the training text, "
                f"and neither is {UNKNOWN} to stand for it; use {UNKNOWN} for rare words in all "
                "three files, or leave the word out"
            )
        identifiers[outside] = self._identifiers[UNKNOWN]
        return identifiers, int(outside.sum())

    def decode(self, identifiers: Iterable[int]) -> list[str]:
        """Words of the identifiers."""
        return [self.vocabulary[identifier] for identifier in identifiers]
