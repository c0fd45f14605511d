"""The documents say what the runs under results/published say."""

from __future__ import annotations

import csv
import json
import math
import re
import statistics
from pathlib import Path

import pytest

from ptbench.analysis.agreement import judge_published
from ptbench.analysis.published import read_published
from ptbench.analysis.statistics import t_interval
from ptbench.backends import FRAMEWORKS
from ptbench.configuration.config import read_configuration
from ptbench.report.formatting import framework_name

ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT / "results" / "published"


def test_a_mixture_closes_more_than_half_of_the_softmax_bottleneck_in_every_framework() -> None:
    """As the experiment's description has it; the true process has 2.6923 nats on the test text."""
    with (PUBLISHED / "softmax-bottleneck" / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    nll = {(r["variant"], r["framework"]): float(r["test_nll"]) for r in rows}
    readme = (ROOT / "README.md").read_text()
    for variant in ("bottleneck-softmax", "bottleneck-mixture"):
        own = [row for row in rows if row["variant"] == variant]
        (mean,) = {f"{float(row['test_perplexity']):.2f}" for row in own}  # alike in all
        std = max(float(row["test_perplexity_std"]) for row in own)
        assert f"{mean} ± {std:.2f}" in readme
    for framework in FRAMEWORKS:
        softmax, mixture = (nll[f"bottleneck-{head}", framework] for head in ("softmax", "mixture"))
        assert (softmax - mixture) / (softmax - 2.6923) > 0.5


def test_overwritten_batches_alone_make_the_collapse() -> None:
    """As docs/questions.md has it, in its table and in words."""
    with (PUBLISHED / "keras-collapse" / "table.csv").open() as file:
        rows = {(r["variant"], r["framework"]): r for r in csv.DictReader(file)}
    page = (ROOT / "docs" / "questions.md").read_text(encoding="utf-8")
    for framework in FRAMEWORKS:
        found = {}
        for variant, start in {
            "": "| 35 | 700 | no |",
            "+sequence_length=45": "| 45 | 900 | no |",
            "+aliased=true": "| 35 | 700 | yes |",
            "+aliased=true+sequence_length=45": "| 45 | 900 | yes |",
        }.items():
            row = rows[f"keras-collapse{variant}", framework]
            assert row["n_ok"] == "3"
            valid, valid_std, train, train_std = (
                f"{float(row[f'{split}_perplexity{what}']):.1f}"
                for split in ("valid", "train")
                for what in ("", "_std")
            )
            assert f"{start} {valid} ± {valid_std} | {train} ± {train_std} |" in page
            found[variant] = float(row["valid_perplexity"])
        ratio = found["+aliased=true+sequence_length=45"] / found["+sequence_length=45"]
        assert round(100 * (ratio - 1)) == 55


def test_the_queue_mixes_rows_from_838_tokens_on() -> None:
    """As decision 10 has it, in its table."""
    with (PUBLISHED / "keras-collapse" / "queue.csv").open() as file:
        rows = list(csv.DictReader(file))
    (decision,) = (ROOT / "docs" / "decisions").glob("0010-*.md")
    page = decision.read_text(encoding="utf-8")
    for memory in ("new pages", "new huge pages", "used again"):
        shares = [float(row["rows_mixed"]) for row in rows if row["memory"] == memory]
        assert f"| {' | '.join(f'{100 * share:.0f} %' for share in shares)} |" in page
    new = {int(r["tokens"]): float(r["rows_mixed"]) for r in rows if r["memory"] == "new pages"}
    assert all((share > 0.5) == (tokens > 838) for tokens, share in new.items())


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
    readme = (ROOT / "README.md").read_text()

    def summaries(variant: str, framework: str) -> dict[str, str]:
        """Return mean ± std of each split's perplexity; one run has no std."""
        runs = [
            json.loads(file.read_text())
            for file in (PUBLISHED / "gpu" / "cells" / variant / framework).glob("*/*/metrics.json")
        ]
        found = {}
        for split in ("train", "valid", "test"):
            found[split] = mean_and_std([run[split]["perplexity"] for run in runs])
        return found

    report = PUBLISHED / "gpu" / "report" / "experiments"
    for variant in ("zaremba-small", "zaremba-medium"):
        with (report / variant / "table.csv").open() as file:
            for row in csv.DictReader(file):
                if int(row["n_ok"]):
                    mean = summaries(variant, row["framework"])["test"].partition(" ")[0]
                    assert float(row["test_perplexity"]) == pytest.approx(float(mean), abs=0.01)

    pytorch, jax = (summaries("zaremba-small", framework) for framework in ("pytorch", "jax"))
    medium = summaries("zaremba-medium", "jax")
    for split, name in {
        "train": "train, last epoch", "valid": "validation", "test": "test"
    }.items():  # fmt: skip
        assert f"| {name} | {pytorch[split]} | {jax[split]} |" in page
        assert f"| {name} | | {medium[split]} |" in page
    assert f"{pytorch['test']} in PyTorch and {jax['test']} in JAX" in readme
    assert f"ends at {medium['test']}" in readme


def test_the_speeds_of_cores_in_the_readme_are_those_of_the_runs() -> None:
    table = PUBLISHED / "criteria" / "report" / "experiments" / "criteria" / "table.csv"
    readme = " ".join((ROOT / "README.md").read_text().split())
    speeds: dict[tuple[str, str], dict[str, float]] = {}
    with table.open() as file:
        for row in csv.DictReader(file):
            if row["tokens_per_second_median"]:
                each = speeds.setdefault((row["variant"], row["devices"]), {})
                each[framework_name(row["framework"])] = float(row["tokens_per_second_median"])

    def ends(found: dict[str, float], write: str, unit: str = "") -> str:
        (low, least), *_, (high, most) = sorted(found.items(), key=lambda each: each[1])
        return f"{least:{write}} ({low}) to {most:{write}}{unit} ({high})"

    small = "criteria-small+budget=quick"
    one, two = (speeds[small, devices] for devices in ("1", "2"))
    assert ends(one, ",.0f", " tokens/s") in readme
    assert ends(speeds[f"{small}+mixtures=5", "1"], ",.0f") in readme
    assert ends({name: two[name] / one[name] for name in one}, ".2f", " times") in readme


def test_the_runs_on_cpus_are_those_that_the_documents_count() -> None:
    files = list((PUBLISHED / "zaremba-small" / "cells").glob("*/*/*/*/metrics.json"))
    runs = [json.loads(file.read_text()) for file in files]
    assert all((run["status"], run["epochs"]) == ("ok", 13) for run in runs)
    for file in files:
        assert (
            json.loads(file.with_name("provenance.json").read_text())["git_commit"][:7] == "f7769ea"
        )
    assert len(runs) == 3 * len(FRAMEWORKS)
    readme = (ROOT / "README.md").read_text()
    report = (PUBLISHED / "zaremba-small" / "report" / "report.md").read_text()
    [verdicts] = re.findall(r"Of 10 comparisons of frameworks, [^\n]*? these seeds", report)
    assert verdicts in " ".join(readme.split())
    for framework in FRAMEWORKS:
        own = [run for run in runs if run["cell"]["framework"] == framework]
        valid, test = (
            mean_and_std([run[split]["perplexity"] for run in own]) for split in ("valid", "test")
        )
        ends = t_interval([run["test"]["nll"] for run in own])
        assert ends
        interval = " to ".join(f"{math.exp(end):.2f}" for end in ends)
        line = f"| {framework_name(framework)} | {len(own)} | {valid} | {test} | {interval} |"
        assert line in readme


def test_the_readme_judges_zhangs_numbers_by_our_runs_in_tensorflow() -> None:
    files = (PUBLISHED / "zaremba-small" / "cells").glob("*/tensorflow/*/*/metrics.json")
    runs = [json.loads(file.read_text()) for file in files]
    margin = read_configuration([ROOT / "config.yaml"])["equivalence_margin"]
    readme = (ROOT / "README.md").read_text()
    published = read_published(ROOT / "workflow" / "papers")
    for split, name in {"train": "training", "valid": "validation", "test": "test"}.items():
        ours = [run[split]["perplexity"] for run in runs]
        said = [
            f"{each.value:.2f}, {judge_published(each, ours, (), margin).verdict}"
            for each in published
            if (each.experiment, each.framework, each.metric)
            == ("zaremba-small", "tensorflow", f"{split}_perplexity")
        ]
        assert len(said) == 2  # two of its kernels
        assert f"| {name} | {mean_and_std(ours)} | {' | '.join(said)} |" in readme


def test_few_softmaxes_explode_at_the_full_rate() -> None:
    """As docs/questions.md has it, in its table."""
    page = (ROOT / "docs" / "questions.md").read_text(encoding="utf-8")
    files = {
        file
        for folder in ("questions", "few-softmaxes")
        for file in (PUBLISHED / folder / "cells").glob("question-mixture*/*/*/*/history.csv")
    }
    assert len(files) == 5
    for history in files:
        with history.open() as file:
            train = [f"{float(row['train_perplexity']):,.0f}" for row in csv.DictReader(file)]
        run = json.loads(history.with_name("metrics.json").read_text())
        settings = dict(part.split("=") for part in run["cell"]["variant"].split("+")[1:])
        begin = f"| {settings.get('mixtures', 1)} | {settings.get('learning_rate', 1)} | {train[0]}"
        if run["status"] == "diverged":
            assert f"{begin} | diverged | | |" in page
        else:
            valid = f"{run['valid']['perplexity']:,.0f}"
            assert f"{begin} | {train[3]} | {train[-1]} | {valid} |" in page


def test_the_answers_to_open_questions_are_those_of_the_runs() -> None:
    """As docs/questions.md has them, in its tables."""
    page = (ROOT / "docs" / "questions.md").read_text(encoding="utf-8")
    found: dict[str, dict[str, str]] = {}
    for file in (PUBLISHED / "questions" / "report" / "experiments").glob("*/table.csv"):
        with file.open() as rows:
            for row in csv.DictReader(rows):
                if int(row["n_ok"]) == 3:
                    found[row["variant"]] = {
                        split: f"{float(row[f'{split}_perplexity']):.1f} ± "
                        f"{float(row[f'{split}_perplexity_std']):.1f}"
                        for split in ("train", "valid")
                    }
    assert len(found) == 1 + 5 + 2 + 6 + 9

    def seeds(variant: str) -> list[float]:
        """Return the validation perplexity of each seed."""
        files = (PUBLISHED / "questions" / "cells" / variant).glob("*/*/*/metrics.json")
        return [json.loads(f.read_text())["valid"]["perplexity"] for f in sorted(files)]

    lstm = {name.removeprefix("question-lstm"): each for name, each in found.items()}
    for length in (20, 35, 70):
        own = f"+sequence_length={length}" if length != 20 else ""
        carried, windows = lstm[own]["valid"], lstm[f"+feeding=windows{own}"]["valid"]
        logs = [
            math.log(each / other)
            for each, other in zip(
                seeds(f"question-lstm+feeding=windows{own}"), seeds(f"question-lstm{own}"),
                strict=True,
            )
        ]  # fmt: skip
        ends = t_interval(logs)
        assert ends
        mean, low, high = (f"{100 * math.expm1(x):.1f}" for x in (statistics.mean(logs), *ends))
        line = f"| {length} | {carried} | {windows} | {mean} % | {low} to {high} % |"
        assert line in page
    per_token = "+objective=mean_per_token"
    for setting, variant in {
        "sum over time | 1 | 5": "",
        "mean per token | 1 | 5": per_token,
        "mean per token | 20 | 0.25": f"+clip_norm=0.25+learning_rate=20{per_token}",
    }.items():
        assert f"| {setting} | {lstm[variant]['valid']} |" in page
    for model, variant in {
        "dense": "",
        "10 % of the weights kept": "+kept_weights=0.1",
        "1 % of the weights kept": "+kept_weights=0.01",
        "dense, dropout 0.25": "+dropout=0.25",
        "dense, dropout 0.5": "+dropout=0.5",
        "dense, weight decay 1e-5": "+weight_decay=1e-05",
        "dense, weight decay 1e-4": "+weight_decay=0.0001",
    }.items():
        assert f"| {model} | {lstm[variant]['train']} | {lstm[variant]['valid']} |" in page
    for layers in (2, 4, 6):
        own = f"question-gru+layers={layers}" if layers != 2 else "question-gru"
        low, middle = (found[f"{own}+learning_rate={rate}"]["valid"] for rate in ("1.25", "5"))
        ends = f"{min(seeds(own)):,.0f} to {max(seeds(own)):,.0f}"
        high = found[own]["valid"] if layers == 2 else ends
        assert f"| {layers} | {low} | {middle} | {high} |" in page


def mean_and_std(values: list[float]) -> str:
    """Write a mean with the sample standard deviation; one value has none."""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"
