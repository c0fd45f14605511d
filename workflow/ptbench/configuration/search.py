"""The points of a search: drawn at random, held to its constraint, and made recipes.

What is drawn here is known before anything runs. The samplers that learn are in
`ptbench.analysis.search`; nothing here imports NumPy.
"""

from __future__ import annotations

import errno
import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import Field, ValidationError, field_serializer

from ptbench.backends import Framework
from ptbench.configuration.errors import known, sentence, shown
from ptbench.configuration.experiments import Constraint, Dimension, Method, Search, Value
from ptbench.configuration.specification import PROTOCOL, Specification
from ptbench.errors import ConfigurationError
from ptbench.model.recipe import Accelerator, BudgetName, Model, Recipe

TRIES = 1000  # draws in a row without a new point, after which there is held to be none
DIGITS = 4  # of numbers drawn from a range: more would only make names long
FIXED = ("corpus", "subset", "budget")  # or perplexities could not be compared

Point = dict[str, Value]  # keys of the recipe that a search gives a value
Suggest = Callable[[str, Dimension], Value]


class UnfitError(ValueError):
    """A point that cannot be a trial, and why."""


class Space(Model):
    """What a search tries, and of which recipe: all that makes a point a run's specification."""

    recipe: Recipe = Field(description="What every run starts from.")
    dimensions: dict[str, Dimension] = Field(description="By key of the recipe.")
    constraint: Constraint | None = Field(description="What every point keeps to.")
    short: dict[str, Value] = Field(description="Keys and values of trials alone.")
    budget: BudgetName | None = Field(
        None, description="Of every run; null: what recipe and short say."
    )
    corpus_definition: dict[str, Any] = Field(description="As in a specification.")
    accelerator: Accelerator = Field(description="As in a specification.")
    devices: list[int] = Field(description="That a batch has to be shared out to.")

    @field_serializer("recipe")
    def _without_defaults(self, recipe: Recipe) -> dict[str, Any]:
        """Write a recipe so that a new key changes no question; see `Specification.text`."""
        return recipe.model_dump(mode="json", exclude_defaults=True)

    def point(self, suggest: Suggest) -> Point:
        """Return a point with the values that `suggest` gives; see `Dimension.when`."""
        found: Point = {}
        for key, dimension in self.dimensions.items():
            own = {parent: self.value(found, parent) for parent in dimension.when}
            if any(own[parent] not in among for parent, among in dimension.when.items()):
                continue
            if dimension.same_as is not None:
                found[key] = self.value(found, dimension.same_as)
            else:
                found[key] = tidy(key, dimension, suggest(key, dimension))
        return found

    def value(self, point: Point, key: str) -> Any:
        """Return the value of a recipe's key at a point."""
        return point.get(key, getattr(self.recipe, key))

    def draw(self, generator: random.Random) -> Point:
        """Return a point, each key drawn uniformly from its values."""
        return self.point(lambda key, dimension: drawn(key, dimension, generator))

    def specification(self, variant: str, point: Point, short: bool) -> Specification:
        """Return what a run of a point is told.

        Args:
            variant: name of the run's variant.
            point: keys and their values.
            short: whether it is a trial.

        Raises:
            UnfitError: if the point breaks the constraint, or is no recipe.
        """
        values = self.recipe.model_dump() | point
        if short:
            values |= self.short
        if self.budget is not None:
            values["budget"] = self.budget
        try:
            recipe = Recipe.model_validate(values)
            for count in self.devices:
                recipe.global_batch_size(count)
        except ValidationError as error:
            raise UnfitError(sentence(error.errors()[0], Recipe)) from error
        except ValueError as error:
            raise UnfitError(str(error)) from error
        if self.constraint is not None:
            product = math.prod(getattr(recipe, key) for key in self.constraint.product)
            if product > self.constraint.at_most:
                keys = " × ".join(self.constraint.product)
                raise UnfitError(
                    f"{keys} = {product:,.10g} is above {self.constraint.at_most:,.10g}"
                )
        return Specification(
            variant=variant,
            recipe=recipe,
            corpus_definition=self.corpus_definition,
            accelerator=self.accelerator,
        )


class Question(Model):
    """What a sampler that learns is asked: the next trials, from the results of those before."""

    protocol: int = Field(PROTOCOL, description="As in a specification.")
    space: Space = Field(description="What is tried.")
    method: Method = Field(description="Which sampler.")
    seed: int = Field(description="Of the sampler's draws.")
    generation: int = Field(description="Of trials, from 1.")
    variants: list[str] = Field(description="The trials that are asked for.")
    told: dict[str, str] = Field(description="Earlier trials, in order: their cells by variant.")
    files: list[str] = Field(description="That have the earlier trials' points, in order.")


class Contest(Model):
    """What a selection is made from: all trials of a search, of which the best go on in full."""

    protocol: int = Field(PROTOCOL, description="As in a specification.")
    name: str = Field(description="Of the search.")
    method: Method = Field(description="How trials were chosen.")
    space: Space = Field(description="What is tried.")
    seed: int = Field(description="Of random draws.")
    trials: list[str] = Field(description="Variants of all trials, in order.")
    run: str = Field(description="Framework, devices and seed of the trials: their cells' folders.")
    files: list[str] = Field(description="That have the points, unless they are drawn at random.")
    winners: list[str] = Field(description="Variants that are to be trained in full.")


class Published(Model):
    """What others found, run beside the trials and in full."""

    trial: Specification = Field(description="At the trials' budget.")
    full: Specification = Field(description="In full.")
    point: Point = Field(description="Its values of the keys that are searched.")


class Shown(Contest):
    """A search as its page shows it."""

    title: str = Field(description="Heading in the report.")
    description: str = Field(description="One paragraph.")
    base: str = Field(description="Name of the recipe that the search starts from.")
    set: dict[str, Value] = Field(description="Keys and values in every run.")
    published: Published | None = Field(description="What others found.")
    runs: list[str] = Field(description="Frameworks, devices and seeds of full runs, as `run`.")
    accelerators: dict[Framework, Accelerator] = Field(description="Kinds of devices of full runs.")
    left_out: list[str] = Field(description="Why other full runs that were asked for cannot run.")


def found_specification(file: str | Path, variant: str) -> Specification:
    """Return what a search found for a variant.

    Raises:
        FileNotFoundError: if it has not, or the file is of another version.
    """
    try:
        content = json.loads(Path(file).read_bytes())["specifications"]
        return Specification.model_validate(content[variant])
    except (ValueError, KeyError, TypeError) as error:
        raise FileNotFoundError(errno.ENOENT, "does not say what is trained", file) from error


def drawn(key: str, dimension: Dimension, generator: random.Random) -> Value:
    """Return a value of one key, drawn uniformly, or with `log` by its logarithm."""
    if dimension.choices is not None:
        return generator.choice(dimension.choices)
    low, high = bounds(dimension)
    whole = is_whole(key)
    if dimension.step is not None:
        return low + dimension.step * generator.randint(0, steps(dimension))
    if whole and not dimension.log:
        return generator.randint(int(low), int(high))
    if not dimension.log:
        return generator.uniform(low, high)
    half = 0.5 if whole else 0.0  # so that the ends have their full share, as Optuna's have
    value = math.exp(generator.uniform(math.log(low - half), math.log(high + half)))
    return round(value) if whole else value


def steps(dimension: Dimension) -> int:
    """Return how many steps lead from low to the highest number that is reached."""
    low, high = bounds(dimension)
    assert dimension.step is not None
    return math.floor((high - low) / dimension.step + 1e-9)


def bounds(dimension: Dimension) -> tuple[float, float]:
    """Return the ends of a range."""
    assert dimension.low is not None
    assert dimension.high is not None
    return dimension.low, dimension.high


def tidy(key: str, dimension: Dimension, value: Value) -> Value:
    """Return a drawn number as people write it, within its range."""
    if dimension.choices is not None:
        return value
    assert isinstance(value, int | float)
    low, high = bounds(dimension)
    if is_whole(key):
        return min(max(round(value), int(low)), int(high))
    digits = DIGITS if dimension.step is None else 10
    return min(max(float(f"{value:.{digits}g}"), float(low)), float(high))


def draw_points(space: Space, count: int, seed: int, where: str) -> list[Point]:
    """Return so many different points that can be trials; more begin with the same ones.

    Raises:
        ConfigurationError: beginning with `where`, if there are not as many in bounded tries.
    """
    generator = random.Random(seed)
    found: dict[str, Point] = {}
    tries, reason = 0, ""
    while len(found) < count:
        point = space.draw(generator)
        tries += 1
        try:
            space.specification("trial", point, short=True)
            space.specification("trial", point, short=False)
        except UnfitError as error:
            reason = f"; the last one: {error}"
        else:
            if str(point) not in found:
                found[str(point)], tries = point, 0
        if tries == TRIES:
            kind = "different trials" if found else "trial"
            raise ConfigurationError(
                f"{where}: {TRIES} draws found no {'other ' if found else ''}point that can be a "
                f"trial, so there are {len(found)} {kind} of the {count}{reason}"
            )
    return list(found.values())


def check_space(
    search: Search, recipe: Recipe, where: Callable[[str], str], otherwise: str
) -> None:
    """Check that a space's keys and values are a recipe's.

    Args:
        search: as it was written.
        recipe: that it starts from.
        where: returns the place of a key of the space, for errors.
        otherwise: the place of the search.

    Raises:
        ConfigurationError: if they are not.
    """
    seen: list[str] = []

    def check_value(key: str, value: Value, at: str) -> None:
        try:
            Recipe.model_validate_json(
                json.dumps(recipe.model_dump(mode="json") | {key: value}), strict=True
            )
        except ValidationError as error:
            # What only other keys do not allow is said of a point.
            if own := [each for each in error.errors() if each["loc"] == (key,)]:
                raise ConfigurationError(f"{at}: {sentence(own[0], Recipe)}") from error

    for key, dimension in search.space.items():
        known(key, Recipe.model_fields, where(key), "recipe key")
        place = f"{where(key)}: {key}"
        if key in FIXED:
            raise ConfigurationError(f"{place}: must be the same in all runs; put it in set")
        for name in ("set", "short"):
            if key in getattr(search, name):
                raise ConfigurationError(f"{place}: is in {name} too; leave it in one")
        for other in [*dimension.when, *filter(None, [dimension.same_as])]:
            known(other, Recipe.model_fields, place, "recipe key")
            if other in search.space and other not in seen:
                raise ConfigurationError(f"{place}: depends on {other}, which must come before it")
        for other, among in dimension.when.items():
            tried = search.space[other].choices if other in search.space else None
            for value in among:
                check_value(other, value, f"{place}: when")
                if tried is not None and value not in tried:
                    raise ConfigurationError(
                        f"{place}: when: {shown(value)} is not among the choices of {other}"
                    )
        seen.append(key)
        for value in ends(key, dimension, place):
            check_value(key, value, where(key))
    for key in search.constraint.product if search.constraint else ():
        known(key, Recipe.model_fields, f"{otherwise}: constraint", "recipe key")
        if not isinstance(getattr(recipe, key), int | float):
            raise ConfigurationError(f"{otherwise}: constraint: {key} is no number in the recipe")
        for value in (search.space[key].choices if key in search.space else None) or ():
            if not isinstance(value, int | float):
                raise ConfigurationError(
                    f"{otherwise}: constraint: {key} has the choice {shown(value)}, which is no "
                    "number"
                )


def ends(key: str, dimension: Dimension, place: str) -> Sequence[Value]:
    """Return the values of a key that the recipe must allow, or else not those between either.

    Raises:
        ConfigurationError: if there is a range, and the key is no such number.
    """
    if dimension.same_as is not None:
        return ()
    if dimension.choices is not None:
        return dimension.choices
    numbers = [*bounds(dimension), *filter(None, [dimension.step])]
    if not {int, float} & set(types_of(key)):
        raise ConfigurationError(f"{place}: is no number; give its choices")
    if is_whole(key) and any(isinstance(number, float) for number in numbers):
        raise ConfigurationError(f"{place}: is a whole number; low, high and step must be too")
    return numbers[:2]


def is_whole(key: str) -> bool:
    """Return whether a key of the recipe is a whole number."""
    return int in types_of(key)


def types_of(key: str) -> tuple[Any, ...]:
    """Return the types of a recipe's key."""
    annotation = Recipe.model_fields[key].annotation
    return get_args(annotation) or (annotation,)
