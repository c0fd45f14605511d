"""`python -m ptbench`: the command line."""

import atexit
import os
import sys

from ptbench.cli import main


def run() -> None:
    """Run one command; after one that succeeded, end without taking everything apart.

    To destroy what a framework has loaded, before a process that is over, takes a second of its
    processor. What is registered first is called last, so what a command registers has been done by
    then.
    """
    done = False

    @atexit.register
    def end_at_once() -> None:
        if done:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)

    main()
    done = True


if __name__ == "__main__":
    run()
