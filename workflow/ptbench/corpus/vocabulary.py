"""Split text into words, order the vocabulary, and turn words into integers and back.

Nothing here reads or writes files; `prepare.py` does.
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

ADVICE = f"write {UNKNOWN} for rare words in all three files, or remove the word"


def tokenize(text: str) -> list[str]:
    """The words of a text, each newline a word of its own, `<eos>`.

    Words are separated by white space as `str.split` knows it. An empty line is a lone `<eos>`, as
    in PyTorch's word_language_model, whose WikiText-2 has 2,088,628 training tokens.
    """
    return text.replace("\n", f" {END_OF_SENTENCE} ").split()


def build_vocabulary(train: Iterable[str], known: Iterable[str] = ()) -> list[str]:
    """Return the words by identifier: the most frequent first, equals in alphabetical order.

    Args:
        train: tokens of the training split.
        known: words to include even if train has none of them.
    """
    counts = Counter(dict.fromkeys(known, 0))
    counts.update(train)
    return sorted(counts, key=lambda word: (-counts[word], word))


class Encoder:
    """Translates words to identifiers, for one vocabulary."""

    def __init__(self, vocabulary: Sequence[str]) -> None:
        self._identifiers = {word: identifier for identifier, word in enumerate(vocabulary)}

    def encode(
        self, words: Sequence[str], source: str, advice: str = ADVICE
    ) -> tuple[Identifiers, int]:
        """Return the identifiers of the words [tokens], and how many were outside the vocabulary.

        Args:
            words: tokens as `tokenize` gives them.
            source: name of the text in errors, such as the path of its file.
            advice: what errors tell the user to do.

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
                f"which has no {UNKNOWN} either; {advice}"
            )
        identifiers[outside] = self._identifiers[UNKNOWN]
        return identifiers, int(outside.sum())
