"""The frameworks under test, and the processes in which they run."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
from tests.support.remote import Backends
from xdist.scheduler import LoadScopeScheduling

from ptbench.backends import FRAMEWORKS

# Tests start hundreds of processes, which takes half the time with compiled bytecode.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# How long an example takes says something of the machine, not of the code.
hypothesis.settings.register_profile("ptbench", deadline=None)
hypothesis.settings.load_profile("ptbench")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--framework",
        action="append",
        choices=[*FRAMEWORKS, "numpy"],
        help="Test this framework alone; may be given more than once. All are the default.",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that has an argument `framework` once for each.

    The oracle must keep the contract too; its results are what parity compares with.
    """
    suite = metafunc.definition.path.parent.name
    if "framework" in metafunc.fixturenames and suite in ("contract", "parity", "faults"):
        frameworks = metafunc.config.getoption("framework") or FRAMEWORKS
        if suite == "contract":
            frameworks = dict.fromkeys(["numpy", *frameworks])
        # Scope `session` brings together the tests of a framework.
        metafunc.parametrize("framework", frameworks, scope="session")


class Scheduling(LoadScopeScheduling):  # type: ignore[misc] # xdist has no types
    """Which tests run in the same one of pytest's processes: those that share what is dear.

    A framework's compiled models, a study that has run, the one Slurm that a machine can have.
    """

    def _split_scope(self, nodeid: str) -> str:
        path, _, test = nodeid.partition("::")
        suite = path.split("/")[1]
        if suite == "slurm":
            return suite
        framework = re.search(rf"[\[-]({'|'.join([*FRAMEWORKS, 'numpy'])})[\]-]", test)
        if suite in ("contract", "parity") and framework:
            return framework[1]
        return path


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Scheduling:
    return Scheduling(config, log)


@pytest.fixture(scope="session")
def frameworks(pytestconfig: pytest.Config) -> list[str]:
    """The frameworks under test."""
    return pytestconfig.getoption("framework") or list(FRAMEWORKS)


@pytest.fixture(scope="session")
def backends(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backends]:
    """Backends in any framework; see `Backends.get`."""
    made = Backends(tmp_path_factory.mktemp("workers"))
    yield made
    made.close()
