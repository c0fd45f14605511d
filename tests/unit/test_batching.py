"""Every way of feeding predicts each token once, in order, for any corpus and any window."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptbench.corpus.batching import (
    Batch,
    Feed,
    Overwritten,
    ParallelStreams,
    Sentences,
    VariedStreams,
    Windows,
)

sizes = {
    "length": st.integers(2, 200),
    "batch_size": st.integers(1, 24),
    "sequence_length": st.integers(1, 40),
}


def streams(length: int, batch_size: int, sequence_length: int) -> ParallelStreams:
    """Streams of the tokens 1, 2, ..., each of which says where it stood; padding is none."""
    return ParallelStreams(np.arange(1, length + 1), batch_size, sequence_length)


def joined(batches: list[Batch]) -> tuple[Any, Any, Any]:
    """Inputs, targets and masks of successive windows, [stream, time]."""
    return tuple(np.concatenate(parts).T for parts in zip(*batches, strict=True))


@given(**sizes)
def test_every_token_but_the_first_is_predicted_once_from_the_one_before_and_in_order(
    length: int, batch_size: int, sequence_length: int
) -> None:
    inputs, targets, mask = joined(list(streams(length, batch_size, sequence_length).epoch()))
    real = mask == 1
    # Stream after stream, time runs along the text.
    np.testing.assert_array_equal(inputs[real], np.arange(1, length))
    np.testing.assert_array_equal(targets[real], np.arange(2, length + 1))


@given(**sizes, seed=st.integers(0, 9), epoch=st.integers(1, 9), most=st.integers(1, 9) | st.none())
def test_windows_of_varying_length_predict_the_same_tokens_in_an_order_of_each_epoch(
    length: int, batch_size: int, sequence_length: int, seed: int, epoch: int, most: int | None
) -> None:
    text = np.arange(1, length + 1)
    feed = VariedStreams(text, batch_size, sequence_length, seed, most)
    batches = list(feed.epoch(epoch))
    assert len(batches) == len(feed)
    inputs, targets, mask = joined(batches)
    real = mask == 1
    assert real.sum() == feed.predicted_tokens
    np.testing.assert_array_equal(targets[real], inputs[real] + 1)
    if most is None:
        np.testing.assert_array_equal(inputs[real], np.arange(1, length))
    shapes = {len(batch.inputs) for batch in feed.shapes()}
    assert {len(batch.inputs) for batch in batches} == shapes
    assert all(5 <= steps <= sequence_length + 20 for steps in shapes)
    for batch, other in zip(feed.epoch(epoch, 2), batches[2:], strict=True):  # as a resumed run
        np.testing.assert_array_equal(batch.inputs, other.inputs)


def test_the_lengths_of_windows_are_distributed_as_awd_lstm_s() -> None:
    """Normal around 70 with a deviation of 5, or around 35 in one of twenty cases."""
    feed = VariedStreams(np.arange(7 * 400_000), 7, 70, seed=1)
    *lengths, _ = feed.lengths(1)
    long = [each for each in lengths if each > 52]
    short = [each for each in lengths if each <= 52]
    assert len(short) / len(lengths) == pytest.approx(0.05, abs=0.01)
    assert np.mean(long) == pytest.approx(70, abs=0.3)
    assert np.mean(short) == pytest.approx(35, abs=1.5)
    # rounding to multiples of 5 adds a variance of 5^2 / 12
    assert np.std(long) == pytest.approx((25 + 25 / 12) ** 0.5, abs=0.2)
    assert len(feed.shapes()) < 20
    assert sorted(feed.lengths(2)) == sorted(feed.lengths(1))
    assert feed.lengths(2) != feed.lengths(1)
    assert VariedStreams(np.arange(7 * 400_000), 7, 70, seed=2).lengths(1) != feed.lengths(1)


@given(**sizes)
def test_masked_positions_are_padding_at_the_end_of_streams(
    length: int, batch_size: int, sequence_length: int
) -> None:
    inputs, targets, mask = joined(list(streams(length, batch_size, sequence_length).epoch()))
    assert set(np.unique(mask)) <= {0, 1}
    assert (np.diff(mask, axis=1) <= 0).all()
    assert (inputs[mask == 0] == 0).all()
    assert (targets[mask == 0] == 0).all()


@given(**sizes)
def test_all_batches_have_one_shape_and_no_window_is_empty(
    length: int, batch_size: int, sequence_length: int
) -> None:
    split = streams(length, batch_size, sequence_length)
    batches = list(split.epoch())
    assert len(batches) == len(split)
    assert split.predicted_tokens == length - 1
    for batch in batches:
        assert {array.shape for array in batch} == {(sequence_length, batch_size)}
        assert [array.dtype for array in batch] == [np.int32, np.int32, np.float32]
        assert all(array.flags.c_contiguous for array in batch)
        assert batch.mask.any()


@given(**sizes)
def test_a_batch_is_the_reader_s_to_overwrite(
    length: int, batch_size: int, sequence_length: int
) -> None:
    split = streams(length, batch_size, sequence_length)
    expected = [tuple(array.copy() for array in batch) for batch in split.epoch()]
    for batch in split.epoch():
        for array in batch:
            array[:] = 77
    for batch, copies in zip(split.epoch(), expected, strict=True):
        for array, copy in zip(batch, copies, strict=True):
            np.testing.assert_array_equal(array, copy)


@given(**sizes)
def test_batches_do_not_share_memory(length: int, batch_size: int, sequence_length: int) -> None:
    batches = list(streams(length, batch_size, sequence_length).epoch())
    expected = [tuple(array.copy() for array in batch) for batch in batches]
    for array in batches[0]:
        array[:] = 77
    for batch, copies in zip(batches[1:], expected[1:], strict=True):
        for array, copy in zip(batch, copies, strict=True):
            np.testing.assert_array_equal(array, copy)


@given(**sizes, data=st.data())
def test_starting_at_a_window_skips_those_before_it(
    length: int, batch_size: int, sequence_length: int, data: st.DataObject
) -> None:
    split = streams(length, batch_size, sequence_length)
    window = data.draw(st.integers(0, len(split)))
    expected = list(split.epoch())[window:]
    actual = list(split.epoch(1, window))
    assert len(actual) == len(expected)
    for batch, other in zip(actual, expected, strict=True):
        for array, copy in zip(batch, other, strict=True):
            np.testing.assert_array_equal(array, copy)


@pytest.mark.parametrize("length", [0, 1])
def test_a_split_in_which_nothing_can_be_predicted_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match=f"a split of {length} tokens"):
        ParallelStreams(np.zeros(length, np.int32), 1, 1)


def predictions(feed: Feed, epoch: int = 1) -> list[tuple[int, int]]:
    """(input, target) of every real token of an epoch, row after row of each batch."""
    pairs = []
    for batch in feed.epoch(epoch):
        for row in range(batch.mask.shape[1]):
            real = batch.mask[:, row] == 1
            assert (np.diff(real.astype(int)) <= 0).all()  # padding at the end alone
            pairs += list(zip(batch.inputs[real, row], batch.targets[real, row], strict=True))
    return [(int(x), int(y)) for x, y in pairs]


@given(**sizes)
def test_windows_predict_every_token_but_the_first_once_and_in_order(
    length: int, batch_size: int, sequence_length: int
) -> None:
    feed = Windows(np.arange(1, length + 1), batch_size, sequence_length)
    assert predictions(feed) == [(n, n + 1) for n in range(1, length)]
    assert feed.predicted_tokens == length - 1


@given(**sizes, epochs=st.integers(1, 4))
def test_wrapping_windows_read_the_text_as_singh_s_generator_does(
    length: int, batch_size: int, sequence_length: int, epochs: int
) -> None:
    """Its pointer goes back to 0 when fewer than a window and its last target are left."""
    if length // (batch_size * sequence_length) == 0 or length <= sequence_length:
        with pytest.raises(ValueError, match="not one batch"):
            Windows(np.arange(1, length + 1), batch_size, sequence_length, wraps=True)
        return
    feed = Windows(np.arange(1, length + 1), batch_size, sequence_length, wraps=True)
    pointer = 0
    for epoch in range(1, epochs + 1):
        expected = []
        for _ in range(length // (batch_size * sequence_length) * batch_size):
            if length - pointer < sequence_length + 1:
                pointer = 0
            expected += [(pointer + k + 1, pointer + k + 2) for k in range(sequence_length)]
            pointer += sequence_length
        assert predictions(feed, epoch) == expected
        assert feed.predicted_tokens == len(expected)


@given(
    st.lists(st.lists(st.integers(1, 50), max_size=30), min_size=1, max_size=40),
    st.integers(1, 24),
    st.booleans(),
)
def test_sentences_are_rows_and_every_token_is_predicted_once(
    sentences: list[list[int]], batch_size: int, ends: bool
) -> None:
    tokens = [token for sentence in sentences for token in [*sentence, 0]]  # 0 is <eos>
    if not ends:
        tokens = [*tokens, 7]  # text that stops in the middle of a sentence
    if len(tokens) < 2:
        return
    feed = Sentences(np.array(tokens), batch_size, end_of_sentence=0)
    rows = []
    for batch in feed.epoch():
        assert batch.mask.shape[1] == batch_size
        assert len(batch.mask) % Sentences.BUCKET == 0
        for row in range(batch_size):
            steps = int(batch.mask[:, row].sum())
            if steps:
                assert batch.inputs[0, row] == 0
                np.testing.assert_array_equal(
                    batch.inputs[1:steps, row], batch.targets[: steps - 1, row]
                )
                assert len(batch.mask) - steps < Sentences.BUCKET
                rows.append(batch.targets[:steps, row].tolist())
    expected = [[*sentence, 0] for sentence in sentences] + ([] if ends else [[7]])
    assert sorted(rows) == sorted(expected)
    assert feed.predicted_tokens == len(tokens) == sum(map(len, rows))


def test_every_shape_of_a_feed_is_there_to_compile_with() -> None:
    tokens = np.array([1, 2, 3, 0, *[4] * 20, 0])
    feed = Sentences(tokens, 2, end_of_sentence=0)
    assert {b.mask.shape for b in feed.shapes()} == {b.mask.shape for b in feed.epoch()}
    assert {b.mask.shape for b in feed.shapes()} == {(8, 2), (24, 2)}


def overwritten(batch_size: int, length: int) -> tuple[Windows, Overwritten]:
    """Windows of the tokens 0, 1, ... of an epoch of 12 batches, and what Keras made of them."""
    windows = Windows(np.arange(12 * batch_size * length), batch_size, length, wraps=True)
    return windows, Overwritten(windows)


def test_small_batches_are_seen_whole_and_nine_later_than_they_were_made() -> None:
    windows, seen = overwritten(20, 41)  # 820 tokens
    made = [*windows.epoch(1), *windows.epoch(2), *windows.epoch(3)]
    for batch, (inputs, targets, _) in zip(
        [*seen.epoch(1), *seen.epoch(2)], made[9:], strict=False
    ):
        np.testing.assert_array_equal(batch.inputs, inputs)
        np.testing.assert_array_equal(batch.targets, targets)


def test_the_end_of_a_large_batch_has_the_targets_of_the_next() -> None:
    windows, seen = overwritten(20, 45)  # 900 tokens
    made = [*windows.epoch(1), *windows.epoch(2), *windows.epoch(3)]
    batches = [*seen.epoch(1), *seen.epoch(2)]
    assert len(batches) == 24
    for number, batch in enumerate(batches):
        one, following = made[number + 9], made[number + 10]
        np.testing.assert_array_equal(batch.inputs, one.inputs)
        kept = seen.kept_tokens(number)
        expected = np.concatenate(
            [one.targets.T.ravel()[:kept], following.targets.T.ravel()[kept:]]
        )
        np.testing.assert_array_equal(batch.targets.T.ravel(), expected)
        assert batch.targets.flags.c_contiguous
    shares = [seen.kept_tokens(number) for number in range(1000)]
    assert abs(np.mean(shares) - Overwritten.OVERTAKEN_BY / 2) < 5


def test_an_overwritten_epoch_continues_where_it_was_left() -> None:
    _, seen = overwritten(20, 45)
    for batch, again in zip(list(seen.epoch(2))[5:], seen.epoch(2, 5), strict=True):
        for array, other in zip(batch, again, strict=True):
            np.testing.assert_array_equal(array, other)
