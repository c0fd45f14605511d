"""The names in `features.yaml` exist."""

from __future__ import annotations

import pytest
from tests.support import probes
from tests.support.problems import SUM
from tests.support.remote import Backends, probe

from ptbench.backends import FRAMEWORKS
from ptbench.backends.features import read_features


@pytest.mark.frameworks(*FRAMEWORKS)
def test_every_name_in_the_features_exists(backends: Backends, framework: str) -> None:
    features = read_features()[framework]
    symbols = [name for feature in features.values() for name in feature.symbols]
    code = [name for feature in features.values() for name in feature.code]
    backend = backends.get(framework, SUM)
    package = f"ptbench.backends.{framework}"
    assert probe(probes.missing_names, backend, symbols, "") == []
    assert probe(probes.missing_names, backend, code, package) == []


@pytest.mark.frameworks(*FRAMEWORKS)
def test_every_feature_says_where_it_is(framework: str) -> None:
    for name, feature in read_features()[framework].items():
        assert feature.symbols if feature.built_in else feature.code or feature.absent, name


def test_every_framework_has_the_same_features_in_the_same_order() -> None:
    names = [list(features) for features in read_features().values()]
    assert all(own == names[0] for own in names)
