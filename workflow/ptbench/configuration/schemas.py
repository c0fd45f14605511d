"""JSON Schemas of the YAML that people write, for their editors: generated, never edited."""

from __future__ import annotations

import json
from typing import Any

from ptbench.configuration.config import Config, CorpusFile
from ptbench.configuration.experiments import ExperimentFile, Paper
from ptbench.model.recipe import Model, Recipe


def schemas() -> dict[str, str]:
    """The text of every schema by its file name."""
    return {
        "config.schema.json": schema(Config),
        "corpora.schema.json": schema(CorpusFile),
        "paper.schema.json": schema(Paper),
        "experiments.schema.json": json.dumps(experiments_schema(), indent=2) + "\n",
    }


def schema(model: type[Model]) -> str:
    """The schema of one model as the text of a file."""
    return json.dumps(model.model_json_schema(), indent=2) + "\n"


def experiments_schema() -> dict[str, Any]:
    """The schema of a file of experiments, its recipes in full with `extends`."""
    result = ExperimentFile.model_json_schema()
    recipe = Recipe.model_json_schema()
    recipe["properties"] = {
        "extends": {"type": "string", "description": "Recipe whose keys this one starts from."},
        **recipe["properties"],
    }
    result.setdefault("$defs", {})["Recipe"] = recipe
    result["properties"]["recipes"]["additionalProperties"] = {"$ref": "#/$defs/Recipe"}
    return result
