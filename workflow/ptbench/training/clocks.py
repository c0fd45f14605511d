"""Separate clocks for the phases of a run."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator


class Clocks:
    """Adds up the seconds of named phases; each clock stops on a synchronised device."""

    def __init__(self, synchronize: Callable[[], None] = lambda: None) -> None:
        """Set all clocks to zero; `synchronize` waits for the device before one starts or stops."""
        self.synchronize = synchronize
        self.seconds: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time a block as part of `phase`. Phases must not be nested."""
        self.synchronize()
        start = time.perf_counter()
        try:
            yield
            self.synchronize()
        finally:
            self.seconds[phase] += time.perf_counter() - start
