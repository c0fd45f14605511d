"""Check an archive, which may come from a stranger: nothing in it is executed or unpickled.

`unpack` writes plain files into an empty folder, and nowhere else. `check_manifest` compares their
checksums. `check_results` makes every table, verdict and page again from the runs' own files, with
the code that is installed here, and says what differs, and which runs are not those of the study.
"""

from __future__ import annotations

import contextlib
import csv
import json
import math
import re
import shutil
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from ptbench.analysis.collect import first_line
from ptbench.analysis.search import select
from ptbench.configuration.papers import answering
from ptbench.configuration.specification import VARIANT_PATTERN, parse_cell_path
from ptbench.configuration.study import Study, read_study
from ptbench.errors import PtbenchError, in_words
from ptbench.files import sha256
from ptbench.model.recipe import Recipe
from ptbench.report.site import RunFacts, Site
from ptbench.report.whole import write_everything
from ptbench.sharing.archive import MANIFEST, names_in, result_files, run_cells
from ptbench.sharing.crate import METADATA, WORKFLOW, metadata
from ptbench.training.provenance import PROJECT
from ptbench.training.records import read_history, read_metrics

GIB = 2**30
MOST_FILES = 200_000  # the full study of five documents has a tenth of it
PACKAGE = Path(__file__).parents[1]
COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
CODE = {".css", ".csv", ".j2", ".js", ".json", ".py", ".yaml"}
MADE = ("experiments/", "papers/", "report/", "searches/")  # of results, what is made from runs
# What reading and drawing raise where a stranger's files are not what ptbench writes.
NOT_OURS = (
    ValueError, LookupError, TypeError, AttributeError, ArithmeticError, AssertionError,
    RecursionError, csv.Error,
)  # fmt: skip
GIVEN = re.compile(r"searches/[^/]+/(generation-\d+|selection)\.json")  # but not these
SHOWN = 3  # differences of one file
MOST_SAID = 30  # of all

# Two computers may differ in the last digits of a sum, and so in the coordinates of a figure.
# Relative and absolute differences of fractional numbers that count as none:
NUMBER = re.compile(r"(-?\d+\.\d+(?:e[-+]?\d+)?|-?\d+e[-+]?\d+)")
OF_TABLES = (1e-9, 1e-12)
OF_PAGES = (1e-7, 2e-6)

# What a page says about when, where and by which version it was made; no tags may hide in it.
_MAKING = r"[^<\n]*(?:<span class=\"mono\">[0-9a-f]*</span>[^<\n]*)?"
SAID_OF_MAKING = re.compile(
    rf"Made by ptbench {_MAKING}|<dt>Report (?:made|from)</dt><dd>{_MAKING}</dd>|"
    r"<meta name=\"generator\" content=\"[^\"<>]*\">"
)
MADE_BY = "<made>"  # stands for each, so that both files must have it in the same places
KEYS = {"variant", "framework", "framework_a", "framework_b", "devices", "metric", "seed", "epoch"}


class Verified(NamedTuple):
    """An archive without a difference."""

    files: int
    runs: int
    compared: int  # files that were made again
    note: str | None  # how its code differs from the code here, and which files are of neither
    sha256: str


class ArchiveError(PtbenchError):
    """An archive that is refused."""


def verify(path: Path, most_bytes: int = GIB) -> Verified:
    """Check an archive.

    Args:
        path: of the archive.
        most_bytes: that it may hold, unpacked.

    Raises:
        ArchiveError: with a sentence for everything that is wrong, without the archive's name.
    """
    with tempfile.TemporaryDirectory(prefix="ptbench-verify-") as name:
        folder = Path(name).resolve() / "archive"
        unpack(path, folder, most_bytes)
        refuse(check_manifest(folder))
        files = len(names_in(folder))
        study = read_planned(folder)
        note = code_note(folder)
        problems, compared, unknown = check_results(folder, study)
        refuse([*problems, *([note] if problems and note else [])])
        runs = len(list(folder.glob("results/cells/*/*/*/*/metrics.json")))
        notes = [
            note,
            unknown and f"Neither of the study nor of the workflow here: {listed(unknown)}.",
        ]
        said = " ".join(each for each in notes if each) or None
        return Verified(files, runs, compared, said, sha256(path))


def listed(names: list[str]) -> str:
    """Return the first names of a list, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def refuse(problems: list[str]) -> None:
    """Raise ArchiveError if there are problems, with the first of them."""
    if len(problems) > MOST_SAID + 1:
        problems = [*problems[:MOST_SAID], f"and {len(problems) - MOST_SAID} more"]
    if problems:
        raise ArchiveError("\n".join(problems))


# Unpacking ----------------------------------------------------------------------------------------


def unpack(path: Path, folder: Path, most_bytes: int) -> None:
    """Write the files of an archive into a new folder, all of them or none.

    Raises:
        ArchiveError: if it is no zip file, or an entry could be written elsewhere, replace another
            one, is no plain file, or is too large.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            for problem in entry_problems(entries, most_bytes):
                raise ArchiveError(problem)
            if MANIFEST not in {entry.filename for entry in entries}:
                raise ArchiveError(
                    f"it has no {MANIFEST}, so it was not made by `uv run snakemake archive`"
                )
            for entry in entries:
                target = folder / entry.filename
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(entry) as source, target.open("xb") as file:
                    shutil.copyfileobj(source, file)  # at most its declared size
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError, UnicodeError) as error:
        raise ArchiveError(f"it is no whole zip file: {error}") from error


def entry_problems(entries: list[zipfile.ZipInfo], most_bytes: int) -> Iterator[str]:
    """Yield what is wrong with the entries of a zip file, before any is read."""
    if len(entries) > MOST_FILES:
        yield f"it has {len(entries)} files; an archive of a study has at most {MOST_FILES}"
    size = sum(entry.file_size for entry in entries)
    if size > most_bytes:
        yield (
            f"unpacked it has {size / GIB:.1f} GiB, and at most {most_bytes / GIB:g} are allowed; "
            "if you trust it, allow more with --most-gib"
        )
    seen: dict[str, str] = {}
    for entry in entries:
        name = entry.filename
        kind = stat.S_IFMT(entry.external_attr >> 16)
        if not is_inside(name) or entry.orig_filename != name:
            yield f"the path {name!r} leads out of its folder, or is not written plainly"
        elif kind not in (0, stat.S_IFREG):
            yield f"{name} is a link or a device; an archive has plain files alone"
        elif entry.flag_bits & 1 or entry.compress_type not in COMPRESSIONS:
            yield f"{name} is encrypted, or compressed by another method than deflate"
        elif other := seen.get(name.casefold()):
            yield f"{other} and {name} would be one file"
        seen[name.casefold()] = name
    for name in seen.values():
        for parent in PurePosixPath(name).parents:
            if other := seen.get(str(parent).casefold()):
                yield f"{other} is a file, and a folder of {name}"


def is_inside(name: str) -> bool:
    """Return whether a name is a plain relative path of a file, on every system."""
    parts = name.split("/")
    plain = name.isprintable() and not set(name) & set('\\:*?"<>|') and len(name) < 1000
    return plain and all(part.strip(" ") == part and part not in ("", ".", "..") for part in parts)


# Checksums ----------------------------------------------------------------------------------------


def check_manifest(folder: Path) -> list[str]:
    """Return a sentence for each file that is not as the manifest says."""
    listed: dict[str, str] = {}
    lines = (folder / MANIFEST).read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        match = re.fullmatch(r"([0-9a-f]{64})  (.+)", line)
        if match is None:
            return [f"{MANIFEST}, line {number}, is no SHA-256, two spaces and a path"]
        listed[match[2]] = match[1]
    there = {name for name in names_in(folder) if name != MANIFEST}
    problems = [f"{name} is missing: {MANIFEST} lists it" for name in sorted(listed.keys() - there)]
    problems += [
        f"{name} was added: {MANIFEST} does not list it" for name in sorted(there - listed.keys())
    ]
    for name in sorted(there & listed.keys()):
        if (found := sha256(folder / name)) != listed[name]:
            problems.append(
                f"{name} was changed: its SHA-256 is {found[:12]}…, not {listed[name][:12]}… as "
                f"{MANIFEST} says"
            )
    return problems


# Results ------------------------------------------------------------------------------------------


def read_planned(folder: Path) -> Study:
    """Return the study of an unpacked archive.

    Raises:
        ArchiveError: if it has none of this version, or names in it are no names.
    """
    try:
        study = read_study(folder / "results" / "study.json")
    except (PtbenchError, RecursionError) as error:
        raise ArchiveError(
            "results/study.json is missing, or no study that this version of ptbench can read"
        ) from error
    # They become paths.
    for cell in study.cells:
        with contextlib.suppress(ValueError):
            if parse_cell_path(cell.path) == cell:
                continue
        raise ArchiveError(f"results/study.json has {cell.path!r} where only a run can be")
    names = [*study.searches, *study.experiments, *(e.name for e in study.experiments.values())]
    for search in study.searches.values():
        contest = search.contest
        runs = [cell for cells in search.full.values() for cell in cells]
        paths = [search.name, contest.name, contest.run, *search.shown_trials, *runs]
        names += [part for path in [*paths, *contest.files] for part in path.split("/")]
    for name in names:
        if not re.fullmatch(VARIANT_PATTERN, name):
            raise ArchiveError(f"results/study.json has {name!r} where only a plain name can be")
    return study


def code_note(folder: Path) -> str | None:
    """Say which files of the package are others here than in an unpacked archive."""
    packages = PACKAGE.parent, folder / "workflow"
    names = {
        f"{part}/{name}"
        for package in packages
        for part in ("ptbench", "papers")  # what pages are made with
        for name in names_in(package / part)
        if Path(name).suffix in CODE
    }

    def content(path: Path) -> bytes | None:
        return path.read_bytes() if path.is_file() else None

    others = [name for name in sorted(names) if len({content(p / name) for p in packages}) > 1]
    return (
        "The workflow here is not the archive's, which may be why something differs: "
        f"{listed(others)}."
        if others
        else None
    )


def check_results(folder: Path, study: Study) -> tuple[list[str], int, list[str]]:
    """Make tables and pages again.

    Returns:
        What differs, how many files were compared, and which files nothing is known of.

    Works in the folder, so that whatever it reads is the archive's.

    Raises:
        ArchiveError: if they cannot be made.
    """
    results, given = folder / "results", folder.with_name("given")
    made = made_in(results)
    for name in made:
        (given / name).parent.mkdir(parents=True, exist_ok=True)
        (results / name).rename(given / name)
    try:
        with contextlib.chdir(folder):
            problems = make_again(study)
        again = made_in(results)
        for name in sorted(again - made):
            problems.append(f"results/{name} is missing: the runs make it")
        for name in sorted(made - again):
            problems.append(f"results/{name} is not made from the runs")
        for name in sorted(made & again, key=lambda name: (not name.endswith(".csv"), name)):
            problems += differences(f"results/{name}", given / name, results / name)
        unknown = unknown_files(folder, study)
        runs = {name for name in unknown if name.startswith("results/cells/")}
        problems += [f"{name} is of no run of the study" for name in sorted(runs)]
    except (*NOT_OURS, PtbenchError, OSError) as error:
        said = in_words(error) if isinstance(error, PtbenchError | OSError) else named(error)
        said = said.replace(f"{folder}/", "")
        raise ArchiveError(f"its tables cannot be made from its runs: {said}") from error
    return problems, len(made & again), unknown


def unknown_files(folder: Path, study: Study) -> list[str]:
    """Return the files that are neither the study's results nor the workflow's, as it is here.

    Raises:
        PtbenchError: if a result is missing.
    """
    known = {MANIFEST, METADATA, *dict(result_files(study, folder / "results"))}

    def of_workflow(name: str) -> bool:
        result = re.match("results/.+/", name)
        return name.startswith("configuration/") or (not result and (PROJECT / name).is_file())

    return [name for name in names_in(folder) if name not in known and not of_workflow(name)]


def named(error: Exception) -> str:
    """Return what an error says, which may be its kind alone, in one line."""
    return first_line(error) if str(error) else type(error).__name__


def made_in(results: Path) -> set[str]:
    """Return the files in a results folder that are made from its runs."""
    files = {name for name in names_in(results) if name.startswith(MADE)}
    return {name for name in files if not GIVEN.fullmatch(name)}


def make_again(study: Study) -> list[str]:
    """Make everything that is made of runs, in this folder; return what else is not right."""
    results, papers = Path("results"), Path("workflow/papers")
    documents = {file.parent.name: file.parent for file in sorted(papers.glob("*/paper.yaml"))}
    answered = {name: answering(at, study.experiments) for name, at in documents.items()}
    answered = {name: experiments for name, experiments in answered.items() if experiments}
    site = Site(results / "report", results, RunFacts(created="", version="", machine=""))
    write_everything(study, site, papers, answered, results)
    stated = Path(METADATA).read_text(encoding="utf-8")
    right = stated == metadata(Path(), study, crate_version(stated))
    problems = [] if right else [f"{METADATA} is not what the archive's files say"]
    problems += run_problems(study, results)
    for name, search in study.searches.items():
        file = results / "searches" / name / "selection.json"
        if json.loads(file.read_bytes()) != select(search.contest, results):
            problems.append(f"{file} is not what the trials say")
    return problems


def run_problems(study: Study, results: Path) -> Iterator[str]:
    """Yield what the files of runs say that the study, or another of their files, does not."""
    for path in run_cells(study, results):
        folder = results / "cells" / path
        if not (folder / "metrics.json").exists():
            continue
        metrics, planned = read_metrics(folder / "metrics.json"), study.fingerprint(path)
        if metrics.fingerprint != planned:
            yield (
                f"{folder}/metrics.json is of a run with the fingerprint {metrics.fingerprint}, "
                f"and the study plans {planned}"
            )
        head = {"variant": metrics.cell.variant, "fingerprint": planned}
        if stated_recipe(folder / "recipe.yaml") != (head, study.recipe(path)):
            yield f"{folder}/recipe.yaml is not the recipe of the study"
        lowest = min(
            (each.valid_nll for each in read_history(folder / "history.csv")), default=None
        )
        if metrics.status == "ok" and (metrics.valid is None or metrics.valid.nll != lowest):
            yield (
                f"{folder}/metrics.json has another validation score than the best epoch of "
                "history.csv"
            )


def stated_recipe(file: Path) -> tuple[dict[str, str], Recipe] | None:
    """Return what a recipe.yaml says: variant and fingerprint, and recipe; None if it cannot be."""
    lines = (line.partition(": ") for line in file.read_text(encoding="utf-8").splitlines())
    try:
        stated = {key: json.loads(value) for key, _, value in lines}
        head = {key: stated.pop(key) for key in ("variant", "fingerprint")}
        return head, Recipe.model_validate(stated)
    except (ValueError, KeyError):
        return None


def crate_version(stated: str) -> str:
    """Return the version of the workflow's files that the metadata state."""
    graph = json.loads(stated)["@graph"]
    found = (entity["version"] for entity in graph if entity["@id"] == WORKFLOW)
    return str(next(found, "not stated"))


def differences(name: str, given: Path, again: Path) -> list[str]:
    """Return a sentence for each of the first lines in which a file is not what the runs say."""
    texts = [
        SAID_OF_MAKING.sub(MADE_BY, path.read_text(encoding="utf-8")) for path in (given, again)
    ]
    lines, others = (text.splitlines() for text in texts)
    if len(lines) != len(others):
        return [f"{name} has {len(lines)} lines, and {len(others)} if made from the runs"]
    tolerance = OF_TABLES if given.suffix in (".csv", ".json") else OF_PAGES
    found = [
        (number, a, b)
        for number, (a, b) in enumerate(zip(lines, others, strict=True), start=1)
        if not same(a, b, tolerance)
    ]
    header = lines[0] if lines and given.suffix == ".csv" and lines[0] == others[0] else None
    said = [f"{name}, line {number}{words(a, b, header)}" for number, a, b in found[:SHOWN]]
    if len(found) > SHOWN:
        said.append(f"{name}: {len(found) - SHOWN} more lines differ")
    return said


def same(a: str, b: str, tolerance: tuple[float, float]) -> bool:
    """Return whether two texts are equal but for the last digits of fractional numbers."""
    if a == b:
        return True
    ours, theirs = NUMBER.split(a), NUMBER.split(b)
    relative, absolute = tolerance
    return len(ours) == len(theirs) and all(
        x == y
        or (index % 2 and math.isclose(float(x), float(y), rel_tol=relative, abs_tol=absolute))
        for index, (x, y) in enumerate(zip(ours, theirs, strict=True))
    )


def words(given: str, again: str, header: str | None) -> str:
    """Say in what two lines differ: in which columns of a table, or where in a text."""
    if header is not None:
        columns, ours, theirs = (next(csv.reader([line])) for line in (header, given, again))
        if len(columns) == len(ours) == len(theirs):
            row = [x for column, x in zip(columns, theirs, strict=True) if column in KEYS and x]
            cells = [
                f"{column} is {x or 'empty'}, and {y or 'empty'} if made from the runs"
                for column, x, y in zip(columns, ours, theirs, strict=True)
                if not same(x, y, OF_TABLES)
            ]
            return f" ({', '.join(row)}): {'; '.join(cells[:SHOWN])}"
    pairs = enumerate(zip(given, again, strict=False))
    start = next((index for index, (x, y) in pairs if x != y), min(len(given), len(again)))
    a, b = (line[max(start - 20, 0) :][:60].strip() for line in (given, again))
    return f": it has `{a}`, and `{b}` if made from the runs"
