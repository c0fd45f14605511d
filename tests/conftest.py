"""The frameworks under test, and the processes in which they run."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import pytest
from tests.support.remote import Backends

from ptbench.configuration.models import FRAMEWORKS

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
