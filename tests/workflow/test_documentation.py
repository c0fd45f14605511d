"""The commands of README and documentation that are cheap, as a reader types them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.documents import Block, blocks
from tests.workflow.conftest import Project

# Pages with commands to run, and their blocks: files that the reader is to write, and commands.
PAGES: dict[str, list[Block]] = {}
for block in blocks():
    if block.mark == "file" or (block.language == "sh" and block.mark is None):
        PAGES.setdefault(block.page, []).append(block)


@pytest.mark.parametrize("page", PAGES)
def test_a_reader_can_do_what_a_page_says(project: Project, page: str) -> None:
    """`uv run` uses the environment that runs the tests."""
    environment = {
        **project.environment(), "UV_NO_SYNC": "1", "UV_PROJECT_ENVIRONMENT": sys.prefix,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip
    for block in PAGES[page]:
        if block.mark == "file":
            assert block.value
            file = project.folder / block.value
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.code, encoding="utf-8")
            continue
        answer = subprocess.run(
            ["bash", "-euc", block.code], cwd=project.folder, env=environment,
            capture_output=True, text=True,
        )  # fmt: skip
        assert answer.returncode == 0, f"{block.place}:\n{answer.stdout}{answer.stderr}"
