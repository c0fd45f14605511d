"""Ctrl-C for processes that tests start, however the tests themselves were started."""

from __future__ import annotations

import signal


def let_interrupts_through() -> None:
    """Undo that this process ignores SIGINT, and with it every process that it starts.

    A shell lets what it runs behind `&` ignore SIGINT, cron and nohup do the same, and children
    inherit it. Frameworks' trainers are then deaf to the signal that a test sends them.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
