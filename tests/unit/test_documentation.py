"""The documentation: its commands are tested, its links lead somewhere, its messages are real."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from tests.support.documents import PAGES, ROOT, Block, blocks

import ptbench
from ptbench.cli import COMMANDS
from ptbench.configuration.config import Config

BLOCKS = blocks()
COMMANDS_OF_A_SHELL = [block for block in BLOCKS if block.language == "sh"]


@pytest.mark.parametrize("block", COMMANDS_OF_A_SHELL, ids=lambda block: block.place)
def test_every_command_is_run_or_names_its_test_or_says_why_not(block: Block) -> None:
    """Those without a mark are run by tests/workflow/test_documentation.py."""
    assert block.mark in (None, "tested-by", "not-run")
    if block.mark == "tested-by":
        assert block.value
        file, _, test = block.value.partition("::")
        assert f"\ndef {test}(" in (ROOT / file).read_text(encoding="utf-8")


def test_blocks_are_of_languages_that_the_tests_know() -> None:
    assert {block.language for block in BLOCKS} <= {"sh", "yaml", "csv"}
    assert all(block.mark in (None, "file") for block in BLOCKS if block.language != "sh")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_and_key_that_is_named_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert set(re.findall(r"uv run ptbench ([a-z]+)", text)) <= COMMANDS.keys()
    assert set(re.findall(r"--config '?([a-z_]+)=", text)) <= Config.model_fields.keys()


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    """A link that leads nowhere is a warning, and --strict makes it an error."""
    answer = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path],
        cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    pages = list(tmp_path.glob("**/*.html"))
    assert len(pages) > 20
    for page in pages:  # fetches nothing
        text = page.read_text(encoding="utf-8")
        assert not re.search(r'<(?:script|img|iframe)[^>]*\bsrc="?(?:https?:)?//', text), page
        assert not re.search(r'<link[^>]*\bhref="?(?:https?:)?//', text), page
        assert not re.search(r"<p><code>\w+ \{", text), page  # a block whose mark is shown


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_from_outside_the_site_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text)
    assert links
    for path, anchor in links:
        target = ROOT / (path or page)
        assert target.exists(), path
        if anchor:
            assert anchor in anchors(target), f"{path}#{anchor}"


def anchors(page: Path) -> set[str]:
    """Return what headings of a page are called in links."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_message_that_is_explained_is_one_of_the_code() -> None:
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    explained = re.findall(r"^\| `([^`]+)`", page, re.MULTILINE)
    assert len(explained) > 40
    templates = list(messages())
    for message in explained:
        parts = [re.escape(part.strip()) for part in message.split("…") if part.strip()]
        pattern = re.compile(".*".join(parts), re.DOTALL)
        assert any(map(pattern.search, templates)), f"no message says: {message}"


def messages() -> Iterator[str]:
    """Yield every text of the code; what is filled in is an ellipsis, which may hold text too."""
    for file in (ROOT / "workflow/ptbench").glob("**/*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
            elif isinstance(node, ast.JoinedStr):
                yield "".join(
                    str(part.value) if isinstance(part, ast.Constant) else "…"
                    for part in node.values
                )


def test_the_version_is_one() -> None:
    version = ptbench.__version__
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert project["version"] == citation["version"] == version
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.findall(r"^## \[([^\]]+)\]", changes, re.MULTILINE)[0]
    # what has no number yet is on the way to the next version
    assert newest == ("Unreleased" if version.endswith(".dev0") else version)


def test_the_citation_has_what_its_format_asks_for() -> None:
    """Citation File Format 1.2.0, section "Required keys", and what names an author."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["message"]
    assert citation["title"]
    assert citation["authors"]
    assert all(author.keys() & {"name", "family-names"} for author in citation["authors"])


def test_the_readme_says_what_the_plan_of_the_full_study_says() -> None:
    plan = (ROOT / "docs" / "manual" / "plan.md").read_text(encoding="utf-8")
    [row] = [line.split(" | ") for line in plan.splitlines() if "all, each run once" in line]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"{row[1]} cells" in readme
    assert f"{row[2]} GPU-hours" in readme
