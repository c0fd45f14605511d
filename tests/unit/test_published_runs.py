"""The documents say what the runs under results/published say."""

from __future__ import annotations

import csv
import json
import statistics
from pathlib import Path

from ptbench.backends import FRAMEWORKS

ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT / "results" / "published"


def test_a_mixture_closes_more_than_half_of_the_softmax_bottleneck_in_every_framework() -> None:
    """As the experiment's description has it; the true process has 2.6923 nats on the test text."""
    with (PUBLISHED / "softmax-bottleneck" / "table.csv").open() as file:
        nll = {(r["variant"], r["framework"]): float(r["test_nll"]) for r in csv.DictReader(file)}
    for framework in FRAMEWORKS:
        softmax, mixture = (nll[f"bottleneck-{head}", framework] for head in ("softmax", "mixture"))
        assert (softmax - mixture) / (softmax - 2.6923) > 0.5


def test_the_speeds_of_a_gpu_in_the_documentation_are_those_that_were_measured() -> None:
    page = (ROOT / "docs" / "gpu.md").read_text()
    with (PUBLISHED / "gpu" / "speed.csv").open() as file:
        for row in csv.DictReader(file):
            speed = (
                f"{float(row['tokens_per_second']):,.0f} ({float(row['fraction_of_bound']):.2f})"
            )
            [line] = [each for each in page.splitlines() if each.startswith(f"| {row['model']} |")]
            assert f"| {speed} |" in line


def test_the_perplexities_of_a_gpu_in_the_documentation_are_those_of_the_runs() -> None:
    page = (ROOT / "docs" / "gpu.md").read_text()
    runs = [
        json.loads(f.read_text()) for f in (PUBLISHED / "gpu").glob("cells/*/*/*/*/metrics.json")
    ]
    assert len(runs) == 3
    for name, key in {"train, last epoch": "train", "validation": "valid", "test": "test"}.items():
        values = [run[key]["perplexity"] for run in runs]
        said = f"| {name} | {statistics.mean(values):.2f} ± {statistics.stdev(values):.2f} |"
        assert said in page
    test = [run["test"]["perplexity"] for run in runs]
    readme = (ROOT / "README.md").read_text()
    assert f"{statistics.mean(test):.2f} ± {statistics.stdev(test):.2f} in PyTorch" in readme
