"""Parallel streams: every token is predicted once, in order, for any corpus and any window."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptbench.corpus.batching import Batch, ParallelStreams

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
    inputs, targets, mask = joined(list(streams(length, batch_size, sequence_length)))
    real = mask == 1
    # Stream after stream, time runs along the text.
    np.testing.assert_array_equal(inputs[real], np.arange(1, length))
    np.testing.assert_array_equal(targets[real], np.arange(2, length + 1))


@given(**sizes)
def test_masked_positions_are_padding_at_the_end_of_streams(
    length: int, batch_size: int, sequence_length: int
) -> None:
    inputs, targets, mask = joined(list(streams(length, batch_size, sequence_length)))
    assert set(np.unique(mask)) <= {0, 1}
    assert (np.diff(mask, axis=1) <= 0).all()
    assert (inputs[mask == 0] == 0).all()
    assert (targets[mask == 0] == 0).all()


@given(**sizes)
def test_all_batches_have_one_shape_and_no_window_is_empty(
    length: int, batch_size: int, sequence_length: int
) -> None:
    split = streams(length, batch_size, sequence_length)
    batches = list(split)
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
    expected = [tuple(array.copy() for array in batch) for batch in split]
    for batch in split:
        for array in batch:
            array[:] = 77
    for batch, copies in zip(split, expected, strict=True):
        for array, copy in zip(batch, copies, strict=True):
            np.testing.assert_array_equal(array, copy)


@given(**sizes)
def test_batches_do_not_share_memory(length: int, batch_size: int, sequence_length: int) -> None:
    batches = list(streams(length, batch_size, sequence_length))
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
    expected = list(split)[window:]
    actual = list(split.starting_at(window))
    assert len(actual) == len(expected)
    for batch, other in zip(actual, expected, strict=True):
        for array, copy in zip(batch, other, strict=True):
            np.testing.assert_array_equal(array, copy)


@pytest.mark.parametrize("length", [0, 1])
def test_a_split_in_which_nothing_can_be_predicted_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match=f"a split of {length} tokens"):
        ParallelStreams(np.zeros(length, np.int32), 1, 1)
