"""A search: what its trials came to, the next ones by Optuna's samplers, and the selection.

The sampler is made anew for every generation, from the results that are there, and seeded, so two
runs of a search make the same trials and nothing but files outlives a process.
"""

from __future__ import annotations

import io
import json
import math
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationError
from ruamel.yaml import YAML

from ptbench.analysis.collect import MAXIMUM_FAILED, AnalysisError, first_line
from ptbench.configuration.experiments import Dimension, Value
from ptbench.configuration.search import (
    TRIES,
    Contest,
    Point,
    Question,
    Space,
    UnfitError,
    bounds,
    draw_points,
    is_whole,
    steps,
)
from ptbench.configuration.specification import Specification
from ptbench.errors import PtbenchError
from ptbench.model.recipe import Model
from ptbench.training.attempts import look
from ptbench.training.records import perplexity, read_metrics

if TYPE_CHECKING:
    import optuna

REFUSED = 100  # proposals in a row that are no trials, after which one is drawn at random
FEWEST_TRIALS = 4  # that ended well, for importances to be computed
WORST_OF_NONE = 0.0  # what failed trials are told as while all have failed: alike


class Trial(Model):
    """One trial of a search and what it came to."""

    number: int = Field(
        description="From 1, in the order in which trials were chosen; 0: what others found."
    )
    variant: str = Field(description="Name of its variant.")
    cell: str = Field(description="Its run.")
    point: Point | None = Field(description="Keys and values; null: not chosen yet.")
    state: Literal["ok", "diverged", "missing"] = Field(description="How it ended.")
    nll: float | None = Field(
        None, description="Validation nll [nats per token], if it ended well."
    )
    perplexity: float | None = Field(None, description="exp(nll).")
    seconds: float | None = Field(None, description="What its run took [s].")


def read_trial(number: int, variant: str, cell: str, point: Point | None, results: Path) -> Trial:
    """Return a trial with what its run left.

    Raises:
        AnalysisError: if its metrics.json cannot be read.
    """
    trial = Trial(number=number, variant=variant, cell=cell, point=point, state="missing")
    path = results / "cells" / cell / "metrics.json"
    try:
        metrics = read_metrics(path)
    except FileNotFoundError:
        return trial
    except (OSError, ValidationError) as error:
        raise AnalysisError(f"{path} cannot be read ({first_line(error)})") from error
    update: dict[str, Any] = {"state": metrics.status, "seconds": metrics.seconds.total}
    if metrics.status == "ok" and metrics.valid is not None:
        update |= {"nll": metrics.valid.nll, "perplexity": metrics.valid.perplexity}
    return trial.model_copy(update=update)


def read_points(files: Sequence[str], results: Path) -> list[Point]:
    """Return the points of the generations that have been proposed, in order.

    Args:
        files: of the generations, as `results/searches/...`.
        results: the results folder.
    """
    found: list[Point] = []
    for file in files:
        path = results.joinpath(*Path(file).parts[1:])
        if not path.exists():
            break
        try:
            found += json.loads(path.read_bytes())["points"]
        except (ValueError, KeyError) as error:
            raise AnalysisError(f"{path} cannot be read ({error}); remove it") from error
    return found


def read_trials(cells: Mapping[str, str], points: Sequence[Point], results: Path) -> list[Trial]:
    """Return trials, in order, with what their runs left."""
    known = [*points, *[None] * len(cells)]
    return [
        read_trial(number, variant, cell, known[number - 1], results)
        for number, (variant, cell) in enumerate(cells.items(), start=1)
    ]


def trials_of(contest: Contest, results: Path) -> list[Trial]:
    """Return all trials of a search, with what their runs left."""
    if contest.method == "random":
        points = draw_points(contest.space, len(contest.trials), contest.seed, contest.name)
    else:
        points = read_points(contest.files, results)
    cells = {variant: f"{variant}/{contest.run}" for variant in contest.trials}
    return read_trials(cells, points, results)


def propose(question: Question, results: Path) -> dict[str, Any]:
    """Return the next generation of a search that learns: its points and specifications.

    Args:
        question: what is asked.
        results: the results folder, with the trials before and the files of their points.
    """
    told = read_trials(question.told, read_points(question.files, results), results)
    points = next_points(question, told)
    return {
        "question": question.model_dump(mode="json"),
        "told": [trial.model_dump(mode="json") for trial in told],
        "points": points,
        "specifications": {
            variant: question.space.specification(variant, point, short=True).model_dump(
                mode="json"
            )
            for variant, point in zip(question.variants, points, strict=True)
        },
    }


def next_points(question: Question, told: Sequence[Trial]) -> list[Point]:
    """Return the points that the sampler wants tried next.

    A trial that diverged or failed is told as the worst. Points that cannot be trials, or were
    tried, are refused; what is proposed then is bounded.
    """
    import optuna

    space, count = question.space, len(question.variants)
    own = random.Random(f"{question.seed} {question.generation}")
    sampler = sampler_of(question.method, own.getrandbits(32))
    study = study_of(space, told, sampler)
    tried = [trial.point for trial in told]
    points: list[Point] = []
    for _ in range(count):
        for attempt in range(REFUSED + TRIES):
            trial = study.ask()
            if attempt < REFUSED:
                point = space.point(lambda key, dimension: suggest(trial, key, dimension))  # noqa: B023
            else:
                point = space.draw(own)
            try:
                space.specification("trial", point, short=True)
                space.specification("trial", point, short=False)
            except UnfitError:
                fits = False
            else:
                fits = point not in [*tried, *points]
            if fits:
                points.append(point)
                break
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            raise PtbenchError(
                f"no point that is new and meets the constraint was found in {REFUSED + TRIES} "
                "tries; the space is too small for so many trials"
            )
    return points


def sampler_of(method: str, seed: int) -> optuna.samplers.BaseSampler:
    """Return a seeded sampler that takes trials which are under way for bad ones."""
    import warnings

    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if method == "gp":
            return optuna.samplers.GPSampler(seed=seed)
        return optuna.samplers.TPESampler(
            seed=seed, multivariate=True, group=True, constant_liar=True
        )


def study_of(
    space: Space, told: Sequence[Trial], sampler: optuna.samplers.BaseSampler | None = None
) -> optuna.Study:
    """Return a study in memory that knows trials; those that did not end well are the worst."""
    import optuna

    study = optuna.create_study(sampler=sampler)
    worst = max((trial.nll for trial in told if trial.nll is not None), default=WORST_OF_NONE)
    for trial in told:
        sampled = {
            key: value
            for key, value in (trial.point or {}).items()
            if space.dimensions[key].same_as is None
        }
        study.add_trial(
            optuna.trial.create_trial(
                params=sampled,
                distributions={key: distribution(key, space.dimensions[key]) for key in sampled},
                value=worst if trial.nll is None else trial.nll,
            )
        )
    return study


def distribution(key: str, dimension: Dimension) -> Any:
    """Return what Optuna is told of a key."""
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    if dimension.choices is not None:
        return CategoricalDistribution(dimension.choices)
    low, high = bounds(dimension)
    if dimension.step is not None:
        high = round(low + dimension.step * steps(dimension), 10)
    if is_whole(key):
        return IntDistribution(int(low), int(high), dimension.log, int(dimension.step or 1))
    return FloatDistribution(low, high, dimension.log, dimension.step)


def suggest(trial: optuna.Trial, key: str, dimension: Dimension) -> Value:
    """Return what Optuna proposes for a key."""
    value: Value = trial._suggest(key, distribution(key, dimension))
    return value


def import_torch_from(environment: Path) -> None:
    """Let this process import PyTorch from its environment: Optuna's Gaussian process needs it.

    Raises:
        PtbenchError: if it is not there.
    """
    folder = environment / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    sys.path.append(str(folder.resolve()))  # last, so that everything else is the workflow's
    try:
        import torch

        torch.set_num_threads(1)
    except ImportError as error:
        raise PtbenchError(
            f"method: gp needs PyTorch, which is neither here nor in {environment}; build it with "
            f"`uv run ptbench environments pytorch --output {environment.parent}`"
        ) from error


def ranked(trials: Sequence[Trial]) -> list[Trial]:
    """Return the trials that ended well, the best first."""
    return sorted(
        (trial for trial in trials if trial.nll is not None and math.isfinite(trial.nll)),
        key=lambda trial: (trial.nll, trial.number),
    )


def select(contest: Contest, results: Path) -> dict[str, Any]:
    """Return which trials go on in full, and the specifications of their full runs.

    Raises:
        AnalysisError: if fewer trials ended well than are to go on.
    """
    trials = trials_of(contest, results)
    best = ranked(trials)[: len(contest.winners)]
    if len(best) < len(contest.winners):
        raise AnalysisError(
            f"search {contest.name}: {len(best)} of {len(trials)} trials ended well, and full: "
            f"{len(contest.winners)} are to go on; lower it, or change the space"
        )
    specifications: dict[str, Specification] = {
        variant: contest.space.specification(variant, trial.point or {}, short=False)
        for variant, trial in zip(contest.winners, best, strict=True)
    }
    return {
        "contest": contest.model_dump(mode="json"),
        "trials": [trial.model_dump(mode="json") for trial in trials],
        "winners": {
            variant: trial.model_dump(mode="json")
            for variant, trial in zip(contest.winners, best, strict=True)
        },
        "specifications": {v: s.model_dump(mode="json") for v, s in specifications.items()},
    }


def recipe_to_paste(contest: Contest, name: str, point: Point) -> str:
    """Return a point as a recipe that can be pasted into a file of experiments."""
    recipe = {"extends": contest.base, **contest.set, **point}
    writer = YAML()
    writer.indent(mapping=2)
    text = io.StringIO()
    writer.dump({"recipes": {name: recipe}}, text)
    return text.getvalue()


class FullRuns(Model):
    """The full runs of a winner, or of what others found, over frameworks, devices and seeds."""

    variant: str = Field(description="Name of the variant.")
    trial: int | None = Field(description="The trial that it was; null: what others found.")
    planned: int = Field(description="Runs planned.")
    finished: int = Field(description="Runs that ended well, diverged or failed.")
    ok: int = Field(description="Runs that ended well.")
    valid_perplexity: float | None = Field(description="exp of their mean validation nll.")
    test_perplexity: float | None = Field(description="exp of their mean test nll.")


class SearchResult(Model):
    """`search.json`: everything the report says about one search."""

    contest: Contest = Field(description="The search.")
    trials: tuple[Trial, ...] = Field(description="In the order in which they were chosen.")
    published: Trial | None = Field(description="What others found, run as a trial.")
    full: tuple[FullRuns, ...] = Field(description="The winners, and what others found.")
    importances: dict[str, float] = Field(
        description="Share of the variance of the trials' nll that each key explains (fANOVA), "
        "of those that every trial has."
    )
    winner: FullRuns | None = Field(
        description="Of those of whose full runs at most one diverged or failed, the one with the "
        "lowest mean validation nll; null until all full runs have finished."
    )
    recipe: str | None = Field(description="The winner as a recipe that can be pasted.")

    def count(self, state: str) -> int:
        """Return the number of trials in a state."""
        return sum(trial.state == state for trial in self.trials)

    @property
    def candidates(self) -> list[FullRuns]:
        """The full runs of the trials that went on."""
        return [runs for runs in self.full if runs.trial is not None]

    @property
    def undecided(self) -> str:
        """Why there is no winner; nothing where there is one."""
        if self.winner:
            return ""
        planned = sum(runs.planned for runs in self.candidates)
        waiting = planned - sum(runs.finished for runs in self.candidates)
        if not self.candidates:
            return "not decided yet: no trial has been trained in full"
        if waiting:
            return f"not decided yet: {waiting} of {planned} full runs have no result"
        return "none: of each candidate, two or more full runs diverged or failed"

    @property
    def ranked(self) -> list[Trial]:
        """The trials that ended well, with what others found among them, the best first."""
        return ranked([*self.trials, *filter(None, [self.published])])

    @property
    def searched(self) -> list[str]:
        """The keys that are searched; those that follow another one are left out."""
        dimensions = self.contest.space.dimensions
        return [key for key, dimension in dimensions.items() if dimension.same_as is None]


def read_search(contest: Contest, full: Mapping[str, Sequence[str]], results: Path) -> SearchResult:
    """Return what a search came to, as far as it is.

    Args:
        contest: the search.
        full: cells of the full runs, by variant.
        results: the results folder.
    """
    trials = trials_of(contest, results)
    published = None
    if contest.published is not None:
        cell, point = contest.published.cell, contest.published.point
        published = read_trial(0, cell.partition("/")[0], cell, point, results)
    chosen = {}
    selection = results / "searches" / contest.name / "selection.json"
    if selection.exists():
        chosen = json.loads(selection.read_bytes())["winners"]
    runs = []
    for variant, cells in full.items():
        number = chosen[variant]["number"] if variant in chosen else None
        runs.append(full_runs(variant, number, cells, results))
    candidates = [run for run in runs if run.trial is not None]
    winner = None
    if all(run.finished == run.planned for run in candidates):
        whole = [run for run in candidates if run.planned - run.ok <= MAXIMUM_FAILED]
        scored = [run for run in whole if run.valid_perplexity is not None]
        winner = min(scored, key=lambda run: run.valid_perplexity or math.inf, default=None)
    recipe = None
    if winner is not None:
        point = chosen[winner.variant]["point"]
        recipe = recipe_to_paste(contest, f"{contest.name.partition('+')[0]}-best", point)
    return SearchResult(
        contest=contest,
        trials=tuple(trials),
        published=published,
        full=tuple(runs),
        importances=importances(contest.space, trials),
        winner=winner,
        recipe=recipe,
    )


def full_runs(variant: str, trial: int | None, cells: Sequence[str], results: Path) -> FullRuns:
    """Return what the full runs of a variant came to.

    A run without a result has finished if its newest attempt failed.
    """
    found = []
    failed = 0
    for cell in cells:
        path = results / "cells" / cell / "metrics.json"
        if path.exists():
            try:
                found.append(read_metrics(path))
            except (OSError, ValidationError) as error:
                raise AnalysisError(f"{path} cannot be read ({first_line(error)})") from error
        elif (seen := look(results / "attempts" / cell)) and seen.status == "failed":
            failed += 1
    valid = [each.valid.nll for each in found if each.status == "ok" and each.valid]
    test = [each.test.nll for each in found if each.status == "ok" and each.test]
    return FullRuns(
        variant=variant,
        trial=trial,
        planned=len(cells),
        finished=len(found) + failed,
        ok=len(valid),
        valid_perplexity=perplexity(fmean(valid)) if valid else None,
        test_perplexity=perplexity(fmean(test)) if test else None,
    )


def importances(space: Space, trials: Sequence[Trial]) -> dict[str, float]:
    """Return how much of the variance of the trials' nll each key explains, the most first.

    Functional ANOVA of a random forest (Hutter et al. 2014), by Optuna. What is left to 1 is of
    keys together. Trials that did not end well have no nll, and are left out.
    """
    good = ranked(trials)
    if len(good) < FEWEST_TRIALS or len({trial.nll for trial in good}) == 1:
        return {}

    import warnings

    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    study = study_of(space, sorted(good, key=lambda trial: trial.number))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # of normalize
        found: dict[str, float] = optuna.importance.get_param_importances(
            study, evaluator=evaluator, normalize=False
        )
    return found
