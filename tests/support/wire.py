"""Messages between the tests and a worker process: JSON, followed by the arrays' bytes.

Nothing is pickled, so that NumPy 1.23 on one side and NumPy 2 on the other agree.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO, Any

import numpy as np

from ptbench.corpus.batching import Batch


@dataclass(frozen=True)
class Handle:
    """Name an object that stays in the worker."""

    number: int


def send(stream: IO[bytes], message: Any) -> None:
    """Write a message: None, numbers, text, arrays, batches, handles, lists and mappings."""
    arrays: list[np.ndarray[Any, Any]] = []

    def encoded(value: Any) -> Any:
        match value:
            case None | bool() | int() | float() | str():
                return value
            case np.generic():
                return value.item()
            case np.ndarray():
                assert value.dtype.kind in "biuf", value.dtype  # numbers only, no objects
                arrays.append(value)
                return {"array": [len(arrays) - 1, value.dtype.str, list(value.shape)]}
            case Handle():
                return {"handle": value.number}
            case Batch():
                return {"batch": [encoded(array) for array in value]}
            case list() | tuple():
                return {"list": [encoded(item) for item in value]}
            case Mapping():
                return {"mapping": {key: encoded(item) for key, item in value.items()}}
        raise TypeError(f"a {type(value).__name__} cannot be sent")

    parts = [json.dumps(encoded(message)).encode(), *(array.tobytes() for array in arrays)]
    stream.write(struct.pack(f"<Q{len(parts)}Q", len(parts), *map(len, parts)))
    for part in parts:
        stream.write(part)
    stream.flush()


def receive(stream: IO[bytes]) -> Any:
    """Return the next message; arrays are new and writable, tuples become lists.

    Raises:
        EOFError: the other side has closed the stream.
    """

    def read(size: int) -> bytearray:
        data = bytearray(stream.read(size))
        if len(data) < size:
            raise EOFError
        return data

    (count,) = struct.unpack("<Q", read(8))
    text, *arrays = [read(size) for size in struct.unpack(f"<{count}Q", read(8 * count))]

    def decoded(value: Any) -> Any:
        match value:
            case {"array": [index, dtype, shape]}:
                return np.frombuffer(arrays[index], dtype).reshape(shape)
            case {"handle": number}:
                return Handle(number)
            case {"batch": arrays_of_batch}:
                return Batch(*map(decoded, arrays_of_batch))
            case {"list": items}:
                return [decoded(item) for item in items]
            case {"mapping": items}:
                return {key: decoded(item) for key, item in items.items()}
        return value

    return decoded(json.loads(text))
