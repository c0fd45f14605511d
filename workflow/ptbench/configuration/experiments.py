"""Recipes, experiments, searches and papers: their models, and reading them from YAML.

`workflow/experiments/*.yaml` are our own; `workflow/papers/<document>/experiments.yaml` are those
of the documents that are reproduced. A name is unique over all files.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AfterValidator, Field, model_validator

from ptbench.backends import FRAMEWORKS, Framework
from ptbench.configuration.errors import known, parse, shown
from ptbench.errors import ConfigurationError
from ptbench.model.recipe import Model, Name, Recipe
from ptbench.yaml import Located, merged, parse_yaml, read_mapping, read_yaml, shown_path

WORKFLOW = Path(__file__).resolve().parents[2]

Value = str | int | float | bool | None
Compared = Literal["valid_perplexity", "test_perplexity"]
T = TypeVar("T")
# Parts of a file, and what names are unique among: a search is asked for like an experiment.
KINDS = {"recipes": "recipe", "experiments": "experiment", "search": "experiment"}


def distinct(values: list[T]) -> list[T]:
    """Return `values` if each is there once."""
    for index, value in enumerate(values):
        if value in values[:index]:
            raise ValueError(f"{shown(value)} is there twice; name it once")
    return values


Seed = Annotated[int, Field(ge=0, lt=2**31)]
Devices = Annotated[int, Field(ge=1, le=1024)]
Several = Annotated[list[T], Field(min_length=1), AfterValidator(distinct)]


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
    metric: Compared = Field(
        "test_perplexity", description="What frameworks and variants are compared by."
    )
    baseline: str | None = Field(
        None, description="Variant that the others are compared with; null: the first."
    )


class Dimension(Model):
    """The values that a search tries of one key: a range, choices, or those of another key."""

    low: int | float | None = Field(None, description="Lowest number of a range.")
    high: int | float | None = Field(None, description="Highest number of it.")
    step: int | float | None = Field(
        None, gt=0, description="Distance of its numbers, from low; null: all that there are."
    )
    log: bool = Field(False, description="Whether ratios are alike: 0.1 to 1 as 1 to 10.")
    choices: Several[Value] | None = Field(None, description="The values, in place of a range.")
    same_as: str | None = Field(None, description="Another key, whose value this one has too.")
    when: dict[str, Several[Value]] = Field(
        {},
        description="Keys and their values with which this one is tried. Otherwise it has the "
        "recipe's own value. Those that are searched too come before it.",
    )

    @model_validator(mode="after")
    def _is_one_thing(self) -> Self:
        ranged = self.low is not None and self.high is not None
        half = (self.low is None) != (self.high is None)
        if half or ranged + (self.choices is not None) + (self.same_as is not None) != 1:
            raise ValueError("must have low and high, or choices, or same_as")
        if not ranged and (self.log or self.step is not None):
            raise ValueError("log and step are for low and high")
        if self.low is not None and self.high is not None:
            if self.low > self.high:
                raise ValueError(f"low={self.low} must not exceed high={self.high}")
            if self.log and (self.low <= 0 or self.step is not None):
                raise ValueError("log needs low above 0, and has no step")
        return self


class Constraint(Model):
    """A bound on a product of the recipe's keys, such as what fits into memory."""

    product: Several[str] = Field(description="Keys that are multiplied.")
    at_most: float = Field(description="The largest product that is tried.")


Method = Literal["random", "tpe", "gp"]


class Search(Model):
    """Many short runs of one recipe with other values, the best of which go on in full."""

    title: str = Field(min_length=1, description="Heading in the report.")
    description: str = Field("", description="What is searched and why, in plain sentences.")
    recipe: Name = Field(description="Name of the recipe that it starts from.")
    set: dict[str, Value] = Field({}, description="Recipe keys and their values in every run.")
    space: dict[str, Dimension] = Field(
        min_length=1, description="Recipe keys that are searched, and what of each is tried."
    )
    constraint: Constraint | None = Field(None, description="What every trial keeps to.")
    method: Method = Field(
        "random",
        description="random: independent draws; tpe: Optuna's tree-structured Parzen estimator; "
        "gp: Optuna's Gaussian process, which needs PyTorch's environment. The first ten trials of "
        "both are random, and of gp always keys with `when`.",
    )
    trials: int = Field(
        ge=1,
        le=300,
        description="Short runs.",
    )
    generation: int = Field(
        8, ge=1, description="Trials that tpe and gp propose at once, from the results before."
    )
    short: dict[str, Value] = Field(
        {},
        description="Recipe keys and their values in trials alone: `epochs: 5`, `budget: quick`.",
    )
    full: int = Field(3, ge=1, description="Best trials whose recipes are trained in full.")
    seed: int = Field(0, ge=0, lt=2**31, description="Of the draws.")
    published: str | None = Field(
        None, description="A variant that is run beside the trials and in full: what others found."
    )
    frameworks: Several[Framework] = Field(
        list(FRAMEWORKS), description="Frameworks that train in full; the first runs the trials."
    )
    devices: Several[Devices] = Field([1], description="Data-parallel replicas; trials: the first.")
    seeds: Several[Seed] = Field([1, 2, 3], description="Of full runs; trials: the first.")

    @model_validator(mode="after")
    def _has_as_many_trials_as_winners(self) -> Self:
        if self.full > self.trials:
            raise ValueError(
                f"full={self.full} winners are more than trials={self.trials}; run more trials"
            )
        return self


class ExperimentFile(Model):
    """A YAML file of recipes, experiments and searches."""

    recipes: dict[Name, dict[str, Any]] = Field(
        {}, description="Recipes by name: recipe keys, and `extends: another-recipe`."
    )
    experiments: dict[Name, Experiment] = Field({}, description="Experiments by name.")
    search: dict[Name, Search] = Field(
        {}, description="Searches by name; each is run only if it is asked for by its name."
    )


class Paper(Model):
    """`paper.yaml` in the folder of a document that is reproduced."""

    citation: str = Field(min_length=1, description="Authors, year, title, and where to find it.")
    hardware: str | None = Field(description="What its numbers were measured on; null: not stated.")
    readings: list[str] = Field(
        [], description="What we decided where the document is silent, ambiguous or wrong."
    )


@dataclass
class Library:
    """All recipes, experiments and searches of all files."""

    recipes: dict[str, Recipe] = field(default_factory=dict)
    experiments: dict[str, Experiment] = field(default_factory=dict)
    searches: dict[str, Search] = field(default_factory=dict)
    papers: dict[str, list[str]] = field(default_factory=dict)  # each document's experiments
    places: dict[tuple[str, str], str] = field(default_factory=dict)  # by kind and name


def load_library() -> Library:
    """Read and validate all recipes and experiments.

    Raises:
        ConfigurationError: with file and line, for whatever is wrong in a file.
    """
    library = Library()
    raw: dict[str, Mapping[str, Any]] = {}
    for path in experiment_files():
        content = read_yaml(path)
        file = parse(ExperimentFile, content, shown_path(path))
        for key, kind in KINDS.items():
            for name, place in content.get(key, Located()).places.items():
                if (kind, name) in library.places:
                    raise ConfigurationError(
                        f"{place}: {key.removesuffix('s')} {name} is already in "
                        f"{library.places[kind, name]}; rename one"
                    )
                library.places[kind, name] = place
        for name, search in content.get("search", {}).items():
            for key, place in search["space"].places.items():
                library.places["space", f"{name}: {key}"] = place
        raw |= content.get("recipes", {})
        library.experiments |= file.experiments
        library.searches |= file.search
        if path.parent.parent.name == "papers":
            library.papers[path.parent.name] = list(file.experiments)
    for name in raw:
        values = inherited(name, raw, library.places)
        library.recipes[name] = parse(Recipe, values, library.places["recipe", name], name)
    return library


def experiment_files() -> list[Path]:
    """Return the files of recipes and experiments, in the order of their names."""
    own = sorted((WORKFLOW / "experiments").glob("*.yaml"))
    return own + sorted((WORKFLOW / "papers").glob("*/experiments.yaml"))


def published_files() -> list[Path]:
    """Return the documents' files of published numbers, in the order of their names."""
    return sorted((WORKFLOW / "papers").glob("*/published.csv"))


def read_papers() -> dict[str, Paper]:
    """Return what is said of each document, by the name of its folder."""
    files = sorted((WORKFLOW / "papers").glob("*/paper.yaml"))
    return {file.parent.name: read_paper(file.parent) for file in files}


def read_paper(folder: Path) -> Paper:
    """Return what is said of the document in a folder.

    Raises:
        ConfigurationError: with file and line, if its paper.yaml is missing or malformed.
    """
    file = folder / "paper.yaml"
    return parse(Paper, read_mapping(file), shown_path(file))


def inherited(
    name: str, raw: Mapping[str, Mapping[str, Any]], places: Mapping[tuple[str, str], str]
) -> Located:
    """Return a recipe's keys, completed by those of the recipe it extends, and so on.

    Raises:
        ConfigurationError: if there is no such recipe, or the chain goes in a circle.
    """
    values, chain = Located(), [name]
    while True:
        own = raw[chain[-1]]
        values = merged(own, values)
        parent = values.pop("extends", None)
        if parent is None:
            return values
        place = getattr(own, "places", {}).get("extends", places["recipe", chain[-1]])
        where = f"{place}: {chain[-1]}: extends"
        if not isinstance(parent, str):
            raise ConfigurationError(f"{where}: {shown(parent)} must be the name of one recipe")
        known(parent, raw, where, "recipe")
        if parent in chain:
            raise ConfigurationError(f"{where}: {' → '.join([*chain, parent])} goes in a circle")
        chain.append(parent)


def expand(variant: str | Variant, where: str) -> Iterator[tuple[str, dict[str, Value]]]:
    """Yield a recipe's name and its overrides, once for each point of a variant's sweep.

    Raises:
        ConfigurationError: beginning with `where`, if the variant is not well formed.
    """
    if isinstance(variant, str):
        recipe, *overrides = variant.split("+")
        values: dict[str, Value] = {}
        for override in overrides:
            key, equals, text = override.partition("=")
            if not equals:
                raise ConfigurationError(f"{where}: {variant}: {override} must be key=value")
            if key in values:
                raise ConfigurationError(f"{where}: {variant}: {key} is there twice; leave one")
            values[key] = parse_yaml(text, f"{where}: {variant}: {key}")
        yield recipe, values
        return
    if both := sorted(variant.set.keys() & variant.sweep.keys()):
        raise ConfigurationError(f"{where}: {both[0]} is both in set and in sweep; leave it in one")
    for point in itertools.product(*variant.sweep.values()):
        yield variant.recipe, {**variant.set, **dict(zip(variant.sweep, point, strict=True))}
