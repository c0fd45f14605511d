"""A command's log file, which also gets what frameworks print."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from ptbench.errors import PtbenchError


class Log:
    """A context in which all output goes to a file; `say` shows a line on the terminal as well."""

    def __init__(self, path: Path | None) -> None:
        """Change nothing yet; without a path, output stays on the terminal."""
        self.path = path

    def __enter__(self) -> Log:
        self.terminal: TextIO = sys.stdout
        self.stack = contextlib.ExitStack()
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.terminal = self.stack.enter_context(redirected(self.path))
        return self

    def __exit__(self, *exception: object) -> None:
        self.stack.__exit__(*exception)  # type: ignore[arg-type]

    def say(self, line: str) -> None:
        """Print a line to the log and, if that is a file, to the terminal."""
        print(line, flush=True)
        if self.terminal is not sys.stdout:
            with contextlib.suppress(OSError, ValueError):  # the terminal is gone, or closed
                print(line, file=self.terminal, flush=True)


def replace_unshowable() -> None:
    """Print a question mark for each character that standard output cannot encode."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


@contextlib.contextmanager
def redirected(path: Path) -> Iterator[TextIO]:
    """Send this process's standard output and error to a file; yield the terminal.

    This redirects file descriptors and not only Python's objects, because the frameworks' C++ and
    the replicas' processes write to those.
    """
    terminal = os.fdopen(os.dup(1), "w", errors="replace")
    saved = os.dup(2)
    sys.stdout.flush()
    sys.stderr.flush()
    if path.is_file():  # not truncated: a former attempt keeps its log by another name
        path.unlink()  # and /dev/null is no file: root would remove it for everybody
    with path.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield terminal
    except PtbenchError as error:
        print(f"ptbench: {error}", file=sys.stderr)  # to the log; main() tells the terminal
        raise
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(terminal.fileno(), 1)
        os.dup2(saved, 2)
        os.close(saved)
        with contextlib.suppress(OSError):  # the terminal is gone, and buffered lines with it
            terminal.close()
