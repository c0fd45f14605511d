"""A line profile of functions in Python, as `line_profiler` makes it, for every framework alike.

Frameworks compute while Python goes on, so the device is synchronised after every line: a line's
time is that of what it asked for. A compiled function is one line, whatever it does.
"""

from __future__ import annotations

import ast
import inspect
import linecache
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import cache
from types import CodeType, FrameType, TracebackType
from typing import Any, NamedTuple

Trace = Callable[[FrameType, str, Any], Any]


class Line(NamedTuple):
    """A statement of a function."""

    function: str  # its name
    text: str  # the statement's first line
    calls: int
    seconds: float  # of all calls together, with what it called


class LineTimer:
    """Times the lines of one function, and of those in its file that it calls itself.

    `with timer: ...`; then `lines()`. What a line calls counts as its own, so the lines of a
    function that another one calls add up to one line of that.
    """

    def __init__(self, function: Callable[..., Any], synchronize: Callable[[], None]) -> None:
        """Take what is timed.

        Args:
            function: may be wrapped by decorators.
            synchronize: waits for what the device has been asked to do.
        """
        self.code = inspect.unwrap(function).__code__
        self.synchronize = synchronize
        self.seconds: dict[tuple[CodeType, int], float] = defaultdict(float)
        self.calls: dict[tuple[CodeType, int], int] = defaultdict(int)
        self.called: dict[CodeType, None] = {}  # the timed functions, in their order
        self.before: Any = None

    def __enter__(self) -> LineTimer:
        self.before = sys.gettrace()
        sys.settrace(self.enter)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        sys.settrace(self.before)

    def enter(self, frame: FrameType, _event: str, _argument: Any) -> Trace | None:
        """Return what is told of a function's lines; None: its lines are not timed."""
        code, caller = frame.f_code, frame.f_back
        if code is not self.code:
            called_here = caller is not None and caller.f_code is self.code
            if not called_here or code.co_filename != self.code.co_filename:
                return None
            if code.co_name.startswith("<"):  # a comprehension is part of its statement
                return None
        self.called[code] = None
        last: tuple[int, float] | None = None

        def trace(frame: FrameType, event: str, _argument: Any) -> Trace:
            nonlocal last
            if event in ("line", "return"):
                self.synchronize()
                if last is not None:
                    number, began = last
                    self.seconds[code, number] += time.perf_counter() - began
                    self.calls[code, number] += 1
                last = (frame.f_lineno, time.perf_counter()) if event == "line" else None
            return trace

        return trace

    def lines(self) -> list[Line]:
        """Return the statements that ran, function by function, in the order of the source."""
        found: list[Line] = []
        for code in self.called:
            first = statements(code.co_filename)
            seconds: dict[int, float] = defaultdict(float)
            calls: dict[int, int] = defaultdict(int)
            for (own, number), spent in self.seconds.items():
                if own is code:
                    start = first.get(number, number)
                    seconds[start] += spent
                    calls[start] = max(calls[start], self.calls[own, number])
            found += [
                Line(
                    code.co_name,
                    linecache.getline(code.co_filename, number).strip(),
                    calls[number],
                    seconds[number],
                )
                for number in sorted(seconds)
            ]
        return found


@cache
def statements(file: str) -> Mapping[int, int]:
    """Return the first line of the innermost statement of every line of a file."""
    tree = ast.parse("".join(linecache.getlines(file)))
    found: dict[int, int] = {}
    for node in ast.walk(tree):  # outer statements come first
        if isinstance(node, ast.stmt):
            found |= dict.fromkeys(range(node.lineno, (node.end_lineno or 0) + 1), node.lineno)
    return found
