"""Corpora: fetch, verify, generate and prepare them; open them; make batches.

`store`, `sources` and `batching` are imported in every framework's environment and need NumPy
and pydantic alone. `fetch` and `prepare` run in the workflow's environment.
"""

from ptbench.errors import PtbenchError


class CorpusError(PtbenchError):
    """A corpus that cannot be fetched, verified, read, prepared or opened."""
