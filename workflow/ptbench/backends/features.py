"""What each framework has built in, read from `features.yaml`."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from ptbench.model.recipe import Model
from ptbench.yaml import read_yaml

FILE = Path(__file__).with_suffix(".yaml")


class Feature(Model):
    """How one framework provides one feature."""

    built_in: bool = Field(description="The framework has it; otherwise it is written here.")
    symbols: list[str] = Field([], description="Public names of the framework that are used.")
    code: list[str] = Field([], description="Where it is written here: module.object.")
    note: str | None = Field(None, description="What else a reader should know.")
    absent: str | None = Field(None, description="Why it is not here at all.")


def read_features() -> dict[str, dict[str, Feature]]:
    """Return every framework's features by name, all in the same order."""
    return {
        framework: {name: Feature.model_validate(given) for name, given in features.items()}
        for framework, features in read_yaml(FILE).items()
    }
