"""Sources of a split's tokens: integers in memory, integers mapped from a file, or the text itself.

A source is read forwards from any place, by as many readers as there are streams; all sources of a
split give the same integers. Every framework's environment imports this, so it needs NumPy and the
standard library alone. `batching.py` makes batches of what is read.
"""

from __future__ import annotations

import abc
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ptbench.corpus import CorpusError
from ptbench.corpus.vocabulary import Encoder, tokenize

Tokens = npt.NDArray[np.integer[Any]]

CHUNK_BYTES = 8192  # of text that is tokenised at a time: about 1,600 words of English


class Reader(abc.ABC):
    """A position in a split that advances as tokens are read."""

    @abc.abstractmethod
    def read(self, count: int) -> Tokens:
        """Return the next tokens [count], fewer at the end of the split; do not write to them."""


class Source(abc.ABC):
    """The tokens of a split."""

    @abc.abstractmethod
    def __len__(self) -> int:
        """Return the number of tokens in the split."""

    @abc.abstractmethod
    def reader(self, start: int = 0) -> Reader:
        """Return a new reader, positioned at the token with that number, from 0."""


class Integers(Source):
    """Identifiers in an array, in memory or mapped from a file."""

    def __init__(self, tokens: Tokens) -> None:
        """Args: tokens: [tokens]."""
        self.tokens = np.asarray(tokens)  # a view of the file: its slices are cheap

    def __len__(self) -> int:
        return len(self.tokens)

    def reader(self, start: int = 0) -> Reader:
        return _IntegersReader(self.tokens, start)


class _IntegersReader(Reader):
    def __init__(self, tokens: Tokens, start: int) -> None:
        self._tokens, self._at = tokens, start

    def read(self, count: int) -> Tokens:
        start, self._at = self._at, self._at + count
        return self._tokens[start : self._at]


class Text(Source):
    """A text file, tokenised as it is read, one chunk in memory for each reader."""

    def __init__(self, path: Path, index: npt.NDArray[np.int64], encoder: Encoder) -> None:
        """Args: index: of the file's chunks, as `index_text` gives it."""
        self._path, self._index, self._encoder = path, index, encoder

    def __len__(self) -> int:
        return int(self._index[-1, 1])

    def reader(self, start: int = 0) -> Reader:
        number = int(np.searchsorted(self._index[:, 1], start, side="right")) - 1
        return _TextReader(self, number, start - int(self._index[number, 1]))

    def chunk(self, number: int) -> Tokens:
        """Return the identifiers of a chunk [tokens].

        Raises:
            CorpusError: if the file no longer fits its index.
        """
        (begin, first), (end, after) = self._index[number : number + 2].tolist()
        with self._path.open("rb") as file:
            file.seek(begin)
            raw = file.read(end - begin)
        words = tokenize(raw.decode("utf-8", errors="replace"))
        if len(raw) != end - begin or len(words) != after - first:
            raise CorpusError(f"{self._path} has changed since it was prepared; prepare it again")
        return self._encoder.encode(words, str(self._path))[0]

    @property
    def chunks(self) -> int:
        """Number of chunks of the text."""
        return len(self._index) - 1


class _TextReader(Reader):
    def __init__(self, text: Text, chunk: int, skipped: int) -> None:
        """Args: skipped: how many tokens of that chunk to leave out."""
        self._text, self._next_chunk, self._skipped = text, chunk, skipped
        self._tokens: Tokens = np.zeros(0, np.int32)  # read from the file and not returned yet

    def read(self, count: int) -> Tokens:
        parts = [self._tokens[:count]]
        self._tokens = self._tokens[count:]
        missing = count - len(parts[0])
        while missing > 0 and self._next_chunk < self._text.chunks:
            tokens = self._text.chunk(self._next_chunk)[self._skipped :]
            self._next_chunk, self._skipped = self._next_chunk + 1, 0
            parts.append(tokens[:missing])
            self._tokens = tokens[missing:]
            missing -= len(parts[-1])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def index_text(raw: bytes, chunk_bytes: int = CHUNK_BYTES) -> npt.NDArray[np.int64]:
    """Return where the chunks of a text begin, each about `chunk_bytes` long, cut between words.

    Args:
        raw: the text in UTF-8.

    Returns:
        [chunks + 1, 2]: for each chunk, and for the end, the bytes and the tokens before it.
    """
    rows, begin, tokens = [(0, 0)], 0, 0
    while begin < len(raw):
        end = begin + chunk_bytes
        if end < len(raw):
            # Cut after a space or newline, so that no word and no multi-byte letter is split.
            cut = max(raw.rfind(b" ", begin, end), raw.rfind(b"\n", begin, end))
            after = [at for at in (raw.find(b" ", end), raw.find(b"\n", end)) if at >= 0]
            end = 1 + (cut if cut >= 0 else min(after, default=len(raw) - 1))
        tokens += len(tokenize(raw[begin:end].decode("utf-8")))
        begin = min(end, len(raw))
        rows.append((begin, tokens))
    return np.array(rows, np.int64)
