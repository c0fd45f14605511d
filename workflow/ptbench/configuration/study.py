"""A study: the configuration, resolved to experiments and cells before anything runs.

The Snakefile asks a `Study` for everything it needs; each Slurm job parses it again, so nothing
here imports NumPy.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from ptbench.backends import FRAMEWORKS, Framework
from ptbench.configuration.config import Config, Place, load_corpora
from ptbench.configuration.errors import known, parse, sentence
from ptbench.configuration.experiments import (
    WORKFLOW,
    Experiment,
    Library,
    Value,
    expand,
    load_library,
    published_files,
)
from ptbench.configuration.papers import answering, paper_files, paper_folders
from ptbench.configuration.specification import (
    LONGEST_NAME,
    Cell,
    Specification,
    code_digest,
    parse_cell_path,
    variant_name,
)
from ptbench.corpus.definitions import TRANSPORT, CorpusDefinition, content_of
from ptbench.errors import ConfigurationError
from ptbench.files import write_atomically
from ptbench.model import work
from ptbench.model.recipe import Recipe


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

    @cached_property
    def cells(self) -> tuple[Cell, ...]:
        """The experiment's cells, in the order of the report."""
        variants = [specification.variant for specification in self.specifications]
        return tuple(
            Cell.model_construct(variant=variant, framework=framework, devices=count, seed=seed)
            for variant, framework, count, seed in itertools.product(
                variants, self.frameworks, self.devices, self.seeds
            )
        )

    def plan(self, equivalence_margin: float) -> str:
        """Return what the analysis has to know, as JSON (`ptbench.analysis.plan` reads it)."""
        recipes = [each.recipe for each in self.specifications]
        varied = [key for key in Recipe.model_fields if len({getattr(r, key) for r in recipes}) > 1]
        content = {
            "name": self.name,
            "title": self.definition.title,
            "description": self.definition.description,
            "metric": self.definition.metric,
            "baseline": self.baseline,
            "equivalence_margin": equivalence_margin,
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
class Study:
    """Everything that a configuration asks for."""

    config: Config
    corpora: Mapping[str, CorpusDefinition]
    recipes: Mapping[str, Recipe]
    experiments: Mapping[str, PlannedExperiment]
    code: str  # of the package that trains: `code_digest`

    @cached_property
    def cells(self) -> tuple[Cell, ...]:
        """Every cell once, though experiments may share it."""
        return tuple(dict.fromkeys(c for e in self.experiments.values() for c in e.cells))

    @cached_property
    def _planned(self) -> frozenset[str]:
        return frozenset(cell.path for cell in self.cells)

    @cached_property
    def _specifications(self) -> dict[str, Specification]:
        return {s.variant: s for e in self.experiments.values() for s in e.specifications}

    def specification(self, variant: str) -> Specification:
        """Return the specification of a variant of any recipe, also of one in no experiment.

        Raises:
            ConfigurationError: if there is no such recipe, or the name is not the variant's own.
        """
        if variant not in self._specifications:
            [(base, overrides)] = expand(variant, "variant")
            found = resolve(base, overrides, self.recipes, self.corpora, self.config, "variant")
            if found.variant != variant:
                raise ConfigurationError(f"variant: {variant} is written {found.variant}")
            self._specifications[variant] = found
        return self._specifications[variant]

    @cached_property
    def _texts(self) -> dict[str, tuple[str, str]]:
        return {}

    def text(self, variant: str) -> str:
        """Return the text of a variant's specification."""
        return self._text_and_fingerprint(variant)[0]

    def _text_and_fingerprint(self, variant: str) -> tuple[str, str]:
        """Return both, made once, because many cells have the same."""
        if variant not in self._texts:
            specification = self.specification(variant)
            self._texts[variant] = specification.text(), specification.fingerprint
        return self._texts[variant]

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
        check_devices(specification, cell.devices, f"{where}: devices")
        check_kernel(specification, cell.framework, f"{where}: framework")
        return specification.recipe.corpus_folder

    def result(self, path: str) -> Literal["counts", "other", "none"]:
        """Return what a cell has: a result of its specification, another file, or none."""
        try:
            found = json.loads(Path(f"results/cells/{path}/metrics.json").read_bytes())
            own = found["fingerprint"] == self._text_and_fingerprint(path.partition("/")[0])[1]
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
        return self.experiment(name).plan(self.config.equivalence_margin)

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
        return list(dict.fromkeys(cell.path.rpartition("/")[0] for cell in cells))

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

    def memory_megabytes(self, path: str, corpus_json: str, times: int = 1) -> int:
        """Return the main memory that a cell's job asks for [MB], so many times the estimate."""
        cell = parse_cell_path(path)
        libraries = FRAMEWORKS[cell.framework].memory_megabytes
        asked = work.memory_megabytes(
            self.recipe(path), self.config.accelerator, libraries, cell.devices,
            work.corpus_size(corpus_json), times,
        )  # fmt: skip
        return min(asked, self.config.max_memory or asked)

    def runtime_minutes(self, path: str, corpus_json: str, times: int = 1) -> int:
        """Return the time limit that a cell's job asks for [minutes], as `memory_megabytes`."""
        devices, size = parse_cell_path(path).devices, work.corpus_size(corpus_json)
        accelerator = self.config.accelerator
        asked = work.runtime_minutes(self.recipe(path), accelerator, devices, size, times)
        return min(asked, self.config.max_runtime or asked)

    @cached_property
    def configuration(self) -> str:
        """The merged configuration as JSON; `load_study` makes the same study of it."""
        return self.config.model_dump_json(exclude_defaults=True)

    def write(self, path: Path, replaced: Sequence[str], command: str) -> None:
        """Write the study down, for the jobs of a run and for those who follow it.

        Args:
            path: of the file.
            replaced: cells whose result is there and does not count, so that the run makes it anew.
            command: what runs it, without targets.
        """
        content = {
            "cells": [cell.path for cell in self.cells],
            "command": command,
            "replaced": list(replaced),
            "study": _adapter().dump_python(self, mode="json"),
        }
        write_atomically(path, json.dumps(content) + "\n")


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


def load_study(config: Mapping[str, Any], source: str = "config.yaml") -> Study:
    """Validate a merged configuration and resolve all that it names.

    Args:
        config: see `read_configuration`.
        source: what errors call it where `config` does not know the place.

    Raises:
        ConfigurationError: for anything that cannot be run.
    """
    settings = parse(Config, config, source)

    def place(key: str) -> str:
        return f"{getattr(config, 'places', {}).get(key, source)}: {key}"

    library = load_library()
    corpora = load_corpora(settings, place)
    if settings.corpus is not None:
        known(settings.corpus, corpora, place("corpus"), "corpus")
    planned = {
        name: plan_experiment(name, library, corpora, settings, place)
        for name in chosen(settings, library, place)
    }
    return Study(settings, corpora, library.recipes, planned, code_digest())


def chosen(settings: Config, library: Library, place: Place) -> list[str]:
    """Return the names of the experiments that a configuration asks for, each once.

    Raises:
        ConfigurationError: if there is no such experiment or document.
    """
    names = settings.experiments or (["demo"] if settings.papers is None else [])
    if names == ["all"]:
        return list(library.experiments)
    for name in names:
        known(name, library.experiments, place("experiments"), "experiment")
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
            variants[found.variant] = found
    if len(trained_on := {each.recipe.corpus_folder for each in variants.values()}) > 1:
        raise ConfigurationError(
            f"{where}: variants: perplexities on {' and '.join(sorted(trained_on))} "
            "cannot be compared; make an experiment of each corpus"
        )
    frameworks = [f for f in experiment.frameworks if f in settings.frameworks]
    if not frameworks:
        raise ConfigurationError(
            f"{place('frameworks')}: experiment {name} runs in {', '.join(experiment.frameworks)}, "
            f"none of which is among {', '.join(settings.frameworks)}"
        )
    devices = settings.devices or experiment.devices
    asked = f"{where}: devices" if settings.devices is None else place("devices")
    for specification in variants.values():
        for count in devices:
            check_devices(specification, count, asked)
        for framework in frameworks:
            check_kernel(specification, framework, f"{where}: frameworks")
    repeated = list(range(1, settings.repeats + 1)) if settings.repeats else None
    seeds = settings.seeds or repeated or experiment.seeds
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


def resolve(
    base: str,
    overrides: Mapping[str, Value],
    recipes: Mapping[str, Recipe],
    corpora: Mapping[str, CorpusDefinition],
    settings: Config,
    where: str,
) -> Specification:
    """Return the specification of a recipe with overrides, and then the configuration's.

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
            f"{LONGEST_NAME}; make a recipe of it, with `extends: {base}` and what differs"
        )
    return Specification(
        variant=variant,
        recipe=changed,
        corpus_definition=content_of(changed.corpus, corpora[changed.corpus]),
        accelerator=settings.accelerator,
    )


def check_devices(specification: Specification, devices: int, where: str) -> None:
    """Raise ConfigurationError if a batch cannot be shared out to so many devices."""
    try:
        specification.recipe.global_batch_size(devices)
    except ValueError as error:
        raise ConfigurationError(f"{where}: {specification.variant}: {error}") from error


def check_kernel(specification: Specification, framework: Framework, where: str) -> None:
    """Raise ConfigurationError if a framework does not have the recipe's kernel."""
    kernel = specification.recipe.kernel
    if kernel not in FRAMEWORKS[framework].kernels:
        having = ", ".join(f for f in FRAMEWORKS if kernel in FRAMEWORKS[f].kernels)
        raise ConfigurationError(
            f"{where}: {specification.variant} has kernel={kernel}, "
            f"which {framework} does not have; it is in {having}"
        )
