"""`uv run ptbench <command>`: the commands that people and the workflow's rules call.

Until the command is known, this imports the standard library alone. `train` runs in a framework's
environment, so argparse does the parsing; `evaluate` and `predict` start in the workflow's
environment and change to a framework's; all other commands run in the workflow's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, get_args

from ptbench.backends import FRAMEWORKS, ORACLE, backend_class
from ptbench.errors import PtbenchError, in_words
from ptbench.files import folders_above, sha256, write_atomically
from ptbench.isolation import FIGURES, ignored_sentence, isolate
from ptbench.log import Log, replace_unshowable
from ptbench.measurement.competitors import MODELS, OWN
from ptbench.model.recipe import Keep

if TYPE_CHECKING:
    from ptbench.backends.base import Backend
    from ptbench.configuration.specification import Cell
    from ptbench.configuration.study import Study
    from ptbench.corpus.definitions import Split
    from ptbench.corpus.store import Corpus
    from ptbench.model.recipe import Accelerator
    from ptbench.report.site import Site


PROJECT = Path(__file__).resolve().parents[2]

T = TypeVar("T")
Argument = tuple[tuple[str, ...], dict[str, Any]]
Function = Callable[..., None]


class Command(NamedTuple):
    """A command: the function that runs it, and its part of the command line's grammar."""

    function: Function
    description: str
    arguments: tuple[Argument, ...]


COMMANDS: dict[str, Command] = {}


def argument(*flags: str, **options: Any) -> Argument:
    """Declare an argument with the words of `ArgumentParser.add_argument`."""
    return flags, options


def command(description: str, *arguments: Argument) -> Callable[[Function], Function]:
    """Make a function a command. It is called with its arguments by name.

    The description is no docstring, because `python -OO` has none.
    """

    def register(function: Function) -> Function:
        COMMANDS[function.__name__] = Command(function, description, arguments)
        return function

    return register


def positive(text: str) -> int:
    """Read a whole number above zero."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


def whole(text: str) -> int:
    """Read a whole number from zero."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 0")
    return int(text)


def nonnegative(text: str) -> float:
    """Read a number from zero."""
    with contextlib.suppress(ValueError):
        if 0 <= (value := float(text)) < float("inf"):
            return value
    raise argparse.ArgumentTypeError(f"{text} is not a number from 0")


def share(text: str) -> float:
    """Read a number above zero, at most one."""
    with contextlib.suppress(ValueError):
        if 0 < (value := float(text)) <= 1:
            return value
    raise argparse.ArgumentTypeError(f"{text} is not a share above 0, at most 1")


def setting(text: str) -> str:
    """Read a key and its value."""
    if "=" not in text:
        raise argparse.ArgumentTypeError(f"{text} is not KEY=VALUE; files come before --config")
    return text


ASKED_HELP = "memory and time that its job asked for, to be recorded"
WAIT_HELP = "wait so long if another process trains the cell"
SNAKEMAKE_LOG_HELP = "of a run: the cells whose jobs failed in it are listed, begun or not"

# Arguments of several commands.
CONFIGS = argument(
    "configs", type=Path, nargs="*", help="configuration files, on top of config.yaml if it is here"
)
VALUES = argument(
    "--config", type=setting, nargs="+", default=[], metavar="KEY=VALUE",
    help="values on top of them, as of Snakemake's --config",
)  # fmt: skip
ACCELERATOR = argument("--accelerator", choices=("cpu", "cuda"), default="cpu")
ENVIRONMENTS = argument("--environments", type=Path, default=Path("results/environments"))
NODES = argument("--nodes", type=positive, default=1, help="of the job, which share the devices")
LOG = argument("--log", type=Path, help="file for all output; progress is also shown")
PAPERS = argument(
    "--papers", type=Path, default=Path("workflow/papers"), help="folder of published numbers"
)
REPORT = argument("--report", type=Path, required=True, help="folder of the report")


@command(
    "Build the frameworks' virtual environments from their locks, those that are not current.",
    argument("frameworks", nargs="+", choices=FRAMEWORKS),
    ACCELERATOR,
    argument("--output", type=Path, required=True, help="folder of all environments"),
    LOG,
)
def environments(frameworks: list[str], accelerator: str, output: Path, log: Path | None) -> None:
    from ptbench.environments import build, is_current

    with Log(log) as opened:
        for framework in frameworks:
            folder = output / f"{framework}-{accelerator}"
            if not is_current(framework, accelerator, folder):
                opened.say(f"Building the environment of {framework} in {folder}")
                build(framework, accelerator, folder)


@command(
    "Fetch or generate a corpus, verify it, and store it as integers.",
    argument("--corpus", required=True, help="its name, content and subset, as JSON"),
    argument("--fetching", default="{}", help="how corpora are fetched, by name, as JSON"),
    argument("--downloads", type=Path, required=True, help="folder for what is fetched"),
    argument("--output", type=Path, required=True, help="folder named as the corpus"),
    LOG,
)
def corpus(corpus: str, fetching: str, downloads: Path, output: Path, log: Path | None) -> None:
    from ptbench.corpus.definitions import definition_from
    from ptbench.corpus.prepare import prepare

    how = from_json("--fetching", fetching, dict)
    name, definition, subset = from_json(
        "--corpus", corpus, lambda asked: definition_from(asked, how)
    )
    with Log(log) as opened:
        prepare(name, definition, subset, downloads, output, opened.terminal)


@command(
    "Score a corpus with Kneser-Ney n-grams, which every model of it should beat.",
    argument("--corpus", type=Path, required=True, help="folder of a prepared corpus"),
    argument("--orders", type=positive, nargs="+", default=(3, 5), help="lengths of the n-grams"),
    argument("--split", choices=("train", "valid", "test"), default="test"),
    argument("--json", dest="as_json", action="store_true", help="one JSON object"),
)
def ngram(corpus: Path, orders: list[int], split: Split, as_json: bool) -> None:
    from ptbench.corpus.ngrams import KneserNey, mean_nll
    from ptbench.corpus.store import open_corpus
    from ptbench.training.records import perplexity

    text = open_corpus(corpus)
    train, scored = (each.reader().read(len(each)) for each in (text.train, getattr(text, split)))
    for order in orders:
        model = KneserNey(train, order, text.vocabulary_size, text.end_of_sentence)
        nll = mean_nll(model, scored)
        found = {"order": order, "split": split, "nll": nll, "perplexity": perplexity(nll)}
        if as_json:
            print(json.dumps(found | {"tokens": len(scored)}))
        else:
            print(
                f"{split} perplexity {perplexity(nll):.4f}, {nll:.6f} nats per token, "
                f"{len(scored)} tokens, Kneser-Ney of order {order}"
            )


@command(
    "Train and score one cell.",
    argument("--cell", required=True, help="variant/framework/devices-N/seed-N"),
    argument("--specification", required=True, help="what to train, as JSON"),
    argument("--corpus", type=Path, required=True, help="corpus.json, or its folder"),
    argument("--output", type=Path, required=True, help="folder of the cell's results"),
    argument("--checkpoints", type=Path, required=True, help="folder of its parameters"),
    argument("--attempts", type=Path, required=True, help="folder of its attempts' records"),
    argument("--wait-for-lock", type=float, default=0.0, metavar="SECONDS", help=WAIT_HELP),
    argument("--checkpoint-minutes", type=float, default=10.0, help="between two within an epoch"),
    argument("--keep-checkpoints", dest="keep", choices=get_args(Keep), default="best"),
    argument("--threads", type=int, default=1, help="CPU threads; at least one per device"),
    NODES,
    argument("--code", help="digest of the code that trains; with another, nothing is trained"),
    argument("--asked", type=positive, nargs=2, metavar=("MB", "MINUTES"), help=ASKED_HELP),
    LOG,
)
def train(
    cell: str,
    specification: str,
    corpus: Path,
    output: Path,
    checkpoints: Path,
    attempts: Path,
    wait_for_lock: float,
    checkpoint_minutes: float,
    keep: Keep,
    threads: int,
    nodes: int,
    code: str | None,
    asked: tuple[int, int] | None,
    log: Path | None,
) -> None:
    from ptbench.training.signals import ProcessSignals, end_children

    signals = ProcessSignals()  # before anything that starts a thread
    which = parsed_cell(cell)
    threads = max(threads, which.devices)
    isolate(which.framework, threads, which.devices)  # before NumPy starts its threads

    import faulthandler

    from ptbench.training.cell import Paths, attempt_at, read_specification, run_cell

    specified = read_specification(specification, code)
    folder = corpus.parent if corpus.name == "corpus.json" else corpus
    paths = Paths(folder, output, attempts, checkpoints)
    try:
        with attempt_at(which, specified, paths, log) as attempt, Log(log) as opened:
            faulthandler.enable()
            signals.say, signals.abandon = opened.say, attempt.abandon
            metrics = run_cell(
                which, specified, paths, threads, opened.say,
                checkpoint_minutes, wait_for_lock, attempt, signals, keep, asked, nodes,
            )  # fmt: skip
            test = metrics.test
            shown = f"test perplexity {test.perplexity:.2f}" if test else metrics.reason
            seconds = f"{metrics.seconds.total:.0f} s"
            opened.say(f"[{cell}] {metrics.status}: {shown}, {seconds}{cells_done(output)}")
    except BaseException:
        end_children()  # replicas that wait for this process would keep it from ending
        raise


@command(
    "Profile one row: the phases of a step, its operators, prediction and loading.",
    argument("--row", required=True, help="variant/framework/devices-N"),
    argument("--specification", required=True, help="what would be trained, as JSON"),
    argument("--corpus", type=Path, required=True, help="corpus.json, or its folder"),
    argument("--output", type=Path, required=True, help="the file profile.json"),
    argument("--threads", type=positive, default=1, help="CPU threads; at least one per device"),
    NODES,
    LOG,
)
def profile(
    row: str, specification: str, corpus: Path, output: Path, threads: int, nodes: int,
    log: Path | None,
) -> None:  # fmt: skip
    which = parsed_cell(f"{row}/seed-1", "--row", row, "variant/framework/devices-N")
    threads = max(threads, which.devices)
    isolate(which.framework, threads, which.devices)  # before NumPy starts its threads

    from ptbench.measurement.profile import profile_row
    from ptbench.training.cell import read_specification

    folder = corpus.parent if corpus.name == "corpus.json" else corpus
    with Log(log) as opened:
        specified = read_specification(specification)
        profile_row(which, specified, folder, output, threads, opened.say, nodes)


def parsed_cell(
    path: str,
    option: str = "--cell",
    text: str = "",
    form: str = "variant/framework/devices-N/seed-N",
) -> Cell:
    """Return the cell that an option names, by its path; `text` is what was given, if less."""
    from ptbench.configuration.specification import parse_cell_path

    try:
        return parse_cell_path(path)
    except ValueError as error:
        raise PtbenchError(f"{option} {text or path} is not {form}") from error


def cells_done(cell_folder: Path) -> str:
    """Say how far the study is, where the workflow has written down its plan."""
    for results in folders_above(cell_folder):
        with contextlib.suppress(OSError, ValueError, KeyError):
            planned = json.loads((results / "study.json").read_text())["cells"]
            cells = results / "cells"
            done = sum((cells / path / "metrics.json").exists() for path in planned)
            return f"; {done} of {len(planned)} cells done"
    return ""


MODEL_ARGUMENTS = (
    argument(
        "--framework", required=True, choices=(*FRAMEWORKS, ORACLE), help="oracle: in float64"
    ),
    argument("--checkpoint", type=Path, required=True, help="a best.safetensors"),
    argument("--corpus", type=Path, help="folder of a prepared corpus; default: its own"),
    argument("--split", choices=("train", "valid", "test"), default="test"),
    ACCELERATOR,
    argument("--threads", type=positive, default=1, help="CPU threads"),
    ENVIRONMENTS,
    argument("--json", dest="as_json", action="store_true", help="one JSON object"),
)


@command(
    "Score a split with a trained model, in any framework, whichever trained it.",
    *MODEL_ARGUMENTS,
    argument("--dynamic", action="store_true", help="the model goes on learning as it reads"),
    argument("--learning-rate", type=nonnegative, help="of --dynamic; default: 0.002"),
    argument("--decay", type=nonnegative, help="towards the trained parameters; default: 0.02"),
    argument("--segment", type=positive, help="tokens between two updates; default: 5"),
    argument(
        "--statistics-batches",
        type=positive,
        help="training batches whose gradients are measured first; default: all",
    ),
)
def evaluate(
    framework: str,
    split: Split,
    as_json: bool,
    dynamic: bool,
    learning_rate: float | None,
    decay: float | None,
    segment: int | None,
    statistics_batches: int | None,
    **model: Any,
) -> None:
    given: dict[str, Any] = {
        name: value
        for name, value in {
            "learning_rate": learning_rate,
            "decay": decay,
            "segment": segment,
            "statistics_batches": statistics_batches,
        }.items()
        if value is not None
    }
    if given and not dynamic:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise PtbenchError(f"{names} without --dynamic: nothing is learned in an evaluation")
    backend, text = open_model(framework, plain=dynamic, **model)

    from ptbench.training.dynamic import Dynamics, evaluate_dynamically
    from ptbench.training.inference import evaluate_split

    with contextlib.closing(backend):
        if dynamic:
            score = evaluate_dynamically(backend, text, split, Dynamics(**given))
        else:
            score = evaluate_split(backend, text, split)
    if as_json:
        said = {"framework": framework, "split": split} | ({"dynamic": True} if dynamic else {})
        print(json.dumps(said | json.loads(score.model_dump_json())))
    else:
        print(
            f"{split} perplexity {score.perplexity:.4f}, {score.nll:.6f} nats per token, "
            f"{score.tokens} tokens, in {framework}{', dynamic' if dynamic else ''}"
        )


@command(
    "Show true and predicted next words, and text that a trained model makes up.",
    *MODEL_ARGUMENTS,
    argument("--start", type=whole, default=0, help="predictions to leave out"),
    argument("--words", type=positive, default=20, help="predictions to show"),
    argument("--sample", type=whole, default=50, help="words to draw"),
    argument("--temperature", type=nonnegative, default=1.0, help="0: most probable words"),
    argument("--seed", type=whole, default=0, help="of the draws"),
)
def predict(
    framework: str,
    split: Split,
    as_json: bool,
    start: int,
    words: int,
    sample: int,
    temperature: float,
    seed: int,
    **model: Any,
) -> None:
    backend, text = open_model(framework, **model)

    from ptbench.training import inference

    with contextlib.closing(backend):
        stretch = inference.predict_next_words(backend, text, split, start, words)
        drawn = inference.sample(backend, text, sample, temperature, seed)
    sampled = " ".join(text.words[word] for word in drawn)
    predictions = [
        each._asdict()
        | {name: text.words[getattr(each, name)] for name in ("given", "true", "predicted")}
        for each in stretch
    ]
    if as_json:
        said = {"framework": framework, "split": split}
        print(json.dumps(said | {"predictions": predictions, "sample": sampled}))
        return
    print(f"{'true next word':20} probability   {'most probable':20} probability")
    for each in predictions:
        print(
            f"{each['true']:20} {each['true_probability']:11.4f}   "
            f"{each['predicted']:20} {each['predicted_probability']:11.4f}"
        )
    right = sum(each.true == each.predicted for each in stretch)
    print(f"{right} of {len(stretch)} words predicted, in {framework}\n")
    print(f"Drawn at temperature {temperature:g} with seed {seed}:\n{sampled}")


@command(
    "Write a copy of a trained model without the smallest weights of its recurrent layers.",
    argument("checkpoint", type=Path, help="a best.safetensors"),
    argument("--keep", type=share, required=True, help="share of each gate matrix that stays"),
    argument("--output", type=Path, required=True, help="the new file"),
)
def prune(checkpoint: Path, keep: float, output: Path) -> None:
    from ptbench.training import pruning

    weights, left = pruning.prune(checkpoint, keep, output)
    print(f"{output} has {left} of {weights} weights of its recurrent layers, the largest ones")


def open_model(
    framework: str,
    checkpoint: Path,
    corpus: Path | None,
    accelerator: Accelerator,
    threads: int,
    environments: Path,
    plain: bool = False,
) -> tuple[Backend, Corpus]:
    """Return a trained model in a framework, and its corpus.

    A plain model has gradients of the mean loss per token, without dropout.

    If the framework cannot be imported here, the same command in its environment takes the place
    of this process.
    """
    isolate(framework, threads)  # before NumPy starts its threads
    if sentence := ignored_sentence():
        complain(sentence)

    from ptbench.training import dynamic, inference

    read = inference.read_checkpoint(checkpoint)
    text = inference.open_corpus_of(read, corpus)
    enter_environment(framework, threads, environments / f"{framework}-{accelerator}")
    changes = dynamic.PLAIN if plain else None
    return inference.build(read, framework, accelerator, threads, changes), text


def enter_environment(framework: str, threads: int, folder: Path) -> None:
    """Run this command in the framework's environment instead, if it cannot be imported here."""
    from ptbench.environments import PYTHON

    try:
        backend_class(framework, threads)
        return
    except PtbenchError as error:
        if not isinstance(error.__cause__, ModuleNotFoundError):
            raise
        missing = error.__cause__.name
    if not (folder / PYTHON).exists():
        raise PtbenchError(
            f"{missing} cannot be imported here, and {folder} is not built; run `uv run ptbench "
            f"environments {framework} --accelerator {folder.name.rpartition('-')[2]} "
            f"--output {folder.parent}`"
        )
    if Path(sys.prefix).resolve() == folder.resolve():
        raise PtbenchError(f"{folder} has no {missing}; remove it and build it anew")
    sys.stdout.flush()
    package = Path(__file__).parents[1]
    words = [str(folder / PYTHON), "-m", "ptbench", *sys.argv[1:]]
    os.execve(words[0], words, os.environ | {"PYTHONPATH": str(package)})


@command(
    "Make the tables, figures and verdicts of one experiment from its cells' results.",
    argument("--plan", required=True, help="what the experiment asks for, as JSON"),
    PAPERS,
    argument("--results", type=Path, required=True, help="the results folder"),
    argument("--output", type=Path, required=True, help="folder of tables and figures"),
    REPORT,
    LOG,
)
def analyse(
    plan: str, papers: Path, results: Path, output: Path, report: Path, log: Path | None
) -> None:
    isolate(FIGURES, threads=1)

    from ptbench.analysis.plan import read_plan
    from ptbench.report.experiment import analyse_experiment
    from ptbench.report.experiment_page import write_experiment_page

    planned = from_json("--plan", plan, read_plan)
    with Log(log):
        analysis = analyse_experiment(planned, results, papers, output)
        write_experiment_page(site(report, results), analysis, output)


@command(
    "Answer a document: its findings judged, and its tables and figures drawn again.",
    argument("experiments", type=Path, nargs="+", help="folders that analyse wrote"),
    argument("--paper", type=Path, required=True, help="folder of the document"),
    argument("--results", type=Path, required=True, help="the results folder"),
    argument("--output", type=Path, required=True, help="folder of answers and exhibits"),
    REPORT,
    LOG,
)
def answer(
    experiments: list[Path],
    paper: Path,
    results: Path,
    output: Path,
    report: Path,
    log: Path | None,
) -> None:
    isolate(FIGURES, threads=1)

    from ptbench.report.paper import answer_paper
    from ptbench.report.paper_page import write_paper_page

    with Log(log):
        answers = answer_paper(paper, experiments, output)
        write_paper_page(site(report, results), answers, output)


RESULTS = argument("--results", type=Path, required=True, help="the results folder")


@command(
    "Ask a search's sampler for its next trials, from the results of those before.",
    argument("--question", required=True, help="what is asked, as JSON"),
    RESULTS,
    argument("--output", type=Path, required=True, help="file of the generation"),
    argument("--pytorch", type=Path, required=True, help="environment, for method: gp"),
    LOG,
)
def propose(question: str, results: Path, output: Path, pytorch: Path, log: Path | None) -> None:
    isolate(FIGURES, threads=1)

    from ptbench.analysis import search
    from ptbench.configuration.search import Question

    asked = from_json("--question", question, Question.model_validate)
    with Log(log):
        if asked.method == "gp":
            search.import_torch_from(pytorch)
        found = search.propose(asked, results)
        write_atomically(output, json.dumps(found, indent=1) + "\n")


@command(
    "Choose the trials of a search that go on in full.",
    argument("--contest", required=True, help="the search, as JSON"),
    RESULTS,
    argument("--output", type=Path, required=True, help="file of the selection"),
    LOG,
)
def select(contest: str, results: Path, output: Path, log: Path | None) -> None:
    from ptbench.analysis import search
    from ptbench.configuration.search import Contest

    asked = from_json("--contest", contest, Contest.model_validate)
    with Log(log):
        found = search.select(asked, results)
        write_atomically(output, json.dumps(found, indent=1) + "\n")


@command(
    "Make the page of a search, its figures, and its winner as a recipe.",
    argument("--contest", required=True, help="the search, as JSON"),
    RESULTS,
    argument("--output", type=Path, required=True, help="folder of what is made"),
    REPORT,
    LOG,
)
def search(contest: str, results: Path, output: Path, report: Path, log: Path | None) -> None:
    isolate(FIGURES, threads=1)

    from ptbench.configuration.search import Shown
    from ptbench.report.search import write_search

    asked = from_json("--contest", contest, Shown.model_validate)
    with Log(log):
        write_search(site(report, results), asked, results, output)


@command(
    "Make the report's pages on all experiments together.",
    argument("experiments", type=Path, nargs="+", help="folders that analyse wrote"),
    argument("--searches", type=Path, nargs="*", default=[], help="folders that search wrote"),
    argument("--documents", type=Path, nargs="*", default=[], help="folders that answer wrote"),
    argument("--results", type=Path, required=True, help="the results folder"),
    REPORT,
    LOG,
)
def report(
    experiments: list[Path],
    searches: list[Path],
    documents: list[Path],
    results: Path,
    report: Path,
    log: Path | None,
) -> None:
    from ptbench.report.overview import write_overview

    with Log(log):
        write_overview(site(report, results), experiments, documents, searches)


def site(folder: Path, results: Path) -> Site:
    """Return the report in a folder, to write pages of."""
    from ptbench.report.site import RunFacts, Site
    from ptbench.training.provenance import run_facts

    return Site(folder, results, RunFacts(**run_facts()))


@command(
    "Make the report on the results that are there, and mark what is missing.",
    argument("--configuration", required=True, help="before any run: the study's, as JSON"),
    PAPERS,
    argument("--results", type=Path, default=Path("results")),
    argument("--output", type=Path, default=Path("results/partial")),
    LOG,
)
def partial(
    configuration: str, papers: Path, results: Path, output: Path, log: Path | None
) -> None:
    isolate(FIGURES, threads=1)

    from ptbench.configuration.study import load_study, read_study
    from ptbench.report.whole import write_everything

    planned = from_json("--configuration", configuration, load_study)
    if (results / "study.json").exists():  # what was run, whatever this command was given
        planned = read_study(results / "study.json")
    with Log(log) as opened:
        pages = site(output, results)
        done = write_everything(planned, pages, papers, planned.papers, output, only_current=True)
        opened.say(
            f"The report on {len(done)} of {len(planned.cells)} cells is at {output / 'index.html'}"
        )


@command(
    "Pack a finished study: results, report, configuration, locks and workflow, in one file.",
    argument("--configuration", type=Path, nargs="*", default=[], help="files that configured it"),
    argument("--results", type=Path, default=Path("results")),
    argument("--output", type=Path, default=Path("results/archive"), help="folder of the archive"),
    LOG,
)
def archive(configuration: list[Path], results: Path, output: Path, log: Path | None) -> None:
    isolate(FIGURES, threads=1)

    from ptbench.configuration.study import read_study
    from ptbench.report.commands import study_command
    from ptbench.sharing.archive import write_archive
    from ptbench.sharing.verify import ArchiveError, verify

    with Log(log) as opened:
        study = read_study(results / "study.json")
        try:
            path = write_archive(
                study, configuration, results, output, lambda file: verify(file, sys.maxsize)
            )
        except ArchiveError as error:  # such as tables that an older version made
            raise PtbenchError(
                f"{results} makes an archive that would be refused: {error}\nTo make tables and "
                f"pages anew: {shlex.join(study_command(results))} --forcerun analyse answer report"
            ) from error
        size = path.stat().st_size / 1e6
        opened.say(f"The archive is {path}, {size:.1f} MB, with SHA-256 {sha256(path)}")


@command(
    "Check an archive: its checksums, and every table and verdict, made again from its runs.",
    argument("archive", type=Path, help="a .crate.zip, of anyone; nothing in it is executed"),
    argument("--most-gib", type=positive, default=1, help="most that it may unpack to"),
)
def verify(archive: Path, most_gib: int) -> None:
    isolate(FIGURES, threads=1)

    from ptbench.sharing.verify import GIB, ArchiveError, verify

    try:
        found = verify(archive, most_gib * GIB)
    except ArchiveError as error:
        raise PtbenchError(f"{archive} is refused: {error}") from error
    print(f"{archive}: {found.files} files are as its manifest says.")
    print(
        f"{found.compared} tables, figures and pages were made again from its {found.runs} runs "
        "and are the same."
    )
    if found.note:
        print(found.note)
    print(f"Its SHA-256 is {found.sha256}. Compare it with the one that its author published.")


@command(
    "Say which rows of two results folders moved: of two machines, or two versions.",
    argument("first", type=Path, help="a results folder, with experiments/*/analysis.json"),
    argument("second", type=Path, help="another"),
    argument("--all", dest="every", action="store_true", help="rows that did not move too"),
    argument("--json", dest="as_json", action="store_true", help="for machines"),
)
def compare(first: Path, second: Path, every: bool, as_json: bool) -> None:
    from rich.console import Console

    from ptbench.analysis.movement import compare_folders
    from ptbench.report.movement import show
    from ptbench.report.overview import read_analyses

    found = compare_folders(read_analyses(first), read_analyses(second))
    if as_json:
        print(found.model_dump_json(indent=1))
    else:
        show(found, every, Console(width=None if sys.stdout.isatty() else 120))


@command(
    "Say how far the study is: which cells are done, running, failed or missing.",
    CONFIGS,
    VALUES,
    argument("--study", type=Path, help="without these: results/study.json, if it is there"),
    argument("--results", type=Path, default=Path("results")),
    argument("--json", dest="as_json", action="store_true", help="for machines"),
    argument("--failed", action="store_true", help="only the cells that failed"),
    argument("--snakemake-log", type=Path, nargs="*", default=[], help=SNAKEMAKE_LOG_HELP),
    argument("--again", help="what runs the workflow; default: what ran it last"),
    argument(
        "--gpus",
        "--cores",
        dest="at_once",
        type=positive,
        metavar="N",
        help="how many run at once, for the time left; default: as many as run now",
    ),
)
def status(
    configs: list[Path],
    config: list[str],
    study: Path | None,
    results: Path,
    as_json: bool,
    failed: bool,
    snakemake_log: list[Path],
    again: str | None,
    at_once: int | None,
) -> None:
    from rich.console import Console

    from ptbench.analysis.costs import Estimator
    from ptbench.configuration.study import read_study
    from ptbench.corpus import CorpusError
    from ptbench.report import costs
    from ptbench.report import status as report
    from ptbench.report.commands import run_again, study_command

    written = study or results / "study.json"
    runs = shlex.split(again) if again else study_command(results)
    newest = written.exists() and not configs and not config
    planned = read_study(written) if study or newest else load(configs, config)
    found = report.study_status(planned, results)
    left, unknown = None, ""
    if not failed:
        try:
            estimator = Estimator(planned, results)
            left = costs.time_left(report.distinct(found), estimator, at_once)
        except CorpusError as error:  # its size is not known before it is fetched
            unknown = f"How long what is left takes is not known: {error}"
    if as_json:
        print(report.status_json(found, left and left.hours))
        return
    if not failed:
        report.show(found, Console(width=None if sys.stdout.isatty() else 120))
    if takes := left.sentence if left else unknown:
        print(takes)
    log = "".join(path.read_text(errors="replace") for path in snakemake_log)
    if sentence := report.disk_sentence(results):
        print(sentence)
    if unprepared := report.preparation_failures(log, planned, results):
        print(unprepared)
    errors = report.job_errors(log)
    cells = report.after_errors(report.distinct(found), errors, planned, results)
    failures = report.failures(cells, results, runs)
    if failures:
        print(failures)
    elif failed and not snakemake_log and not unprepared:
        print("Nothing has failed or been interrupted.")
    if failures or unprepared:
        print(f"The report on what is there: {run_again(runs, 'partial')}")


@command(
    "Say what a study takes: hours, disk, energy and money, before it runs.",
    CONFIGS,
    VALUES,
    argument("--results", type=Path, default=Path("results"), help="whose finished runs are used"),
    argument(
        "--gpus", "--cores", dest="at_once", type=positive, default=1, metavar="N",
        help="how many run at once (default: 1)",
    ),
    argument("--json", dest="as_json", action="store_true", help="for machines"),
)  # fmt: skip
def plan(
    configs: list[Path], config: list[str], results: Path, at_once: int, as_json: bool
) -> None:
    from rich.console import Console

    from ptbench.analysis.costs import Estimator
    from ptbench.report import costs

    study = load(configs, config)
    estimator = Estimator(study, results)
    if as_json:
        print(costs.as_json(study, estimator, at_once))
    else:
        width = None if sys.stdout.isatty() else 120
        read = [*map(str, config_files(configs)), *(["--config", *config] if config else [])]
        print(f"The study of {' '.join(read)}: {', '.join(study.experiments)}.")
        costs.show(study, estimator, at_once, Console(width=width))


@command(
    "Check a configuration and the folders of the papers, and say what would run.",
    CONFIGS,
    VALUES,
)
def validate(configs: list[Path], config: list[str]) -> None:
    from ptbench.analysis.claims import read_claims
    from ptbench.analysis.exhibits import read_exhibits
    from ptbench.analysis.published import read_left_out, read_published
    from ptbench.configuration.experiments import WORKFLOW, read_papers

    study = load(configs, config)
    papers, findings = WORKFLOW / "papers", 0
    names = list(read_papers())
    for name in names:
        findings += len(read_claims(papers / name))
        read_exhibits(papers / name)
    numbers = len(read_published(papers))
    read_left_out(papers)
    for name, planned in study.experiments.items():
        print(f"{name}: {len(planned.cells)} cells")
    print(f"{len(study.cells)} cells in all")
    print(
        f"Checked {len(names)} documents with {findings:,} findings and {numbers:,} printed "
        f"numbers: {', '.join(names)}"
    )


def load(named: Sequence[Path], values: Sequence[str] = ()) -> Study:
    """Return the study that Snakemake runs with these files and values of `--config`.

    As there, they come on top of config.yaml, and later ones win.
    """
    from ptbench.configuration.config import read_configuration
    from ptbench.configuration.study import load_study

    paths = config_files(named)
    if not paths[0].exists() and Path.cwd() != PROJECT:
        raise PtbenchError(f"there is no {paths[0]} here; give this command in {PROJECT}")
    return load_study(read_configuration(paths, values), paths[-1].name)


def config_files(named: Sequence[Path]) -> list[Path]:
    """Return the configuration files that are read: config.yaml, if it is here, and those named."""
    own = Path("config.yaml")
    return [own, *named] if own.exists() or not named else [*named]


def from_json(option: str, text: str, make: Callable[[Any], T]) -> T:
    """Return what `make` makes of an option's JSON.

    Raises:
        PtbenchError: if the text is something else than the workflow passes.
    """
    try:
        return make(json.loads(text))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PtbenchError(f"{option} is not what the workflow passes: {error}") from error


@command(
    "Write the files that are made from the code: schemas, and pages of the documentation.",
    argument("--output", type=Path, default=Path(), help="folder of the project"),
)
def generate(output: Path) -> None:
    from ptbench.report.manual import generated

    for path, text in generated(parser()).items():
        write_atomically(output / path, text)


@command(
    "Measure the training speed of every framework side by side.",
    argument("--models", nargs="+", choices=tuple(MODELS), default=("small", "medium", "mos")),
    argument("--frameworks", nargs="+", choices=FRAMEWORKS, default=FRAMEWORKS),
    argument("--implementations", nargs="+", choices=tuple(OWN), default=("stock", "tuned")),
    ACCELERATOR,
    argument("--threads", type=positive, default=2, help="CPU threads of each"),
    argument("--rounds", type=positive, default=5, help="turns of each"),
    argument("--seconds", type=nonnegative, default=4.0, help="least length of a turn"),
    ENVIRONMENTS,
    argument("--output", type=Path, default=Path("results/benchmark")),
)
def benchmark(
    models: list[str], frameworks: list[str], implementations: list[str], **settings: Any
) -> None:
    from ptbench.measurement.benchmark import Benchmark, all_competitors, show

    asked = Benchmark(**settings)
    show(asked.run(list(dict.fromkeys(models)), all_competitors(frameworks, implementations)))
    if asked.failures:
        raise PtbenchError("; ".join(asked.failures))


def parser() -> argparse.ArgumentParser:
    """Return the command line's grammar."""
    main = argparse.ArgumentParser(
        prog="ptbench", description="Train, compare and report on language models."
    )
    commands = main.add_subparsers(dest="command", required=True, metavar="command")
    for name, each in COMMANDS.items():
        sub = commands.add_parser(name, help=each.description, description=each.description)
        for flags, options in each.arguments:
            sub.add_argument(*flags, **options)
    return main


def main(argv: list[str] | None = None) -> None:
    """Run one command; a PtbenchError is one message on standard error and its exit status."""
    replace_unshowable()
    arguments = vars(parser().parse_args(argv))
    try:
        if PROJECT in Path.cwd().parents:
            raise PtbenchError(f"give this command in {PROJECT}, not in a folder of it")
        COMMANDS[arguments.pop("command")].function(**arguments)
    except PtbenchError as error:
        complain(str(error))
        sys.exit(error.status)
    except OSError as error:
        if error.strerror is None:
            raise
        complain(in_words(error))
        sys.exit(2)


def complain(sentence: str) -> None:
    """Print a sentence to standard error, if that is still open."""
    with contextlib.suppress(OSError):
        print(f"ptbench: {sentence}", file=sys.stderr, flush=True)
