"""What each framework says that it offers can be laid side by side."""

from __future__ import annotations

from tests.support.problems import SUM
from tests.support.remote import Backends, RemoteBackend

from ptbench.backends.contract import FEATURES


def test_every_framework_says_of_the_same_features_how_it_has_them(
    backends: Backends, framework: str
) -> None:
    backend = backends.get(framework, SUM)
    if not isinstance(backend, RemoteBackend):
        return  # the oracle is no framework, and is in no table
    features = backend.worker.ask("attribute", backend.handle, "features")
    assert tuple(name for name, _, _ in features) == FEATURES
    assert all(isinstance(built_in, bool) and how for _, built_in, how in features)
