"""The page: whole, self-contained, accessible, and silent about nothing that was planned."""

from __future__ import annotations

import csv
import itertools
import json
import re
import shutil
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from tests.support.fake_results import (
    metrics,
    plan,
    score_of,
    write_cell,
    write_corpus,
    write_diverged,
    write_results,
    write_unknown,
)

from ptbench.analysis.answers import answer
from ptbench.analysis.collect import AnalysisError
from ptbench.analysis.experiment import Analysis
from ptbench.analysis.plan import ExperimentPlan, PlannedVariant
from ptbench.analysis.published import read_published
from ptbench.files import write_atomically
from ptbench.measurement.profile import Profile
from ptbench.report.experiment import analyse_experiment
from ptbench.report.experiment_page import write_experiment_page
from ptbench.report.overview import read_analysis, write_overview
from ptbench.report.paper_page import write_paper_page
from ptbench.report.site import RunFacts, Site
from ptbench.training.attempts import Attempt

PUBLISHED = Path(__file__).parents[2] / "workflow" / "papers"
FACTS = RunFacts(
    created="1 January 2030, 12:00 UTC",
    version="0.0.0",
    commit="0123456789abcdef",
    machine="a machine",
)
PHASE_SECONDS = {
    "feed": 0.01, "forward": 0.04, "backward": 0.045, "update": 0.005, "step": 0.09,
    "evaluation": 0.03,
}  # fmt: skip
VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """The elements of a page, each with its attributes; raises on unbalanced tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in {"style", "script"}:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def attributes(self, tag: str, name: str) -> list[str]:
        return [a[name] or "" for t, a in self.elements if t == tag and name in a]


def page_of(results: Path, experiment: ExperimentPlan) -> Path:
    """Analyse an experiment, write its page of the report, and return where that is."""
    folder = results / "experiments" / experiment.name
    analysis = analyse_experiment(experiment, results, PUBLISHED, folder)
    return write_experiment_page(Site(results / "report", results, FACTS), analysis, folder)


def build(results: Path) -> Path:
    """Two experiments, with a diverged run, missing runs and an invalid row; the report."""
    demo = plan("demo", variants=("tiny", "tiny+dropout=0.5"))
    write_results(results, demo, speed={"jax": 30_000.0})
    write_corpus(results, floor_perplexity=96.0, best_bigram_nll_nats=5.0)
    real = plan(
        "zaremba-small", ("zaremba-small",), corpus_folder="ptb", description="Small & real."
    )
    write_results(results, real)
    write_diverged(results, real.cells[0])
    for cell in real.cells[-2:]:
        (results / "cells" / cell.path / "metrics.json").unlink()
    attempt = Attempt(results / "attempts" / real.cells[-1].path, real.cells[-1].path, "", "")
    assert attempt.open(results / "cells" / real.cells[-1].path) is None
    attempt.close("failed", "MemoryError: no room")
    command = {"command": "uv run snakemake --profile slurm"}
    (results / "study.json").write_text(json.dumps(command))
    folders = []
    for experiment in (demo, real):
        page_of(results, experiment)
        folders.append(results / "experiments" / experiment.name)
    site = Site(results / "report", results, FACTS)
    paper = results / "papers" / "zaremba2014"
    answers = answer(PUBLISHED / paper.name, [read_analysis(folder) for folder in folders])
    write_atomically(paper / "answers.json", answers.model_dump_json())
    write_paper_page(site, answers, paper)
    return write_overview(site, folders, [paper]).parent


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="module")
def pages(report: Path) -> dict[str, Page]:
    """Every page by its path."""
    return {
        str(path.relative_to(report)): Page(path.read_text(encoding="utf-8"))
        for path in sorted(report.rglob("*.html"))
    }


@pytest.fixture(scope="module")
def page(pages: dict[str, Page]) -> Page:
    """The page of the experiment with a diverged run and missing ones."""
    return pages["experiments/zaremba-small.html"]


def test_the_experiment_folder_is_whole(report: Path) -> None:
    folder = report.parent / "experiments" / "demo"
    written = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    figures = {"perplexity", "learning-curves", "tokens-per-second", "seconds", "front"}
    assert written == {
        *(f"figures/{name}.svg" for name in figures),
        *("table.csv", "table.md", "table.tex", "comparison.csv", "differences.csv"),
        *("variants.csv", "curves.csv", "analysis.json"),
    }


def test_analysis_json_survives_reading(report: Path) -> None:
    text = (report.parent / "experiments" / "zaremba-small" / "analysis.json").read_text()
    analysis = Analysis.model_validate_json(text)
    assert analysis.model_dump_json(indent=1) + "\n" == text
    assert (analysis.count("ok"), analysis.count("diverged"), analysis.count("missing")) == (
        12,
        1,
        2,
    )


def test_the_report_has_every_page(pages: dict[str, Page]) -> None:
    assert pages.keys() == {
        *("index.html", "frameworks.html", "methods.html", "runs.html"),
        *("experiments/demo.html", "experiments/zaremba-small.html", "papers/zaremba2014.html"),
    }


def test_pages_need_no_network_and_open_without_script(pages: dict[str, Page]) -> None:
    for page in pages.values():
        assert not [tag for tag, _ in page.elements if tag in {"iframe", "img", "object"}]
        for _, attributes in page.elements:
            assert "src" not in attributes
            for name, value in attributes.items():
                assert name.startswith("xmlns") or "//" not in (value or "")
                assert not name.startswith("on")


def test_every_link_leads_to_a_file_or_a_place_on_a_page(
    report: Path, pages: dict[str, Page]
) -> None:
    ids = {name: {a.get("id") for _, a in page.elements} for name, page in pages.items()}
    for name, page in pages.items():
        for link in page.attributes("a", "href"):
            where, _, place = link.partition("#")
            target = (report / name).parent / unquote(where) if where else report / name
            assert target.exists(), (name, link)
            if place:
                assert unquote(place) in ids[str(target.resolve().relative_to(report))], (
                    name,
                    link,
                )
    files = {
        ((report / name).parent / unquote(link)).resolve()
        for name, page in pages.items()
        for link in page.attributes("a", "href")
    }
    assert sum(file.name == "metrics.json" for file in files) == 30 + 13


def test_no_two_elements_share_an_id_and_every_reference_is_kept(pages: dict[str, Page]) -> None:
    for page in pages.values():
        ids = Counter(a["id"] for _, a in page.elements if "id" in a)
        assert max(ids.values(), default=1) == 1
        for value in page.attributes("use", "xlink:href"):
            assert value[1:] in ids
        for _, attributes in page.elements:
            for value in attributes.values():
                if value and "url(#" in value:
                    assert value.split("url(#")[1].split(")")[0] in ids


def test_every_planned_run_is_on_its_page(page: Page) -> None:
    assert "15 planned, 12 ended well, 1 diverged, 2 missing" in page.text
    assert "cells/zaremba-small/jax/devices-1/seed-3/metrics.json" in page.text
    assert "incomplete: seed 2 has no result, seed 3 has no result" in page.text
    assert "the training perplexity of epoch 1 is 2.1e+07, above 1e+06" in page.text


def test_the_first_page_answers_what_a_reader_asks(pages: dict[str, Page]) -> None:
    text = pages["index.html"].text
    assert re.search(r"JAX trains fastest, \d\.\d\d times as fast as \w+", text)
    assert "comparisons of frameworks" in text
    assert "42 of 45 runs ended well, 1 diverged" in text
    assert "Trained on Example CPU" in text
    assert "zaremba-small/jax/devices-1/seed-3 failed : MemoryError: no room" in text
    assert "uv run snakemake --profile slurm -- " in text
    assert re.search(r"Zaremba, Sutskever and Vinyals 2014 \d of \d", text)


def test_runs_without_a_result_say_why_and_what_runs_them(
    report: Path, pages: dict[str, Page]
) -> None:
    results = report.parent
    for name in ("runs.html", "experiments/zaremba-small.html"):
        text = pages[name].text
        assert "MemoryError: no room" in text
        for seed in (2, 3):
            target = results / "cells/zaremba-small/jax/devices-1" / f"seed-{seed}/metrics.json"
            assert f"uv run snakemake --profile slurm -- {target}" in text


def test_the_report_in_markdown_has_a_line_for_everything(report: Path) -> None:
    text = (report / "report.md").read_text()
    for words in ("| PyTorch | 1.2.3 |", "over MXNet |", "[demo](../experiments/demo/table.md)",
                  "Recurrent Neural Network Regularization", "MemoryError: no room"):  # fmt: skip
        assert words in text
    for link in re.findall(r"\]\((.*?)\)", text):
        assert (report / link).is_file(), link
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert all(len({line.count("|") for line in table.splitlines()}) == 1 for table in tables)
    assert len(tables) == 4


def test_pages_say_how_their_numbers_are_made(pages: dict[str, Page], page: Page) -> None:
    for words in (
        "95 % interval",
        "Holm's correction",
        "ended well out of those planned",
    ):
        assert words in pages["methods.html"].text
    assert "Margin of equivalence: 0.02 nats per word, 2.0 % of perplexity" in page.text
    assert "no model can stay below a perplexity of 96.00" in pages["experiments/demo.html"].text
    assert "zhang2018tensorflow, Table 5.1" in page.text
    assert "Small & real." in page.text


def test_headings_skip_no_level_and_tables_name_their_axes(pages: dict[str, Page]) -> None:
    for page in pages.values():
        levels = [int(tag[1]) for tag, _ in page.elements if tag in {"h1", "h2", "h3", "h4"}]
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(b - a <= 1 for a, b in itertools.pairwise(levels))
        assert all(a.get("scope") for tag, a in page.elements if tag == "th")
        assert page.attributes("html", "lang") == ["en"]


def test_figures_follow_the_page_colours_and_have_words(pages: dict[str, Page]) -> None:
    page = pages["experiments/demo.html"]
    assert len(page.attributes("svg", "aria-hidden")) == 5
    styles = " ".join(a.get("style") or "" for _, a in page.elements)
    assert "var(--pytorch)" in styles
    assert "#c0392b" not in styles
    assert page.text.count("Median tokens per second. tiny, 1 device, stock: PyTorch") == 1


@pytest.mark.parametrize(("name", "opened"), [("singh-lstm2-rate", True), ("singh-hidden", False)])
def test_published_numbers_name_their_variants_and_many_are_folded_away(
    tmp_path: Path, name: str, opened: bool
) -> None:
    numbers = [value for value in read_published(PUBLISHED) if value.experiment == name]
    variants = list(dict.fromkeys(value.variant for value in numbers))
    experiment = plan(name, variants, ("keras",))
    write_results(tmp_path, experiment)
    page = Page(page_of(tmp_path, experiment).read_text())
    count = sum(value.framework in (None, "keras") for value in numbers)
    assert (count <= 20) == opened
    assert f"{count} comparisons by metric, variant and framework" in page.text
    assert (("details", {"open": None}) in page.elements) == opened
    for variant in variants:
        of_it = sum(value.variant == variant for value in numbers)
        assert page.text.count(f"Keras {variant}, 1 device ") == of_it


def test_hostile_words_stay_words(tmp_path: Path) -> None:
    experiment = plan(
        frameworks=("jax",), seeds=(1,), title="<script>x</script>", description='"><img src=x>'
    )
    write_results(tmp_path, experiment)
    page = Page(page_of(tmp_path, experiment).read_text())
    assert not [tag for tag, _ in page.elements if tag in {"script", "img"}]
    assert "<script>x</script>" in page.text


def test_trends_are_shown_where_no_variant_can_be_the_best(tmp_path: Path) -> None:
    """One seed of each of five widths says nothing of the best, and the trend is plain."""
    widths = {f"tiny+hidden_size={width}": width for width in (100, 200, 300, 400, 500)}
    known = {name: PlannedVariant(settings={"hidden_size": w}) for name, w in widths.items()}
    experiment = plan(variants=tuple(widths), frameworks=("jax",), seeds=(1,))
    experiment = experiment.model_copy(update={"variants": known})
    for cell in experiment.cells:
        write_cell(tmp_path, metrics(cell, 5 - 0.001 * widths[cell.variant]))
    text = Page(page_of(tmp_path, experiment).read_text()).text
    assert f"JAX, 1 device – – falls with hidden size (p {2 / 120:.3f})" in text


def test_a_published_number_stands_beside_the_interval_by_which_it_is_judged(
    report: Path, page: Page
) -> None:
    text = (report.parent / "experiments" / "zaremba-small" / "analysis.json").read_text()
    lines = [
        line
        for line in Analysis.model_validate_json(text).published
        if line.published.metric == "test_perplexity" and line.expected_low and line.ours
    ]
    assert lines
    for line in lines:
        shown = f"{line.ours:.2f} {line.expected_low:.2f} to {line.expected_high:.2f}"
        assert shown in page.text


@pytest.mark.parametrize(
    ("at_once", "words", "absent"),
    [
        (1, "Every run had its machine to itself", "not a fair comparison"),
        (
            4,
            "Up to 4 runs, those of other studies included, shared a machine, so",
            "its machine to itself",
        ),
        (None, "It was not recorded whether runs shared", "its machine to itself"),
    ],
)
def test_the_page_says_whether_speeds_compare(
    tmp_path: Path, at_once: int | None, words: str, absent: str
) -> None:
    experiment = plan()
    write_results(tmp_path, experiment)
    for provenance in tmp_path.glob("cells/**/provenance.json"):
        content = json.loads(provenance.read_text())
        provenance.write_text(json.dumps({**content, "cells_at_once": at_once}))
    page = Page(page_of(tmp_path, experiment).read_text())
    assert words in page.text
    assert absent not in page.text
    site = Site(tmp_path / "report", tmp_path, FACTS)
    overview = write_overview(site, [tmp_path / "experiments" / experiment.name])
    index = Page(overview.read_text()).text
    assert (f"{words} times and speeds are not" in index) == (at_once == 4)
    assert ("No two frameworks have speeds that can be compared" in index) == (at_once != 1)


def test_the_index_names_the_best_variants_where_one_framework_is_studied(tmp_path: Path) -> None:
    experiment = plan("x", ("a", "b"), ("jax",))
    for cell in experiment.cells:
        nll = (4.5 if cell.variant == "a" else 4.6) + 0.001 * cell.seed
        write_cell(tmp_path, metrics(cell, nll, valid=score_of(nll)))
    page_of(tmp_path, experiment)
    site = Site(tmp_path / "report", tmp_path, FACTS)
    overview = write_overview(site, [tmp_path / "experiments" / experiment.name])
    for text in (Page(overview.read_text()).text, overview.with_name("report.md").read_text()):
        assert "Only JAX has results, so frameworks are not compared" in text
        assert (
            "Best by validation perplexity, with a probability of at least 0.95: a in JAX" in text
        )
        assert "No two frameworks" not in text
    best = "best by validation perplexity, with a probability of at least 0.95: a in JAX"
    said = f"The x experiment: {best}"
    assert f'<h1><a href="experiments/x.html">{said}</a></h1>' in overview.read_text()
    assert f"# [{said}](experiments/x.html)\n" in overview.with_name("report.md").read_text()


def test_a_page_answers_for_the_variants_before_it_says_that_speeds_do_not_compare(
    tmp_path: Path,
) -> None:
    experiment = plan("x", ("a", "b"), ("jax", "mxnet"))
    for cell in experiment.cells:
        nll = (4.5 if cell.variant == "a" else 4.6) + 0.001 * cell.seed
        write_cell(tmp_path, metrics(cell, nll, valid=score_of(nll)))
    write_unknown(tmp_path)
    text = Page(page_of(tmp_path, experiment).read_text()).text
    places = [text.index(said) for said in ("Best by", "Perplexity depends", "No two frameworks")]
    assert places == sorted(places)


def test_intervals_of_the_results_break_before_their_upper_end_alone(report: Path) -> None:
    text = (report / "experiments" / "demo.html").read_text(encoding="utf-8")
    subs = re.findall(r'<span class="sub">([^<]* to[^<]*)</span>', text)
    assert any("s to\N{NO-BREAK SPACE}" in sub for sub in subs)
    assert all(sub.count(" ") == 1 for sub in subs if re.match(r"[0-9]", sub))


def test_an_equivalent_variant_has_the_interval_of_its_test(tmp_path: Path) -> None:
    """That of 95 % passes the margin of 2 %; a minus means better, as between frameworks."""
    experiment = plan("x", ("a", "b"), ("jax",))
    for cell in experiment.cells:
        nll = (4.5 if cell.variant == "a" else 4.498) + 0.009 * (cell.seed - 2)
        write_cell(tmp_path, metrics(cell, nll))
    assert (
        "b −0.2 % −1.8 % to +1.4 % equivalent"
        in Page(page_of(tmp_path, experiment).read_text()).text
    )


def test_a_smoke_study_says_that_nothing_is_concluded(tmp_path: Path) -> None:
    experiment = plan("x", ("tiny+budget=smoke",), ("pytorch", "jax"))
    write_results(tmp_path, experiment)
    page_of(tmp_path, experiment)
    site = Site(tmp_path / "report", tmp_path, FACTS)
    index = Page(write_overview(site, [tmp_path / "experiments" / "x"]).read_text()).text
    assert "differ? Nothing is concluded from runs of the budget smoke." in index
    assert "no two frameworks" not in index
    least = "at most 1 epoch of 6 batches, scored on 1"
    assert f"A reduced study: Runs were made with budget=smoke ({least}). 6 of 6" in index


def test_profiles_that_are_there_are_on_the_page(tmp_path: Path) -> None:
    experiment = plan("demo", ("tiny",), ("pytorch", "jax"), devices=(1, 2), seeds=(1,))
    for cell in experiment.cells:
        speed = 10_000.0 if cell.devices == 1 else 15_000.0
        write_cell(tmp_path, metrics(cell, 4.7, tokens_per_second=speed, test_accuracy=0.25))
    write_corpus(tmp_path)
    own = metrics(experiment.cells[0], 4.7).fingerprint
    for framework, fingerprint in (("pytorch", own), ("jax", "of another recipe")):
        profile = Profile.model_validate(
            {name: {"median": at, "low": at, "high": at} for name, at in PHASE_SECONDS.items()}
            | {
                "fingerprint": fingerprint, "variant": "tiny", "framework": framework,
                "devices": 1, "warm_up_steps": 5,
                "steps": 100, "operators": [{"name": "aten::mm", "calls": 2, "seconds": 0.004}],
                "lines": [
                    {"function": "train_step", "text": text, "calls": 1, "seconds": seconds}
                    for text, seconds in (("a = b", 0.03), ("c()", 0.01), ("d", 0.0001))
                ],
                "epoch": {"training": 80.0, "validation": 15.0, "test": 5.0},
                "operator_seconds": 0.008, "hardware": None, "facts": {},
                "bound_tokens_per_second": 40_000.0,
                "prediction": [
                    {"batch": 1, "calls": 9, "median": 2e-3, "percentile_95": 3e-3,
                     "words_per_second": 500.0},
                ],
                "loading": {
                    "memory": {"open_seconds": 0.02, "tokens_per_second": 1e6, "bytes": 5_000_000}
                },
            }
        )  # fmt: skip
        path = tmp_path / "profiles" / "tiny" / framework / "devices-1" / "profile.json"
        write_atomically(path, profile.model_dump_json())
    page = Page(page_of(tmp_path, experiment).read_text(encoding="utf-8"))
    section = page.text[page.text.index("What a step's time is made of") :]
    section = section[: section.index("Runs and their files")]
    for said in (
        "PyTorch",
        "10 10.0 %",
        "40 40.0 %",
        "45 45.0 %",
        "aten::mm",
        "50.0 %",
        "5 MB",
        "500",
    ):
        assert said in section
    # Greatti's shares as printed, and ours of the run and of a step.
    assert (
        "Greatti 2019 PyTorch, by line_profiler 95.0 % 2.3 % 2.6 % 46.4 % 44.6 % 9.0 %" in section
    )
    assert "80.0 % 15.0 % 5.0 % 40.0 % 45.0 % 15.0 %" in section
    assert "a = b 1 30 74.8 %" in section
    assert "c() 1 10 24.9 %" in section
    assert "d 1 " not in section
    assert "JAX" not in section
    criteria = page.text[page.text.index("Every criterion side by side") :]
    for said in (
        "First batch, ms 20 –",
        "Forward, ms 40 –",
        "Words predicted/s, many rows at once 500 –",
        "Speed-up on 2 devices 1.50 1.50",
        "Efficiency on 2 devices 75 % 75 %",
        "Test perplexity on 2 devices 109.95 109.95",
        "Accuracy of the next word 25.0 % 25.0 %",
        "Share of NumPy's products 25 % –",
        "Features built in, of",
        "Mistakes whose cause is named, of 5 4",
    ):
        assert said in criteria


def test_an_experiment_without_any_result_is_rendered(tmp_path: Path) -> None:
    experiment = plan()
    page = Page(page_of(tmp_path, experiment).read_text())
    assert "This page is partial." in page.text
    assert page.text.count("no seed has a result") == 5
    with (tmp_path / "experiments" / "demo" / "table.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 5


def test_a_refused_analysis_writes_nothing(tmp_path: Path) -> None:
    experiment = plan(frameworks=("jax",))
    write_results(tmp_path, experiment)
    write_cell(tmp_path, metrics(experiment.cells[0], 4.7, fingerprint="ffffffffffff"))
    with pytest.raises(AnalysisError, match="must not be averaged"):
        page_of(tmp_path, experiment)
    assert not (tmp_path / "experiments").exists()
    assert not (tmp_path / "report").exists()


def test_a_folder_without_an_analysis_is_named(report: Path, tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    shutil.copytree(report.parent / "experiments" / "demo", folder)
    (folder / "analysis.json").unlink()
    with pytest.raises(AnalysisError, match="demo is not a whole analysis of an experiment"):
        write_overview(Site(tmp_path / "report", tmp_path, FACTS), [folder])
    assert not (tmp_path / "report").exists()
