"""Make an archive of a finished study: one zip, which is a Workflow Run RO-Crate.

Its folders are those of the project, so that it can be unpacked and used as one: the workflow's
files, and under `results/` what the runs left and what was made of it. No corpus, no parameters,
no checkpoints and no environments are in it. `crate.py` writes its metadata.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ptbench
from ptbench.configuration.study import Study
from ptbench.errors import PtbenchError
from ptbench.files import replacing, sha256
from ptbench.sharing.crate import METADATA, metadata
from ptbench.training.provenance import PROJECT, git

MANIFEST = "manifest-sha256.txt"  # as sha256sum writes and reads it
RUN_FILES = ("metrics.json", "history.csv", "recipe.yaml", "provenance.json")
MADE = (".csv", ".html", ".json", ".md", ".svg", ".tex", ".yaml")  # of what is made of runs
OWN = (".csv", ".py", ".rst", ".smk", ".yaml")  # files under workflow/ that git does not know yet
WITHOUT_GIT = (
    "workflow", "envs", "profiles", "slurm", "Snakefile", "pyproject.toml", "README.md", "LICENSE",
    "CITATION.cff",
)  # fmt: skip
LONGEST_NAME = 80
MOST_NAMED = 3  # changed files

# An absolute path, also after `file:`, and no part of a web address, a tag or a fraction.
ABSOLUTE = re.compile(r"(?:(?<=file:)/*|(?<![\w.~:/<)\]}-]))((?:/[\w.+@%=,-]+)+)/([\w.+@%=,-]+)")


def write_archive(
    study: Study,
    configuration: Sequence[Path],
    results: Path,
    output: Path,
    check: Callable[[Path], object],
) -> Path:
    """Write the archive of a finished study and return where it is.

    The same results and files give the same bytes.

    Args:
        study: what was run.
        configuration: the files that it was configured by.
        results: the results folder.
        output: folder of the archive, which is named after the study.
        check: raises an error if the finished file is not to take its place.

    Raises:
        PtbenchError: if the study is not finished.
    """
    path = output / f"{name_of(study)}.crate.zip"
    with tempfile.TemporaryDirectory(prefix="ptbench-archive-") as name:
        folder = Path(name)
        copy_files(study, configuration, results, folder)
        (folder / METADATA).write_text(metadata(folder, study, version()), encoding="utf-8")
        (folder / MANIFEST).write_text(manifest(folder), encoding="utf-8")
        with replacing(path) as temporary:
            with zipfile.ZipFile(temporary, "w") as archive:
                for each in names_in(folder):
                    entry = zipfile.ZipInfo(each)  # of 1980, so that equal results are equal bytes
                    entry.external_attr = 0o100644 << 16
                    entry.compress_type = zipfile.ZIP_DEFLATED
                    with archive.open(entry, "w") as file, (folder / each).open("rb") as source:
                        shutil.copyfileobj(source, file)
            check(temporary)
    return path


def name_of(study: Study) -> str:
    """Return a study's name: what its configuration asks for."""
    asked = study.config.experiments or study.config.papers or ["demo"]
    name = "-".join(asked)
    return name if len(name) <= LONGEST_NAME else f"{asked[0]}-and-{len(asked) - 1}-more"


def names_in(folder: Path) -> list[str]:
    """Return the files in a folder by their paths relative to it, in order."""
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def manifest(folder: Path) -> str:
    """Return a line for each file in a folder: its SHA-256 and its path."""
    names = [name for name in names_in(folder) if name != MANIFEST]
    return "".join(f"{sha256(folder / name)}  {name}\n" for name in names)


def version() -> str:
    """Say of which commit the workflow's files are, and which of them are changed since."""
    commit = git("rev-parse", "HEAD")
    if commit is None:
        return f"ptbench {ptbench.__version__}, without git"
    changed = (git("diff", "--name-only", "HEAD") or "").splitlines()
    named = ", ".join(changed[:MOST_NAMED])
    if len(changed) > MOST_NAMED:
        named += f" and {len(changed) - MOST_NAMED} more"
    said = f"ptbench {ptbench.__version__}, commit {commit}"
    return f"{said}, with uncommitted changes in {named}" if changed else said


def copy_files(study: Study, configuration: Sequence[Path], results: Path, folder: Path) -> None:
    """Copy what an archive holds into a folder.

    Files that are a part of a corpus are left out, whatever they are called. In results and
    configuration, absolute paths are shortened to their last name: they are of this machine alone.

    Raises:
        PtbenchError: if the study is not finished.
    """
    withheld = corpus_checksums(results)
    texts = dict(result_files(study, results))
    texts |= {own_name(number, file): file for number, file in enumerate(configuration, start=1)}
    for name, path in (source_files() | texts).items():
        if sha256(path) in withheld:
            continue
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if name in texts:
            target.write_bytes(without_paths(path.read_bytes().decode()).encode())
        else:
            shutil.copyfile(path, target)


def corpus_checksums(results: Path) -> set[str]:
    """Return the checksums of every file of every corpus here, as fetched and as prepared."""
    found: set[str] = set()
    for file in results.glob("corpora/*/corpus.json"):
        facts: dict[str, Any] = json.loads(file.read_bytes())
        for key in ("sha256", "raw_sha256"):
            found |= set(facts.get(key, {}).values())
    return found


def result_files(study: Study, results: Path) -> Iterator[tuple[str, Path]]:
    """Yield the files of a study's runs, and of what was made of them, with their names.

    Raises:
        PtbenchError: if one is missing.
    """

    def each(*paths: Path) -> Iterator[tuple[str, Path]]:
        for path in paths:
            if not path.exists():
                raise PtbenchError(
                    f"{path} is missing: an archive is made of a finished study; "
                    "run the workflow first"
                )
            yield f"results/{path.relative_to(results).as_posix()}", path

    def made(*folders: Path) -> Iterator[tuple[str, Path]]:
        for folder in folders:
            yield from each(*(path for path in sorted(folder.rglob("*")) if path.suffix in MADE))

    for cell in run_cells(study, results):
        yield from each(*(results / "cells" / cell / name for name in RUN_FILES))
    profiles = [results / "profiles" / row / "profile.json" for row in study.profiles()]
    yield from each(*(path for path in profiles if path.exists()))
    corpora = {study.corpus_of_cell(cell.path) for cell in study.cells}
    yield from each(*(results / "corpora" / corpus / "corpus.json" for corpus in corpora))
    yield from each(results / "study.json", results / "report" / "index.html")
    report = results / "report"
    yield from each(*(path for path in sorted(report.glob("*")) if path.suffix in MADE))
    for kind, names in {
        "experiments": study.experiments,
        "papers": study.papers,
        "searches": study.searches,
    }.items():
        yield from each(*(report / kind / f"{name}.html" for name in names))
        yield from made(*(results / kind / name for name in names))


def run_cells(study: Study, results: Path) -> list[str]:
    """Return every run of a study that can run here, and what else has a result.

    That are trials, which may fail, and runs that were made elsewhere.
    """
    wanted = {cell.path for cell in study.runnable(study.cells)} - study.trials
    others = {cell.path for cell in study.cells} - wanted
    ended = (cell for cell in others if (results / "cells" / cell / "metrics.json").exists())
    return sorted({*wanted, *ended})


def source_files() -> dict[str, Path]:
    """Return the workflow's own files as they stand: those that git knows, or all it consists of.

    Published results are left out. Files under `workflow/` that are new to git are the user's own
    experiments and documents.
    """
    known = git("ls-files", "-z", "--cached")
    if known is None:
        names = [
            path.relative_to(PROJECT).as_posix()
            for top in WITHOUT_GIT
            for path in [PROJECT / top, *(PROJECT / top).rglob("*")]
            if "__pycache__" not in path.parts
        ]
    else:
        new = git("ls-files", "-z", "--others", "--exclude-standard", "workflow") or ""
        names = [name for name in known.split("\0") if not name.startswith("results/published/")]
        names += [name for name in new.split("\0") if name.endswith(OWN)]
    files = {name: PROJECT / name for name in names if name}
    return {n: path for n, path in files.items() if path.is_file() and not path.is_symlink()}


def own_name(number: int, file: Path) -> str:
    """Return where a configuration file is in the archive: the later ones win over earlier ones."""
    path = file.resolve()
    if path.is_relative_to(PROJECT):
        return path.relative_to(PROJECT).as_posix()
    return f"configuration/{number}/{path.name}"


def without_paths(text: str) -> str:
    """Return a text with the absolute paths in it shortened: those in the project to relative ones.

    `/home/me/own/text.yaml` becomes `elsewhere/text.yaml`.
    """
    return ABSOLUTE.sub(r"elsewhere/\2", text.replace(f"{PROJECT}/", ""))
