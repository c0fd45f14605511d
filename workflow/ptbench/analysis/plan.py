"""The plan of an experiment: its runs, and how their results are compared.

The configuration makes it; `collect.py` reads the runs that exist.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from ptbench.backends import Framework
from ptbench.configuration.experiments import Compared, Value
from ptbench.configuration.obstacles import Obstacle
from ptbench.configuration.specification import Cell
from ptbench.model.recipe import Accelerator, Implementation, Model, Name

if TYPE_CHECKING:
    from ptbench.configuration.study import Study

Settings = dict[str, Value]  # keys of the recipe and their values


class PlannedVariant(Model):
    """What the analysis must know about a variant."""

    implementation: Implementation = Field("stock", description="As the recipe says.")
    paired: bool = Field(
        False, description="Whether runs of one seed differ by framework alone: no dropout."
    )
    settings: Settings = Field(
        {}, description="Its values of the recipe's keys in which the experiment's variants differ."
    )


class ExperimentPlan(Model):
    """One experiment: its words, its cells, and how its frameworks are compared."""

    name: Name = Field(description="Name of the experiment.")
    title: str = Field(min_length=1, description="Heading in the report.")
    description: str = Field("", description="One paragraph on what is compared and why.")
    corpus_folder: Name = Field(description="Prepared corpus, a folder of results/corpora.")
    cells: tuple[Cell, ...] = Field(min_length=1, description="All planned runs, each once.")
    variants: dict[str, PlannedVariant] = Field({}, description="What is known of variants.")
    accelerators: dict[Framework, Accelerator] = Field(
        {}, description="Kind of device that each framework trains on."
    )
    rents: dict[Framework, float] = Field(
        {}, description="Rent of an hour of the GPU or CPU core that each framework trains on."
    )
    currency: str = Field("USD", description="Of the rents.")
    cannot_run: dict[Framework, Obstacle] = Field(
        {}, description="Frameworks with runs that are not possible where the study runs, and why."
    )
    fingerprints: dict[str, dict[Framework, str]] = Field(
        {}, description="Of the specifications as they are now, by variant, of those frameworks."
    )
    found: dict[str, str] = Field(
        {}, description="Files that say what a search found, by variant, if there are such runs."
    )
    baseline: str | None = Field(
        None, description="Variant that the others are compared with; null: the first."
    )
    metric: Compared = Field("test_perplexity", description="What its rows are compared by.")
    equivalence_margin: float = Field(
        gt=0, description="Largest difference that does not matter [nats/token]."
    )

    def variant(self, name: str) -> PlannedVariant:
        """Return what is known about a variant."""
        return self.variants.get(name, PlannedVariant())

    @property
    def baseline_variant(self) -> str:
        """Return the variant that the others are compared with."""
        return self.baseline or self.cells[0].variant


def read_plan(content: Mapping[str, Any]) -> ExperimentPlan:
    """Return a plan from plain values: its own fields, with the cells' axes in place of cells.

    Args:
        content: has `variants`, `frameworks`, `devices` and `seeds`, whose product are the cells.

    Raises:
        KeyError, ValueError: if it is not such a plan.
    """
    axes = {name: content[name] for name in ("variants", "frameworks", "devices", "seeds")}
    cells = tuple(
        Cell(variant=variant, framework=framework, devices=devices, seed=seed)
        for variant, framework, devices, seed in itertools.product(*axes.values())
    )
    given = {name: value for name, value in content.items() if name not in axes}
    return ExperimentPlan(cells=cells, variants=axes["variants"], **given)


def plan_experiment(study: Study, name: str) -> ExperimentPlan:
    """Return the plan of one of a study's experiments.

    Raises:
        ConfigurationError: if the study has no experiment of this name.
    """
    return read_plan(json.loads(study.plan(name)))
