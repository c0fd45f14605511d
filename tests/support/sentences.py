"""A check that users are shown sentences instead of Python's stack."""

import re

FRAME = re.compile(r'Traceback|File ".*\.(py|smk)", line|File ".*Snakefile", line')


def assert_no_frames(said: str) -> None:
    """Fail the test if a text contains a stack or a frame of one."""
    assert not FRAME.search(said), said
