"""`uv run ptbench <command>`: what people can call, and the workflow's rules do.

Imports pydantic and the standard library alone until it knows the command: `train` runs in the
frameworks' environments, the others in the workflow's; `evaluate` and `predict` go from the one to
the other.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

from ptbench.errors import PtbenchError, in_words

PAPERS = Path("workflow/papers")
T = TypeVar("T")

if TYPE_CHECKING:
    from ptbench.configuration.study import Study


def environments(arguments: argparse.Namespace) -> None:
    """Build the frameworks' virtual environments from their locks, those that are not current."""
    from ptbench.environments import build, is_current

    with Log(arguments.log) as log:
        for framework in arguments.frameworks:
            folder = arguments.output / f"{framework}-{arguments.accelerator}"
            if not is_current(framework, arguments.accelerator, folder):
                log.say(f"Building the environment of {framework} in {folder}")
                build(framework, arguments.accelerator, folder)


def corpus(arguments: argparse.Namespace) -> None:
    """Fetch or generate a corpus, verify it, and store it as integers."""
    from ptbench.corpus.definitions import definition_from
    from ptbench.corpus.prepare import prepare

    fetching = from_json("--fetching", arguments.fetching, dict)
    name, definition, subset = from_json(
        "--corpus", arguments.corpus, lambda asked: definition_from(asked, fetching)
    )
    with Log(arguments.log) as log:
        prepare(name, definition, subset, arguments.downloads, arguments.output, log.terminal)


def train(arguments: argparse.Namespace) -> None:
    """Train and score one cell."""
    from ptbench.training.signals import Signals, end_children

    signals = Signals()  # before anything that starts a thread

    import faulthandler

    from pydantic import ValidationError

    from ptbench.configuration.specification import parse_cell_path
    from ptbench.training.cell import Paths, attempt_at, read_specification, run_cell

    try:
        cell = parse_cell_path(arguments.cell)
    except (ValueError, ValidationError) as error:
        raise PtbenchError(
            f"--cell {arguments.cell} is not variant/framework/devices-N/seed-N"
        ) from error
    specification = read_specification(arguments.specification)
    paths = Paths(arguments.corpus, arguments.output, arguments.attempts, arguments.checkpoints)
    try:
        with (
            attempt_at(cell, specification, paths, arguments.log) as attempt,
            Log(arguments.log) as log,
        ):
            faulthandler.enable()
            signals.say, signals.abandon = log.say, attempt.abandon
            metrics = run_cell(
                cell,
                specification,
                paths,
                max(arguments.threads, cell.devices),
                log.say,
                arguments.checkpoint_minutes,
                arguments.wait_for_lock,
                attempt,
                signals,
            )
            test = metrics.test
            shown = f"test perplexity {test.perplexity:.2f}" if test else metrics.reason
            seconds = f"{metrics.seconds.total:.0f} s"
            log.say(f"[{cell.path}] {metrics.status}: {shown}, {seconds}{cells_done(paths.output)}")
    except BaseException:
        end_children()  # replicas that wait for this one would hold up its end
        raise


def evaluate(arguments: argparse.Namespace) -> None:
    """Score a split with a trained model, in any framework, whichever trained it."""
    import json

    from ptbench.training import inference

    checkpoint = inference.read_checkpoint(arguments.checkpoint)
    corpus = inference.open_corpus_of(checkpoint, arguments.corpus)
    enter_environment(arguments)
    model = inference.build(
        checkpoint, arguments.framework, arguments.accelerator, arguments.threads
    )
    with contextlib.closing(model):
        score = inference.evaluate_split(model, corpus, arguments.split)
    if arguments.json:
        said = {"framework": arguments.framework, "split": arguments.split}
        print(json.dumps(said | json.loads(score.model_dump_json())))
    else:
        print(
            f"{arguments.split} perplexity {score.perplexity:.4f}, {score.nll:.6f} nats per token, "
            f"{score.tokens} tokens, in {arguments.framework}"
        )


def predict(arguments: argparse.Namespace) -> None:
    """Show true and predicted next words, and text that a trained model makes up."""
    import json

    from ptbench.training import inference

    checkpoint = inference.read_checkpoint(arguments.checkpoint)
    corpus = inference.open_corpus_of(checkpoint, arguments.corpus)
    enter_environment(arguments)
    model = inference.build(
        checkpoint, arguments.framework, arguments.accelerator, arguments.threads
    )
    with contextlib.closing(model):
        stretch = inference.predict_next_words(
            model, corpus, arguments.split, arguments.start, arguments.words
        )
        drawn = inference.sample(
            model, corpus, arguments.sample, arguments.temperature, arguments.seed
        )
    text = " ".join(corpus.words[word] for word in drawn)
    if arguments.json:
        predictions = [
            each._asdict()
            | {name: corpus.words[getattr(each, name)] for name in ("given", "true", "predicted")}
            for each in stretch
        ]
        said = {"framework": arguments.framework, "split": arguments.split}
        print(json.dumps(said | {"predictions": predictions, "sample": text}))
        return
    print(f"{'true next word':20} probability   {'most probable':20} probability")
    for each in stretch:
        print(
            f"{corpus.words[each.true]:20} {each.true_probability:11.4f}   "
            f"{corpus.words[each.predicted]:20} {each.predicted_probability:11.4f}"
        )
    right = sum(each.true == each.predicted for each in stretch)
    print(f"{right} of {len(stretch)} words predicted, in {arguments.framework}\n")
    print(f"Drawn at temperature {arguments.temperature:g} with seed {arguments.seed}:\n{text}")


def enter_environment(arguments: argparse.Namespace) -> None:
    """Let the same command in the framework's environment take this one's place.

    Returns if the framework can be imported here.
    """
    import os

    from ptbench.backends import backend_class
    from ptbench.environments import PYTHON

    try:
        backend_class(arguments.framework, arguments.threads)
        return
    except PtbenchError as error:
        if not isinstance(error.__cause__, ModuleNotFoundError):
            raise
        missing = error.__cause__.name
    folder = arguments.environments / f"{arguments.framework}-{arguments.accelerator}"
    if not (folder / PYTHON).exists():
        raise PtbenchError(
            f"{missing} cannot be imported here, and {folder} is not built; run `uv run ptbench "
            f"environments {arguments.framework} --accelerator {arguments.accelerator} "
            f"--output {folder.parent}`"
        )
    if Path(sys.prefix).resolve() == folder.resolve():
        raise PtbenchError(f"{folder} has no {missing}; remove it and build it anew")
    sys.stdout.flush()
    package = Path(__file__).parents[1]
    command = [str(folder / PYTHON), "-m", "ptbench", *sys.argv[1:]]
    os.execve(command[0], command, os.environ | {"PYTHONPATH": str(package)})


def cells_done(cell_folder: Path) -> str:
    """How far the study is, where the workflow wrote down what it plans."""
    import json

    for results in cell_folder.resolve().parents:
        with contextlib.suppress(OSError, ValueError, KeyError):
            planned = json.loads((results / "study.json").read_text())["cells"]
            cells = results / "cells"
            done = sum((cells / path / "metrics.json").exists() for path in planned)
            return f"; {done} of {len(planned)} cells done"
    return ""


def analyse(arguments: argparse.Namespace) -> None:
    """Tables, figures and verdicts of one experiment, from its cells' results."""
    from ptbench.analysis.plan import read_plan
    from ptbench.report.experiment import analyse_experiment

    plan = from_json("--plan", arguments.plan, read_plan)
    with Log(arguments.log):
        analyse_experiment(plan, arguments.results, arguments.papers, arguments.output)


def report(arguments: argparse.Namespace) -> None:
    """The report on all experiments."""
    from ptbench.report.page import RunFacts, render_report
    from ptbench.training.provenance import run_facts

    with Log(arguments.log):
        render_report(arguments.experiments, arguments.output, RunFacts(**run_facts()))


def partial(arguments: argparse.Namespace) -> None:
    """The report on what is there, with what is missing marked."""
    from ptbench.analysis.plan import plan_experiment
    from ptbench.configuration.study import load_study
    from ptbench.report.experiment import analyse_experiment
    from ptbench.report.page import RunFacts, render_report
    from ptbench.training.provenance import run_facts

    study = from_json("--configuration", arguments.configuration, load_study)
    with Log(arguments.log) as log:
        folders, done = [], set()
        for name, planned in study.experiments.items():
            folders.append(arguments.output / "experiments" / name)
            analysis = analyse_experiment(
                plan_experiment(study, name),
                arguments.results,
                arguments.papers,
                folders[-1],
                {each.variant: each.fingerprint for each in planned.specifications},
            )
            cells = (cell for row in analysis.rows for cell in row.cells)
            done |= {cell.path for cell in cells if cell.state != "missing"}
        page = render_report(folders, arguments.output, RunFacts(**run_facts()))
        log.say(f"The report on {len(done)} of {len(study.cells)} cells is at {page}")


def status(arguments: argparse.Namespace) -> None:
    """Say how far the study is: which cells are done, running, failed or missing."""
    import shlex

    from rich.console import Console

    from ptbench.configuration.study import read_study
    from ptbench.report.status import (
        after_errors,
        distinct,
        failures,
        job_errors,
        preparation_failures,
        show,
        status_json,
        study_status,
    )

    written = arguments.study or Path("results/study.json")
    study = read_study(written) if arguments.study or written.exists() else load(arguments.config)
    found = study_status(study, arguments.results)
    if arguments.json:
        print(status_json(found))
        return
    if not arguments.failed:
        show(found, Console(width=None if sys.stdout.isatty() else 120))
    log = "".join(log.read_text(errors="replace") for log in arguments.snakemake_log)
    if text := preparation_failures(log):
        print(text)
    cells = after_errors(distinct(found), job_errors(log), study, arguments.results)
    if text := failures(cells, arguments.results, shlex.split(arguments.again)):
        print(text)


def schema(arguments: argparse.Namespace) -> None:
    """Write the JSON Schemas of config.yaml and of the experiments' YAML, for editors."""
    from ptbench.configuration.schemas import schemas
    from ptbench.files import write_atomically

    for name, text in schemas().items():
        write_atomically(arguments.output / name, text)


def validate(arguments: argparse.Namespace) -> None:
    """Check a configuration, and the folders of the papers; say what would run."""
    from ptbench.configuration.experiments import read_papers

    study = load(arguments.config)
    read_papers()
    for name, planned in study.experiments.items():
        print(f"{name}: {len(planned.cells)} cells")
    print(f"{len(study.cells)} cells in all")


def features(arguments: argparse.Namespace) -> None:
    """Write docs/features.md."""
    from ptbench.files import write_atomically
    from ptbench.report.features import features_markdown

    write_atomically(arguments.output, features_markdown())


def benchmark(arguments: argparse.Namespace) -> None:
    """Measure the training speed of every framework side by side."""
    from ptbench.measurement.benchmark import all_competitors, run_benchmark, show

    competitors = all_competitors(arguments.frameworks, arguments.implementations)
    show(
        run_benchmark(
            arguments.models, competitors, arguments.environments, arguments.accelerator,
            arguments.threads, arguments.rounds, arguments.seconds, arguments.output,
        )
    )  # fmt: skip


def from_json(option: str, text: str, make: Callable[[Any], T]) -> T:
    """Return what `make` makes of an option's JSON.

    Raises:
        PtbenchError: if the text is something else than the workflow passes.
    """
    import json

    try:
        return make(json.loads(text))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PtbenchError(f"{option} is not what the workflow passes: {error}") from error


def load(path: Path) -> Study:
    """The study of a configuration file."""
    from ptbench.configuration.config import read_configuration
    from ptbench.configuration.study import load_study

    return load_study(read_configuration([path]), path.name)


class Log:
    """A log file that also catches what frameworks print; progress is said on the terminal too."""

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def __enter__(self) -> Log:
        self.terminal: TextIO = sys.stdout
        self.stack = contextlib.ExitStack()
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.terminal = self.stack.enter_context(redirected(self.path))
        return self

    def __exit__(self, *exception: object) -> None:
        self.stack.__exit__(*exception)  # type: ignore[arg-type]

    def say(self, line: str) -> None:
        """A line for the log and, where that is elsewhere, for the terminal."""
        print(line, flush=True)
        if self.terminal is not sys.stdout:
            with contextlib.suppress(OSError, ValueError):  # nobody looks any more, or it is closed
                print(line, file=self.terminal, flush=True)


@contextlib.contextmanager
def redirected(path: Path) -> Iterator[TextIO]:
    """Send this process's standard output and error to a file; yields the terminal.

    File descriptors are redirected, not Python's objects alone, because the frameworks' C++ and
    the replicas' processes write to those.
    """
    import os
    import traceback

    terminal = os.fdopen(os.dup(1), "w")
    saved = os.dup(2)
    sys.stdout.flush()
    sys.stderr.flush()
    path.unlink(missing_ok=True)  # not truncated: a former attempt keeps its log by another name
    with path.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield terminal
    except PtbenchError as error:
        print(f"ptbench: {error}", file=sys.stderr)  # here it is the log; main() tells the user
        raise
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(terminal.fileno(), 1)
        os.dup2(saved, 2)
        os.close(saved)
        with contextlib.suppress(OSError):  # what nobody could be shown
            terminal.close()


def positive(text: str) -> int:
    """A whole number above zero."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


def whole(text: str) -> int:
    """A whole number from zero."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 0")
    return int(text)


def nonnegative(text: str) -> float:
    """A number from zero."""
    with contextlib.suppress(ValueError):
        if 0 <= (value := float(text)) < float("inf"):
            return value
    raise argparse.ArgumentTypeError(f"{text} is not a number from 0")


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    from ptbench.backends import FRAMEWORKS

    main = argparse.ArgumentParser(prog="ptbench", description=__doc__.split("\n")[0])
    commands = main.add_subparsers(dest="command", required=True, metavar="command")

    def command(function: object) -> argparse.ArgumentParser:
        name, text = function.__name__, function.__doc__  # type: ignore[attr-defined]
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(function=function)
        return sub

    sub = command(environments)
    sub.add_argument("frameworks", nargs="+", choices=FRAMEWORKS)
    sub.add_argument("--accelerator", choices=("cpu", "cuda"), default="cpu")
    sub.add_argument("--output", type=Path, required=True, help="folder of all environments")
    sub.add_argument("--log", type=Path, help="file for all output")

    sub = command(corpus)
    sub.add_argument("--corpus", required=True, help="its name, content and subset, as JSON")
    sub.add_argument("--fetching", default="{}", help="how corpora are fetched, by name, as JSON")
    sub.add_argument("--downloads", type=Path, required=True, help="folder for what is fetched")
    sub.add_argument("--output", type=Path, required=True, help="folder named as the corpus")
    sub.add_argument("--log", type=Path, help="file for all output")

    sub = command(train)
    sub.add_argument("--cell", required=True, help="variant/framework/devices-N/seed-N")
    sub.add_argument("--specification", required=True, help="what to train, as JSON")
    sub.add_argument("--corpus", type=Path, required=True, help="folder of the prepared corpus")
    sub.add_argument("--output", type=Path, required=True, help="folder of the cell's results")
    sub.add_argument("--checkpoints", type=Path, required=True, help="folder of its parameters")
    sub.add_argument("--attempts", type=Path, required=True, help="folder of its attempts' records")
    sub.add_argument(
        "--wait-for-lock", type=float, default=0.0, metavar="SECONDS",
        help="wait so long if another process is at the cell",
    )  # fmt: skip
    sub.add_argument(
        "--checkpoint-minutes", type=float, default=10.0, help="between two within an epoch"
    )
    sub.add_argument("--threads", type=int, default=1, help="CPU threads")
    sub.add_argument("--log", type=Path, help="file for all output; progress is also shown")

    for sub in (command(evaluate), command(predict)):
        sub.add_argument(
            "--framework", required=True, choices=(*FRAMEWORKS, "numpy"), help="numpy: in float64"
        )
        sub.add_argument("--checkpoint", type=Path, required=True, help="a best.safetensors")
        sub.add_argument(
            "--corpus", type=Path, help="folder of a prepared corpus; default: its own"
        )
        sub.add_argument("--split", choices=("train", "valid", "test"), default="test")
        sub.add_argument("--accelerator", choices=("cpu", "cuda"), default="cpu")
        sub.add_argument("--threads", type=positive, default=1, help="CPU threads")
        sub.add_argument("--environments", type=Path, default=Path("results/environments"))
        sub.add_argument("--json", action="store_true", help="one JSON object")
    sub.add_argument("--start", type=whole, default=0, help="predictions to leave out")
    sub.add_argument("--words", type=positive, default=20, help="predictions to show")
    sub.add_argument("--sample", type=whole, default=50, help="words to draw")
    sub.add_argument("--temperature", type=nonnegative, default=1.0, help="0: most probable words")
    sub.add_argument("--seed", type=whole, default=0, help="of the draws")

    sub = command(analyse)
    sub.add_argument("--plan", required=True, help="what the experiment asks for, as JSON")
    sub.add_argument("--papers", type=Path, default=PAPERS, help="folder of published numbers")
    sub.add_argument("--results", type=Path, required=True, help="the results folder")
    sub.add_argument("--output", type=Path, required=True, help="folder of tables and figures")
    sub.add_argument("--log", type=Path, help="file for all output")

    sub = command(report)
    sub.add_argument("experiments", type=Path, nargs="+", help="folders that analyse wrote")
    sub.add_argument("--output", type=Path, required=True, help="folder of the report")
    sub.add_argument("--log", type=Path, help="file for all output")

    sub = command(partial)
    sub.add_argument("--configuration", required=True, help="of the study, as JSON")
    sub.add_argument("--papers", type=Path, default=PAPERS, help="folder of published numbers")
    sub.add_argument("--results", type=Path, default=Path("results"))
    sub.add_argument("--output", type=Path, default=Path("results/partial"))
    sub.add_argument("--log", type=Path, help="file for all output")

    sub = command(status)
    sub.add_argument("--study", type=Path, help="default: results/study.json, if it is there")
    sub.add_argument("--config", type=Path, default=Path("config.yaml"), help="before any run")
    sub.add_argument("--results", type=Path, default=Path("results"))
    sub.add_argument("--json", action="store_true", help="for machines")
    sub.add_argument("--failed", action="store_true", help="only the cells that failed")
    sub.add_argument(
        "--snakemake-log", type=Path, nargs="*", default=[],
        help="of a run: the cells whose jobs failed in it are listed, whether begun or not",
    )  # fmt: skip
    sub.add_argument("--again", default="uv run snakemake --cores 1", help="what runs the workflow")

    sub = command(schema)
    sub.add_argument("--output", type=Path, required=True, help="folder of the schemas")

    sub = command(features)
    sub.add_argument("--output", type=Path, default=Path("docs/features.md"))

    sub = command(benchmark)
    models, implementations = ("small", "medium", "mos"), ("stock", "tuned")
    sub.add_argument("--models", nargs="+", choices=models, default=models)
    sub.add_argument("--frameworks", nargs="+", choices=FRAMEWORKS, default=FRAMEWORKS)
    sub.add_argument(
        "--implementations", nargs="+", choices=implementations, default=implementations
    )
    sub.add_argument("--accelerator", choices=("cpu", "cuda"), default="cpu")
    sub.add_argument("--threads", type=positive, default=2, help="CPU threads of each")
    sub.add_argument("--rounds", type=positive, default=5, help="turns of each")
    sub.add_argument("--seconds", type=float, default=4.0, help="least length of a turn")
    sub.add_argument("--environments", type=Path, default=Path("results/environments"))
    sub.add_argument("--output", type=Path, default=Path("results/benchmark"))

    sub = command(validate)
    sub.add_argument("config", type=Path, nargs="?", default=Path("config.yaml"))
    return main


def main(argv: list[str] | None = None) -> None:
    """Run one command; a PtbenchError is one message on standard error and its exit status."""
    arguments = parser().parse_args(argv)
    try:
        arguments.function(arguments)
    except PtbenchError as error:
        complain(str(error))
        sys.exit(error.status)
    except OSError as error:
        if error.strerror is None:
            raise
        complain(in_words(error))
        sys.exit(2)


def complain(sentence: str) -> None:
    """Say it on standard error, if that is still there."""
    with contextlib.suppress(OSError):
        print(f"ptbench: {sentence}", file=sys.stderr, flush=True)
