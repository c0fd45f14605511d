"""What a user may be shown when something is wrong: sentences, and no frames of Python's stack."""

import re

FRAME = re.compile(r'Traceback|File ".*\.(py|smk)", line|File ".*Snakefile", line')


def assert_no_frames(said: str) -> None:
    """Fail the test if a stack, or a frame of one, is in what was said."""
    assert not FRAME.search(said), said
