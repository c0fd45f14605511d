"""The plan of an experiment: its runs, and how their results are compared.

The configuration makes it; `collect.py` reads the runs that exist.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

from ptbench.configuration.specification import Cell
from ptbench.model.recipe import Implementation

if TYPE_CHECKING:
    from ptbench.configuration.loading import Study

Compared = Literal["valid_perplexity", "test_perplexity"]  # what frameworks are compared by


class PlannedVariant(NamedTuple):
    """What the analysis must know about a variant."""

    implementation: Implementation = "stock"
    paired: bool = False  # whether its runs of one seed differ by framework alone: no dropout


@dataclass(frozen=True)
class ExperimentPlan:
    """One experiment: its words, its cells, and how its frameworks are compared."""

    name: str
    title: str
    corpus_folder: str  # of results/corpora
    cells: tuple[Cell, ...]  # each once
    equivalence_margin: float  # largest difference that does not matter [nats per token]
    description: str = ""
    metric: Compared = "test_perplexity"
    variants: Mapping[str, PlannedVariant] = field(default_factory=dict)

    def variant(self, name: str) -> PlannedVariant:
        """Return what is known about a variant."""
        return self.variants.get(name, PlannedVariant())


def plan_experiment(study: Study, name: str) -> ExperimentPlan:
    """Return the plan of one of a study's experiments.

    Raises:
        ConfigurationError: if the study has no experiment of this name.
    """
    planned = study.experiment(name)
    return ExperimentPlan(
        name=name,
        title=planned.definition.title,
        description=planned.definition.description,
        corpus_folder=planned.specifications[0].recipe.corpus_folder,
        cells=planned.cells,
        metric=planned.definition.metric,
        equivalence_margin=study.config.equivalence_margin,
        variants={
            each.variant: PlannedVariant(each.recipe.implementation, paired=not each.recipe.drops)
            for each in planned.specifications
        },
    )
