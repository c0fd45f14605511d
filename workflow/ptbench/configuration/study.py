"""A study: the configuration, resolved to experiments and cells before anything runs.

The Snakefile asks a `Study` for everything it needs; each Slurm job parses it again, so nothing
here imports NumPy.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import re
import shlex
import sys
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from ptbench.backends import FRAMEWORKS, Framework, lack
from ptbench.configuration.config import Config, Place, load_corpora
from ptbench.configuration.errors import known, parse, sentence
from ptbench.configuration.experiments import (
    WORKFLOW,
    Compared,
    Experiment,
    Library,
    Search,
    Value,
    expand,
    load_library,
    published_files,
)
from ptbench.configuration.obstacles import Obstacle, Obstacles, cannot_run, obstacle
from ptbench.configuration.papers import answering, paper_files, paper_folders
from ptbench.configuration.requests import Request, Used, request, used_by
from ptbench.configuration.search import (
    FIXED,
    Contest,
    Published,
    Question,
    Shown,
    Space,
    check_space,
    draw_points,
    found_specification,
)
from ptbench.configuration.specification import (
    LONGEST_NAME,
    Cell,
    Specification,
    code_digest,
    format_override,
    parse_cell_path,
    variant_name,
)
from ptbench.corpus.definitions import TRANSPORT, CorpusDefinition, content_of
from ptbench.errors import ConfigurationError
from ptbench.files import write_atomically
from ptbench.model import work
from ptbench.model.recipe import Accelerator, Recipe
from ptbench.model.work import CorpusSize

LONGEST_ARGUMENT = 128_000  # bytes; Linux takes 128 KiB, with the rest of the command
MANY = range(1, sys.maxsize)
# Keys that have an effect only where another key has one of these values. Recipes may have them all
# the same, for the variants that set the other key.
NEEDS: dict[str, tuple[str, Container[Any]]] = {
    "adam_beta1": ("optimizer", ["adam"]),
    "adam_beta2": ("optimizer", ["adam"]),
    "rmsprop_decay": ("optimizer", ["rmsprop"]),
    "optimizer_epsilon": ("optimizer", ["adam", "rmsprop"]),
    "averaging_interval": ("optimizer", ["asgd"]),
    "constant_epochs": ("schedule", ["constant_then_decay", "roll_back_then_decay"]),
    "plateau_patience": ("schedule", ["plateau"]),
    "plateau_threshold": ("schedule", ["plateau"]),
    "warm_up_epochs": ("schedule", ["warm_up_then_decay"]),
    "latent_size": ("mixtures", MANY),
    "latent_dropout": ("mixtures", MANY),
    "fine_tuning_learning_rate": ("fine_tuning_epochs", MANY),
}


def cell_of(variant: str, framework: Framework, devices: int, seed: int) -> Cell:
    """Return a run of what has been validated, without the time of doing so again."""
    return Cell.model_construct(variant=variant, framework=framework, devices=devices, seed=seed)


@dataclass(frozen=True)
class PlannedExperiment:
    """An experiment with its names resolved."""

    name: str
    definition: Experiment
    specifications: tuple[Specification, ...]  # each variant once
    frameworks: list[Framework]
    devices: list[int]
    seeds: list[int]
    baseline: str  # the variant that the others are compared with
    # Variants whose recipes a search finds while it runs, and the files that say them. Their
    # specifications here are stand-ins: points drawn at random, for estimates of time and memory.
    found: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def cells(self) -> tuple[Cell, ...]:
        """The experiment's cells, in the order of the report."""
        variants = [specification.variant for specification in self.specifications]
        return tuple(
            cell_of(*run)
            for run in itertools.product(variants, self.frameworks, self.devices, self.seeds)
        )

    def plan(self, config: Config, cannot_run: Obstacles) -> str:
        """Return what the analysis has to know, as JSON (`ptbench.analysis.plan` reads it)."""
        # What a search finds is no parameter of the analysis: its page says it.
        recipes = [] if self.found else [each.recipe for each in self.specifications]
        obstructed = [each for each in self.frameworks if each in cannot_run]
        varied = [key for key in Recipe.model_fields if len({getattr(r, key) for r in recipes}) > 1]
        content = {
            "name": self.name,
            "title": self.definition.title,
            "description": self.definition.description,
            "metric": self.definition.metric,
            "baseline": self.baseline,
            "equivalence_margin": config.equivalence_margin,
            "accelerators": {each: config.accelerator_of(each) for each in self.frameworks},
            "rents": {
                each: config.prices.of(config.accelerator_of(each))[0] for each in self.frameworks
            },
            "currency": config.prices.currency,
            "cannot_run": {each: cannot_run[each] for each in obstructed},
            "fingerprints": {
                each.variant: {
                    framework: each.on(config.accelerator_of(framework)).fingerprint
                    for framework in obstructed
                }
                for each in self.specifications
                if obstructed and each.variant not in self.found
            },
            "found": dict(self.found) if obstructed else {},
            "corpus_folder": self.specifications[0].recipe.corpus_folder,
            "variants": {
                each.variant: {
                    "implementation": each.recipe.implementation,
                    # Without dropout, runs of one seed differ by framework alone.
                    "paired": not each.recipe.drops,
                    "settings": {key: getattr(each.recipe, key) for key in varied},
                }
                for each in self.specifications
            },
            "frameworks": self.frameworks,
            "devices": self.devices,
            "seeds": self.seeds,
        }
        return json.dumps(content, separators=(",", ":"))


@dataclass(frozen=True)
class PlannedSearch:
    """A search with its names resolved."""

    name: str  # with what the configuration changes in every run
    base: str  # without it
    definition: Search
    space: Space
    trials: tuple[str, ...]  # their variants
    winners: tuple[str, ...]  # variants that are trained in full
    published: Published | None
    framework: Framework  # of the trials
    devices: int
    seed: int
    full: Mapping[str, Sequence[str]]  # cells of the full runs, by variant

    @property
    def learns(self) -> bool:
        """Return whether trials depend on the results of earlier ones."""
        return self.definition.method != "random"

    @property
    def selection(self) -> str:
        """Return the file that says which trials go on in full."""
        return f"results/searches/{self.name}/selection.json"

    def cell(self, variant: str) -> str:
        """Return the path of a trial's cell."""
        return cell_of(variant, self.framework, self.devices, self.seed).path

    def generation(self, number: int) -> str:
        """Return the file that says the trials of a generation, counted from 1."""
        return f"results/searches/{self.name}/generation-{number}.json"

    @cached_property
    def generations(self) -> list[tuple[str, ...]]:
        """The trials of each generation, if the search learns."""
        size = self.definition.generation
        starts = range(0, len(self.trials), size) if self.learns else ()
        return [self.trials[start : start + size] for start in starts]

    @cached_property
    def files(self) -> dict[str, str]:
        """The file that says each variant's recipe, of those that are not known when planned."""
        found = {
            trial: self.generation(number)
            for number, trials in enumerate(self.generations, start=1)
            for trial in trials
        }
        return found | dict.fromkeys(self.winners, self.selection)

    @property
    def own_trials(self) -> list[str]:
        """Return the cells of all trials."""
        return [self.cell(trial) for trial in self.trials]

    @property
    def shown_trials(self) -> list[str]:
        """Return the cells of all trials, that of what others found among them."""
        published = [self.cell(self.published.trial.variant)] if self.published else []
        return [*published, *self.own_trials]

    def question(self, number: int) -> Question:
        """Return what is asked for the trials of a generation."""
        earlier = [trial for trials in self.generations[: number - 1] for trial in trials]
        return Question(
            space=self.space,
            method=self.definition.method,
            seed=self.definition.seed,
            generation=number,
            variants=list(self.generations[number - 1]),
            told={trial: self.cell(trial) for trial in earlier},
            files=[self.generation(each) for each in range(1, number)],
        )

    @cached_property
    def contest(self) -> Contest:
        """What the selection is made from."""
        return Contest(
            name=self.name,
            method=self.definition.method,
            space=self.space,
            seed=self.definition.seed,
            trials=list(self.trials),
            run=self.cell("").removeprefix("/"),
            files=[self.generation(number) for number, _ in enumerate(self.generations, start=1)],
            winners=list(self.winners),
        )

    @cached_property
    def answers(self) -> dict[str, tuple[str, Any]]:
        """What each file that the search writes has to answer, and under which key it says it."""
        asked: dict[str, tuple[str, Question | Contest]] = {
            self.generation(number): ("question", self.question(number))
            for number, _ in enumerate(self.generations, start=1)
        }
        asked[self.selection] = "contest", self.contest
        return {file: (key, each.model_dump(mode="json")) for file, (key, each) in asked.items()}


@dataclass(frozen=True)
class Study:
    """Everything that a configuration asks for."""

    config: Config
    corpora: Mapping[str, CorpusDefinition]
    recipes: Mapping[str, Recipe]
    experiments: Mapping[str, PlannedExperiment]
    code: str  # of the package that trains: `code_digest`
    searches: Mapping[str, PlannedSearch] = field(default_factory=dict)
    cannot_run: Mapping[Framework, Obstacle] = field(default_factory=dict)  # here, and why

    @cached_property
    def cells(self) -> tuple[Cell, ...]:
        """Every cell once, though experiments may share it."""
        return tuple(dict.fromkeys(c for e in self.experiments.values() for c in e.cells))

    def runnable(self, cells: Iterable[Cell]) -> list[Cell]:
        """Return the cells that can run here."""
        return [cell for cell in cells if not self.obstacle(cell)]

    def obstacle(self, cell: Cell) -> str | None:
        """Return why a cell cannot run here; None if it can."""
        return obstacle(self.cannot_run, cell)

    @property
    def obstacles(self) -> list[str]:
        """Say how many cells cannot run here, and why."""
        counts = Counter(map(self.obstacle, self.cells))
        return [
            f"{counts[why]:,} of {len(self.cells):,} runs cannot run here: {why}"
            for _, why in self.cannot_run.values()
            if counts[why]
        ]

    @cached_property
    def _planned(self) -> frozenset[str]:
        return frozenset(cell.path for cell in self.cells)

    @cached_property
    def trials(self) -> frozenset[str]:
        """The cells of all trials, those of what others found among them."""
        return frozenset(c for search in self.searches.values() for c in search.shown_trials)

    @property
    def names_of_trials(self) -> dict[str, str]:
        """Return what people call each trial of a search, by its cell."""
        return {
            cell: f"{search.name} trial {number}"
            for search in self.searches.values()
            for number, cell in enumerate(search.own_trials, start=1)
        }

    @cached_property
    def _specifications(self) -> dict[str, Specification]:
        return {s.variant: s for e in self.experiments.values() for s in e.specifications}

    @cached_property
    def _files(self) -> dict[str, str]:
        return {k: file for each in self.searches.values() for k, file in each.files.items()}

    @cached_property
    def _answers(self) -> dict[str, tuple[str, Any]]:
        return {k: asked for each in self.searches.values() for k, asked in each.answers.items()}

    def specification(self, variant: str) -> Specification:
        """Return the specification of a variant of any recipe, also of one in no experiment.

        Of a variant that a search has not found yet it is a stand-in. What a framework is told has
        its own kind of device: see `on`.

        Raises:
            ConfigurationError: if there is no such recipe, or the name is not the variant's own.
        """
        if variant in self._files:
            with contextlib.suppress(FileNotFoundError):
                return self._found(variant)
        if variant not in self._specifications:
            [(base, overrides)] = expand(variant, "variant")
            found = resolve(base, overrides, self.recipes, self.corpora, self.config, "variant")
            if found.variant != variant:
                raise ConfigurationError(f"variant: {variant} is written {found.variant}")
            self._specifications[variant] = found
        return self._specifications[variant]

    def on(self, specification: Specification, framework: Framework) -> Specification:
        """Return a specification as a framework is told it, with its kind of device."""
        return specification.on(self.config.accelerator_of(framework))

    @cached_property
    def _texts(self) -> dict[tuple[str, Accelerator], tuple[str, str]]:
        return {}

    def text(self, variant: str, framework: Framework) -> str:
        """Return the text of a variant's specification, as a framework is told it.

        Raises:
            FileNotFoundError: if a search has yet to find it; Snakemake then asks again later.
        """
        return self._text_and_fingerprint(variant, framework)[0]

    def _text_and_fingerprint(self, variant: str, framework: Framework) -> tuple[str, str]:
        """Return both, made once, because many cells have the same."""
        if variant in self._files:
            found = self.on(self._found(variant), framework)
            return found.text(), found.fingerprint
        key = variant, self.config.accelerator_of(framework)
        if key not in self._texts:
            specification = self.on(self.specification(variant), framework)
            self._texts[key] = specification.text(), specification.fingerprint
        return self._texts[key]

    def _found(self, variant: str) -> Specification:
        """Return what a search found for a variant.

        Raises:
            FileNotFoundError: if it has not, or was another search when it did.
        """
        file = self._files[variant]
        if Path(file).exists() and not self.is_answered(file):
            raise FileNotFoundError(errno.ENOENT, "answers another question", file)
        return found_specification(file, variant)

    def fingerprint(self, path: str) -> str | None:
        """Return the fingerprint of a cell's specification; None if a search has yet to find it."""
        with contextlib.suppress(FileNotFoundError):
            return self._text_and_fingerprint(*path.split("/")[:2])[1]
        return None

    def recipe(self, path: str) -> Recipe:
        """Return the recipe of a cell."""
        return self.specification(path.partition("/")[0]).recipe

    def corpus_of_cell(self, path: str) -> str:
        """Return the corpus folder of a cell of any recipe, also of one in no experiment.

        Raises:
            ConfigurationError: if there can be no such cell.
        """
        where = f"results/cells/{path}"
        if path in self._planned:
            return self.recipe(path).corpus_folder
        try:
            variant, framework, *_ = path.split("/")
            known(framework, FRAMEWORKS, "framework", "framework")
            specification = self.specification(variant)
            cell = parse_cell_path(path)
        except ValidationError as error:
            raise ConfigurationError(
                "\n".join(f"{where}: {sentence(each, Cell)}" for each in error.errors())
            ) from error
        except (ConfigurationError, ValueError) as error:
            raise ConfigurationError(f"{where}: {error}") from error
        if cell.path != path:
            raise ConfigurationError(f"{where}: is written results/cells/{cell.path}")
        check_devices(specification, cell.devices, f"{where}: devices", self.config)
        check_framework(specification, cell.framework, f"{where}: framework")
        return specification.recipe.corpus_folder

    def result(self, path: str, file: str) -> Literal["counts", "other", "none"]:
        """Return what a cell has in a file: a result of its specification, another, or none."""
        try:
            found = json.loads(Path(file).read_bytes())
            own = found["fingerprint"] == self._text_and_fingerprint(*path.split("/")[:2])[1]
        except FileNotFoundError:
            return "none"
        except (OSError, ValueError, KeyError, TypeError):
            return "other"
        return "counts" if own else "other"

    def experiment(self, name: str) -> PlannedExperiment:
        """Return an experiment of the study.

        Raises:
            ConfigurationError: if the study has no such experiment.
        """
        if name not in self.experiments:
            having = ", ".join(sorted(self.experiments))
            raise ConfigurationError(f'the study has no experiment "{name}"; it has {having}')
        return self.experiments[name]

    def plan(self, name: str) -> str:
        """Return what the analysis of an experiment has to know, as JSON."""
        return self.experiment(name).plan(self.config, self.cannot_run)

    def search(self, name: str) -> PlannedSearch:
        """Return a search of the study, by the name that its files have.

        Raises:
            ConfigurationError: if the study has no such search.
        """
        return self.searches[known(name, self.searches, "results/searches", "search")]

    def question(self, name: str, number: int) -> str:
        """Return what is asked for a generation's trials, as JSON.

        Raises:
            ConfigurationError: if there is no such generation.
        """
        search = self.search(name)
        if not 1 <= number <= len(search.generations):
            raise ConfigurationError(
                f"results/searches/{name}: there are {len(search.generations)} generations, "
                f"not generation {number}"
            )
        return search.question(number).model_dump_json()

    def is_answered(self, file: str) -> bool:
        """Return whether a file that a search writes is there and answers what is asked now."""
        key, asked = self._answers[file]
        try:
            return bool(json.loads(Path(file).read_bytes())[key] == asked)
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def shown(self, name: str) -> Shown:
        """Return a search as its page shows it: without full runs that are not possible here."""
        search = self.search(name)
        runs = [cell.partition("/")[2] for cell in search.full[search.winners[0]]]
        why = [self.obstacle(parse_cell_path(f"{search.winners[0]}/{run}")) for run in runs]
        return Shown(
            **dict(search.contest),
            title=search.definition.title,
            description=search.definition.description,
            base=search.definition.recipe,
            set=search.definition.set,
            published=search.published,
            runs=[run for run, reason in zip(runs, why, strict=True) if not reason],
            accelerators={f: self.config.accelerator_of(f) for f in self.config.frameworks},
            left_out=list(dict.fromkeys(filter(None, why))),
        )

    def found_in(self, variant: str) -> str | None:
        """Return the file that says what a variant is, if a search finds it."""
        return self._files.get(variant)

    def corpus(self, corpus_folder: str) -> tuple[str, CorpusDefinition, int | None]:
        """Return name, definition and subset of what results/corpora/{corpus_folder} is.

        Raises:
            ConfigurationError: if there is no such corpus.
        """
        match = re.fullmatch(r"(.+)-first-(\d+)-lines", corpus_folder)
        subset = None if match is None or corpus_folder in self.corpora else int(match[2])
        name = corpus_folder if subset is None or match is None else match[1]
        return known(name, self.corpora, "corpus", "corpus"), self.corpora[name], subset

    def corpus_content(self, corpus_folder: str) -> str:
        """Return name, content and subset of a prepared corpus, as JSON."""
        name, definition, subset = self.corpus(corpus_folder)
        content = {"name": name, "content": content_of(name, definition), "subset": subset}
        return json.dumps(content, sort_keys=True)

    @cached_property
    def fetching(self) -> str:
        """Where and how each corpus is fetched, as JSON: what its content does not say."""
        corpora = self.corpora.items()
        return json.dumps({n: d.model_dump(mode="json", include=TRANSPORT) for n, d in corpora})

    def profiles(self, experiment: str | None = None) -> list[str]:
        """Return the rows to profile, of an experiment or of all; each a folder of profiles."""
        cells = self.cells if experiment is None else self.experiment(experiment).cells
        rows = (cell.path.rpartition("/")[0] for cell in self.runnable(cells))
        return list(dict.fromkeys(rows))

    @cached_property
    def published_files(self) -> list[str]:
        """The published numbers that results are set beside, relative to the project."""
        return [str(file.relative_to(WORKFLOW.parent)) for file in published_files()]

    @cached_property
    def papers(self) -> dict[str, list[str]]:
        """The experiments that answer a document, by document; those with none are left out."""
        found = {name: answering(at, self.experiments) for name, at in paper_folders().items()}
        return {name: experiments for name, experiments in found.items() if experiments}

    def answered(self) -> list[str]:
        """Return the documents that an experiment of the study answers."""
        return list(self.papers)

    def answering(self, paper: str) -> list[str]:
        """Return the experiments that answer a document.

        Raises:
            ConfigurationError: if no experiment of the study does, or there is no such document.
        """
        known(paper, paper_folders(), "results/papers", "document")
        if paper not in self.papers:
            raise ConfigurationError(
                f"no experiment of the study plans a row that {paper} names; "
                f"run its own with `--config papers=[{paper}]`"
            )
        return self.papers[paper]

    def paper_files(self, paper: str) -> list[str]:
        """Return the files that a document's answers are made of, relative to the project."""
        return [str(file.relative_to(WORKFLOW.parent)) for file in paper_files(paper)]

    @cached_property
    def _requests(self) -> dict[str, Request | None]:
        return {}

    def _measured(self, path: str, size: CorpusSize) -> Request | None:
        """Return what a cell needs by finished runs of its row; None if there are none."""
        row = path.rpartition("/")[0]
        if row not in self._requests:
            self._requests[row] = request(
                self.recipe(path),
                size,
                self.used_by(row),
                self.smoke_used_by(row),
            )
        return self._requests[row]

    def used_by(self, row: str, results: Path = Path("results")) -> list[Used]:
        """Return what the finished runs of a row used, those of its present recipe."""
        folder = results / "cells" / row
        if folder.exists():
            with contextlib.suppress(ConfigurationError):  # the study can have no such row
                if fingerprint := self.fingerprint(f"{row}/seed-0"):
                    return list(used_by(folder, fingerprint))
        return []

    def smoke_used_by(self, row: str, results: Path = Path("results")) -> list[Used]:
        """Return what the same row used in the budget `smoke`, which tells of whole runs alone."""
        return self.used_by(smoke_row(row), results) if self.recipe(row).budget == "full" else []

    def memory_megabytes(self, path: str, corpus_json: str, times: int = 1) -> int:
        """Return the main memory that a cell's job asks for [MB].

        Args:
            path: of the cell.
            corpus_json: describes its corpus.
            times: 1; more for a cell that has run out of what was asked for.
        """
        cell, size = parse_cell_path(path), work.corpus_size(corpus_json)
        asked = self.memory_bound(cell, size, times)
        if measured := self._measured(path, size):
            asked = max(times * measured.megabytes, asked if times > 1 else 0)
        return min(asked, self.config.max_memory or asked)

    def memory_bound(self, cell: Cell, size: CorpusSize, times: int = 1) -> int:
        """Return the main memory that a cell takes on each of its nodes, at most [MB]."""
        libraries = FRAMEWORKS[cell.framework].memory_megabytes
        accelerator = self.config.accelerator_of(cell.framework)
        here = min(self.config.devices_per_node or cell.devices, cell.devices)
        recipe = self.recipe(cell.path)
        return work.memory_megabytes(
            recipe, accelerator, libraries, cell.devices, size, times, here
        )

    def runtime_minutes(self, path: str, corpus_json: str, times: int = 1) -> int:
        """Return the time limit that a cell's job asks for [minutes], as `memory_megabytes`."""
        cell, size = parse_cell_path(path), work.corpus_size(corpus_json)
        accelerator = self.config.accelerator_of(cell.framework)
        asked = work.runtime_minutes(self.recipe(path), accelerator, cell.devices, size, times)
        if measured := self._measured(path, size):
            asked = max(times * measured.minutes, asked if times > 1 else 0)
        return min(asked, self.config.max_runtime or asked)

    @cached_property
    def configuration(self) -> str:
        """The merged configuration as JSON; `load_study` makes the same study of it."""
        return self.config.model_dump_json(exclude_defaults=True)

    def write(self, path: Path, replaced: Sequence[str], command: str) -> None:
        """Write the study down, for the jobs of a run and for those who follow it.

        Args:
            path: of the file.
            replaced: cells whose result is there, and is made anew where it does not count.
            command: what runs it, without targets.
        """
        content = {
            "cells": [cell.path for cell in self.cells],
            "command": command,
            "replaced": list(replaced),
            "study": _adapter().dump_python(self, mode="json"),
        }
        write_atomically(path, json.dumps(content) + "\n")


def smoke_row(row: str) -> str:
    """Return the row that is the same as another in the budget `smoke`."""
    variant, _, rest = row.partition("/")
    base, *overrides = variant.split("+")
    kept = [each for each in overrides if not each.startswith("budget=")]
    return f"{'+'.join([base, *sorted([*kept, 'budget=smoke'])])}/{rest}"


@cache
def _adapter() -> TypeAdapter[Study]:
    return TypeAdapter(Study)


def read_study(path: Path) -> Study:
    """Return the study that `Study.write` wrote, whatever has been edited since.

    Raises:
        ConfigurationError: if the file cannot be read or is something else.
    """
    try:
        return _adapter().validate_python(json.loads(path.read_bytes())["study"])
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(
            f"{path}: is not a study of this version; run the workflow to write it anew"
        ) from error


def load_study(
    config: Mapping[str, Any], source: str = "config.yaml", on_cluster: bool = True
) -> Study:
    """Validate a merged configuration and resolve all that it names.

    Args:
        config: see `read_configuration`.
        source: what errors call it where `config` does not know the place.
        on_cluster: whether there may be several nodes.

    Raises:
        ConfigurationError: for anything that cannot be run.
    """
    settings = parse(Config, config, source)
    if not on_cluster:
        settings = settings.model_copy(update={"devices_per_node": None})

    def place(key: str) -> str:
        return f"{getattr(config, 'places', {}).get(key, source)}: {key}"

    library = load_library()
    corpora = load_corpora(settings, place)
    if settings.corpus is not None:
        known(settings.corpus, corpora, place("corpus"), "corpus")
    planned: dict[str, PlannedExperiment] = {}
    searches: dict[str, PlannedSearch] = {}
    for name in chosen(settings, library, place):
        if name in library.searches:
            search, experiments = plan_search(name, library, corpora, settings, place)
            searches[search.name] = search
            planned |= {each.name: each for each in experiments}
        else:
            planned[name] = plan_experiment(name, library, corpora, settings, place)
    obstacles = cannot_run(settings, on_cluster)
    study = Study(settings, corpora, library.recipes, planned, code_digest(), searches, obstacles)
    for search in searches.values():
        check_search(study, search, f"{library.places['experiment', search.base]}: search")
    return study


def check_search(study: Study, search: PlannedSearch, where: str) -> None:
    """Raise ConfigurationError if a search's trials cannot run here, or a command is too long."""
    if why := study.obstacle(parse_cell_path(search.own_trials[0])):
        raise ConfigurationError(
            f"{where} {search.base}: its trials run in {search.framework}, the first of its "
            f"frameworks, and cannot run here: {why}; put another framework or fewer devices first"
        )
    texts = [study.shown(search.name).model_dump_json()]
    texts += [study.plan(name) for name in (search.base, f"{search.base}-winners")]
    longest = max(len(shlex.quote(text).encode()) for text in texts)
    if longest > LONGEST_ARGUMENT:
        raise ConfigurationError(
            f"{where} {search.base}: trials: a command that names them all would have "
            f"{longest:,} bytes, and Linux allows about {LONGEST_ARGUMENT:,}; run fewer trials, "
            "or search fewer keys"
        )


def chosen(settings: Config, library: Library, place: Place) -> list[str]:
    """Return the names of the experiments and searches that a configuration asks for, each once.

    Raises:
        ConfigurationError: if there is no such experiment or document.
    """
    names = settings.experiments or (["demo"] if settings.papers is None else [])
    if names == ["all"]:
        names = list(library.experiments)
    for name in names:
        there = [*library.experiments, *library.searches]
        known(name, there, place("experiments"), "experiment")
    for paper in settings.papers or ():
        known(paper, library.papers, place("papers"), "paper")
        names = names + library.papers[paper]
    return list(dict.fromkeys(names))


def plan_experiment(
    name: str,
    library: Library,
    corpora: Mapping[str, CorpusDefinition],
    settings: Config,
    place: Place,
) -> PlannedExperiment:
    """Return an experiment as the configuration wants it run.

    Raises:
        ConfigurationError: if a variant, a framework or a number of devices cannot be.
    """
    experiment, where = library.experiments[name], library.places["experiment", name]
    where = f"{where}: experiment {name}"
    variants: dict[str, Specification] = {}
    for index, variant in enumerate(experiment.variants):
        for base, overrides in expand(variant, f"{where}: variants[{index}]"):
            found = resolve(
                base, overrides, library.recipes, corpora, settings, f"{where}: variants"
            )
            check_overrides(found, overrides, library.recipes[base], f"{where}: variants")
            variants[found.variant] = found
    if len(trained_on := {each.recipe.corpus_folder for each in variants.values()}) > 1:
        raise ConfigurationError(
            f"{where}: variants: perplexities on {' and '.join(sorted(trained_on))} "
            "cannot be compared; make an experiment of each corpus"
        )
    frameworks, devices, seeds = axes(name, experiment, settings, place)
    asked = f"{where}: devices" if settings.devices is None else place("devices")
    for specification in variants.values():
        for count in devices:
            check_devices(specification, count, asked, settings)
        for framework in frameworks:
            check_framework(specification, framework, f"{where}: frameworks")
    baseline = next(iter(variants))
    if experiment.baseline is not None:
        [(base, overrides)] = expand(experiment.baseline, f"{where}: baseline")
        baseline = resolve(
            base, overrides, library.recipes, corpora, settings, f"{where}: baseline"
        ).variant
        known(baseline, variants, f"{where}: baseline", "variant")
    return PlannedExperiment(
        name, experiment, tuple(variants.values()), frameworks, devices, seeds, baseline
    )


def axes(
    name: str, asked: Experiment | Search, settings: Config, place: Place
) -> tuple[list[Framework], list[int], list[int]]:
    """Return the frameworks, numbers of devices and seeds that the configuration wants run.

    Raises:
        ConfigurationError: if no framework is left.
    """
    frameworks = [f for f in asked.frameworks if f in settings.frameworks]
    if not frameworks:
        raise ConfigurationError(
            f"{place('frameworks')}: experiment {name} runs in {', '.join(asked.frameworks)}, "
            f"none of which is among {', '.join(settings.frameworks)}"
        )
    repeated = list(range(1, settings.repeats + 1)) if settings.repeats else None
    seeds = settings.seeds or repeated or asked.seeds
    return frameworks, settings.devices or asked.devices, seeds


def plan_search(
    name: str,
    library: Library,
    corpora: Mapping[str, CorpusDefinition],
    settings: Config,
    place: Place,
) -> tuple[PlannedSearch, list[PlannedExperiment]]:
    """Return a search as the configuration wants it run: its trials, and its full runs.

    Raises:
        ConfigurationError: if its space, or a run, cannot be.
    """
    asked, where = library.searches[name], library.places["experiment", name]
    where = f"{where}: search {name}"
    if f"{name}-winners" in library.experiments.keys() | library.searches.keys():
        raise ConfigurationError(f"{where}: there is an experiment {name}-winners; rename one")

    def resolved(base: str, values: Mapping[str, Value], key: str) -> Specification:
        return resolve(base, values, library.recipes, corpora, settings, f"{where}: {key}")

    def place_of_key(key: str) -> str:
        return f"{library.places.get(('space', f'{name}: {key}'), where)}: search {name}: space"

    frameworks, devices, seeds = axes(name, asked, settings, place)
    resolved(asked.recipe, {}, "recipe")
    base = resolved(asked.recipe, asked.set, "set")
    resolved(asked.recipe, asked.set | asked.short, "short")
    check_space(asked, base.recipe, place_of_key, where)
    unchanged = Recipe.model_validate(library.recipes[asked.recipe].model_dump() | asked.set)
    label = variant_name(name, unchanged, base.recipe)
    changed = label.removeprefix(name)
    space = Space(
        recipe=base.recipe,
        dimensions=asked.space,
        constraint=asked.constraint,
        short=asked.short,
        corpus_definition=base.corpus_definition,
        accelerator=settings.accelerator_of(frameworks[0]),
        devices=devices,
        budget=None if settings.budget == "full" else settings.budget,
    )
    points = draw_points(space, asked.trials, asked.seed, f"{where}: space")
    for key in asked.space.keys() & NEEDS.keys():
        other, needed = NEEDS[key]
        if other not in asked.space and (value := getattr(base.recipe, other)) not in needed:
            raise ConfigurationError(
                f"{place_of_key(key)}: {key} has no effect with {other}={format_override(value)}; "
                "leave it out"
            )
    if asked.method == "random":
        trials = [
            resolve(
                asked.recipe, asked.set | point | asked.short, library.recipes, corpora, settings,
                f"{where}: trials", "put set and short into its recipe, search fewer keys, or use "
                "`method: tpe`, whose trials have short names",
            )
            for point in points
        ]  # fmt: skip
    else:
        trials = [
            space.specification(f"{name}-trial-{number}{changed}", point, short=True)
            for number, point in enumerate(points, start=1)
        ]
    winners = [
        space.specification(f"{name}-winner-{number}{changed}", point, short=False)
        for number, point in enumerate(points[: asked.full], start=1)
    ]
    beside, published = [], None
    if asked.published is not None:
        [(recipe, values)] = expand(asked.published, f"{where}: published")
        beside = [resolved(recipe, values | each, "published") for each in (asked.short, {})]
        for theirs, ours in zip(beside, (trials[0], winners[0]), strict=True):
            for key in FIXED:
                if (found := getattr(theirs.recipe, key)) != (own := getattr(ours.recipe, key)):
                    raise ConfigurationError(
                        f"{where}: published: {asked.published} has {key} {found}, and the search "
                        f"{own}, so perplexities cannot be compared"
                    )
        published = Published(
            trial=beside[0].on(space.accelerator),
            full=beside[1],
            point={key: getattr(beside[1].recipe, key) for key in asked.space},
        )
    searched = {
        key: dimension.choices
        for key, dimension in asked.space.items()
        if key in ("kernel", "precision") and dimension.choices
    }
    for specification in (*trials, *winners, *beside):
        for count in devices:
            check_devices(specification, count, f"{where}: devices", settings)
        for choices in itertools.product(*searched.values()):
            changes = dict(zip(searched, choices, strict=True))
            tried = specification.recipe.model_copy(update=changes)
            for framework in frameworks:
                check_framework(
                    specification.model_copy(update={"recipe": tried}), framework,
                    f"{where}: frameworks",
                )  # fmt: skip
    runs = list(itertools.product(frameworks, devices, seeds))
    search = PlannedSearch(
        name=label,
        base=name,
        definition=asked,
        space=space,
        trials=tuple(each.variant for each in trials),
        winners=tuple(each.variant for each in winners),
        published=published,
        framework=frameworks[0],
        devices=devices[0],
        seed=seeds[0],
        full={
            variant: [cell_of(variant, *run).path for run in runs]
            for variant in [each.variant for each in (*beside[1:], *winners)]
        },
    )

    def planned(
        own: str, title: str, specifications: Sequence[Specification], metric: Compared, one: bool
    ) -> PlannedExperiment:
        each = {specification.variant: specification for specification in specifications}
        return PlannedExperiment(
            name=own,
            definition=Experiment(
                title=f"{asked.title}: {title}",
                description=asked.description,
                variants=list(each),
                metric=metric,
            ),
            specifications=tuple(each.values()),
            frameworks=frameworks[:1] if one else frameworks,
            devices=devices[:1] if one else devices,
            seeds=seeds[:1] if one else seeds,
            baseline=next(iter(each)),
            found={variant: file for variant, file in search.files.items() if variant in each},
        )

    return search, [
        planned(name, "trials", [*beside[:1], *trials], "valid_perplexity", one=True),
        planned(
            f"{name}-winners", "in full", [*beside[1:], *winners], "test_perplexity", one=False
        ),
    ]


def resolve(
    base: str,
    overrides: Mapping[str, Value],
    recipes: Mapping[str, Recipe],
    corpora: Mapping[str, CorpusDefinition],
    settings: Config,
    where: str,
    remedy: str = "",
) -> Specification:
    """Return the specification of a recipe with overrides, and then the configuration's.

    Args:
        base: name of the recipe.
        overrides: keys and values.
        recipes: all of them.
        corpora: all of them.
        settings: the configuration.
        where: the place, for errors.
        remedy: for a name that is too long; empty: a recipe of its own.

    Raises:
        ConfigurationError: beginning with `where`, if there can be none.
    """
    recipe = recipes[known(base, recipes, where, "recipe")]
    for key in overrides:
        known(key, Recipe.model_fields, f"{where}: {base}", "recipe key")
    wanted = {"corpus": settings.corpus, "subset": settings.subset}
    values = {**overrides, **{k: v for k, v in wanted.items() if v is not None}}
    if settings.budget != "full":
        values["budget"] = settings.budget
    changed = parse(Recipe, {**recipe.model_dump(), **values}, where, base)
    known(changed.corpus, corpora, f"{where}: {base}: corpus", "corpus")
    variant = variant_name(base, recipe, changed)
    if len(variant) > LONGEST_NAME:
        raise ConfigurationError(
            f"{where}: {variant[:60]}...: the name has {len(variant)} characters and may have "
            f"{LONGEST_NAME}; "
            + (remedy or f"make a recipe of it, with `extends: {base}` and what differs")
        )
    return Specification(
        variant=variant,
        recipe=changed,
        corpus_definition=content_of(changed.corpus, corpora[changed.corpus]),
        accelerator=settings.accelerator,
    )


def check_overrides(
    specification: Specification, overrides: Iterable[str], recipe: Recipe, where: str
) -> None:
    """Raise ConfigurationError if an override changes nothing but the variant's name."""
    changed = specification.recipe
    for key in overrides:
        if key in NEEDS and getattr(changed, key) != getattr(recipe, key):
            other, values = NEEDS[key]
            if getattr(changed, other) not in values:
                raise ConfigurationError(
                    f"{where}: {specification.variant}: {key} has no effect with "
                    f"{other}={format_override(getattr(changed, other))}; leave it out"
                )


def check_devices(specification: Specification, devices: int, where: str, settings: Config) -> None:
    """Raise ConfigurationError if a batch, or nodes, cannot be shared out to so many devices."""
    try:
        settings.nodes(devices)
        specification.recipe.global_batch_size(devices)
    except ValueError as error:
        raise ConfigurationError(f"{where}: {specification.variant}: {error}") from error


def check_framework(specification: Specification, framework: Framework, where: str) -> None:
    """Raise ConfigurationError if a framework does not have the recipe's kernel or precision."""
    for key in FRAMEWORKS[framework].lacks(specification.recipe):
        raise ConfigurationError(
            f"{where}: {specification.variant} has {lack(framework, specification.recipe, key)}"
        )
