"""Every source of tokens gives the same batches, bit for bit; a thread may prepare them."""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tests.support.problems import new_oracle

from ptbench.backends.oracle import Oracle
from ptbench.configuration.specification import Cell, Specification
from ptbench.corpus.batching import (
    Batch,
    Batches,
    Feed,
    ParallelStreams,
    Prefetched,
    Sentences,
    Windows,
)
from ptbench.corpus.definitions import FolderCorpus
from ptbench.corpus.prepare import prepare
from ptbench.corpus.sources import CHUNK_BYTES, Integers, Source, Text, index_text
from ptbench.corpus.vocabulary import END_OF_SENTENCE, Encoder, build_vocabulary, tokenize
from ptbench.model.recipe import Recipe
from ptbench.training.cell import Paths, run_cell
from ptbench.training.loop import evaluate
from ptbench.training.records import Metrics, read_history

# Words of one byte and of more, and all that separates words: of these a chunk is cut at spaces and
# newlines alone.
WORDS = st.sampled_from(["a", "bc", "defghijk", "é", "語語"])
SPACES = st.sampled_from([" ", "\n", "  ", "\t", "\u2003", "\x85", " \n", "\n\n", "\r\n"])
TEXTS = st.lists(st.tuples(WORDS, SPACES), min_size=2, max_size=120).map(
    lambda pairs: "".join(word + space for word, space in pairs) + "\n"
)
SIZES: dict[str, Any] = {
    "batch_size": st.integers(1, 12),
    "sequence_length": st.integers(1, 20),
    "chunk_bytes": st.integers(1, 200),
}
FEEDS: dict[str, Callable[[Source, int, int], Feed]] = {
    "parallel_streams": ParallelStreams,
    "windows": Windows,
    "wrapping windows": functools.partial(Windows, wraps=True),
    "sentences": lambda source, batch_size, _: Sentences(source, batch_size, end_of_sentence=0),
}


@contextlib.contextmanager
def sources(content: str, chunk_bytes: int) -> Iterator[dict[str, Source]]:
    """A text in memory, in a file of integers and in a file of text; 0 is `<eos>`."""
    words = tokenize(content)
    encoder = Encoder(sorted(build_vocabulary(words), key=lambda word: word != END_OF_SENTENCE))
    tokens = encoder.encode(words, "the text")[0]
    with TemporaryDirectory() as name:
        folder = Path(name)
        np.save(folder / "tokens.npy", tokens)
        (folder / "text.txt").write_bytes(content.encode())
        yield {
            "memory": Integers(tokens),
            "memory_map": Integers(np.load(folder / "tokens.npy", mmap_mode="r")),
            "stream": Text(folder / "text.txt", index_text(content.encode(), chunk_bytes), encoder),
        }


def same(batches: list[Batch], others: list[Batch]) -> bool:
    """Whether two epochs are equal, bit for bit."""
    return len(batches) == len(others) and all(
        array.dtype == other.dtype and np.array_equal(array, other)
        for batch, pair in zip(batches, others, strict=True)
        for array, other in zip(batch, pair, strict=True)
    )


def predictions(batches: list[Batch]) -> list[tuple[int, int]]:
    """(input, target) of every real token, row after row of each batch."""
    pairs: list[tuple[int, int]] = []
    for batch in batches:
        for row in range(batch.mask.shape[1]):
            real = batch.mask[:, row] == 1
            pairs += zip(batch.inputs[real, row].tolist(), batch.targets[real, row].tolist(),
                         strict=True)  # fmt: skip
    return pairs


@given(TEXTS, st.integers(1, 200))
def test_chunks_are_the_whole_text_cut_between_words(content: str, chunk_bytes: int) -> None:
    raw = content.encode()
    index = index_text(raw, chunk_bytes)
    assert index[0].tolist() == [0, 0]
    assert index[-1].tolist() == [len(raw), len(tokenize(content))]
    words: list[str] = []
    for (begin, before), (end, _) in zip(index[:-1].tolist(), index[1:].tolist(), strict=True):
        assert begin < end
        assert before == len(words)
        words += tokenize(raw[begin:end].decode())
    assert words == tokenize(content)


def test_the_index_grows_by_one_row_for_a_chunk_and_not_for_a_word() -> None:
    raw = b"a few words\n" * 100_000
    sizes = np.diff(index_text(raw)[:, 0])
    assert sizes.max() <= CHUNK_BYTES
    assert sizes[:-1].min() > CHUNK_BYTES - len("words\n")


@given(TEXTS, st.integers(1, 200), st.data())
def test_a_reader_begins_anywhere_and_reads_on(
    content: str, chunk_bytes: int, data: st.DataObject
) -> None:
    with sources(content, chunk_bytes) as by_name:
        expected = by_name["memory"].reader().read(10_000).tolist()
        start = data.draw(st.integers(0, len(expected)))
        counts = data.draw(st.lists(st.integers(0, 30), max_size=8))
        for source in by_name.values():
            assert len(source) == len(expected)
            reader, at = source.reader(start), start
            for count in counts:
                assert reader.read(count).tolist() == expected[at : at + count]
                at += count


@pytest.mark.parametrize("feeding", FEEDS)
@given(content=TEXTS, epoch=st.integers(1, 3), ahead=st.integers(0, 3), data=st.data(), **SIZES)
def test_sources_agree_bit_for_bit(
    feeding: str,
    content: str,
    epoch: int,
    ahead: int,
    data: st.DataObject,
    batch_size: int,
    sequence_length: int,
    chunk_bytes: int,
) -> None:
    with sources(content, chunk_bytes) as by_name:
        length = len(by_name["memory"])
        if feeding == "wrapping windows":  # it needs a whole batch
            assume(length > sequence_length and length >= batch_size * sequence_length)
        feeds = {
            name: FEEDS[feeding](source, batch_size, sequence_length)
            for name, source in by_name.items()
        }
        expected = list(feeds["memory"].epoch(epoch))
        start = data.draw(st.integers(0, len(expected)))
        for feed in feeds.values():
            assert feed.predicted_tokens == sum(int(batch.mask.sum()) for batch in expected)
            assert len(feed) == len(expected)
            assert all(array.flags.c_contiguous for batch in expected for array in batch)
            fed = Prefetched(feed, ahead) if ahead else feed
            assert same(list(fed.epoch(epoch, start)), expected[start:])
            shapes = {batch.mask.shape for batch in fed.shapes()}
            assert shapes == {batch.mask.shape for batch in expected}


@pytest.mark.parametrize("source", ["memory", "memory_map", "stream"])
@given(content=TEXTS, **SIZES)
def test_every_token_is_predicted_once_and_in_order_whatever_the_source(
    source: str, content: str, batch_size: int, sequence_length: int, chunk_bytes: int
) -> None:
    with sources(content, chunk_bytes) as by_name:
        tokens = by_name["memory"].reader().read(10_000).tolist()
        successive = list(itertools.pairwise(tokens))
        made = {
            name: list(FEEDS[name](by_name[source], batch_size, sequence_length).epoch(1))
            for name in ("parallel_streams", "windows", "sentences")
        }
    assert predictions(made["windows"]) == successive
    # Streams run side by side: put their windows one after the other.
    joined = [Batch(*map(np.concatenate, zip(*made["parallel_streams"], strict=True)))]
    assert predictions(joined) == successive
    # Sentences change places with others, each of them whole and read from an <eos>.
    rows = [
        predictions([Batch(*(array[:, [row]] for array in batch))])
        for batch in made["sentences"]
        for row in range(batch_size)
    ]
    ends = [0, *(at + 1 for at, token in enumerate(tokens) if token == 0)]
    expected = [list(zip([0, *tokens[a : b - 1]], tokens[a:b], strict=True))
                for a, b in itertools.pairwise(ends)]  # fmt: skip
    assert sorted(row for row in rows if row) == sorted(expected)


class Scribbled(Feed):
    """Another feed with random words wherever there is padding."""

    def __init__(self, feed: Feed, seed: int) -> None:
        self.feed, self.random = feed, np.random.default_rng(seed)
        self.carries_state, self.batch_size = feed.carries_state, feed.batch_size
        self.predicted_tokens = feed.predicted_tokens

    def __len__(self) -> int:
        return len(self.feed)

    def epoch(self, number: int, start: int = 0) -> Batches:
        for batch in self.feed.epoch(number, start):
            for array in (batch.inputs, batch.targets):
                noise = self.random.integers(0, 6, array.shape)
                array[:] = np.where(batch.mask == 1, array, noise)
            yield batch

    def shapes(self) -> list[Batch]:
        return self.feed.shapes()


@functools.cache
def oracle() -> Oracle:
    recipe = Recipe(layers=1, embedding_size=3, hidden_size=3, initialization_scale=0.5)
    return new_oracle(recipe, seed=1, vocabulary_size=6)


@pytest.mark.parametrize("feeding", ["parallel_streams", "windows", "sentences"])
@given(
    tokens=st.lists(st.integers(0, 5), min_size=2, max_size=60),
    batch_size=st.integers(1, 8),
    sequence_length=st.integers(1, 12),
    seed=st.integers(0, 99),
)
def test_padding_reaches_neither_a_loss_nor_a_gradient(
    feeding: str, tokens: list[int], batch_size: int, sequence_length: int, seed: int
) -> None:
    feed = FEEDS[feeding](Integers(np.array(tokens)), batch_size, sequence_length)
    score = evaluate(oracle(), feed)
    scribbled = evaluate(oracle(), Scribbled(feed, seed))
    assert scribbled == score
    state = oracle().initial_state(batch_size, training=True)
    for batch, other in zip(feed.epoch(1), Scribbled(feed, seed).epoch(1), strict=True):
        gradients = oracle().gradients(batch, state)
        for name, gradient in oracle().gradients(other, state).items():
            np.testing.assert_array_equal(gradient, gradients[name])


def numbers(count: int) -> Feed:
    """A feed of `count` batches, each different."""
    return ParallelStreams(np.arange(1, 8 * count + 2), batch_size=2, sequence_length=4)


class Aliased(Feed):
    """Yields the same buffers again and again, as the Keras thesis' generator does."""

    def __init__(self, feed: Feed) -> None:
        self.feed, self.carries_state = feed, feed.carries_state
        self.batch_size, self.predicted_tokens = feed.batch_size, feed.predicted_tokens

    def __len__(self) -> int:
        return len(self.feed)

    def epoch(self, number: int, start: int = 0) -> Batches:
        buffers = Batch(*(np.empty_like(array) for array in self.feed.shapes()[0]))
        for batch in self.feed.epoch(number, start):
            for buffer, array in zip(buffers, batch, strict=True):
                buffer[:] = array
            yield buffers

    def shapes(self) -> list[Batch]:
        return self.feed.shapes()


def read_slowly(feed: Feed) -> list[Batch]:
    """What a step sees that begins when all the batches that may be ahead are there."""
    seen = []
    for batch in feed.epoch(1):
        time.sleep(0.01)
        seen.append(Batch(*(array.copy() for array in batch)))
    return seen


def test_no_buffer_is_used_again_while_it_is_queued_or_in_use() -> None:
    expected = [Batch(*(array.copy() for array in batch)) for batch in numbers(12).epoch(1)]
    assert same(read_slowly(Prefetched(numbers(12), 10)), expected)
    assert same(list(Prefetched(numbers(12), 10).epoch(1)), expected)  # all in use at once
    # The very check finds the thesis' defect: batches that change while they are queued.
    assert not same(read_slowly(Prefetched(Aliased(numbers(12)), 10)), expected)


class Counted(Feed):
    """Counts the batches that were asked for; may fail at one of them."""

    def __init__(self, feed: Feed, failing: int | None = None) -> None:
        self.feed, self.failing, self.made = feed, failing, 0
        self.carries_state = feed.carries_state
        self.batch_size, self.predicted_tokens = feed.batch_size, feed.predicted_tokens

    def __len__(self) -> int:
        return len(self.feed)

    def epoch(self, number: int, start: int = 0) -> Batches:
        for batch in self.feed.epoch(number, start):
            if self.made == self.failing:
                raise OSError("the disk has gone")
            self.made += 1
            yield batch

    def shapes(self) -> list[Batch]:
        return self.feed.shapes()


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def wait_for(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return condition()


@pytest.mark.parametrize("ahead", [1, 3])
def test_as_many_batches_as_asked_for_are_prepared_ahead_and_no_more(ahead: int) -> None:
    feed = Counted(numbers(20))
    batches = Prefetched(feed, ahead).epoch(1)
    for used in range(1, 5):
        next(batches)
        assert wait_for(lambda used=used: feed.made == used + ahead)  # type: ignore[misc]
    time.sleep(0.05)
    assert feed.made == 4 + ahead
    batches.close()


def test_the_thread_ends_with_the_epoch() -> None:
    assert len(list(Prefetched(numbers(5), 2).epoch(1))) == 5
    assert not threads()


def test_the_thread_ends_when_the_reader_stops_early_or_fails() -> None:
    feed = Counted(numbers(1000))
    batches = Prefetched(feed, 2).epoch(1)
    next(batches)
    assert threads()
    batches.close()
    assert not threads()
    made = feed.made

    def fail() -> None:
        with contextlib.closing(Prefetched(feed, 2).epoch(1)) as batches:
            for _ in batches:
                raise RuntimeError("the step failed")

    with pytest.raises(RuntimeError, match="the step failed"):
        fail()
    assert not threads()
    assert made <= feed.made <= made + 3 < 1000


def test_the_producer_s_error_is_raised_where_the_batch_was_due() -> None:
    batches = Prefetched(Counted(numbers(9), failing=4), 3).epoch(1)
    for _ in range(4):
        next(batches)
    with pytest.raises(OSError, match="the disk has gone") as caught:
        next(batches)
    assert caught.traceback[-1].name == "epoch"  # where it happened, in the other thread
    assert not threads()


def test_a_damaged_text_is_said_by_the_thread_as_by_the_reader(tmp_path: Path) -> None:
    content = b"a b c\n" * 50
    (tmp_path / "text.txt").write_bytes(content[:-8] + b"a a a a\n")
    text = Text(tmp_path / "text.txt", index_text(content, 16), Encoder(["<eos>", "a", "b", "c"]))
    for ahead in (0, 2):
        feed: Feed = Windows(text, 2, 5)
        with pytest.raises(Exception, match=r"text\.txt has changed since it was prepared"):
            list((Prefetched(feed, ahead) if ahead else feed).epoch(1))


def peak_of(action: Callable[[], object]) -> int:
    """Largest number of bytes that Python and NumPy held at a time while it ran."""
    import tracemalloc

    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("feeding", FEEDS)
def test_streaming_needs_no_more_memory_for_a_longer_text(tmp_path: Path, feeding: str) -> None:
    encoder = Encoder(["<eos>", "some", "words", "of", "a", "sentence"])

    def peak(lines: int) -> int:
        content = b"some words of a sentence\n" * lines
        path = tmp_path / f"{lines}.txt"
        path.write_bytes(content)
        index: npt.NDArray[np.int64] = index_text(content)

        def read() -> None:
            for _ in FEEDS[feeding](Text(path, index, encoder), 4, 10).epoch(1):
                pass

        return peak_of(read)

    peak(1_000)  # what is allocated once, such as caches, is no part of it
    short, long = peak(3_000), peak(24_000)
    assert long < 1.5 * short < 24_000 * 6 * 4  # the longer text's integers alone


@pytest.fixture
def trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Metrics, list[Any]]]:
    """Trains a cell of a few chunks of text on the oracle: its metrics and its history."""
    raw = tmp_path / "raw"
    raw.mkdir()
    for split, lines in {"train": 400, "valid": 100, "test": 100}.items():
        words = np.random.default_rng(lines).choice(["some", "words", "<unk>"], (lines, 12))
        (raw / f"{split}.txt").write_text("".join(f"{' '.join(line)}\n" for line in words))
    corpus = FolderCorpus(kind="folder", folder=raw)
    prepare("mine", corpus, None, tmp_path / "downloads", tmp_path / "corpus")

    def create(cell: Cell, specification: Specification, size: int, *_: int) -> Oracle:
        return new_oracle(specification.recipe, seed=cell.seed, vocabulary_size=size)

    monkeypatch.setattr("ptbench.training.cell.create_backend", create)

    def train(**changes: Any) -> tuple[Metrics, list[Any]]:
        recipe = Recipe(
            corpus="mine", layers=1, embedding_size=2, hidden_size=2, epochs=1, constant_epochs=1,
            test_batch_size=20, **changes,
        )  # fmt: skip
        specification = Specification(variant="mine", recipe=recipe, corpus_definition={})
        cell = Cell(variant="mine", framework="pytorch", devices=1, seed=1)
        paths = Paths(*(tmp_path / n for n in ("corpus", "cell", "attempts", "checkpoints")))
        metrics = run_cell(cell, specification, paths, threads=1, say=lambda _: None)
        clocks = {"tokens_per_second", "training_seconds", "validation_seconds"}
        history = read_history(tmp_path / "cell" / "history.csv")
        return metrics, [epoch.model_dump(exclude=clocks) for epoch in history]

    return train


@pytest.mark.parametrize("feeding", ["parallel_streams", "windows", "sentences"])
def test_a_run_is_the_same_whatever_the_source(trained: Any, feeding: str) -> None:
    expected, history = trained(feeding=feeding)
    for changes in ({"source": "memory_map"}, {"source": "stream"}, {"prefetch": 3}):
        metrics, other = trained(feeding=feeding, **changes)
        assert other == history
        assert (metrics.valid, metrics.test) == (expected.valid, expected.test)


def test_tokenising_a_stream_is_timed_where_the_batches_are_used(
    trained: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pause, chunk = 0.02, Text.chunk
    pauses = {"train": 0.0, "valid": 0.0, "test": 0.0}

    def slow(text: Text, number: int) -> Any:
        time.sleep(pause)
        pauses[text._path.stem] += pause
        return chunk(text, number)

    monkeypatch.setattr(Text, "chunk", slow)
    seconds = trained(source="stream")[0].seconds
    assert all(pauses.values())
    assert seconds.compile + seconds.training >= pauses["train"]
    # the test split is read twice, the second time for the accuracy, off the clocks
    assert seconds.validation + seconds.test >= pauses["valid"] + pauses["test"] / 2
    assert seconds.load < min(pauses.values())
    # Sentences are counted beforehand: every chunk is read once then.
    pauses.update(dict.fromkeys(pauses, 0.0))
    seconds = trained(source="stream", feeding="sentences")[0].seconds
    assert seconds.load >= pauses["train"] / 2 + pauses["valid"] / 2 + pauses["test"] / 3
    assert seconds.compile + seconds.training >= pauses["train"] / 2


def test_opening_integers_is_timed_as_load(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    load = np.load

    def slow(*arguments: Any, **keywords: Any) -> Any:
        time.sleep(0.1)
        return load(*arguments, **keywords)

    monkeypatch.setattr(np, "load", slow)
    for source in ("memory", "memory_map"):
        assert trained(source=source)[0].seconds.load >= 0.3  # three splits
