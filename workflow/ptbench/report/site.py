"""The report as a folder of pages: what they share, and how one of them is written.

`Site.write` fills a template of `templates/` and writes the page. Pages need neither network nor
script; each holds its style and drawings, so it can be sent alone. `base.html.j2` is the frame of
all pages, `macros.html.j2` has what several of them show.
"""

from __future__ import annotations

import math
import os
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemBytecodeCache, PackageLoader, StrictUndefined
from pydantic import Field

from ptbench.analysis.metrics import METRICS, write_share
from ptbench.files import write_atomically
from ptbench.model.recipe import Model
from ptbench.report import formatting
from ptbench.report.palette import DARK_PAGE, LIGHT_PAGE


class RunFacts(Model):
    """What a page's foot says about the workflow that made it."""

    created: str = Field(description="Date and time, as it is to be printed.")
    version: str = Field(description="Version of ptbench.")
    commit: str | None = Field(None, description="Commit of the work tree.")
    dirty: bool = Field(False, description="Whether the work tree had uncommitted changes.")
    machine: str = Field(description="Where the page was made: processor, cores, memory, system.")


@dataclass(frozen=True)
class Site:
    """The folder of the report."""

    folder: Path  # of index.html
    results: Path  # holds cells/, which pages link to
    facts: RunFacts

    def write(self, template: str, path: str, **context: Any) -> Path:
        """Fill a template, write the page and return where it is.

        A template has `context` and, besides the filters, `facts`, `page` (its own path), `root`
        (the way from it to the folder of index.html: `{{ root }}methods.html`) and `to` (the
        address of any file: `{{ to(results / "study.json") }}`), `results` and `metrics`.

        Args:
            template: name of a file in `templates/`.
            path: of the page, relative to the folder.
            context: what the template shows.

        Raises:
            OSError: if the page cannot be written; nothing half-written is left.
        """
        page = self.folder / path

        def to(file: Path | str) -> str:
            return address(os.path.relpath(file, page.parent))

        text = environment().get_template(template).render(
            facts=self.facts,
            results=self.results,
            page=path,
            root="../" * path.count("/"),
            to=to,
            **context,
        )  # fmt: skip
        write_atomically(page, text)
        return page


def address(path: str) -> str:
    """Return a relative path as a link has it."""
    return quote(path, safe="/+=,.-_")


def bytecode_cache() -> FileSystemBytecodeCache | None:
    """Return where compiled templates are kept, if Python may keep its own bytecode there.

    Every experiment's page is written by a process of its own, and compiling takes it 0.15 s.
    """
    folder = Path(__file__).with_name("templates") / "__pycache__"
    if sys.dont_write_bytecode or not os.access(folder.parent, os.W_OK):
        return None
    folder.mkdir(exist_ok=True)
    return FileSystemBytecodeCache(str(folder))


@cache
def environment() -> Environment:
    """Return the templates with their filters, and the values that all of them see."""
    made = Environment(
        loader=PackageLoader("ptbench.report"),
        autoescape=lambda name: not (name or "").endswith(".md.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        bytecode_cache=bytecode_cache(),
    )
    made.filters.update(
        percent=formatting.format_percent,
        share=write_share,
        p=formatting.format_p,
        signed=formatting.format_signed,
        framework=formatting.framework_name,
        kind=formatting.kind_of_device,
        devices=formatting.format_devices,
        seeds=formatting.format_seeds,
        group_title=formatting.group_title,
        address=address,
        effect=lambda nats: None if nats is None else math.expm1(nats),
    )
    made.globals.update(metrics=METRICS, colours={"light": LIGHT_PAGE, "dark": DARK_PAGE})
    return made
