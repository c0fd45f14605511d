"""A document's folder and runs drawn from a known law give its answers, drawings and page."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
from tests.support.fake_results import (
    history,
    metrics,
    plan,
    score_of,
    write_cell,
    write_diverged,
    write_unknown,
)

from ptbench.analysis.answers import Answers
from ptbench.analysis.collect import SHARED
from ptbench.analysis.exhibits import read_exhibits
from ptbench.analysis.published import COLUMNS
from ptbench.configuration.experiments import load_library
from ptbench.configuration.papers import named_rows, paper_folders
from ptbench.configuration.specification import Cell, whole
from ptbench.configuration.study import load_study
from ptbench.errors import ConfigurationError
from ptbench.report.closing import print_results
from ptbench.report.exhibits import Curves
from ptbench.report.experiment import analyse_experiment
from ptbench.report.opening import Said, answers_to
from ptbench.report.overview import Document, read_document
from ptbench.report.paper import answer_paper
from ptbench.report.paper_page import finding_note, write_paper_page
from ptbench.report.site import RunFacts, Site

PAPER = """
citation: "Example 2018: widths"
hardware: null
readings: [Widths are those of both layers.]
"""
CLAIMS = """
claims:
  - {id: c1, locator: Table 1, claim: Wider is better., tests: [{test: lower, left: ["m+hidden_size=4 [jax]"], right: ["m [jax]"]}]}
  - {id: c2, locator: Table 1, claim: Narrower is better., tests: [{test: lower, left: ["m [jax]"], right: ["m+hidden_size=4 [jax]"]}]}
  - {id: c3, locator: Table 1, claim: The widest diverges., tests: [{test: above, left: ["m+hidden_size=8 [jax]"], number: 1000}]}
  - {id: c4, locator: Text, claim: Keras is alike., tests: [{test: equal, left: ["m [keras]"], right: ["m [jax]"]}]}
  - {id: c5, locator: Text, claim: Width is fun., untested: an opinion}
  - {id: c6, locator: Table 1, claim: The same size., tests: [{test: lower, left: ["m [jax]"], right: ["m+hidden_size=4 [jax]"], metric: parameters}]}
  - {id: c7, locator: Table 1, claim: Wider is slower., tests: [{test: higher, left: ["m+hidden_size=4 [jax]"], right: ["m [jax]"], metric: seconds_per_epoch}]}
  - {id: c8, locator: Table 1, claim: Wider is much better., tests: [{test: lower, left: ["m+hidden_size=4 [jax]"], right: ["m [jax]"], margin: 0.3}]}
  - {id: c9, locator: Table 1, claim: Width does not matter., tests: [{test: equal, left: ["m+hidden_size=4 [jax]"], right: ["m [jax]"]}]}
"""  # noqa: E501
EXHIBITS = """
exhibits:
  - {id: t1, number: Table 1, title: Widths, kind: table, metrics: [valid_perplexity, epochs], rows: &rows {"2": "m [jax]", "4": "m+hidden_size=4 [jax]", "8": "m+hidden_size=8 [jax]"}}
  - {id: f1, number: Figure 1, title: By width, kind: sweep, x: hidden_size, metrics: [valid_perplexity], rows: *rows}
  - {id: f2, number: Figure 2, title: By epoch, kind: curves, x: epoch, metrics: [valid_perplexity], rows: *rows}
  - {id: f3, number: Figure 3, title: In Keras, kind: curves, x: epoch, metrics: [valid_perplexity], rows: {"2": "m [keras]"}}
  - {id: f4, number: Figure 4, title: A photograph, undrawn: not a result}
"""  # noqa: E501
# The means of the seeds' validation nll, and what the document prints.
NLL = {"m": 4.8, "m+hidden_size=4": 4.6}
PUBLISHED = [
    "widths,m,jax,1,,valid_perplexity,121.5,,,,Table 1,",  # exp(4.8)
    "widths,m+hidden_size=4,jax,1,,valid_perplexity,150,,,,Table 1,",
    "widths,m+hidden_size=8,jax,1,,valid_perplexity,diverges,,,,Table 1,",
    "widths,m,jax,1,,seconds_per_epoch,60,,,,Table 1,",
    "widths,m+hidden_size=4,jax,1,,seconds_per_epoch,120,,,,Table 1,",
    "widths,m,keras,1,,valid_perplexity,121.5,,,,Table 2,",
]


def run(cell: Cell, deviation: float) -> None:
    nll = NLL[whole(cell.variant)] + deviation
    wide = whole(cell.variant) != "m"
    found = metrics(
        cell,
        nll - 0.05,
        valid=score_of(nll),
        parameters=2_000_000 if wide else 1_000_000,
        seconds_per_epoch=2.0 * math.exp(2 * deviation) if wide else math.exp(deviation),
    )
    write_cell(RESULTS, found, history(found))


RESULTS = Path()


def answers_of(results: Path, made_of_it: str = "", alone: bool = True) -> Answers:
    """The answers to the document above.

    Args:
        results: the results folder, which is written.
        made_of_it: what a configuration adds to every variant.
        alone: whether each run is known to have had its machine to itself.
    """
    folder = results / "documents" / "example2018"
    folder.mkdir(parents=True)
    (folder / "paper.yaml").write_text(PAPER)
    (folder / "claims.yaml").write_text(CLAIMS)
    (folder / "exhibits.yaml").write_text(EXHIBITS)
    (folder / "published.csv").write_text("\n".join([",".join(COLUMNS), *PUBLISHED]) + "\n")
    variants = [f"{name}{made_of_it}" for name in (*NLL, "m+hidden_size=8")]
    experiment = plan("widths", variants, ["jax"], seeds=[1, 2, 3, 4, 5])
    for cell in experiment.cells:
        if whole(cell.variant) in NLL:
            run(cell, 0.004 * (cell.seed - 3))
        else:
            write_diverged(results, cell, epochs=2)
    if not alone:
        write_unknown(results)
    analyse_experiment(experiment, results, folder.parent, results / "experiments" / "widths")
    output = results / "papers" / "example2018"
    return answer_paper(folder, [results / "experiments" / "widths"], output)


@pytest.fixture(params=[""])
def answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> tuple[Answers, Path]:
    """The answers to the document above, and the results folder.

    The parameter is what a configuration adds to every variant.
    """
    monkeypatch.setattr(f"{__name__}.RESULTS", tmp_path)
    return answers_of(tmp_path, request.param), tmp_path


def test_findings_have_the_verdicts_that_the_seeds_give(
    answered: tuple[Answers, Path],
) -> None:
    verdicts = {finding.id: finding.verdict for finding in answered[0].findings}
    assert verdicts == {
        "c1": "upheld",
        "c2": "contradicted",
        "c3": "upheld",
        "c4": "not run",
        "c5": "untested",
        "c6": "upheld",  # a count that all seeds have alike is certain
        "c7": "upheld",
        "c8": "contradicted",  # by less than its margin
        "c9": "contradicted",
    }
    notes = {finding.id: finding_note(finding) for finding in answered[0].findings}
    assert notes["c1"] == "a difference of 22.1 % in the claim's direction, p < 0.001"
    assert notes["c2"] == (
        "the opposite is shown (p < 0.001), a difference of 22.1 % against the claim"
    )
    assert notes["c8"] == (
        "shown to be equal within 35.0 % (p < 0.001); "
        "the difference of 22.1 % is in the claim's direction"
    )
    assert notes["c9"] == "the opposite is shown (p < 0.001), 19.7 % beyond the margin"
    reasons = {finding.id: finding.reason for finding in answered[0].findings}
    assert reasons["c4"] == "no result of m [keras]"
    assert reasons["c5"] == "an opinion"
    diverged = answered[0].findings[2].numbers[0]
    assert diverged.values == (math.inf,) * 5
    assert answered[0].findings_upheld == (4, 7)
    judged = Document(answered[0], "Example 2018")
    empty = answered[0].model_copy(update={"published": (), "findings": ()})
    said = Said(
        "Example 2018: 3 of 4 printed numbers reproduced or close, 4 of 7 findings upheld",
        "papers/example2018.html",
    )
    assert answers_to([], [Document(empty, "Other 2018"), judged], []) == [said]
    [alone] = answers_to([], [Document(empty, "Other 2018")], [])
    assert alone.text == "Other 2018: nothing can be judged yet"


@pytest.mark.parametrize("answered", ["+subset=9"], indirect=True)
def test_runs_on_less_judge_no_number_and_no_finding(answered: tuple[Answers, Path]) -> None:
    answers = answered[0]
    assert answers.reductions == ("subset=9",)
    verdicts = [finding.verdict for finding in answers.findings]
    assert verdicts == [*["reduced budget"] * 3, "not run", "untested", *["reduced budget"] * 4]
    assert answers.findings[1].reason == "with subset=9; of these runs it would be: contradicted"
    assert {n.verdict for n in answers.published} == {"reduced budget", "not run"}
    assert (answers.findings_upheld, answers.numbers_reproduced) == ((0, 0), (0, 0))
    assert answers.exhibits[0].lines[0].cells["valid_perplexity"].ours is not None


def test_published_numbers_count_once_and_times_are_judged_as_ratios(
    answered: tuple[Answers, Path],
) -> None:
    verdicts = [number.verdict for number in answered[0].published]
    assert verdicts == [
        "reproduced",
        "not reproduced",
        "reproduced",  # it diverges
        "other hardware",  # the first of the table
        "reproduced",  # twice as long as the first
        "not run",
    ]
    ratio = answered[0].published[4]
    assert ratio.published.value == 120
    assert ratio.readings[0].ours == pytest.approx(2.0)
    assert answered[0].numbers_reproduced == (3, 4)


def test_times_of_runs_that_may_have_shared_their_machine_cannot_be_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{__name__}.RESULTS", tmp_path)
    answers = answers_of(tmp_path, alone=False)
    by_id = {finding.id: finding for finding in answers.findings}
    assert (by_id["c7"].verdict, by_id["c7"].reason) == ("cannot tell", SHARED)
    assert (by_id["c1"].verdict, by_id["c6"].verdict) == ("upheld", "upheld")  # no times
    ratio = answers.published[4]
    assert (ratio.verdict, ratio.readings[0].reason) == ("cannot tell", SHARED)
    assert answers.numbers_reproduced == (2, 3)
    site = Site(tmp_path / "report", tmp_path, RunFacts(created="now", version="1", machine="here"))
    page = write_paper_page(site, answers, tmp_path / "papers" / "example2018").read_text()
    assert page.count(SHARED) == 2


@pytest.mark.parametrize("made_of_it", ["", "+subset=9"])
def test_curves_are_of_the_runs_that_stand_for_the_document_s_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made_of_it: str
) -> None:
    monkeypatch.setattr(f"{__name__}.RESULTS", tmp_path)
    drawn: dict[str, list[bool]] = {}

    def keep(_: object, curves: Curves, folder: Path) -> None:
        folder.mkdir(parents=True)
        drawn.update({str(row): [run.diverged for run in runs] for row, runs in curves.items()})

    monkeypatch.setattr("ptbench.report.paper.write_exhibits", keep)
    answers_of(tmp_path, made_of_it)
    assert drawn == {
        "m [jax]": [False] * 5,
        "m+hidden_size=4 [jax]": [False] * 5,
        "m+hidden_size=8 [jax]": [True] * 5,
    }


def test_exhibits_show_ours_beside_the_document_s_or_say_why_not(
    answered: tuple[Answers, Path],
) -> None:
    answers, results = answered
    by_id = {result.exhibit.id: result for result in answers.exhibits}
    table = by_id["t1"]
    assert [line.n_diverged for line in table.lines] == [0, 0, 5]
    cell = table.lines[0].cells["valid_perplexity"]
    assert cell.ours is not None
    assert cell.published is not None
    assert cell.ours.value == pytest.approx(math.exp(4.8))
    assert (cell.published.value, cell.verdict) == (121.5, "reproduced")
    assert by_id["f3"].missing == "none of its rows is in the study"
    assert by_id["f4"].missing == "not a result"
    folder = results / "papers" / "example2018"
    files = sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file())
    assert files == [
        "answers.json", "exhibits/f1.csv", "exhibits/f1.svg",
        "exhibits/f2.csv", "exhibits/f2.svg", "exhibits/t1.csv", "tables/t1.tex",
    ]  # fmt: skip
    with (folder / "exhibits" / "t1.csv").open() as file:
        first = next(csv.DictReader(file))
    assert float(first["ours"]) == cell.ours.value
    assert (first["published"], first["verdict"]) == ("121.5", "reproduced")
    assert "121.51 ± 0.77 (121.50)" in (folder / "tables" / "t1.tex").read_text().replace(
        r"$\pm$", "±"
    )


def test_the_page_names_every_finding_exhibit_and_number(
    answered: tuple[Answers, Path],
) -> None:
    answers, results = answered
    site = Site(results / "report", results, RunFacts(created="now", version="1", machine="here"))
    page = write_paper_page(site, answers, results / "papers" / "example2018").read_text()
    for text in ("Wider is better.", "no result of m [keras]", "Not drawn: not a result", "× 2"):
        assert text in page
    for anchor in ("t1", "f1", "f2", "f3", "f4", "c1", "c6"):
        assert f'id="{anchor}"' in page


def test_the_terminal_says_what_holds_of_a_document_and_which_variant_is_the_best(
    answered: tuple[Answers, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing of frameworks, because the study has one."""
    answers, results = answered
    document = results / "papers" / "example2018"
    assert read_document(document).answers == answers
    experiment, index = results / "experiments" / "widths", Path("report/index.html")
    print_results([experiment], index, (), [document])
    said = " ".join(capsys.readouterr().out.split())
    assert "training speed [tokens/s] seeds" in said
    assert said.endswith(
        ": 3 of 4 printed numbers reproduced or close, 4 of 7 findings upheld. "
        "See report/papers/example2018.html The report is at report/index.html"
    )
    print_results([experiment], index)
    said = " ".join(capsys.readouterr().out.split())
    assert ": best by validation perplexity, with a " in said
    assert said.endswith(
        " in JAX. See report/experiments/widths.html The report is at report/index.html"
    )


@pytest.mark.parametrize("folder", paper_folders().values(), ids=lambda folder: folder.name)
def test_every_exhibit_of_a_paper_is_well_formed_and_names_known_recipes(folder: Path) -> None:
    recipes = load_library().recipes
    assert {name for each in read_exhibits(folder) for name in each.recipes} <= recipes.keys()
    assert all(row.variant.split("+")[0] in recipes for row in named_rows(folder))


def test_a_document_is_answered_by_exactly_the_experiments_that_plan_a_row_of_it() -> None:
    study = load_study({"experiments": ["zaremba-small", "greatti-cells", "demo"]})
    assert study.papers["zaremba2014"] == ["zaremba-small"]
    assert study.papers["greatti2019"] == ["greatti-cells"]
    assert "merity2017" not in study.papers
    with pytest.raises(ConfigurationError, match="no experiment of the study plans a row"):
        study.answering("merity2017")
    with pytest.raises(ConfigurationError, match='there is no document "zhang"'):
        study.answering("zhang")


def test_a_row_in_another_framework_is_not_planned() -> None:
    study = load_study({"experiments": ["zaremba-small"], "frameworks": ["jax"]})
    assert "zaremba2014" in study.papers  # names the row in any framework
    assert "sparselang2018" not in study.papers  # names it in TensorFlow
