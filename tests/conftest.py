"""The command line of the tests, the cases they run on, and how three processes share them."""

from __future__ import annotations

import collections
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import hypothesis
import pytest
from tests.support.cases import covering_cases, named_cases
from tests.support.interrupts import let_interrupts_through
from tests.support.remote import Backends
from xdist.scheduler import LoadScopeScheduling

from ptbench.backends import FRAMEWORKS, ORACLE
from ptbench.model.recipe import Accelerator

# Tests start hundreds of processes, which takes half the time with compiled bytecode.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
let_interrupts_through()

# How long an example takes says something about the machine, not about the code.
hypothesis.settings.register_profile("ptbench", deadline=None)
hypothesis.settings.load_profile("ptbench")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--framework",
        action="append",
        choices=[*FRAMEWORKS, ORACLE],
        help="Test only this framework; may be given more than once. The default is all.",
    )
    parser.addoption(
        "--exhaustive",
        action="store_true",
        help="Also test the whole products of models, kernels, implementations, optimizers and "
        "devices, of which a run tests a covering design otherwise.",
    )

    parser.addoption(
        "--accelerator",
        choices=get_args(Accelerator),
        default="cpu",
        help="Kind of device that the frameworks compute on in tests/contract and tests/parity.",
    )
    parser.addoption(
        "--gpus", type=int, default=1, help="GPUs of this machine; tests that need more skip."
    )
    parser.addoption(
        "--python",
        type=Path,
        help="A Python that has the frameworks; the default is each one's environment.",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test with an argument `framework` once for each, and one with `case` for each case.

    The oracle must keep the contract too. pyproject.toml says what the markers mean.
    """
    suite, config = metafunc.definition.path.parent.name, metafunc.config
    if "framework" not in metafunc.fixturenames or suite not in ("contract", "parity", "faults"):
        return
    frameworks = config.getoption("framework") or list(FRAMEWORKS)
    if suite == "contract":
        frameworks = list(dict.fromkeys([ORACLE, *frameworks]))
    if only := metafunc.definition.get_closest_marker("frameworks"):
        frameworks = [framework for framework in frameworks if framework in only.args]
    exhaustive = config.getoption("exhaustive")
    if metafunc.definition.get_closest_marker("one_framework") and not exhaustive:
        frameworks = frameworks[:1]
    if not frameworks:
        named = [name for name in ("framework", "case") if name in metafunc.fixturenames]
        none = pytest.param(*[None] * len(named), marks=pytest.mark.not_chosen)
        metafunc.parametrize(named, [none])
        return
    # Scope `session` brings together the tests of a framework, and those of a case.
    if "case" not in metafunc.fixturenames:
        metafunc.parametrize("framework", frameworks, scope="session")
        return
    marker = metafunc.definition.get_closest_marker("cases")
    found = []
    for framework in frameworks:
        cases = covering_cases(framework)
        if exhaustive:
            cases = [*cases, *named_cases(framework)]
        if marker:
            cases = [case for case in cases if marker.kwargs["where"](case.recipe)]
        found += [pytest.param(framework, case, id=f"{framework}-{case.name}") for case in cases]
    metafunc.parametrize(("framework", "case"), found, scope="session")


# The scopes of `Scheduling` that take longest, in the order of their time on two cores. The first
# mostly waits for Slurm, so its process leaves the cores to the two others.
LONGEST = (
    "slurm", "tests/workflow/test_demo.py", "jax", "tensorflow", "keras",
    "tests/faults/test_frameworks.py", "pytorch", "tests/workflow/test_planning.py", "mxnet",
    "tests/workflow/test_search.py",
    "tests/workflow/test_environments.py", "tests/workflow/test_failures.py",
    "tests/workflow/test_slurm_profile.py", "tests/faults/test_trainer.py",
    "tests/workflow/test_interruption.py", "tests/faults/test_replicas.py",
    "tests/unit/test_isolation.py", "tests/unit/test_findings.py", "tests/unit/test_oracle.py",
    "tests/unit/test_configuration.py", "tests/unit/test_quality.py", "tests/unit/test_report.py",
    "tests/workflow/test_documentation.py", "tests/workflow/test_hostile.py",
)  # fmt: skip


def scope_of(nodeid: str) -> str:
    """Return what a test shares with others that is expensive: they run in the same process.

    It is a framework with its compiled models, a file's study that has run, or the one Slurm that
    a machine can have.
    """
    path, _, test = nodeid.partition("::")
    suite = path.split("/")[1]
    if suite == "slurm":
        return suite
    framework = re.search(rf"[\[-]({'|'.join([*FRAMEWORKS, ORACLE])})[\]-]", test)
    if suite in ("contract", "parity") and framework:
        return framework[1]
    return path


class Scheduling(LoadScopeScheduling):  # type: ignore[misc] # xdist has no types
    """Gives each of pytest's processes one scope after the other, those that take longest first."""

    def _split_scope(self, nodeid: str) -> str:
        return scope_of(nodeid)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is not asked for, and put the longest scopes first.

    Short ones then fill what is left of the time.
    """
    left_out = {"not_chosen"} if config.getoption("exhaustive") else {"not_chosen", "exhaustive"}
    items[:] = [item for item in items if not any(map(item.get_closest_marker, left_out))]
    order = {scope: number for number, scope in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(scope_of(item.nodeid), len(order)))


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Scheduling:
    return Scheduling(config, log)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say once for each reason how many tests were skipped."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = collections.Counter(report.longrepr[2] for report in skipped)
    if reasons:
        terminalreporter.section("skipped tests")
    for reason, count in reasons.most_common():
        terminalreporter.line(f"{count:4} {reason.removeprefix('Skipped: ')}")


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Let go of the memory of workers that have compiled much, between two tests."""
    backends = getattr(item, "funcargs", {}).get("backends")
    if isinstance(backends, Backends):
        backends.renew()


@pytest.fixture(scope="session")
def frameworks(pytestconfig: pytest.Config) -> list[str]:
    """Return the frameworks under test."""
    return pytestconfig.getoption("framework") or list(FRAMEWORKS)


@pytest.fixture(scope="session")
def backends(
    tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> Iterator[Backends]:
    """Yield what makes backends in any framework; see `Backends.get`."""
    accelerator = pytestconfig.getoption("accelerator")
    gpus = pytestconfig.getoption("gpus") if accelerator == "cuda" else None
    python = pytestconfig.getoption("python")
    made = Backends(tmp_path_factory.mktemp("workers"), accelerator, gpus, python)
    yield made
    made.close()
