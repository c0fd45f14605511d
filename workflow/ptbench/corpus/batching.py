"""Token streams as batches. Imports NumPy alone: runs in every framework's environment."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt


class Batch(NamedTuple):
    """A window of parallel streams; each array is new and the reader's own to keep."""

    inputs: npt.NDArray[np.int32]  # [time, batch]
    targets: npt.NDArray[np.int32]  # [time, batch]
    mask: npt.NDArray[np.float32]  # [time, batch], 0 where there is no token to predict


class ParallelStreams:
    """The split as `batch_size` contiguous streams, read in successive windows.

    The batching of Zaremba et al. 2014 and the TensorFlow PTB tutorial, with state carried from
    window to window, save that nothing is dropped: the split's tokens but the first are each
    predicted exactly once. The streams' lengths differ by up to a token short of even, and the last
    window may be incomplete; both are filled up with masked tokens so that every batch has one
    shape.
    """

    def __init__(self, tokens: npt.NDArray[Any], batch_size: int, sequence_length: int) -> None:
        """Args: tokens: [tokens], at least two of them."""
        if len(tokens) < 2:
            raise ValueError(f"a split of {len(tokens)} tokens predicts nothing; it needs 2")
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

    def __iter__(self) -> Iterator[Batch]:
        return self.starting_at(0)

    def starting_at(self, window: int) -> Iterator[Batch]:
        """The batches from the given window on, so that a run can be resumed within an epoch."""
        for w in range(window, self.windows):
            rows = slice(w * self.sequence_length, (w + 1) * self.sequence_length)
            inputs, targets, mask = self._streams[:, rows]
            yield Batch(inputs.copy(), targets.copy(), mask.astype(np.float32))
