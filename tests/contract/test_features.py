"""What each framework says that it offers can be laid side by side, and docs/features.md does."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.problems import SUM
from tests.support.remote import Backends, RemoteBackend

from ptbench.backends.contract import FEATURES, Feature
from ptbench.report.features import features_markdown
from ptbench.report.formatting import framework_name

DOCUMENT = Path(__file__).parents[2] / "docs" / "features.md"


def declared(backends: Backends, framework: str) -> list[Feature]:
    if framework == "numpy":
        pytest.skip("the oracle is no framework, and is in no table")
    backend = backends.get(framework, SUM)
    assert isinstance(backend, RemoteBackend)
    features = backend.worker.ask("attribute", backend.handle, "features")
    return [Feature(*each) for each in features]


def test_every_framework_says_of_the_same_features_how_it_has_them(
    backends: Backends, framework: str
) -> None:
    features = declared(backends, framework)
    assert tuple(feature.name for feature in features) == FEATURES
    assert all(isinstance(built_in, bool) and how for _, built_in, how in features)


def test_the_feature_document_says_what_the_framework_says(
    backends: Backends, framework: str
) -> None:
    # The lines of one framework, from a table that has it alone and from the document.
    start = f"- {framework_name(framework)}, "
    lines = [
        [line for line in text.splitlines() if line.startswith(start)]
        for text in (features_markdown({framework: declared(backends, framework)}), document())
    ]
    assert lines[0] == lines[1], "run `uv run ptbench features`"


def document() -> str:
    return DOCUMENT.read_text(encoding="utf-8")
