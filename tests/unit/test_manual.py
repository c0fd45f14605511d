"""The files that are made from the code say what the code says."""

from __future__ import annotations

from pathlib import Path

import pytest

from ptbench.cli import parser
from ptbench.report.manual import allowed, generated

ROOT = Path(__file__).parents[2]
FILES = generated(parser())


def test_every_generated_file_is_what_the_code_says() -> None:
    written = {path: (ROOT / path).read_text(encoding="utf-8") for path in FILES}
    stale = [path for path, text in FILES.items() if written[path] != text]
    assert stale == [], "run `uv run ptbench generate`"


def test_nothing_else_is_where_generated_files_are() -> None:
    for folder in ("docs/manual", "workflow/schemas"):
        there = {file.relative_to(ROOT).as_posix() for file in (ROOT / folder).iterdir()}
        assert there == {path for path in FILES if path.startswith(folder)}


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "number", "minimum": 1, "maximum": 4}, "number (at least 1 and at most 4)"),
        ({"anyOf": [{"type": "number"}, {"type": "null"}]}, "number or `null`"),
        ({"type": "array", "items": {"enum": ["a", "b"]}}, "list of `a`, `b`"),
        ({"$ref": "#/$defs/Part"}, "[Part](#part)"),
        ({"$ref": "#/$defs/Own"}, "[kind: own](#kind-own)"),
        ({"type": "object", "patternProperties": {".": {"type": "boolean"}}},
         "mapping of names to `true`, `false`"),
    ],
)  # fmt: skip
def test_what_a_key_may_be_is_said_in_words(schema: dict[str, object], words: str) -> None:
    parts = {
        "Part": {"title": "Part", "properties": {}},
        "Own": {"title": "Own", "properties": {"kind": {"const": "own"}}},
    }
    assert allowed(schema, {"$defs": parts}) == words
