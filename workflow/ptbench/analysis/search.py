"""A search: what its trials came to, the next ones by Optuna's samplers, and the selection.

The sampler is made anew for every generation, from the results that are there, and seeded, so two
runs of a search make the same trials and nothing but files outlives a process.
"""

from __future__ import annotations

import contextlib
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
    Shown,
    Space,
    UnfitError,
    bounds,
    draw_points,
    is_whole,
    steps,
)
from ptbench.configuration.specification import Specification, parse_cell_path
from ptbench.errors import PtbenchError
from ptbench.model.recipe import Model
from ptbench.training.attempts import has_failed
from ptbench.training.records import Metrics, perplexity, read_metrics

if TYPE_CHECKING:
    import optuna

REFUSED = 10  # proposals in a row that are no trials, after which one is drawn at random
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
    state: Literal["ok", "diverged", "failed", "missing"] = Field(
        description="How it ended; missing: it has not, or not with its present recipe."
    )
    nll: float | None = Field(
        None, description="Validation nll [nats per token], if it ended well."
    )
    perplexity: float | None = Field(None, description="exp(nll).")
    seconds: float | None = Field(None, description="What its run took [s].")


def read_result(cell: str, fingerprint: str | None, results: Path) -> Metrics | None:
    """Return the result of a run; None if there is none, or it is of another specification.

    Raises:
        AnalysisError: if its metrics.json cannot be read.
    """
    path = results / "cells" / cell / "metrics.json"
    try:
        metrics = read_metrics(path)
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        raise AnalysisError(f"{path} cannot be read ({first_line(error)})") from error
    return metrics if metrics.fingerprint == fingerprint else None


def read_trial(
    number: int,
    cell: str,
    point: Point | None,
    fingerprint: str | None,
    results: Path,
    partial: bool = False,
) -> Trial:
    """Return a trial with what its run left.

    Args:
        number: of the trial.
        cell: its run.
        point: keys and values.
        fingerprint: of its specification; None if it is not chosen yet.
        results: the results folder.
        partial: whether trials may be under way. If not, one without a result has failed, because
            the workflow waits for all others.
    """
    trial = Trial(
        number=number, variant=cell.partition("/")[0], cell=cell, point=point, state="missing"
    )
    metrics = read_result(cell, fingerprint, results)
    if metrics is None:
        failed = not partial or has_failed(results / "attempts" / cell, fingerprint)
        return trial.model_copy(update={"state": "failed"}) if failed else trial
    update: dict[str, Any] = {"state": metrics.status, "seconds": metrics.seconds.total}
    if metrics.status == "ok" and metrics.valid is not None:
        update |= {"nll": metrics.valid.nll, "perplexity": metrics.valid.perplexity}
    return trial.model_copy(update=update)


def read_points(asked: Question | Contest, results: Path) -> list[Point]:
    """Return the points of the generations that have been proposed to this search, in order."""
    found: list[Point] = []
    for file in asked.files:
        try:
            content = json.loads(results.joinpath(*Path(file).parts[1:]).read_bytes())
            answered = Question.model_validate(content["question"])
            if any(
                getattr(answered, key) != getattr(asked, key)
                for key in ("protocol", "space", "method", "seed")
            ):
                break
            found += content["points"]
        except (OSError, ValueError, KeyError, TypeError):
            break
    return found


def read_trials(
    asked: Question | Contest, cells: Mapping[str, str], results: Path, partial: bool = False
) -> list[Trial]:
    """Return trials, in order, with what their runs left.

    Args:
        asked: says what is searched, and where the points are.
        cells: of the trials, by variant.
        results: the results folder.
        partial: as for `read_trial`; if not, every point must be known.

    Raises:
        AnalysisError: if one is not, or a result cannot be read.
    """
    known: list[Point | None] = []
    if asked.method == "random" and isinstance(asked, Contest):
        known += draw_points(asked.space, len(cells), asked.seed, asked.name)
    else:
        known += read_points(asked, results)
    if len(known) < len(cells) and not partial:
        raise AnalysisError(
            f"{len(known)} trials of {len(cells)} are in {', '.join(asked.files)}; give the same "
            "command again, which asks for the others"
        )
    known += [None] * len(cells)
    found = []
    for number, (variant, cell) in enumerate(cells.items(), start=1):
        point, fingerprint = known[number - 1], None
        if point is not None:
            fingerprint = asked.space.specification(variant, point, short=True).fingerprint
        found.append(read_trial(number, cell, point, fingerprint, results, partial))
    return found


def trials_of(contest: Contest, results: Path, partial: bool = False) -> list[Trial]:
    """Return all trials of a search, with what their runs left; see `read_trials`."""
    cells = {variant: f"{variant}/{contest.run}" for variant in contest.trials}
    return read_trials(contest, cells, results, partial)


def propose(question: Question, results: Path) -> dict[str, Any]:
    """Return the next generation of a search that learns: its points and specifications.

    Args:
        question: what is asked.
        results: the results folder, with the trials before and the files of their points.
    """
    told = read_trials(question, question.told, results)
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
    good = ranked(told)
    tried = [trial.point for trial in told]
    points: list[Point] = []
    for _ in range(count):
        for attempt in range(REFUSED + TRIES):
            if attempt >= REFUSED:
                study.enqueue_trial(sampled(space, space.draw(own)))
            trial = study.ask()
            point = space.point(lambda key, dimension: suggest(trial, key, dimension))  # noqa: B023
            try:
                space.specification("trial", point, short=True)
                space.specification("trial", point, short=False)
            except UnfitError:
                if good:  # as bad as the worst, or a Gaussian process proposes the same again
                    study.tell(trial, good[-1].nll)
                    continue
            else:
                if point not in [*tried, *points]:
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
        values = sampled(space, trial.point or {})
        study.add_trial(
            optuna.trial.create_trial(
                params=values,
                distributions={key: distribution(key, space.dimensions[key]) for key in values},
                value=worst if trial.nll is None else trial.nll,
            )
        )
    return study


def sampled(space: Space, point: Point) -> Point:
    """Return the part of a point that a sampler proposes: keys that follow no other."""
    return {k: value for k, value in point.items() if space.dimensions[k].same_as is None}


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


def recipe_to_paste(contest: Shown, name: str, point: Point) -> str:
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

    contest: Shown = Field(description="The search.")
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


def read_search(contest: Shown, results: Path, partial: bool = False) -> SearchResult:
    """Return what a search came to.

    Args:
        contest: the search.
        results: the results folder.
        partial: whether runs may be under way; see `read_trial`.

    Raises:
        AnalysisError: if a result cannot be read, or a trial is not known and must be.
    """
    published = None
    specifications: dict[str, Specification | None] = {}
    if beside := contest.published:
        cell = f"{beside.trial.variant}/{contest.run}"
        fingerprint = beside.trial.fingerprint
        published = read_trial(0, cell, beside.point, fingerprint, results, partial)
        specifications[beside.full.variant] = beside.full
    specifications |= dict.fromkeys(contest.winners)
    chosen = {}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        selection = json.loads(
            (results / "searches" / contest.name / "selection.json").read_bytes()
        )
        own_part = contest.model_dump(mode="json", include=set(Contest.model_fields))
        if selection["contest"] == own_part:
            chosen = selection["winners"]
            for variant in contest.winners:
                own = selection["specifications"][variant]
                specifications[variant] = Specification.model_validate(own)
    runs = [
        full_runs(variant, chosen.get(variant, {}).get("number"), own, contest, results)
        for variant, own in specifications.items()
    ]
    trials = trials_of(contest, results, partial)
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


def full_runs(
    variant: str,
    trial: int | None,
    specification: Specification | None,
    contest: Shown,
    results: Path,
) -> FullRuns:
    """Return what the full runs of a variant came to, those of its present specification.

    A run without a result has finished if it failed.
    """
    found = []
    failed = 0
    for run in contest.runs if specification else ():
        assert specification is not None
        accelerator = contest.accelerators[parse_cell_path(f"{variant}/{run}").framework]
        fingerprint = specification.on(accelerator).fingerprint
        if metrics := read_result(f"{variant}/{run}", fingerprint, results):
            found.append(metrics)
        else:
            failed += has_failed(results / "attempts" / variant / run, fingerprint)
    valid = [each.valid.nll for each in found if each.status == "ok" and each.valid]
    test = [each.test.nll for each in found if each.status == "ok" and each.test]
    return FullRuns(
        variant=variant,
        trial=trial,
        planned=len(contest.runs),
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
