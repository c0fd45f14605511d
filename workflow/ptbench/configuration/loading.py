"""From YAML to a study: every recipe, experiment and cell validated before anything runs.

Runs in the workflow's environment. Every error is a ConfigurationError of one sentence per problem
that names the file, the key, the value and what is allowed.
"""

from __future__ import annotations

import difflib
import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, ValidationInfo

from ptbench.backends import FRAMEWORKS, Framework
from ptbench.configuration.specification import Cell, Specification, parse_cell_path, variant_name
from ptbench.corpus.definitions import (
    SPLITS,
    CorpusDefinition,
    DownloadedCorpus,
    FolderCorpus,
    MirrorAddress,
    content_of,
)
from ptbench.errors import ConfigurationError
from ptbench.files import write_atomically
from ptbench.model import work
from ptbench.model.recipe import NAME_PATTERN, Accelerator, Model, Name, Recipe


class YamlLoader(yaml.SafeLoader):
    """YAML with the numbers of its version 1.2, where 1e-3 is one too, and no key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if (key.tag, str(key.value)) in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"{key.value} is there twice", problem_mark=key.start_mark
                )
            seen.add((key.tag, str(key.value)))
        return super().construct_mapping(node, deep)


YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)

WORKFLOW = Path(__file__).resolve().parents[2]
M = TypeVar("M", bound=Model)
Value = str | int | float | bool | None


def not_boolean(value: Any) -> Any:
    """`value`, if it is not true or false, which would pass for 1 and 0."""
    if isinstance(value, bool):
        raise ValueError(f"{shown(value)} is not a number")
    return value


Whole = Annotated[int, BeforeValidator(not_boolean)]
Seed = Annotated[Whole, Field(ge=0, lt=2**31)]
Devices = Annotated[Whole, Field(ge=1, le=1024)]
T = TypeVar("T")


def distinct(values: list[T]) -> list[T]:
    """`values`, if each is there once."""
    for index, value in enumerate(values):
        if value in values[:index]:
            raise ValueError(f"{shown(value)} is there twice; name it once")
    return values


def as_list(value: Any, info: ValidationInfo) -> Any:
    """A lone word or number as a list of it, so that `--config experiments=demo` needs no brackets.

    Anything else is left for pydantic to judge.

    Raises:
        ValueError: for several without brackets.
    """
    if isinstance(value, str) and "," in value:
        raise ValueError(
            f"{shown(value)} is not a list; write [{value}], on the command line "
            f"'{info.field_name}=[{value}]'"
        )
    return [value] if isinstance(value, str | int) and not isinstance(value, bool) else value


# A list of one or more different things, and the same where a lone one will do.
Several = Annotated[list[T], Field(min_length=1), AfterValidator(distinct)]
OneOrSeveral = Annotated[Several[T], BeforeValidator(as_list)]


class Variant(Model):
    """A recipe with overrides, or with a sweep that makes one variant of every combination."""

    recipe: Name = Field(description="Name of the recipe.")
    set: dict[str, Value] = Field({}, description="Recipe keys and their values here.")
    sweep: dict[str, Several[Value]] = Field(
        {}, description="Recipe keys and the values each takes; all combinations are run."
    )


class Experiment(Model):
    """A named table or figure: variants × frameworks × device counts × seeds."""

    title: str = Field(min_length=1, description="Heading in the report.")
    description: str = Field("", description="What the experiment shows, in plain sentences.")
    variants: Several[str | Variant] = Field(
        description="Recipes by name, `recipe+key=value`, or a mapping with recipe, set and sweep."
    )
    frameworks: Several[Framework] = Field(list(FRAMEWORKS), description="Frameworks that run it.")
    devices: Several[Devices] = Field([1], description="Numbers of data-parallel replicas.")
    seeds: Several[Seed] = Field([1, 2, 3], description="One run for each.")
    metric: Literal["valid_perplexity", "test_perplexity"] = Field(
        "test_perplexity", description="What the frameworks are compared by."
    )


class ExperimentFile(Model):
    """One YAML file under workflow/experiments."""

    recipes: dict[Name, dict[str, Any]] = Field(
        {}, description="Recipes by name: recipe keys, and `extends: another-recipe`."
    )
    experiments: dict[Name, Experiment] = Field({}, description="Experiments by name.")


class Config(Model):
    """config.yaml, with whatever the command line's --config and --configfile change in it."""

    experiments: OneOrSeveral[Name] = Field(["demo"], description="Which experiments to run.")
    corpus: Name | None = Field(
        None, description="Train every recipe on this corpus; null: on the recipe's own."
    )
    subset: Annotated[Whole, Field(ge=1)] | None = Field(
        None, description="First lines of every split to use [lines]; null: the recipe's own."
    )
    frameworks: OneOrSeveral[Framework] = Field(
        list(FRAMEWORKS), description="Frameworks to run, of those each experiment names."
    )
    seeds: OneOrSeveral[Seed] | None = Field(
        None, description="Seeds to run; null: each experiment's own."
    )
    devices: OneOrSeveral[Devices] | None = Field(
        None, description="Device counts to run; null: each experiment's own."
    )
    accelerator: Accelerator = Field("cpu", description="Kind of device that trains.")
    threads: Whole = Field(
        1, ge=1, le=1024, description="CPU threads of a cell, shared by its replicas."
    )
    checkpoint_minutes: float = Field(
        10, gt=0, description="Time between checkpoints within an epoch [minutes]."
    )
    equivalence_margin: float = Field(
        0.02, gt=0, lt=1, description="Largest difference of mean nll that does not matter [nats]."
    )
    corpora: dict[Name, CorpusDefinition] = Field(
        {}, description="Corpora of your own by name, or other definitions of the built-in ones."
    )
    mirrors: dict[Name, MirrorAddress] = Field(
        {},
        description="Where else to look first for a downloaded corpus, by name: an http:, https: "
        "or file: address of a folder that holds its three files. They are verified all the same.",
    )


class CorpusFile(Model):
    """workflow/corpora.yaml."""

    corpora: dict[Name, CorpusDefinition] = Field(description="Corpora by name.")


@dataclass(frozen=True)
class PlannedExperiment:
    """An experiment with its names resolved."""

    name: str
    definition: Experiment
    cells: tuple[Cell, ...]
    specifications: tuple[Specification, ...]

    @cached_property
    def definition_json(self) -> str:
        """The definition in a form that two runs of the workflow can compare."""
        return self.definition.model_dump_json()


@dataclass(frozen=True)
class Study:
    """Everything that a configuration asks for."""

    config: Config
    corpora: Mapping[str, CorpusDefinition]
    recipes: Mapping[str, Recipe]
    experiments: Mapping[str, PlannedExperiment]

    @cached_property
    def cells(self) -> tuple[Cell, ...]:
        """Every cell once, though experiments may share it."""
        return tuple(dict.fromkeys(c for e in self.experiments.values() for c in e.cells))

    @property
    def frameworks(self) -> list[str]:
        """The frameworks of the cells."""
        return list(dict.fromkeys(cell.framework for cell in self.cells))

    @cached_property
    def _specifications(self) -> dict[str, Specification]:
        return {s.variant: s for e in self.experiments.values() for s in e.specifications}

    def specification(self, variant: str) -> Specification:
        """The specification of a variant of any recipe, whether an experiment has it or not.

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

    def corpus_of_cell(self, path: str) -> str:
        """The corpus folder of a cell of any recipe, whether an experiment has it or not.

        Raises:
            ConfigurationError: if there can be no such cell.
        """
        where = f"results/cells/{path}"
        try:
            variant, framework, *_ = path.split("/")
            known(framework, FRAMEWORKS, "framework", "framework")
            specification = self.specification(variant)
            cell = parse_cell_path(path)
        except ValidationError as error:
            raise ConfigurationError(
                "\n".join(sentence(Cell, problem, where) for problem in error.errors())
            ) from error
        except (ConfigurationError, ValueError) as error:
            raise ConfigurationError(f"{where}: {error}") from error
        if cell.path != path:
            raise ConfigurationError(f"{where}: is written results/cells/{cell.path}")
        check_devices(specification, cell.devices, f"{where}: devices")
        check_kernel(specification, cell.framework, f"{where}: framework")
        return specification.recipe.corpus_folder

    def experiment(self, name: str) -> PlannedExperiment:
        """An experiment of the study.

        Raises:
            ConfigurationError: if the study has no such experiment.
        """
        if name not in self.experiments:
            having = ", ".join(sorted(self.experiments))
            raise ConfigurationError(f'the study has no experiment "{name}"; it has {having}')
        return self.experiments[name]

    def corpus(self, corpus_folder: str) -> tuple[str, CorpusDefinition, int | None]:
        """Name, definition and subset of what is prepared in results/corpora/{corpus_folder}."""
        match = re.fullmatch(r"(.+)-first-(\d+)-lines", corpus_folder)
        subset = None if match is None or corpus_folder in self.corpora else int(match[2])
        name = corpus_folder if subset is None or match is None else match[1]
        return known(name, self.corpora, "corpus", "corpus"), self.corpora[name], subset

    def corpus_files(self, corpus_folder: str) -> list[str]:
        """The files of a corpus in a folder of the user's, those that are there."""
        _, definition, _ = self.corpus(corpus_folder)
        if not isinstance(definition, FolderCorpus):
            return []
        files = (definition.folder / f"{split}.txt" for split in SPLITS)
        return [str(file) for file in files if file.exists()]  # `prepare` tells what is missing

    @cached_property
    def published_files(self) -> list[str]:
        """The published numbers that results are set beside, relative to the project."""
        files = (WORKFLOW / "published").glob("*.csv")
        return sorted(str(file.relative_to(WORKFLOW.parent)) for file in files)

    def memory_megabytes(self, path: str, corpus_json: str, attempt: int) -> int:
        """Return the main memory that a cell's job asks for [MB]."""
        cell = parse_cell_path(path)
        specification = self.specification(cell.variant)
        return work.memory_megabytes(
            specification.recipe, specification.accelerator,
            FRAMEWORKS[cell.framework].memory_megabytes, cell.devices,
            work.corpus_size(corpus_json), attempt,
        )  # fmt: skip

    def runtime_minutes(self, path: str, corpus_json: str, attempt: int) -> int:
        """Return the time limit that a cell's job asks for [minutes]."""
        cell = parse_cell_path(path)
        specification = self.specification(cell.variant)
        size = work.corpus_size(corpus_json)
        recipe, accelerator = specification.recipe, specification.accelerator
        return work.runtime_minutes(recipe, accelerator, cell.devices, size, attempt)

    def corpus_content(self, corpus_folder: str) -> str:
        """What decides what is in a prepared corpus, in a form that two runs can compare."""
        name, definition, subset = self.corpus(corpus_folder)
        return json.dumps([name, content_of(definition), subset], sort_keys=True)

    def write(self, path: Path) -> None:
        """Write down the merged configuration and the cells, for those who follow the study."""
        content = {
            "config": self.config.model_dump(mode="json"),
            "cells": [cell.path for cell in self.cells],
        }
        write_atomically(path, json.dumps(content, indent=1) + "\n")


def read_study(path: Path) -> Study:
    """The study that `Study.write` wrote down."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigurationError(f"{path}: cannot be read: {error}") from error
    if not isinstance(content, dict) or "config" not in content:
        raise ConfigurationError(f"{path}: is not a study; run the workflow to write it anew")
    return load_study(content["config"], path.name)


def load_study(config: Mapping[str, Any], source: str = "config.yaml") -> Study:
    """Validate a merged configuration and resolve all that it names.

    Args:
        config: as Snakemake merged it.
        source: what errors call it.

    Raises:
        ConfigurationError: for anything that cannot be run.
    """
    # Not strictly, because Snakemake's --config gives the numbers within a list as strings.
    settings = parse(Config, config, source, strict=False)
    recipes, experiments = load_experiments(WORKFLOW / "experiments")
    built_in = parse_file(CorpusFile, WORKFLOW / "corpora.yaml").corpora
    corpora = {**built_in, **settings.corpora}
    for name, address in settings.mirrors.items():
        definition = corpora[known(name, corpora, f"{source}: mirrors", "corpus")]
        if not isinstance(definition, DownloadedCorpus):
            kind = "a folder" if isinstance(definition, FolderCorpus) else "generated"
            raise ConfigurationError(
                f"{source}: mirrors.{name}: {name} is {kind}, so it has no mirrors"
            )
        corpora[name] = definition.with_first(address)
    if settings.corpus is not None:
        known(settings.corpus, corpora, f"{source}: corpus", "corpus")
    planned: dict[str, PlannedExperiment] = {}
    for name in settings.experiments:
        where = f"{source}: experiments"
        experiment = experiments[known(name, experiments, where, "experiment")]
        variants = []
        for base, overrides in itertools.chain.from_iterable(
            expand(variant, f"experiment {name}: variants[{index}]")
            for index, variant in enumerate(experiment.variants)
        ):
            where = f"experiment {name}: variants"
            variants.append(resolve(base, overrides, recipes, corpora, settings, where))
        if len(trained_on := {v.recipe.corpus_folder for v in variants}) > 1:
            raise ConfigurationError(
                f"experiment {name}: variants: perplexities on {' and '.join(sorted(trained_on))} "
                "cannot be compared; make an experiment of each corpus"
            )
        cells = grid(name, experiment, variants, settings, source)
        planned[name] = PlannedExperiment(name, experiment, tuple(cells), tuple(variants))
    return Study(settings, corpora, recipes, planned)


def grid(
    name: str,
    experiment: Experiment,
    variants: list[Specification],
    settings: Config,
    source: str,
) -> list[Cell]:
    """The experiment's cells, each once, in the order of the report."""
    frameworks = [f for f in experiment.frameworks if f in settings.frameworks]
    if not frameworks:
        raise ConfigurationError(
            f"{source}: frameworks: experiment {name} runs in {', '.join(experiment.frameworks)}, "
            f"none of which is among {', '.join(settings.frameworks)}"
        )
    devices = settings.devices or experiment.devices
    seeds = settings.seeds or experiment.seeds
    for specification, count in itertools.product(variants, devices):
        where = f"experiment {name}" if settings.devices is None else source
        check_devices(specification, count, f"{where}: devices")
    for specification, framework in itertools.product(variants, frameworks):
        check_kernel(specification, framework, f"experiment {name}: frameworks")
    cells = itertools.product(
        dict.fromkeys(v.variant for v in variants), frameworks, devices, seeds
    )
    return [
        Cell.model_construct(variant=variant, framework=framework, devices=count, seed=seed)
        for variant, framework, count, seed in cells
    ]


def check_devices(specification: Specification, devices: int, where: str) -> None:
    """Raises ConfigurationError if a batch cannot be shared out to so many devices."""
    try:
        specification.recipe.global_batch_size(devices)
    except ValueError as error:
        raise ConfigurationError(f"{where}: {specification.variant}: {error}") from error


def check_kernel(specification: Specification, framework: Framework, where: str) -> None:
    """Raises ConfigurationError if a framework does not have the recipe's kernel."""
    kernel = specification.recipe.kernel
    if kernel not in FRAMEWORKS[framework].kernels:
        having = ", ".join(f for f in FRAMEWORKS if kernel in FRAMEWORKS[f].kernels)
        raise ConfigurationError(
            f"{where}: {specification.variant} has kernel={kernel}, "
            f"which {framework} does not have; it is in {having}"
        )


def expand(variant: str | Variant, where: str) -> list[tuple[str, dict[str, Value]]]:
    """A variant as written: its recipe's name and overrides, once for each point of its sweep."""
    if isinstance(variant, str):
        recipe, *overrides = variant.split("+")
        values: dict[str, Value] = {}
        for override in overrides:
            key, equals, text = override.partition("=")
            if not equals:
                raise ConfigurationError(f"{where}: {variant}: {override} must be key=value")
            values[key] = yaml.load(text, YamlLoader)
        return [(recipe, values)]
    if both := sorted(variant.set.keys() & variant.sweep.keys()):
        raise ConfigurationError(f"{where}: {both[0]} is both in set and in sweep; leave it in one")
    points = itertools.product(*variant.sweep.values())
    return [
        (variant.recipe, {**variant.set, **dict(zip(variant.sweep, point, strict=True))})
        for point in points
    ]


def resolve(
    base: str,
    overrides: Mapping[str, Value],
    recipes: Mapping[str, Recipe],
    corpora: Mapping[str, CorpusDefinition],
    settings: Config,
    where: str,
) -> Specification:
    """The specification of a recipe under overrides, the experiment's and then the user's."""
    recipe = recipes[known(base, recipes, where, "recipe")]
    for key in overrides:
        known(key, Recipe.model_fields, f"{where}: {base}", "recipe key")
    wanted = {"corpus": settings.corpus, "subset": settings.subset}
    values = {**overrides, **{k: v for k, v in wanted.items() if v is not None}}
    changed = parse(Recipe, {**recipe.model_dump(), **values}, f"{where}: {base}")
    known(changed.corpus, corpora, f"{where}: {base}: corpus", "corpus")
    return Specification(
        variant=variant_name(base, recipe, changed),
        recipe=changed,
        corpus_definition=content_of(corpora[changed.corpus]),
        accelerator=settings.accelerator,
    )


def load_experiments(folder: Path) -> tuple[dict[str, Recipe], dict[str, Experiment]]:
    """All recipes and experiments of all files in a folder; names are unique across files."""
    raw: dict[str, dict[str, Any]] = {}
    experiments: dict[str, Experiment] = {}
    origin: dict[tuple[str, str], str] = {}
    for path in sorted(folder.glob("*.yaml")):
        file = parse_file(ExperimentFile, path)
        for kind, names in (("recipe", file.recipes), ("experiment", file.experiments)):
            for name in names:
                if (kind, name) in origin:
                    raise ConfigurationError(
                        f"{path.name}: {kind} {name} is already in {origin[kind, name]}; rename one"
                    )
                origin[kind, name] = path.name
        raw |= file.recipes
        experiments |= file.experiments
    recipes = {
        name: parse(Recipe, inherited(name, raw, origin), f"{origin['recipe', name]}: {name}")
        for name in raw
    }
    return recipes, experiments


def inherited(
    name: str, raw: Mapping[str, dict[str, Any]], origin: Mapping[tuple[str, str], str]
) -> dict[str, Any]:
    """A recipe's keys with those of the recipe it extends, and so on, under them."""
    values: dict[str, Any] = {}
    chain = [name]
    while True:
        own = dict(raw[chain[-1]])
        parent = own.pop("extends", None)
        values = {**own, **values}
        if parent is None:
            return values
        where = f"{origin['recipe', chain[-1]]}: {chain[-1]}: extends"
        if not isinstance(parent, str):
            raise ConfigurationError(f"{where}: {shown(parent)} must be the name of one recipe")
        known(parent, raw, where, "recipe")
        if parent in chain:
            raise ConfigurationError(f"{where}: {' → '.join([*chain, parent])} goes in a circle")
        chain.append(parent)


def parse_file(model: type[M], path: Path) -> M:
    """A YAML file as a model."""
    return parse(model, read_yaml(path), path.name)


def read_yaml(path: Path) -> Any:
    """The content of a YAML file."""
    try:
        return yaml.load(path.read_text(encoding="utf-8"), YamlLoader)
    except OSError as error:
        raise ConfigurationError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path}: not UTF-8 at byte {error.start}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "cannot be read"
        raise ConfigurationError(f"{path.name}{line}: not valid YAML: {problem}") from error


def read_configuration(path: Path) -> dict[str, Any]:
    """The content of a configuration file; an empty one is a configuration of defaults."""
    content = read_yaml(path)
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigurationError(f"{path.name}: must be a mapping of keys to values")
    return content


def parse(model: type[M], content: Any, source: str, strict: bool = True) -> M:
    """A model from plain values; every problem in one ConfigurationError."""
    if not isinstance(content, Mapping):
        raise ConfigurationError(f"{source}: must be a mapping of keys to values")
    try:
        # As JSON, because strictly read JSON takes a list for a tuple but not true for 1.
        return model.model_validate_json(json.dumps(dict(content), default=str), strict=strict)
    except ValidationError as error:
        problems = error.errors()
        sentences = dict.fromkeys(
            sentence(model, problem, source)
            for problem in problems
            # Of a variant's two forms, only that is reported whose kind it has.
            if not ("str" in problem["loc"] and isinstance(problem["input"], dict))
            and not ("Variant" in problem["loc"] and problem["type"] == "model_type")
            # A list that is too short but for the items in it that are wrong is not too short.
            and not (
                problem["type"] == "too_short"
                and any(
                    other["loc"][: len(problem["loc"])] == problem["loc"]
                    for other in problems
                    if other is not problem
                )
            )
        )
        raise ConfigurationError("\n".join(sentences)) from error


def sentence(model: type[Model], error: Any, source: str) -> str:
    """One of pydantic's errors as a sentence: where, what it is, what is allowed."""
    kind, context = error["type"], error.get("ctx", {})
    path, value = without_tags(error["loc"]), error["input"]
    if kind in ("union_tag_invalid", "union_tag_not_found"):  # it is at the key that decides
        path.append(context["discriminator"].strip("'"))
        kind, value = ("missing", None) if kind == "union_tag_not_found" else (kind, context["tag"])
    subject = "the name " if path[-1:] == ["[key]"] else ""
    if subject:
        path.pop()
    where = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path).lstrip(".")
    place = f"{source}: {where}" if where else source
    if kind == "extra_forbidden":
        hint = suggestion(str(path[-1]), model.model_fields) if len(path) == 1 else ""
        return f"{place}: there is no such key for {shown(value)}{hint}"
    if kind == "missing":
        return f"{place}: is required"
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if kind == "value_error":
        return f"{place}: {message}"
    allowed = {
        "list_type": "should be a list, such as [a, b]",
        "path_type": "should be a path",
        "too_short": f"should have at least {context.get('min_length')} item",
        "union_tag_invalid": f"should be {context.get('expected_tags')}",
    }
    if kind == "string_pattern_mismatch" and context["pattern"] == NAME_PATTERN:
        message = "should be lower-case letters, digits, dots and hyphens"
    else:
        message = allowed.get(kind, message.replace("an object", "a mapping"))
    return f"{place}: {subject}{shown(value)} is not allowed: {message}"


def without_tags(location: tuple[str | int, ...]) -> list[str | int]:
    """A place as its author wrote it, without pydantic's names of the alternatives it tried."""
    path = list(location)
    if path[:1] == ["corpora"]:  # corpora, name, kind, perhaps process, then the key
        while path[2:3] and path[2] in ("download", "folder", "synthetic", "markov", "high-rank"):
            tag = path.pop(2)
            if tag in ("download", "folder", "markov", "high-rank"):
                break
    if "variants" in path:
        after = path.index("variants") + 2
        if path[after : after + 1] in (["str"], ["Variant"]):
            del path[after]
    return path


def shown(value: object) -> str:
    """A value as an error shows it: on one line and not too long."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def known(name: str, names: Any, where: str, kind: str) -> str:
    """`name`, if it is among `names`."""
    if name not in names:
        raise ConfigurationError(
            f"{where}: there is no {kind} {shown(name)}{suggestion(str(name), names)}"
        )
    return name


def suggestion(name: str, names: Any) -> str:
    """What was probably meant, and what there is; not the latter if that is much."""
    close = difflib.get_close_matches(name, list(names), n=1)
    if not close:
        return f"; there are {', '.join(sorted(names))}"
    others = f" There are {', '.join(sorted(names))}" if len(names) <= 20 else ""
    return f"; did you mean {close[0]}?{others}"
