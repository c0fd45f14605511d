"""What the committed table says of mistakes is what the frameworks do."""

from __future__ import annotations

import re

import pytest
from tests.support import probes
from tests.support.problems import SUM
from tests.support.remote import Backends, probe

from ptbench.backends import FRAMEWORKS
from ptbench.measurement.mistakes import read_mistakes


@pytest.mark.frameworks(*FRAMEWORKS)
def test_a_framework_says_what_the_table_quotes(backends: Backends, framework: str) -> None:
    said = probe(probes.said_to_mistakes, backends.get(framework, SUM))
    quoted = {name: each.model_dump() for name, each in read_mistakes()[framework].items()}
    for name, each in quoted.items():
        for key in ("error", "names_cause"):
            assert said[name][key] == each[key], name
        # numbers of layers depend on what the process has made before
        assert re.sub(r"\d+", "", said[name]["message"]) == re.sub(r"\d+", "", each["message"])
    assert said.keys() == quoted.keys()
