"""What is done at the start of a run for Snakemake."""

from __future__ import annotations

import os
import signal
import threading

from ptbench.configuration.start import take_sigterm


def test_sigterm_that_interrupts_the_holder_of_a_lock_does_not_stop_the_run() -> None:
    lock, handled = threading.Lock(), threading.Event()

    def handler(*_: object) -> None:
        with lock:
            handled.set()

    before = signal.signal(signal.SIGTERM, handler)
    try:
        take_sigterm()
        with lock:
            os.kill(os.getpid(), signal.SIGTERM)
            assert not handled.wait(0.1)
        assert handled.wait(30)
    finally:
        signal.signal(signal.SIGTERM, before)
