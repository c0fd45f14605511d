"""What an experiment asks for, as the analysis needs it: the planned cells and how to compare them.

The configuration makes it; the cells that exist are read by `collect.py`.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from ptbench.analysis.statistics import DEFAULT_MARGIN
from ptbench.configuration.specification import Cell
from ptbench.model.recipe import Implementation, Model, Name

if TYPE_CHECKING:
    from ptbench.configuration.study import Study

Metric = Literal["valid_perplexity", "test_perplexity"]


class ExperimentPlan(Model):
    """One experiment: its words, its cells, and what its frameworks are compared by."""

    name: Name = Field(description="Name of the experiment.")
    title: str = Field(min_length=1, description="Heading in the report.")
    description: str = Field("", description="One paragraph on what is compared and why.")
    corpus_folder: Name = Field(description="Prepared corpus, a folder of results/corpora.")
    cells: tuple[Cell, ...] = Field(min_length=1, description="All planned runs.")
    implementations: dict[str, Implementation] = Field(
        {}, description="Of each variant whose implementation is not stock."
    )
    metric: Metric = Field("test_perplexity", description="What the frameworks are compared by.")
    equivalence_margin: float = Field(
        DEFAULT_MARGIN, gt=0, description="Largest difference that does not matter [nats/token]."
    )

    @model_validator(mode="after")
    def _cells_are_distinct(self) -> Self:
        if len(set(self.cells)) != len(self.cells):
            raise ValueError("a cell is planned twice")
        return self


def read_plan(content: Mapping[str, Any]) -> ExperimentPlan:
    """Return the plan that `ptbench.configuration.study.PlannedExperiment.plan` describes."""
    names = ("variants", "frameworks", "devices", "seeds")
    axes = [content[name] for name in names]
    return ExperimentPlan(
        cells=tuple(
            Cell(variant=variant, framework=framework, devices=devices, seed=seed)
            for variant, framework, devices, seed in itertools.product(*axes)
        ),
        implementations={
            variant: facts["implementation"]
            for variant, facts in axes[0].items()
            if facts["implementation"] != "stock"
        },
        **{key: value for key, value in content.items() if key not in names},
    )


def plan_experiment(study: Study, name: str) -> ExperimentPlan:
    """Return the plan of one of a study's experiments.

    Raises:
        ConfigurationError: if the study has no experiment of this name.
    """
    return read_plan(json.loads(study.plan(name)))
