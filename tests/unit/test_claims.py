"""Findings are read from the papers' folders, and judged as their tests say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from pydantic import ValidationError

from ptbench.analysis.agreement import judge_published
from ptbench.analysis.claims import Claim, Result, judge_claims
from ptbench.analysis.published import PublishedValue
from ptbench.configuration.papers import NamedRow, parse_row

PAPERS = Path(__file__).parents[2] / "workflow" / "papers"
FILES = sorted(PAPERS.glob("*/claims.yaml"))
MARGIN = 0.02


def claim(*tests: dict[str, Any], **test: Any) -> Claim:
    """A finding with these tests, or with one."""
    made = [*tests, test] if test else tests
    return Claim.model_validate(
        {"id": "c", "locator": "Table 1", "claim": "A is better.", "tests": made}
    )


def judged(given: Claim, perplexities: dict[str, Sequence[float]]) -> Result:
    def values(row: NamedRow, metric: str) -> dict[int, float] | None:
        assert metric == given.tests[0].metric
        found = perplexities.get(str(row))
        return None if found is None else dict(enumerate(found))

    return judge_claims([given], values, MARGIN)[0]


def seeds(mean: float, spread: float = 0.004) -> list[float]:
    """Five perplexities whose logarithms have this mean and deviation."""
    deviations = spread * np.array([-1.2, -0.6, 0.0, 0.6, 1.2])
    return [math.exp(mean + each) for each in deviations]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.parent.name)
def test_every_finding_of_a_paper_has_tests_or_says_why_not(path: Path) -> None:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))["claims"]
    claims = [Claim.model_validate(each) for each in content]
    assert len({each.id for each in claims}) == len(claims)


def test_there_are_201_findings_of_the_five_documents_that_are_reproduced() -> None:
    total = 0
    for path in FILES:
        if path.parent.name in ("merity2017", "yang2018"):  # what those name as their next step
            continue
        total += len(yaml.safe_load(path.read_text(encoding="utf-8"))["claims"])
    assert total == 201


@pytest.mark.parametrize(
    ("text", "row"),
    [
        ("zaremba-small", NamedRow("zaremba-small", None, 1)),
        ("zaremba-small+dropout=0.5 [jax]", NamedRow("zaremba-small+dropout=0.5", "jax", 1)),
        ("zhang-bm [tensorflow] [8]", NamedRow("zhang-bm", "tensorflow", 8)),
    ],
)
def test_a_row_is_a_variant_with_or_without_framework_and_devices(text: str, row: NamedRow) -> None:
    assert parse_row(text) == row


@pytest.mark.parametrize("text", ["a b", "a [cntk]", "a [jax] [two]", ""])
def test_any_other_row_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"form|no framework"):
        parse_row(text)


@pytest.mark.parametrize(
    ("test", "message"),
    [
        ({"test": "lower", "left": ["a", "b"], "right": ["c", "d", "e"]}, "cannot be paired"),
        ({"test": "rises", "left": ["a"]}, "several rows"),
        ({"test": "saturates", "left": ["a", "b"], "at": 1}, "before the last"),
        ({"test": "interaction", "left": ["a"], "right": ["b"]}, "two rows"),
        ({"test": "value", "left": ["a"]}, "need a number"),
        ({"test": "value", "left": ["a", "b"], "number": [1.0]}, "1 numbers for 2 rows"),
        ({"test": "slope", "left": ["a", "b"], "number": 1.0}, "position"),
    ],
)
def test_a_test_that_cannot_be_made_is_refused(test: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        claim(**test)


@pytest.mark.parametrize(
    ("test", "means", "verdict"),
    [
        ({"test": "lower", "left": ["a"], "right": ["b"]}, (4.4, 4.5), "upheld"),
        ({"test": "lower", "left": ["a"], "right": ["b"]}, (4.5, 4.4), "contradicted"),
        ({"test": "lower", "left": ["a"], "right": ["b"]}, (4.5, 4.5), "contradicted"),
        ({"test": "higher", "left": ["a"], "right": ["b"]}, (4.5, 4.4), "upheld"),
        ({"test": "equal", "left": ["a"], "right": ["b"]}, (4.5, 4.501), "upheld"),
        ({"test": "equal", "left": ["a"], "right": ["b"]}, (4.5, 4.6), "contradicted"),
        ({"test": "ordering", "left": ["a", "b", "c"]}, (4.3, 4.4, 4.5), "upheld"),
        ({"test": "ordering", "left": ["a", "b", "c"]}, (4.3, 4.5, 4.4), "contradicted"),
        ({"test": "rises", "left": ["a", "b", "c"]}, (4.3, 4.4, 4.5), "upheld"),
        ({"test": "falls", "left": ["a", "b", "c"]}, (4.3, 4.4, 4.5), "contradicted"),
        ({"test": "saturates", "left": ["a", "b", "c"], "at": 1}, (4.6, 4.5, 4.499), "upheld"),
        ({"test": "saturates", "left": ["a", "b", "c"], "at": 1}, (4.6, 4.5, 4.4), "contradicted"),
        ({"test": "optimum", "left": ["a"], "right": ["b", "c"]}, (4.3, 4.4, 4.5), "upheld"),
        ({"test": "optimum", "left": ["a"], "right": ["b", "c"]}, (4.5, 4.4, 4.6), "contradicted"),
        ({"test": "interaction", "left": ["a", "b"], "right": ["c", "d"]},
         (4.3, 4.5, 4.5, 4.5), "upheld"),
        ({"test": "value", "left": ["a"], "number": math.exp(4.5)}, (4.5,), "upheld"),
        ({"test": "value", "left": ["a"], "number": math.exp(4.515)}, (4.5,), "upheld"),  # close
        ({"test": "value", "left": ["a"], "number": 100.0}, (4.5,), "contradicted"),
        ({"test": "value", "left": ["a"], "number": 90.0, "tolerance": 0.01}, (4.5,), "upheld"),
        ({"test": "slope", "left": ["a", "b", "c"], "number": -1.0, "positions": [1, 2, 4]},
         (4.5, 4.5 - math.log(2), 4.5 - math.log(4)), "upheld"),
        ({"test": "above", "left": ["a"], "number": 50.0}, (4.5,), "upheld"),
    ],
)  # fmt: skip
def test_verdicts(test: dict[str, Any], means: tuple[float, ...], verdict: str) -> None:
    values = {name: seeds(mean) for name, mean in zip("abcd", means, strict=False)}
    given = {f"{name} [jax]": each for name, each in values.items()}
    named = {
        key: [f"{row} [jax]" for row in rows] if key in ("left", "right") else rows
        for key, rows in test.items()
    }
    assert judged(claim(**named), given).verdict == verdict


def test_seeds_that_scatter_more_than_the_effect_cannot_tell() -> None:
    given = claim(test="lower", left=["a [jax]"], right=["b [jax]"])
    result = judged(given, {"a [jax]": seeds(4.44, 0.08), "b [jax]": seeds(4.5, 0.08)})
    assert result.verdict == "cannot tell"
    # s = 0.0759 and 0.04 to the margin: n = 2 (1.645 + 0.842)^2 s^2 / 0.04^2 + 1 = 45.5
    assert result.seeds == 46
    number = {"test": "value", "left": ["a [jax]"], "number": math.exp(4.6)}
    both = claim(given.tests[0].model_dump(), number)
    again = judged(both, {"a [jax]": seeds(4.44, 0.08), "b [jax]": seeds(4.5, 0.08)})
    assert (again.verdict, again.seeds) == ("cannot tell", None)  # which do not settle the number


def test_each_test_of_a_finding_has_its_own_least_effect() -> None:
    """An equality has at most its margin to spare, an order must be by more than its margin."""
    equal = {"test": "equal", "left": ["a [jax]"], "right": ["b [jax]"]}
    lower = {"test": "lower", "left": ["a [jax]"], "right": ["c [jax]"]}
    given = claim(equal, lower)
    values = {"a [jax]": seeds(4.4), "b [jax]": seeds(4.401), "c [jax]": seeds(4.5)}
    assert judged(given, values).verdict == "upheld"
    values["c [jax]"] = seeds(4.4 + MARGIN / 2, 0.001)
    assert judged(given, values).verdict == "contradicted"


def test_one_seed_shows_no_optimum() -> None:
    given = claim(test="optimum", left=["a [jax]"], right=["b [jax]"])
    assert judged(given, {"a [jax]": [80.0], "b [jax]": [90.0]}).verdict == "cannot tell"


@pytest.mark.parametrize(("number", "verdict"), [(2.0, "upheld"), (3.0, "contradicted")])
def test_a_ratio_is_that_of_the_seeds_in_pairs(number: float, verdict: str) -> None:
    given = claim(test="ratio", left=["a [jax]"], right=["b [jax]"], number=number)
    values = {"a [jax]": seeds(4.5 + math.log(2), 0.02), "b [jax]": seeds(4.5, 0.01)}
    assert judged(given, values).verdict == verdict


def test_a_number_is_judged_alike_as_a_finding_and_as_a_published_number() -> None:
    """More seeds narrow the interval of our mean, and not that of another run."""
    number = math.exp(4.53)
    published = PublishedValue(
        experiment="e", variant="a", framework="jax", devices=1, metric="valid_perplexity",
        value=number, source="s", locator="Table 1", note="",
    )  # fmt: skip
    given = claim(test="value", left=["a [jax]"], number=number)
    said = {"reproduced": "upheld", "close": "upheld", "not reproduced": "contradicted"}
    samples = {
        "many": np.exp(4.5 + 0.02 * np.linspace(-1.7, 1.7, 100)).tolist(),
        "far": np.exp(4.4 + 0.02 * np.linspace(-1.7, 1.7, 100)).tolist(),
        "scattered": seeds(4.45, 0.2),
        "one": [number],
        "diverged": [math.inf] * 3,
        "partly diverged": [number, number, math.inf],
    }
    verdicts = {}
    for name, values in samples.items():
        verdict = judge_published(published, values, [], MARGIN).verdict
        verdicts[name] = judged(given, {"a [jax]": values}).verdict
        assert verdicts[name] == said.get(verdict, "cannot tell")
    assert verdicts == {
        "many": "upheld", "far": "contradicted", "scattered": "cannot tell", "one": "cannot tell",
        "diverged": "contradicted", "partly diverged": "cannot tell",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("metric", "a", "b", "verdict"),
    [
        ("parameters", [2e6], [1e6], "upheld"),  # the recipe decides
        ("epochs", [39.0], [13.0], "cannot tell"),  # another seed may stop elsewhere
        ("epochs", [39.0, 39.0], [13.0, 13.0], "upheld"),
        ("epochs", [13.0, 13.0], [39.0, 39.0], "contradicted"),
        ("peak_memory_bytes", [2e9], [1e9], "cannot tell"),
        ("peak_memory_bytes", [2e9, 2e9], [1e9, 1e9], "upheld"),
    ],
)
def test_a_count_that_all_seeds_have_alike_is_certain(
    metric: str, a: list[float], b: list[float], verdict: str
) -> None:
    given = claim(test="higher", left=["a [jax]"], right=["b [jax]"], metric=metric)
    assert judged(given, {"a [jax]": a, "b [jax]": b}).verdict == verdict


@pytest.mark.parametrize(
    "test",
    [
        {"test": "higher", "left": ["a [jax]"], "right": ["b [jax]"]},
        {"test": "ratio", "left": ["a [jax]"], "right": ["b [jax]"], "number": 2.0},
        {"test": "optimum", "left": ["b [jax]"], "right": ["a [jax]"]},
    ],
)
def test_rows_that_do_not_compare_cannot_tell(test: dict[str, Any]) -> None:
    given = claim(**test, metric="tokens_per_second")
    speeds = {"a": seeds(4.5 + math.log(2), 0.02), "b": seeds(4.5, 0.01)}

    def verdict(fair: bool) -> Result:
        def values(row: NamedRow, _: str) -> dict[int, float]:
            return dict(enumerate(speeds[row.variant]))

        return judge_claims([given], values, MARGIN, lambda metric, rows: fair)[0]  # noqa: ARG005

    assert (verdict(True).verdict, verdict(True).shared) == ("upheld", False)
    assert (verdict(False).verdict, verdict(False).shared) == ("cannot tell", True)
    assert len(verdict(False).numbers) == 2  # shown all the same


def test_a_contradicted_finding_has_the_p_of_its_opposite() -> None:
    given = claim(test="lower", left=["a [jax]"], right=["b [jax]"])
    found = judged(given, {"a [jax]": seeds(4.6), "b [jax]": seeds(4.5)})
    assert found.verdict == "contradicted"
    assert found.p is not None
    assert found.p_opposite is not None
    assert found.p > 0.95
    assert found.p_opposite < 0.001


def test_a_seed_that_one_row_lacks_has_no_part_in_a_ratio() -> None:
    given = claim(test="ratio", left=["a [jax]"], right=["b [jax]"], number=2.0025)
    lower = dict(enumerate(seeds(4.5, 0.1)))
    upper = {seed: (2.0 + 0.001 * seed) * value for seed, value in lower.items()}
    del lower[0]

    def values(row: NamedRow, _: str) -> dict[int, float]:
        return upper if row.variant == "a" else lower

    assert judge_claims([given], values, MARGIN)[0].verdict == "upheld"


def test_a_row_that_was_not_run_leaves_the_finding_not_run() -> None:
    given = claim(test="lower", left=["a [jax]"], right=["b [jax]"])
    assert judged(given, {"a [jax]": seeds(4.5)}).verdict == "not run"


def test_a_row_without_a_framework_must_hold_in_each_that_ran_it() -> None:
    given = claim(test="lower", left=["a"], right=["b"])
    fine = {f"{n} [{f}]": seeds(m) for f in ("jax", "mxnet") for n, m in (("a", 4.4), ("b", 4.5))}
    assert judged(given, fine).verdict == "upheld"
    assert judged(given, fine | {"a [mxnet]": seeds(4.6)}).verdict == "contradicted"


def test_a_diverged_row_is_worse_than_any_other() -> None:
    given = claim(test="lower", left=["a [jax]"], right=["b [jax]"])
    diverged = {"a [jax]": seeds(4.5), "b [jax]": [math.inf] * 5}
    assert judged(given, diverged).verdict == "upheld"


def test_p_values_of_a_document_are_one_family() -> None:
    """The same evidence counts for less beside nineteen other findings (Holm)."""
    test = {"test": "lower", "left": ["a [jax]"], "right": ["b [jax]"]}
    weak = {"a [jax]": seeds(4.455, 0.02), "b [jax]": seeds(4.5, 0.02)}

    def values(row: NamedRow, metric: str) -> dict[int, float]:
        assert metric == "valid_perplexity"
        return dict(enumerate(weak[str(row)]))

    alone = judge_claims([claim(**test)], values, MARGIN)
    many = judge_claims([claim(**test)] * 20, values, MARGIN)
    assert alone[0].verdict == "upheld"
    assert {each.verdict for each in many} == {"cannot tell"}
