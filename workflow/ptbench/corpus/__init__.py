"""Corpora: fetching and verifying them, vocabulary, synthetic text, storage and batching.

`store` and `batching` run in every framework's environment and import NumPy and the standard
library alone; `fetch` and `prepare` run in the workflow's environment.
"""

from ptbench.errors import PtbenchError


class CorpusError(PtbenchError):
    """A corpus that cannot be fetched, verified, read, prepared or opened."""
