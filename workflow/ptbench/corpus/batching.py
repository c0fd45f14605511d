"""Batches of tokens. Every framework's environment imports this, so it needs NumPy alone.

There are three ways to feed a model, one class each, and a variant of the first with windows of
varying length. Three classes change the batches of another: one mixes them up as a known bug did,
one takes the first of them, and one prepares them ahead of time. All depend on the epoch's number,
and varying lengths on a seed. They hold no more text than the current
batch needs, yield new arrays that the reader may keep, and pad what is incomplete
with masked tokens, so shapes repeat and compiled frameworks compile once for each shape.
"""

from __future__ import annotations

import abc
import contextlib
import itertools
import math
import queue
import threading
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ptbench.corpus.sources import Integers, Source, Tokens


class Batch(NamedTuple):
    """The tokens of one step."""

    inputs: npt.NDArray[np.int32]  # [time, batch]
    targets: npt.NDArray[np.int32]  # [time, batch]
    mask: npt.NDArray[np.float32]  # [time, batch], 0 where there is no token to predict


Batches = Generator[Batch, None, None]


class Feed(abc.ABC):
    """A split as batches, epoch after epoch."""

    carries_state: bool  # whether a batch continues the text of the one before it

    batch_size: int
    predicted_tokens: int  # tokens with a mask of 1 in one epoch

    @abc.abstractmethod
    def __len__(self) -> int:
        """Return the number of batches in an epoch."""

    @abc.abstractmethod
    def epoch(self, number: int, start: int = 0) -> Batches:
        """Yield the batches of an epoch, counted from 1, without the first `start` of them."""

    @abc.abstractmethod
    def shapes(self) -> list[Batch]:
        """Return a batch of every shape that occurs, to compile with; its words mean nothing."""


def _source(tokens: Tokens | Source) -> Source:
    source = tokens if isinstance(tokens, Source) else Integers(tokens)
    if len(source) < 2:
        raise ValueError(f"a split of {len(source)} tokens predicts nothing; it needs 2")
    return source


def _batch(steps: int, before: Tokens, rows: Sequence[Tokens]) -> Batch:
    """Return the batch that predicts each row's tokens, the first of them from `before`.

    Args:
        steps: at least the length of the longest row.
        before: [batch].
        rows: at most as many.
    """
    text = np.zeros((len(before), steps + 1), np.int32)
    counts = np.zeros(len(before), np.int64)
    text[:, 0] = before
    for index, row in enumerate(rows):
        counts[index] = len(row)
        text[index, 1 : 1 + len(row)] = row
    mask = np.arange(steps)[:, None] < counts
    inputs = np.multiply(text[:, :-1].T, mask, order="C")
    return Batch(inputs, text[:, 1:].T.copy(), mask.astype(np.float32))


def _blank(steps: int, batch_size: int) -> Batch:
    inputs, targets = np.zeros((2, steps, batch_size), np.int32)
    return Batch(inputs, targets, np.ones((steps, batch_size), np.float32))


class ParallelStreams(Feed):
    """The split as `batch_size` contiguous streams, read in successive windows.

    This is the batching of Zaremba et al. 2014 and the TensorFlow PTB tutorial, with the state
    carried from window to window. Unlike there, no text is left out: every token except the first
    is predicted exactly once. The last stream may be shorter, and the last window incomplete.
    """

    carries_state = True

    def __init__(self, tokens: Tokens | Source, batch_size: int, sequence_length: int) -> None:
        """Args: tokens: [tokens], at least two of them."""
        self._source = _source(tokens)
        self.predicted_tokens = len(self._source) - 1
        self._stream_length = -(-self.predicted_tokens // batch_size)
        self.windows = -(-self._stream_length // sequence_length)
        self.batch_size, self.sequence_length = batch_size, sequence_length

    def __len__(self) -> int:
        return self.windows

    def _streams(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return where each stream begins and ends."""
        begin = np.arange(self.batch_size, dtype=np.int64) * self._stream_length
        tokens = len(self._source) - 1
        return np.minimum(begin, tokens), np.minimum(begin + self._stream_length, tokens)

    def lengths(self, number: int) -> list[int]:  # noqa: ARG002
        """Return the length of each window of an epoch."""
        return [self.sequence_length] * self.windows

    def epoch(self, number: int = 1, start: int = 0) -> Batches:
        lengths = self.lengths(number)
        # A reader for each stream, and how many of its tokens are still to be predicted.
        begin, end = self._streams()
        begin = np.minimum(begin + sum(lengths[:start]), end)
        readers = [self._source.reader(at) for at in begin.tolist()]
        left = (end - begin).tolist()
        before = np.concatenate([reader.read(1) for reader in readers])
        for steps in lengths[start:]:
            counts = [min(count, steps) for count in left]
            rows = [reader.read(count) for reader, count in zip(readers, counts, strict=True)]
            yield _batch(steps, before, rows)
            left = [count - len(row) for count, row in zip(left, rows, strict=True)]
            before = np.array([row[-1] if len(row) else 0 for row in rows])

    def shapes(self) -> list[Batch]:
        return [_blank(self.sequence_length, self.batch_size)]


class VariedStreams(ParallelStreams):
    """Parallel streams in windows of varying length, as AWD-LSTM has them in training.

    Merity et al. 2017, section 4.1: a window has a mean length of `sequence_length`, or of half of
    that in one of twenty cases, and varies around it with a normal distribution. An epoch has the
    same windows as the others, in an order of its own. The last one takes what is left of the
    streams.

    Lengths are multiples of `MULTIPLE`, so that at most 18 occur with a mean of 70. Theirs are
    any integers.
    """

    HALVED = 0.05  # share of windows around half of the length
    DEVIATION = 5.0  # tokens
    MULTIPLE = 5  # tokens, and the least length
    MOST = 20  # tokens above `sequence_length`: four deviations

    def __init__(
        self,
        tokens: Tokens | Source,
        batch_size: int,
        sequence_length: int,
        seed: int,
        most_windows: int | None = None,
    ) -> None:
        """Draw the lengths.

        Args:
            tokens: [tokens], at least two of them.
            batch_size: number of streams.
            sequence_length: mean length of most windows.
            seed: of the lengths and their orders.
            most_windows: leave out what is behind so many windows.
        """
        super().__init__(tokens, batch_size, sequence_length)
        self._seed, self._lengths = seed, list[int]()
        rng = np.random.default_rng(seed)
        left = self._stream_length
        while left > 0 and len(self._lengths) != most_windows:
            self._lengths.append(min(self._draw(rng), -(-left // self.MULTIPLE) * self.MULTIPLE))
            left -= self._lengths[-1]
        self.windows = len(self._lengths)
        begin, end = self._streams()
        self.predicted_tokens = int(np.minimum(end - begin, sum(self._lengths)).sum())

    def _draw(self, rng: np.random.Generator) -> int:
        """Return a length; every NumPy version draws the same, with `rng.random` (Box-Muller)."""
        share, radius, angle = rng.random(3)
        mean = self.sequence_length / (2 if share < self.HALVED else 1)
        normal = math.sqrt(-2 * math.log1p(-radius)) * math.cos(2 * math.pi * angle)
        multiple = round((mean + self.DEVIATION * normal) / self.MULTIPLE) * self.MULTIPLE
        return min(max(multiple, self.MULTIPLE), self.sequence_length + self.MOST)

    def lengths(self, number: int) -> list[int]:
        rng = np.random.default_rng((self._seed, number))
        *whole, last = self._lengths
        return [whole[index] for index in np.argsort(rng.random(len(whole)))] + [last]

    def shapes(self) -> list[Batch]:
        return [_blank(steps, self.batch_size) for steps in sorted(set(self._lengths))]


class Windows(Feed):
    """Successive windows of the text, each from a zero state; a batch is `batch_size` of them.

    In evaluation, every token except the first is predicted once; the last window and the last
    batch are padded.

    In training (`wraps`), it does what the generator of Singh 2018 does: it yields whole windows
    only, returns to the beginning of the text when less than a window is left, and makes
    tokens // (batch_size x length) batches an epoch. The next epoch continues where the last ended.
    """

    carries_state = False

    def __init__(
        self,
        tokens: Tokens | Source,
        batch_size: int,
        sequence_length: int,
        wraps: bool = False,
    ) -> None:
        """Args: tokens: [tokens], at least two of them."""
        self._source = _source(tokens)
        self.batch_size, self.sequence_length, self.wraps = batch_size, sequence_length, wraps
        predictions = len(self._source) - 1
        if wraps:
            self._windows = predictions // sequence_length
            self._batches = len(self._source) // (batch_size * sequence_length)
            if not self._windows or not self._batches:
                raise ValueError(
                    f"a split of {len(self._source)} tokens has not one batch of {batch_size} "
                    f"windows of {sequence_length}; lower batch_size or sequence_length"
                )
            self.predicted_tokens = self._batches * batch_size * sequence_length
        else:
            self._windows = -(-predictions // sequence_length)
            self._batches = -(-self._windows // batch_size)
            self.predicted_tokens = predictions

    def __len__(self) -> int:
        return self._batches

    def epoch(self, number: int = 1, start: int = 0) -> Batches:
        passed = (number - 1) * self._batches if self.wraps else 0
        yield from itertools.islice(self.batches(passed + start), self._batches - start)

    def batches(self, number: int) -> Batches:
        """Yield batches from that number on, counted from 0 over all epochs."""
        windows = self._read(number * self.batch_size)
        while several := list(itertools.islice(windows, self.batch_size)):
            before, rows = zip(*several, strict=True)
            padded = np.zeros(self.batch_size, np.int32)
            padded[: len(before)] = before
            yield _batch(self.sequence_length, padded, rows)

    def _read(self, number: int) -> Iterator[tuple[int, Tokens]]:
        """Yield windows, each with the token before it, from that number on (over all epochs)."""
        while self.wraps or number < self._windows:
            place = number % self._windows
            reader = self._source.reader(place * self.sequence_length)
            before = int(reader.read(1)[0])
            for _ in range(place, self._windows):
                row = reader.read(self.sequence_length)
                yield before, row
                before, number = int(row[-1]), number + 1

    def shapes(self) -> list[Batch]:
        return [_blank(self.sequence_length, self.batch_size)]


class Overwritten(Feed):
    """What the training loop of Singh 2018 saw of its windows, by docs/decisions/0010.

    Its generator fills the same two arrays for every batch, and Keras 2.1.3 lets ten batches wait,
    so the loop sees the newest. While it copies the targets, the generator writes the next batch
    over them: up to 838 tokens the copy is the faster of the two, and above that it is overtaken.
    From there on, targets are those of the next batch. The sizes are those of 10,000 words of
    output, whatever the corpus has.
    """

    carries_state = False
    AHEAD = 9  # batches that wait behind the one that is taken
    COPIED_IN_TIME = 2**25 // 40_000  # tokens: a larger copy than 32 MiB gets fresh memory (glibc)
    OVERTAKEN_BY = 700  # tokens at most, as the generator sleeps up to 10 ms before it goes on
    GOLDEN = (5**0.5 - 1) / 2  # its multiples, modulo 1, are spread evenly

    def __init__(self, windows: Windows) -> None:
        """Args: windows: of training."""
        self._windows = windows
        self.batch_size, self.predicted_tokens = windows.batch_size, windows.predicted_tokens
        self._tokens = windows.batch_size * windows.sequence_length

    def __len__(self) -> int:
        return len(self._windows)

    def epoch(self, number: int = 1, start: int = 0) -> Batches:
        end = number * len(self)
        step = end - len(self) + start
        batches = itertools.pairwise(self._windows.batches(step + self.AHEAD))
        length = self._windows.sequence_length
        # Where each target lies in Keras' array, whose rows are windows: [time, batch].
        place = np.arange(self.batch_size) * length + np.arange(length)[:, None]
        for (batch, next_batch), at in zip(batches, range(step, end), strict=False):
            kept = place < self.kept_tokens(at)
            yield batch._replace(targets=np.where(kept, batch.targets, next_batch.targets))

    def kept_tokens(self, step: int) -> int:
        """Return how many targets, row after row, a step sees before the others' begin."""
        if self._tokens <= self.COPIED_IN_TIME:
            return self._tokens
        return min(int((step + 1) * self.GOLDEN % 1 * self.OVERTAKEN_BY), self._tokens)

    def shapes(self) -> list[Batch]:
        return self._windows.shapes()


class Sentences(Feed):
    """One sentence a row, from `<eos>` to `<eos>`, each from a zero state (SparseLang 2018).

    Sentences of similar length share a batch: lengths are rounded up to a multiple of `BUCKET`, and
    batches come in the order in which they fill up, the incomplete ones at the end. Every token is
    predicted once, the first of the split included (from an `<eos>`).

    The number of batches depends on all lengths, so the split is read once before the first epoch.
    """

    carries_state = False
    BUCKET = 8  # tokens; 11 shapes for PTB, whose longest sentence has 83

    def __init__(self, tokens: Tokens | Source, batch_size: int, end_of_sentence: int) -> None:
        """Args: tokens: [tokens]; end_of_sentence: the identifier that ends a sentence."""
        self._source = _source(tokens)
        self.batch_size, self._end = batch_size, end_of_sentence
        self.predicted_tokens = len(self._source)
        sentences = Counter(self._steps(sentence) for sentence in self._sentences())
        self._batches = {steps: -(-count // batch_size) for steps, count in sentences.items()}

    def __len__(self) -> int:
        return sum(self._batches.values())

    def epoch(self, number: int = 1, start: int = 0) -> Batches:  # noqa: ARG002
        before = np.full(self.batch_size, self._end, np.int32)
        for steps, rows in itertools.islice(self._rows(), start, None):
            yield _batch(steps, before, rows)

    def _rows(self) -> Iterator[tuple[int, list[Tokens]]]:
        """Yield the number of steps and the sentences of each batch."""
        filling: dict[int, list[Tokens]] = {}
        for sentence in self._sentences():
            steps = self._steps(sentence)
            rows = filling.setdefault(steps, [])
            rows.append(sentence)
            if len(rows) == self.batch_size:
                yield steps, filling.pop(steps)
        yield from sorted(filling.items(), key=lambda item: item[0])

    def _sentences(self) -> Iterator[Tokens]:
        """Yield the tokens of each sentence with its `<eos>`, which the last one may lack."""
        reader = self._source.reader()
        begun = np.zeros(0, np.int32)
        while len(tokens := reader.read(4096)):
            begin = 0
            for end in (np.flatnonzero(tokens == self._end) + 1).tolist():
                yield np.concatenate([begun, tokens[begin:end]])
                begin, begun = end, begun[:0]
            begun = np.concatenate([begun, tokens[begin:]])
        if len(begun):
            yield begun

    def _steps(self, sentence: Tokens) -> int:
        return -(-len(sentence) // self.BUCKET) * self.BUCKET

    def shapes(self) -> list[Batch]:
        return [_blank(steps, self.batch_size) for steps in sorted(self._batches)]


class First(Feed):
    """The first batches of another feed, in every epoch."""

    def __init__(self, feed: Feed, batches: int) -> None:
        """Take so many batches of `feed`, or all if it has no more."""
        self._feed, self._batches = feed, min(batches, len(feed))
        self.carries_state, self.batch_size = feed.carries_state, feed.batch_size
        self.predicted_tokens = sum(int(batch.mask.sum()) for batch in self.epoch(1))

    def __len__(self) -> int:
        return self._batches

    def epoch(self, number: int, start: int = 0) -> Batches:
        with contextlib.closing(self._feed.epoch(number, start)) as batches:
            yield from itertools.islice(batches, self._batches - start)

    def shapes(self) -> list[Batch]:
        return self._feed.shapes()


class Prefetched(Feed):
    """Another feed, whose batches a thread prepares ahead of time."""

    def __init__(self, feed: Feed, ahead: int) -> None:
        """Args: ahead: how many batches may wait at most."""
        self._feed, self._ahead = feed, ahead
        self.carries_state = feed.carries_state
        self.batch_size, self.predicted_tokens = feed.batch_size, feed.predicted_tokens

    def __len__(self) -> int:
        return len(self._feed)

    def epoch(self, number: int, start: int = 0) -> Batches:
        """Yield the feed's own batches and raise its errors.

        The thread ends with the epoch, or when the iterator is closed.
        """
        places = threading.Semaphore(self._ahead)
        ready: queue.SimpleQueue[Batch | BaseException | None] = queue.SimpleQueue()
        closed = threading.Event()

        def prepare() -> None:
            try:
                batches = self._feed.epoch(number, start)
                while places.acquire() and not closed.is_set():
                    ready.put(batch := next(batches, None))
                    if batch is None:
                        return
            except BaseException as error:  # any error: the reader must not wait forever
                ready.put(error)

        thread = threading.Thread(target=prepare, name="prefetch", daemon=True)
        thread.start()
        try:
            while (batch := ready.get()) is not None:
                if isinstance(batch, BaseException):
                    raise batch
                places.release()
                yield batch
        finally:
            closed.set()
            places.release()  # the thread may be waiting for one
            thread.join()

    def shapes(self) -> list[Batch]:
        return self._feed.shapes()
