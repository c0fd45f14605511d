"""glibc's allocator, which PyTorch and JAX take a CPU's memory from."""

from __future__ import annotations

import contextlib
import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # malloc.h


def keep_memory(arenas: int | None = None) -> bool:
    """Have glibc keep freed memory, for the rest of the process; says whether it could.

    Large arrays would otherwise be mapped from and returned to the system at every step, and page
    faults cost a quarter to a third of the time of a small model. Only the first arena grows
    without mapping: where threads other than the main one allocate, `arenas` is 1.
    """
    options = [(M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1)]
    if arenas is not None:
        options.insert(0, (M_ARENA_MAX, arenas))
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        return all(mallopt(option, value) for option, value in options)
    return False
