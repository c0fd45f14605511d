"""The runs under results/published say what the documents say of them."""

from __future__ import annotations

import csv
from pathlib import Path

from ptbench.backends import FRAMEWORKS

PUBLISHED = Path(__file__).parents[2] / "results" / "published"


def test_a_mixture_closes_more_than_half_of_the_softmax_bottleneck_in_every_framework() -> None:
    """As the experiment's description has it; the true process has 2.6923 nats on the test text."""
    with (PUBLISHED / "softmax-bottleneck" / "table.csv").open() as file:
        nll = {(r["variant"], r["framework"]): float(r["test_nll"]) for r in csv.DictReader(file)}
    for framework in FRAMEWORKS:
        softmax, mixture = (nll[f"bottleneck-{head}", framework] for head in ("softmax", "mixture"))
        assert (softmax - mixture) / (softmax - 2.6923) > 0.5
