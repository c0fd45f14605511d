"""What a record means changes only together with `PROTOCOL`.

`golden.json` holds a whole run of the oracle, the fields of each record with their descriptions,
and the defaults of a recipe. tests/parity holds the frameworks to the oracle. After a change that
is meant, raise `PROTOCOL` and write the file again: `uv run python -m tests.unit.test_protocol`. A
new field that older records may lack changes no meaning: then the file alone is written again.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from tests.support.checkpoints import small_corpus
from tests.support.problems import new_oracle

from ptbench.backends.oracle import Oracle
from ptbench.configuration.specification import PROTOCOL, Cell, Specification
from ptbench.model.recipe import Recipe
from ptbench.training.cell import Paths, run_cell
from ptbench.training.records import Epoch, Hardware, Metrics, Score, Seconds, read_history

GOLDEN = Path(__file__).parents[1] / "support" / "golden.json"
# A rate that falls, a norm that clips at times, padded windows, a best epoch before the last.
RECIPE = Recipe(
    corpus="mine", layers=2, embedding_size=6, hidden_size=6, batch_size=4, sequence_length=5,
    evaluation_batch_size=3, epochs=3, constant_epochs=1, learning_rate_decay=0.98,
    learning_rate=4.0, clip_norm=2.0,
)  # fmt: skip
CLOCKED = {"tokens_per_second", "training_seconds", "validation_seconds"}
MEASURED = {"tokens_per_second", "seconds_per_epoch", "seconds", "peak_memory_bytes", "hardware"}


def words(count: int, step: int) -> str:
    """Return lines of seven words that jump by one or by `step` in a circle of nine."""
    text = [f"w{(n if n % 4 else n * step) % 9}" for n in range(count)]
    return "".join(" ".join(text[n : n + 7]) + "\n" for n in range(0, count, 7))


def meaning(folder: Path) -> dict[str, Any]:
    """Return all that `golden.json` holds, of the code as it is."""
    corpus = small_corpus(folder, train=words(210, 1), valid=words(70, 5), test=words(71, 1))
    cell = Cell(variant="mine", framework="pytorch", devices=1, seed=3)
    specification = Specification(variant="mine", recipe=RECIPE, corpus_definition={})
    paths = Paths(corpus, *(folder / name for name in ("cell", "attempts", "checkpoints")))

    def create(_: Cell, given: Specification, size: int, *__: int) -> Oracle:
        return new_oracle(given.recipe, seed=3, vocabulary_size=size)

    with mock.patch("ptbench.training.cell.create_backend", create):
        metrics = run_cell(cell, specification, paths, threads=1, say=lambda _: None)
    history = read_history(paths.output / "history.csv")
    return {
        "protocol": PROTOCOL,
        "records": {
            model.__name__: {name: field.description for name, field in model.model_fields.items()}
            for model in (Metrics, Score, Seconds, Epoch, Hardware)
        },
        "defaults": Recipe(corpus="ptb").model_dump(mode="json"),
        "metrics": metrics.model_dump(mode="json", exclude=MEASURED),
        "history": [epoch.model_dump(mode="json", exclude=CLOCKED) for epoch in history],
    }


def numbers(value: Any, where: str = "") -> dict[str, Any]:
    """Return the leaves of nested mappings and lists by their place."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, each in items for k, v in numbers(each, f"{where}/{key}").items()}
    return {where: value}


def test_records_mean_what_they_meant_when_protocol_was_raised_last(tmp_path: Path) -> None:
    expected = numbers(json.loads(GOLDEN.read_text(encoding="utf-8")))
    actual = numbers(meaning(tmp_path))
    assert actual.keys() == expected.keys()
    for where, value in expected.items():
        close = pytest.approx(value, rel=1e-9) if isinstance(value, float) else value
        assert actual[where] == close, where


def test_the_golden_run_has_what_a_run_can_have() -> None:
    run = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert run["metrics"]["status"] == "ok"
    assert run["metrics"]["best_epoch"] < run["metrics"]["epochs"] == 3
    assert len({epoch["learning_rate"] for epoch in run["history"]}) == 3
    norms = [epoch["gradient_norm"] for epoch in run["history"]]
    assert min(norms) < 2 < max(norms)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        text = json.dumps(meaning(Path(folder)), indent=2, sort_keys=True) + "\n"
    GOLDEN.write_text(text, encoding="utf-8")
