"""What one run is: variants and their names, specifications, and cells.

Every environment imports it, so it needs pydantic and the standard library alone.
"""

from __future__ import annotations

import hashlib
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import Field

from ptbench.backends import Framework
from ptbench.model.recipe import Accelerator, Model, Recipe

# A change of what training or measuring means. Raising it runs every cell again.
PROTOCOL = 3

# What of the package decides what a cell's result is.
TRAINING_CODE = (
    "model", "corpus", "backends", "training", "files.py", "configuration/specification.py"
)  # fmt: skip

# A variant's name is the name of a folder, and part of that of a folder of logs, of which file
# systems allow 255 characters.
LONGEST_NAME = 200

# A recipe's name followed by its overrides, as `variant_name` writes it.
VARIANT_PATTERN = r"[a-z0-9][a-z0-9.-]*(?:\+[a-z][a-z0-9_]*=[A-Za-z0-9_.-]+)*"


def format_override(value: object) -> str:
    """Write one override's value the one way that a variant's name has it.

    Numbers are written in their shortest form (1.0 becomes 1), so that equal values give
    equal names.
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        whole = value.is_integer() and abs(value) < 1e15
        return repr(int(value)) if whole else repr(value).replace("e+", "e")  # + joins overrides
    return str(value)


def variant_name(recipe_name: str, base: Recipe, changed: Recipe) -> str:
    """The one name of `changed` as a variant of the recipe `base`, called `recipe_name`.

    Overrides equal to the recipe's own values are dropped and the others sorted, so one
    configuration has exactly one name: `zaremba-small+dropout=0.5+learning_rate=0.01`.
    """
    names = sorted(Recipe.model_fields)
    overrides = [
        f"+{name}={format_override(getattr(changed, name))}"
        for name in names
        if getattr(changed, name) != getattr(base, name)
    ]
    return recipe_name + "".join(overrides)


# What a configuration changes in every variant: less of the work, or another text.
REDUCED = ("corpus=", "subset=", "budget=")


def whole(variant: str) -> str:
    """Return a variant's name without what a configuration made of it.

    Published numbers and findings are of the variant of that name.
    """
    recipe, *overrides = variant.split("+")
    return "+".join([recipe, *(each for each in overrides if not each.startswith(REDUCED))])


def reductions(variant: str) -> list[str]:
    """Return what a configuration made of a variant, such as `budget=quick`."""
    return [each for each in variant.split("+")[1:] if each.startswith(REDUCED)]


def is_smoke(variant: str) -> bool:
    """Return whether a variant is of the budget `smoke`, whose runs take a few steps."""
    return "budget=smoke" in reductions(variant)


class Specification(Model):
    """One variant resolved: all that a framework is told, whatever its devices and seed.

    Written as JSON by the workflow and read by the trainer; frameworks never read YAML.
    """

    protocol: int = Field(PROTOCOL, description="Version of what training and measuring mean.")
    variant: str = Field(description="Name of the variant.")
    recipe: Recipe = Field(description="The recipe with its overrides applied.")
    corpus_definition: dict[str, Any] = Field(
        description="What is in the corpus, as configured; not where it is fetched from."
    )
    accelerator: Accelerator = Field("cpu", description="Kind of device that trains.")

    def text(self) -> str:
        """The specification as JSON, without the recipe's keys that have their default values.

        Two runs mean the same exactly if their texts are equal. A new key, whose default is what
        was done before, changes no text. Changing a default changes what runs mean: raise
        `PROTOCOL` with it.
        """
        content = self.model_dump(mode="json", exclude={"recipe"})
        content["recipe"] = self.recipe.model_dump(mode="json", exclude_defaults=True)
        return json.dumps(content, sort_keys=True, separators=(",", ":"))

    def on(self, accelerator: Accelerator) -> Specification:
        """Return the same, to be trained on a kind of device."""
        if accelerator == self.accelerator:
            return self
        return self.model_copy(update={"accelerator": accelerator})

    @property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits that change exactly when the meaning of the run does."""
        return hashlib.sha256(self.text().encode()).hexdigest()[:12]


class Cell(Model):
    """One run: the unit of scheduling, failure and re-run."""

    variant: str = Field(pattern=f"^{VARIANT_PATTERN}$", description="Name of the variant.")
    framework: Framework = Field(description="Framework that trains.")
    devices: int = Field(ge=1, le=1024, description="Data-parallel replicas.")
    seed: int = Field(ge=0, lt=2**31, description="Seed of initial parameters and dropout.")

    @property
    def path(self) -> str:
        """Folder of the cell, relative to `results/cells`."""
        return f"{self.variant}/{self.framework}/devices-{self.devices}/seed-{self.seed}"


@cache
def code_digest() -> str:
    """Return twelve hexadecimal digits that change with any of the files that train a cell."""
    package = Path(__file__).parents[1]
    found = hashlib.sha256()
    for part in TRAINING_CODE:
        files = [package / part] if part.endswith(".py") else sorted((package / part).rglob("*.py"))
        for file in files:
            found.update(f"{file.relative_to(package)}\0".encode() + file.read_bytes())
    return found.hexdigest()[:12]


def parse_cell_path(path: str) -> Cell:
    """The cell whose `path` this is.

    Raises:
        ValueError: if it is not `{variant}/{framework}/devices-{devices}/seed-{seed}`.
    """
    match = re.fullmatch(r"([^/]+)/([^/]+)/devices-(\d+)/seed-(\d+)", path)
    if match is None:
        raise ValueError(f"{path} is not of the form variant/framework/devices-N/seed-N")
    variant, framework, devices, seed = match.groups()
    return Cell.model_validate(
        {"variant": variant, "framework": framework, "devices": int(devices), "seed": int(seed)}
    )
