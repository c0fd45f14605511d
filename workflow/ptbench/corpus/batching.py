"""Token streams as batches. Imports NumPy alone: runs in every framework's environment.

Three ways to feed a model, one class each. All are deterministic in the epoch's number, yield
arrays that are new and the reader's own to keep, and fill up what is incomplete with masked tokens,
so that shapes repeat and compiled frameworks compile once for each.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.integer[Any]]


class Batch(NamedTuple):
    """What one step reads."""

    inputs: npt.NDArray[np.int32]  # [time, batch]
    targets: npt.NDArray[np.int32]  # [time, batch]
    mask: npt.NDArray[np.float32]  # [time, batch], 0 where there is no token to predict


class Feed(abc.ABC):
    """A split as batches, epoch after epoch."""

    carries_state: ClassVar[bool]  # whether a batch continues the text of the one before it

    batch_size: int
    predicted_tokens: int  # tokens with a mask of 1 in one epoch

    @abc.abstractmethod
    def __len__(self) -> int:
        """Batches in an epoch."""

    @abc.abstractmethod
    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, counted from 1, without the first `start` of them."""

    def shapes(self) -> list[Batch]:
        """One batch of every shape there is, to compile with."""
        return [next(self.epoch(1))]


def _check(tokens: Tokens) -> None:
    if len(tokens) < 2:
        raise ValueError(f"a split of {len(tokens)} tokens predicts nothing; it needs 2")


class ParallelStreams(Feed):
    """The split as `batch_size` contiguous streams, read in successive windows.

    The batching of Zaremba et al. 2014 and the TensorFlow PTB tutorial, with state carried from
    window to window, save that nothing is dropped: the split's tokens but the first are each
    predicted exactly once. The last stream may be shorter than the others and the last window
    incomplete.
    """

    carries_state = True

    def __init__(self, tokens: Tokens, batch_size: int, sequence_length: int) -> None:
        """Args: tokens: [tokens], at least two of them."""
        _check(tokens)
        self.predicted_tokens = len(tokens) - 1
        stream_length = -(-self.predicted_tokens // batch_size)
        self.windows = -(-stream_length // sequence_length)
        self.batch_size, self.sequence_length = batch_size, sequence_length

        # Laid out once, [time, batch]: slices of it are the windows.
        padded = np.zeros((3, batch_size * stream_length), np.int32)
        padded[0, : self.predicted_tokens] = tokens[:-1]
        padded[1, : self.predicted_tokens] = tokens[1:]
        padded[2, : self.predicted_tokens] = 1
        self._streams = np.zeros((3, self.windows * sequence_length, batch_size), np.int32)
        self._streams[:, :stream_length] = padded.reshape(3, batch_size, stream_length).swapaxes(
            1, 2
        )

    def __len__(self) -> int:
        return self.windows

    def epoch(self, number: int = 1, start: int = 0) -> Iterator[Batch]:  # noqa: ARG002
        for window in range(start, self.windows):
            rows = slice(window * self.sequence_length, (window + 1) * self.sequence_length)
            inputs, targets, mask = self._streams[:, rows]
            yield Batch(inputs.copy(), targets.copy(), mask.astype(np.float32))


class Windows(Feed):
    """Successive windows of the text, each from a zero state; a batch is `batch_size` of them.

    For evaluation, every token but the first is predicted once, the last window and the last
    batch filled up.

    For training (`wraps`), as Singh 2018's generator does it: whole windows only, back to the
    beginning of the text when fewer than a window is left, tokens // (batch_size x length) batches
    in an epoch, and the next epoch goes on where the last one ended.
    """

    carries_state = False

    def __init__(
        self, tokens: Tokens, batch_size: int, sequence_length: int, wraps: bool = False
    ) -> None:
        """Args: tokens: [tokens], at least two of them."""
        _check(tokens)
        self.batch_size, self.sequence_length, self.wraps = batch_size, sequence_length, wraps
        self._tokens = tokens
        predictions = len(tokens) - 1
        if wraps:
            self._windows = predictions // sequence_length
            self._batches = len(tokens) // (batch_size * sequence_length)
            if not self._windows or not self._batches:
                raise ValueError(
                    f"a split of {len(tokens)} tokens has not one batch of {batch_size} windows of "
                    f"{sequence_length}; lower batch_size or sequence_length"
                )
            self.predicted_tokens = self._batches * batch_size * sequence_length
        else:
            self._windows = -(-predictions // sequence_length)
            self._batches = -(-self._windows // batch_size)
            self.predicted_tokens = predictions

    def __len__(self) -> int:
        return self._batches

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        before = (number - 1) * self._batches if self.wraps else 0
        for index in range(start, self._batches):
            window = (before + index) * self.batch_size + np.arange(self.batch_size)
            if self.wraps:
                window %= self._windows
            # position of each input in the text, [time, batch]
            at = np.arange(self.sequence_length)[:, None] + window * self.sequence_length
            mask = at < len(self._tokens) - 1
            at = np.where(mask, at, 0)
            inputs, targets = (self._tokens[at + shift] * mask for shift in (0, 1))
            yield Batch(inputs.astype(np.int32), targets.astype(np.int32), mask.astype(np.float32))


class Sentences(Feed):
    """One sentence a row, from `<eos>` to `<eos>`, each from a zero state (SparseLang 2018).

    Sentences of similar length share a batch: their lengths are rounded up to a multiple of
    `BUCKET`, and batches come in the order in which they fill up, incomplete ones at the end.
    Every token is predicted once, the first of the split after an `<eos>` too.
    """

    carries_state = False
    BUCKET = 8  # tokens; 11 shapes for PTB, whose longest sentence has 83

    def __init__(self, tokens: Tokens, batch_size: int, end_of_sentence: int) -> None:
        """Args: tokens: [tokens]; end_of_sentence: the identifier that ends a sentence."""
        _check(tokens)
        self.batch_size, self._end = batch_size, end_of_sentence
        self._tokens = np.concatenate([[end_of_sentence], tokens]).astype(np.int32)
        self.predicted_tokens = len(tokens)
        ends = np.flatnonzero(self._tokens == end_of_sentence)
        if ends[-1] != len(self._tokens) - 1:
            ends = np.append(ends, len(self._tokens) - 1)
        starts, lengths = ends[:-1], np.diff(ends)
        filling: dict[int, list[int]] = {}
        self._plan: list[tuple[int, list[int]]] = []  # (steps, first inputs' positions)
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
            steps = -(-length // self.BUCKET) * self.BUCKET
            rows = filling.setdefault(steps, [])
            rows.append(start)
            if len(rows) == batch_size:
                self._plan.append((steps, filling.pop(steps)))
        self._plan += sorted(filling.items())
        self._lengths = dict(zip(starts.tolist(), lengths.tolist(), strict=True))

    def __len__(self) -> int:
        return len(self._plan)

    def epoch(self, number: int = 1, start: int = 0) -> Iterator[Batch]:  # noqa: ARG002
        for steps, rows in self._plan[start:]:
            yield self._batch(steps, rows)

    def _batch(self, steps: int, rows: list[int]) -> Batch:
        first = np.zeros(self.batch_size, np.int64)
        length = np.zeros(self.batch_size, np.int64)
        first[: len(rows)] = rows
        length[: len(rows)] = [self._lengths[row] for row in rows]
        time = np.arange(steps)[:, None]
        mask = time < length
        at = np.where(mask, first + time, 0)
        inputs, targets = (np.where(mask, self._tokens[at + shift], 0) for shift in (0, 1))
        return Batch(inputs.astype(np.int32), targets.astype(np.int32), mask.astype(np.float32))

    def shapes(self) -> list[Batch]:
        return [self._batch(*item) for item in dict(self._plan).items()]
