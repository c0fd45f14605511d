"""What each framework says to classic mistakes, read from `mistakes.yaml`."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from ptbench.model.recipe import Model

FILE = Path(__file__).with_suffix(".yaml")


class Mistake(Model):
    """One mistake in one framework."""

    error: str | None = Field(None, description="Class of the error; null: there was none.")
    message: str = Field(description="Its message, or what happened without one.")
    names_cause: bool = Field(False, description="Whether the message says what is wrong.")


def read_mistakes() -> dict[str, dict[str, Mistake]]:
    """Return every framework's mistakes by name, all in the same order."""
    from ptbench.yaml import read_yaml  # needs what frameworks' environments do not have

    return {
        framework: {name: Mistake.model_validate(said) for name, said in found.items()}
        for framework, found in read_yaml(FILE).items()
    }
