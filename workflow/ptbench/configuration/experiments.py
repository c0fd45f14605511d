"""Recipes, experiments and papers: their models, and reading them from YAML.

`workflow/experiments/*.yaml` are our own; `workflow/papers/<document>/experiments.yaml` are those
of the documents that are reproduced. A name is unique over all files.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, Field

from ptbench.backends import FRAMEWORKS, Framework
from ptbench.configuration.errors import known, parse, shown
from ptbench.errors import ConfigurationError
from ptbench.model.recipe import Model, Name, Recipe
from ptbench.yaml import Located, merged, parse_yaml, read_mapping, read_yaml, shown_path

WORKFLOW = Path(__file__).resolve().parents[2]

Value = str | int | float | bool | None
T = TypeVar("T")


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
    metric: Literal["valid_perplexity", "test_perplexity"] = Field(
        "test_perplexity", description="What the frameworks are compared by."
    )


class ExperimentFile(Model):
    """A YAML file of recipes and experiments."""

    recipes: dict[Name, dict[str, Any]] = Field(
        {}, description="Recipes by name: recipe keys, and `extends: another-recipe`."
    )
    experiments: dict[Name, Experiment] = Field({}, description="Experiments by name.")


class Paper(Model):
    """`paper.yaml` in the folder of a document that is reproduced."""

    citation: str = Field(min_length=1, description="Authors, year, title, and where to find it.")
    hardware: str | None = Field(description="What its numbers were measured on; null: not stated.")
    readings: list[str] = Field(
        [], description="What we decided where the document is silent, ambiguous or wrong."
    )


@dataclass
class Library:
    """All recipes and experiments of all files."""

    recipes: dict[str, Recipe] = field(default_factory=dict)
    experiments: dict[str, Experiment] = field(default_factory=dict)
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
        for kind in ("recipe", "experiment"):
            for name, place in content.get(f"{kind}s", Located()).places.items():
                if (kind, name) in library.places:
                    raise ConfigurationError(
                        f"{place}: {kind} {name} is already in {library.places[kind, name]}; "
                        "rename one"
                    )
                library.places[kind, name] = place
        raw |= content.get("recipes", {})
        library.experiments |= file.experiments
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
            values[key] = parse_yaml(text, f"{where}: {variant}: {key}")
        yield recipe, values
        return
    if both := sorted(variant.set.keys() & variant.sweep.keys()):
        raise ConfigurationError(f"{where}: {both[0]} is both in set and in sweep; leave it in one")
    for point in itertools.product(*variant.sweep.values()):
        yield variant.recipe, {**variant.set, **dict(zip(variant.sweep, point, strict=True))}
