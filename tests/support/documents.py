"""The pages that people read, and the blocks of code in them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]

FENCE = re.compile(r"^```([^\n`]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INFO = re.compile(r"(?P<language>\w+)(?: \{(?P<mark>[\w-]+)=\"(?P<value>[^\"]+)\"\})?")

# Pages whose commands are all of one kind say it here, not at each of their blocks.
WHOLE_PAGES = {
    "docs/slurm.md": ("tested-by", "tests/slurm/test_study.py::test_every_cell_ends_in_the_report")
}


class Block(NamedTuple):
    """A block of code in a page."""

    place: str  # page and line
    page: str
    language: str
    mark: str | None  # tested-by, not-run or file
    value: str | None
    code: str


def blocks() -> list[Block]:
    """Return the blocks of code of every page, in order."""
    found = []
    for path in PAGES:
        page, text = path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
        for fence in FENCE.finditer(text):
            place = f"{page}, line {text.count(chr(10), 0, fence.start()) + 1}"
            info = INFO.fullmatch(fence[1])
            assert info, f'{place}: ```{fence[1]} is not: language {{mark="value"}}'
            mark, value = info["mark"], info["value"]
            if mark is None and info["language"] == "sh":
                mark, value = WHOLE_PAGES.get(page, (None, None))
            found.append(Block(place, page, info["language"], mark, value, fence[2]))
    return found
