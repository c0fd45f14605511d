"""Text to words and words to integers: tokens, the vocabulary and its order.

No files here: `prepare.py` reads and writes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

END_OF_SENTENCE = "<eos>"
UNKNOWN = "<unk>"
